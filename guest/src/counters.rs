//! The allocator's counters: relaxed, because each is meaningful by itself; and where its pages are,
//! which adds up exactly.

use crate::alloc::PageAllocator;
use crate::freetype::{FREETYPES, Freetype};
use crate::platform::Platform;
use crate::zone::BLOCK_PAGES;
use lacuna_abi::counter::Counters;

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
    pub(crate) alloc_mapped: Count,
    pub(crate) alloc_secret: Count,
    /// Frees of mapped pages, and of converted ones.
    pub(crate) free_other: Count,
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
    pub(crate) parked: Count,
    pub(crate) shootdowns: Count,
    pub(crate) withheld: Count,
    pub(crate) scrubs: Count,
    pub(crate) scrubs_atomic: Count,
    pub(crate) drains: Count,
    pub(crate) balance_refill: Count,
    pub(crate) balance_reclaim: Count,
    pub(crate) compact_success: Count,
    pub(crate) compact_fail: Count,
    pub(crate) pages_moved: Count,
    pub(crate) poison_checked: Count,
    pub(crate) zero_checked: Count,
    pub(crate) ticks: [Count; 5],
    pub(crate) work: Count,
    pub(crate) tags_checked: Count,
}

/// Where the pages of one freetype are. Without anything under way on any CPU, free, cached and
/// allocated pages are all.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Pages {
    /// On the zone's lists.
    pub free: u32,
    /// On the lists of CPUs.
    pub cached: u32,
    /// In allocations, or withheld.
    pub allocated: u32,
    /// In pageblocks of this freetype.
    pub total: u32,
}

impl Pages {
    /// Whether no page is missing and none is counted twice.
    #[must_use]
    pub const fn adds_up(&self) -> bool {
        self.free + self.cached + self.allocated == self.total
    }
}

impl<P: Platform> PageAllocator<'_, P> {
    /// Where the pages are, for each freetype by its number, and how many never entered the lists.
    /// Each number is counted by itself, from the zone's lists, the lists of CPUs and the pageblocks'
    /// records, so that their sum says something.
    pub fn pages(&self) -> ([Pages; FREETYPES], u32) {
        let mut cached = [0; FREETYPES];
        for cpu in 0..self.platform.cpus() {
            self.lists_of(cpu).count(&self.map, &mut cached);
        }
        let zone = self.zone();
        let usage = zone.usage(&self.map);
        let mut allocated = [0; FREETYPES];
        for first in (0..zone.entered()).step_by(BLOCK_PAGES as usize) {
            let block = self.map.block_at(first);
            allocated[block.freetype().index()] += block.allocated();
        }
        let pages = core::array::from_fn(|index| Pages {
            free: usage.free[index],
            cached: cached[index],
            allocated: allocated[index],
            total: usage.total[index],
        });
        (pages, usage.fresh)
    }

    /// Everything that was counted so far, and where the zone's pages are. Gate calls are the
    /// platform's to count.
    pub fn counters(&self) -> Counters {
        let (pages, fresh) = self.pages();
        let windows = self.mermap.counters();
        let counts = &self.counts;
        let [alloc_secret, free_secret] = [counts.alloc_secret.get(), counts.free_secret.get()];
        let sum = |of: fn(&Pages) -> u32, unmapped: bool| {
            (0..FREETYPES)
                .filter(|index| {
                    Freetype::from_index(*index).is_some_and(|f| f.unmapped == unmapped)
                })
                .map(|index| u64::from(of(&pages[index])))
                .sum::<u64>()
        };
        let free = |index: usize| u64::from(pages[index].free);
        let cached = |index: usize| u64::from(pages[index].cached);
        let allocated = |index: usize| u64::from(pages[index].allocated);
        let total = |index: usize| u64::from(pages[index].total);
        Counters {
            alloc: alloc_secret + counts.alloc_mapped.get(),
            alloc_secret,
            free: free_secret + counts.free_other.get(),
            free_secret,
            alloc_fail: counts.alloc_fail.get(),
            alloc_fail_noblock: counts.alloc_fail_noblock.get(),
            alloc_fail_no_block: counts.alloc_fail_no_block.get(),
            alloc_fallback: counts.alloc_fallback.get(),
            zeroed_mapped: counts.zeroed_mapped.get(),
            zeroed_flip: counts.zeroed_flip.get(),
            zeroed_alloc: counts.zeroed_alloc.get(),
            zeroed_scrub: counts.zeroed_scrub.get(),
            flip_to_unmapped: counts.flip_to_unmapped.get(),
            flip_to_mapped: counts.flip_to_mapped.get(),
            splits: counts.splits.get(),
            merges: counts.merges.get(),
            converted: counts.converted.get(),
            converted_pages: counts.converted_pages.get(),
            restored: counts.restored.get(),
            parked: counts.parked.get(),
            nr_table_pages: u64::from(self.table_pages.taken()),
            shootdowns: counts.shootdowns.get(),
            window_flushes: windows.flushes,
            local_flushes: windows.local_flushes,
            windows: windows.mapped,
            windows_reserved: windows.mapped_reserved,
            scrubs: counts.scrubs.get(),
            scrubs_atomic: counts.scrubs_atomic.get(),
            drains: counts.drains.get(),
            balance_refill: counts.balance_refill.get(),
            balance_reclaim: counts.balance_reclaim.get(),
            compact_success: counts.compact_success.get(),
            compact_fail: counts.compact_fail.get(),
            pages_moved: counts.pages_moved.get(),
            poison_checked: counts.poison_checked.get(),
            zero_checked: counts.zero_checked.get(),
            nr_free_mapped: sum(|pages| pages.free + pages.cached, false),
            nr_free_unmapped: sum(|pages| pages.free + pages.cached, true),
            nr_allocated: sum(|p| p.allocated, false) + sum(|p| p.allocated, true),
            nr_withheld: counts.withheld.get(),
            nr_fresh: u64::from(fresh),
            nr_free_unmovable: free(0),
            nr_free_movable: free(1),
            nr_free_reclaimable: free(2),
            nr_free_unmapped_unmovable: free(3),
            nr_free_unmapped_movable: free(4),
            nr_free_unmapped_reclaimable: free(5),
            nr_cached_unmovable: cached(0),
            nr_cached_movable: cached(1),
            nr_cached_reclaimable: cached(2),
            nr_cached_unmapped_unmovable: cached(3),
            nr_cached_unmapped_movable: cached(4),
            nr_cached_unmapped_reclaimable: cached(5),
            nr_allocated_unmovable: allocated(0),
            nr_allocated_movable: allocated(1),
            nr_allocated_reclaimable: allocated(2),
            nr_allocated_unmapped_unmovable: allocated(3),
            nr_allocated_unmapped_movable: allocated(4),
            nr_allocated_unmapped_reclaimable: allocated(5),
            nr_total_unmovable: total(0),
            nr_total_movable: total(1),
            nr_total_reclaimable: total(2),
            nr_total_unmapped_unmovable: total(3),
            nr_total_unmapped_movable: total(4),
            nr_total_unmapped_reclaimable: total(5),
            ticks_alloc: counts.ticks[0].get(),
            ticks_use: counts.ticks[1].get(),
            ticks_free: counts.ticks[2].get(),
            ticks_gate_pages: counts.ticks[3].get(),
            ticks_gate_use: counts.ticks[4].get(),
            work: counts.work.get(),
            tags_checked: counts.tags_checked.get(),
            ..Counters::default()
        }
    }
}
