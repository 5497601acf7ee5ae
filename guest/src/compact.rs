//! A simple mover: empties one pageblock of movable pages, so that it can flip.

use crate::alloc::PageAllocator;
use crate::freetype::{Freetype, Migratetype};
use crate::meta::{Chunk, State};
use crate::platform::Platform;
use crate::zone::{BLOCK_PAGES, heads};
use lacuna_abi::addr::PAGE_SIZE;
use lacuna_abi::layout::direct_map;

/// Pageblocks that are tried before it is given up.
const TRIES: usize = 32;

impl<P: Platform> PageAllocator<'_, P> {
    /// Moves what lies in some mapped, movable pageblock elsewhere; whether one is wholly free now.
    /// Those with the least in them are tried first. What is pinned stays, and so does its block.
    pub(crate) fn compact(&self) -> bool {
        let mut last = None;
        for _ in 0..TRIES {
            let Some(next) = self.least_used_block(last) else { return false };
            if self.empty_block(next.1) {
                self.counts.compact_success.add(1);
                return true;
            }
            self.counts.compact_fail.add(1);
            last = Some(next);
        }
        false
    }

    /// How many pages of a movable pageblock are in use, and its first page: the least such pair
    /// after `last`, of those whose pages find room elsewhere. Converted pages cannot be moved.
    fn least_used_block(&self, last: Option<(u32, u32)>) -> Option<(u32, u32)> {
        let movable = Freetype::mapped(Migratetype::Movable);
        let (entered, free) = {
            let zone = self.zone();
            (zone.entered(), zone.mapped_free(&self.map))
        };
        (0..entered)
            .step_by(BLOCK_PAGES as usize)
            .map(|first| (self.map.block_at(first), first))
            .filter(|(block, _)| block.freetype() == movable && block.converted() == 0)
            .map(|(block, first)| (block.allocated(), first))
            .filter(|next| last.is_none_or(|last| *next > last))
            .filter(|(used, _)| (1..BLOCK_PAGES).contains(used))
            .filter(|(used, _)| free >= self.marks.min + BLOCK_PAGES.max(2 * used))
            .min()
    }

    /// Moves everything out of a pageblock; whether that succeeded.
    fn empty_block(&self, block: u32) -> bool {
        {
            let mut zone = self.zone();
            // Another CPU may have flipped it, or freed all of it.
            let kind = self.map.block_at(block).freetype();
            if kind != Freetype::mapped(Migratetype::Movable) || zone.is_free(&self.map, block) {
                return false;
            }
            zone.isolate(&self.map, block);
        }
        let mut next = block;
        while let Some(chunk) = heads(&self.map, block, next, State::Allocated).next() {
            next = chunk.index + chunk.pages();
            if chunk.pages() >= BLOCK_PAGES || !self.relocate(chunk.index) {
                break;
            }
        }
        self.zone().end_isolation(&self.map, block)
    }

    /// Moves one allocation; whether it could be moved.
    pub(crate) fn relocate(&self, from: u32) -> bool {
        let page = self.map.page(from);
        if !page.begin_move() {
            return false;
        }
        let found = page.allocation();
        let moved = found
            .filter(|(_, kind)| *kind == Freetype::mapped(Migratetype::Movable))
            .and_then(|(order, kind)| self.copy_away(Chunk { index: from, order }, kind));
        page.end_move();
        moved.is_some()
    }

    /// Copies an allocation that nobody can pin, and lets its slot lead to the copy.
    fn copy_away(&self, from: Chunk, kind: Freetype) -> Option<()> {
        // Isolated pages are on no list, so that this is never one of them.
        let index = self.zone().take(&self.map, from.order, kind, self.marks.min)?.index;
        let to = Chunk { index, order: from.order };
        let target = self.map.page(to.index);
        // Another CPU that empties the pageblock of the copy must not move it on before the slot
        // leads to it. Who looks for what lay there before may hold it for a moment.
        if !target.begin_move() {
            self.zone().insert(&self.map, to);
            return None;
        }
        let filled = self.fill_copy(from, to, kind);
        target.end_move();
        filled
    }

    /// Makes `to` what `from` was; neither can be pinned.
    fn fill_copy(&self, from: Chunk, to: Chunk, kind: Freetype) -> Option<()> {
        let place = |chunk| direct_map(self.map.frames(chunk).start().gpa());
        self.check_mapped(to).ok()?;
        self.platform.copy(place(to), place(from), u64::from(from.pages()) * PAGE_SIZE);
        self.map.page(to.index).hand_out(to.order, kind);
        self.map.count_allocated(to, true);
        self.map.exchange_slots(from.index, to.index);
        self.map.count_allocated(from, false);
        self.clear_freed(from);
        self.map.page(from.index).set_head(State::Isolated, from.order);
        self.counts.pages_moved.add(u64::from(from.pages()));
        Some(())
    }
}
