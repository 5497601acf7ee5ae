//! The list of parked allocations: CPUs that park while others take what is parked. Links and orders
//! are relaxed atomics; what orders them is the list's first word.

use super::{allocator, check, spawn};
use crate::meta::Chunk;
use crate::sync::checked::{Op, Slip, plant};
use core::sync::atomic::Ordering::{Acquire, Release};
use std::vec::Vec;

/// Two CPUs park an allocation each, of orders that differ, and take what is there. At the end each
/// was taken once, with its order.
fn park_and_take() {
    check(Some(4), || {
        let (on, _) = allocator(4);
        let chunks = [Chunk { index: 0, order: 1 }, Chunk { index: 3, order: 0 }];
        let turn = move |cpu: usize| {
            on.parked.push(&on.map, chunks[cpu]);
            on.parked.take_all(&on.map).collect::<Vec<_>>()
        };
        let other = spawn(1, move || turn(1));
        let mut taken = turn(0);
        taken.extend(other.join().unwrap());
        taken.extend(on.parked.take_all(&on.map));
        taken.sort_unstable_by_key(|chunk| chunk.index);
        assert_eq!(taken, chunks, "what was parked");
    });
}

#[test]
fn what_cpus_park_is_taken_once() {
    park_and_take();
}

#[test]
#[should_panic(expected = "is not parked")]
fn twin_a_page_that_is_parked_relaxed_is_taken_before_it_says_so() {
    let _planted = plant(Slip::Relaxed(Op::Exchange, 32, Release));
    park_and_take();
}

#[test]
#[should_panic(expected = "is not parked")]
fn twin_pages_that_are_taken_relaxed_do_not_say_so_yet() {
    let _planted = plant(Slip::Relaxed(Op::Swap, 32, Acquire));
    park_and_take();
}

#[test]
#[should_panic(expected = "what was parked")]
fn twin_a_page_that_is_parked_in_two_steps_covers_another() {
    let _planted = plant(Slip::TwoSteps(Op::Exchange, 32));
    park_and_take();
}

#[test]
#[should_panic(expected = "what was parked")]
fn twin_pages_that_are_taken_in_two_steps_are_lost_or_taken_twice() {
    let _planted = plant(Slip::TwoSteps(Op::Swap, 32));
    park_and_take();
}
