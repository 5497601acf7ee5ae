//! Callers with interrupts off: nothing that they ask for waits for another CPU, whatever their
//! request says.

use crate::alloc::{AllocConfig, AllocError, Request};
use crate::platform::InterruptsOff;
use crate::secret::UseError;
use crate::testing::{EAGER, Mock, pages, zero_pages};
use std::vec::Vec;

#[test]
fn a_secret_request_with_interrupts_off_flips_nothing() {
    let mock = Mock::new(16, 2);
    let allocator = mock.allocator();
    let off = InterruptsOff::new(&mock);
    for request in [pages(0), zero_pages(3), pages(10)] {
        assert_eq!(allocator.alloc_secret(request).err(), Some(AllocError::WouldBlock));
    }
    let counters = allocator.counters();
    assert_eq!((counters.alloc_fail_noblock, counters.shootdowns), (3, 0));
    drop(off);
    drop(allocator.alloc_secret(pages(0)).unwrap());
    let _off = InterruptsOff::new(&mock);
    assert!(allocator.alloc_secret(pages(0)).is_ok(), "the pool serves such callers too");
}

#[test]
fn a_mapped_request_with_interrupts_off_brings_nothing_back() {
    let mock = Mock::new(16, 2);
    let allocator = mock.allocator();
    drop((0..4).map(|_| allocator.alloc_secret(pages(10)).unwrap()).collect::<Vec<_>>());
    let off = InterruptsOff::new(&mock);
    assert_eq!(allocator.alloc_mapped(pages(9)).err(), Some(AllocError::NoMemory));
    assert_eq!(allocator.counters().flip_to_mapped, 0);
    drop(off);
    assert!(allocator.alloc_mapped(pages(9)).is_ok());
}

#[test]
fn a_mapped_request_with_interrupts_off_may_use_what_is_kept_for_such_callers() {
    let mock = Mock::new(16, 1);
    mock.stop_recording();
    let allocator = mock.allocator_as(AllocConfig::PLAIN);
    let mut held = Vec::new();
    while let Ok(pages) = allocator.alloc_mapped(pages(4)) {
        held.push(pages);
    }
    let _off = InterruptsOff::new(&mock);
    assert!(allocator.alloc_mapped(pages(4)).is_ok());
}

#[test]
fn background_work_is_left_for_a_caller_that_can_wait() {
    let mock = Mock::new(64, 2);
    mock.stop_recording();
    let config = AllocConfig { pool_low: 512, pool_high: 4 * 512, ..EAGER };
    let allocator = mock.allocator_as(config);
    let _held: Vec<_> = (0..5)
        .map(|_| allocator.alloc_secret(Request { zero: true, ..pages(9) }).unwrap())
        .collect();
    let off = InterruptsOff::new(&mock);
    let before = allocator.counters().shootdowns;
    assert_eq!(allocator.balance(), Ok(()));
    assert_eq!(allocator.counters().shootdowns, before);
    drop(off);
    allocator.balance().unwrap();
    assert!(allocator.counters().shootdowns > before, "it was not forgotten");
}

#[test]
fn nothing_is_brought_back_with_interrupts_off() {
    let mock = Mock::new(16, 2);
    let allocator = mock.allocator();
    drop(allocator.alloc_secret(pages(10)).unwrap());
    let off = InterruptsOff::new(&mock);
    assert_eq!(allocator.shrink(), Err(UseError::WouldBlock));
    assert_eq!(allocator.counters().flip_to_mapped, 0);
    drop(off);
    allocator.shrink().unwrap();
    assert_eq!(allocator.counters().flip_to_mapped, 2);
}
