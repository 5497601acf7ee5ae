//! Where duties are found: parts of memory and of the address space, and the chains that they fall
//! into.

use super::duty::Duty;
use lacuna_abi::addr::{BLOCK_ORDER, FrameRange, Gva, PAGE_SHIFT};
use lacuna_abi::paging::Level;

/// Where an index finds a duty: the number of the 2 MiB part, or for large pages of the 1 GiB part,
/// of memory or of the address space.
pub(super) type Spot = u64;

/// Which of the chains a spot falls into; their number is a power of two.
pub(super) fn chain(spot: Spot, chains: usize) -> usize {
    let mixed = spot.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
    usize::try_from(mixed).unwrap_or(0) & chains.saturating_sub(1)
}

/// log2 of the pages of a part.
const fn order(wide: bool) -> u32 {
    if wide { 2 * BLOCK_ORDER } else { BLOCK_ORDER }
}

/// Where a duty is found by its frames.
pub(super) fn frame_spot(duty: &Duty) -> Spot {
    let wide = duty.level > Level::Pd;
    duty.frames.start().0 >> order(wide) << 1 | u64::from(wide)
}

/// Where it is found by its addresses.
pub(super) fn va_spot(duty: &Duty) -> Spot {
    let wide = duty.level > Level::Pd;
    duty.va.0 >> (PAGE_SHIFT + order(wide)) << 1 | u64::from(wide)
}

/// Numbers of the first and last part, 2 MiB and 1 GiB, that the frames touch.
pub(super) fn frame_spots(frames: FrameRange) -> [(u64, u64); 2] {
    let last = frames.end().0 - 1;
    let parts = |wide| (frames.start().0 >> order(wide), last >> order(wide));
    [parts(false), parts(true)]
}

/// Numbers of the first and last part, 2 MiB and 1 GiB, that the addresses touch.
pub(super) fn va_spots(first: Gva, last: Gva) -> [(u64, u64); 2] {
    let part = |va: Gva, wide| va.0 >> (PAGE_SHIFT + order(wide));
    let parts = |wide| (part(first, wide), part(last, wide).max(part(first, wide)));
    [parts(false), parts(true)]
}
