//! What a refusal of the host leaves behind: nothing lost, nothing half done, and nothing handed
//! out that the host would not close.

use super::flip::{frames, steps};
use crate::alloc::AllocError;
use crate::error::FirstFailure;
use crate::secret::{Access, UseError};
use crate::testing::{Mock, pages, zero_pages};
use lacuna_abi::gate::Status;
use std::vec::Vec;

/// The refusal that [`Mock::refuse`] makes.
fn refused<T>(result: Result<T, AllocError>) -> bool {
    matches!(result.err(), Some(AllocError::Gate(error)) if error.status == Status::BadState)
}

#[test]
fn a_refused_seal_leaves_the_block_mapped_and_free() {
    for prezero in [true, false] {
        let mock = Mock::new(16, 1);
        let allocator = mock.allocator_with(prezero);
        mock.refuse(0);
        assert!(refused(allocator.alloc_secret(pages(0))));
        assert!(mock.in_direct_map(mock.layout.zone_frames()));
        let counters = allocator.counters();
        assert_eq!((counters.nr_allocated, counters.nr_free_unmapped), (0, 0));
        assert_eq!((counters.nr_free_mapped, counters.flip_to_unmapped), (1024, 0));
        allocator.zone().check(&mock.map());
        assert!(allocator.alloc_secret(pages(0)).is_ok(), "nothing was lost");
    }
}

#[test]
fn a_refused_open_leaves_the_block_in_the_pool_not_known_to_be_zero() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    mock.refuse(1);
    assert!(refused(allocator.alloc_secret(pages(0))));
    assert_eq!(steps(&mock.seen()), ["remove", "flush everything", "seal", "pooled"]);
    assert_eq!(allocator.counters().nr_free_unmapped, 512);
    let secret = allocator.alloc_secret(zero_pages(0)).unwrap();
    assert!(mock.state().frame(secret.frames().start()).contents.is_zero());
}

#[test]
fn a_block_that_cannot_be_closed_is_withheld() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    mock.refuse(2);
    assert!(refused(allocator.alloc_secret(pages(0))));
    let counters = allocator.counters();
    assert_eq!((counters.nr_allocated, counters.nr_free_unmapped), (512, 0));
    let secret = allocator.alloc_secret(pages(0)).unwrap();
    assert_ne!(secret.frames().start().block_start(), frames(&mock, 0, 1).start());
    allocator.zone().check(&mock.map());
}

#[test]
fn a_refused_scrub_does_not_keep_a_secret_request_from_a_flip() {
    for nth in [0, 1] {
        let mock = Mock::new(16, 1);
        let allocator = mock.allocator();
        let page = allocator.alloc_secret(pages(0)).unwrap();
        page.open(0, 1, Access::Write).unwrap().store(0, 1).unwrap();
        drop(page);
        mock.refuse(nth);
        assert!(allocator.alloc_secret(pages(9)).is_ok(), "operation {nth}");
        assert!(mock.state().refuse.is_none(), "nothing was refused");
        assert_eq!(allocator.counters().nr_withheld, nth as u64);
        allocator.zone().check(&mock.map());
    }
}

#[test]
fn a_refused_scrub_does_not_keep_a_mapped_request_from_other_blocks() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let mut held: Vec<_> = (0..7).map(|_| allocator.alloc_secret(pages(9)).unwrap()).collect();
    let page = allocator.alloc_secret(pages(0)).unwrap();
    page.open(0, 1, Access::Write).unwrap().store(0, 1).unwrap();
    drop((page, held.pop()));
    mock.refuse(0);
    assert!(allocator.alloc_mapped(pages(3)).is_ok());
    assert!(mock.state().refuse.is_none(), "nothing was refused");
    allocator.zone().check(&mock.map());
}

/// Secret pageblocks of which every other one is free.
fn every_other<'r, 'a>(
    allocator: &'r crate::alloc::PageAllocator<'a, Mock>,
) -> Vec<crate::secret::SecretPages<'r, 'a, Mock>> {
    let mut held: Vec<_> =
        core::iter::from_fn(|| allocator.alloc_secret(zero_pages(9)).ok()).collect();
    held.sort_by_key(|pages| pages.frames().start());
    let mut even = true;
    held.retain(|_| {
        even = !even;
        even
    });
    held
}

#[test]
fn a_refused_release_does_not_keep_a_mapped_request_from_other_blocks() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let _held = every_other(&allocator);
    mock.refuse(0);
    assert!(allocator.alloc_mapped(pages(0)).is_ok());
    assert!(mock.state().refuse.is_none(), "nothing was refused");
    allocator.zone().check(&mock.map());
}

#[test]
fn a_request_that_nothing_serves_names_the_first_refusal() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let mut held: Vec<_> = (0..8).map(|_| allocator.alloc_secret(zero_pages(9)).unwrap()).collect();
    drop(held.pop());
    let page = allocator.alloc_secret(pages(0)).unwrap();
    let _rest = allocator.alloc_secret(pages(8)).unwrap();
    page.open(0, 1, Access::Write).unwrap().store(0, 1).unwrap();
    drop(page);
    mock.refuse(0);
    assert!(refused(allocator.alloc_mapped(pages(0))));
    assert_eq!(allocator.alloc_mapped(pages(0)).err(), Some(AllocError::NoMemory));
}

#[test]
fn what_the_host_refuses_of_one_does_not_keep_others_from_coming_back() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let converted = super::convert::secret(allocator.alloc_mapped(pages(0)).unwrap());
    let block = allocator.alloc_secret(zero_pages(9)).unwrap();
    let off = crate::platform::InterruptsOff::new(&mock);
    drop((converted, block));
    drop(off);
    // The converted page stays parked.
    mock.refuse(0);
    assert!(matches!(allocator.shrink(), Err(UseError::Gate(_))));
    let counters = allocator.counters();
    assert_eq!((counters.nr_allocated, counters.flip_to_mapped), (1, 1));
    allocator.shrink().unwrap();

    // One of four pageblocks cannot be scrubbed at first; it is tried once more after the others.
    let held = every_other(&allocator);
    let all = mock.layout.zone_frames();
    mock.map().set_known(all, false);
    mock.refuse(0);
    assert!(matches!(allocator.shrink(), Err(UseError::Gate(_))));
    assert_eq!(allocator.counters().flip_to_mapped, 5);
    drop(held);
}

#[test]
fn a_refused_release_leaves_the_blocks_in_the_pool() {
    let mock = Mock::new(32, 1);
    let allocator = mock.allocator();
    let mut secret: Vec<_> = (0..6).map(|_| allocator.alloc_secret(pages(9)).unwrap()).collect();
    secret.sort_by_key(|pages| pages.frames().start());
    let mut even = true;
    secret.retain(|_| {
        even = !even;
        even
    });
    // The three free blocks are zero, so that their releases are the only operations.
    mock.refuse(1);
    let mut failure = FirstFailure::default();
    allocator.drain_all().unwrap();
    assert!(allocator.reclaim_batch(&mut failure));
    assert!(matches!(failure.result(), Err(UseError::Gate(error)) if error.index == 1));
    let counters = allocator.counters();
    assert_eq!((counters.flip_to_mapped, counters.nr_free_unmapped), (2, 512), "only that one");
    allocator.zone().check(&mock.map());
    mock.refuse(0);
    assert!(matches!(allocator.shrink(), Err(UseError::Gate(_))));
    assert_eq!(allocator.counters().nr_free_unmapped, 512);
    allocator.shrink().unwrap();
    assert_eq!(allocator.counters().nr_free_unmapped, 0);
}

#[test]
fn a_refused_scrub_leaves_the_block_in_the_pool_or_withholds_what_is_open() {
    for (nth, pooled) in [(0, 512), (1, 0)] {
        let mock = Mock::new(16, 1);
        let allocator = mock.allocator_with(false);
        drop(allocator.alloc_secret(pages(0)).unwrap());
        allocator.drain_all().unwrap();
        mock.refuse(nth);
        assert!(allocator.shrink().is_err());
        assert!(!mock.in_direct_map(frames(&mock, 0, 512)));
        assert_eq!(allocator.counters().nr_free_unmapped, pooled);
        assert_eq!(allocator.counters().nr_allocated, 512 - pooled);
        allocator.zone().check(&mock.map());
    }
}

#[test]
fn a_refusal_at_hand_out_puts_the_pages_back_or_withholds_them() {
    for (nth, free) in [(0, 512), (1, 511)] {
        let mock = Mock::new(16, 1);
        let allocator = mock.allocator_with(false);
        drop(allocator.alloc_secret(pages(9)).unwrap());
        mock.map().set_known(frames(&mock, 0, 512), false);
        mock.refuse(nth);
        assert!(refused(allocator.alloc_secret(zero_pages(0))));
        assert_eq!(allocator.counters().nr_free_unmapped, free);
        allocator.zone().check(&mock.map());
    }
}

#[test]
fn a_refusal_at_a_free_keeps_the_page_unknown_or_withholds_it() {
    for (nth, free) in [(0, 512), (1, 511)] {
        let mock = Mock::new(16, 1);
        let allocator = mock.allocator();
        let secret = allocator.alloc_secret(pages(0)).unwrap();
        let page = secret.frames();
        let window = secret.open(0, 1, Access::Write).unwrap();
        window.store(0, 1).unwrap();
        window.close().unwrap();
        drop(secret);
        mock.refuse(nth);
        assert!(allocator.drain_all().is_err());
        assert_eq!(allocator.counters().nr_free_unmapped, free);
        assert_eq!(mock.map().is_known(page), nth == 1);
        allocator.zone().check(&mock.map());
    }
}

#[test]
fn pages_whose_window_could_not_be_closed_are_withheld_when_they_are_freed() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let secret = allocator.alloc_secret(pages(0)).unwrap();
    let window = secret.open(0, 1, Access::Read).unwrap();
    mock.refuse(0);
    assert!(matches!(window.close(), Err(UseError::Unsealed(_))));
    drop(secret);
    assert_eq!(allocator.counters().nr_allocated, 1);
    let reported = mock.violations();
    assert!(reported[0].starts_with("second-stage-open"), "it was freed while open: {reported:?}");
}
