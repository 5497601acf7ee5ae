//! Guest memory as the VMM sees it.
//!
//! Two files back it. The *low* one holds everything but the zone (image, tables, shared pages,
//! input, stacks, metadata), is mapped into this process and is never sealed. The *zone* is mapped
//! for KVM in a mapping that this process never looks through, so that closing it can never fault the
//! VMM itself. It reads the zone by file offset, whether sealed or not, and where a look at one page
//! must be quick, through a second mapping that is never closed.

use crate::machine::probe::ProbeMemory;
use crate::machine::sys::{self, HostMapping, Words};
use lacuna_abi::addr::{Gfn, Gpa, PAGE_SIZE};
use lacuna_abi::gate::PAGE_WORDS;
use lacuna_abi::layout::{Layout, Region, SEQUENCE_OFFSET};
use lacuna_abi::paging::Entry;
use lacuna_abi::walk::Tables;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicU64, Ordering};
use vm_memory::Bytes;

/// Bytes that are read or written at once.
const CHUNK: usize = 1 << 20;

/// Guest memory could not be made or reached.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The kernel gives no memory file or mapping.
    #[error(
        "cannot set up {mib} MiB of guest memory: {error}; lower [guest] memory_mib or free memory"
    )]
    Create {
        /// Size.
        mib: u64,
        /// Why.
        error: io::Error,
    },
    /// An access of the VMM itself went outside the memory: a fault of the VMM, reported as such.
    #[error("cannot access guest memory at {0}: {1}")]
    Access(Gpa, String),
}

/// The memory of one guest.
#[derive(Debug)]
pub struct Memory {
    layout: Layout,
    low_file: File,
    low: Words,
    zone_file: File,
    zone: HostMapping,
    /// The zone once more, never closed: for looks at frames that the guest has used.
    view: Words,
    probe: ProbeMemory,
}

impl Memory {
    /// Memory for this layout, all zero, none of it touched.
    ///
    /// # Errors
    /// [`MemoryError::Create`].
    pub fn new(layout: Layout) -> Result<Self, MemoryError> {
        let low_len = layout.low_end().0;
        let failed = |error| MemoryError::Create { mib: (layout.zone.len + low_len) >> 20, error };
        let low_file = sys::memory_file(c"lacuna-low", low_len).map_err(failed)?;
        let zone_file = sys::memory_file(c"lacuna-zone", layout.zone.len).map_err(failed)?;
        let size =
            |len| usize::try_from(len).map_err(|_| failed(io::ErrorKind::OutOfMemory.into()));
        let low = Words::new(&low_file, size(low_len)?).map_err(failed)?;
        let zone = HostMapping::new(&zone_file, size(layout.zone.len)?).map_err(failed)?;
        let view = Words::new(&zone_file, size(layout.zone.len)?).map_err(failed)?;
        let probe = ProbeMemory::new().map_err(failed)?;
        Ok(Self { layout, low_file, low, zone_file, zone, view, probe })
    }

    /// Where everything lies.
    #[must_use]
    pub const fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Address in this process at which KVM finds a low region.
    #[must_use]
    pub fn host_address(&self, region: &Region) -> u64 {
        self.low.address() + region.gpa.0
    }

    /// The mapping of the zone, which the second stage closes and opens.
    #[must_use]
    pub const fn zone_mapping(&self) -> &HostMapping {
        &self.zone
    }

    /// What a probe vCPU runs on, which is none of the guest's memory.
    #[must_use]
    pub const fn probe(&self) -> &ProbeMemory {
        &self.probe
    }

    /// Low memory, for simulated CPUs.
    #[must_use]
    pub const fn low(&self) -> &Words {
        &self.low
    }

    /// The zone as simulated CPUs access it, in a mapping that is never closed. To look at a page
    /// through it that was never written takes up memory for that page.
    #[must_use]
    pub const fn zone_words(&self) -> &Words {
        &self.view
    }

    /// Reads bytes of low memory.
    ///
    /// # Errors
    /// [`MemoryError::Access`] if they do not all lie there.
    pub fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
        self.low.bytes().read_slice(into, offset(at)?).map_err(|e| access(at, &e))
    }

    /// Writes bytes of low memory.
    ///
    /// # Errors
    /// [`MemoryError::Access`] if they do not all lie there.
    pub fn write(&self, at: Gpa, bytes: &[u8]) -> Result<(), MemoryError> {
        self.low.bytes().write_slice(bytes, offset(at)?).map_err(|e| access(at, &e))
    }

    /// `count` words of low memory from `at`, a multiple of 8, which the guest may write at any
    /// time.
    ///
    /// # Errors
    /// [`MemoryError::Access`] if they do not all lie there or are not aligned.
    #[inline]
    pub fn words(&self, at: Gpa, count: usize) -> Result<&[AtomicU64], MemoryError> {
        self.low.words(at.0, count).ok_or_else(|| access(at, &"no words are there"))
    }

    /// Reads an aligned word of low memory by one load: what the guest wrote, once, by value.
    ///
    /// # Errors
    /// [`MemoryError::Access`] outside low memory or if not aligned.
    #[inline]
    pub fn load(&self, at: Gpa) -> Result<u64, MemoryError> {
        Ok(self.word(at)?.load(Ordering::Acquire))
    }

    /// Writes an aligned word of low memory by one store.
    ///
    /// # Errors
    /// [`MemoryError::Access`] outside low memory or if not aligned.
    #[inline]
    pub fn store(&self, at: Gpa, value: u64) -> Result<(), MemoryError> {
        self.word(at)?.store(value, Ordering::Release);
        Ok(())
    }

    /// Writes consecutive words of low memory.
    ///
    /// # Errors
    /// [`MemoryError::Access`].
    pub fn store_words(&self, at: Gpa, words: &[u64]) -> Result<(), MemoryError> {
        for (place, word) in self.words(at, words.len())?.iter().zip(words) {
            place.store(*word, Ordering::Release);
        }
        Ok(())
    }

    /// Copies of consecutive words of low memory, each read once.
    ///
    /// # Errors
    /// [`MemoryError::Access`].
    #[inline]
    pub fn load_words<const N: usize>(&self, at: Gpa) -> Result<[u64; N], MemoryError> {
        let mut words = [0; N];
        for (word, place) in words.iter_mut().zip(self.words(at, N)?) {
            *word = place.load(Ordering::Acquire);
        }
        Ok(words)
    }

    /// A copy of the first `count` words of a page in the shared region, at this offset; zero behind
    /// them.
    ///
    /// # Errors
    /// [`MemoryError::Access`].
    pub fn shared_page(&self, offset: u64, count: usize) -> Result<[u64; PAGE_WORDS], MemoryError> {
        let mut page = [0; PAGE_WORDS];
        let at = self.layout.shared.gpa.wrapping_add(offset);
        for (word, place) in page.iter_mut().zip(self.words(at, count.min(PAGE_WORDS))?) {
            *word = place.load(Ordering::Acquire);
        }
        Ok(page)
    }

    /// Takes the next event number from the counter that guest and host share.
    ///
    /// # Errors
    /// [`MemoryError::Access`].
    pub fn next_event_number(&self) -> Result<u64, MemoryError> {
        let counter = self.word(self.layout.shared.gpa.wrapping_add(SEQUENCE_OFFSET))?;
        Ok(counter.fetch_add(1, Ordering::AcqRel).wrapping_add(1))
    }

    /// Number of the last event, as the shared counter says; the guest can write there.
    ///
    /// # Errors
    /// [`MemoryError::Access`].
    pub fn last_event_number(&self) -> Result<u64, MemoryError> {
        self.load(self.layout.shared.gpa.wrapping_add(SEQUENCE_OFFSET))
    }

    /// Copies all entries of the page table at `table`, each read once; false where no table can be.
    #[must_use]
    pub fn read_table(&self, table: Gfn, into: &mut [u64; PAGE_WORDS]) -> bool {
        if !self.layout.pool.contains(table.gpa()) {
            return false;
        }
        let Ok(words) = self.words(table.gpa(), PAGE_WORDS) else { return false };
        for (word, place) in into.iter_mut().zip(words) {
            *word = place.load(Ordering::Relaxed);
        }
        true
    }

    /// Writes an entry of the table pool by one store, and then the guest's copy of it.
    ///
    /// # Errors
    /// [`MemoryError::Access`] outside the pool or if not aligned.
    pub fn store_entry(&self, at: Gpa, entry: Entry) -> Result<(), MemoryError> {
        let Layout { pool, table_copy, .. } = self.layout;
        if !pool.contains(at) {
            return Err(access(at, &"no table is there"));
        }
        self.store(at, entry.0)?;
        self.store(table_copy.gpa.wrapping_add(at.0 - pool.gpa.0), entry.0)
    }

    /// Makes the guest's copy of the tables what the first `pages` pages of the table pool hold.
    ///
    /// # Errors
    /// [`MemoryError::Access`] if the pool has fewer.
    pub fn copy_tables(&self, pages: u64) -> Result<(), MemoryError> {
        let Layout { pool, table_copy, .. } = self.layout;
        let count = usize::try_from(pages).unwrap_or(usize::MAX).saturating_mul(PAGE_WORDS);
        let copies = self.words(table_copy.gpa, count)?;
        for (copy, word) in copies.iter().zip(self.words(pool.gpa, count)?) {
            copy.store(word.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        Ok(())
    }

    #[inline]
    fn word(&self, at: Gpa) -> Result<&AtomicU64, MemoryError> {
        self.words(at, 1)?.first().ok_or_else(|| access(at, &"no word is there"))
    }

    /// Units of work that CPU `cpu` says it has done.
    ///
    /// # Errors
    /// [`MemoryError::Access`].
    pub fn progress(&self, cpu: usize) -> Result<u64, MemoryError> {
        let word = SEQUENCE_OFFSET + 8 * (1 + cpu as u64);
        self.load(self.layout.shared.gpa.wrapping_add(word))
    }

    /// Zeroes a low region.
    ///
    /// # Errors
    /// [`MemoryError::Access`].
    pub fn wipe(&self, region: &Region) -> Result<(), MemoryError> {
        let zeroes = vec![0; CHUNK];
        let mut done = 0;
        while done < region.len {
            let left = usize::try_from(region.len - done).unwrap_or(CHUNK).min(CHUNK);
            self.write(region.gpa.wrapping_add(done), &zeroes[..left])?;
            done += left as u64;
        }
        Ok(())
    }

    /// Fills the whole zone with `byte`.
    ///
    /// # Errors
    /// [`MemoryError::Create`] when memory runs out.
    pub fn fill_zone(&self, byte: u8) -> Result<(), MemoryError> {
        let chunk = vec![byte; CHUNK];
        let mut done = 0;
        while done < self.layout.zone.len {
            self.zone_file
                .write_all_at(&chunk, done)
                .map_err(|error| MemoryError::Create { mib: self.layout.zone.len >> 20, error })?;
            done += chunk.len() as u64;
        }
        Ok(())
    }

    /// Reads bytes anywhere in guest memory, sealed or not: the one way by which the VMM looks at
    /// contents. `false` if they lie nowhere.
    #[must_use]
    pub fn inspect(&self, at: Gpa, into: &mut [u8]) -> bool {
        let len = into.len() as u64;
        match at.offset_from(self.layout.zone.gpa) {
            Some(offset) if offset.saturating_add(len) <= self.layout.zone.len => {
                self.zone_file.read_exact_at(into, offset).is_ok()
            }
            Some(_) => false,
            None => self.read(at, into).is_ok(),
        }
    }

    /// Puts `byte` into the zone, sealed or not; what was there. `None` where it cannot be reached.
    #[must_use]
    pub fn swap_byte(&self, at: Gpa, byte: u8) -> Option<u8> {
        let offset = at.offset_from(self.layout.zone.gpa)?;
        let mut was = [0];
        self.zone_file.read_exact_at(&mut was, offset).ok()?;
        self.zone_file.write_all_at(&[byte], offset).ok().map(|()| was[0])
    }

    /// Writes into the zone as a guest would.
    #[cfg(test)]
    pub(crate) fn write_zone_for_test(&self, at: Gpa, bytes: &[u8]) {
        self.zone_file.write_all_at(bytes, at.0 - self.layout.zone.gpa.0).unwrap();
    }

    /// Whether a zone frame that the guest has used is all zero, each word read once; `None` outside
    /// the zone. Looked at where it is mapped: a system call for each page that is handed out would
    /// cost more than all else that is judged of it.
    #[must_use]
    pub fn is_zero_in_use(&self, frame: Gfn) -> Option<bool> {
        let offset = frame.gpa().offset_from(self.layout.zone.gpa)?;
        let words = self.view.words(offset, PAGE_WORDS)?;
        Some(words.iter().fold(0, |all, word| all | word.load(Ordering::Relaxed)) == 0)
    }

    /// Whether a zone frame is all zero; `None` outside the zone or where it cannot be read.
    #[must_use]
    pub fn is_zero(&self, frame: Gfn) -> Option<bool> {
        let mut page = [0_u8; PAGE_SIZE as usize];
        self.layout.zone.contains(frame.gpa()).then_some(())?;
        // All bytes at once: a loop that could end early would be taken byte by byte.
        let zero = |page: &[u8]| page.iter().fold(0, |all, byte| all | byte) == 0;
        self.inspect(frame.gpa(), &mut page).then(|| zero(&page))
    }

    /// Offset of the first byte of a frame of the zone that is not zero; `None` if there is none, or
    /// the frame cannot be read.
    #[must_use]
    pub fn first_nonzero(&self, frame: Gfn) -> Option<u64> {
        let mut page = [0_u8; PAGE_SIZE as usize];
        let read = self.layout.zone.contains(frame.gpa()) && self.inspect(frame.gpa(), &mut page);
        (0..).zip(page).find(|(_, byte)| read && *byte != 0).map(|(offset, _)| offset)
    }

    /// Bytes of guest memory that were ever written: what the host really spends on the guest.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn touched_bytes(&self) -> io::Result<u64> {
        let blocks = self.low_file.metadata()?.blocks() + self.zone_file.metadata()?.blocks();
        Ok(blocks * 512)
    }

    /// Calls `each` with every part of guest memory that was ever written, in order, in pieces of
    /// at most a page that do not cross a page's end.
    ///
    /// # Errors
    /// What the kernel says while seeking or reading.
    pub fn for_each_page_with_data(&self, mut each: impl FnMut(Gpa, &[u8])) -> io::Result<()> {
        let mut page = [0; PAGE_SIZE as usize];
        for (file, start) in [(&self.low_file, 0), (&self.zone_file, self.layout.zone.gpa.0)] {
            let mut from = 0;
            while let Some((begin, end)) = sys::next_data(file, from)? {
                let mut at = begin & !(PAGE_SIZE - 1);
                while at < end {
                    file.read_exact_at(&mut page, at)?;
                    each(Gpa(start + at), &page);
                    at += PAGE_SIZE;
                }
                from = end;
            }
        }
        Ok(())
    }
}

impl Tables for Memory {
    /// Entries lie in the table pool and nowhere else.
    fn read_entry(&self, at: Gpa) -> Option<Entry> {
        if !self.layout.pool.contains(at) {
            return None;
        }
        self.load(at).ok().map(Entry)
    }
}

fn offset(at: Gpa) -> Result<usize, MemoryError> {
    usize::try_from(at.0).map_err(|error| access(at, &error))
}

fn access(at: Gpa, error: &impl ToString) -> MemoryError {
    MemoryError::Access(at, error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_abi::layout::Needs;

    fn memory() -> Memory {
        let needs = Needs { image: 4096, memory_mib: 16, cpus: 1, input: 4096, scratch: 0 };
        Memory::new(Layout::new(&needs).unwrap()).unwrap()
    }

    #[test]
    fn event_numbers_start_at_one_and_count_up() {
        let memory = memory();
        assert_eq!(memory.next_event_number().unwrap(), 1);
        assert_eq!(memory.next_event_number().unwrap(), 2);
        assert_eq!(memory.last_event_number().unwrap(), 2);
    }

    #[test]
    fn tables_are_read_in_the_pool_only() {
        let memory = memory();
        let layout = *memory.layout();
        memory.store(layout.pool.gpa, 7).unwrap();
        assert_eq!(memory.read_entry(layout.pool.gpa), Some(Entry(7)));
        assert_eq!(memory.read_entry(layout.image.gpa), None);
        assert_eq!(memory.read_entry(layout.pool.end()), None);
        assert_eq!(memory.read_entry(Gpa(u64::MAX)), None);
        let mut words = [1; PAGE_WORDS];
        assert!(memory.read_table(layout.pool.gpa.frame(), &mut words));
        assert_eq!((words[0], words[1], words[511]), (7, 0, 0));
        assert!(!memory.read_table(layout.image.gpa.frame(), &mut words));
        assert!(!memory.read_table(layout.pool.end().frame(), &mut words));
        assert!(!memory.read_table(Gfn(u64::MAX), &mut words));
    }

    #[test]
    fn an_entry_is_written_in_the_pool_and_in_the_copy_and_nowhere_else() {
        let memory = memory();
        let Layout { pool, table_copy, .. } = *memory.layout();
        memory.store(pool.gpa, 5).unwrap();
        memory.copy_tables(1).unwrap();
        memory.store_entry(pool.gpa.wrapping_add(16), Entry(7)).unwrap();
        for at in [pool.gpa, table_copy.gpa] {
            assert_eq!(memory.load_words::<4>(at).unwrap(), [5, 0, 7, 0]);
        }
        for outside in [pool.end(), Gpa(pool.gpa.0 - 8), table_copy.gpa, Gpa(pool.gpa.0 + 4)] {
            assert!(memory.store_entry(outside, Entry(7)).is_err(), "{outside}");
        }
    }

    #[test]
    fn a_written_zone_is_seen_and_an_untouched_one_is_zero() {
        let memory = memory();
        let first = memory.layout().zone_frames().start();
        assert_eq!((memory.is_zero(first), memory.is_zero_in_use(first)), (Some(true), Some(true)));
        assert_eq!((memory.is_zero(Gfn(1)), memory.is_zero_in_use(Gfn(1))), (None, None));
        memory.fill_zone(0xa5).unwrap();
        assert_eq!(
            (memory.is_zero(first), memory.is_zero_in_use(first)),
            (Some(false), Some(false))
        );
        let mut pages = 0;
        memory.for_each_page_with_data(|_, _| pages += 1).unwrap();
        assert_eq!(pages, 16 << 8);
    }

    #[test]
    fn inspection_outside_memory_is_refused() {
        let memory = memory();
        let mut byte = [0];
        assert!(!memory.inspect(Gpa(3 << 30), &mut byte));
        assert!(!memory.inspect(memory.layout().zone.end(), &mut byte));
        assert!(!memory.inspect(Gpa(u64::MAX), &mut byte));
    }

    #[test]
    fn a_wiped_region_is_zero() {
        let memory = memory();
        let input = memory.layout().input;
        memory.write(input.gpa, b"secret").unwrap();
        memory.wipe(&input).unwrap();
        assert_eq!(memory.load(input.gpa).unwrap(), 0);
    }
}
