//! Rules about the state of frames, contents, the second stage and registers.

use super::*;

#[test]
fn a_secret_frame_that_the_second_stage_lets_through_is_found_at_quiesce() {
    let mut scene = Scene::new(1);
    let block = scene.block(1);
    scene.flip(block);
    scene.quiesce();
    scene.assert_clean(&[Rule::SecondStageOpen]);
    let frame = block.start().wrapping_add(7);
    scene.machine.denials.insert(frame, Denial::Open);
    scene.quiesce();
    assert_eq!(scene.found(), [(Rule::SecondStageOpen, Some(frame))]);
}

#[test]
fn what_is_held_open_or_not_enforced_is_not_checked_and_what_is_open_is_not_judged() {
    for seal in [Denial::HeldOpen, Denial::NotEnforced] {
        let mut scene = Scene::new(1);
        let block = scene.block(1);
        scene.seal = seal;
        scene.flip(block);
        scene.flush(0, Flush::NonGlobal);
        scene.op(0, OpKind::Open, first(block, 2)).unwrap();
        let before = scene.audit.result().tally(Rule::SecondStageOpen);
        scene.quiesce();
        let after = scene.audit.result().tally(Rule::SecondStageOpen);
        assert_eq!(after.not_checked - before.not_checked, BLOCK_FRAMES - 2);
        assert_eq!(after.checked, before.checked);
        scene.assert_clean(&[]);
    }
}

#[test]
fn frames_pooled_without_a_seal_are_found_and_so_is_their_opening() {
    let mut scene = Scene::new(1);
    let block = scene.block(1);
    scene.unmap_block(block);
    scene.flush(0, Flush::Everything);
    scene.life(Life::PooledZero, block);
    assert_eq!(scene.found(), [(Rule::SecondStageOpen, Some(block.start()))]);
    assert!(scene.audit.result().findings[0].detail.starts_with("512 frames"));
    assert_eq!(scene.op(0, OpKind::Open, first(block, 1)), Err(Status::NotSecret));
    assert_eq!(scene.op(0, OpKind::Release, block), Err(Status::NotSecret));
}

#[test]
fn a_frame_freed_while_it_is_open_is_found() {
    let mut scene = Scene::new(1);
    let block = scene.block(1);
    scene.flip(block);
    let open = FrameRange::single(block.start().wrapping_add(3));
    scene.life(Life::Freed, block);
    scene.assert_clean(&[Rule::SecondStageOpen]);
    scene.op(0, OpKind::Open, open).unwrap();
    scene.life(Life::Freed, block);
    assert_eq!(scene.found(), [(Rule::SecondStageOpen, Some(open.start()))]);
    assert_eq!(scene.op(0, OpKind::Release, block), Err(Status::StillOpen));
}

#[test]
fn a_frame_released_while_it_is_in_the_pool_is_found_at_quiesce() {
    let mut scene = Scene::new(1);
    let block = scene.block(1);
    scene.flip(block);
    scene.op(0, OpKind::Release, first(block, 1)).unwrap();
    scene.quiesce();
    assert_eq!(scene.found(), [(Rule::SecondStageOpen, Some(block.start()))]);
}

#[test]
fn frames_outside_the_zone_are_refused_and_never_pooled() {
    let mut scene = Scene::new(1);
    let zone = scene.machine.layout.zone_frames();
    let across = FrameRange::new(Gfn(zone.end().0 - 1), 2).unwrap();
    let huge = FrameRange::new(Gfn(0), 1 << 40).unwrap();
    for kind in [OpKind::Seal, OpKind::Open, OpKind::Release] {
        assert_eq!(scene.op(0, kind, across), Err(Status::NotInZone));
        assert_eq!(scene.op(0, kind, huge), Err(Status::NotInZone));
        assert_eq!(scene.op(9, kind, zone), Err(Status::BadState));
    }
    scene.assert_clean(&[]);
    scene.life(Life::Pooled, FrameRange::single(zone.end()));
    assert_eq!(scene.found(), [(Rule::SecondStageOpen, Some(zone.end()))]);
}

#[test]
fn opens_are_counted_up_to_their_limit() {
    let mut scene = Scene::new(2);
    let block = scene.block(1);
    scene.flip(block);
    let frame = first(block, 1);
    for _ in 0..255 {
        scene.op(0, OpKind::Open, frame).unwrap();
    }
    assert_eq!(scene.op(0, OpKind::Open, frame), Err(Status::TooManyOpens));
    assert_eq!(scene.op(1, OpKind::Open, frame), Ok(()));
    assert_eq!(scene.audit.frames().open_count(frame.start(), 0), 255);
}

#[test]
fn a_page_handed_out_as_zero_is_judged_at_its_first_open_only() {
    for (dirty, life, expected) in [
        (false, Life::HandedOutZero, 0),
        (true, Life::HandedOutZero, 1),
        (true, Life::HandedOut, 0),
    ] {
        let mut scene = Scene::new(1);
        let block = scene.block(1);
        scene.flip(block);
        let page = first(block, 1);
        scene.life(life, page);
        if dirty {
            scene.machine.dirty.insert(page.start());
        }
        scene.use_window(page, 0);
        scene.machine.dirty.insert(page.start());
        scene.use_window(page, 1);
        assert_eq!(scene.found(), vec![(Rule::Residue, Some(page.start())); expected]);
        assert_eq!(scene.checked(Rule::Residue), u64::from(life == Life::HandedOutZero));
    }
}

#[test]
fn a_page_marked_zero_in_the_pool_is_judged_at_quiesce() {
    let mut scene = Scene::new(1);
    let block = scene.block(1);
    scene.flip(block);
    scene.quiesce();
    scene.assert_clean(&[Rule::Residue]);
    let frame = block.start().wrapping_add(4);
    scene.machine.dirty.insert(frame);
    scene.life(Life::Pooled, FrameRange::single(frame));
    scene.quiesce();
    scene.assert_clean(&[Rule::Residue]);
    scene.life(Life::PooledZero, FrameRange::single(frame));
    scene.quiesce();
    assert_eq!(scene.found(), [(Rule::Residue, Some(frame))]);
}

#[test]
fn a_frame_is_released_as_zero_or_found_and_a_hidden_one_is_not_checked() {
    let mut scene = Scene::new(1);
    let block = scene.block(1);
    scene.flip(block);
    let (dirty, hidden) = (block.start().wrapping_add(2), block.start().wrapping_add(5));
    scene.machine.dirty.extend([dirty, hidden]);
    scene.machine.hidden.insert(hidden);
    scene.flip_back(block);
    assert_eq!(scene.found(), [(Rule::Residue, Some(dirty))]);
    let tally = scene.audit.result().tally(Rule::Residue);
    assert_eq!((tally.checked, tally.not_checked), (BLOCK_FRAMES - 1, 1));
}

#[test]
fn every_register_that_differs_is_found_once() {
    type Change = fn(&mut CpuState);
    let changes: [(&str, Change); 11] = [
        ("CR0", |s| s.cr0 &= !ControlPolicy::CR0_WP),
        ("CR0", |s| s.cr0 &= !ControlPolicy::CR0_PG),
        ("CR4", |s| s.cr4 &= !ControlPolicy::CR4_PGE),
        ("CR4", |s| s.cr4 |= ControlPolicy::CR4_PCIDE),
        ("CR4", |s| s.cr4 |= ControlPolicy::CR4_LA57),
        ("CR4", |s| s.cr4 |= ControlPolicy::CR4_PKS),
        ("IA32_EFER", |s| s.efer &= !ControlPolicy::EFER_NXE),
        ("IA32_EFER", |s| s.efer |= ControlPolicy::EFER_TCE),
        ("CR3", |s| s.cr3 += PAGE_SIZE),
        ("IDTR", |s| s.idt_base = 8),
        ("GDTR", |s| s.gdt_limit = 9),
    ];
    for (name, change) in changes {
        let mut scene = Scene::new(2);
        scene.quiesce();
        scene.assert_clean(&[Rule::ControlState]);
        change(scene.machine.cpus[1].as_mut().unwrap());
        scene.quiesce();
        scene.quiesce();
        let findings = scene.audit.result().findings;
        assert_eq!(findings.len(), 1, "{findings:?}");
        assert_eq!((findings[0].rule, findings[0].cpu), (Rule::ControlState, Some(1)));
        assert!(findings[0].detail.starts_with(name), "{}", findings[0].detail);
    }
}

#[test]
fn registers_that_cannot_be_read_are_not_checked() {
    let mut scene = Scene::new(1);
    scene.machine.cpus[0] = None;
    scene.quiesce();
    let tally = scene.audit.result().tally(Rule::ControlState);
    assert_eq!((tally.checked, tally.not_checked), (0, 6));
}

#[test]
fn loading_a_root_that_is_not_registered_is_found() {
    let mut scene = Scene::new(1);
    let root = scene.machine.root;
    scene.record(0, Event::RootLoad { root, pcid: 0, no_flush: false });
    scene.assert_clean(&[Rule::ControlState]);
    let root = Gpa(0x5000);
    scene.record(0, Event::RootLoad { root, pcid: 0, no_flush: false });
    assert_eq!(scene.found(), [(Rule::ControlState, None)]);
}

#[test]
fn a_leak_that_the_scanner_reports_is_a_violation() {
    let mut scene = Scene::new(1);
    scene.audit.count_leak_search(10, 2);
    scene.assert_clean(&[Rule::InputLeak]);
    scene.audit.report_leak(0, Some(Gfn(5)), "16 bytes of the input".to_owned(), 3);
    assert_eq!(scene.found(), [(Rule::InputLeak, Some(Gfn(5)))]);
}

#[test]
fn numbers_out_of_order_and_cpus_that_do_not_exist_are_inconclusive() {
    let mut scene = Scene::new(1);
    scene.flush(0, Flush::NonGlobal);
    scene.seq = 0;
    scene.flush(0, Flush::NonGlobal);
    scene.flush(7, Flush::NonGlobal);
    assert_eq!(scene.audit.result().inconclusive.len(), 2);
}

#[test]
fn tables_that_lead_back_to_themselves_are_inconclusive_and_end() {
    let mut scene = Scene::new(1);
    let root = scene.machine.root;
    for index in 0..256 {
        scene.machine.tables.insert(root.0 + 8 * index, Entry::new(root.frame(), Entry::TABLE).0);
    }
    scene.quiesce();
    assert_eq!(scene.audit.result().inconclusive.len(), 1);
}

#[test]
fn relinking_large_trees_over_and_over_is_cut_short_and_inconclusive() {
    let mut scene = Scene::new(1);
    let root = scene.machine.root;
    let place = locate(&scene.machine, root, window(0), Level::Pml4).unwrap();
    let linked = scene.machine.read_entry(place).unwrap();
    let va = window(0).align_down(Level::Pml4.span());
    scene.write(0, va, Level::Pml4, 1, linked);
    assert!(scene.audit.link_work > 0);
    scene.assert_clean(&[]);
    scene.audit.link_work = MAX_LINK_WORK;
    scene.write(0, va, Level::Pml4, 1, linked);
    assert_eq!(scene.audit.result().inconclusive.len(), 1);
    scene.quiesce();
    assert_eq!(scene.audit.link_work, 0);
}
