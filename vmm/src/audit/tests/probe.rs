//! Frames that are touched on purpose: which, and what follows.

use super::*;

/// Numbers that a seed repeats.
fn draws(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut state = seed;
    move |below| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    }
}

impl Scene {
    fn choose(&mut self, count: u64, seed: u64) -> Vec<Probe> {
        let kinds = ProbeKind::ALL;
        self.audit.choose_probes(count, kinds, &mut draws(seed), &self.machine)
    }

    /// Has each touched with the outcome that `trapped` says.
    fn touched(&mut self, probes: &[Probe], trapped: impl Fn(&Probe) -> bool) {
        self.seq += 1;
        let outcome = |probe: &Probe| match trapped(probe) {
            true => Touched::Trapped,
            false => Touched::WentThrough,
        };
        let touched: Vec<_> = probes.iter().map(|probe| (*probe, outcome(probe))).collect();
        self.audit.judge_probes(&touched, self.seq, &self.machine);
    }

    fn sealed(&self, frame: Gfn) -> bool {
        self.audit.frames().may_close(frame)
    }
}

/// A scene in which the second block is secret, of which CPU 0 has the first 4 frames open.
fn scene() -> (Scene, FrameRange) {
    let mut scene = Scene::new(1);
    let block = scene.block(1);
    scene.flip(block);
    scene.op(0, OpKind::Open, first(block, 4)).unwrap();
    (scene, block)
}

#[test]
fn most_touches_are_of_sealed_frames_and_the_others_of_open_and_of_ordinary_ones() {
    let (mut scene, block) = scene();
    let probes = scene.choose(400, 1);
    assert_eq!(probes.len(), 400);
    let count = |is: &dyn Fn(&Probe) -> bool| probes.iter().filter(|p| is(p)).count();
    assert_eq!(count(&|p| scene.sealed(p.frame)), 300);
    let open = count(&|p| scene.audit.frames().is_open(p.frame));
    assert!((25..75).contains(&open), "{open} of open frames");
    assert_eq!(count(&|p| !block.contains(p.frame)), 100 - open);
    for kind in ProbeKind::ALL {
        let of_kind = count(&|p| p.kind == *kind);
        assert!((80..190).contains(&of_kind), "{of_kind} of {kind:?}");
    }
    assert!(probes.iter().all(|p| p.offset < PAGE_SIZE && p.offset % 8 == 0));
    let distinct: BTreeSet<_> = probes.iter().map(|p| p.frame).collect();
    assert!(distinct.len() > 200, "{} frames", distinct.len());
}

#[test]
fn a_seed_repeats_the_draws() {
    let (mut scene, _) = scene();
    assert_eq!(scene.choose(20, 7), scene.choose(20, 7));
    assert_ne!(scene.choose(20, 7), scene.choose(20, 8));
}

#[test]
fn a_single_sealed_frame_is_always_found() {
    let mut scene = Scene::new(1);
    let frame = FrameRange::single(scene.block(3).start().wrapping_add(77));
    scene.op(0, OpKind::Seal, frame).unwrap();
    let probes = scene.choose(3, 5);
    assert_eq!(probes.iter().map(|p| p.frame).collect::<Vec<_>>(), [frame.start(); 3]);
}

#[test]
fn sealed_frames_that_trap_and_others_that_do_not_are_right() {
    let (mut scene, _) = scene();
    let before = scene.checked(Rule::SecondStageOpen);
    let probes = scene.choose(40, 2);
    let sealed: Vec<_> = probes.iter().map(|p| scene.sealed(p.frame)).collect();
    scene.touched(&probes, |probe| sealed[probes.iter().position(|other| other == probe).unwrap()]);
    scene.assert_clean(&[Rule::SecondStageOpen]);
    assert_eq!(scene.checked(Rule::SecondStageOpen), before + 40);
    let tally = scene.audit.probe_tally();
    assert_eq!((tally.trapped, tally.went_through), (30, 10));
}

#[test]
fn a_sealed_frame_that_does_not_trap_is_found_though_the_second_stage_says_denied() {
    let (mut scene, block) = scene();
    let frame = block.start().wrapping_add(100);
    let probes = ProbeKind::ALL.iter().map(|kind| Probe { frame, offset: 8, kind: *kind });
    let probes: Vec<_> = probes.collect();
    assert_eq!(scene.machine.denial(frame), Denial::Denied);
    scene.touched(&probes, |probe| probe.kind == ProbeKind::Read);
    scene.touched(&probes, |_| false);
    let findings = scene.audit.result().findings;
    let details: Vec<_> = findings.iter().map(|finding| &*finding.detail).collect();
    assert_eq!(details.len(), 3, "once for each way: {details:?}");
    for (detail, kind) in details.iter().zip(["write", "fetch", "read"]) {
        assert!(
            detail.starts_with(&format!("sealed, and a probe's {kind} at offset 0x8")),
            "{detail}"
        );
    }
    scene.assert_found(Rule::SecondStageOpen, frame);
}

#[test]
fn an_open_frame_that_traps_is_found_and_so_is_an_ordinary_one() {
    let (mut scene, block) = scene();
    for (frame, state) in
        [(block.start(), "open for a CPU"), (scene.block(4).start(), "not secret")]
    {
        scene.touched(&[Probe { frame, offset: 0, kind: ProbeKind::Write }], |_| true);
        scene.assert_found(Rule::SecondStageOpen, frame);
        let detail = scene.audit.result().findings.pop().unwrap().detail;
        let says = format!("denied although open: the frame is {state}, and a probe's write");
        assert!(detail.starts_with(&says), "{detail}");
    }
}

#[test]
fn what_cannot_be_touched_counts_as_not_checked() {
    let not_checked = |scene: &Scene| scene.audit.result().tally(Rule::SecondStageOpen).not_checked;
    let (mut scene, block) = scene();
    assert_eq!(scene.choose(0, 1), []);
    assert_eq!(scene.audit.choose_probes(8, &[], &mut draws(1), &scene.machine), []);
    assert_eq!((not_checked(&scene), scene.audit.probe_tally().without), (2, 2));
    block.iter().for_each(|frame| {
        scene.machine.denials.insert(frame, Denial::HeldOpen);
    });
    assert_eq!(scene.choose(8, 1).len(), 2, "those of frames that are not sealed");
    assert_eq!((not_checked(&scene), scene.audit.probe_tally().held_open), (8, 6));
    block.iter().for_each(|frame| {
        scene.machine.denials.insert(frame, Denial::NotEnforced);
    });
    assert_eq!(scene.choose(8, 1), []);
    assert_eq!((not_checked(&scene), scene.audit.probe_tally().seal_off), (16, 8));
    // Without a sealed frame nothing is due.
    let mut empty = Scene::new(1);
    assert_eq!(empty.choose(8, 1), []);
    assert_eq!(not_checked(&empty), 0);
}

#[test]
fn a_touch_that_fails_makes_the_run_inconclusive_and_says_why() {
    let (mut scene, block) = scene();
    let before = scene.checked(Rule::SecondStageOpen);
    let probe = Probe { frame: block.start(), offset: 0, kind: ProbeKind::Fetch };
    scene.audit.judge_probes(&[(probe, Touched::Failed("no luck".to_owned()))], 9, &scene.machine);
    let result = scene.audit.result();
    assert_eq!(result.inconclusive, ["a probe of the second stage failed: no luck"]);
    assert_eq!(result.findings, []);
    let tally = result.tally(Rule::SecondStageOpen);
    assert_eq!((tally.checked, tally.not_checked), (before, 1));
}
