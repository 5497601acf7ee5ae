//! Rules about what a CPU may still cache: each flush that suffices, and each that does not.

use super::*;
use lacuna_abi::event::ControlRegister;

fn block_flush(frames: FrameRange) -> Flush {
    Flush::Pages { va: direct_map(frames.start().gpa()), count: 1, level: Level::Pd }
}

/// Unmaps a block, flushes as told, seals.
fn flip_with(cpus: usize, flushes: impl Fn(FrameRange) -> Vec<(u8, Flush)>) -> Scene {
    let mut scene = Scene::new(cpus);
    let block = scene.block(1);
    scene.unmap_block(block);
    for (cpu, flush) in flushes(block) {
        scene.flush(cpu, flush);
    }
    scene.op(0, OpKind::Seal, block).unwrap();
    scene
}

#[test]
fn a_flush_of_globals_on_every_cpu_discharges_the_direct_map() {
    for flush in [|_| Flush::Everything, block_flush] {
        let scene = flip_with(2, |block| vec![(0, flush(block)), (1, flush(block))]);
        scene.assert_clean(&[Rule::StaleDirectMap]);
    }
}

#[test]
fn any_other_flush_leaves_the_direct_map_stale() {
    let inside = |block: FrameRange| Flush::Pages {
        va: direct_map(block.start().gpa()).wrapping_add(BLOCK_SIZE),
        count: 1,
        level: Level::Pt,
    };
    let cases: [Vec<(u8, Flush)>; 4] = [
        vec![],
        vec![(0, Flush::NonGlobal), (1, Flush::NonGlobal)],
        vec![(0, Flush::Everything)],
        vec![(0, Flush::Everything), (1, inside(Scene::new(1).block(1)))],
    ];
    for flushes in cases {
        let scene = flip_with(2, |_| flushes.clone());
        assert_eq!(scene.found(), [(Rule::StaleDirectMap, Some(scene.block(1).start()))]);
    }
}

#[test]
fn a_flush_before_the_unmap_discharges_nothing() {
    let mut scene = Scene::new(1);
    let block = scene.block(1);
    scene.flush(0, Flush::Everything);
    scene.unmap_block(block);
    scene.op(0, OpKind::Seal, block).unwrap();
    scene.assert_found(Rule::StaleDirectMap, block.start());
}

#[test]
fn a_completed_seal_does_not_hide_a_missing_flush_from_its_own_call() {
    let mut scene = Scene::new(1);
    let block = scene.block(1);
    scene.unmap_block(block);
    let second_half = FrameRange::new(block.start().wrapping_add(256), 256).unwrap();
    scene.op(0, OpKind::Seal, second_half).unwrap();
    assert_eq!(scene.found(), [(Rule::StaleDirectMap, Some(second_half.start()))]);
}

#[test]
fn an_open_is_judged_before_the_state_of_its_frames() {
    let mut scene = Scene::new(1);
    let block = scene.block(1);
    scene.unmap_block(block);
    assert_eq!(scene.op(0, OpKind::Open, block), Err(Status::NotSecret));
    assert_eq!(scene.found()[0], (Rule::StaleDirectMap, Some(block.start())));
}

#[test]
fn a_split_without_a_flush_is_stale_though_the_small_entries_were_never_cached() {
    let mut scene = Scene::new(1);
    let block = scene.block(1);
    let va = direct_map(block.start().gpa());
    let table = scene.machine.new_table();
    scene.write(0, va, Level::Pd, 1, Entry::new(table.frame(), Entry::TABLE));
    scene.op(0, OpKind::Seal, first(block, 3)).unwrap();
    assert_eq!(scene.found(), [(Rule::StaleDirectMap, Some(block.start()))]);
}

#[test]
fn fewer_rights_are_a_revoke_and_more_are_none() {
    const XD: u64 = Entry::NO_EXECUTE;
    let pairs = [
        (Entry::READ_ONLY, Entry::DATA),
        (Entry::READ_ONLY, Entry::READ_ONLY | Entry::USER),
        (Entry::READ_ONLY, Entry::READ_ONLY & !XD),
    ];
    for (less, more) in pairs {
        let mut scene = Scene::new(1);
        let block = scene.block(1);
        let va = direct_map(block.start().gpa());
        let entry = |flags| Entry::new(block.start(), flags | Entry::PAGE_SIZE | Entry::GLOBAL);
        scene.write(0, va, Level::Pd, 1, entry(less));
        scene.flush(0, Flush::Everything);
        scene.write(0, va, Level::Pd, 1, entry(more));
        assert_eq!(scene.audit.tlb.of_frames(block), []);
        scene.write(0, va, Level::Pd, 1, entry(less));
        assert_eq!(scene.audit.tlb.of_frames(block).len(), 1);
    }
}

/// Uses a window address twice, with `between` in between.
fn reuse(scene: &mut Scene, between: impl FnOnce(&mut Scene)) {
    let block = scene.block(1);
    scene.flip(block);
    scene.flush(0, Flush::NonGlobal);
    scene.use_window(first(block, 2), 4);
    between(scene);
    let other = FrameRange::new(block.start().wrapping_add(8), 1).unwrap();
    scene.use_window(other, 5);
}

#[test]
fn a_window_address_needs_a_flush_before_it_is_used_again() {
    let address = Flush::Pages { va: window(0).wrapping_add(0x5000), count: 1, level: Level::Pt };
    for flush in [Flush::NonGlobal, Flush::Everything, address] {
        let mut scene = Scene::with_seal(2, Denial::NotEnforced);
        reuse(&mut scene, |scene| scene.flush(0, flush));
        scene.assert_clean(&[Rule::StaleWindow]);
        assert!(scene.audit.result().tally(Rule::StaleWindow).not_checked > 0, "other CPUs");
    }
}

#[test]
fn a_window_address_used_again_without_a_flush_of_its_own_is_stale() {
    let other = Flush::Pages { va: window(0).wrapping_add(0x4000), count: 1, level: Level::Pt };
    for (cpu, flush) in [(0, Some(other)), (1, Some(Flush::Everything)), (0, None)] {
        let mut scene = Scene::with_seal(2, Denial::NotEnforced);
        reuse(&mut scene, |scene| flush.into_iter().for_each(|flush| scene.flush(cpu, flush)));
        let found = &scene.audit.result().findings[0];
        assert_eq!((found.rule, found.cpu), (Rule::StaleWindow, Some(0)));
        assert_eq!(found.frame, Some(scene.block(1).start().wrapping_add(1)));
    }
}

#[test]
fn a_completed_seal_makes_a_window_address_safe_without_a_flush() {
    let mut scene = Scene::new(2);
    reuse(&mut scene, |_| ());
    scene.assert_clean(&[Rule::StaleWindow]);
}

#[test]
fn a_seal_that_is_held_open_by_its_granule_discharges_nothing_until_it_completes() {
    for completes in [false, true] {
        let mut scene = Scene::new(1);
        let block = scene.block(1);
        scene.flip(block);
        scene.flush(0, Flush::NonGlobal);
        let (used, neighbour) =
            (first(block, 1), FrameRange::single(block.start().wrapping_add(9)));
        scene.op(0, OpKind::Open, neighbour).unwrap();
        scene.seal = Denial::HeldOpen;
        scene.use_window(used, 0);
        if completes {
            // The granule closes with the neighbour's seal, and the used frame with it.
            scene.seal = Denial::Denied;
            scene.machine.denials.insert(used.start(), Denial::Denied);
            scene.op(0, OpKind::Seal, neighbour).unwrap();
        }
        scene.use_window(FrameRange::single(block.start().wrapping_add(20)), 0);
        let stale = (Rule::StaleWindow, Some(used.start()));
        assert_eq!(scene.found(), if completes { vec![] } else { vec![stale] });
    }
}

#[test]
fn a_remap_from_one_frame_to_another_is_stale_at_once() {
    let mut scene = Scene::new(1);
    let block = scene.block(1);
    scene.flip(block);
    scene.flush(0, Flush::NonGlobal);
    scene.op(0, OpKind::Open, block).unwrap();
    scene.write(0, window(0), Level::Pt, 1, Entry::new(block.start(), Entry::DATA));
    let next = Entry::new(block.start().wrapping_add(1), Entry::DATA);
    scene.write(0, window(0), Level::Pt, 1, next);
    assert_eq!(scene.found(), [(Rule::StaleWindow, Some(block.start()))]);
}

#[test]
fn a_frame_is_not_released_while_its_window_may_be_cached() {
    for flushed in [true, false] {
        let mut scene = Scene::with_seal(1, Denial::NotEnforced);
        let block = scene.block(1);
        scene.flip(block);
        if flushed {
            scene.flush(0, Flush::NonGlobal);
        }
        scene.op(0, OpKind::Release, block).unwrap();
        let stale = (Rule::StaleWindow, Some(block.start()));
        assert_eq!(scene.found(), if flushed { vec![] } else { vec![stale] });
    }
}

/// Splits a block, merges it again, and frees its table, with `between` before the last step.
pub(super) fn merge(between: impl FnOnce(&mut Scene)) -> (Scene, Gfn) {
    let mut scene = Scene::new(2);
    let block = scene.block(1);
    let va = direct_map(block.start().gpa());
    let table = scene.machine.new_table();
    scene.life(Life::TableAllocated, FrameRange::single(table.frame()));
    scene.write(0, va, Level::Pd, 1, Entry::new(table.frame(), Entry::TABLE));
    let whole = Entry::new(block.start(), BLOCK_ENTRY | Entry::GLOBAL);
    scene.write(0, va, Level::Pd, 1, whole);
    between(&mut scene);
    scene.life(Life::TableFreed, FrameRange::single(table.frame()));
    (scene, table.frame())
}

#[test]
fn a_table_is_free_to_go_after_any_flush_of_paging_structures_on_every_cpu() {
    let anywhere = Flush::Pages { va: Gva(0), count: 1, level: Level::Pt };
    for flush in [Flush::NonGlobal, Flush::Everything, anywhere] {
        let (scene, _) = merge(|scene| scene.flush_all(flush));
        scene.assert_clean(&[Rule::StaleTable]);
    }
}

#[test]
fn a_table_freed_without_a_flush_on_every_cpu_is_stale() {
    let (scene, table) = merge(|scene| scene.flush(1, Flush::Everything));
    assert_eq!(scene.found(), [(Rule::StaleTable, Some(table))]);
    let (scene, table) = merge(|_| ());
    assert_eq!(scene.found(), [(Rule::StaleTable, Some(table))]);
}

#[test]
fn a_table_freed_while_it_is_linked_is_found() {
    let mut scene = Scene::new(1);
    let va = direct_map(scene.block(1).start().gpa());
    let table = scene.machine.new_table();
    scene.write(0, va, Level::Pd, 1, Entry::new(table.frame(), Entry::TABLE));
    scene.flush(0, Flush::Everything);
    scene.life(Life::TableFreed, FrameRange::single(table.frame()));
    assert_eq!(scene.found(), [(Rule::StaleTable, Some(table.frame()))]);
}

#[test]
fn leaves_below_an_entry_that_is_cleared_are_revoked_with_it() {
    let mut scene = Scene::new(1);
    let block = scene.block(3);
    let va = direct_map(block.start().gpa());
    scene.write(0, va.align_down(1 << 30), Level::Pdpt, 1, Entry::EMPTY);
    scene.op(0, OpKind::Seal, block).unwrap();
    assert_eq!(scene.found(), [(Rule::StaleDirectMap, Some(block.start()))]);
}

#[test]
fn fewer_rights_for_the_same_frame_in_a_window_are_no_remap() {
    let mut scene = Scene::new(1);
    let block = scene.block(1);
    scene.flip(block);
    scene.flush(0, Flush::NonGlobal);
    scene.op(0, OpKind::Open, block).unwrap();
    scene.write(0, window(0), Level::Pt, 1, Entry::new(block.start(), Entry::DATA));
    scene.write(0, window(0), Level::Pt, 1, Entry::new(block.start(), Entry::READ_ONLY));
    scene.assert_clean(&[Rule::StaleWindow]);
}

#[test]
fn with_the_seal_off_nothing_is_discharged_whatever_the_second_stage_says() {
    let mut scene = Scene::with_seal(1, Denial::NotEnforced);
    scene.seal = Denial::Denied;
    reuse(&mut scene, |_| ());
    scene.assert_found(Rule::StaleWindow, scene.block(1).start().wrapping_add(1));
}

#[test]
fn of_a_window_only_its_own_cpu_is_followed() {
    let mut scene = Scene::with_seal(2, Denial::NotEnforced);
    let block = scene.block(1);
    scene.flip(block);
    let duties = scene.audit.tlb.of_frames(block);
    assert_eq!(duties.iter().map(|duty| duty.cpus).collect::<Vec<_>>(), [0b01]);
}

/// Turns PCIDs on.
fn use_pcids(scene: &mut Scene) {
    let (register, old) = (ControlRegister::Cr4, ControlPolicy::default().cr4_set);
    scene.record(0, Event::Control { register, old, new: old | ControlPolicy::CR4_PCIDE });
}

/// A second root that shares the first one's tables, registered with PCID 1.
fn second_root(scene: &mut Scene) -> Gpa {
    use_pcids(scene);
    let other = scene.machine.clone_root();
    scene.audit.register_root(other, 1, &scene.machine).unwrap();
    other
}

/// A second root with window tables of its own, registered with PCID 1: what is stored in them
/// changes nothing for the first one.
fn root_with_own_windows(scene: &mut Scene) -> Gpa {
    use_pcids(scene);
    let other = scene.machine.clone_root();
    let mut table = other;
    for level in [Level::Pml4, Level::Pdpt, Level::Pd] {
        let below = scene.machine.new_table();
        let entry = Entry::new(below.frame(), Entry::TABLE);
        scene.machine.tables.insert(entry_address(table, level, window(0)).0, entry.0);
        table = below;
    }
    scene.audit.register_root(other, 1, &scene.machine).unwrap();
    other
}

#[test]
fn an_old_translation_under_another_pcid_is_none_of_the_new_address_space() {
    for (pcid, stale) in [(1, false), (0, true)] {
        let mut scene = Scene::with_seal(1, Denial::NotEnforced);
        let block = scene.block(1);
        scene.flip(block);
        let other = root_with_own_windows(&mut scene);
        scene.op(0, OpKind::Open, block).unwrap();
        let new = Entry::new(block.start(), Entry::DATA);
        let write = scene.store(window(0), Level::Pt, 1, new);
        scene.record(0, Event::EntryWrite(EntryWrite { root: other, pcid, ..write }));
        assert_eq!(!scene.found().is_empty(), stale);
    }
}

#[test]
fn a_root_load_discharges_like_a_flush_of_its_pcid_unless_it_flushes_nothing() {
    for (no_flush, left) in [(false, 0), (true, 1)] {
        let mut scene = Scene::with_seal(1, Denial::NotEnforced);
        let block = scene.block(1);
        scene.flip(block);
        let root = scene.machine.root;
        scene.record(0, Event::RootLoad { root, pcid: 0, no_flush });
        let duties = scene.audit.tlb.of_frames(block);
        assert_eq!(duties.len(), left);
    }
}

#[test]
fn a_root_may_be_unregistered_once_every_cpu_has_gone_on_without_it() {
    let mut scene = Scene::new(1);
    let other = second_root(&mut scene);
    let root = scene.machine.root;
    scene.record(0, Event::RootLoad { root: other, pcid: 1, no_flush: false });
    scene.record(0, Event::RootLoad { root, pcid: 0, no_flush: false });
    scene.flush(0, Flush::NonGlobal);
    // Loads under PCID 0 leave what is cached under PCID 1.
    assert_eq!(scene.audit.unregister_root(other), Err(Status::BadState));
    let third = scene.machine.clone_root();
    scene.audit.register_root(third, 1, &scene.machine).unwrap();
    scene.record(0, Event::RootLoad { root: third, pcid: 1, no_flush: false });
    assert_eq!(scene.audit.unregister_root(other), Err(Status::BadState));
    scene.flush(0, Flush::NonGlobal);
    assert_eq!(scene.audit.unregister_root(other), Ok(()));
}

#[test]
fn a_cpu_that_was_reset_owes_nothing_and_is_not_heard_until_it_starts_again() {
    let mut scene = Scene::new(2);
    let block = scene.block(1);
    scene.unmap_block(block);
    scene.flush(0, Flush::Everything);
    scene.audit.stop_cpu(1);
    scene.op(0, OpKind::Seal, block).unwrap();
    scene.assert_clean(&[Rule::StaleDirectMap]);
    assert!(scene.audit.running().eq([0]));
    scene.audit.start_cpu(1);
    let other = scene.block(2);
    scene.unmap_block(other);
    scene.flush(0, Flush::Everything);
    scene.op(0, OpKind::Seal, other).unwrap();
    assert_eq!(scene.audit.result().findings[0].cpu, Some(1));
}

#[test]
fn a_change_of_a_control_register_discharges_what_the_manual_says() {
    let (pge, pae) = (ControlPolicy::CR4_PGE, 1 << 5);
    let set = ControlPolicy::default().cr4_set;
    let cases = [(set, set & !pge, true), (set, set | pae, false), (set & !pge, set, false)];
    for (old, new, clean) in cases {
        let mut scene = Scene::new(1);
        let block = scene.block(1);
        scene.unmap_block(block);
        scene.record(0, Event::Control { register: ControlRegister::Cr4, old, new });
        scene.op(0, OpKind::Seal, block).unwrap();
        assert_eq!(scene.found().is_empty(), clean, "{old:#x} to {new:#x}");
    }
}

#[test]
fn a_table_that_was_linked_and_is_gone_again_has_left_its_leaves_behind() {
    let mut scene = Scene::new(1);
    let frame = scene.block(3).start();
    let table = scene.machine.new_table();
    scene.machine.tables.insert(table.0, Entry::new(frame, Entry::DATA).0);
    let va = window(0).wrapping_add(lacuna_abi::layout::WINDOW_LARGE_OFFSET);
    let linked = scene.store(va, Level::Pd, 1, Entry::new(table.frame(), Entry::TABLE));
    let unlinked = scene.store(va, Level::Pd, 1, Entry::EMPTY);
    // Both records are taken when memory has moved on.
    scene.record(0, Event::EntryWrite(linked));
    scene.record(0, Event::EntryWrite(unlinked));
    let duties = scene.audit.tlb.at((va, va), |_| true);
    assert_eq!(duties.iter().map(|duty| duty.frames.start()).collect::<Vec<_>>(), [frame]);
}
