//! The mover against what it must not move: pages that are on their way to their first owner, and
//! pages that another mover is filling.

use super::{MOVABLE, allocator, check, free, spawn};
use crate::alloc::Request;
use crate::freetype::Migratetype;
use crate::handle::Slot;
use crate::meta::{Chunk, State};
use crate::platform::Platform;
use crate::sync::checked::{Op, Slip, plant};
use core::mem::ManuallyDrop;
use core::sync::atomic::Ordering::{Acquire, Release};
use lacuna_abi::layout::direct_map;
use std::boxed::Box;

const PAGE: Request =
    Request { order: 0, migratetype: Migratetype::Movable, zero: true, noblock: true };

/// A CPU takes pages and uses them while another moves whatever lies at the first.
fn owner_against_mover() {
    check(Some(4), || {
        // The first four pages go to the CPU that asks, the last is left for the mover.
        let (on, _) = allocator(9);
        [8, 6, 4, 2, 0].into_iter().for_each(|index| free(on, index));
        let va = |index| direct_map(on.map.frames(Chunk { index, order: 0 }).start().gpa());
        on.platform.store(va(0), 9);
        let mover = spawn(1, move || on.relocate(0));
        // Dropped only if all is well: otherwise the free would fail on top.
        let pages = ManuallyDrop::new(on.alloc_mapped(PAGE).expect("five pages are free"));
        let pinned = pages.pin();
        assert_eq!(on.platform.load(pinned.va()), 0, "a page that was asked for as zero");
        on.platform.store(pinned.va(), 7);
        drop(pinned);
        let moved = mover.join().unwrap();
        let pinned = pages.pin();
        assert_eq!(on.platform.load(pinned.va()), 7, "a store is lost");
        let frame = pinned.frames().start();
        drop(pinned);
        let index = (frame.0 - on.map.zone().start().0) as u32;
        assert!(on.map.page(index).is_head(State::Allocated, 0), "owned, but not allocated");
        assert_eq!(index, if moved { 8 } else { 0 }, "the place");
        drop(ManuallyDrop::into_inner(pages));
    });
}

#[test]
fn a_page_is_moved_only_when_its_owner_knows_it() {
    owner_against_mover();
}

#[test]
#[should_panic(expected = "asked for as zero")]
fn twin_a_page_that_is_handed_out_relaxed_is_moved_too_early() {
    let _planted = plant(Slip::Relaxed(Op::Store, 8, Release));
    owner_against_mover();
}

#[test]
#[should_panic(expected = "asked for as zero")]
fn twin_a_mover_that_does_not_acquire_what_it_finds_moves_it_too_early() {
    let _planted = plant(Slip::Relaxed(Op::Load, 8, Acquire));
    owner_against_mover();
}

/// Two CPUs move what lies at the first page and what lies at the second, where the first one's
/// contents go.
fn mover_against_mover() {
    check(Some(4), || {
        let (on, machine) = allocator(5);
        let slot = Slot::hand_out(&on.map, Chunk { index: 0, order: 0 }, MOVABLE);
        let slot: &Slot = Box::leak(Box::new(slot));
        let va = |index| direct_map(on.map.frames(Chunk { index, order: 0 }).start().gpa());
        machine.store(va(0), 7);
        free(on, 4);
        free(on, 2);
        let first = spawn(1, move || on.relocate(0));
        on.relocate(2);
        first.join().unwrap();
        let place = slot.chunk(&on.map).index;
        assert!(on.map.page(place).is_head(State::Allocated, 0), "page {place} is not allocated");
        assert_eq!(machine.load(va(place)), 7, "the copy is lost");
        for index in 0..5 {
            assert_eq!(on.map.place_of(on.map.slot_of(index)), index, "two slots lead there");
        }
        let allocated = (0..5).filter(|page| on.map.page(*page).is_head(State::Allocated, 0));
        assert_eq!(allocated.count(), 1, "pages in allocations");
    });
}

#[test]
fn a_page_that_a_mover_fills_is_not_moved_by_another() {
    mover_against_mover();
}

#[test]
#[should_panic(expected = "is not allocated")]
fn twin_a_move_that_begins_in_two_steps_is_not_alone() {
    let _planted = plant(Slip::TwoSteps(Op::Exchange, 32));
    mover_against_mover();
}
