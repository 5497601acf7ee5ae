//! The mermap's error paths: each step fails in turn, and the machine is as it was.

use super::mermap::{frames, prepared, reserved};
use crate::mermap::{Leaks, Mermap, MermapError, PAGES, Protection, SLOTS};
use crate::platform::{InterruptsOff, Platform};
use crate::testing::{Mock, Seen};
use lacuna_abi::addr::{FrameRange, Gfn, Gva};
use lacuna_abi::layout::{WINDOW_LARGE_OFFSET, WINDOW_LARGE_SLOTS, window};
use lacuna_abi::paging::Level;
use std::vec::Vec;

const GLOBAL: Protection = Protection { global: true, ..Protection::READ };
const EXECUTE: Protection = Protection { execute: true, ..Protection::READ };

/// Requests that fail whatever is mapped.
fn fail_early(mock: &Mock, mermap: &Mermap<'_, Mock>) {
    let outside = FrameRange::single(Gfn(0));
    for (range, protection, error) in [
        (frames(mock, 0, 1), GLOBAL, MermapError::Global),
        (frames(mock, 0, 512), EXECUTE, MermapError::Executable),
        (outside, Protection::READ, MermapError::NotInZone),
    ] {
        assert_eq!(mermap.get(range, protection).err(), Some(error), "{range}");
        if range.count() == 1 {
            let off = InterruptsOff::new(mock);
            assert_eq!(mermap.get_reserved(range.start(), protection, off).err(), Some(error));
        }
    }
}

/// A history that meets every error on its way. `fails` says whether the failing requests are made;
/// what happened, and where the mappings lay.
fn history(fails: bool) -> (Vec<Seen>, Vec<Gva>, [usize; 2], [bool; 2]) {
    let mock = Mock::new(16, 2);
    let mermap = prepared(&mock);
    let mut places = Vec::new();
    let read = |first, count| mermap.get(frames(&mock, first, count), Protection::READ);
    let refused = |result: Result<_, MermapError>, error| {
        assert_eq!(result.err(), Some(error));
    };
    for cpu in 0..2 {
        mock.on_cpu(cpu);
        for _ in 0..2 {
            if fails {
                fail_early(&mock, &mermap);
                refused(read(1, PAGES + 1), MermapError::NoSpace);
            }
            let all: Vec<_> = (0..SLOTS as u64).map(|n| read(10 * n, 120).unwrap()).collect();
            if fails {
                refused(read(0, 1), MermapError::NoSlot);
                refused(read(1, PAGES), MermapError::NoSlot);
                fail_early(&mock, &mermap);
            }
            places.extend(all.iter().map(|mapping| mapping.va()));
            drop(all);
            let most = read(1, PAGES - 1).unwrap();
            places.push(most.va());
            if fails {
                refused(read(0, 2), MermapError::NoSpace);
            }
            drop(most);
            let blocks: Vec<_> =
                (0..WINDOW_LARGE_SLOTS).map(|n| read(512 * n, 512).unwrap()).collect();
            if fails {
                refused(read(512 * 5, 512), MermapError::NoSlot);
            }
            places.extend(blocks.iter().map(|mapping| mapping.va()));
            drop(blocks);
            let spare = reserved(&mermap, &mock, 7).unwrap();
            if fails {
                refused(reserved(&mermap, &mock, 8), MermapError::ReserveInUse);
                assert!(mock.state().interrupts_off[cpu], "the one that lives keeps them off");
                assert_eq!(mermap.teardown().err().map(|Leaks(leaks)| leaks[cpu]), Some(1));
                fail_early(&mock, &mermap);
            }
            places.push(spare.va());
        }
    }
    let entries = [0, 1].map(|cpu| mock.state().window_entries(cpu));
    let off = [0, 1].map(|cpu| mock.state().interrupts_off[cpu]);
    assert_eq!(mermap.teardown(), Ok(()));
    (mock.seen(), places, entries, off)
}

#[test]
fn requests_that_fail_leave_no_trace() {
    let clean = history(false);
    assert_eq!((clean.2, clean.3), ([0; 2], [false; 2]));
    assert_eq!(history(true), clean);
}

#[test]
fn twin_a_slot_that_is_left_behind_would_show() {
    let mock = Mock::new(16, 1);
    let mermap = prepared(&mock);
    // What a get that fails after it took its slot and wrote its entry would leave.
    core::mem::forget(mermap.get(frames(&mock, 0, 1), Protection::READ).unwrap());
    assert_eq!(mock.state().window_entries(0), 1);
    assert_eq!(mermap.teardown(), Err(Leaks([1, 0, 0, 0, 0, 0, 0, 0])));
    assert_ne!(mock.seen(), []);
}

#[test]
fn prepare_fails_at_each_table_of_each_cpu_and_nothing_can_be_mapped() {
    let place = |mock: &Mock, va, level| {
        let read = |at| mock.layout.pool.contains(at).then(|| mock.read_entry(at));
        lacuna_abi::walk::locate(&read, mock.layout.pool.gpa, va, level).unwrap()
    };
    for (cpu, offset, level) in
        (0..3).flat_map(|cpu| [(cpu, 0, Level::Pd), (cpu, WINDOW_LARGE_OFFSET, Level::Pdpt)])
    {
        let mock = Mock::new(16, 3);
        let at = place(&mock, window(cpu).wrapping_add(offset), level);
        let table = mock.state().tables.remove(&at.0).unwrap();
        let mermap = Mermap::new(&mock, &mock.layout, mock.map());
        for _ in 0..2 {
            let failed = mermap.prepare();
            assert!(matches!(failed, Err(MermapError::NoTables(_))), "{cpu}, {level:?}");
            assert!(!mermap.ready());
            for caller in 0..3 {
                mock.on_cpu(caller);
                let one = mermap.get(frames(&mock, 0, 1), Protection::READ);
                assert_eq!(one.err(), Some(MermapError::NotReady));
                assert_eq!(reserved(&mermap, &mock, 0).err(), Some(MermapError::NotReady));
                assert!(!mock.state().interrupts_off[caller]);
            }
        }
        assert_eq!(mock.seen(), []);
        mock.state().tables.insert(at.0, table);
        assert_eq!(mermap.prepare(), Ok(()));
        mock.on_cpu(cpu);
        assert_eq!(mermap.get(frames(&mock, 0, 1), Protection::READ).unwrap().va(), window(cpu));
    }
}

#[test]
fn teardown_fails_for_each_part_of_each_cpus_window_and_changes_nothing() {
    for cpu in 0..2 {
        for part in 0..3 {
            let mock = Mock::new(16, 2);
            let mermap = prepared(&mock);
            mock.on_cpu(cpu);
            let leak = match part {
                0 => mermap.get(frames(&mock, 0, 3), Protection::READ).unwrap(),
                1 => mermap.get(frames(&mock, 0, 512), Protection::READ).unwrap(),
                _ => reserved(&mermap, &mock, 0).unwrap(),
            };
            mock.seen();
            mock.on_cpu(1 - cpu);
            let mut leaks = Leaks([0; 8]);
            leaks.0[cpu] = 1;
            assert_eq!(mermap.teardown(), Err(leaks));
            assert_eq!((mermap.ready(), mock.seen()), (true, Vec::new()));
            assert!(mermap.get(frames(&mock, 9, 1), Protection::READ).is_ok(), "still of use");
            mock.on_cpu(cpu);
            drop(leak);
            assert_eq!(mermap.teardown(), Ok(()));
        }
    }
    // A failed teardown does not make ready what was not.
    let mock = Mock::new(16, 1);
    let mermap = prepared(&mock);
    assert_eq!(mermap.teardown(), Ok(()));
    assert_eq!((mermap.teardown(), mermap.ready()), (Ok(()), false));
}
