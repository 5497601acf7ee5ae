//! Guests that record just enough to look honest.

use super::*;
use lacuna_abi::event::ControlRegister;

/// The write of a whole pageblock's entry of the direct map, made and not recorded.
fn unrecorded(scene: &mut Scene, block: FrameRange, new: Entry) -> EntryWrite {
    scene.store(direct_map(block.start().gpa()), Level::Pd, 1, new)
}

fn entry_of(block: FrameRange) -> Entry {
    Entry::new(block.start(), BLOCK_ENTRY | Entry::GLOBAL)
}

/// A scene in which the first block is secret, and CPU 1 is about to announce something.
fn with_a_secret_block() -> (Scene, FrameRange) {
    let mut scene = Scene::new(2);
    let block = scene.block(1);
    scene.flip(block);
    (scene, block)
}

#[test]
fn an_announced_write_excuses_the_entry_that_it_names() {
    let mut scene = Scene::new(2);
    let block = scene.block(1);
    let write = unrecorded(&mut scene, block, Entry::EMPTY);
    scene.machine.intents[1] = Some(write);
    scene.quiesce();
    scene.assert_clean(&[Rule::TraceHonesty]);
}

#[test]
fn an_announcement_that_changes_nothing_excuses_nothing_below_it() {
    let (mut scene, block) = with_a_secret_block();
    let root = scene.machine.root;
    let va = direct_map(block.start().gpa()).align_down(Level::Pml4.span());
    let place = locate(&scene.machine, root, va, Level::Pml4).unwrap();
    let same = scene.machine.read_entry(place).unwrap();
    let level = Level::Pml4;
    let no_change =
        EntryWrite { root, pcid: 0, va, level, count: 1, old: same, new: same, grant: 0 };
    for old in [same, Entry::EMPTY] {
        scene.machine.intents[1] = Some(EntryWrite { old, ..no_change });
        unrecorded(&mut scene, block, entry_of(block));
        scene.quiesce();
        scene.assert_found(Rule::TraceHonesty, block.start());
        scene.assert_found(Rule::DirectMapAlias, block.start());
    }
}

#[test]
fn what_is_announced_must_be_right_all_the_same() {
    let (mut scene, block) = with_a_secret_block();
    let write = unrecorded(&mut scene, block, entry_of(block));
    scene.machine.intents[1] = Some(write);
    scene.quiesce();
    scene.assert_found(Rule::DirectMapAlias, block.start());
    assert!(scene.found().iter().all(|(rule, _)| *rule != Rule::TraceHonesty));
}

#[test]
fn a_record_with_another_pcid_hides_no_stale_window() {
    let mut scene = Scene::with_seal(1, Denial::NotEnforced);
    let (one, two) = (scene.block(1), scene.block(2));
    [one, two].into_iter().for_each(|block| scene.flip(block));
    scene.flush(0, Flush::NonGlobal);
    for block in [one, two] {
        scene.op(0, OpKind::Open, first(block, 1)).unwrap();
    }
    for new in
        [Entry::new(one.start(), Entry::DATA), Entry::EMPTY, Entry::new(two.start(), Entry::DATA)]
    {
        let write = scene.store(window(0), Level::Pt, 1, new);
        scene.record(0, Event::EntryWrite(EntryWrite { pcid: 5, ..write }));
    }
    scene.assert_found(Rule::StaleWindow, one.start());
    assert!(scene.found().iter().any(|(rule, _)| *rule == Rule::TraceHonesty));
}

#[test]
fn a_registered_root_that_was_loaded_without_a_record_is_found() {
    let mut scene = Scene::new(2);
    let other = scene.machine.clone_root();
    scene.audit.register_root(other, 0, &scene.machine).unwrap();
    scene.quiesce();
    scene.assert_clean(&[Rule::ControlState]);
    let state = scene.machine.cpus[1].unwrap();
    scene.machine.cpus[1] = Some(CpuState { cr3: other.0, ..state });
    scene.quiesce();
    assert_eq!(scene.found(), [(Rule::ControlState, None)]);
}

#[test]
fn twin_a_registered_root_that_a_record_loads_is_fine() {
    let mut scene = Scene::new(2);
    let other = scene.machine.clone_root();
    scene.audit.register_root(other, 0, &scene.machine).unwrap();
    scene.record(1, Event::RootLoad { root: other, pcid: 0, no_flush: false });
    // The load may not have been carried out yet.
    scene.quiesce();
    let state = scene.machine.cpus[1].unwrap();
    scene.machine.cpus[1] = Some(CpuState { cr3: other.0, ..state });
    scene.quiesce();
    scene.flush(1, Flush::NonGlobal);
    scene.quiesce();
    scene.assert_clean(&[Rule::ControlState]);
}

#[test]
fn global_translations_of_a_root_that_was_taken_off_are_still_owed() {
    for flushed in [false, true] {
        let mut scene = Scene::new(1);
        let block = scene.block(1);
        let (root, other) = (scene.machine.root, scene.machine.clone_root());
        scene.audit.register_root(other, 0, &scene.machine).unwrap();
        scene.record(0, Event::RootLoad { root: other, pcid: 0, no_flush: false });
        scene.record(0, Event::RootLoad { root, pcid: 0, no_flush: false });
        scene.life(Life::HandedOut, first(block, 1));
        assert_eq!(scene.audit.unregister_root(other), Ok(()));
        if flushed {
            scene.flush_all(Flush::Everything);
        }
        // The first root's own entry is cleared and flushed for its own address alone.
        scene.unmap_block(block);
        let va = direct_map(block.start().gpa());
        if flushed {
            scene.flush(0, Flush::Pages { va, count: 1, level: Level::Pd });
        }
        scene.op(0, OpKind::Seal, block).unwrap();
        let stale = scene.found().contains(&(Rule::StaleDirectMap, Some(block.start())));
        assert_eq!(stale, !flushed);
    }
}

#[test]
fn changes_of_control_registers_are_followed() {
    let mut scene = Scene::new(1);
    let cr4 = ControlPolicy::CR4_PGE;
    let event = Event::Control { register: ControlRegister::Cr4, old: cr4, new: 0 };
    let block = scene.block(1);
    scene.unmap_block(block);
    scene.record(0, event);
    scene.op(0, OpKind::Seal, block).unwrap();
    assert_eq!(scene.checked(Rule::StaleDirectMap), block.count());
    assert_eq!(scene.found(), [], "a change of PGE flushes everything");
}

#[test]
fn a_table_that_may_be_cached_is_not_used_for_a_root_that_is_registered() {
    for flushed in [false, true] {
        let mut scene = Scene::new(1);
        let table = scene.machine.new_table();
        let block = scene.block(1);
        let va = direct_map(block.start().gpa());
        scene.write(0, va, Level::Pd, 1, Entry::new(table.frame(), Entry::TABLE));
        scene.write(0, va, Level::Pd, 1, Entry::EMPTY);
        if flushed {
            scene.flush_all(Flush::Everything);
        }
        scene.audit.register_root(table, 0, &scene.machine).unwrap();
        let stale = scene.found().contains(&(Rule::StaleTable, Some(table.frame())));
        assert_eq!(stale, !flushed);
    }
}
