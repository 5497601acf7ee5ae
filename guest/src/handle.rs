//! Handles: an allocation as one word, for owners that keep a table of them in guest memory.
//!
//! A handle is good once. Resolving it makes its owner anew, and both a second use and a use after
//! the pages were freed are refused.

use crate::meta::{Chunk, MemMap};

/// The word is no handle of an allocation of this kind, or it was used already.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BadHandle(pub u64);

/// The handle of the allocation whose first page this is; never 0.
pub(crate) fn handle(map: &MemMap<'_>, index: u32) -> u64 {
    u64::from(map.page(index).generation()) << 32 | u64::from(index + 1)
}

/// The allocation of `handle`, which must be on this side of the direct map. The handle is used up.
pub(crate) fn resolve(map: &MemMap<'_>, handle: u64, unmapped: bool) -> Result<Chunk, BadHandle> {
    let [i0, i1, i2, i3, g0, g1, g2, g3] = handle.to_le_bytes();
    let index = u32::from_le_bytes([i0, i1, i2, i3]).checked_sub(1).ok_or(BadHandle(handle))?;
    let page = map.get(index).ok_or(BadHandle(handle))?;
    match page.allocation() {
        Some((order, freetype))
            if freetype.unmapped == unmapped
                && page.next_generation(u32::from_le_bytes([g0, g1, g2, g3])) =>
        {
            Ok(Chunk { index, order })
        }
        _ => Err(BadHandle(handle)),
    }
}
