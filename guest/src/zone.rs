//! The zone's buddy lists: orders 0 to 10, one list for each freetype and order.
//!
//! Invariant: all pageblocks of a free chunk have one freetype, and the chunk is on that
//! freetype's list. So the pageblock alone says which list a page is on or goes back to.

use crate::freetype::{FREETYPES, Freetype, Migratetype};
use crate::meta::{Chunk, MAX_ORDER, MemMap, State};
use lacuna_abi::addr::BLOCK_ORDER;

const ORDERS: usize = MAX_ORDER as usize + 1;
/// Order of a pageblock.
pub(crate) const BLOCK: u8 = BLOCK_ORDER as u8;

/// Free pages of the zone, and those that never were on a list.
#[derive(Debug, Default)]
pub(crate) struct Zone {
    /// First chunk of each list.
    heads: [[Option<u32>; ORDERS]; FREETYPES],
    /// For each freetype, a bit for each order whose list is not empty.
    filled: [u16; FREETYPES],
    /// First page that never entered the lists; all behind it did not either.
    fresh: u32,
    free_mapped: u32,
    free_unmapped: u32,
}

/// Where the zone's pages are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Usage {
    pub(crate) free_mapped: u32,
    pub(crate) free_unmapped: u32,
    /// Handed out, withheld, or just changing sides.
    pub(crate) allocated: u32,
    pub(crate) fresh: u32,
}

/// A chunk taken for a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Taken {
    pub(crate) index: u32,
    /// It came from another migratetype's list.
    pub(crate) fallback: bool,
}

impl Zone {
    /// Takes 2^`order` pages of `wanted`: from its own lists, then by stealing whole pageblocks,
    /// then from fresh memory, then by stealing less. The flag `UNMAPPED` is never stolen across.
    pub(crate) fn take(&mut self, map: &MemMap<'_>, order: u8, wanted: Freetype) -> Option<Taken> {
        loop {
            if let Some(index) = self.take_own(map, order, wanted) {
                return Some(Taken { index, fallback: false });
            }
            if let Some(taken) = self.steal(map, order, order.max(BLOCK), wanted) {
                return Some(taken);
            }
            if wanted.unmapped || !self.enter_fresh(map) {
                return self.steal(map, order, order, wanted);
            }
        }
    }

    /// Takes a wholly free pageblock, or two that make an order-10 chunk, off the mapped side, to
    /// be flipped: of `migratetype` first.
    pub(crate) fn take_mapped_blocks(
        &mut self,
        map: &MemMap<'_>,
        order: u8,
        migratetype: Migratetype,
    ) -> Option<Chunk> {
        let own = Freetype::mapped(migratetype);
        loop {
            for freetype in core::iter::once(own).chain(own.fallbacks()) {
                if let Some(index) = self.take_own(map, order, freetype) {
                    return Some(Chunk { index, order });
                }
            }
            if !self.enter_fresh(map) {
                return None;
            }
        }
    }

    /// Takes a wholly free pageblock off the unmapped side, to be flipped back: two that make an
    /// order-10 chunk, if that is what `order` needs and there are any.
    pub(crate) fn take_unmapped_blocks(&mut self, map: &MemMap<'_>, order: u8) -> Option<Chunk> {
        for order in [order.max(BLOCK), BLOCK] {
            for migratetype in Migratetype::ALL {
                if let Some(index) = self.take_own(map, order, Freetype::unmapped(migratetype)) {
                    return Some(Chunk { index, order });
                }
            }
        }
        None
    }

    /// Puts a chunk on the lists of its pageblock's freetype, merged with its free buddies. Buddies
    /// on two sides of the direct map stay apart.
    pub(crate) fn insert(&mut self, map: &MemMap<'_>, mut chunk: Chunk) {
        let freetype = map.block_at(chunk.index).freetype();
        while chunk.order < MAX_ORDER {
            let buddy = Chunk { index: chunk.index ^ chunk.pages(), order: chunk.order };
            if !map.get(buddy.index).is_some_and(|page| page.is_head(State::Free, buddy.order)) {
                break;
            }
            let block = map.block_at(buddy.index);
            let other = block.freetype();
            if other.unmapped != freetype.unmapped {
                break;
            }
            self.remove(map, buddy, other);
            // Differs only where the buddy is a pageblock of its own, which then goes along.
            if other != freetype {
                block.set_freetype(freetype);
            }
            chunk = Chunk { index: chunk.index & buddy.index, order: chunk.order + 1 };
        }
        self.push(map, chunk, freetype);
    }

    /// Takes an allocation back.
    ///
    /// # Panics
    /// If the chunk is not the head of an allocation of this order: a double free, or a free that
    /// names something else.
    pub(crate) fn free(&mut self, map: &MemMap<'_>, chunk: Chunk) {
        match map.get(chunk.index) {
            Some(page) if page.is_head(State::Allocated, chunk.order) => {
                page.set_head(State::Plain, 0);
                self.insert(map, chunk);
            }
            Some(_) => panic!("{} is freed, but not allocated so", map.frames(chunk)),
            None => panic!("page {:#x} is freed, but is not in the zone", chunk.index),
        }
    }

    /// Where the pages are.
    pub(crate) fn usage(&self, map: &MemMap<'_>) -> Usage {
        Usage {
            free_mapped: self.free_mapped,
            free_unmapped: self.free_unmapped,
            allocated: self.fresh - self.free_mapped - self.free_unmapped,
            fresh: map.len() - self.fresh,
        }
    }

    /// The smallest free chunk of the freetype that is large enough, cut down to `order`.
    fn take_own(&mut self, map: &MemMap<'_>, order: u8, freetype: Freetype) -> Option<u32> {
        let large_enough = self.filled[freetype.index()] >> order;
        if large_enough == 0 {
            return None;
        }
        // At most 10, the largest order.
        let order_found = order + large_enough.trailing_zeros() as u8;
        self.cut(map, order_found, order, freetype)
    }

    /// The largest free chunk of another migratetype, of order `least` at least. Whole pageblocks
    /// change their migratetype, smaller chunks leave the rest where it was.
    fn steal(&mut self, map: &MemMap<'_>, order: u8, least: u8, wanted: Freetype) -> Option<Taken> {
        for found in (least..=MAX_ORDER).rev() {
            for other in wanted.fallbacks() {
                let Some(head) = self.heads[other.index()][usize::from(found)] else { continue };
                let index = if found < BLOCK {
                    self.cut(map, found, order, other)?
                } else {
                    let chunk = Chunk { index: head, order: found };
                    self.remove(map, chunk, other);
                    map.blocks_of(chunk).iter().for_each(|block| block.set_freetype(wanted));
                    self.push(map, chunk, wanted);
                    self.cut(map, found, order, wanted)?
                };
                return Some(Taken { index, fallback: true });
            }
        }
        None
    }

    /// Takes the first chunk of a list and gives back what is behind its first 2^`order` pages.
    fn cut(&mut self, map: &MemMap<'_>, found: u8, order: u8, freetype: Freetype) -> Option<u32> {
        let index = self.heads[freetype.index()][usize::from(found)]?;
        self.remove(map, Chunk { index, order: found }, freetype);
        for half in (order..found).rev() {
            self.push(map, Chunk { index: index + (1 << half), order: half }, freetype);
        }
        Some(index)
    }

    /// Lets the next memory that was never used enter the lists, movable; whether there was any.
    fn enter_fresh(&mut self, map: &MemMap<'_>) -> bool {
        // The zone consists of whole pageblocks.
        let left = map.len() - self.fresh;
        if left == 0 {
            return false;
        }
        let order = if left >= 1 << MAX_ORDER { MAX_ORDER } else { BLOCK };
        let chunk = Chunk { index: self.fresh, order };
        let movable = Freetype::mapped(Migratetype::Movable);
        map.blocks_of(chunk).iter().for_each(|block| block.set_freetype(movable));
        self.fresh += chunk.pages();
        self.push(map, chunk, movable);
        true
    }

    fn push(&mut self, map: &MemMap<'_>, chunk: Chunk, freetype: Freetype) {
        let list = &mut self.heads[freetype.index()][usize::from(chunk.order)];
        let page = map.page(chunk.index);
        page.set_head(State::Free, chunk.order);
        page.set_prev(None);
        page.set_next(*list);
        if let Some(next) = *list {
            map.page(next).set_prev(Some(chunk.index));
        }
        *list = Some(chunk.index);
        self.filled[freetype.index()] |= 1 << chunk.order;
        *self.free_pages(freetype) += chunk.pages();
    }

    fn remove(&mut self, map: &MemMap<'_>, chunk: Chunk, freetype: Freetype) {
        let page = map.page(chunk.index);
        let (prev, next) = page.links();
        page.set_head(State::Plain, 0);
        if let Some(next) = next {
            map.page(next).set_prev(prev);
        }
        match prev {
            Some(prev) => map.page(prev).set_next(next),
            None => {
                self.heads[freetype.index()][usize::from(chunk.order)] = next;
                if next.is_none() {
                    self.filled[freetype.index()] &= !(1 << chunk.order);
                }
            }
        }
        *self.free_pages(freetype) -= chunk.pages();
    }

    fn free_pages(&mut self, freetype: Freetype) -> &mut u32 {
        if freetype.unmapped { &mut self.free_unmapped } else { &mut self.free_mapped }
    }
}

#[cfg(test)]
impl Zone {
    /// Checks every list against the metadata, for tests: links both ways, states, freetypes,
    /// counts, no overlap, and no two buddies that should be one.
    pub(crate) fn check(&self, map: &MemMap<'_>) {
        let mut on_list = std::vec![false; map.len() as usize];
        let mut pages = [0; 2];
        for freetype in (0..FREETYPES).filter_map(Freetype::from_index) {
            for order in 0..=MAX_ORDER {
                let mut next = self.heads[freetype.index()][usize::from(order)];
                assert_eq!(next.is_some(), self.filled[freetype.index()] >> order & 1 == 1);
                let mut prev = None;
                while let Some(index) = next {
                    let chunk = Chunk { index, order };
                    let page = map.page(index);
                    assert!(page.is_head(State::Free, order), "{chunk:?}");
                    assert!(index.is_multiple_of(chunk.pages()), "{chunk:?}");
                    assert_eq!(page.links().0, prev, "{chunk:?}");
                    assert!(map.blocks_of(chunk).iter().all(|b| b.freetype() == freetype));
                    for page in index..index + chunk.pages() {
                        assert!(!on_list[page as usize], "page {page:#x} is free twice");
                        assert!(page < self.fresh);
                        on_list[page as usize] = true;
                    }
                    let buddy = index ^ chunk.pages();
                    let merged = order == MAX_ORDER
                        || !map.get(buddy).is_some_and(|b| b.is_head(State::Free, order))
                        || map.block_at(buddy).freetype().unmapped != freetype.unmapped;
                    assert!(merged, "{chunk:?} and its buddy are both free");
                    pages[usize::from(freetype.unmapped)] += chunk.pages();
                    prev = Some(index);
                    next = page.links().1;
                }
            }
        }
        assert_eq!(pages, [self.free_mapped, self.free_unmapped]);
    }
}
