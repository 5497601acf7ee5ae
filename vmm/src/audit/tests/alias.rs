//! Rules about what is mapped where: a clean case and one that breaks the rule.

use super::*;

#[test]
fn a_block_that_stays_in_the_direct_map_is_found_once_when_it_is_sealed() {
    let mut scene = Scene::new(1);
    let block = scene.block(1);
    scene.op(0, OpKind::Seal, block).unwrap();
    scene.quiesce();
    scene.quiesce();
    scene.assert_found(Rule::DirectMapAlias, block.start());
    assert_eq!(scene.audit.result().tally(Rule::DirectMapAlias).violations, 1);
}

#[test]
fn a_secret_frame_mapped_back_into_the_direct_map_is_found_at_the_record() {
    let mut scene = Scene::new(1);
    let block = scene.block(1);
    scene.flip(block);
    scene.assert_clean(&[Rule::DirectMapAlias]);
    let entry = Entry::new(block.start(), BLOCK_ENTRY);
    scene.write(0, direct_map(block.start().gpa()), Level::Pd, 1, entry);
    scene.assert_found(Rule::DirectMapAlias, block.start());
}

#[test]
fn one_small_page_left_in_the_direct_map_is_named_exactly() {
    let mut scene = Scene::new(1);
    let block = scene.block(1);
    let va = direct_map(block.start().gpa());
    let table = scene.machine.new_table();
    for index in 0..512 {
        let frame = block.start().wrapping_add(index);
        let entry = Entry::new(frame, Entry::DATA | Entry::GLOBAL);
        scene.machine.tables.insert(table.0 + 8 * index, entry.0);
    }
    scene.write(0, va, Level::Pd, 1, Entry::new(table.frame(), Entry::TABLE));
    // Entries 0 to 15 are to become secret; entry 7 is forgotten.
    scene.write(0, va, Level::Pt, 7, Entry::EMPTY);
    scene.write(0, va.wrapping_add(8 * PAGE_SIZE), Level::Pt, 8, Entry::EMPTY);
    scene.flush_all(Flush::Everything);
    scene.op(0, OpKind::Seal, first(block, 7)).unwrap();
    scene.assert_clean(&[Rule::DirectMapAlias, Rule::StaleDirectMap]);
    scene.op(0, OpKind::Seal, first(block, 16)).unwrap();
    let forgotten = block.start().wrapping_add(7);
    assert_eq!(
        scene.found(),
        [(Rule::DirectMapAlias, Some(forgotten)), (Rule::GlobalWindow, Some(forgotten))]
    );
}

#[test]
fn a_window_of_a_cpu_that_has_not_opened_the_frame_is_foreign() {
    let mut scene = Scene::new(2);
    let block = scene.block(1);
    scene.flip(block);
    let frame = first(block, 1);
    scene.op(0, OpKind::Open, frame).unwrap();
    let entry = Entry::new(frame.start(), Entry::DATA);
    scene.write(0, window(0).wrapping_add(0x1f_0000), Level::Pt, 1, entry);
    scene.write(0, window(0).wrapping_add(0x1f_0000), Level::Pt, 1, Entry::EMPTY);
    scene.assert_clean(&[Rule::ForeignAlias]);
    scene.write(0, window(1), Level::Pt, 1, entry);
    scene.assert_found(Rule::ForeignAlias, frame.start());
}

#[test]
fn a_window_entry_that_is_left_when_its_frame_is_sealed_is_foreign() {
    let mut scene = Scene::new(1);
    let block = scene.block(1);
    scene.flip(block);
    scene.flush(0, Flush::NonGlobal);
    let frame = first(block, 1);
    scene.op(0, OpKind::Open, frame).unwrap();
    scene.write(0, window(0), Level::Pt, 1, Entry::new(frame.start(), Entry::DATA));
    scene.assert_clean(&[Rule::ForeignAlias, Rule::GlobalWindow]);
    scene.op(0, OpKind::Seal, frame).unwrap();
    scene.assert_found(Rule::ForeignAlias, frame.start());
}

#[test]
fn a_global_window_entry_is_found_at_its_record() {
    let mut scene = Scene::new(1);
    let block = scene.block(1);
    scene.flip(block);
    scene.flush(0, Flush::NonGlobal);
    scene.op(0, OpKind::Open, block).unwrap();
    let entry = Entry::new(block.start(), Entry::DATA | Entry::GLOBAL);
    scene.write(0, window(0), Level::Pt, 1, entry);
    assert_eq!(scene.found(), [(Rule::GlobalWindow, Some(block.start()))]);
}

#[test]
fn a_mapping_that_only_memory_shows_is_an_alias_and_a_lie() {
    let mut scene = Scene::new(1);
    let block = scene.block(1);
    scene.flip(block);
    scene.quiesce();
    scene.assert_clean(&[Rule::TraceHonesty]);
    scene.store(window(0), Level::Pt, 1, Entry::new(block.start(), Entry::DATA));
    scene.quiesce();
    scene.assert_found(Rule::ForeignAlias, block.start());
    scene.assert_found(Rule::TraceHonesty, block.start());
    scene.quiesce();
    assert_eq!(scene.audit.result().tally(Rule::TraceHonesty).violations, 1);
}

#[test]
fn a_record_without_its_store_is_a_lie_and_a_standing_intent_is_none() {
    let mut scene = Scene::new(1);
    let block = scene.block(1);
    scene.flush(0, Flush::NonGlobal);
    let announced = scene.store(window(0), Level::Pt, 2, Entry::new(block.start(), Entry::DATA));
    scene.machine.intents[0] = Some(announced);
    scene.quiesce();
    scene.assert_clean(&[Rule::TraceHonesty]);
    scene.machine.intents[0] = None;
    scene.record(0, Event::EntryWrite(announced));
    scene.quiesce();
    scene.assert_clean(&[Rule::TraceHonesty]);
    let cleared = EntryWrite { old: announced.new, new: Entry::EMPTY, ..announced };
    scene.record(0, Event::EntryWrite(cleared));
    scene.quiesce();
    scene.assert_found(Rule::TraceHonesty, block.start());
    assert_eq!(scene.audit.result().tally(Rule::TraceHonesty).violations, 2);
}

#[test]
fn an_intent_explains_only_the_entries_that_it_names() {
    let mut scene = Scene::new(1);
    let frame = scene.block(1).start();
    let announced = scene.store(window(0), Level::Pt, 1, Entry::new(frame, Entry::DATA));
    let other = Entry::new(frame.wrapping_add(9), Entry::DATA);
    scene.store(window(0).wrapping_add(PAGE_SIZE), Level::Pt, 1, other);
    scene.machine.intents[0] = Some(announced);
    scene.quiesce();
    assert_eq!(scene.found(), [(Rule::TraceHonesty, Some(frame.wrapping_add(9)))]);

    let mut scene = Scene::new(1);
    let announced = scene.store(window(0), Level::Pt, 1, Entry::new(frame, Entry::DATA));
    scene.machine.intents[0] = Some(EntryWrite { root: Gpa(0x5000), ..announced });
    scene.quiesce();
    assert_eq!(scene.found(), [(Rule::TraceHonesty, Some(frame))]);
}

#[test]
fn a_writable_mapping_of_a_table_elsewhere_is_found_and_a_read_only_one_is_not() {
    let mut scene = Scene::new(1);
    let table = scene.machine.root.frame();
    scene.write(0, window(0), Level::Pt, 1, Entry::new(table, Entry::READ_ONLY));
    scene.assert_clean(&[Rule::TableAlias]);
    scene.flush(0, Flush::NonGlobal);
    scene.write(0, window(0), Level::Pt, 1, Entry::EMPTY);
    scene.flush(0, Flush::NonGlobal);
    scene.write(0, window(0), Level::Pt, 1, Entry::new(table, Entry::DATA));
    assert_eq!(scene.found(), [(Rule::TableAlias, Some(table))]);
}

#[test]
fn a_table_outside_the_pool_is_found() {
    let mut scene = Scene::new(1);
    let outside = scene.block(0).start();
    let va = window(0).wrapping_add(lacuna_abi::layout::WINDOW_LARGE_OFFSET);
    scene.write(0, va, Level::Pd, 1, Entry::new(outside, Entry::TABLE));
    scene.quiesce();
    assert_eq!(scene.found(), [(Rule::TableAlias, Some(outside))]);
}

#[test]
fn text_that_becomes_writable_elsewhere_is_found_from_either_side() {
    let text = Machine::new(1).layout.image.gpa.frame();
    let mut scene = Scene::new(1);
    scene.write(0, window(0), Level::Pt, 1, Entry::new(text, Entry::READ_ONLY));
    scene.quiesce();
    scene.assert_clean(&[Rule::WriteExecute]);
    let va = window(0).wrapping_add(PAGE_SIZE);
    scene.write(0, va, Level::Pt, 1, Entry::new(text, Entry::DATA));
    scene.quiesce();
    assert_eq!(scene.found(), [(Rule::WriteExecute, Some(text))]);

    let mut scene = Scene::new(1);
    let frame = scene.block(3).start().wrapping_add(5);
    scene.write(0, window(0), Level::Pt, 1, Entry::new(frame, Entry::TEXT));
    assert_eq!(scene.found(), [(Rule::WriteExecute, Some(frame))]);
}

#[test]
fn ring_three_access_needs_the_bit_at_every_level_to_be_found() {
    let mut scene = Scene::new(1);
    let frame = scene.block(3).start();
    let user = Entry::new(frame, Entry::DATA | Entry::USER);
    scene.write(0, window(0), Level::Pt, 1, user);
    scene.assert_clean(&[Rule::UserAccess]);
    for level in [Level::Pml4, Level::Pdpt, Level::Pd] {
        let place = locate(&scene.machine, scene.machine.root, window(0), level).unwrap();
        *scene.machine.tables.get_mut(&place.0).unwrap() |= Entry::USER;
    }
    scene.quiesce();
    scene.assert_found(Rule::UserAccess, frame);
}

#[test]
fn a_second_root_is_judged_like_the_first() {
    let mut scene = Scene::new(1);
    let block = scene.block(1);
    scene.flip(block);
    let other = scene.machine.clone_root();
    let seq = scene.seq;
    scene.audit.register_root(other, 1, &scene.machine).unwrap();
    scene.quiesce();
    scene.assert_clean(&[Rule::DirectMapAlias]);
    assert_eq!(scene.audit.unregister_root(other), Ok(()));
    scene.machine.tables.insert(other.0, 0);
    let pdpt = scene.machine.new_table();
    scene.machine.tables.insert(other.0, Entry::new(pdpt.frame(), Entry::TABLE).0);
    let gig = Entry::new(block.start(), BLOCK_ENTRY);
    scene.machine.tables.insert(pdpt.0, gig.0);
    scene.audit.register_root(other, 1, &scene.machine).unwrap();
    scene.assert_found(Rule::ForeignAlias, block.start());
    let found = &scene.audit.result().findings[0];
    assert_eq!((found.root, found.va), (Some(other), Some(Gva(0))));
    assert!(found.seq >= seq.saturating_sub(1));
}

#[test]
fn roots_that_cannot_be_are_refused() {
    let mut scene = Scene::new(1);
    let outside = scene.machine.layout.zone.gpa;
    let mut register = |root, pcid| scene.audit.register_root(root, pcid, &scene.machine);
    assert_eq!(register(outside, 0), Err(Status::BadRoot));
    assert_eq!(register(scene.machine.root.wrapping_add(8), 0), Err(Status::BadRoot));
    assert_eq!(register(scene.machine.root, 7), Err(Status::BadRoot));
    assert_eq!(register(scene.machine.root, 0), Ok(()));
    assert_eq!(scene.audit.unregister_root(outside), Err(Status::BadRoot));
    assert_eq!(scene.audit.unregister_root(scene.machine.root), Err(Status::BadState));
}
