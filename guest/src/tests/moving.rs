//! Handles that are resolved at use, and the mover.

use crate::alloc::{AllocConfig, AllocError, PageAllocator, Request};
use crate::contents::OnFree;
use crate::counters::Pages;
use crate::freetype::Migratetype;
use crate::mapped::MappedPages;
use crate::platform::Platform;
use crate::testing::{EAGER, Mock, pages};
use lacuna_abi::addr::PAGE_SIZE;
use std::vec::Vec;

const MOVABLE: Request = Request { migratetype: Migratetype::Movable, ..pages(0) };

/// Fills the zone with movable pages and frees all but one in 37: no pageblock is wholly free.
fn scattered<'r, 'a>(
    mock: &Mock,
    allocator: &'r PageAllocator<'a, Mock>,
) -> Vec<(MappedPages<'r, 'a, Mock>, u64)> {
    mock.stop_recording();
    let all: Vec<_> = (0..mock.layout.zone_frames().count())
        .map(|_| allocator.alloc_mapped(MOVABLE).unwrap())
        .collect();
    let (kept, freed): (Vec<_>, Vec<_>) =
        all.into_iter().partition(|page| page.frames().start().0 % 37 == 5);
    drop(freed);
    let tagged = kept.into_iter().zip(1..);
    tagged
        .inspect(|(page, tag)| mock.store(page.pin().va().wrapping_add(PAGE_SIZE - 8), *tag))
        .collect()
}

#[test]
fn movable_pages_make_room_for_a_block_and_keep_their_contents() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let kept = scattered(&mock, &allocator);
    let before: Vec<_> = kept.iter().map(|(page, _)| page.frames()).collect();
    let secret = allocator.alloc_secret(pages(0)).unwrap();
    assert!(!mock.in_direct_map(secret.frames()));
    let counters = allocator.counters();
    assert_eq!(counters.compact_success, 1);
    assert!((1..=14).contains(&counters.pages_moved), "{counters:?}");
    let moved = kept.iter().zip(&before).filter(|((page, _), old)| page.frames() != **old).count();
    assert_eq!(moved as u64, counters.pages_moved);
    for (page, tag) in &kept {
        let pinned = page.pin();
        assert!(mock.in_direct_map(pinned.frames()));
        assert_eq!(mock.load(pinned.va().wrapping_add(PAGE_SIZE - 8)), *tag);
    }
    assert!(allocator.pages().0.iter().all(Pages::adds_up));
    allocator.zone().check(&mock.map());
    drop((kept, secret));
    allocator.shrink().unwrap();
    assert_eq!(allocator.counters().nr_allocated, 0);
    allocator.zone().check(&mock.map());
}

#[test]
fn pinned_pages_stay_and_so_do_unmovable_ones() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let kept = scattered(&mock, &allocator);
    let pins: Vec<_> = kept.iter().map(|(page, _)| page.pin()).collect();
    assert_eq!(allocator.alloc_secret(pages(0)).err(), Some(AllocError::NoBlock));
    let counters = allocator.counters();
    assert_eq!((counters.pages_moved, counters.compact_success), (0, 0));
    assert!(counters.compact_fail > 0);
    assert_eq!(counters.alloc_fail_no_block, 1);
    assert!(allocator.pages().0.iter().all(Pages::adds_up), "what was isolated is back");
    allocator.zone().check(&mock.map());
    drop(pins);
    assert!(allocator.alloc_secret(pages(0)).is_ok());
}

/// One movable page in every pageblock.
fn one_in_each_block<'r, 'a>(
    mock: &Mock,
    allocator: &'r PageAllocator<'a, Mock>,
) -> Vec<MappedPages<'r, 'a, Mock>> {
    mock.stop_recording();
    let all: Vec<_> = (0..mock.layout.zone_frames().count())
        .map(|_| allocator.alloc_mapped(MOVABLE).unwrap())
        .collect();
    let (mut kept, freed): (Vec<_>, Vec<_>) =
        all.into_iter().partition(|page| page.frames().start().0 % 512 == 77);
    drop(freed);
    kept.sort_by_key(|page| page.frames().start());
    kept
}

#[test]
fn a_block_that_cannot_be_emptied_does_not_hide_others_with_as_few_pages() {
    for pinned in [0, 1, 7] {
        let mock = Mock::new(16, 1);
        let allocator = mock.allocator();
        let kept = one_in_each_block(&mock, &allocator);
        assert_eq!(kept.len(), 8);
        let _pins: Vec<_> = kept[..pinned].iter().map(MappedPages::pin).collect();
        assert!(allocator.alloc_secret(pages(0)).is_ok(), "{pinned} blocks cannot be emptied");
        let counters = allocator.counters();
        assert_eq!((counters.compact_success, counters.compact_fail), (1, pinned as u64));
        assert_eq!(counters.pages_moved, 1);
    }
}

#[test]
fn a_block_with_converted_pages_is_not_tried() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let mut kept = one_in_each_block(&mock, &allocator);
    let _converted = super::convert::secret(kept.remove(0));
    assert!(allocator.alloc_secret(pages(0)).is_ok());
    assert_eq!(allocator.counters().compact_fail, 0);
}

#[test]
fn a_handle_leads_to_pages_that_were_moved() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let kept = scattered(&mock, &allocator);
    let handles: Vec<_> = kept.into_iter().map(|(page, tag)| (page.into_raw(), tag)).collect();
    let _secret = allocator.alloc_secret(pages(0)).unwrap();
    assert!(allocator.counters().pages_moved > 0);
    for (handle, tag) in handles {
        let page = MappedPages::from_raw(&allocator, handle).unwrap();
        assert_eq!(mock.load(page.pin().va().wrapping_add(PAGE_SIZE - 8)), tag);
        assert!(MappedPages::from_raw(&allocator, handle).is_err(), "once");
    }
}

#[test]
fn pages_are_moved_under_an_owner_that_pins_and_unpins_all_the_time() {
    let mock = Mock::new(16, 2);
    let allocator = mock.allocator();
    let kept = scattered(&mock, &allocator);
    let done = core::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            mock.on_cpu(1);
            while !done.load(core::sync::atomic::Ordering::Relaxed) {
                for (page, tag) in &kept {
                    let pinned = page.pin();
                    assert_eq!(mock.load(pinned.va().wrapping_add(PAGE_SIZE - 8)), *tag);
                }
            }
        });
        for _ in 0..20 {
            mock.on_cpu(0);
            if let Ok(secret) = allocator.alloc_secret(pages(0)) {
                drop(secret);
            }
            allocator.shrink().unwrap();
        }
        done.store(true, core::sync::atomic::Ordering::Relaxed);
    });
    assert!(allocator.counters().pages_moved > 0);
    assert!(allocator.pages().0.iter().all(Pages::adds_up));
}

#[test]
fn a_write_after_a_free_is_noticed_and_the_page_is_withheld() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator_as(AllocConfig { on_free: OnFree::Poison, ..EAGER });
    let page = allocator.alloc_mapped(pages(0)).unwrap();
    let (va, frame) = (page.pin().va(), page.frames().start());
    drop(page);
    mock.store(va.wrapping_add(0x800), 77);
    let error = allocator.alloc_mapped(pages(0)).err();
    assert_eq!(error, Some(AllocError::Corrupted { frame, found: 77 }));
    let counters = allocator.counters();
    assert_eq!((counters.nr_withheld, counters.nr_allocated), (1, 1));
    let next = allocator.alloc_mapped(pages(0)).unwrap();
    assert_ne!(next.frames().start(), frame);
    assert!(allocator.pages().0.iter().all(Pages::adds_up));
}

#[test]
fn poison_that_nobody_touched_is_checked_and_gone_when_a_block_flips() {
    let mock = Mock::new(16, 1);
    mock.stop_recording();
    let allocator = mock.allocator_as(AllocConfig { on_free: OnFree::Poison, ..EAGER });
    for order in [0, 3, 5, 9, 10] {
        drop(allocator.alloc_mapped(pages(order)).unwrap());
        drop(allocator.alloc_mapped(pages(order)).unwrap());
    }
    assert!(allocator.counters().poison_checked > 1500);
    allocator.drain_all().unwrap();
    let secret: Vec<_> =
        (0..8).map(|_| allocator.alloc_secret(crate::testing::zero_pages(9)).unwrap()).collect();
    let state = mock.state();
    let zero = |frame| state.frame(frame).contents.is_zero();
    assert!(secret.iter().all(|pages| pages.frames().iter().all(zero)));
}

#[test]
fn a_zero_page_that_is_not_zero_is_noticed_when_it_is_looked_at() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator_as(AllocConfig { check_zero: true, ..EAGER });
    let zero = crate::testing::zero_pages(0);
    let page = allocator.alloc_secret(zero).unwrap();
    let frame = page.frames().start();
    assert_eq!(allocator.counters().zero_checked, 1);
    drop(page);
    mock.state().frame_mut(frame).contents = crate::testing::Contents::DIRTY;
    let error = allocator.alloc_secret(zero).err();
    assert!(matches!(error, Some(AllocError::Corrupted { frame: f, .. }) if f == frame));
    assert_eq!(allocator.counters().nr_withheld, 1);
    // The machine's host saw the page in the pool as zero only before it was spoilt.
    assert!(allocator.alloc_secret(zero).is_ok());
}

#[test]
fn pages_zeroed_when_they_were_freed_are_not_zeroed_again() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator_as(AllocConfig { on_free: OnFree::Zero, ..EAGER });
    let page = allocator.alloc_mapped(pages(0)).unwrap();
    let va = page.pin().va();
    mock.store(va, 5);
    drop(page);
    assert_eq!(mock.load(va), 0);
    let zeroed = allocator.counters().zeroed_mapped;
    let again = allocator.alloc_mapped(crate::testing::zero_pages(0)).unwrap();
    assert_eq!(again.pin().va(), va);
    assert_eq!((mock.load(va), allocator.counters().zeroed_mapped), (0, zeroed));
    mock.store(va, 5);
    drop(again);
    // What leaves the mapped side is known no more.
    allocator.drain_all().unwrap();
    let secret = allocator.alloc_secret(crate::testing::zero_pages(9)).unwrap();
    assert_eq!(allocator.counters().zeroed_flip, 512);
    drop(secret);
}

#[test]
fn without_scrubbing_pages_are_zeroed_when_they_are_handed_out_as_zero() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator_as(AllocConfig { prezero: false, scrub: false, ..EAGER });
    for round in 1..=2 {
        let page = allocator.alloc_secret(crate::testing::zero_pages(0)).unwrap();
        let window = page.open(0, 1, crate::secret::Access::Write).unwrap();
        assert_eq!(window.load(0), Ok(0));
        window.store(0, 5).unwrap();
        window.close().unwrap();
        assert_eq!(allocator.counters().zeroed_alloc, round);
    }
    allocator.shrink().unwrap();
    assert!(mock.state().frames.iter().all(|frame| !frame.secret), "released, so scrubbed before");
}
