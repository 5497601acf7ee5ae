//! Handles: of several CPUs that resolve the same handle at once, one becomes the owner, wherever
//! the mover puts the pages meanwhile.

use super::{MOVABLE, allocator, check, free, spawn};
use crate::handle::Slot;
use crate::meta::Chunk;
use crate::sync::checked::{Op, Slip, plant};

fn two_resolve_one_handle() {
    check(None, || {
        let (on, _) = allocator(1);
        let slot = Slot::hand_out(&on.map, Chunk { index: 0, order: 0 }, MOVABLE);
        let handle = slot.handle(&on.map);
        let resolve = move || Slot::resolve(&on.map, on.platform, handle, false).is_ok();
        let other = spawn(1, resolve);
        let owners = [resolve(), other.join().unwrap()];
        assert_eq!(owners.iter().filter(|owner| **owner).count(), 1, "owners of one page");
        assert!(!resolve(), "the handle was used");
    });
}

#[test]
fn a_handle_that_two_cpus_resolve_makes_one_owner() {
    two_resolve_one_handle();
}

#[test]
#[should_panic(expected = "owners of one page")]
fn twin_a_generation_that_is_left_in_two_steps_makes_two() {
    let _planted = plant(Slip::TwoSteps(Op::Exchange, 32));
    two_resolve_one_handle();
}

/// A CPU resolves a handle while another moves the page, and gives its old place to somebody else.
fn resolve_against_mover() {
    check(Some(4), || {
        let (on, _) = allocator(3);
        let slot = Slot::hand_out(&on.map, Chunk { index: 0, order: 0 }, MOVABLE);
        let handle = slot.handle(&on.map);
        free(on, 2);
        let mover = spawn(1, move || on.relocate(0));
        let found = Slot::resolve(&on.map, on.platform, handle, false);
        assert!(found.is_ok(), "a handle leads nowhere");
        mover.join().unwrap();
    });
}

#[test]
fn a_handle_leads_to_a_page_while_it_is_moved() {
    resolve_against_mover();
}

#[test]
#[should_panic(expected = "a handle leads nowhere")]
fn twin_a_pin_in_two_steps_lets_the_page_move_away() {
    let _planted = plant(Slip::TwoSteps(Op::Update, 32));
    resolve_against_mover();
}
