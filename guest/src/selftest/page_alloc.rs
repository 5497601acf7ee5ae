//! The page allocator.

use super::{Bench, magic, ok, pages, scratch, zero_pages};
use crate::alloc::{AllocError, Request};
use crate::counters::Pages;
use crate::freetype::{FREETYPES, Freetype, Migratetype};
use crate::mapped::MappedPages;
use crate::pcp::{LISTS, order_and_freetype, pindex};
use crate::platform::Platform;
use crate::random::Random;
use crate::secret::{Access, SecretPages};
use lacuna_abi::addr::Gfn;

/// Over half of memory as secret pages, with and without zero: none is in the direct map, all are
/// in unmapped blocks and keep what is stored in them. Freed and allocated again as mapped pages,
/// all are in the direct map, zero if asked for so.
pub(super) fn alloc_map_unmap<P: Platform>(bench: &Bench<'_, '_, P>) {
    let Bench { allocator, platform, layout, .. } = *bench;
    let zone = layout.zone_frames();
    let most = zone.count() / 2 + 100;
    for number in 0..most {
        let zero = number % 2 == 0;
        let page = ok(allocator.alloc_secret(if zero { zero_pages(0) } else { pages(0) }));
        let frame = page.frames().start();
        assert!(!bench.in_direct_map(frame), "{frame} is secret");
        assert!(allocator.map.block_at((frame.0 - zone.start().0) as u32).freetype().unmapped);
        let window = ok(page.open(0, 1, Access::Write));
        for word in [0, 8, 2048, 4088] {
            assert!(!zero || window.load(word) == Ok(0), "{frame} was asked for as zero");
        }
        ok(window.store(8, magic(frame)));
        ok(window.close());
        platform.store(scratch(number), page.into_raw());
    }
    for number in 0..most {
        let page = ok(SecretPages::from_raw(allocator, platform.load(scratch(number))));
        bench.check_secret(&page);
    }
    check_counts(bench, 0);
    for number in 0..most {
        let page =
            ok(allocator.alloc_mapped(if number % 2 == 0 { zero_pages(0) } else { pages(0) }));
        let frame = page.frames().start();
        assert!(bench.in_direct_map(frame), "{frame} is mapped");
        let va = page.pin().va();
        assert!(number % 2 != 0 || platform.load(va.wrapping_add(8)) == 0);
        platform.store(va.wrapping_add(8), magic(frame));
        platform.store(scratch(number), page.into_raw());
    }
    check_counts(bench, most);
    for number in 0..most {
        let page = ok(MappedPages::from_raw(allocator, platform.load(scratch(number))));
        let frame = page.frames().start();
        assert_eq!(platform.load(page.pin().va().wrapping_add(8)), magic(frame));
    }
    check_counts(bench, 0);
}

/// Every freetype's pages add up, and as many as said are allocated.
fn check_counts<P: Platform>(bench: &Bench<'_, '_, P>, allocated: u64) {
    let (pages, fresh) = bench.allocator.pages();
    assert!(pages.iter().all(Pages::adds_up), "{pages:?}");
    let sum = |of: fn(&Pages) -> u32| pages.iter().map(|pages| u64::from(of(pages))).sum::<u64>();
    assert_eq!(sum(|pages| pages.allocated), allocated);
    assert_eq!(sum(|pages| pages.total) + u64::from(fresh), bench.layout.zone_frames().count());
}

/// Every order and freetype that has a list of its own has one of its own, all lists are used, and
/// the number leads back.
pub(super) fn pindex_helpers() {
    let mut used = [false; LISTS];
    for order in 0..=u8::MAX {
        for freetype in (0..FREETYPES).filter_map(Freetype::from_index) {
            let Some(index) = pindex(order, freetype) else {
                assert!(order > 3, "order {order} has no list");
                continue;
            };
            assert!(!used[index], "order {order}, {freetype:?}");
            used[index] = true;
            assert_eq!(order_and_freetype(index), Some((order, freetype)));
        }
    }
    assert!(used.iter().all(|used| *used));
    assert_eq!(order_and_freetype(LISTS), None);
}

/// Every migratetype and flag has a number of its own, all numbers are used and lead back.
pub(super) fn freetype_idx() {
    let mut used = [false; FREETYPES];
    for migratetype in Migratetype::ALL {
        for freetype in [Freetype::mapped(migratetype), Freetype::unmapped(migratetype)] {
            let index = freetype.index();
            assert!(!used[index], "{freetype:?}");
            used[index] = true;
            assert_eq!(Freetype::from_index(index), Some(freetype));
        }
    }
    assert!(used.iter().all(|used| *used));
    assert_eq!(Freetype::from_index(FREETYPES), None);
}

/// Allocations that are alive at once.
const HELD: u64 = 256;
/// Operations where nobody says how many. The original makes ten million; so many are for simulated
/// machines.
const OPS: u64 = 3000;

/// Random allocations of order 0 to 3, mapped and secret, and frees: no page is had twice, every
/// page keeps what its owner stored.
pub(super) fn stress_interleaved<P: Platform>(bench: &Bench<'_, '_, P>, operations: u64) {
    let operations = if operations == 0 { OPS } else { operations };
    let Bench { allocator, platform, .. } = *bench;
    let mut random = Random(0x1ac);
    let mut allocated = 0;
    for number in 0..operations {
        allocator.count_work();
        let slot = random.below(HELD);
        let handle = platform.load(scratch(2 * slot));
        if handle != 0 {
            allocated -= free(bench, slot, handle);
            continue;
        }
        let request = Request {
            order: random.below(4) as u8,
            migratetype: Migratetype::ALL[random.below(3) as usize],
            zero: random.below(2) == 0,
            noblock: random.below(8) == 0,
        };
        // A number that no other allocation has, with one more for each page.
        let tag = (number + 1) << 8;
        let handle = if random.below(2) == 0 {
            match allocator.alloc_secret(request) {
                Ok(pages) => {
                    let count = pages.frames().count();
                    let window = ok(pages.open(0, count, Access::Write));
                    for page in 0..count {
                        assert!(!request.zero || window.load(4096 * page) == Ok(0));
                        ok(window.store(4096 * page, tag + page));
                    }
                    ok(window.close());
                    pages.into_raw()
                }
                Err(AllocError::WouldBlock) => continue,
                Err(error) => panic!("operation {number}: {error:?}"),
            }
        } else {
            let pages = ok(allocator.alloc_mapped(request));
            let pinned = pages.pin();
            for page in 0..pinned.frames().count() {
                let va = pinned.va().wrapping_add(4096 * page);
                assert!(!request.zero || platform.load(va) == 0);
                platform.store(va, tag + page);
            }
            drop(pinned);
            pages.into_raw()
        };
        platform.store(scratch(2 * slot), handle);
        platform.store(scratch(2 * slot + 1), tag);
        allocated += 1 << request.order;
        if number % 512 == 0 {
            check_counts(bench, allocated);
        }
    }
    for slot in 0..HELD {
        let handle = platform.load(scratch(2 * slot));
        if handle != 0 {
            allocated -= free(bench, slot, handle);
        }
    }
    assert_eq!(allocated, 0);
    ok(allocator.shrink());
    check_counts(bench, 0);
    let zone = bench.layout.zone_frames();
    let ends = [zone.start(), Gfn(zone.end().0 - 1)];
    assert!(ends.iter().all(|frame| bench.in_direct_map(*frame)));
}

/// Checks and frees an allocation; its pages.
fn free<P: Platform>(bench: &Bench<'_, '_, P>, slot: u64, handle: u64) -> u64 {
    let Bench { allocator, platform, .. } = *bench;
    let tag = platform.load(scratch(2 * slot + 1));
    platform.store(scratch(2 * slot), 0);
    if let Ok(pages) = MappedPages::from_raw(allocator, handle) {
        let pinned = pages.pin();
        for page in 0..pinned.frames().count() {
            assert_eq!(platform.load(pinned.va().wrapping_add(4096 * page)), tag + page);
        }
        return pinned.frames().count();
    }
    let pages = ok(SecretPages::from_raw(allocator, handle));
    let count = pages.frames().count();
    let window = ok(pages.open(0, count, Access::Read));
    for page in 0..count {
        assert_eq!(window.load(4096 * page), Ok(tag + page));
    }
    ok(window.close());
    count
}
