//! Guest memory as simulated CPUs reach it: words by guest-physical address.

use super::frames::Frames;
use super::versions::Versions;
use crate::machine::memory::Memory;
use crate::machine::probe::PROBE_START;
use crate::machine::sys::Words;
use lacuna_abi::addr::Gpa;
use lacuna_abi::layout::{Layout, Region};
use lacuna_abi::paging::Entry;
use lacuna_abi::walk::Tables;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Acquire;

/// The memory of one guest, with what the MMUs of all its CPUs look at.
#[derive(Debug)]
pub struct Ram {
    layout: Layout,
    memory: Arc<Memory>,
    /// The memory of the probe CPU is there too.
    probes: bool,
    /// The second stage.
    pub(super) frames: Arc<Frames>,
    /// Writes to the tables.
    pub(super) versions: Versions,
}

impl Ram {
    /// The memory of this guest, closed as `frames` says.
    #[must_use]
    pub fn new(memory: Arc<Memory>, frames: Arc<Frames>) -> Self {
        let layout = *memory.layout();
        Self { layout, memory, probes: false, frames, versions: Versions::new(layout.cpus) }
    }

    /// The same memory as the probe CPU sees it, with its own.
    #[must_use]
    pub(super) fn with_probe_memory(self) -> Self {
        Self { probes: true, ..self }
    }

    /// Where everything lies.
    #[must_use]
    pub const fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The word at `at`, a multiple of 8; `None` where there is no memory.
    #[inline]
    #[must_use]
    pub fn word(&self, at: Gpa) -> Option<&AtomicU64> {
        let (words, offset) = self.place(at);
        words.words(offset, 1)?.first()
    }

    /// `count` words of a low region, from byte `offset`; `None` if they do not all lie there.
    #[must_use]
    pub fn region(&self, region: &Region, offset: u64, count: usize) -> Option<&[AtomicU64]> {
        let end = offset.checked_add(8 * u64::try_from(count).ok()?)?;
        (end <= region.len).then_some(())?;
        self.memory.low().words(region.gpa.0 + offset, count)
    }

    /// Zeroes `len` bytes from `at`; false where there is no memory.
    #[must_use]
    pub fn zero(&self, at: Gpa, len: u64) -> bool {
        let (words, offset) = self.place(at);
        usize::try_from(len).is_ok_and(|len| words.zero(offset, len))
    }

    #[inline]
    fn place(&self, at: Gpa) -> (&Words, u64) {
        match at.offset_from(self.layout.zone.gpa) {
            Some(offset) => (self.memory.zone_words(), offset),
            None if self.probes && at >= PROBE_START => {
                (self.memory.probe().words(), at.0 - PROBE_START.0)
            }
            None => (self.memory.low(), at.0),
        }
    }
}

impl Tables for Ram {
    /// As the processor does, a walk takes for a table whatever an entry points to.
    fn read_entry(&self, at: Gpa) -> Option<Entry> {
        self.word(at).map(|word| Entry(word.load(Acquire)))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use lacuna_abi::layout::Needs;
    use std::sync::atomic::Ordering::Relaxed;

    /// The memory of a small guest with `cpus` CPUs and its first tables; the root.
    pub(in crate::sim) fn booted(cpus: usize) -> (Arc<Memory>, Ram, Gpa) {
        let image = crate::image::Image::parse(crate::image::ORDINARY).unwrap();
        let needs = Needs { image: image.len(), memory_mib: 16, cpus, input: 4096, scratch: 4096 };
        let layout = Layout::new(&needs).unwrap();
        let memory = Arc::new(Memory::new(layout).unwrap());
        let info = lacuna_abi::boot::BootInfo::for_layout(&layout);
        let info = crate::machine::boot::prepare(&memory, &image, info).unwrap();
        let frames = Arc::new(Frames::new(layout.zone_frames()));
        let ram = Ram::new(Arc::clone(&memory), frames);
        (memory, ram, Gpa(info.root))
    }

    #[test]
    fn low_memory_and_the_zone_are_those_that_the_host_sees() {
        let (memory, ram, _) = booted(1);
        let layout = *memory.layout();
        ram.word(layout.scratch.gpa).unwrap().store(5, Relaxed);
        assert_eq!(memory.load(layout.scratch.gpa).unwrap(), 5);
        let frame = layout.zone_frames().start();
        ram.word(frame.gpa()).unwrap().store(6, Relaxed);
        assert_eq!(memory.is_zero(frame), Some(false));
        assert!(ram.zero(frame.gpa(), 4096));
        assert_eq!(memory.is_zero(frame), Some(true));
    }

    #[test]
    fn there_is_nothing_between_low_memory_and_the_zone_nor_behind_it() {
        let (memory, ram, _) = booted(1);
        let layout = *memory.layout();
        for at in [layout.low_end(), layout.zone.end(), Gpa(u64::MAX - 7)] {
            assert!(ram.word(at).is_none() && !ram.zero(at, 8), "{at}");
        }
        assert!(ram.region(&layout.shared, layout.shared.len - 8, 1).is_some());
        assert!(ram.region(&layout.shared, layout.shared.len - 8, 2).is_none());
    }
}
