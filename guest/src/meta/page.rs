//! The record of a page.

use super::State;
use crate::freetype::Freetype;
use crate::sync::{AtomicU8, AtomicU32};
use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use lacuna_abi::layout::PAGE_META_BYTES;

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
    pub(super) slot: AtomicU32,
    pub(super) place: AtomicU32,
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
