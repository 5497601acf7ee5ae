//! Stories of translations that may still be cached.

use super::*;

/// Unmaps a block, flushes as told, seals; the story of what is stale.
fn flipped(cpus: usize, before: &[(u8, Flush)], after: &[(u8, Flush)]) -> Vec<Step> {
    let mut scene = Scene::new(cpus);
    let block = scene.block(1);
    before.iter().for_each(|(cpu, flush)| scene.flush(*cpu, *flush));
    scene.unmap_block(block);
    after.iter().for_each(|(cpu, flush)| scene.flush(*cpu, *flush));
    scene.op(0, OpKind::Seal, block).unwrap();
    story(&scene, Rule::StaleDirectMap)
}

#[test]
fn without_a_flush_there_are_the_first_tables_the_revoke_and_the_call() {
    let steps = flipped(1, &[], &[]);
    let expected =
        [(None, What::Made), (Some(1), What::Revoked), (None, What::Mattered), (None, What::Right)];
    assert_eq!(outline(&steps), expected);
    assert_eq!((steps[1].site, steps[1].cpu), (Some(SITES + 1), Some(0)));
    let mapped = "the VMM mapped the frame 0x100200000 (2 MiB, writable, global)";
    assert_says(&steps, What::Made, &["before the guest started", mapped]);
    assert_says(&steps, What::Revoked, &["cleared the entry for 0xffff888100200000"]);
    assert_says(&steps, What::Mattered, &["to seal 512 frames from 0x100200000", "CPU 0 may"]);
    assert_says(&steps, What::Right, &["on CPU 0, between event 1 and the call", "INVLPG"]);
}

#[test]
fn a_flush_before_the_revoke_came_too_early() {
    let steps = flipped(1, &[(0, Flush::Everything)], &[]);
    assert_eq!(outline(&steps)[1..3], [(Some(1), What::Flush), (Some(2), What::Revoked)]);
    assert_says(&steps, What::Flush, &["does not count", "before the revoke"]);
}

#[test]
fn a_flush_long_before_the_revoke_is_none_of_the_story() {
    let early: Vec<_> =
        [(0, Flush::Everything)].into_iter().chain([(1, Flush::NonGlobal); 40]).collect();
    let steps = flipped(2, &early, &[(1, Flush::Everything)]);
    assert_eq!(texts(&steps, What::Flush).len(), 1, "that of the other CPU: {steps:#?}");
}

#[test]
fn each_flush_after_the_revoke_says_why_it_does_not_count() {
    let other = direct_map(Gpa(0x1_0040_0000));
    for (flush, why) in [
        (Flush::NonGlobal, "it spares global translations, and this one was global"),
        (Flush::AllPcids, "it spares global translations"),
        (Flush::Pcid(0), "it spares global translations"),
        (Flush::Pages { va: other, count: 3, level: Level::Pt }, "it is of another address"),
    ] {
        let steps = flipped(1, &[], &[(0, flush)]);
        assert_eq!(outline(&steps)[2], (Some(2), What::Flush));
        assert_eq!(steps[2].site, Some(SITES + 2));
        assert_says(&steps, What::Flush, &["does not count", why]);
    }
    assert_says(&flipped(1, &[], &[]), What::Right, &["a CR3 load spares what is global"]);
}

#[test]
fn a_flush_on_another_cpu_removes_nothing_of_this_one() {
    let steps = flipped(2, &[], &[(0, Flush::Everything)]);
    assert_eq!(outline(&steps)[2], (Some(2), What::Flush));
    assert_eq!(steps[2].cpu, Some(0));
    assert_says(&steps, What::Flush, &["removes nothing of what CPU 1 caches"]);
    assert_says(&steps, What::Right, &["on CPU 1, between event 1 and the call"]);
    let steps = flipped(3, &[], &[(0, Flush::Everything), (1, Flush::Everything)]);
    assert_says(&steps, What::Flush, &["up to event 3, 2 flushes on CPUs 0, 1: none removes"]);
}

#[test]
fn many_flushes_are_told_by_their_ends() {
    let steps = flipped(1, &[], &[(0, Flush::NonGlobal); 1000]);
    let kinds = outline(&steps);
    let flushes = |from: u64| [(Some(from), What::Flush), (Some(from + 1), What::Flush)];
    assert_eq!(kinds[2..4], flushes(2));
    assert_eq!(kinds[4], (None, What::LeftOut));
    assert_eq!(kinds[5..7], flushes(1000));
    assert_says(&steps, What::LeftOut, &["996 more"]);
}

#[test]
fn a_shootdown_that_was_acknowledged_without_the_right_flush_is_told() {
    let mut scene = Scene::new(2);
    let block = scene.block(1);
    scene.unmap_block(block);
    scene.flush(0, Flush::Everything);
    scene.flush(1, Flush::NonGlobal);
    scene.record(1, Event::ShootdownAck(7));
    scene.op(0, OpKind::Seal, block).unwrap();
    let steps = story(&scene, Rule::StaleDirectMap);
    let kinds: Vec<_> = steps.iter().map(|step| (step.cpu, step.what)).collect();
    let (zero, one) = (Some(0), Some(1));
    let flush = What::Flush;
    assert_eq!(kinds[2..5], [(zero, flush), (one, flush), (one, What::Acknowledged)]);
    assert_says(&steps, What::Acknowledged, &["acknowledged shootdown 7"]);
}

#[test]
fn a_translation_that_came_back_is_told_from_the_event_that_made_it() {
    let mut scene = Scene::new(1);
    let block = scene.block(1);
    scene.flip(block);
    scene.flip_back(block);
    let made = scene.seq;
    scene.unmap_block(block);
    scene.op(0, OpKind::Seal, block).unwrap();
    let steps = story(&scene, Rule::StaleDirectMap);
    assert_eq!(outline(&steps)[0], (Some(made), What::Made));
    assert_says(&steps, What::Made, &["mapped the frame 0x100200000 (2 MiB, writable, global)"]);
}

#[test]
fn a_translation_that_came_with_a_table_names_its_fill() {
    use lacuna_abi::event::TableFill;
    let mut scene = Scene::new(1);
    let block = scene.block(1);
    let va = direct_map(block.start().gpa());
    let table = scene.machine.new_table();
    let first = Entry::new(block.start(), Entry::DATA | Entry::GLOBAL);
    for index in 0..512 {
        let entry = first.nth_of_run(Level::Pt, index);
        scene.machine.tables.insert(table.0 + 8 * index, entry.0);
    }
    scene.record(0, Event::TableFill(TableFill { table, level: Level::Pt, first }));
    scene.write(0, va, Level::Pd, 1, Entry::new(table.frame(), Entry::TABLE));
    scene.flush(0, Flush::Everything);
    scene.write(0, va, Level::Pt, 4, Entry::EMPTY);
    let third = FrameRange::single(block.start().wrapping_add(2));
    scene.op(0, OpKind::Seal, third).unwrap();
    let steps = story(&scene, Rule::StaleDirectMap);
    assert_eq!(outline(&steps)[0], (Some(2), What::Made));
    assert_says(&steps, What::Made, &["by linking the table that event 1 had filled"]);
    assert_says(&steps, What::Revoked, &["one of 4 entries"]);
}

#[test]
fn what_is_older_than_what_is_kept_is_said() {
    let mut scene = Scene::new(1);
    let block = scene.block(1);
    scene.unmap_block(block);
    (0..70_000).for_each(|_| scene.flush(0, Flush::NonGlobal));
    scene.op(0, OpKind::Seal, block).unwrap();
    let steps = story(&scene, Rule::StaleDirectMap);
    assert_eq!(outline(&steps)[1], (Some(1), What::Revoked));
    for what in [What::Made, What::Revoked] {
        assert_says(&steps, what, &["by event 4466, of which no more is kept"]);
    }
}

#[test]
fn a_window_address_used_again_names_its_old_use_and_the_seal_that_closed_nothing() {
    let mut scene = Scene::with_seal(1, Denial::NotEnforced);
    let block = scene.block(1);
    scene.flip(block);
    scene.flush(0, Flush::NonGlobal);
    scene.use_window(first(block, 1), 4);
    let revoke = scene.seq - 2;
    let elsewhere = window(0).wrapping_add(0x9000);
    scene.flush(0, Flush::Pages { va: elsewhere, count: 1, level: Level::Pt });
    scene.use_window(FrameRange::single(block.start().wrapping_add(9)), 4);
    let steps = story(&scene, Rule::StaleWindow);
    let kinds: Vec<_> = steps.iter().map(|step| step.what).collect();
    use What::{Flush as Flushed, Made, Mattered, Revoked, Right, Sealed};
    assert_eq!(kinds, [Made, Revoked, Sealed, Flushed, Mattered, Right]);
    assert_eq!((steps[0].seq, steps[1].seq), (Some(revoke - 1), Some(revoke)));
    assert_says(&steps, Sealed, &["does not count, because the seal is off"]);
    assert_says(&steps, Flushed, &["it is of another address"]);
    assert_says(&steps, Mattered, &["mapped the frame 0x100209000", "the old frame"]);
    assert_says(&steps, Right, &["on CPU 0, between event", "a CR3 load"]);
    assert!(steps[4].site.is_some(), "the code that used it again");
}

#[test]
fn a_table_freed_too_early_names_its_link_its_unlink_and_the_free() {
    let mut scene = Scene::new(2);
    let block = scene.block(1);
    let va = direct_map(block.start().gpa());
    let table = scene.machine.new_table();
    scene.write(0, va, Level::Pd, 1, Entry::new(table.frame(), Entry::TABLE));
    scene.write(0, va, Level::Pd, 1, Entry::new(block.start(), GLOBAL_BLOCK));
    scene.flush(0, Flush::Everything);
    scene.life(Life::TableFreed, FrameRange::single(table.frame()));
    let steps = story(&scene, Rule::StaleTable);
    let numbers = [Some(1), Some(2), Some(3), Some(4), None];
    use What::{Flush as Flushed, Made, Mattered, Revoked, Right};
    let kinds = [Made, Revoked, Flushed, Mattered, Right];
    assert!(outline(&steps).into_iter().eq(numbers.into_iter().zip(kinds)), "{steps:#?}");
    assert_says(&steps, Made, &["linked the table at"]);
    assert_says(&steps, Flushed, &["removes nothing of what CPU 1 caches"]);
    assert_says(&steps, Right, &["on CPU 1", "and only then to free the page"]);
}

#[test]
fn a_table_freed_while_it_is_linked_names_its_link() {
    let mut scene = Scene::new(1);
    let va = direct_map(scene.block(1).start().gpa());
    let table = scene.machine.new_table();
    scene.write(0, va, Level::Pd, 1, Entry::new(table.frame(), Entry::TABLE));
    // It had been linked there before.
    scene.write(0, va, Level::Pd, 1, Entry::new(scene.block(1).start(), GLOBAL_BLOCK));
    scene.flush(0, Flush::Everything);
    scene.write(0, va, Level::Pd, 1, Entry::new(table.frame(), Entry::TABLE));
    scene.life(Life::TableFreed, FrameRange::single(table.frame()));
    let steps = story(&scene, Rule::StaleTable);
    let kinds = [(Some(4), What::Made), (Some(5), What::Mattered), (None, What::Right)];
    assert_eq!(outline(&steps), kinds);
    assert_says(&steps, What::Mattered, &["an entry still leads to the table"]);
}
