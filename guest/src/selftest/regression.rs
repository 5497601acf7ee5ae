//! One test for each fault that was found in the Linux series (patches of March 2026): each fails
//! if that fault is put in here.

use super::{Bench, magic, ok, pages, zero_pages};
use crate::alloc::{AllocConfig, AllocError, PageAllocator, Request};
use crate::freetype::Migratetype;
use crate::mermap::{Mermap, MermapError, PAGES, Protection, SLOTS};
use crate::platform::Platform;
use crate::secret::{Access, SecretPages};
use crate::zeroing::Purpose;
use lacuna_abi::addr::{BLOCK_FRAMES, FrameRange, Gfn};
use lacuna_abi::layout::{Layout, window};

/// A run of secret pages.
fn part(pages: FrameRange, first: u64, count: u64) -> FrameRange {
    let run = FrameRange::new(pages.start().wrapping_add(first), count);
    run.filter(|run| pages.contains_range(*run)).unwrap_or_else(|| panic!("{pages} are fewer"))
}

/// Clears from the middle of one pageblock to the middle of the next, and looks at every page.
fn clear_across_blocks<P: Platform>(bench: &Bench<'_, '_, P>, first: u64, count: u64) {
    let all = ok(bench.allocator.alloc_secret(pages(10)));
    bench.mark_secret(&all);
    let before = bench.allocator.counters().zeroed_scrub;
    ok(bench.allocator.zero_unknown(part(all.frames(), first, count), Purpose::Scrub));
    assert_eq!(bench.allocator.counters().zeroed_scrub - before, count);
    for page in 0..all.frames().count() {
        let frame = all.frames().start().wrapping_add(page);
        let window = ok(all.open(page, 1, Access::Read));
        let expected = if (first..first + count).contains(&page) { 0 } else { magic(frame) };
        assert_eq!(window.load(8), Ok(expected), "page {page}");
    }
}

/// A pageblock's part is cleared, not all remaining pages from each pageblock on: when two blocks
/// flip together, and when a run of pages crosses from one into the next.
pub(super) fn series_01<P: Platform>(bench: &Bench<'_, '_, P>) {
    drop(ok(bench.allocator.alloc_secret(zero_pages(10))));
    let counters = bench.allocator.counters();
    assert!(counters.flip_to_unmapped >= 2);
    assert_eq!(counters.zeroed_flip, counters.flip_to_unmapped * BLOCK_FRAMES);
    clear_across_blocks(bench, BLOCK_FRAMES - 12, 100);
}

/// The number of remaining pages does not wrap on the last, partial pageblock.
pub(super) fn series_02<P: Platform>(bench: &Bench<'_, '_, P>) {
    clear_across_blocks(bench, 3, BLOCK_FRAMES + 1);
}

/// A get that fails leaves interrupts as they were, no entry and no slot in use.
pub(super) fn series_03<P: Platform>(bench: &Bench<'_, '_, P>) {
    let block = ok(bench.allocator.alloc_secret(pages(10)));
    let run = |first, count| part(block.frames(), first, count);
    let zone = bench.layout.zone_frames();
    let behind = FrameRange::single(Gfn(zone.end().0));
    let before = bench.interrupts_are_on();
    bench.with_open(block.frames(), || {
        assert_eq!(bench.get(run(1, PAGES + 1)).err(), Some(MermapError::NoSpace));
        assert_eq!(bench.get(behind).err(), Some(MermapError::NotInZone));
        for protection in [
            Protection { global: true, ..Protection::READ },
            Protection { execute: true, ..Protection::READ },
        ] {
            assert!(bench.allocator.mermap().get(run(0, 1), protection).is_err());
        }
        assert_eq!(bench.interrupts_are_on(), before);
        assert_eq!(bench.window_entries(), 0);
        // Every slot is still free, and the failure of one more changes nothing either.
        let mappings: [_; SLOTS] = core::array::from_fn(|slot| ok(bench.get(run(slot as u64, 1))));
        let held = bench.window_entries();
        assert_eq!(bench.get(run(9, 1)).err(), Some(MermapError::NoSlot));
        assert_eq!((bench.window_entries(), bench.interrupts_are_on()), (held, before));
        drop(mappings);
        let reserve = ok(bench.get_reserved(run(10, 1).start()));
        assert_eq!(bench.get_reserved(run(11, 1).start()).err(), Some(MermapError::ReserveInUse));
        assert!(!bench.interrupts_are_on(), "the first one still holds them off");
        drop(reserve);
        assert_eq!(bench.interrupts_are_on(), before);
        assert_eq!(bench.window_entries(), 0);
    });
}

/// Teardown looks at the windows of every CPU, not at its own again and again.
pub(super) fn series_04<P: Platform>(bench: &Bench<'_, '_, P>) {
    let cpu = bench.platform.cpu();
    let page = (cpu == 1).then(|| ok(bench.allocator.alloc_secret(pages(0))));
    if let Some(page) = &page {
        ok(bench.platform.gate(&[(lacuna_abi::gate::OpKind::Open, page.frames())]));
        let leak = ok(bench.get(page.frames()));
        bench.barrier();
        // CPU 0 looks.
        bench.barrier();
        drop(leak);
        ok(bench.platform.gate(&[(lacuna_abi::gate::OpKind::Seal, page.frames())]));
        bench.barrier();
        return;
    }
    bench.barrier();
    if cpu == 0 {
        let leaks = bench.allocator.mermap().teardown().err();
        let found = leaks.map(|leaks| leaks.0);
        assert_eq!(found.map(|counts| (counts[0], counts[1])), Some((0, 1)));
        assert!(bench.allocator.mermap().ready(), "what is mapped can still be taken down");
    }
    bench.barrier();
    bench.barrier();
    if cpu == 0 {
        ok(bench.allocator.mermap().teardown());
        assert_eq!(bench.get(bench.layout.zone_frames()).err(), Some(MermapError::NotReady));
    }
}

/// The windows are ready when everything is in place, and not before.
pub(super) fn series_05<P: Platform>(bench: &Bench<'_, '_, P>) {
    let frame = FrameRange::single(bench.layout.zone_frames().start());
    let platform = bench.allocator.platform;
    let fresh = Mermap::new(platform, bench.layout, bench.allocator.map);
    assert!(!fresh.ready());
    assert_eq!(fresh.get(frame, Protection::READ).err(), Some(MermapError::NotReady));
    ok(fresh.prepare());
    ok(fresh.prepare());
    assert!(fresh.ready());
    drop(ok(fresh.get(frame, Protection::READ)));
    // The last window has no tables: that all before it have some is not enough.
    let cpus = bench.layout.cpus;
    let layout = Layout { cpus: cpus + 1, ..*bench.layout };
    let broken = Mermap::new(platform, &layout, bench.allocator.map);
    assert_eq!(broken.prepare(), Err(MermapError::NoTables(cpus)));
    assert!(!broken.ready());
    assert_eq!(broken.get(frame, Protection::READ).err(), Some(MermapError::NotReady));
}

/// The reserve covers a slot as well as an address: it serves when all slots are taken, and when
/// all addresses are.
pub(super) fn series_06<P: Platform>(bench: &Bench<'_, '_, P>) {
    let block = ok(bench.allocator.alloc_secret(pages(10)));
    let run = |first, count| part(block.frames(), first, count);
    bench.with_open(block.frames(), || {
        let slots: [_; SLOTS] = core::array::from_fn(|slot| ok(bench.get(run(slot as u64, 1))));
        assert_eq!(bench.get(run(8, 1)).err(), Some(MermapError::NoSlot));
        for page in 0..4 {
            let spare = ok(bench.get_reserved(run(20 + page, 1).start()));
            bench.mark(&spare);
            bench.check(&spare);
        }
        drop(slots);
        let all = ok(bench.get(run(1, PAGES)));
        assert_eq!(bench.get(run(600, 1)).err(), Some(MermapError::NoSpace));
        let spare = ok(bench.get_reserved(run(600, 1).start()));
        bench.mark(&spare);
        bench.check(&spare);
        drop((spare, all));
    });
}

/// What the reserve gives is the address of the page: it reads what was stored through another
/// window.
pub(super) fn series_07<P: Platform>(bench: &Bench<'_, '_, P>) {
    let pages = ok(bench.allocator.alloc_secret(pages(1)));
    bench.mark_secret(&pages);
    bench.with_open(pages.frames(), || {
        for frame in pages.frames().iter() {
            let spare = ok(bench.get_reserved(frame));
            let own = window(bench.platform.cpu());
            assert_eq!(spare.va().offset_from(own), Some(PAGES * 4096));
            assert_eq!(bench.platform.load(spare.va().wrapping_add(8)), magic(frame));
        }
    });
}

/// A get that finds no slot has flushed nothing, even where it would have had to.
pub(super) fn series_08<P: Platform>(bench: &Bench<'_, '_, P>) {
    let block = ok(bench.allocator.alloc_secret(pages(10)));
    let run = |first, count| part(block.frames(), first, count);
    bench.with_open(block.frames(), || {
        // All addresses but the last few are used up, then all slots are taken.
        drop(ok(bench.get(run(1, PAGES - SLOTS as u64))));
        let slots: [_; SLOTS] = core::array::from_fn(|slot| ok(bench.get(run(slot as u64, 1))));
        let before = bench.allocator.mermap().counters();
        assert_eq!(bench.get(run(9, 1)).err(), Some(MermapError::NoSlot));
        assert_eq!(bench.get(run(9, 30)).err(), Some(MermapError::NoSlot));
        assert_eq!(bench.allocator.mermap().counters(), before);
        drop(slots);
    });
}

/// Memory that is free only in parts of pageblocks is said to have no block, as an error of its own;
/// movable pages make room; and mapped demand of every migratetype gets free secret blocks back.
pub(super) fn series_09<P: Platform>(bench: &Bench<'_, '_, P>) {
    let allocator = bench.allocator;
    let zone = bench.layout.zone_frames().count();
    let store = |number: u64, handle| bench.platform.store(super::scratch(number), handle);
    let free = |number: u64| {
        let handle = bench.platform.load(super::scratch(number));
        drop(ok(crate::mapped::MappedPages::from_raw(allocator, handle)));
    };
    // All that can be had, eight pages at a time, unmovable and pinned by nobody; then all but one
    // in each pageblock is freed again.
    let request = pages(3);
    let mut count = 0;
    while let Ok(pages) = allocator.alloc_mapped(request) {
        store(count, pages.into_raw());
        count += 1;
    }
    assert!(count * 8 > zone * 3 / 4, "{count} chunks of {zone} pages");
    let step = BLOCK_FRAMES / 8;
    (0..count).filter(|number| number % step != 0).for_each(free);
    let counted = allocator.counters().alloc_fail_no_block;
    assert_eq!(allocator.alloc_secret(pages(0)).err(), Some(AllocError::NoBlock));
    assert_eq!(allocator.counters().alloc_fail_no_block, counted + 1);
    (0..count).filter(|number| number % step == 0).for_each(free);

    // The same with movable pages: one block is emptied for it.
    let movable = Request { migratetype: Migratetype::Movable, ..request };
    count = 0;
    while let Ok(pages) = allocator.alloc_mapped(movable) {
        store(count, pages.into_raw());
        count += 1;
    }
    (0..count).filter(|number| number % step != 0).for_each(free);
    let secret = ok(allocator.alloc_secret(pages(0)));
    assert!(!bench.in_direct_map(secret.frames().start()));
    drop(secret);
    (0..count).filter(|number| number % step == 0).for_each(free);

    // Secret pageblocks that nobody uses come back for whoever asks.
    for migratetype in Migratetype::ALL {
        count = 0;
        while let Ok(pages) = allocator.alloc_secret(pages(9)) {
            store(count, pages.into_raw());
            count += 1;
        }
        for number in 0..count {
            let handle = bench.platform.load(super::scratch(number));
            drop(ok(SecretPages::from_raw(allocator, handle)));
        }
        let back = allocator.counters().flip_to_mapped;
        let mapped = ok(allocator.alloc_mapped(Request { migratetype, ..pages(10) }));
        assert!(bench.in_direct_map(mapped.frames().start()));
        assert!(allocator.counters().flip_to_mapped > back, "{migratetype:?}");
    }
}

/// Pages that a window showed are not released before every CPU that showed them has flushed.
pub(super) fn series_10<P: Platform>(bench: &Bench<'_, '_, P>) {
    let cpu = bench.platform.cpu();
    let allocator = bench.allocator;
    let place = super::scratch(0);
    if cpu == 0 {
        let block = ok(allocator.alloc_secret(pages(9)));
        bench.platform.store(place, block.into_raw());
    }
    bench.barrier();
    if cpu == 1 {
        let block = ok(SecretPages::from_raw(allocator, bench.platform.load(place)));
        let window = ok(block.open(7, 1, Access::Write));
        ok(window.store(8, 77));
        ok(window.close());
        bench.platform.store(place, block.into_raw());
    }
    bench.barrier();
    if cpu == 0 {
        let block = ok(SecretPages::from_raw(allocator, bench.platform.load(place)));
        let frames = block.frames();
        assert!(allocator.mermap().may_cache(frames).contains(1), "CPU 1 may still cache it");
        drop(block);
        let shootdowns = allocator.counters().shootdowns;
        ok(allocator.shrink());
        assert_eq!(allocator.counters().shootdowns, shootdowns + 1);
        assert!(allocator.mermap().may_cache(frames).is_empty());
        assert!(bench.in_direct_map(frames.start()));
    }
    bench.barrier();
}

/// Between the last use of a page through the direct map and its first as a secret page lies a flush
/// on every CPU, of globals too: one for each flip, none for a page of the pool.
pub(super) fn series_11<P: Platform>(bench: &Bench<'_, '_, P>) {
    let allocator = bench.allocator;
    let mapped = ok(allocator.alloc_mapped(pages(9)));
    let pinned = mapped.pin();
    let (frames, va) = (pinned.frames(), pinned.va());
    bench.platform.store(va, 1);
    drop(pinned);
    drop(mapped);
    let shootdowns = allocator.counters().shootdowns;
    let secret = ok(allocator.alloc_secret(pages(9)));
    assert!(!bench.in_direct_map(secret.frames().start()));
    assert_eq!(allocator.counters().shootdowns, shootdowns + 1);
    assert_eq!(secret.frames(), frames, "the block that was freed last is taken first");
    drop(secret);
    let again = ok(allocator.alloc_secret(pages(9)));
    assert_eq!(allocator.counters().shootdowns, shootdowns + 1, "the pool needs no flush");
    drop(again);
}

/// Where secret memory is not to be had, a request for it fails; it never gets a mapped page.
pub(super) fn series_12<P: Platform>(bench: &Bench<'_, '_, P>) {
    let config = AllocConfig { flip: false, ..bench.allocator.config };
    let platform = bench.allocator.platform;
    let without = PageAllocator::new(platform, bench.layout, bench.allocator.map, config);
    ok(without.prepare());
    for request in [pages(0), zero_pages(0), pages(9), Request { noblock: true, ..pages(0) }] {
        let refused = without.alloc_secret(request).err();
        let expected = if request.noblock { AllocError::WouldBlock } else { AllocError::NoMemory };
        assert_eq!(refused, Some(expected));
    }
    assert_eq!(without.counters().flip_to_unmapped, 0);
    // Nothing was taken from memory that the other allocator, which is not used here, has too.
    assert_eq!(without.counters().nr_allocated, 0);
}
