//! The stories of findings: which events they name, in which order, and why each flush did not
//! count.

use super::*;
use crate::audit::{Step, What};
use lacuna_abi::event::ControlRegister;

const GLOBAL_BLOCK: u64 = BLOCK_ENTRY | Entry::GLOBAL;

/// The story of the first finding of a rule.
#[track_caller]
fn story(scene: &Scene, rule: Rule) -> Vec<Step> {
    let findings = scene.audit.result().findings;
    let finding = findings.into_iter().find(|finding| finding.rule == rule);
    let finding = finding.unwrap_or_else(|| panic!("{} is not violated", rule.name()));
    check(&finding.story);
    finding.story
}

/// What holds for every story.
#[track_caller]
fn check(steps: &[Step]) {
    assert!(steps.len() <= 24, "{steps:#?}");
    let ends: Vec<What> = steps.iter().rev().map(|step| step.what).take(2).collect();
    assert_eq!(ends, [What::Right, What::Mattered], "{steps:#?}");
    let numbers = steps.iter().filter_map(|step| step.seq);
    assert!(numbers.is_sorted(), "{steps:#?}");
    for step in steps {
        assert!(!step.text.is_empty());
        if let Some((site, seq)) = step.site.zip(step.seq) {
            assert_eq!(u64::from(site - SITES), seq, "{step:?}");
        }
    }
}

/// Numbers and kinds of the steps.
fn outline(steps: &[Step]) -> Vec<(Option<u64>, What)> {
    steps.iter().map(|step| (step.seq, step.what)).collect()
}

/// Texts of the steps of a kind.
fn texts(steps: &[Step], what: What) -> Vec<&str> {
    steps.iter().filter(|step| step.what == what).map(|step| step.text.as_str()).collect()
}

#[track_caller]
fn assert_says(steps: &[Step], what: What, parts: &[&str]) {
    let texts = texts(steps, what);
    for part in parts {
        assert!(texts.iter().any(|text| text.contains(part)), "{part:?} is not in {texts:#?}");
    }
}

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
    scene.life(Life::TableFreed, FrameRange::single(table.frame()));
    let steps = story(&scene, Rule::StaleTable);
    assert_eq!(outline(&steps)[0], (Some(1), What::Made));
    assert_says(&steps, What::Mattered, &["an entry still leads to the table"]);
}

#[test]
fn an_alias_in_the_direct_map_tells_who_made_it_and_since_when_the_frame_is_secret() {
    let mut scene = Scene::new(1);
    let block = scene.block(1);
    scene.op(0, OpKind::Seal, block).unwrap();
    let steps = story(&scene, Rule::DirectMapAlias);
    let kinds: Vec<_> = steps.iter().map(|step| step.what).collect();
    assert_eq!(kinds, [What::Made, What::Mattered, What::Right]);
    assert_says(&steps, What::Made, &["before the guest started", "nothing has cleared the entry"]);

    let mut scene = Scene::new(1);
    scene.flip(block);
    let last = scene.seq - 1;
    scene.write(
        0,
        direct_map(block.start().gpa()),
        Level::Pd,
        1,
        Entry::new(block.start(), BLOCK_ENTRY),
    );
    let steps = story(&scene, Rule::DirectMapAlias);
    assert_eq!(outline(&steps)[..2], [(Some(4), What::Sealed), (Some(last), What::Sealed)]);
    assert_says(&steps, What::Sealed, &["it is secret since then", "it is open on no CPU"]);
    assert_eq!(steps[2].site, Some(SITES + u32::try_from(scene.seq).unwrap()));
}

#[test]
fn a_foreign_window_says_where_the_frame_is_open() {
    let mut scene = Scene::new(2);
    let block = scene.block(1);
    scene.flip(block);
    scene.op(0, OpKind::Open, first(block, 1)).unwrap();
    scene.write(0, window(1), Level::Pt, 1, Entry::new(block.start(), Entry::DATA));
    let steps = story(&scene, Rule::ForeignAlias);
    assert_says(&steps, What::Opened, &["it is open on CPU 0 only"]);
    assert_says(&steps, What::Right, &["to open the frame on CPU 1 before"]);
}

#[test]
fn a_mapping_that_no_record_made_is_said_to_be_so() {
    let mut scene = Scene::new(1);
    let block = scene.block(1);
    scene.flip(block);
    scene.store(window(0), Level::Pt, 1, Entry::new(block.start(), Entry::DATA));
    scene.quiesce();
    let steps = story(&scene, Rule::ForeignAlias);
    assert_says(&steps, What::Made, &["no record tells who mapped"]);
    let steps = story(&scene, Rule::TraceHonesty);
    assert_says(&steps, What::Recorded, &["cleared the entry for 0xffff910000000000"]);
}

#[test]
fn the_other_rules_about_mappings_name_the_write() {
    let text = Machine::new(1).layout.image.gpa.frame();
    let mut scene = Scene::new(1);
    let root = scene.machine.root.frame();
    let frame = scene.block(3).start();
    scene.write(0, window(0), Level::Pt, 1, Entry::new(root, Entry::DATA));
    scene.flush(0, Flush::NonGlobal);
    let va = |page: u64| window(0).wrapping_add(page * PAGE_SIZE);
    scene.write(0, va(1), Level::Pt, 1, Entry::new(text, Entry::DATA));
    scene.write(0, va(2), Level::Pt, 1, Entry::new(frame, Entry::TEXT));
    scene.flip(scene.block(1));
    scene.op(0, OpKind::Open, first(scene.block(1), 1)).unwrap();
    let global = Entry::new(scene.block(1).start(), Entry::DATA | Entry::GLOBAL);
    scene.write(0, va(3), Level::Pt, 1, global);
    let number = scene.seq;
    for (rule, moment) in
        [(Rule::TableAlias, 1), (Rule::WriteExecute, 3), (Rule::GlobalWindow, number)]
    {
        let steps = story(&scene, rule);
        let mattered = steps.iter().find(|step| step.what == What::Mattered).unwrap();
        assert_eq!(mattered.seq, Some(moment), "{}: {steps:#?}", rule.name());
    }
}

#[test]
fn a_frame_that_is_pooled_unsealed_tells_its_life() {
    let mut scene = Scene::new(1);
    let block = scene.block(1);
    scene.unmap_block(block);
    scene.flush(0, Flush::Everything);
    scene.life(Life::PooledZero, block);
    let steps = story(&scene, Rule::SecondStageOpen);
    assert_says(&steps, What::Recorded, &["nothing was reported of the frame"]);
    assert_says(&steps, What::Mattered, &["into the pool as zero", "it was never sealed"]);

    let mut scene = Scene::new(1);
    scene.flip(block);
    scene.op(0, OpKind::Open, block).unwrap();
    scene.life(Life::Freed, block);
    let steps = story(&scene, Rule::SecondStageOpen);
    assert_says(&steps, What::Opened, &["had 512 frames from 0x100200000 opened"]);
    assert_says(&steps, What::Mattered, &["freed 512 frames", "the frame is still open"]);
}

#[test]
fn a_sealed_frame_that_is_not_denied_is_the_hosts_own_fault() {
    let mut scene = Scene::new(1);
    let block = scene.block(1);
    scene.flip(block);
    scene.machine.denials.insert(block.start(), Denial::Open);
    scene.quiesce();
    let steps = story(&scene, Rule::SecondStageOpen);
    assert_says(&steps, What::Right, &["the host's own duty"]);
    assert_says(&steps, What::Life, &["put 512 frames from 0x100200000 into the pool as zero"]);
}

#[test]
fn residue_names_the_hand_out_and_the_first_byte() {
    let mut scene = Scene::new(1);
    let block = scene.block(1);
    scene.flip(block);
    let page = first(block, 1);
    scene.life(Life::HandedOutZero, page);
    let handed = scene.seq;
    scene.machine.dirty.insert(page.start());
    scene.op(0, OpKind::Open, page).unwrap();
    let steps = story(&scene, Rule::Residue);
    assert!(outline(&steps).contains(&(Some(handed), What::Life)));
    assert_says(&steps, What::Life, &["handed out the frame 0x100200000 as zero"]);
    assert_says(&steps, What::Mattered, &["lies 0x123 bytes in"]);
}

#[test]
fn a_lie_about_an_entry_names_the_last_record_of_it() {
    let mut scene = Scene::new(1);
    let frame = scene.block(3).start();
    scene.write(0, window(0), Level::Pt, 1, Entry::new(frame, Entry::DATA));
    let mut write = scene.store(window(0), Level::Pt, 1, Entry::EMPTY);
    write.old = Entry::new(frame.wrapping_add(5), Entry::DATA);
    scene.record(0, Event::EntryWrite(write));
    let steps = story(&scene, Rule::TraceHonesty);
    assert_eq!(outline(&steps)[..2], [(Some(1), What::Recorded), (Some(2), What::Mattered)]);

    let mut scene = Scene::new(1);
    scene.store(window(0), Level::Pt, 1, Entry::new(frame, Entry::DATA));
    scene.quiesce();
    let steps = story(&scene, Rule::TraceHonesty);
    assert_says(&steps, What::Recorded, &["no record tells of an entry", "the first tables'"]);
}

#[test]
fn a_register_that_differs_names_the_last_records_of_its_cpu() {
    let mut scene = Scene::new(2);
    let (register, root) = (ControlRegister::Cr4, scene.machine.root);
    let change = |scene: &mut Scene, cpu, new| {
        scene.record(cpu, Event::Control { register, old: 0x80, new });
    };
    change(&mut scene, 1, 0x81);
    change(&mut scene, 0, 0x82);
    change(&mut scene, 1, 0x80);
    scene.record(1, Event::RootLoad { root, pcid: 0, no_flush: false });
    scene.machine.cpus[1].as_mut().unwrap().cr4 = 0;
    scene.quiesce();
    let steps = story(&scene, Rule::ControlState);
    assert_eq!(outline(&steps)[..2], [(Some(3), What::Recorded), (Some(4), What::Recorded)]);
    assert_says(&steps, What::Recorded, &["changed CR4 from 0x80 to 0x80", "loaded CR3"]);
}

#[test]
fn a_leak_tells_the_life_of_its_frame() {
    let mut scene = Scene::new(1);
    let block = scene.block(1);
    scene.flip(block);
    scene.op(0, OpKind::Release, block).unwrap();
    let detail = "16 bytes of the input".to_owned();
    scene.audit.report_leak(0, Some(block.start()), detail, scene.seq);
    let steps = story(&scene, Rule::InputLeak);
    assert_says(&steps, What::Released, &["secret no more"]);
}

#[test]
fn whatever_sites_and_entries_a_guest_records_every_story_is_bounded() {
    let mut scene = Scene::new(2);
    let block = scene.block(1);
    let root = scene.machine.root;
    for round in 0..3000_u64 {
        let site = u32::try_from((round * 0x9e37_79b1) & 0xffff_ffff).unwrap();
        let frame = block.start().wrapping_add(round % 512);
        let va = direct_map(frame.gpa());
        let write = EntryWrite {
            root,
            pcid: u16::try_from(round % 7).unwrap(),
            va,
            level: Level::Pt,
            count: 1,
            old: Entry::new(frame, Entry::DATA | Entry::GLOBAL),
            new: Entry(round.wrapping_mul(0x1234_5678_9abc_def1) & !(0xff << 44)),
            grant: u64::MAX,
        };
        let events = [
            Event::EntryWrite(write),
            Event::ShootdownAck(u64::MAX),
            Event::Life(Life::PooledZero, FrameRange::new(Gfn(0), 1 << 39).unwrap()),
            Event::Flush(Flush::Pages { va: Gva(u64::MAX), count: 1 << 20, level: Level::Pd }),
        ];
        for event in events {
            scene.seq += 1;
            let cpu = u8::from(round % 2 == 0);
            scene.audit.event(&Record { seq: scene.seq, cpu, site, event }, &scene.machine);
            if round > 20 {
                break;
            }
        }
    }
    _ = scene.op(0, OpKind::Seal, block);
    scene.quiesce();
    let findings = scene.audit.result().findings;
    assert_eq!(findings.len(), 100, "as many as are kept");
    for finding in findings {
        assert!(!finding.story.is_empty() && finding.story.len() <= 24);
        assert!(finding.story.iter().all(|step| step.text.len() < 1000));
    }
}
