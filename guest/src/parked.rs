//! Allocations that nobody owns any more and that could not be freed yet: a list that any CPU adds
//! to without a lock, and that whoever tries again takes as a whole.

use crate::meta::{Chunk, MemMap, State};
use crate::sync::AtomicU32;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

/// The list; empty by default.
#[derive(Debug, Default)]
pub(crate) struct Parked {
    /// The allocation that was parked last, as index plus one; 0 for none.
    first: AtomicU32,
}

impl Parked {
    /// Parks an allocation. Who takes it sees what its record says by now.
    pub(crate) fn push(&self, map: &MemMap<'_>, chunk: Chunk) {
        let page = map.page(chunk.index);
        page.set_head(State::Parked, chunk.order);
        let mut first = self.first.load(Relaxed);
        loop {
            page.set_next(first.checked_sub(1));
            match self.first.compare_exchange(first, chunk.index + 1, Release, Relaxed) {
                Ok(_) => return,
                Err(now) => first = now,
            }
        }
    }

    /// Takes all that is parked, the last one first: whoever gets one may park it again.
    ///
    /// # Panics
    /// If a page on the list is not the first one of a parked allocation.
    pub(crate) fn take_all<'m>(
        &self,
        map: &'m MemMap<'_>,
    ) -> impl Iterator<Item = Chunk> + use<'m> {
        let mut next = self.first.swap(0, Acquire).checked_sub(1);
        core::iter::from_fn(move || {
            let index = next?;
            let page = map.page(index);
            next = page.links().1;
            let order = page.head(State::Parked).unwrap_or_else(|| {
                panic!("page {index:#x} is on the list of parked pages, but is not parked")
            });
            Some(Chunk { index, order })
        })
    }
}
