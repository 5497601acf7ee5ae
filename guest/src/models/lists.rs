//! Per-CPU lists: a CPU allocates and frees while another empties its lists into the zone. The
//! lists and the pages' records are relaxed atomics; what orders them is the lists' lock.

use super::{MOVABLE, allocator, check, free, spawn};
use crate::alloc::Request;
use crate::freetype::Migratetype;
use crate::sync::checked::{Op, Slip, plant};
use core::sync::atomic::Ordering::{Acquire, Release};
use std::vec::Vec;

const PAGE: Request =
    Request { order: 0, migratetype: Migratetype::Movable, zero: false, noblock: true };

/// CPU 0 takes a page, which brings the rest along onto its lists, frees it and takes one again,
/// while CPU 1 empties those lists and then takes pages itself. At the end every page is
/// free once.
fn owner_against_drain() {
    check(Some(4), || {
        let (on, _) = allocator(5);
        [0, 2, 4].into_iter().for_each(|index| free(on, index));
        let other = spawn(1, || {
            on.drain(0, 0);
            drop(on.alloc_mapped(PAGE));
        });
        for _ in 0..2 {
            drop(on.alloc_mapped(PAGE));
        }
        other.join().unwrap();
        (0..2).for_each(|cpu| on.drain(cpu, 0));
        let mut free: Vec<u32> = Vec::new();
        while let Some(taken) = on.zone().take_own(&on.map, 0, MOVABLE) {
            free.push(taken);
        }
        free.sort_unstable();
        assert_eq!(free, [0, 2, 4], "pages that are free");
    });
}

#[test]
fn pages_are_neither_lost_nor_doubled_when_another_cpu_empties_the_lists() {
    owner_against_drain();
}

// Where a list and the count of its pages do not agree, a drain does not end.

#[test]
#[should_panic(expected = "maximum number of branches")]
fn twin_a_lock_that_is_let_go_without_release_protects_nothing() {
    let _planted = plant(Slip::Relaxed(Op::Store, 1, Release));
    owner_against_drain();
}

#[test]
#[should_panic(expected = "maximum number of branches")]
fn twin_a_lock_that_is_taken_without_acquire_protects_nothing() {
    let _planted = plant(Slip::Relaxed(Op::Exchange, 1, Acquire));
    owner_against_drain();
}

#[test]
#[should_panic(expected = "maximum number of branches")]
fn twin_a_lock_that_is_taken_in_two_steps_has_two_owners() {
    let _planted = plant(Slip::TwoSteps(Op::Exchange, 1));
    owner_against_drain();
}
