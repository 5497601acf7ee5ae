//! The guest's counters, named like Linux's `vmstat` where Linux has one.

use crate::words_struct;

words_struct! {
    /// What the guest counted. Handed over with the exit call and at every report.
    pub struct Counters {
        /// Allocations, mapped and secret.
        alloc,
        /// Allocations that are secret.
        alloc_secret,
        /// Allocations that were freed.
        free,
        /// Secret allocations that were freed.
        free_secret,
        /// Requests that failed because no memory was left.
        alloc_fail,
        /// Secret requests that failed because the pool was empty and the caller must not block.
        alloc_fail_noblock,
        /// Secret requests that failed although memory was free: no pageblock was wholly free.
        alloc_fail_no_block,
        /// Requests served from another migratetype's free list.
        alloc_fallback,
        /// Pages zeroed for mapped requests.
        zeroed_mapped,
        /// Pages zeroed ahead of demand, when their block flipped.
        zeroed_flip,
        /// Pages zeroed when they were handed out.
        zeroed_alloc,
        /// Pages scrubbed when they were freed or flipped back.
        zeroed_scrub,
        /// Pageblocks that left the direct map.
        flip_to_unmapped,
        /// Pageblocks that came back to the direct map.
        flip_to_mapped,
        /// Pageblocks split so that some of their pages could be converted in place.
        splits,
        /// Split pageblocks that became one entry again.
        merges,
        /// Mapped allocations that became secret in place.
        converted,
        /// Pages of these.
        converted_pages,
        /// Converted allocations that were mapped again.
        restored,
        /// Times that a converted allocation was freed, or was tried again, and could not come back
        /// at once.
        parked,
        /// Flushes sent to a set of CPUs: of everything when a block leaves the direct map, is split
        /// or merged, of what is not global before pages are released.
        shootdowns,
        /// Flushes of a window because its addresses were used up.
        window_flushes,
        /// Flushes of window addresses on their own CPU before they are used again, those of
        /// `window_flushes` included.
        local_flushes,
        /// Windows mapped with several pages or a 2 MiB entry.
        windows,
        /// Windows mapped through the reserve, one page at a time.
        windows_reserved,
        /// Gate calls made.
        gate_calls,
        /// Gate calls that the host refused.
        gate_refused,
        /// Times that freed secret pages were scrubbed together.
        scrubs,
        /// Those of `scrubs` that a CPU did with interrupts off.
        scrubs_atomic,
        /// Times that the lists of all CPUs were emptied because memory was short.
        drains,
        /// Times that the pool was filled ahead of demand.
        balance_refill,
        /// Times that pageblocks came back ahead of demand.
        balance_reclaim,
        /// Pageblocks that were emptied by moving what lay in them.
        compact_success,
        /// Pageblocks that could not be emptied.
        compact_fail,
        /// Pages moved.
        pages_moved,
        /// Pages whose poison was intact when they were handed out.
        poison_checked,
        /// Pages known to be zero that were looked at when they were handed out.
        zero_checked,
        /// Mapped pages on free lists, the zone's and those of CPUs.
        nr_free_mapped,
        /// Unmapped pages on free lists, the zone's and those of CPUs; those that wait to be scrubbed
        /// included.
        nr_free_unmapped,
        /// Pages in allocations, or withheld.
        nr_allocated,
        /// Pages that are never handed out again.
        nr_withheld,
        /// Pages that never entered the free lists.
        nr_fresh,
        /// Mapped unmovable pages on the zone's free lists.
        nr_free_unmovable,
        /// Mapped movable pages on the zone's free lists.
        nr_free_movable,
        /// Mapped reclaimable pages on the zone's free lists.
        nr_free_reclaimable,
        /// Unmapped unmovable pages on the zone's free lists.
        nr_free_unmapped_unmovable,
        /// Unmapped movable pages on the zone's free lists.
        nr_free_unmapped_movable,
        /// Unmapped reclaimable pages on the zone's free lists.
        nr_free_unmapped_reclaimable,
        /// Mapped unmovable pages on the lists of CPUs.
        nr_cached_unmovable,
        /// Mapped movable pages on the lists of CPUs.
        nr_cached_movable,
        /// Mapped reclaimable pages on the lists of CPUs.
        nr_cached_reclaimable,
        /// Unmapped unmovable pages on the lists of CPUs.
        nr_cached_unmapped_unmovable,
        /// Unmapped movable pages on the lists of CPUs.
        nr_cached_unmapped_movable,
        /// Unmapped reclaimable pages on the lists of CPUs.
        nr_cached_unmapped_reclaimable,
        /// Mapped unmovable pages in allocations, or withheld.
        nr_allocated_unmovable,
        /// Mapped movable pages in allocations, or withheld.
        nr_allocated_movable,
        /// Mapped reclaimable pages in allocations, or withheld.
        nr_allocated_reclaimable,
        /// Unmapped unmovable pages in allocations, or withheld.
        nr_allocated_unmapped_unmovable,
        /// Unmapped movable pages in allocations, or withheld.
        nr_allocated_unmapped_movable,
        /// Unmapped reclaimable pages in allocations, or withheld.
        nr_allocated_unmapped_reclaimable,
        /// Mapped unmovable pages in pageblocks.
        nr_total_unmovable,
        /// Mapped movable pages in pageblocks.
        nr_total_movable,
        /// Mapped reclaimable pages in pageblocks.
        nr_total_reclaimable,
        /// Unmapped unmovable pages in pageblocks.
        nr_total_unmapped_unmovable,
        /// Unmapped movable pages in pageblocks.
        nr_total_unmapped_movable,
        /// Unmapped reclaimable pages in pageblocks.
        nr_total_unmapped_reclaimable,
        /// Ticks of the guest's clock that the program `bench` spent allocating.
        ticks_alloc,
        /// Ticks that it spent with what it allocated.
        ticks_use,
        /// Ticks that it spent freeing.
        ticks_free,
        /// Those of the ticks spent allocating and freeing that went by in gate calls; 0 where the
        /// machine does not keep them apart.
        ticks_gate_pages,
        /// Those of the ticks spent with what was allocated that went by in gate calls.
        ticks_gate_use,
        /// Pages of the table pool that hold tables of split pageblocks at the end.
        nr_table_pages,
        /// Units of work done by the program: trace events, or pages stored.
        work,
        /// Tags that a workload checked before it freed a page.
        tags_checked,
    }
}
