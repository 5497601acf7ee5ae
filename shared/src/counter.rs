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
        /// Flushes sent to a set of CPUs: of everything when a block leaves the direct map, is split
        /// or merged, of what is not global before pages are released.
        shootdowns,
        /// Flushes of a window because its addresses were used up.
        window_flushes,
        /// Windows mapped with several pages or a 2 MiB entry.
        windows,
        /// Windows mapped through the reserve, one page at a time.
        windows_reserved,
        /// Gate calls made.
        gate_calls,
        /// Gate calls that the host refused.
        gate_refused,
        /// Pages on mapped free lists at the end.
        nr_free_mapped,
        /// Pages on unmapped free lists at the end.
        nr_free_unmapped,
        /// Pages in allocations at the end.
        nr_allocated,
        /// Pages that never entered the free lists.
        nr_fresh,
        /// Pages of the table pool that hold tables of split pageblocks at the end.
        nr_table_pages,
        /// Units of work done by the program: trace events, or pages stored.
        work,
        /// Tags that a workload checked before it freed a page.
        tags_checked,
    }
}
