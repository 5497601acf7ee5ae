//! How an allocator behaves.

use crate::contents::OnFree;
use lacuna_abi::boot::{
    BootInfo, FEATURE_CHECK_ZERO, FEATURE_FLIP, FEATURE_POISON, FEATURE_PREZERO, FEATURE_SCRUB,
    FEATURE_ZERO_ON_FREE, MIN_FREE_BY_SIZE,
};

/// How the allocator behaves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AllocConfig {
    /// Pageblocks are zeroed when they flip, so that hand-out finds zero pages.
    pub prezero: bool,
    /// An empty pool is refilled by flipping pageblocks.
    pub flip: bool,
    /// What happens to freed mapped pages.
    pub on_free: OnFree,
    /// Freed secret pages that were written to are zeroed; otherwise they are when they are handed
    /// out as zero.
    pub scrub: bool,
    /// Secret pages that are known to be zero are looked at when they are handed out as zero.
    pub check_zero: bool,
    /// Pages of the mapped side that are kept for callers that cannot wait; `None` for what suits the
    /// zone's size.
    pub min_free: Option<u32>,
    /// Free secret pages below which [`super::PageAllocator::balance`] flips pageblocks ahead of demand.
    pub pool_low: u32,
    /// Free secret pages up to which flips go on, while memory is plentiful.
    pub pool_high: u32,
}

impl AllocConfig {
    /// What the boot information asks for.
    #[must_use]
    pub fn from_boot(info: &BootInfo) -> Self {
        let pages = |count: u64| u32::try_from(count).unwrap_or(u32::MAX);
        Self {
            prezero: info.features & FEATURE_PREZERO != 0,
            flip: info.features & FEATURE_FLIP != 0,
            on_free: match info.features & (FEATURE_POISON | FEATURE_ZERO_ON_FREE) {
                0 => OnFree::Leave,
                FEATURE_ZERO_ON_FREE => OnFree::Zero,
                _ => OnFree::Poison,
            },
            scrub: info.features & FEATURE_SCRUB != 0,
            check_zero: info.features & FEATURE_CHECK_ZERO != 0,
            min_free: (info.min_free != MIN_FREE_BY_SIZE).then(|| pages(info.min_free)),
            pool_low: pages(info.pool_low),
            pool_high: pages(info.pool_high),
        }
    }

    /// Zeroes ahead, flips as much as is asked for and no more, checks nothing.
    pub const PLAIN: Self = Self {
        prezero: true,
        flip: true,
        on_free: OnFree::Leave,
        scrub: true,
        check_zero: false,
        min_free: None,
        pool_low: 0,
        pool_high: 0,
    };
}
