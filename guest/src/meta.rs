//! Metadata: 32 bytes a page, 128 bytes a pageblock. All zero is the valid state of memory that
//! never entered the free lists, so nothing has to be written at boot.
//!
//! The fields are atomics because several CPUs share them; what orders accesses is the zone lock,
//! the lock of a CPU's lists, or the ownership of the pages, so relaxed accesses do, and those are
//! plain moves on x86. The pins of an allocation, which are no one's alone, say for themselves how
//! they are ordered.

mod block;
mod page;

pub use block::BlockMeta;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use lacuna_abi::addr::{BLOCK_FRAMES, BLOCK_ORDER, FrameRange, Gfn};
use lacuna_abi::layout::Layout;
pub use page::PageMeta;

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
