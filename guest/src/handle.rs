//! Handles: an allocation by its slot, whatever pages it lies in.
//!
//! An owner keeps a slot and finds the pages when it uses them; a pin keeps them where they are
//! meanwhile. A handle is a slot as one word, for owners that keep a table of them in guest memory.
//! It is good once: resolving it makes its owner anew, and both a second use and a use after the
//! pages were freed are refused.
//!
//! A slot has a generation, which says whether somebody owns the allocation: odd for an owner, even
//! for a handle. Handing out, giving up, and resolving each move on to the next such number, so that
//! there is never an owner beside a handle that resolves, nor two owners.

use crate::freetype::Freetype;
use crate::meta::{Chunk, MemMap, PageMeta};
use crate::platform::Platform;

/// The word is no handle of an allocation of this kind, or it was used already.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BadHandle(pub u64);

/// An allocation's identity; whoever has it owns the allocation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    number: u32,
    order: u8,
}

impl Slot {
    /// Hands a chunk out. Its page says so last: from then on another CPU may move it, and give the
    /// slot that is found here to somebody else.
    pub(crate) fn hand_out(map: &MemMap<'_>, chunk: Chunk, freetype: Freetype) -> Self {
        let slot = Self { number: map.slot_of(chunk.index), order: chunk.order };
        slot.record(map).own_anew();
        map.count_allocated(chunk, true);
        map.page(chunk.index).hand_out(chunk.order, freetype);
        slot
    }

    /// Notes that the allocation is on the other side of the direct map now. Handles that were given
    /// before become invalid.
    pub(crate) fn change_side(self, map: &MemMap<'_>, unmapped: bool) {
        let page = map.page(map.place_of(self.number));
        let Some((order, freetype)) = page.allocation() else {
            panic!("{} changes sides, but is not allocated", map.frames(self.chunk(map)));
        };
        page.hand_out(order, Freetype { unmapped, ..freetype });
        page.set_converted(unmapped);
        self.record(map).own_anew();
    }

    /// Gives the allocation up for a handle, the one that [`Self::handle`] foretold.
    pub(crate) fn give_up(self, map: &MemMap<'_>) -> u64 {
        let handle = self.handle(map);
        let record = self.record(map);
        record.next_generation(record.generation());
        handle
    }

    /// The allocation of `handle`, which must be on this side of the direct map. The handle is used
    /// up.
    pub(crate) fn resolve<P: Platform>(
        map: &MemMap<'_>,
        platform: &P,
        handle: u64,
        unmapped: bool,
    ) -> Result<Self, BadHandle> {
        let [s0, s1, s2, s3, g0, g1, g2, g3] = handle.to_le_bytes();
        let number = u32::from_le_bytes([s0, s1, s2, s3]).checked_sub(1);
        let number = number.filter(|slot| *slot < map.len()).ok_or(BadHandle(handle))?;
        // Pinned, because what lies at a place that the allocation left says nothing about it.
        let found = Self { number, order: 0 }.pin(map, platform).page().allocation();
        let (order, _) =
            found.filter(|(_, kind)| kind.unmapped == unmapped).ok_or(BadHandle(handle))?;
        let slot = Self { number, order };
        let generation = u32::from_le_bytes([g0, g1, g2, g3]);
        if generation.is_multiple_of(2) && slot.record(map).next_generation(generation) {
            Ok(slot)
        } else {
            Err(BadHandle(handle))
        }
    }

    /// The word that [`Self::resolve`] takes once the owner is given up; never 0.
    pub(crate) fn handle(&self, map: &MemMap<'_>) -> u64 {
        let given_up = self.record(map).generation().wrapping_add(1);
        u64::from(given_up) << 32 | u64::from(self.number + 1)
    }

    /// Where the allocation lies now. Only a pin keeps it there, or that it is being freed.
    pub(crate) fn chunk(&self, map: &MemMap<'_>) -> Chunk {
        Chunk { index: map.place_of(self.number), order: self.order }
    }

    /// Keeps the allocation where it is while the pin lives; waits while it is being moved.
    pub(crate) fn pin<'m, P: Platform>(&self, map: &MemMap<'m>, platform: &P) -> Pin<'m> {
        loop {
            // Moved meanwhile: what was pinned is somebody else's, or nobody's.
            if let Some(pin) = Pin::of(map, self.chunk(map))
                && map.place_of(self.number) == pin.chunk.index
            {
                return pin;
            }
            platform.relax();
        }
    }

    fn record<'m>(&self, map: &MemMap<'m>) -> &'m PageMeta {
        map.page(self.number)
    }
}

/// An allocation stays where it is while this lives.
#[must_use = "the allocation may be moved when this is dropped"]
#[derive(Debug)]
pub(crate) struct Pin<'m> {
    page: &'m PageMeta,
    chunk: Chunk,
}

impl<'m> Pin<'m> {
    /// Pins what lies at `chunk`, whatever that is; `None` while it is being moved.
    pub(crate) fn of(map: &MemMap<'m>, chunk: Chunk) -> Option<Self> {
        let page = map.page(chunk.index);
        // Made only once it is pinned: dropping it unpins.
        page.pin().then(|| Self { page, chunk })
    }

    /// Where the allocation lies.
    pub(crate) fn chunk(&self) -> Chunk {
        self.chunk
    }

    /// The record of its first page.
    pub(crate) fn page(&self) -> &PageMeta {
        self.page
    }
}

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        self.page.unpin();
    }
}
