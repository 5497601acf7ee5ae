//! The stories of findings: which events they name, in which order, and why each flush did not
//! count.

mod stale;

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
fn the_documentation_explains_every_rule_and_every_kind_of_step() {
    let rules = include_str!("../../../../../docs/how-it-checks.md");
    for rule in Rule::ALL {
        let section = format!("\n### `{}`\n\n    ", rule.name());
        assert!(
            rules.contains(&section),
            "{} has no section that starts with a picture",
            rule.name()
        );
    }
    let report = include_str!("../../../../../docs/report.md");
    for what in What::ALL {
        let name = format!("`{}`", what.name());
        assert!(rules.contains(&name) && report.contains(&name), "{name} is not explained");
    }
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
