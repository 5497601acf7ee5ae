//! A history without a slip is fine, and each slip is seen.

use super::*;
use crate::testing::step::Use;
use crate::testing::{Contents, zero_pages};

/// What a history says of a slip that `spoil` makes after it took mapped and secret pages.
fn spoilt(spoil: impl Fn(&mut History<'_, '_>)) {
    with(Setup::new(2, [true, false, false, false, false]), |history| {
        let alloc = |secret| Turn { cpu: 0, step: Step::Alloc(zero_pages(1), secret) };
        history.turns(&mut [alloc(false), alloc(true)].into_iter(), 2, 0);
        spoil(history);
        history.check();
    });
}

/// A second owner of the first allocation, as if that one had been given up.
fn second_owner<'r, 'a>(history: &History<'r, 'a>) -> MappedPages<'r, 'a, Mock> {
    let handle = history.held[0].owner.handle();
    let slot = (handle & 0xffff_ffff) as u32 - 1;
    let record = history.allocator.map.page(slot);
    assert!(record.next_generation(record.generation()));
    MappedPages::from_raw(history.allocator, handle).unwrap()
}

#[test]
fn a_history_without_a_slip_is_fine() {
    spoilt(|_| ());
}

#[test]
#[should_panic(expected = "what page 1 holds at 0x0")]
fn twin_contents_that_changed_are_seen() {
    spoilt(|history| {
        let frame = history.held[0].owner.frames().start().wrapping_add(1);
        history.mock.state().frame_mut(frame).contents = Contents::DIRTY;
        let what = Use {
            which: 0,
            first: 0,
            count: 0,
            write: false,
            special: false,
            other: false,
            during: 0,
        };
        history.turns(&mut [Turn { cpu: 1, step: Step::Use(what) }].into_iter(), 1, 0);
    });
}

#[test]
#[should_panic(expected = "allocated pages")]
fn twin_pages_that_are_lost_are_missed() {
    spoilt(|history| {
        let held = history.held.swap_remove(1);
        core::mem::forget(held.owner);
    });
}

#[test]
#[should_panic(expected = "the kind of")]
fn twin_pages_that_are_freed_under_their_owner_are_missed() {
    spoilt(|history| {
        drop(second_owner(history));
    });
}

#[test]
#[should_panic(expected = "overlap")]
fn twin_two_owners_of_the_same_pages_are_seen() {
    spoilt(|history| {
        let owner = second_owner(history);
        let Held { order, migratetype, pages, unsealed, converted, .. } = &history.held[0];
        let twin = Held {
            owner: Owner::Mapped(owner),
            order: *order,
            migratetype: *migratetype,
            pages: pages.clone(),
            unsealed: *unsealed,
            converted: *converted,
        };
        history.held.push(twin);
    });
}

#[test]
#[should_panic(expected = "the mapping of")]
fn twin_secret_pages_that_are_mapped_are_seen() {
    spoilt(|history| {
        let frames = history.held[1].owner.frames();
        frames.iter().for_each(|frame| history.mock.state().frame_mut(frame).direct = true);
    });
}
