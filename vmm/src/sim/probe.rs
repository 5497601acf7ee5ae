//! A probe CPU of a simulated machine: an MMU with first tables of its own, which walks them and
//! obeys the second stage as those of the guest's CPUs do.

use super::frames::Frames;
use super::mmu::{Fault, Mmu};
use super::ram::Ram;
use crate::audit::{Probe, ProbeKind, Touched};
use crate::gate::Prober;
use crate::machine::exit::AccessKind;
use crate::machine::memory::{Memory, MemoryError};
use crate::machine::probe::{MAX_TOUCHES, PROBE_START, Touch};
use lacuna_abi::addr::Gfn;
use lacuna_guest::platform::AddressSpace;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Release};

/// How a simulated CPU can touch: it executes no instructions, so it fetches none.
const KINDS: &[ProbeKind] = &[ProbeKind::Read, ProbeKind::Write];
/// Its number: that of no CPU of the guest.
const NUMBER: usize = usize::MAX >> 1;

/// Touches frames through tables of its own.
pub(super) struct MmuProber {
    memory: Arc<Memory>,
    ram: Ram,
    seed: u64,
}

impl MmuProber {
    /// A prober of this guest's memory, closed as `frames` says.
    ///
    /// # Errors
    /// [`MemoryError::Create`].
    pub(super) fn new(
        memory: Arc<Memory>,
        frames: Arc<Frames>,
        seed: u64,
    ) -> Result<Self, MemoryError> {
        let ram = Ram::new(Arc::clone(&memory), frames).with_probe_memory();
        Ok(Self { memory, ram, seed })
    }

    fn round(&self, probes: &[Probe]) -> Vec<Touched> {
        let frames: Vec<Gfn> = probes.iter().map(|probe| probe.frame).collect();
        let failed = |why: String| vec![Touched::Failed(why); probes.len()];
        let opened = match self.memory.probe().open(&frames) {
            Ok(opened) => opened,
            Err(error) => return failed(format!("its memory cannot be opened: {error}")),
        };
        // It has cached nothing, so that each touch walks the tables that were written just now.
        let mut mmu = Mmu::new(NUMBER, self.seed);
        for kind in KINDS {
            let control = self.make(&mut mmu, &Touch::control(*kind));
            if control != Touched::WentThrough {
                return failed(format!("a {} of its own memory: {control:?}", kind.name()));
            }
        }
        let touched = (0..).zip(probes).map(|(index, probe)| {
            let at = probe.frame.gpa().wrapping_add(probe.offset);
            let mut word = [0; 8];
            if !self.memory.inspect(at, &mut word) {
                return Touched::Failed("the frame cannot be read by the host".into());
            }
            let touch = Touch::new(index, probe.kind, at, u64::from_le_bytes(word));
            self.make(&mut mmu, &touch)
        });
        let touched = touched.collect();
        drop(opened);
        touched
    }

    fn make(&self, mmu: &mut Mmu, touch: &Touch) -> Touched {
        let space = AddressSpace { root: PROBE_START, pcid: 0 };
        let (write, kind) = match touch.kind {
            ProbeKind::Read => (false, AccessKind::Read),
            ProbeKind::Write => (true, AccessKind::Write),
            ProbeKind::Fetch => return Touched::Failed("a simulated CPU fetches nothing".into()),
        };
        match mmu.access(&self.ram, space, touch.va, write) {
            Err(Fault::Sealed(gpa, how)) if gpa == touch.gpa && how == kind => Touched::Trapped,
            Err(fault) => Touched::Failed(format!("the access ended with {fault:?}")),
            Ok(gpa) => match self.ram.word(gpa) {
                Some(word) if gpa == touch.gpa && write => {
                    word.store(touch.value, Release);
                    Touched::WentThrough
                }
                Some(word) if gpa == touch.gpa && word.load(Acquire) == touch.value => {
                    Touched::WentThrough
                }
                _ => Touched::Failed("the probe reached something else than memory".into()),
            },
        }
    }
}

impl Prober for MmuProber {
    fn kinds(&self) -> &'static [ProbeKind] {
        KINDS
    }

    fn touch(&mut self, probes: &[Probe]) -> Vec<Touched> {
        probes.chunks(MAX_TOUCHES).flat_map(|round| self.round(round)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::ram::tests::booted;
    use super::*;
    use lacuna_abi::addr::FrameRange;

    fn touches(frame: Gfn) -> Vec<Probe> {
        KINDS.iter().map(|kind| Probe { frame, offset: 0x40, kind: *kind }).collect()
    }

    #[test]
    fn closed_frames_trap_and_open_ones_do_not_and_nothing_changes() {
        let (memory, ram, _) = booted(1);
        let mut prober = MmuProber::new(Arc::clone(&memory), Arc::clone(&ram.frames), 1).unwrap();
        let first = memory.layout().zone_frames().start();
        let next = first.wrapping_add(1);
        memory.write_zone_for_test(first.gpa(), &[0xa5; 8192]);
        let mut expect = |frame, outcome: Touched| {
            assert_eq!(prober.touch(&touches(frame)), [outcome.clone(), outcome], "{frame}");
        };
        expect(first, Touched::WentThrough);
        ram.frames.set(FrameRange::single(first), true);
        expect(first, Touched::Trapped);
        expect(next, Touched::WentThrough);
        ram.frames.set(FrameRange::single(first), false);
        expect(first, Touched::WentThrough);
        let mut bytes = [0; 8192];
        assert!(memory.inspect(first.gpa(), &mut bytes));
        assert!(bytes.iter().all(|byte| *byte == 0xa5));
    }

    #[test]
    fn its_own_memory_is_not_that_of_the_guests_cpus() {
        let (memory, ram, _) = booted(1);
        assert!(ram.word(PROBE_START).is_none());
        let own = Ram::new(memory, Arc::clone(&ram.frames)).with_probe_memory();
        assert!(own.word(PROBE_START).is_some());
    }

    #[test]
    fn a_frame_outside_memory_and_a_fetch_fail_with_a_reason() {
        let (memory, ram, _) = booted(1);
        let mut prober = MmuProber::new(Arc::clone(&memory), ram.frames, 1).unwrap();
        let frame = memory.layout().zone_frames().start();
        for probe in [
            Probe { frame: memory.layout().zone_frames().end(), offset: 0, kind: ProbeKind::Read },
            Probe { frame, offset: 0, kind: ProbeKind::Fetch },
        ] {
            let touched = prober.touch(&[probe]);
            assert!(matches!(&touched[..], [Touched::Failed(_)]), "{touched:?}");
        }
    }
}
