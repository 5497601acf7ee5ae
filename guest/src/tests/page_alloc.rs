//! The page allocator as a whole: what is handed out, from where, and that the counts are exact.

use crate::alloc::{AllocError, PageAllocator, Request};
use crate::counters::Pages;
use crate::freetype::Migratetype;
use crate::mapped::MappedPages;
use crate::meta::Chunk;
use crate::platform::{InterruptsOff, Platform};
use crate::secret::{Access, SecretPages};
use crate::testing::{Mock, Random, pages, zero_pages};
use lacuna_abi::addr::{FrameRange, PAGE_SIZE};
use std::vec::Vec;

/// Checks that the counts add up and that `allocated` pages are in use.
fn check_counts(mock: &Mock, allocator: &PageAllocator<'_, Mock>, allocated: u64) {
    let counters = allocator.counters();
    let free = counters.nr_free_mapped + counters.nr_free_unmapped;
    let zone = mock.layout.zone_frames().count();
    assert_eq!(free + counters.nr_allocated + counters.nr_fresh, zone);
    assert_eq!(counters.nr_allocated, allocated);
    let (pages, fresh) = allocator.pages();
    assert!(pages.iter().all(Pages::adds_up), "{pages:?}");
    assert_eq!(pages.iter().map(|pages| pages.total).sum::<u32>() + fresh, zone as u32);
    allocator.zone().check(&mock.map());
}

/// An allocation of the stress test with the number that its pages hold.
enum Held<'r, 'a> {
    Mapped(MappedPages<'r, 'a, Mock>, u64),
    Secret(SecretPages<'r, 'a, Mock>, u64),
}

impl Held<'_, '_> {
    fn count(&self) -> u64 {
        match self {
            Self::Mapped(pages, _) => pages.frames().count(),
            Self::Secret(pages, _) => pages.frames().count(),
        }
    }

    /// Checks the first word of every page.
    fn check(&self, mock: &Mock) {
        match self {
            Self::Mapped(pages, number) => {
                for page in 0..pages.frames().count() {
                    let found = mock.load(pages.pin().va().wrapping_add(page * PAGE_SIZE));
                    assert_eq!(found, number + page);
                }
            }
            Self::Secret(pages, number) => {
                let count = pages.frames().count();
                let window = pages.open(0, count, Access::Read).unwrap();
                for page in 0..count {
                    assert_eq!(window.load(page * PAGE_SIZE), Ok(number + page));
                }
            }
        }
    }
}

/// Allocates and fills with `number`, after checking what was asked for as zero.
fn stress_alloc<'r, 'a>(
    mock: &Mock,
    allocator: &'r PageAllocator<'a, Mock>,
    request: Request,
    secret: bool,
    number: u64,
) -> Result<Held<'r, 'a>, AllocError> {
    if secret {
        let pages = allocator.alloc_secret(request)?;
        let count = pages.frames().count();
        let window = pages.open(0, count, Access::Write).unwrap();
        for page in 0..count {
            assert!(!request.zero || window.load(page * PAGE_SIZE) == Ok(0));
            window.store(page * PAGE_SIZE, number + page).unwrap();
        }
        window.close().unwrap();
        return Ok(Held::Secret(pages, number));
    }
    let pages = allocator.alloc_mapped(request)?;
    for page in 0..pages.frames().count() {
        let va = pages.pin().va().wrapping_add(page * PAGE_SIZE);
        assert!(!request.zero || mock.load(va) == 0);
        mock.store(va, number + page);
    }
    Ok(Held::Mapped(pages, number))
}

#[test]
fn random_requests_that_make_memory_short_are_counted_to_the_page() {
    let mock = Mock::new(16, 2);
    mock.stop_recording();
    let allocator = mock.allocator();
    let mut random = Random(0x1ac);
    let mut held = Vec::new();
    let mut allocated = 0;
    let mut failed = 0;
    for op in 0..100_000_u64 {
        mock.on_cpu((op % 2) as usize);
        // Grows until memory is short, shrinks until it is plentiful.
        // Each time it wants the other side of the direct map.
        let secret = if op / 16_000 % 2 == 0 { 9 } else { 1 };
        let more = if op / 8000 % 2 == 0 { 7 } else { 1 };
        if !held.is_empty() && random.below(10) >= more {
            let victim: Held<'_, '_> = held.swap_remove(random.below(held.len() as u64) as usize);
            victim.check(&mock);
            allocated -= victim.count();
        } else {
            let request = Request {
                order: random.below(4) as u8,
                migratetype: Migratetype::ALL[random.below(3) as usize],
                zero: random.below(2) == 0,
                noblock: random.below(8) == 0,
            };
            let secret = random.below(10) < secret;
            match stress_alloc(&mock, &allocator, request, secret, op << 8) {
                Ok(pages) => {
                    allocated += pages.count();
                    held.push(pages);
                }
                Err(AllocError::NoMemory | AllocError::NoBlock | AllocError::WouldBlock) => {
                    failed += 1;
                }
                Err(error) => panic!("{error:?}"),
            }
        }
        if op % 1000 == 0 {
            check_counts(&mock, &allocator, allocated);
        }
    }
    let counters = allocator.counters();
    assert!(failed > 100 && counters.alloc > 40_000, "{failed} of {counters:?}");
    assert!(counters.flip_to_mapped > 0 && counters.window_flushes > 0, "{counters:?}");
    let misses = counters.alloc_fail + counters.alloc_fail_noblock + counters.alloc_fail_no_block;
    assert_eq!(misses, failed);
    held.iter().for_each(|pages| pages.check(&mock));
    drop(held);
    check_counts(&mock, &allocator, 0);
    allocator.shrink().unwrap();
    let counters = allocator.counters();
    assert_eq!((counters.nr_free_unmapped, counters.alloc), (0, counters.free));
    assert_eq!(counters.flip_to_mapped, counters.flip_to_unmapped);
    assert!(mock.in_direct_map(mock.layout.zone_frames()));
}

#[test]
fn memory_enters_the_lists_when_it_is_needed() {
    let mock = Mock::new(22, 1);
    let allocator = mock.allocator();
    let zone = mock.layout.zone_frames().count();
    assert_eq!(allocator.counters().nr_fresh, zone);
    let one = allocator.alloc_mapped(pages(0)).unwrap();
    assert_eq!(allocator.counters().nr_fresh, zone - 1024);
    let more: Vec<_> = (0..4).map(|_| allocator.alloc_mapped(pages(10)).unwrap()).collect();
    assert_eq!(allocator.counters().nr_fresh, 512, "the tail is half a chunk");
    assert_eq!(allocator.alloc_mapped(pages(10)).err(), Some(AllocError::NoMemory));
    let tail: Vec<_> = (0..2).map(|_| allocator.alloc_mapped(pages(9)).unwrap()).collect();
    assert_eq!(allocator.counters().nr_fresh, 0);
    assert_eq!(allocator.alloc_mapped(pages(9)).err(), Some(AllocError::NoMemory));
    drop((one, more, tail));
    check_counts(&mock, &allocator, 0);
}

#[test]
fn a_zone_can_be_handed_out_to_the_last_page() {
    let mock = Mock::new(16, 1);
    mock.stop_recording();
    let allocator = mock.allocator();
    let zone = mock.layout.zone_frames().count();
    let all: Vec<_> = (0..zone).map(|_| allocator.alloc_mapped(pages(0)).unwrap()).collect();
    assert_eq!(allocator.alloc_mapped(pages(0)).err(), Some(AllocError::NoMemory));
    let mut frames: Vec<_> = all.iter().map(|page| page.frames().start().0).collect();
    frames.sort_unstable();
    frames.dedup();
    assert_eq!(frames.len() as u64, zone, "no page was handed out twice");
    drop(all);
    check_counts(&mock, &allocator, 0);
    let whole: Vec<_> = (0..4).map(|_| allocator.alloc_mapped(pages(10)).unwrap()).collect();
    assert_eq!(whole.len() as u64 * 1024, zone, "all of it merged again");
}

#[test]
fn pageblocks_that_suit_are_claimed_and_of_others_the_smallest_chunk_is_stolen() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let of = |migratetype, order| Request { migratetype, ..pages(order) };
    let kind = |frames: FrameRange| {
        mock.map().part(FrameRange::single(frames.start())).0.freetype().migratetype
    };
    // Orders without lists of their own, so that each request reaches the zone.
    let first = allocator.alloc_mapped(of(Migratetype::Unmovable, 4)).unwrap();
    assert_eq!(kind(first.frames()), Migratetype::Unmovable);
    assert_eq!(allocator.counters().alloc_fallback, 1, "fresh memory is movable");
    let second = allocator.alloc_mapped(of(Migratetype::Unmovable, 4)).unwrap();
    assert_eq!(allocator.counters().alloc_fallback, 1, "the rest of the chunk went along");

    // Everything that is whole goes, so that only the rest of the unmovable block is left.
    let large: Vec<_> =
        (0..3).map(|_| allocator.alloc_mapped(of(Migratetype::Movable, 10)).unwrap()).collect();
    let half = allocator.alloc_mapped(of(Migratetype::Unmovable, 9)).unwrap();
    // Most of the block is free: from a large chunk a movable request claims it.
    let claimed = allocator.alloc_mapped(of(Migratetype::Movable, 8)).unwrap();
    assert_eq!(kind(claimed.frames()), Migratetype::Movable);
    assert_eq!(kind(first.frames()), Migratetype::Movable, "the same block");
    // Now most of it is in use, by movable pages: another migratetype takes the smallest chunk.
    let used = allocator.alloc_mapped(of(Migratetype::Movable, 7)).unwrap();
    let stolen = allocator.alloc_mapped(of(Migratetype::Reclaimable, 4)).unwrap();
    assert_eq!(kind(stolen.frames()), Migratetype::Movable, "the block stays what it is");
    assert_eq!(stolen.frames().start().0 % 512, 32, "behind the two of order 4");
    check_counts(&mock, &allocator, 16 + 16 + 3072 + 512 + 256 + 128 + 16);
    drop((first, second, large, half, claimed, used, stolen));
    check_counts(&mock, &allocator, 0);
}

#[test]
fn fresh_memory_is_used_before_pageblocks_are_mixed() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let of = |migratetype| Request { migratetype, ..pages(0) };
    let _movable = allocator.alloc_mapped(of(Migratetype::Movable)).unwrap();
    // Both pageblocks of the first chunk are in use now, so that only less could be stolen.
    let _half = allocator.alloc_mapped(Request { order: 9, ..of(Migratetype::Movable) }).unwrap();
    let unmovable = allocator.alloc_mapped(of(Migratetype::Unmovable)).unwrap();
    assert_eq!(unmovable.frames().start().0 - mock.layout.zone_frames().start().0, 1024);
}

#[test]
fn orders_above_ten_are_refused() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    for order in [11, 64, 255] {
        assert_eq!(allocator.alloc_mapped(pages(order)).err(), Some(AllocError::BadOrder));
        assert_eq!(allocator.alloc_secret(pages(order)).err(), Some(AllocError::BadOrder));
    }
    assert_eq!(mock.seen(), []);
}

#[test]
fn mapped_pages_asked_for_as_zero_are_zero() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let dirty = allocator.alloc_mapped(pages(3)).unwrap();
    assert_ne!(mock.load(dirty.pin().va()), 0, "the test machine's memory is dirty");
    let zero = allocator.alloc_mapped(zero_pages(3)).unwrap();
    assert!((0..8).all(|page| mock.load(zero.pin().va().wrapping_add(page * PAGE_SIZE + 8)) == 0));
    assert_eq!(allocator.counters().zeroed_mapped, 8);
}

#[test]
fn a_caller_that_must_not_block_never_flips() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let noblock = Request { noblock: true, ..zero_pages(0) };
    // The test machine panics at a shootdown with interrupts off.
    let off = InterruptsOff::new(&mock);
    assert_eq!(allocator.alloc_secret(noblock).err(), Some(AllocError::WouldBlock));
    assert_eq!(allocator.counters().alloc_fail_noblock, 1);
    drop(off);
    drop(allocator.alloc_secret(pages(0)).unwrap());
    mock.seen();
    let off = InterruptsOff::new(&mock);
    let secret = allocator.alloc_secret(noblock).unwrap();
    drop(secret);
    drop(off);
    assert_eq!(allocator.counters().flip_to_unmapped, 1);
}

#[test]
fn a_mapped_request_that_must_not_block_takes_nothing_from_the_pool() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let secret: Vec<_> = (0..4).map(|_| allocator.alloc_secret(pages(10)).unwrap()).collect();
    drop(secret);
    let noblock = Request { noblock: true, ..pages(0) };
    assert_eq!(allocator.alloc_mapped(noblock).err(), Some(AllocError::NoMemory));
    assert_eq!(allocator.counters().flip_to_mapped, 0);
    assert!(allocator.alloc_mapped(pages(0)).is_ok());
}

#[test]
#[should_panic(expected = "a shootdown with interrupts off, or a lock held")]
fn the_test_machine_notices_a_shootdown_under_the_zone_lock() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let _zone = allocator.zone();
    mock.shootdown(lacuna_abi::event::Flush::Everything, crate::platform::CpuSet::only(0));
}

#[test]
#[should_panic(expected = "is freed, but not allocated so")]
fn a_double_free_is_noticed() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let mapped = allocator.alloc_mapped(pages(0)).unwrap();
    let index = (mapped.frames().start().0 - mock.layout.zone_frames().start().0) as u32;
    drop(mapped);
    allocator.retire(Chunk { index, order: 0 });
}

#[test]
#[should_panic(expected = "is freed, but not allocated so")]
fn a_free_of_the_wrong_order_is_noticed() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let mapped = allocator.alloc_mapped(pages(3)).unwrap();
    let index = (mapped.frames().start().0 - mock.layout.zone_frames().start().0) as u32;
    core::mem::forget(mapped);
    allocator.retire(Chunk { index, order: 2 });
}
