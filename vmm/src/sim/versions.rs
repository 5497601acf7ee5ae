//! Counts writes to the tables, so that a cached translation that cannot be stale need not be
//! compared with them.

use super::random::Random;
use lacuna_abi::addr::Gva;
use lacuna_abi::direct::TableOp;
use lacuna_abi::event::EntryWrite;
use lacuna_abi::paging::Level;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Release};

/// Counters that the blocks of address space share.
const PLACES: usize = 4096;
/// Blocks of a write that are counted one by one.
const FEW: u64 = 64;

/// Writes so far, by the block of 2 MiB of address space that they concern.
#[derive(Debug)]
pub struct Versions {
    blocks: Box<[AtomicU64]>,
    /// Writes that concern many blocks.
    all: AtomicU64,
    /// Writes to entries that may point to a table.
    links: AtomicU64,
    /// One CPU alone writes entries.
    alone: bool,
    /// First address and bytes of the latest write: where translations change is where a CPU that
    /// guesses does most harm.
    latest: [AtomicU64; 2],
}

impl Versions {
    /// Nothing was written yet, and so many CPUs will write.
    #[must_use]
    pub fn new(cpus: usize) -> Self {
        let blocks = (0..PLACES).map(|_| AtomicU64::new(0)).collect();
        let [all, links] = [1, 1].map(AtomicU64::new);
        let latest = [0, 1].map(AtomicU64::new);
        Self { blocks, all, links, alone: cpus == 1, latest }
    }

    /// A number that changes when an entry that `va` is translated through is written. Never 0.
    #[inline]
    #[must_use]
    pub fn at(&self, va: Gva) -> u64 {
        // Both only grow, so that their sum stays the same only if both do.
        self.all.load(Acquire) + self.blocks[place(va.0 >> Level::Pd.span_shift())].load(Acquire)
    }

    /// A number that changes when an entry that may point to a table is written. Never 0.
    #[inline]
    #[must_use]
    pub fn links(&self) -> u64 {
        self.links.load(Acquire)
    }

    /// An address that the latest write concerns.
    pub fn recent(&self, random: &mut Random) -> Gva {
        let [va, bytes] = [&self.latest[0], &self.latest[1]].map(|word| word.load(Acquire));
        Gva(va).wrapping_add(random.below(bytes))
    }

    /// Counts a write, once it is visible.
    pub fn count(&self, write: &EntryWrite) {
        let block = write.va.0 >> Level::Pd.span_shift();
        let blocks = write.span().div_ceil(Level::Pd.span());
        if blocks <= FEW {
            for block in block..block + blocks {
                self.add_one(&self.blocks[place(block)]);
            }
        } else {
            self.add_one(&self.all);
        }
        self.latest[0].store(write.va.0, Release);
        self.latest[1].store(write.span(), Release);
        if write.level > Level::Pt {
            self.add_one(&self.links);
        }
    }

    /// Counts what an operation wrote; what is filled no root reaches.
    pub fn count_op(&self, op: &TableOp) {
        if let TableOp::Write { write, .. } = op {
            self.count(write);
        }
    }

    /// Counts. With several CPUs no write may be lost, and that takes a locked instruction.
    #[inline]
    fn add_one(&self, counter: &AtomicU64) {
        if self.alone {
            counter.store(counter.load(Acquire) + 1, Release);
        } else {
            counter.fetch_add(1, AcqRel);
        }
    }
}

#[inline]
const fn place(block: u64) -> usize {
    ((block ^ (block >> 12)) % PLACES as u64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_abi::addr::Gpa;
    use lacuna_abi::paging::Entry;

    fn write(va: u64, level: Level, count: u32) -> EntryWrite {
        let (old, new) = (Entry::EMPTY, Entry::EMPTY);
        EntryWrite { root: Gpa(0), pcid: 0, va: Gva(va), level, count, old, new, grant: 0 }
    }

    #[test]
    fn a_write_changes_the_number_of_all_that_it_spans() {
        const BASE: u64 = 0xffff_9100_0000_0000;
        let block = |n: u64| Gva(BASE + (n << 21));
        let cases = [
            (write(BASE + 0x1000, Level::Pt, 511), vec![0], vec![1, 511], 0),
            (write(BASE, Level::Pd, 2), vec![0, 1], vec![2], 1),
            (write(BASE, Level::Pd, 512), vec![0, 7, 511], vec![], 1),
            (write(BASE, Level::Pml4, 1), vec![0, 511, 100_000], vec![], 1),
        ];
        for (cpus, (write, changed, unchanged, links)) in
            [1, 2].into_iter().flat_map(|cpus| cases.iter().map(move |case| (cpus, case)))
        {
            let versions = Versions::new(cpus);
            let before = |n: &u64| versions.at(block(*n));
            let old: Vec<_> = changed.iter().chain(unchanged).map(before).collect();
            let old_links = versions.links();
            versions.count(write);
            let new: Vec<_> = changed.iter().chain(unchanged).map(before).collect();
            for (index, (old, new)) in old.iter().zip(&new).enumerate() {
                assert_eq!(old != new, index < changed.len(), "{write:?}, {index}");
            }
            assert_eq!(versions.links() - old_links, *links);
        }
    }
}
