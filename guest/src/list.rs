//! Lists of chunks, linked through the records of their first pages.
//!
//! The ends are atomics so that a list can lie in memory that CPUs share; who holds the lock of the
//! list changes it.

use crate::meta::{Chunk, MemMap, State};
use crate::sync::AtomicU32;
use core::sync::atomic::Ordering::Relaxed;

/// A list, newest first.
#[derive(Debug, Default)]
pub(crate) struct List {
    /// Ends, as index plus one; 0 for none.
    first: AtomicU32,
    last: AtomicU32,
}

impl List {
    /// The chunk that was put on last.
    pub(crate) fn newest(&self) -> Option<u32> {
        self.first.load(Relaxed).checked_sub(1)
    }

    /// The chunk that was put on first.
    pub(crate) fn oldest(&self) -> Option<u32> {
        self.last.load(Relaxed).checked_sub(1)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.first.load(Relaxed) == 0
    }

    /// Puts a chunk on the list, in `state`.
    pub(crate) fn push(&self, map: &MemMap<'_>, chunk: Chunk, state: State) {
        let newest = self.newest();
        let page = map.page(chunk.index);
        page.set_head(state, chunk.order);
        page.set_prev(None);
        page.set_next(newest);
        let place = chunk.index + 1;
        match newest {
            Some(newest) => map.page(newest).set_prev(Some(chunk.index)),
            None => self.last.store(place, Relaxed),
        }
        self.first.store(place, Relaxed);
    }

    /// Takes a chunk off the list that it is on: this one.
    pub(crate) fn remove(&self, map: &MemMap<'_>, index: u32) {
        let page = map.page(index);
        let (prev, next) = page.links();
        page.set_head(State::Plain, 0);
        let place = |index: Option<u32>| index.map_or(0, |index| index + 1);
        match prev {
            Some(prev) => map.page(prev).set_next(next),
            None => self.first.store(place(next), Relaxed),
        }
        match next {
            Some(next) => map.page(next).set_prev(prev),
            None => self.last.store(place(prev), Relaxed),
        }
    }

    /// The chunks, newest first.
    pub(crate) fn iter<'l>(&self, map: &'l MemMap<'_>) -> impl Iterator<Item = u32> + use<'l> {
        core::iter::successors(self.newest(), |index| map.page(*index).links().1)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::testing::Mock;
    use std::vec::Vec;

    #[test]
    fn chunks_leave_from_the_front_the_back_and_the_middle() {
        let mock = Mock::new(16, 1);
        let map = mock.map();
        let list = List::default();
        assert_eq!((list.newest(), list.oldest(), list.is_empty()), (None, None, true));
        for index in [8, 16, 24, 32] {
            list.push(&map, Chunk { index, order: 3 }, State::Cached);
        }
        assert_eq!(list.iter(&map).collect::<Vec<_>>(), [32, 24, 16, 8]);
        assert!(map.page(24).is_head(State::Cached, 3));
        for (gone, left) in [(24, &[32, 16, 8][..]), (8, &[32, 16]), (32, &[16]), (16, &[])] {
            list.remove(&map, gone);
            assert_eq!(list.iter(&map).collect::<Vec<_>>(), left);
            assert_eq!(list.newest(), left.first().copied());
            assert_eq!(list.oldest(), left.last().copied());
            assert!(map.page(gone).is_head(State::Plain, 0));
        }
    }
}
