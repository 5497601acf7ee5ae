//! The windows: what they hold, when they flush, what they refuse, and that nothing is left.

use crate::mermap::{Leaks, Mapping, Mermap, MermapError, PAGES, Protection};
use crate::platform::{CpuSet, InterruptsOff, Platform};
use crate::testing::{Mock, Seen};
use lacuna_abi::addr::{FrameRange, Gfn, PAGE_SIZE};
use lacuna_abi::event::Flush;
use lacuna_abi::layout::{WINDOW_LARGE_OFFSET, WINDOW_STRIDE, window};
use lacuna_abi::paging::{Entry, Level};
use std::vec::Vec;

pub(super) fn prepared(mock: &Mock) -> Mermap<'_, Mock> {
    let mermap = Mermap::new(mock, &mock.layout, mock.map());
    mermap.prepare().unwrap();
    mermap
}

/// `count` frames from the `first` of the zone.
pub(super) fn frames(mock: &Mock, first: u64, count: u64) -> FrameRange {
    FrameRange::new(Gfn(mock.layout.zone_frames().start().0 + first), count).unwrap()
}

pub(super) fn reserved<'m, 'a>(
    mermap: &'m Mermap<'a, Mock>,
    mock: &'a Mock,
    first: u64,
) -> Result<Mapping<'m, 'a, Mock>, MermapError> {
    let frame = frames(mock, first, 1).start();
    mermap.get_reserved(frame, Protection::READ_WRITE, InterruptsOff::new(mock))
}

pub(super) fn flushes(mock: &Mock) -> Vec<Flush> {
    let flush = |seen| if let Seen::Flush(flush) = seen { Some(flush) } else { None };
    mock.seen().into_iter().filter_map(flush).collect()
}

#[test]
fn holes_below_a_live_mapping_are_not_used_again() {
    let mock = Mock::new(16, 1);
    let mermap = prepared(&mock);
    let low = mermap.get(frames(&mock, 0, 100), Protection::READ).unwrap();
    let live = mermap.get(frames(&mock, 100, 100), Protection::READ).unwrap();
    drop(low);
    drop(mermap.get(frames(&mock, 200, PAGES - 200), Protection::READ).unwrap());
    let next = mermap.get(frames(&mock, 200, 1), Protection::READ).unwrap();
    assert_eq!(next.va(), live.va().wrapping_add(100 * PAGE_SIZE));
}

#[test]
fn a_request_that_cannot_be_met_flushes_nothing_and_leaves_nothing() {
    let mock = Mock::new(16, 1);
    let mermap = prepared(&mock);
    let live = mermap.get(frames(&mock, 0, PAGES), Protection::READ).unwrap();
    let entries = mock.state().window_entries(0);
    mock.seen();
    assert_eq!(mermap.get(frames(&mock, 0, 1), Protection::READ).err(), Some(MermapError::NoSpace));
    assert_eq!(mock.seen(), [], "no address can be had, so no flush");
    assert_eq!(mock.state().window_entries(0), entries);
    drop(live);

    let mock = Mock::new(16, 1);
    let mermap = prepared(&mock);
    let slots: Vec<_> =
        (0..4).map(|n| mermap.get(frames(&mock, n, 100), Protection::READ).unwrap()).collect();
    mock.seen();
    assert_eq!(
        mermap.get(frames(&mock, 0, 200), Protection::READ).err(),
        Some(MermapError::NoSlot)
    );
    assert_eq!(mock.seen(), [], "the slot is looked for before the flush");
    drop(slots);
}

#[test]
fn global_and_executable_mappings_are_refused() {
    let mock = Mock::new(16, 1);
    let mermap = prepared(&mock);
    let global = Protection { global: true, ..Protection::READ_WRITE };
    let execute = Protection { execute: true, ..Protection::READ };
    let one = frames(&mock, 0, 1);
    for (protection, error) in [(global, MermapError::Global), (execute, MermapError::Executable)] {
        assert_eq!(mermap.get(one, protection).err(), Some(error));
        let off = InterruptsOff::new(&mock);
        assert_eq!(mermap.get_reserved(one.start(), protection, off).err(), Some(error));
        assert!(!mock.state().interrupts_off[0], "the refused guard is dropped");
    }
    assert_eq!(mock.seen(), []);
    assert_eq!(mermap.teardown(), Ok(()));
}

#[test]
fn entries_are_never_global_nor_executable_and_writable_only_if_asked() {
    let mock = Mock::new(16, 1);
    let mermap = prepared(&mock);
    drop(mermap.get(frames(&mock, 0, 2), Protection::READ).unwrap());
    drop(mermap.get(frames(&mock, 0, 2), Protection::READ_WRITE).unwrap());
    drop(mermap.get(frames(&mock, 512, 512), Protection::READ).unwrap());
    let new = |seen| if let Seen::Write(write) = seen { Some(write.new) } else { None };
    let entries: Vec<_> =
        mock.seen().into_iter().filter_map(new).filter(|e| e.is_present()).collect();
    let flags: Vec<_> = entries.iter().map(|e| e.flags()).collect();
    assert_eq!(flags, [Entry::READ_ONLY, Entry::DATA, Entry::READ_ONLY | Entry::PAGE_SIZE]);
}

#[test]
fn a_whole_block_takes_one_entry_and_its_address_is_flushed_before_it_serves_again() {
    let mock = Mock::new(16, 1);
    let mermap = prepared(&mock);
    let start = window(0).wrapping_add(WINDOW_LARGE_OFFSET);
    for round in 0..4 {
        let block = mermap.get(frames(&mock, 512 * round, 512), Protection::READ_WRITE).unwrap();
        assert_eq!(block.va(), start.wrapping_add(round << 21), "clean addresses first");
        mock.store(block.va().wrapping_add(511 * PAGE_SIZE), round);
    }
    assert_eq!(flushes(&mock), []);
    let block = mermap.get(frames(&mock, 0, 512), Protection::READ_WRITE).unwrap();
    assert_eq!(flushes(&mock), [Flush::Pages { va: start, count: 1, level: Level::Pd }]);
    assert_eq!(mock.load(block.va().wrapping_add(511 * PAGE_SIZE)), 0);
    let others: Vec<_> = (1..4)
        .map(|n| mermap.get(frames(&mock, 512 * n, 512), Protection::READ).unwrap())
        .collect();
    let none = mermap.get(frames(&mock, 512 * 5, 512), Protection::READ);
    assert_eq!(none.err(), Some(MermapError::NoSlot));
    drop((block, others));
}

#[test]
fn a_flush_of_the_window_cleans_the_other_addresses_too() {
    let mock = Mock::new(16, 1);
    let mermap = prepared(&mock);
    let use_all = || {
        let block = |n: u64| mermap.get(frames(&mock, 512 * n, 512), Protection::READ).unwrap();
        drop([block(0), block(1), block(2), block(3)]);
        drop(reserved(&mermap, &mock, 0).unwrap());
    };
    use_all();
    drop(mermap.get(frames(&mock, 0, PAGES), Protection::READ).unwrap());
    drop(mermap.get(frames(&mock, 0, 1), Protection::READ).unwrap());
    assert_eq!(flushes(&mock), [Flush::NonGlobal]);
    use_all();
    assert_eq!(flushes(&mock), []);
}

#[test]
fn the_reserve_serves_when_all_slots_are_taken_one_mapping_at_a_time() {
    let mock = Mock::new(16, 1);
    let mermap = prepared(&mock);
    let slots: Vec<_> =
        (0..4).map(|n| mermap.get(frames(&mock, n, 1), Protection::READ).unwrap()).collect();
    let first = reserved(&mermap, &mock, 7).unwrap();
    assert_eq!(first.va(), window(0).wrapping_add(PAGES * PAGE_SIZE));
    assert!(mock.state().interrupts_off[0], "interrupts are off while it is mapped");
    assert_eq!(reserved(&mermap, &mock, 8).err(), Some(MermapError::ReserveInUse));
    mock.store(first.va(), 1);
    drop(first);
    assert!(!mock.state().interrupts_off[0]);
    assert_eq!(flushes(&mock), []);
    let second = reserved(&mermap, &mock, 8).unwrap();
    assert_eq!(flushes(&mock).len(), 1, "the address is flushed before it serves again");
    drop((slots, second));
    assert_eq!(mermap.counters().mapped_reserved, 2);
}

#[test]
fn nothing_is_mapped_before_prepare_and_prepare_leaves_mappings_alone() {
    let mock = Mock::new(16, 1);
    let mermap = Mermap::new(&mock, &mock.layout, mock.map());
    let one = frames(&mock, 0, 1);
    assert!(!mermap.ready());
    assert_eq!(mermap.get(one, Protection::READ).err(), Some(MermapError::NotReady));
    assert_eq!(reserved(&mermap, &mock, 0).err(), Some(MermapError::NotReady));
    mermap.prepare().unwrap();
    let live = mermap.get(one, Protection::READ_WRITE).unwrap();
    mermap.prepare().unwrap();
    let other = mermap.get(one, Protection::READ_WRITE).unwrap();
    assert_ne!(live.va(), other.va());
}

#[test]
fn readiness_waits_for_the_tables_of_every_cpu() {
    let mock = Mock::new(16, 2);
    let cut = |va, level| {
        let read = |at| mock.layout.pool.contains(at).then(|| mock.read_entry(at));
        lacuna_abi::walk::locate(&read, mock.layout.pool.gpa, va, level).unwrap()
    };
    let at = cut(window(1), Level::Pd);
    let table = mock.state().tables.remove(&at.0).unwrap();
    let mermap = Mermap::new(&mock, &mock.layout, mock.map());
    assert_eq!(mermap.prepare(), Err(MermapError::NoTables(1)));
    assert!(!mermap.ready());
    mock.state().tables.insert(at.0, table);
    assert_eq!(mermap.prepare(), Ok(()));
}

#[test]
fn frames_outside_the_zone_are_refused() {
    let mock = Mock::new(16, 1);
    let mermap = prepared(&mock);
    let end = mock.layout.zone_frames().count();
    for range in [
        FrameRange::single(Gfn(0)),
        FrameRange::single(mock.layout.pool.gpa.frame()),
        frames(&mock, end - 1, 2),
    ] {
        assert_eq!(mermap.get(range, Protection::READ).err(), Some(MermapError::NotInZone));
    }
    let off = InterruptsOff::new(&mock);
    let error = mermap.get_reserved(Gfn(u64::MAX), Protection::READ, off).err();
    assert_eq!(error, Some(MermapError::NotInZone));
}

#[test]
fn teardown_reports_the_leaks_of_every_cpu() {
    let mock = Mock::new(16, 2);
    let mermap = prepared(&mock);
    mock.on_cpu(1);
    let leak = mermap.get(frames(&mock, 0, 512), Protection::READ).unwrap();
    let held = reserved(&mermap, &mock, 0).unwrap();
    mock.on_cpu(0);
    assert_eq!(mermap.teardown(), Err(Leaks([0, 2, 0, 0, 0, 0, 0, 0])));
    assert!(mermap.ready(), "leaks can still be taken down");
    mock.on_cpu(1);
    drop((leak, held));
    assert_eq!(mermap.teardown(), Ok(()));
    assert_eq!(
        mermap.get(frames(&mock, 0, 1), Protection::READ).err(),
        Some(MermapError::NotReady)
    );
}

#[test]
fn each_cpu_maps_in_its_own_window() {
    let mock = Mock::new(16, 2);
    let mermap = prepared(&mock);
    let zero = mermap.get(frames(&mock, 0, 1), Protection::READ).unwrap();
    mock.on_cpu(1);
    let one = mermap.get(frames(&mock, 0, 1), Protection::READ).unwrap();
    assert_eq!(one.va(), zero.va().wrapping_add(WINDOW_STRIDE));
    drop(one);
    mock.on_cpu(0);
    drop(zero);
}

#[test]
fn a_block_remembers_windows_until_their_cpu_has_flushed() {
    let mock = Mock::new(16, 2);
    let mermap = prepared(&mock);
    let block = frames(&mock, 0, 512);
    assert_eq!(mermap.may_cache(block), CpuSet::NONE);
    drop(mermap.get(frames(&mock, 500, 24), Protection::READ).unwrap());
    mock.on_cpu(1);
    drop(mermap.get(frames(&mock, 3, 1), Protection::READ).unwrap());
    assert_eq!(mermap.may_cache(block), CpuSet::first(2));
    assert_eq!(mermap.may_cache(frames(&mock, 512, 512)), CpuSet::only(0), "a run over two blocks");

    // CPU 1 uses up its addresses and flushes, with a mapping of the block in use meanwhile.
    let live = mermap.get(frames(&mock, 7, 1), Protection::READ).unwrap();
    for _ in 0..2 {
        drop(mermap.get(frames(&mock, 1024, 400), Protection::READ).unwrap());
    }
    assert_eq!(mermap.counters().flushes, 1);
    assert_eq!(mermap.may_cache(block), CpuSet::only(0));
    drop(live);
    assert_eq!(mermap.may_cache(block), CpuSet::first(2), "cached again after the flush");
    mermap.forget(block);
    assert_eq!(mermap.may_cache(block), CpuSet::NONE);
}
