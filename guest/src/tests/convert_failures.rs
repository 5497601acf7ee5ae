//! Converting in place when something is refused or missing: nothing is lost, nothing is left
//! behind, and what cannot be given back now is given back later.

use super::convert::secret;
use super::flip::{frames, steps};
use crate::alloc::PageAllocator;
use crate::convert::ConvertError;
use crate::handle::BadHandle;
use crate::mermap::Protection;
use crate::meta::State;
use crate::platform::{InterruptsOff, Platform};
use crate::secret::{Access, SecretPages, UseError};
use crate::testing::{Mock, pages};
use lacuna_abi::gate::Status;
use std::vec::Vec;

/// Everything is as before anything was converted.
fn check_nothing_left(mock: &Mock, allocator: &PageAllocator<'_, Mock>) {
    let counters = allocator.counters();
    assert_eq!((counters.splits, counters.nr_table_pages), (counters.merges, 0));
    assert_eq!((counters.nr_allocated, mock.state().live_tables()), (0, 0));
    assert!(mock.in_direct_map(mock.layout.zone_frames()));
    allocator.zone().check(&mock.map());
}

#[test]
fn without_a_table_pages_stay_as_they_are() {
    let mock = Mock::new(16, 1);
    let config = crate::testing::EAGER;
    let allocator = PageAllocator::new(&mock, &mock.layout, mock.map(), config);
    allocator.prepare().unwrap();
    let mapped = allocator.alloc_mapped(pages(3)).unwrap();
    mock.store(mapped.pin().va(), 77);
    let (frames, handle) = (mapped.frames(), mapped.handle());
    mock.seen();
    let Err((mapped, error)) = mapped.into_secret() else { panic!("there is no table") };
    assert_eq!((error, mock.seen()), (ConvertError::NoTable, Vec::new()));
    assert_eq!(
        (mapped.frames(), mapped.handle(), mock.load(mapped.pin().va())),
        (frames, handle, 77)
    );
    drop(mapped);
    check_nothing_left(&mock, &allocator);
}

#[test]
fn tables_that_come_back_serve_again_however_few_there_are() {
    let mock = Mock::new(16, 1);
    let config = crate::testing::EAGER;
    let allocator = PageAllocator::new(&mock, &mock.layout, mock.map(), config);
    allocator.prepare().unwrap();
    // All but the last page are said to be in use.
    allocator.add_tables(mock.layout.pool.len / 4096 - 1);
    let [first, other] = [8, 8].map(|order| allocator.alloc_mapped(pages(order)).unwrap());
    let _fill = allocator.alloc_mapped(pages(10)).unwrap();
    let elsewhere = allocator.alloc_mapped(pages(8)).unwrap();
    let (first, other) = (secret(first), secret(other));
    let Err((elsewhere, error)) = elsewhere.into_secret() else { panic!("there is one table") };
    assert_eq!(error, ConvertError::NoTable);
    drop((first, other));
    drop(secret(elsewhere));
    assert_eq!(allocator.counters().splits, 2);
}

#[test]
fn a_refused_seal_leaves_the_pages_mapped_with_what_they_hold() {
    for others in [false, true] {
        let mock = Mock::new(16, 2);
        let allocator = mock.allocator();
        let mapped = allocator.alloc_mapped(pages(2)).unwrap();
        let neighbour = allocator.alloc_mapped(pages(0)).unwrap();
        let neighbour = others.then_some(neighbour).map(secret);
        mock.store(mapped.pin().va(), 0xbeef);
        let handle = mapped.handle();
        mock.refuse(0);
        let Err((mapped, error)) = mapped.into_secret() else { panic!("the seal was refused") };
        assert!(matches!(error, ConvertError::Gate(e) if e.status == Status::BadState));
        assert_eq!((mapped.handle(), mock.load(mapped.pin().va())), (handle, 0xbeef));
        assert!(mock.in_direct_map(mapped.frames()));
        assert_eq!(allocator.counters().merges, u64::from(!others));
        drop((mapped, neighbour));
        check_nothing_left(&mock, &allocator);
    }
}

#[test]
fn pages_that_the_host_keeps_are_parked_and_freed_later() {
    // The operations of a free are open, seal and release.
    for nth in [0, 2] {
        let mock = Mock::new(16, 1);
        let allocator = mock.allocator();
        let pages = secret(allocator.alloc_mapped(pages(2)).unwrap());
        let (frames, handle) = (pages.frames(), pages.handle());
        mock.refuse(nth);
        drop(pages);
        assert!(!mock.in_direct_map(frames));
        assert_eq!(allocator.counters().nr_allocated, 4, "neither free nor lost");
        assert_eq!(SecretPages::from_raw(&allocator, handle).err(), Some(BadHandle(handle)));
        mock.refuse(0);
        assert!(matches!(allocator.shrink(), Err(UseError::Gate(_))));
        assert_eq!(allocator.counters().nr_allocated, 4, "parked again");
        allocator.shrink().unwrap();
        check_nothing_left(&mock, &allocator);
        assert_eq!(allocator.counters().free, 1, "they are freed once");
    }
}

#[test]
fn several_parked_allocations_are_all_freed() {
    let mock = Mock::new(16, 2);
    let allocator = mock.allocator();
    let held: Vec<_> = (0..4).map(|o| secret(allocator.alloc_mapped(pages(o)).unwrap())).collect();
    let off = InterruptsOff::new(&mock);
    drop(held);
    drop(off);
    assert_eq!(allocator.counters().nr_allocated, 15);
    // The next one who converts takes them along.
    let next = secret(allocator.alloc_mapped(pages(0)).unwrap());
    assert_eq!(allocator.counters().nr_allocated, 1);
    drop(next);
    check_nothing_left(&mock, &allocator);
}

#[test]
fn with_interrupts_off_nothing_waits_for_other_cpus() {
    let mock = Mock::new(16, 2);
    let allocator = mock.allocator();
    let converted = secret(allocator.alloc_mapped(pages(0)).unwrap());
    let mapped = allocator.alloc_mapped(pages(0)).unwrap();
    mock.seen();
    // The test machine panics at a shootdown with interrupts off.
    let off = InterruptsOff::new(&mock);
    let Err((mapped, error)) = mapped.into_secret() else { panic!("it needs a shootdown") };
    assert_eq!(error, ConvertError::WouldBlock);
    let Err((converted, error)) = converted.into_mapped() else { panic!("it needs a shootdown") };
    assert_eq!(error, ConvertError::WouldBlock);
    drop(converted);
    assert_eq!(steps(&mock.seen()), ["freed"]);
    drop(off);
    allocator.shrink().unwrap();
    drop(mapped);
    check_nothing_left(&mock, &allocator);
}

#[test]
fn parked_pages_serve_a_mapped_request_under_pressure() {
    let mock = Mock::new(16, 2);
    let allocator = mock.allocator();
    let converted = secret(allocator.alloc_mapped(pages(8)).unwrap());
    let _fill: Vec<_> = core::iter::from_fn(|| allocator.alloc_mapped(pages(8)).ok()).collect();
    let off = InterruptsOff::new(&mock);
    drop(converted);
    drop(off);
    assert!(allocator.alloc_mapped(pages(8)).is_ok());
}

#[test]
fn without_a_window_pages_are_parked() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let pages = secret(allocator.alloc_mapped(pages(0)).unwrap());
    let other = frames(&mock, 4000, 1);
    let get = |_| allocator.mermap().get(other, Protection::READ).unwrap();
    let slots: Vec<_> = (0..4).map(get).collect();
    let off = InterruptsOff::new(&mock);
    let reserve = allocator.mermap().get_reserved(other.start(), Protection::READ, off).unwrap();
    drop(pages);
    assert_eq!(allocator.counters().nr_allocated, 1);
    drop((slots, reserve));
    allocator.shrink().unwrap();
    check_nothing_left(&mock, &allocator);
}

#[test]
fn what_the_host_does_not_close_is_withheld() {
    // The host refuses to close after the scrub.
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let secret_pages = secret(allocator.alloc_mapped(pages(0)).unwrap());
    mock.refuse(1);
    let Err((secret_pages, error)) = secret_pages.into_mapped() else {
        panic!("they are left open")
    };
    assert!(matches!(error, ConvertError::Use(UseError::Unsealed(_))));
    let Err((secret_pages, error)) = secret_pages.into_mapped() else {
        panic!("they are still open")
    };
    assert_eq!(error, ConvertError::LeftOpen);
    drop(secret_pages);
    assert_eq!(allocator.counters().nr_allocated, 1);
    assert!(mock.violations()[0].starts_with("second-stage-open"), "it was freed while open");
    allocator.shrink().unwrap();
    assert_eq!((allocator.counters().nr_allocated, allocator.counters().merges), (1, 0));

    // The same after a use.
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let pages = secret(allocator.alloc_mapped(pages(0)).unwrap());
    let window = pages.open(0, 1, Access::Read).unwrap();
    mock.refuse(0);
    assert!(matches!(window.close(), Err(UseError::Unsealed(_))));
    drop(pages);
    assert_eq!(allocator.counters().nr_allocated, 1);
    mock.violations();
}

#[test]
fn a_refused_way_back_leaves_the_owner_with_secret_pages() {
    for nth in [0, 2] {
        let mock = Mock::new(16, 1);
        let allocator = mock.allocator();
        let pages = secret(allocator.alloc_mapped(pages(1)).unwrap());
        mock.refuse(nth);
        let Err((pages, error)) = pages.into_mapped() else { panic!("it was refused") };
        assert!(matches!(error, ConvertError::Use(UseError::Gate(_))));
        let window = pages.open(0, 2, Access::Write).unwrap();
        window.store(0, 1).unwrap();
        window.close().unwrap();
        assert!(pages.into_mapped().is_ok());
        check_nothing_left(&mock, &allocator);
    }
}

#[test]
fn parked_pages_have_no_handle_while_they_are_tried_again() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let pages = secret(allocator.alloc_mapped(pages(2)).unwrap());
    let (handle, start) = (pages.handle(), pages.frames().start());
    let off = InterruptsOff::new(&mock);
    drop(pages);
    drop(off);
    // As `restore_parked` does, which another CPU may look at.
    let index = (start.0 - mock.layout.zone_frames().start().0) as u32;
    mock.map().page(index).set_head(State::Allocated, 2);
    for stale in [handle, handle - (1 << 32), handle + (1 << 32)] {
        assert_eq!(SecretPages::from_raw(&allocator, stale).err(), Some(BadHandle(stale)));
    }
    mock.map().page(index).set_head(State::Parked, 2);
    allocator.shrink().unwrap();
    check_nothing_left(&mock, &allocator);
}
