//! The test machine's memory: tables as a VMM builds them, and words by address.

use super::judge::{Seen, State};
use lacuna_abi::addr::{BLOCK_SIZE, FrameRange, Gfn, Gpa, Gva, PAGE_SIZE};
use lacuna_abi::layout::{Layout, Place, WINDOW_LARGE_OFFSET, direct_map, window};
use lacuna_abi::paging::{Entry, Level};
use lacuna_abi::walk::{entry_address, locate};
use std::boxed::Box;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// Table entries by place.
pub(crate) type Tables = HashMap<u64, Entry, BuildHasherDefault<PlaceHasher>>;

/// A hash for places of entries, which nobody chooses to collide: every access walks the tables.
#[derive(Default)]
pub(crate) struct PlaceHasher(u64);

impl Hasher for PlaceHasher {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64((*byte).into()));
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = (self.0 ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// What a frame holds.
pub(crate) enum Contents {
    /// The same word throughout.
    Uniform(u64),
    Words(Box<[u64; 512]>),
}

impl Contents {
    /// What memory holds that nobody cleared.
    pub(crate) const DIRTY: Self = Self::Uniform(0xa5a5_a5a5_a5a5_a5a5);

    pub(crate) fn is_zero(&self) -> bool {
        match self {
            Self::Uniform(word) => *word == 0,
            Self::Words(words) => words.iter().all(|word| *word == 0),
        }
    }

    fn word(&self, index: usize) -> u64 {
        match self {
            Self::Uniform(word) => *word,
            Self::Words(words) => words[index],
        }
    }

    fn set_word(&mut self, index: usize, value: u64) {
        match self {
            Self::Words(words) => words[index] = value,
            Self::Uniform(word) => {
                let mut words = Box::new([*word; 512]);
                words[index] = value;
                *self = Self::Words(words);
            }
        }
    }
}

impl State {
    pub(crate) fn load(&self, cpu: usize, va: Gva) -> u64 {
        assert!(va.is_aligned(8), "{va}");
        if self.layout.scratch.contains_va(va) {
            return self.scratch.get(&va.0).copied().unwrap_or(0);
        }
        if self.layout.input.contains_va(va) {
            let index = (va.0 - self.layout.input.va.0) as usize / 8;
            return self.input.get(index).copied().unwrap_or(0);
        }
        let (frame, offset) = self.reach(cpu, va, false);
        self.frame(frame).contents.word(offset as usize / 8)
    }

    pub(crate) fn store(&mut self, cpu: usize, va: Gva, value: u64) {
        assert!(va.is_aligned(8), "{va}");
        if self.layout.scratch.contains_va(va) {
            self.scratch.insert(va.0, value);
            return;
        }
        let (frame, offset) = self.reach(cpu, va, true);
        self.frame_mut(frame).contents.set_word(offset as usize / 8, value);
    }

    /// Whole pages, as all of the allocator's zeroing is.
    pub(crate) fn zero(&mut self, cpu: usize, va: Gva, bytes: u64) {
        let first = self.fill(cpu, va, bytes, 0);
        if self.layout.place_of(va) == Place::Window(cpu) {
            self.see(Seen::Zero(FrameRange::new(first, bytes / PAGE_SIZE).unwrap()));
        }
    }

    /// Whole pages of the zone; the first.
    pub(crate) fn fill(&mut self, cpu: usize, va: Gva, bytes: u64, word: u64) -> Gfn {
        assert!(va.is_aligned(PAGE_SIZE) && bytes.is_multiple_of(PAGE_SIZE), "{va}, {bytes}");
        let (first, _) = self.reach(cpu, va, true);
        for offset in (0..bytes).step_by(PAGE_SIZE as usize) {
            let (frame, _) = self.reach(cpu, va.wrapping_add(offset), true);
            assert_eq!(frame.0, first.0 + offset / PAGE_SIZE);
            self.frame_mut(frame).contents = Contents::Uniform(word);
        }
        first
    }
}

/// The first tables: the zone in the direct map, and tables for every CPU's window. Also the first
/// page of the pool that they leave free.
pub(crate) fn boot_tables(layout: &Layout) -> (Tables, Gpa) {
    let mut tables = Tables::default();
    let mut next = layout.pool.gpa.0 + PAGE_SIZE;
    for block in 0..layout.zone_blocks() {
        let gpa = layout.zone.gpa.wrapping_add(block * BLOCK_SIZE);
        let at = table_for(layout, &mut tables, &mut next, direct_map(gpa), Level::Pd);
        let flags = Entry::DATA | Entry::GLOBAL | Entry::PAGE_SIZE;
        tables.insert(at.0, Entry::new(gpa.frame(), flags));
    }
    for cpu in 0..layout.cpus {
        table_for(layout, &mut tables, &mut next, window(cpu), Level::Pt);
        let large = window(cpu).wrapping_add(WINDOW_LARGE_OFFSET);
        table_for(layout, &mut tables, &mut next, large, Level::Pd);
    }
    (tables, Gpa(next))
}

/// Place of the entry of `level` for `va`, with every table above it made where it is missing.
fn table_for(layout: &Layout, tables: &mut Tables, next: &mut u64, va: Gva, level: Level) -> Gpa {
    let mut table = layout.pool.gpa;
    let mut here = Level::Pml4;
    while here > level {
        let at = entry_address(table, here, va);
        let entry = tables.entry(at.0).or_insert_with(|| {
            *next += PAGE_SIZE;
            Entry::new(Gfn((*next - PAGE_SIZE) / PAGE_SIZE), Entry::TABLE)
        });
        table = entry.frame(here).gpa();
        here = here.below().unwrap();
    }
    let read =
        |at: Gpa| layout.pool.contains(at).then(|| tables.get(&at.0).copied().unwrap_or_default());
    locate(&read, layout.pool.gpa, va, level).unwrap()
}
