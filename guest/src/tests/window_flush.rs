//! Which flush goes when the addresses of a window start over: of the few that were used, or of
//! the whole window, and what stays remembered.

use super::mermap::{flushes, frames, prepared};
use crate::mermap::{INVLPG_MAX, PAGES, Protection};
use crate::platform::{CpuSet, Platform};
use crate::testing::Mock;
use lacuna_abi::addr::PAGE_SIZE;
use lacuna_abi::event::Flush;
use lacuna_abi::layout::window;
use lacuna_abi::paging::Level;

fn few(first: u64, count: u64) -> Flush {
    let va = window(0).wrapping_add(first * PAGE_SIZE);
    Flush::Pages { va, count: count as u32, level: Level::Pt }
}

#[test]
fn a_few_used_addresses_are_flushed_one_by_one_and_more_by_a_root_load() {
    for (used, flush) in [
        (INVLPG_MAX, few(0, INVLPG_MAX)),
        (INVLPG_MAX + 1, Flush::NonGlobal),
        (PAGES, Flush::NonGlobal),
    ] {
        let mock = Mock::new(16, 1);
        let mermap = prepared(&mock);
        drop(mermap.get(frames(&mock, 0, used), Protection::READ).unwrap());
        let all = mermap.get(frames(&mock, 1024, PAGES), Protection::READ_WRITE).unwrap();
        assert_eq!(flushes(&mock), [flush], "{used} pages were used");
        assert_eq!(mermap.counters().flushes, 1);
        mock.store(all.va(), used);
        assert_eq!(mock.load(mock.layout.zone.va.wrapping_add(1024 * PAGE_SIZE)), used);
    }
}

#[test]
fn a_flush_of_a_few_addresses_leaves_the_window_remembered() {
    let mock = Mock::new(16, 1);
    let mermap = prepared(&mock);
    drop(mermap.get(frames(&mock, 0, 1), Protection::READ).unwrap());
    drop(mermap.get(frames(&mock, 600, PAGES), Protection::READ).unwrap());
    assert_eq!(flushes(&mock), [few(0, 1)]);
    assert_eq!(mermap.may_cache(frames(&mock, 0, 1)), CpuSet::only(0));
    drop(mermap.get(frames(&mock, 1200, 1), Protection::READ).unwrap());
    assert_eq!(flushes(&mock), [Flush::NonGlobal]);
    assert_eq!(mermap.may_cache(frames(&mock, 0, 1)), CpuSet::NONE);
}

#[test]
fn holes_that_were_left_out_are_flushed_before_they_serve_again() {
    let mock = Mock::new(16, 1);
    let mermap = prepared(&mock);
    let get = |first, count| mermap.get(frames(&mock, first, count), Protection::READ).unwrap();
    drop(get(0, PAGES - 11));
    let live = get(1024, 9);
    drop(get(1100, 1));
    // One address is left, so that one of the two that are wanted was used before.
    let wrapped = get(1200, 2);
    assert_eq!(flushes(&mock), [few(PAGES - 2, 1)]);
    drop((live, wrapped));
    // The machine's host would see an address of the hole served while it may be cached.
    drop(get(2000, 100));
    assert_eq!(flushes(&mock), [Flush::NonGlobal]);
}

#[test]
fn the_other_parts_of_a_window_are_not_clean_after_a_flush_of_a_few_addresses() {
    let mock = Mock::new(16, 1);
    let mermap = prepared(&mock);
    let block = |n: u64| mermap.get(frames(&mock, 512 * n, 512), Protection::READ).unwrap();
    drop([block(0), block(1), block(2), block(3)]);
    drop(mermap.get(frames(&mock, 0, 1), Protection::READ).unwrap());
    drop(mermap.get(frames(&mock, 0, PAGES), Protection::READ).unwrap());
    flushes(&mock);
    drop(block(4));
    assert!(matches!(flushes(&mock)[..], [Flush::Pages { level: Level::Pd, .. }]));
}

#[cfg(feature = "faults")]
#[test]
fn twin_without_that_flush_an_address_is_served_while_it_may_be_cached() {
    let mock = Mock::new(16, 1);
    mock.plant(lacuna_abi::fault::Fault::SkipWindowFlush);
    let mermap = prepared(&mock);
    drop(mermap.get(frames(&mock, 0, 1), Protection::READ).unwrap());
    drop(mermap.get(frames(&mock, 0, PAGES), Protection::READ).unwrap());
    let violations = mock.violations();
    assert!(violations[0].starts_with("stale-window: remapped"), "{violations:?}");
}
