//! The zone's buddy lists: orders 0 to 10, one list for each freetype and order.
//!
//! Invariant: all pageblocks of a free chunk have one freetype, and the chunk is on that
//! freetype's list. So the pageblock alone says which list a page is on or goes back to.

use crate::freetype::{FREETYPES, Freetype, Migratetype};
use crate::list::List;
use crate::meta::{BlockMeta, Chunk, MAX_ORDER, MemMap, State};
use lacuna_abi::addr::BLOCK_ORDER;

const ORDERS: usize = MAX_ORDER as usize + 1;
/// Order of a pageblock.
pub(crate) const BLOCK: u8 = BLOCK_ORDER as u8;
/// Pages of a pageblock.
pub(crate) const BLOCK_PAGES: u32 = 1 << BLOCK;
/// From this order on even a movable request claims the pageblock that it takes from.
const CLAIM_ORDER: u8 = BLOCK / 2;

/// Free pages of the zone, and those that never were on a list.
#[derive(Debug, Default)]
pub(crate) struct Zone {
    lists: [[List; ORDERS]; FREETYPES],
    /// For each freetype, a bit for each order whose list is not empty.
    filled: [u16; FREETYPES],
    /// Pages on the lists of each freetype.
    free: [u32; FREETYPES],
    /// Pageblocks of each freetype.
    blocks: [u32; FREETYPES],
    /// First page that never entered the lists; all behind it did not either.
    fresh: u32,
    /// Counts the pageblocks that became wholly free.
    clock: u64,
}

/// Where the zone's pages are.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Usage {
    /// Pages on the lists of each freetype.
    pub(crate) free: [u32; FREETYPES],
    /// Pages in pageblocks of each freetype.
    pub(crate) total: [u32; FREETYPES],
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
    /// Takes 2^`order` pages of `wanted`: from its own lists, then by claiming whole pageblocks,
    /// from fresh memory, by claiming pageblocks that are free or its own kind for the most part,
    /// and at last by stealing what is there. The flag `UNMAPPED` is never stolen across. A mapped
    /// request leaves `floor` pages free on the mapped side.
    pub(crate) fn take(
        &mut self,
        map: &MemMap<'_>,
        order: u8,
        wanted: Freetype,
        floor: u32,
    ) -> Option<Taken> {
        if !wanted.unmapped && self.mapped_free(map) < floor.saturating_add(1 << order) {
            return None;
        }
        // Fresh memory enters as movable: of that kind it is the own one.
        let fresh_first = wanted == Freetype::mapped(Migratetype::Movable);
        loop {
            if let Some(index) = self.take_own(map, order, wanted) {
                return Some(Taken { index, fallback: false });
            }
            if fresh_first && self.enter_fresh(map) {
                continue;
            }
            let claimed = self.claim(map, order, order.max(BLOCK)..=MAX_ORDER, wanted);
            if claimed.is_some() {
                return claimed;
            }
            if wanted.unmapped || !self.enter_fresh(map) {
                break;
            }
        }
        let least = if wanted.migratetype == Migratetype::Movable { CLAIM_ORDER } else { 0 };
        self.claim(map, order, order.max(least)..=BLOCK - 1, wanted)
            .or_else(|| self.steal(map, order, wanted))
    }

    /// The smallest free chunk of the freetype's own lists that is large enough, cut down to
    /// `order`.
    pub(crate) fn take_own(
        &mut self,
        map: &MemMap<'_>,
        order: u8,
        freetype: Freetype,
    ) -> Option<u32> {
        let large_enough = self.filled[freetype.index()] >> order;
        if large_enough == 0 {
            return None;
        }
        // At most 10, the largest order.
        let found = order + large_enough.trailing_zeros() as u8;
        let newest = self.lists[freetype.index()][usize::from(found)].newest()?;
        Some(self.cut(map, Chunk { index: newest, order: found }, order, freetype))
    }

    /// Takes a wholly free pageblock, or two that make an order-10 chunk, off the mapped side, to
    /// be flipped: of `migratetype` first. `floor` pages stay free there.
    pub(crate) fn take_mapped_blocks(
        &mut self,
        map: &MemMap<'_>,
        order: u8,
        migratetype: Migratetype,
        floor: u32,
    ) -> Option<Chunk> {
        if self.mapped_free(map) < floor.saturating_add(1 << order) {
            return None;
        }
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
    /// order-10 chunk, if that is what `order` needs and there are any; of all that has been free for
    /// longest.
    pub(crate) fn take_unmapped_blocks(&mut self, map: &MemMap<'_>, order: u8) -> Option<Chunk> {
        let wanted = order.max(BLOCK);
        let (chunk, freetype) = self
            .longest_free(map, wanted..=MAX_ORDER)
            .or_else(|| self.longest_free(map, BLOCK..=BLOCK))?;
        self.remove(map, chunk, freetype);
        if chunk.order <= wanted {
            return Some(chunk);
        }
        let mut halves =
            [0, BLOCK_PAGES].map(|offset| Chunk { index: chunk.index + offset, order: BLOCK });
        halves.sort_unstable_by_key(|half| map.free_since(*half));
        let [taken, left] = halves;
        self.push(map, left, freetype);
        Some(taken)
    }

    /// The unmapped chunk, of an order in `orders`, with the pageblock that has been free for longest.
    fn longest_free(
        &self,
        map: &MemMap<'_>,
        orders: core::ops::RangeInclusive<u8>,
    ) -> Option<(Chunk, Freetype)> {
        orders
            .flat_map(|order| Migratetype::ALL.map(|kind| (order, Freetype::unmapped(kind))))
            .flat_map(|(order, freetype)| {
                let list = &self.lists[freetype.index()][usize::from(order)];
                list.iter(map).map(move |index| (Chunk { index, order }, freetype))
            })
            .min_by_key(|(chunk, _)| map.free_since(*chunk))
    }

    /// Puts a chunk on the lists of its pageblock's freetype, merged with its free buddies. Buddies
    /// on two sides of the direct map stay apart.
    pub(crate) fn insert(&mut self, map: &MemMap<'_>, mut chunk: Chunk) {
        let freetype = map.block_at(chunk.index).freetype();
        if chunk.order >= BLOCK {
            self.note_free(map, chunk);
        }
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
                self.retype(block, freetype);
            }
            chunk = Chunk { index: chunk.index & buddy.index, order: chunk.order + 1 };
            // A buddy that is a whole pageblock has been free for longer.
            if chunk.order == BLOCK {
                self.note_free(map, chunk);
            }
        }
        self.push(map, chunk, freetype);
    }

    /// Notes that pageblocks became wholly free.
    fn note_free(&mut self, map: &MemMap<'_>, chunk: Chunk) {
        self.clock += 1;
        map.blocks_of(chunk).iter().for_each(|block| block.set_free_since(self.clock));
    }

    /// Labels the pageblocks of a chunk that is on no list.
    pub(crate) fn label(&mut self, map: &MemMap<'_>, chunk: Chunk, freetype: Freetype) {
        map.blocks_of(chunk).iter().for_each(|block| self.retype(block, freetype));
    }

    /// Whether nothing of a pageblock is in use.
    pub(crate) fn is_free(&self, map: &MemMap<'_>, block: u32) -> bool {
        let head = |index: u32| map.page(index).head(State::Free);
        head(block).is_some_and(|order| order >= BLOCK)
            || head(block & !(2 * BLOCK_PAGES - 1)) == Some(MAX_ORDER)
    }

    /// Takes every free chunk of a pageblock, all smaller than it, off the lists.
    pub(crate) fn isolate(&mut self, map: &MemMap<'_>, block: u32) {
        let freetype = map.block_at(block).freetype();
        let mut next = block;
        while let Some(chunk) = heads(map, block, next, State::Free).next() {
            next = chunk.index + chunk.pages();
            self.remove(map, chunk, freetype);
            map.page(chunk.index).set_head(State::Isolated, chunk.order);
        }
    }

    /// Puts what [`Self::isolate`] took back, as one chunk if nothing of the pageblock is in use
    /// any more; whether that is so.
    pub(crate) fn end_isolation(&mut self, map: &MemMap<'_>, block: u32) -> bool {
        let pages = |state| heads(map, block, block, state).map(Chunk::pages).sum::<u32>();
        let whole = pages(State::Isolated) + pages(State::Free) == BLOCK_PAGES;
        if whole {
            self.isolate(map, block);
        }
        let mut next = block;
        while let Some(chunk) = heads(map, block, next, State::Isolated).next() {
            next = chunk.index + chunk.pages();
            map.page(chunk.index).set_head(State::Plain, 0);
            if !whole {
                self.insert(map, chunk);
            }
        }
        if whole {
            self.insert(map, Chunk { index: block, order: BLOCK });
        }
        whole
    }

    /// Where the pages are.
    pub(crate) fn usage(&self, map: &MemMap<'_>) -> Usage {
        Usage {
            free: self.free,
            total: self.blocks.map(|blocks| blocks * BLOCK_PAGES),
            fresh: map.len() - self.fresh,
        }
    }

    /// Free pages of the mapped side, those that never were on a list included.
    pub(crate) fn mapped_free(&self, map: &MemMap<'_>) -> u32 {
        self.free[..Migratetype::ALL.len()].iter().sum::<u32>() + map.len() - self.fresh
    }

    /// Free pages of the unmapped side.
    pub(crate) fn unmapped_free(&self) -> u32 {
        self.free[Migratetype::ALL.len()..].iter().sum()
    }

    /// Whether any pageblock is on the unmapped side.
    pub(crate) fn pool_was_used(&self) -> bool {
        self.blocks[Migratetype::ALL.len()..].iter().any(|blocks| *blocks > 0)
    }

    /// First page behind the memory that entered the lists.
    pub(crate) fn entered(&self) -> u32 {
        self.fresh
    }

    /// Takes from the largest chunk of another migratetype, of an order in `orders`, and makes its
    /// pageblock one of `wanted`: always if the chunk is whole pageblocks, otherwise if at least
    /// half of the pageblock is free or used as `wanted` is.
    fn claim(
        &mut self,
        map: &MemMap<'_>,
        order: u8,
        orders: core::ops::RangeInclusive<u8>,
        wanted: Freetype,
    ) -> Option<Taken> {
        for found in orders.rev() {
            for other in wanted.fallbacks() {
                let newest = self.lists[other.index()][usize::from(found)].newest();
                let Some(index) = newest else { continue };
                let chunk = Chunk { index, order: found };
                if found >= BLOCK {
                    self.remove(map, chunk, other);
                    self.label(map, chunk, wanted);
                    self.push(map, chunk, wanted);
                } else if !self.claim_block(map, index & !(BLOCK_PAGES - 1), other, wanted) {
                    continue;
                }
                return Some(Taken { index: self.cut(map, chunk, order, wanted), fallback: true });
            }
        }
        None
    }

    /// Makes a pageblock that is in use one of `wanted`, with all its free chunks, if it suits.
    fn claim_block(
        &mut self,
        map: &MemMap<'_>,
        block: u32,
        from: Freetype,
        wanted: Freetype,
    ) -> bool {
        let free: u32 = heads(map, block, block, State::Free).map(Chunk::pages).sum();
        let alike: u32 = heads(map, block, block, State::Allocated)
            .filter(|chunk| {
                map.page(chunk.index)
                    .allocation()
                    .is_some_and(|(_, kind)| kind.migratetype == wanted.migratetype)
            })
            .map(Chunk::pages)
            .sum();
        if free + alike < BLOCK_PAGES / 2 {
            return false;
        }
        let mut next = block;
        while let Some(chunk) = heads(map, block, next, State::Free).next() {
            next = chunk.index + chunk.pages();
            self.remove(map, chunk, from);
            self.push(map, chunk, wanted);
        }
        self.retype(map.block_at(block), wanted);
        true
    }

    /// The smallest chunk of another migratetype that is large enough; the rest stays where it was.
    fn steal(&mut self, map: &MemMap<'_>, order: u8, wanted: Freetype) -> Option<Taken> {
        for found in order..=MAX_ORDER {
            for other in wanted.fallbacks() {
                let newest = self.lists[other.index()][usize::from(found)].newest();
                let Some(index) = newest else { continue };
                let chunk = Chunk { index, order: found };
                return Some(Taken { index: self.cut(map, chunk, order, other), fallback: true });
            }
        }
        None
    }

    /// Takes a chunk off its list and gives back what is behind its first 2^`order` pages; the
    /// first of them.
    fn cut(&mut self, map: &MemMap<'_>, chunk: Chunk, order: u8, freetype: Freetype) -> u32 {
        self.remove(map, chunk, freetype);
        for half in (order..chunk.order).rev() {
            self.push(map, Chunk { index: chunk.index + (1 << half), order: half }, freetype);
        }
        chunk.index
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
        for block in map.blocks_of(chunk) {
            block.set_freetype(movable);
            self.blocks[movable.index()] += 1;
        }
        self.fresh += chunk.pages();
        self.push(map, chunk, movable);
        true
    }

    /// Labels one pageblock that entered the lists.
    fn retype(&mut self, block: &BlockMeta, freetype: Freetype) {
        self.blocks[block.freetype().index()] -= 1;
        block.set_freetype(freetype);
        self.blocks[freetype.index()] += 1;
    }

    fn push(&mut self, map: &MemMap<'_>, chunk: Chunk, freetype: Freetype) {
        self.lists[freetype.index()][usize::from(chunk.order)].push(map, chunk, State::Free);
        self.filled[freetype.index()] |= 1 << chunk.order;
        self.free[freetype.index()] += chunk.pages();
    }

    fn remove(&mut self, map: &MemMap<'_>, chunk: Chunk, freetype: Freetype) {
        let list = &self.lists[freetype.index()][usize::from(chunk.order)];
        list.remove(map, chunk.index);
        if list.is_empty() {
            self.filled[freetype.index()] &= !(1 << chunk.order);
        }
        self.free[freetype.index()] -= chunk.pages();
    }
}

/// The chunks of a pageblock, from page `next` on, whose heads are in `state`. Free chunks are
/// exact under the zone lock; what other CPUs use or keep may change at any time.
pub(crate) fn heads<'m>(
    map: &'m MemMap<'_>,
    block: u32,
    mut next: u32,
    state: State,
) -> impl Iterator<Item = Chunk> + use<'m> {
    core::iter::from_fn(move || {
        while next < block + BLOCK_PAGES {
            let index = next;
            let (found, order) = map.page(index).any_head();
            next += if found == State::Plain as u8 { 1 } else { 1 << order.min(BLOCK) };
            if found == state as u8 {
                return Some(Chunk { index, order });
            }
        }
        None
    })
}

#[cfg(all(test, loom))]
impl Zone {
    /// All memory was used before: models have a few pages, and what enters comes by the block.
    pub(crate) fn enter_all(&mut self, map: &MemMap<'_>) {
        self.fresh = map.len();
    }
}

#[cfg(all(any(test, feature = "testing"), not(loom)))]
impl Zone {
    /// Checks every list against the metadata, for tests: links both ways, states, freetypes,
    /// counts, no overlap, and no two buddies that should be one.
    pub(crate) fn check(&self, map: &MemMap<'_>) {
        let mut on_list = std::vec![false; map.len() as usize];
        let mut pages = [0; FREETYPES];
        for freetype in (0..FREETYPES).filter_map(Freetype::from_index) {
            for order in 0..=MAX_ORDER {
                let list = &self.lists[freetype.index()][usize::from(order)];
                let mut next = list.newest();
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
                    pages[freetype.index()] += chunk.pages();
                    prev = Some(index);
                    next = page.links().1;
                }
                assert_eq!(list.oldest(), prev);
            }
        }
        assert_eq!(pages, self.free);
        let mut blocks = [0; FREETYPES];
        for first in (0..self.fresh).step_by(BLOCK_PAGES as usize) {
            blocks[map.block_at(first).freetype().index()] += 1;
        }
        assert_eq!(blocks, self.blocks);
    }
}
