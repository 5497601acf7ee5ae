//! Handles: of several CPUs that resolve the same handle at once, one becomes the owner.

use super::{MOVABLE, allocator, check, spawn};
use crate::handle::Slot;
use crate::meta::Chunk;
use crate::sync::checked::{Op, Slip, plant};

fn two_resolve_one_handle() {
    check(None, || {
        let (on, _) = allocator(1);
        let slot = Slot::hand_out(&on.map, Chunk { index: 0, order: 0 }, MOVABLE);
        let handle = slot.handle(&on.map);
        let resolve = move || Slot::resolve(&on.map, handle, false).is_ok();
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
