//! The way back: pages are given up, and go onto free lists.

use super::PageAllocator;
use crate::handle::Pin;
use crate::meta::{Chunk, State};
use crate::pcp::{Held, pindex};
use crate::platform::Platform;
use lacuna_abi::event::Life;

impl<P: Platform> PageAllocator<'_, P> {
    /// Frees mapped pages.
    pub(crate) fn free_mapped(&self, pin: Pin<'_>) {
        let chunk = pin.chunk();
        self.retire(chunk);
        self.clear_freed(chunk);
        self.put(chunk);
        self.counts.free_other.add(1);
    }

    /// Frees secret pages; those that were written to are scrubbed, together with others. What
    /// cannot be scrubbed is free as it is, sealed and not known to be zero; what the host would not
    /// close is withheld. Converted pages go back to where they came from.
    pub(crate) fn free_secret(&self, pin: Pin<'_>) {
        let chunk = pin.chunk();
        let frames = self.map.frames(chunk);
        let page = pin.page();
        let converted = page.is_converted();
        let stays = page.is_unsealed() && !converted;
        let known = self.map.is_known(frames);
        let count = if converted { &self.counts.free_other } else { &self.counts.free_secret };
        count.add(1);
        if !converted && !stays && (known || !self.config.scrub) {
            // One record for both: what is on a free list was given back.
            self.retire(chunk);
            self.report_pooled_as(frames, known);
            self.put(chunk);
            return;
        }
        self.platform.life(Life::Freed, frames);
        if converted {
            // Whoever drops pages cannot be told; what is not free yet is tried again.
            let _ = self.free_converted(chunk);
        } else if stays {
            self.withhold(chunk, true);
        } else {
            self.retire(chunk);
            self.scrub_later(chunk);
        }
    }

    /// Ends an allocation.
    ///
    /// # Panics
    /// If the chunk is not one of this order: a double free, or a free of something else.
    pub(crate) fn retire(&self, chunk: Chunk) {
        let page = self.map.page(chunk.index);
        let frames = self.map.frames(chunk);
        assert!(
            page.is_head(State::Allocated, chunk.order),
            "{frames} is freed, but not allocated so"
        );
        page.set_head(State::Plain, 0);
        self.map.count_allocated(chunk, false);
    }

    /// Puts free pages on this CPU's lists, or on the zone's.
    pub(crate) fn put(&self, chunk: Chunk) {
        let Some(pindex) = pindex(chunk.order, self.map.block_at(chunk.index).freetype()) else {
            self.zone().insert(&self.map, chunk);
            return;
        };
        let (_, lists) = self.own_lists();
        self.put_on(&lists, chunk, pindex);
    }

    /// As [`Self::put`], for a few hundred chunks at most, with this CPU's lists taken once.
    pub(crate) fn put_all(&self, chunks: impl Iterator<Item = Chunk>) {
        let (_, lists) = self.own_lists();
        for chunk in chunks {
            match pindex(chunk.order, self.map.block_at(chunk.index).freetype()) {
                Some(pindex) => self.put_on(&lists, chunk, pindex),
                None => self.zone().insert(&self.map, chunk),
            }
        }
    }

    fn put_on(&self, lists: &Held<'_, P>, chunk: Chunk, pindex: usize) {
        lists.push(&self.map, chunk, pindex);
        if lists.pages() > self.cpu_marks.high {
            let keep = self.cpu_marks.high - self.cpu_marks.batch;
            lists.drain(&self.map, &mut self.zone(), keep);
        }
    }

    /// Nobody uses the chunk any more: it stays allocated for good. `allocated` says whether it was.
    pub(crate) fn withhold(&self, chunk: Chunk, allocated: bool) {
        self.map.page(chunk.index).set_head(State::Withheld, chunk.order);
        if !allocated {
            self.map.count_allocated(chunk, true);
        }
        self.counts.withheld.add(u64::from(chunk.pages()));
    }
}
