//! Free pages of the table pool: one bit a page, taken and given back by any CPU without a lock.

use crate::sync::{AtomicU32, AtomicU64};
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use lacuna_abi::layout::MAX_POOL_PAGES;

/// Models have a small pool: they make it anew for every order that they try.
const WORDS: usize = if cfg!(loom) { 2 } else { MAX_POOL_PAGES.div_ceil(64) };

/// The pages that hold no table. All zero, the state at the start, says that none is free.
#[derive(Debug)]
pub(crate) struct TablePages {
    /// A bit for each page of the pool: it is free.
    free: [AtomicU64; WORDS],
    /// Word in which a page was last taken or given back: where to look first.
    last: AtomicU32,
    /// Pages that were taken and not given back.
    taken: AtomicU32,
}

impl TablePages {
    /// A pool without a free page.
    pub(crate) fn new() -> Self {
        Self {
            free: core::array::from_fn(|_| AtomicU64::new(0)),
            last: AtomicU32::new(0),
            taken: AtomicU32::new(0),
        }
    }

    /// Says that the pages from `first` to before `end` are free.
    ///
    /// # Panics
    /// If there are more than any pool has.
    pub(crate) fn add(&self, first: u32, end: u32) {
        (first..end).for_each(|page| self.set_free(page));
    }

    /// Takes a free page.
    pub(crate) fn take(&self) -> Option<u32> {
        let last = self.last.load(Relaxed) as usize;
        (last..WORDS).chain(0..last).find_map(|word| self.take_from(word))
    }

    /// Gives a page back: nothing leads to it any more.
    ///
    /// # Panics
    /// If it is free already.
    pub(crate) fn give(&self, page: u32) {
        self.set_free(page);
        self.taken.fetch_sub(1, Relaxed);
        self.last.store(page / 64, Relaxed);
    }

    /// Pages that were taken and not given back.
    pub(crate) fn taken(&self) -> u32 {
        self.taken.load(Relaxed)
    }

    fn take_from(&self, word: usize) -> Option<u32> {
        let bits = &self.free[word];
        let mut free = bits.load(Relaxed);
        while free != 0 {
            let lowest = free & free.wrapping_neg();
            // Acquire, with the release of whoever gave the page back: its old contents are no
            // longer written by anyone.
            match bits.compare_exchange(free, free & !lowest, Acquire, Relaxed) {
                Ok(_) => {
                    self.taken.fetch_add(1, Relaxed);
                    // Below WORDS, 64.
                    self.last.store(word as u32, Relaxed);
                    return Some(word as u32 * 64 + lowest.trailing_zeros());
                }
                Err(now) => free = now,
            }
        }
        None
    }

    fn set_free(&self, page: u32) {
        let bit = 1 << (page % 64);
        let before = self.free[page as usize / 64].fetch_or(bit, Release);
        assert!(before & bit == 0, "table page {page} is freed, but is free already");
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::vec::Vec;

    #[test]
    fn every_page_is_taken_once_and_none_that_was_not_added() {
        let pages = TablePages::new();
        assert_eq!(pages.take(), None);
        pages.add(60, 200);
        let taken: BTreeSet<u32> = core::iter::from_fn(|| pages.take()).collect();
        assert_eq!(taken, (60..200).collect());
        assert_eq!(pages.taken(), 140);
        pages.give(199);
        assert_eq!((pages.take(), pages.take()), (Some(199), None));
    }

    #[test]
    fn a_page_given_back_far_behind_the_last_one_is_found() {
        let pages = TablePages::new();
        pages.add(0, MAX_POOL_PAGES as u32);
        while pages.take().is_some() {}
        pages.give(3);
        pages.last.store(40, Relaxed);
        assert_eq!(pages.take(), Some(3));
    }

    #[test]
    #[should_panic(expected = "free already")]
    fn a_page_that_is_freed_twice_is_noticed() {
        let pages = TablePages::new();
        pages.add(0, 2);
        let page = pages.take().unwrap();
        pages.give(page);
        pages.give(page);
    }

    #[test]
    fn cpus_that_take_at_once_never_get_the_same_page() {
        let pages = TablePages::new();
        pages.add(0, 100);
        let turns = |_| {
            for _ in 0..2000 {
                let held: Vec<_> = (0..40).filter_map(|_| pages.take()).collect();
                let distinct: BTreeSet<_> = held.iter().collect();
                assert_eq!(distinct.len(), held.len());
                held.into_iter().for_each(|page| pages.give(page));
            }
        };
        std::thread::scope(|scope| {
            (0..3).for_each(|cpu| drop(scope.spawn(move || turns(cpu))));
        });
        assert_eq!(pages.taken(), 0);
        assert_eq!(core::iter::from_fn(|| pages.take()).count(), 100);
    }
}
