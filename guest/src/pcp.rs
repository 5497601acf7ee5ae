//! Each CPU's own lists of free pages, so that most requests need no lock that others want.
//!
//! There is a list for each freetype and each order that is often asked for: one bank of lists for
//! mapped pages, one for unmapped. A list is filled from the zone by the batch and gives back by
//! the batch. Other CPUs reach in only to empty the lists when memory is short.
//!
//! Freed secret pages that were written to wait on a list of their own until there are enough of
//! them to be scrubbed together.

use crate::freetype::{FREETYPES, Freetype};
use crate::list::List;
use crate::lock::{RawGuard, RawLock};
use crate::meta::{Chunk, MemMap, State};
use crate::platform::{InterruptsOff, Platform};
use crate::sync::AtomicU32;
use crate::zone::Zone;
use core::sync::atomic::Ordering::Relaxed;

/// Orders that have lists: 0 to 3. Whole pageblocks have none, other than in Linux: one is more than
/// a CPU keeps, and goes to the zone at once.
const ORDERS: usize = 4;
/// Number of lists.
pub(crate) const LISTS: usize = ORDERS * FREETYPES;

/// Number of the list for an order and a freetype; `None` for an order that has none.
pub(crate) fn pindex(order: u8, freetype: Freetype) -> Option<usize> {
    let column = usize::from(order);
    (column < ORDERS).then(|| freetype.index() * ORDERS + column)
}

/// Order and freetype of the list with this number.
pub(crate) fn order_and_freetype(pindex: usize) -> Option<(u8, Freetype)> {
    let freetype = Freetype::from_index(pindex / ORDERS)?;
    // Below ORDERS, 4.
    Some(((pindex % ORDERS) as u8, freetype))
}

/// How many pages a CPU keeps to itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Marks {
    /// Pages that go to or from the zone at once.
    pub batch: u32,
    /// Pages on a CPU's lists above which a batch goes back.
    pub high: u32,
}

impl Marks {
    /// Marks for a zone of `pages`: a CPU keeps a small part of it, and not more than is quickly
    /// used.
    #[must_use]
    pub const fn for_zone(pages: u32) -> Self {
        let batch = pages / 2048;
        let batch = if batch < 4 { 4 } else { batch };
        let batch = if batch > 63 { 63 } else { batch };
        Self { batch, high: 6 * batch }
    }
}

/// One CPU's lists.
#[derive(Debug, Default)]
pub(crate) struct CpuLists {
    lock: RawLock,
    lists: [List; LISTS],
    pages: AtomicU32,
    dirty: List,
    dirty_chunks: AtomicU32,
    dirty_pages: AtomicU32,
}

impl CpuLists {
    /// Waits for the lists; interrupts are off until they are let go.
    pub(crate) fn lock<'l, P: Platform>(
        &'l self,
        platform: &P,
        off: InterruptsOff<'l, P>,
    ) -> Held<'l, P> {
        Held { lists: self, _guard: self.lock.lock(platform, off) }
    }
}

/// A CPU's lists while nobody else uses them.
#[must_use = "the lists are free again when this is dropped"]
pub(crate) struct Held<'l, P: Platform> {
    lists: &'l CpuLists,
    _guard: RawGuard<'l, P>,
}

impl<P: Platform> Held<'_, P> {
    /// Takes the newest chunk of a list.
    pub(crate) fn pop(&self, map: &MemMap<'_>, pindex: usize) -> Option<u32> {
        let list = &self.lists.lists[pindex];
        let index = list.newest()?;
        let (_, order) = map.page(index).any_head();
        list.remove(map, index);
        sub(&self.lists.pages, 1 << order);
        Some(index)
    }

    /// Puts a chunk on a list.
    pub(crate) fn push(&self, map: &MemMap<'_>, chunk: Chunk, pindex: usize) {
        self.lists.lists[pindex].push(map, chunk, State::Cached);
        add(&self.lists.pages, chunk.pages());
    }

    /// Gives chunks back to the zone until at most `keep` pages are left: the oldest of each list
    /// first, list after list in turn.
    pub(crate) fn drain(&self, map: &MemMap<'_>, zone: &mut Zone, keep: u32) {
        while self.lists.pages.load(Relaxed) > keep {
            for (pindex, list) in self.lists.lists.iter().enumerate() {
                let (Some(index), Some((order, _))) = (list.oldest(), order_and_freetype(pindex))
                else {
                    continue;
                };
                list.remove(map, index);
                zone.insert(map, Chunk { index, order });
                sub(&self.lists.pages, 1 << order);
            }
        }
    }

    /// Pages on the lists.
    pub(crate) fn pages(&self) -> u32 {
        self.lists.pages.load(Relaxed)
    }

    /// Puts a freed chunk on the list of those to be scrubbed.
    pub(crate) fn push_dirty(&self, map: &MemMap<'_>, chunk: Chunk) {
        self.lists.dirty.push(map, chunk, State::Dirty);
        add(&self.lists.dirty_chunks, 1);
        add(&self.lists.dirty_pages, chunk.pages());
    }

    /// Takes the chunk that was freed last off the list of those to be scrubbed.
    pub(crate) fn pop_dirty(&self, map: &MemMap<'_>) -> Option<Chunk> {
        let index = self.lists.dirty.newest()?;
        let (_, order) = map.page(index).any_head();
        let chunk = Chunk { index, order };
        self.lists.dirty.remove(map, index);
        sub(&self.lists.dirty_chunks, 1);
        sub(&self.lists.dirty_pages, chunk.pages());
        Some(chunk)
    }

    /// Chunks and pages that wait to be scrubbed.
    pub(crate) fn dirty(&self) -> (u32, u32) {
        (self.lists.dirty_chunks.load(Relaxed), self.lists.dirty_pages.load(Relaxed))
    }

    /// Adds the pages on the lists, by the freetype that their pageblocks have now.
    pub(crate) fn count(&self, map: &MemMap<'_>, cached: &mut [u32; FREETYPES]) {
        for list in self.lists.lists.iter().chain([&self.lists.dirty]) {
            for index in list.iter(map) {
                let (_, order) = map.page(index).any_head();
                cached[map.block_at(index).freetype().index()] += 1 << order;
            }
        }
    }
}

// Who holds the lock is alone: no read-modify-write is needed.
fn add(count: &AtomicU32, pages: u32) {
    count.store(count.load(Relaxed) + pages, Relaxed);
}

fn sub(count: &AtomicU32, pages: u32) {
    count.store(count.load(Relaxed) - pages, Relaxed);
}
