//! Handles: of several CPUs that resolve the same handle at once, one becomes the owner, wherever
//! the mover puts the pages meanwhile.

use super::{MOVABLE, allocator, check, free, spawn};
use crate::handle::Slot;
use crate::meta::Chunk;
use crate::platform::Platform;
use crate::sync::checked::{Op, Slip, plant};
use core::sync::atomic::Ordering::AcqRel;
use lacuna_abi::layout::direct_map;

fn two_resolve_one_handle() {
    check(None, || {
        let (on, _) = allocator(1);
        let slot = Slot::hand_out(&on.map, Chunk { index: 0, order: 0 }, MOVABLE);
        let handle = slot.give_up(&on.map);
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

/// A CPU gives its page up while another, which was told the handle before, makes itself the owner.
fn give_up_against_resolve() {
    check(None, || {
        let (on, machine) = allocator(1);
        let slot = Slot::hand_out(&on.map, Chunk { index: 0, order: 0 }, MOVABLE);
        let handle = slot.handle(&on.map);
        let va = direct_map(on.map.frames(Chunk { index: 0, order: 0 }).start().gpa());
        let next = spawn(1, move || {
            let found = Slot::resolve(&on.map, on.platform, handle, false).is_ok();
            assert!(!found || machine.load(va) == 7, "the last owner's store is not seen");
            found
        });
        machine.store(va, 7);
        assert_eq!(slot.give_up(&on.map), handle);
        let again = Slot::resolve(&on.map, on.platform, handle, false).is_ok();
        assert!(again != next.join().unwrap(), "owners of one page");
    });
}

#[test]
fn who_resolves_a_handle_sees_what_the_last_owner_stored() {
    give_up_against_resolve();
}

#[test]
#[should_panic(expected = "the last owner's store is not seen")]
fn twin_a_handle_that_is_given_relaxed_shows_old_contents() {
    let _planted = plant(Slip::Relaxed(Op::Exchange, 32, AcqRel));
    give_up_against_resolve();
}

/// A CPU resolves a handle while another moves the page, and gives its old place to somebody else.
fn resolve_against_mover() {
    check(Some(4), || {
        let (on, _) = allocator(3);
        let slot = Slot::hand_out(&on.map, Chunk { index: 0, order: 0 }, MOVABLE);
        let handle = slot.give_up(&on.map);
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
