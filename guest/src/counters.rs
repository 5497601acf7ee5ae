//! The allocator's counters: relaxed, because each is meaningful by itself.

use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;

/// One counter.
#[derive(Debug, Default)]
pub(crate) struct Count(AtomicU64);

impl Count {
    pub(crate) fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// Everything that the allocator counts itself; names as in [`lacuna_abi::counter::Counters`].
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) alloc: Count,
    pub(crate) alloc_secret: Count,
    pub(crate) free: Count,
    pub(crate) free_secret: Count,
    pub(crate) alloc_fail: Count,
    pub(crate) alloc_fail_noblock: Count,
    pub(crate) alloc_fail_no_block: Count,
    pub(crate) alloc_fallback: Count,
    pub(crate) zeroed_mapped: Count,
    pub(crate) zeroed_flip: Count,
    pub(crate) zeroed_alloc: Count,
    pub(crate) zeroed_scrub: Count,
    pub(crate) flip_to_unmapped: Count,
    pub(crate) flip_to_mapped: Count,
    pub(crate) splits: Count,
    pub(crate) merges: Count,
    pub(crate) converted: Count,
    pub(crate) converted_pages: Count,
    pub(crate) restored: Count,
    pub(crate) shootdowns: Count,
    pub(crate) work: Count,
    pub(crate) tags_checked: Count,
}
