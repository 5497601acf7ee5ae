//! Pins against the mover: what an owner stores while it pins is where the slot leads afterwards,
//! and an owner that pins after a move finds what was copied.

use super::{MOVABLE, Machine, allocator, check, free, spawn};
use crate::alloc::PageAllocator;
use crate::handle::{Pin, Slot};
use crate::meta::{Chunk, MemMap};
use crate::platform::Platform;
use crate::sync::checked::{Op, Slip, plant};
use core::sync::atomic::Ordering::{Acquire, Release};
use lacuna_abi::layout::direct_map;
use std::boxed::Box;

/// How an owner pins.
type Take = fn(&Slot, &MemMap<'static>, &Machine) -> Pin<'static>;

/// Adds one to the word of the allocation.
fn bump(on: &'static PageAllocator<'static, Machine>, slot: &Slot, take: Take) {
    let pin = take(slot, &on.map, on.platform);
    let va = direct_map(on.map.frames(pin.chunk()).start().gpa());
    on.platform.store(va, on.platform.load(va) + 1);
}

/// An owner pins twice while another CPU moves the page away, and on from there.
fn owner_against_mover(take: Take) {
    check(Some(4), move || {
        let (on, machine) = allocator(5);
        let slot = Slot::hand_out(&on.map, Chunk { index: 0, order: 0 }, MOVABLE);
        let slot: &Slot = Box::leak(Box::new(slot));
        free(on, 4);
        free(on, 2);
        let mover = spawn(1, move || (on.relocate(0), on.relocate(2)));
        bump(on, slot, take);
        bump(on, slot, take);
        let wanted = match mover.join().unwrap() {
            (false, _) => 0,
            (true, false) => 2,
            (true, true) => 4,
        };
        assert_eq!(slot.chunk(&on.map).index, wanted, "the slot leads elsewhere");
        let va = direct_map(on.map.frames(slot.chunk(&on.map)).start().gpa());
        assert_eq!(machine.load(va), 2, "a store is lost, or was made to the old place");
    });
}

const PINNED: Take = |slot, map, machine| slot.pin(map, machine);

#[test]
fn what_a_pinned_owner_stores_is_not_left_behind() {
    owner_against_mover(PINNED);
}

/// Each twin leaves one of the orderings out.
fn twin(slip: Slip) {
    let _planted = plant(slip);
    owner_against_mover(PINNED);
}

#[test]
#[should_panic(expected = "a store is lost")]
fn twin_a_relaxed_unpin_loses_stores() {
    twin(Slip::Relaxed(Op::Sub, 32, Release));
}

#[test]
#[should_panic(expected = "a store is lost")]
fn twin_a_relaxed_begin_of_a_move_loses_stores() {
    twin(Slip::Relaxed(Op::Exchange, 32, Acquire));
}

#[test]
#[should_panic(expected = "a store is lost")]
fn twin_a_relaxed_pin_trusts_the_old_place() {
    twin(Slip::Relaxed(Op::Update, 32, Acquire));
}

#[test]
#[should_panic(expected = "a store is lost")]
fn twin_a_relaxed_end_of_a_move_hides_the_new_place() {
    twin(Slip::Relaxed(Op::Store, 32, Release));
}

#[test]
#[should_panic(expected = "a store is lost")]
fn twin_a_pin_in_two_steps_is_none() {
    twin(Slip::TwoSteps(Op::Update, 32));
}

#[test]
#[should_panic(expected = "a store is lost")]
fn twin_without_a_second_look_the_old_place_is_pinned() {
    owner_against_mover(|slot, map, machine| {
        loop {
            if let Some(pin) = Pin::of(map, slot.chunk(map)) {
                return pin;
            }
            machine.relax();
        }
    });
}
