//! One CPU's window: which addresses are in use, and which must be flushed before they serve
//! again. Bookkeeping only; the flushes are the mermap's.

use super::{MermapCounters, MermapError};
use crate::space::Run;
use core::iter;
use lacuna_abi::addr::{BLOCK_SIZE, Gpa, PAGE_SIZE};
use lacuna_abi::layout::{WINDOW_LARGE_OFFSET, WINDOW_LARGE_SLOTS, WINDOW_PAGES, window};
use lacuna_abi::paging::Level;

/// Mappings that one CPU may have in the 4 KiB part of its window at once, the reserve not
/// counted.
pub const SLOTS: usize = 4;
/// Pages of the 4 KiB part that [`super::Mermap::get`] may use: all but the reserve.
pub const PAGES: u64 = WINDOW_PAGES - 1;
const LARGE_SLOTS: usize = WINDOW_LARGE_SLOTS as usize;

/// Which part of the window a mapping lies in, and its slot there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Part {
    Small(usize),
    Large(usize),
    Reserve,
}

/// What became of an address that is flushed by itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Place {
    /// Nothing was mapped here since the last flush.
    #[default]
    Clean,
    /// Nothing is mapped here, but something may be cached.
    Stale,
    /// In use.
    Live,
}

/// Pages of the 4 KiB part in use; none for a free slot.
#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    first: u64,
    pages: u64,
}

/// One CPU's window.
#[derive(Debug, Default)]
pub(super) struct Window {
    /// Place of the first entry of the 4 KiB part.
    pub(super) table: Gpa,
    /// Place of the first entry of the 2 MiB part.
    pub(super) directory: Gpa,
    /// First page that was not handed out since it was last flushed: nothing is cached of it, nor of
    /// those behind it.
    next: u64,
    slots: [Slot; SLOTS],
    reserve: Place,
    large: [Place; LARGE_SLOTS],
    pub(super) counts: MermapCounters,
}

impl Window {
    /// Takes a slot and pages of the 4 KiB part: the slot, the first page, and, where addresses
    /// start over, how many pages from the first on may be cached and must be flushed; otherwise 0.
    /// The slot is looked for first and addresses start over only where that helps, so that no flush
    /// is wasted.
    pub(super) fn take_pages(&mut self, pages: u64) -> Result<(usize, u64, u64), MermapError> {
        let slot = self.slots.iter().position(|s| s.pages == 0).ok_or(MermapError::NoSlot)?;
        let mut stale = 0;
        if pages > PAGES - self.next {
            let above = self.slots.iter().map(|s| s.first + s.pages).max().unwrap_or(0);
            if pages > PAGES - above {
                return Err(MermapError::NoSpace);
            }
            // What lies below stays as it is: it is not handed out again before addresses start
            // over once more, and then it is among those that are flushed.
            stale = self.next - above;
            self.next = above;
        }
        let first = self.next;
        self.next += pages;
        self.slots[slot] = Slot { first, pages };
        Ok((slot, first, stale))
    }

    /// Takes a slot of the 2 MiB part, a clean one if there is one: the slot, and whether its
    /// address must be flushed.
    pub(super) fn take_block(&mut self) -> Result<(usize, bool), MermapError> {
        let free = |wanted| self.large.iter().position(|place| *place == wanted);
        let slot = free(Place::Clean).or_else(|| free(Place::Stale)).ok_or(MermapError::NoSlot)?;
        Ok((slot, core::mem::replace(&mut self.large[slot], Place::Live) == Place::Stale))
    }

    /// Takes the reserve; whether its address must be flushed.
    pub(super) fn take_reserve(&mut self) -> Result<bool, MermapError> {
        if self.reserve == Place::Live {
            return Err(MermapError::ReserveInUse);
        }
        Ok(core::mem::replace(&mut self.reserve, Place::Live) == Place::Stale)
    }

    /// Gives back what was taken.
    pub(super) fn put(&mut self, part: Part) {
        match part {
            Part::Small(slot) => self.slots[slot] = Slot::default(),
            Part::Large(slot) => self.large[slot] = Place::Stale,
            Part::Reserve => self.reserve = Place::Stale,
        }
    }

    /// The whole window was flushed.
    pub(super) fn flushed(&mut self) {
        for place in self.large.iter_mut().chain(iter::once(&mut self.reserve)) {
            if *place == Place::Stale {
                *place = Place::Clean;
            }
        }
    }

    /// Number of mappings in use.
    pub(super) fn live(&self) -> usize {
        let places = self.large.iter().chain(iter::once(&self.reserve));
        places.filter(|place| **place == Place::Live).count()
            + self.slots.iter().filter(|slot| slot.pages != 0).count()
    }

    /// The run of `count` pages from page `first` of the 4 KiB part of `cpu`'s window.
    pub(super) fn small_run(&self, cpu: usize, first: u64, count: u32) -> Run {
        let at = self.table.wrapping_add(8 * first);
        Run { at, va: window(cpu).wrapping_add(first * PAGE_SIZE), level: Level::Pt, count }
    }

    /// The entry of a slot of the 2 MiB part of `cpu`'s window.
    pub(super) fn large_run(&self, cpu: usize, slot: usize) -> Run {
        let slot = slot as u64;
        let va = window(cpu).wrapping_add(WINDOW_LARGE_OFFSET + slot * BLOCK_SIZE);
        Run { at: self.directory.wrapping_add(8 * slot), va, level: Level::Pd, count: 1 }
    }
}
