//! Window addresses that get a new translation because another table is linked: with the seal off
//! only the guest's own flushes stand in between.

use super::*;

/// A window whose first address maps the first frame of an open block, and a table that maps this
/// frame of the block there instead.
fn window_and_table(frame: u64) -> (Scene, Entry) {
    let mut scene = Scene::with_seal(1, Denial::NotEnforced);
    let block = scene.block(1);
    scene.flip(block);
    scene.flush(0, Flush::NonGlobal);
    scene.op(0, OpKind::Open, block).unwrap();
    scene.write(0, window(0), Level::Pt, 1, Entry::new(block.start(), Entry::DATA));
    let table = scene.machine.new_table();
    let entry = Entry::new(block.start().wrapping_add(frame), Entry::DATA);
    scene.machine.tables.insert(table.0, entry.0);
    scene.assert_clean(&[Rule::StaleWindow]);
    (scene, Entry::new(table.frame(), Entry::TABLE))
}

#[test]
fn a_window_that_is_remapped_by_another_table_is_stale() {
    let (mut scene, link) = window_and_table(1);
    scene.write(0, window(0), Level::Pd, 1, link);
    assert_eq!(scene.found(), [(Rule::StaleWindow, Some(scene.block(1).start()))]);
}

#[test]
fn the_same_after_the_old_table_was_unlinked_without_a_flush() {
    for flushed in [true, false] {
        let (mut scene, link) = window_and_table(1);
        let before = scene.checked(Rule::StaleWindow);
        scene.write(0, window(0), Level::Pd, 1, Entry::EMPTY);
        if flushed {
            scene.flush(0, Flush::NonGlobal);
        }
        scene.write(0, window(0), Level::Pd, 1, link);
        let stale = (Rule::StaleWindow, Some(scene.block(1).start()));
        assert_eq!(scene.found(), if flushed { vec![] } else { vec![stale] });
        assert_eq!(scene.checked(Rule::StaleWindow), before + 1);
    }
}

#[test]
fn a_window_whose_entry_was_cleared_without_a_flush_is_stale_by_another_table_too() {
    for flushed in [true, false] {
        let (mut scene, link) = window_and_table(1);
        scene.write(0, window(0), Level::Pt, 1, Entry::EMPTY);
        if flushed {
            scene.flush(0, Flush::Pages { va: window(0), count: 1, level: Level::Pt });
        }
        scene.write(0, window(0), Level::Pd, 1, link);
        let stale = (Rule::StaleWindow, Some(scene.block(1).start()));
        assert_eq!(scene.found(), if flushed { vec![] } else { vec![stale] });
    }
}

#[test]
fn a_table_that_maps_what_the_window_mapped_remaps_nothing() {
    let (mut scene, link) = window_and_table(0);
    scene.write(0, window(0), Level::Pd, 1, link);
    scene.assert_clean(&[Rule::StaleWindow]);
}

#[test]
fn a_large_page_of_a_window_and_a_table_in_its_place_are_told_apart_by_their_frames() {
    for same in [true, false] {
        let (mut scene, link) = window_and_table(if same { 0 } else { 1 });
        let block = scene.block(1);
        let va = window(0).wrapping_add(BLOCK_SIZE);
        scene.write(0, va, Level::Pd, 1, Entry::new(block.start(), BLOCK_ENTRY));
        scene.assert_clean(&[Rule::StaleWindow]);
        scene.write(0, va, Level::Pd, 1, link);
        let stale = (Rule::StaleWindow, Some(block.start()));
        assert_eq!(scene.found(), if same { vec![] } else { vec![stale] });
    }
}

#[test]
fn a_link_that_gains_rights_remaps_nothing_of_what_was_revoked_before_it() {
    let (mut scene, _) = window_and_table(1);
    let frame = scene.block(1).start();
    // Fewer rights are owed, but the frame stays.
    scene.write(0, window(0), Level::Pt, 1, Entry::new(frame, Entry::READ_ONLY));
    let root = scene.machine.root;
    let at = locate(&scene.machine, root, window(0), Level::Pd).unwrap();
    let link = scene.machine.read_entry(at).unwrap();
    scene.write(0, window(0), Level::Pd, 1, Entry(link.0 | Entry::USER));
    assert!(
        scene.found().iter().all(|(rule, _)| *rule != Rule::StaleWindow),
        "{:?}",
        scene.found()
    );
}
