//! Metadata: 32 bytes a page, 128 bytes a pageblock. All zero is the valid state of memory that
//! never entered the free lists, so nothing has to be written at boot.
//!
//! The fields are atomics because several CPUs share them; what orders accesses is the zone lock,
//! the lock of a CPU's lists, or the ownership of the pages, so relaxed accesses do, and those are
//! plain moves on x86. The pins of an allocation, which are no one's alone, say for themselves how
//! they are ordered.

use crate::freetype::Freetype;
use crate::sync::{AtomicU8, AtomicU32, AtomicU64};
use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use lacuna_abi::MAX_CPUS;
use lacuna_abi::addr::{BLOCK_FRAMES, BLOCK_ORDER, FrameRange, Gfn};
use lacuna_abi::layout::{BLOCK_META_BYTES, Layout, PAGE_META_BYTES};

/// Largest order of an allocation.
pub const MAX_ORDER: u8 = 10;

/// 2^order pages, the first with this index in the zone.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Chunk {
    pub(crate) index: u32,
    pub(crate) order: u8,
}

impl Chunk {
    /// Number of pages.
    pub(crate) const fn pages(self) -> u32 {
        1 << self.order
    }
}

/// What the record of a page says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum State {
    /// No head: never entered, inside a larger chunk, or on the way from one list to another.
    Plain = 0,
    /// First page of a chunk on a free list of the zone.
    Free = 1,
    /// First page of an allocation.
    Allocated = 2,
    /// First page of a chunk that is never handed out again: the host did not close it, or somebody
    /// wrote to it after it was freed.
    Withheld = 3,
    /// First page of a chunk on a CPU's own list.
    Cached = 4,
    /// First page of a freed chunk that waits on a CPU's list to be scrubbed.
    Dirty = 5,
    /// First page of a free chunk that was taken off its list while its pageblock is emptied.
    Isolated = 6,
    /// First page of a freed allocation that was converted in place and could not come back yet.
    Parked = 7,
}

/// The host refused to close pages of this allocation.
const UNSEALED: u8 = 1 << 0;
/// The allocation became secret in place: its pageblock is one of the mapped side.
const CONVERTED: u8 = 1 << 1;

/// Pins of an allocation that is being moved.
const MOVING: u32 = u32::MAX;

/// Metadata of one page. Only the record of a chunk's first page says anything.
///
/// Each page also lends its record to a *slot*, the identity of an allocation while its pages move:
/// `slot` leads from a page to its slot, `place` back. Both count from the record's own index, so
/// that at the start each page has the slot with its own number; moving an allocation exchanges the
/// slots of two pages.
#[derive(Debug, Default)]
#[repr(C, align(16))]
pub struct PageMeta {
    /// Neighbours on a list, as index plus one; 0 for none.
    next: AtomicU32,
    prev: AtomicU32,
    /// Pins of the allocation. Who follows a slot to its old place may pin that for a moment,
    /// whatever it is by then, so that nothing else may ever lie in this word.
    pins: AtomicU32,
    slot: AtomicU32,
    place: AtomicU32,
    /// Of the slot: odd while the allocation has an owner, even while a handle stands for one.
    /// Counts up, so that an old handle is told from a new one.
    generation: AtomicU32,
    state: AtomicU8,
    order: AtomicU8,
    freetype: AtomicU8,
    flags: AtomicU8,
}

const _: () = assert!(cfg!(loom) || size_of::<PageMeta>() as u64 == PAGE_META_BYTES);

impl PageMeta {
    /// Links to the neighbours on a free list.
    pub(crate) fn links(&self) -> (Option<u32>, Option<u32>) {
        (self.prev.load(Relaxed).checked_sub(1), self.next.load(Relaxed).checked_sub(1))
    }

    pub(crate) fn set_next(&self, next: Option<u32>) {
        self.next.store(next.map_or(0, |index| index + 1), Relaxed);
    }

    pub(crate) fn set_prev(&self, prev: Option<u32>) {
        self.prev.store(prev.map_or(0, |index| index + 1), Relaxed);
    }

    /// Whether this is the head of a chunk of `order` in `state`.
    pub(crate) fn is_head(&self, state: State, order: u8) -> bool {
        self.state.load(Relaxed) == state as u8 && self.order.load(Relaxed) == order
    }

    /// Order of the chunk that this is the head of, if it is in `state`.
    pub(crate) fn head(&self, state: State) -> Option<u8> {
        (self.state.load(Relaxed) == state as u8).then(|| self.order.load(Relaxed))
    }

    /// Number of the state, and the order, which means something unless the state is plain.
    pub(crate) fn any_head(&self) -> (u8, u8) {
        (self.state.load(Relaxed), self.order.load(Relaxed))
    }

    pub(crate) fn set_head(&self, state: State, order: u8) {
        self.order.store(order, Relaxed);
        self.state.store(state as u8, Relaxed);
    }

    /// Makes this the head of an allocation. Who finds it with [`Self::allocation`] also sees what
    /// was done before.
    pub(crate) fn hand_out(&self, order: u8, freetype: Freetype) {
        // A freetype's index is below FREETYPES, 6.
        self.freetype.store(freetype.index() as u8, Relaxed);
        self.order.store(order, Relaxed);
        self.state.store(State::Allocated as u8, Release);
    }

    /// Order and freetype of the allocation that this is the head of.
    pub(crate) fn allocation(&self) -> Option<(u8, Freetype)> {
        if self.state.load(Acquire) != State::Allocated as u8 {
            return None;
        }
        let freetype = Freetype::from_index(usize::from(self.freetype.load(Relaxed)))?;
        Some((self.order.load(Relaxed), freetype))
    }

    pub(crate) fn generation(&self) -> u32 {
        self.generation.load(Relaxed)
    }

    /// Moves on from `generation`; whether it was still the current one. Who resolves a handle sees
    /// what was done before it was made.
    pub(crate) fn next_generation(&self, generation: u32) -> bool {
        let next = generation.wrapping_add(1);
        self.generation.compare_exchange(generation, next, AcqRel, Relaxed).is_ok()
    }

    /// The slot's allocation has an owner, whom no handle made: the next odd number. What is left out
    /// is the handle that a former owner might have given, and never did.
    pub(crate) fn own_anew(&self) {
        self.generation.store(self.generation().wrapping_add(1) | 1, Relaxed);
    }

    /// Keeps the allocation where it is, until as many [`Self::unpin`]; `false` while it is being
    /// moved.
    pub(crate) fn pin(&self) -> bool {
        let more = |pins: u32| if pins == MOVING { None } else { pins.checked_add(1) };
        self.pins.fetch_update(Acquire, Relaxed, more).is_ok()
    }

    pub(crate) fn unpin(&self) {
        let pins = self.pins.fetch_sub(1, Release);
        debug_assert!(pins != 0 && pins != MOVING, "unpinned, but not pinned");
    }

    /// Forbids pins; whether there were none.
    pub(crate) fn begin_move(&self) -> bool {
        self.pins.compare_exchange(0, MOVING, Acquire, Relaxed).is_ok()
    }

    /// Allows pins again.
    pub(crate) fn end_move(&self) {
        self.pins.store(0, Release);
    }

    /// The host refused to close pages of this allocation.
    pub(crate) fn set_unsealed(&self) {
        self.flags.fetch_or(UNSEALED, Relaxed);
    }

    pub(crate) fn is_unsealed(&self) -> bool {
        self.flags.load(Relaxed) & UNSEALED != 0
    }

    /// The allocation became secret in place, or is mapped again.
    pub(crate) fn set_converted(&self, converted: bool) {
        if converted {
            self.flags.fetch_or(CONVERTED, Relaxed);
        } else {
            self.flags.fetch_and(!CONVERTED, Relaxed);
        }
    }

    pub(crate) fn is_converted(&self) -> bool {
        self.flags.load(Relaxed) & CONVERTED != 0
    }
}

const ZERO_WORDS: usize = BLOCK_FRAMES as usize / 64;

/// Metadata of one pageblock.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub struct BlockMeta {
    /// One bit a page: its contents are known. On the unmapped side they are zero, on the mapped
    /// side the page is free and holds the poison. Pages of one block may belong to several CPUs, so
    /// that these words are changed by read-modify-write.
    known: [AtomicU64; ZERO_WORDS],
    /// For each CPU, the generation of its window when it last lay over this block; 0 for never.
    windows: [AtomicU32; MAX_CPUS],
    freetype: AtomicU32,
    /// Pages in allocations.
    allocated: AtomicU32,
    /// Pages that were converted in place. While there are any, the block is mapped by a table of
    /// small entries; without, by one entry. Changed by whoever holds the lock.
    converted: AtomicU32,
    /// Not 0 while a CPU changes how the block is mapped.
    lock: AtomicU32,
    /// When the block became wholly free, by the clock of the zone: of two blocks that are free, the
    /// one with the lower number has been so for longer. Changed under the zone lock.
    free_since: AtomicU64,
}

const _: () = assert!(cfg!(loom) || size_of::<BlockMeta>() as u64 == BLOCK_META_BYTES);

impl BlockMeta {
    /// The freetype of the block's pages.
    pub(crate) fn freetype(&self) -> Freetype {
        let index = self.freetype.load(Relaxed) as usize;
        Freetype::from_index(index).unwrap_or_else(|| panic!("no pageblock has freetype {index}"))
    }

    pub(crate) fn set_freetype(&self, freetype: Freetype) {
        self.freetype.store(freetype.index() as u32, Relaxed);
    }

    /// Pages of the block in allocations.
    pub(crate) fn allocated(&self) -> u32 {
        self.allocated.load(Relaxed)
    }

    /// Counts pages that were handed out, or given back.
    pub(crate) fn count_allocated(&self, pages: u32, handed_out: bool) {
        if handed_out {
            self.allocated.fetch_add(pages, Relaxed);
        } else {
            self.allocated.fetch_sub(pages, Relaxed);
        }
    }

    /// Says that the contents of the pages from `first` are known, or not any more.
    pub(crate) fn set_known(&self, first: u64, count: u64, known: bool) {
        let mut next = first;
        let end = first + count;
        while next < end {
            let stop = end.min((next | 63) + 1);
            let mask = (u64::MAX >> (64 - (stop - next))) << (next % 64);
            let word = &self.known[(next / 64) as usize];
            if known {
                word.fetch_or(mask, Relaxed);
            } else {
                word.fetch_and(!mask, Relaxed);
            }
            next = stop;
        }
    }

    /// The first run of pages in `from..end` whose contents are not known, as first and end.
    pub(crate) fn unknown_run(&self, from: u64, end: u64) -> Option<(u64, u64)> {
        let first = self.next_page(from, end, false)?;
        Some((first, self.next_page(first, end, true).unwrap_or(end)))
    }

    /// The first page in `from..end` whose bit is `known`, a word at a time.
    fn next_page(&self, from: u64, end: u64, known: bool) -> Option<u64> {
        let mut next = from;
        while next < end {
            let word = self.known[(next / 64) as usize].load(Relaxed);
            let wanted = if known { word } else { !word } & (u64::MAX << (next % 64));
            if wanted != 0 {
                let page = (next & !63) + u64::from(wanted.trailing_zeros());
                return (page < end).then_some(page);
            }
            next = (next | 63) + 1;
        }
        None
    }

    /// Pages of the block that were converted in place.
    pub(crate) fn converted(&self) -> u32 {
        self.converted.load(Relaxed)
    }

    pub(crate) fn add_converted(&self, pages: u32) {
        self.converted.store(self.converted() + pages, Relaxed);
    }

    pub(crate) fn remove_converted(&self, pages: u32) {
        self.converted.store(self.converted() - pages, Relaxed);
    }

    /// Takes the lock on how the block is mapped, if it is free.
    pub(crate) fn try_lock(&self) -> bool {
        self.lock.compare_exchange(0, 1, Acquire, Relaxed).is_ok()
    }

    pub(crate) fn unlock(&self) {
        self.lock.store(0, Release);
    }

    /// When the block last became wholly free.
    pub(crate) fn free_since(&self) -> u64 {
        self.free_since.load(Relaxed)
    }

    pub(crate) fn set_free_since(&self, time: u64) {
        self.free_since.store(time, Relaxed);
    }

    /// A window of `cpu`, in this generation, lies over the block.
    pub(crate) fn set_window(&self, cpu: usize, generation: u32) {
        self.windows[cpu].store(generation, Relaxed);
    }

    /// Generation of `cpu`'s window when it last lay over the block; 0 for never.
    pub(crate) fn window(&self, cpu: usize) -> u32 {
        self.windows[cpu].load(Relaxed)
    }
}

/// The zone's metadata.
#[derive(Clone, Copy, Debug)]
pub struct MemMap<'a> {
    pages: &'a [PageMeta],
    blocks: &'a [BlockMeta],
    zone: FrameRange,
}

impl<'a> MemMap<'a> {
    /// The metadata of the zone of `layout`: one record a page, one a pageblock.
    ///
    /// # Panics
    /// If the number of records does not fit the zone, or the zone starts where an order-10 chunk
    /// cannot.
    #[must_use]
    pub fn new(pages: &'a [PageMeta], blocks: &'a [BlockMeta], layout: &Layout) -> Self {
        let zone = layout.zone_frames();
        assert_eq!(pages.len() as u64, zone.count(), "page records");
        assert_eq!(blocks.len() as u64, layout.zone_blocks(), "pageblock records");
        assert!(zone.start().0.is_multiple_of(1 << MAX_ORDER), "the zone starts at {zone}");
        assert!(u32::try_from(zone.count()).is_ok_and(|n| n < u32::MAX), "the zone is too large");
        Self { pages, blocks, zone }
    }

    /// A few pages, for models: all records of a zone would be too many to follow.
    #[cfg(all(test, loom))]
    pub(crate) fn of_part(
        pages: &'a [PageMeta],
        blocks: &'a [BlockMeta],
        zone: FrameRange,
    ) -> Self {
        assert_eq!(pages.len() as u64, zone.count());
        Self { pages, blocks, zone }
    }

    /// The zone.
    #[must_use]
    pub const fn zone(&self) -> FrameRange {
        self.zone
    }

    /// Number of pages in the zone; [`MemMap::new`] has checked that it fits.
    pub(crate) const fn len(&self) -> u32 {
        self.zone.count() as u32
    }

    /// The record of a page; `None` outside the zone.
    pub(crate) fn get(&self, index: u32) -> Option<&'a PageMeta> {
        self.pages.get(index as usize)
    }

    /// The record of a page of the zone.
    pub(crate) fn page(&self, index: u32) -> &'a PageMeta {
        &self.pages[index as usize]
    }

    /// The record of the pageblock that holds a page of the zone.
    pub(crate) fn block_at(&self, index: u32) -> &'a BlockMeta {
        &self.blocks[(index >> BLOCK_ORDER) as usize]
    }

    /// The records of the pageblocks of a chunk, one at least.
    pub(crate) fn blocks_of(&self, chunk: Chunk) -> &'a [BlockMeta] {
        let first = (chunk.index >> BLOCK_ORDER) as usize;
        let count = (chunk.pages() >> BLOCK_ORDER).max(1) as usize;
        &self.blocks[first..first + count]
    }

    /// When the first of the pageblocks of a free chunk became wholly free.
    pub(crate) fn free_since(&self, chunk: Chunk) -> u64 {
        self.blocks_of(chunk).iter().map(BlockMeta::free_since).min().unwrap_or(0)
    }

    /// The frames of a chunk of the zone.
    pub(crate) fn frames(&self, chunk: Chunk) -> FrameRange {
        let start = Gfn(self.zone.start().0 + u64::from(chunk.index));
        FrameRange::new(start, u64::from(chunk.pages()))
            .unwrap_or_else(|| panic!("no frames have index {:#x}", chunk.index))
    }

    /// The pageblock of a run of frames that lies within one, and the run's first page in it.
    pub(crate) fn part(&self, part: FrameRange) -> (&'a BlockMeta, u64) {
        let index = part.start().0 - self.zone.start().0;
        (&self.blocks[(index / BLOCK_FRAMES) as usize], index % BLOCK_FRAMES)
    }

    /// Slot of the allocation whose first page this is.
    pub(crate) fn slot_of(&self, index: u32) -> u32 {
        index.wrapping_add(self.page(index).slot.load(Relaxed))
    }

    /// First page of the allocation with this slot.
    pub(crate) fn place_of(&self, slot: u32) -> u32 {
        slot.wrapping_add(self.page(slot).place.load(Acquire))
    }

    /// Exchanges the slots of two pages: the allocation at `from` is now the one at `to`. Who finds
    /// it there also sees what was copied there before.
    pub(crate) fn exchange_slots(&self, from: u32, to: u32) {
        let slots = [self.slot_of(from), self.slot_of(to)];
        for (page, slot) in [(to, slots[0]), (from, slots[1])] {
            self.page(page).slot.store(slot.wrapping_sub(page), Relaxed);
            self.page(slot).place.store(page.wrapping_sub(slot), Release);
        }
    }

    /// Says for these frames of the zone that their contents are known, or not any more.
    pub(crate) fn set_known(&self, frames: FrameRange, known: bool) {
        for part in frames.by_block() {
            let (block, first) = self.part(part);
            block.set_known(first, part.count(), known);
        }
    }

    /// Counts the chunk as handed out, or as given back, in its pageblocks.
    pub(crate) fn count_allocated(&self, chunk: Chunk, handed_out: bool) {
        let pages = chunk.pages().min(1 << BLOCK_ORDER);
        self.blocks_of(chunk).iter().for_each(|block| block.count_allocated(pages, handed_out));
    }

    /// Whether the contents of all these frames of the zone are known.
    pub(crate) fn is_known(&self, frames: FrameRange) -> bool {
        frames.by_block().all(|part| {
            let (block, first) = self.part(part);
            block.unknown_run(first, first + part.count()).is_none()
        })
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    proptest! {
        #[test]
        fn the_bitmap_agrees_with_one_flag_a_page(
            changes in prop::collection::vec((0u64..512, 1u64..=512, any::<bool>()), 0..12),
            from in 0u64..512, length in 0u64..=512,
        ) {
            let block = BlockMeta::default();
            let mut model = [false; 512];
            for (first, count, zero) in changes {
                let count = count.min(512 - first);
                block.set_known(first, count, zero);
                model[first as usize..(first + count) as usize].fill(zero);
            }
            let end = (from + length).min(512);
            let mut runs = Vec::new();
            let mut next = from;
            while let Some((first, stop)) = block.unknown_run(next, end) {
                prop_assert!(first >= next && stop > first && stop <= end);
                runs.extend(first..stop);
                next = stop;
            }
            let expected: Vec<_> = (from..end).filter(|page| !model[*page as usize]).collect();
            prop_assert_eq!(runs, expected);
        }
    }

    #[test]
    fn a_generation_is_left_once() {
        let page = PageMeta::default();
        assert!(page.next_generation(0));
        assert!(!page.next_generation(0));
        assert_eq!(page.generation(), 1);
    }

    #[test]
    fn zeroed_metadata_is_no_head_and_has_no_links() {
        let page = PageMeta::default();
        assert!(page.is_head(State::Plain, 0));
        assert_eq!((page.links(), page.allocation()), ((None, None), None));
        assert_eq!(BlockMeta::default().unknown_run(0, 512), Some((0, 512)));
    }
}
