//! Frames touched on purpose: when, and what becomes of the outcome.

use super::*;
use crate::audit::{Probe, ProbeKind, Touched};

/// What it was asked to touch, and what it says came of it.
#[derive(Clone)]
struct Told {
    asked: Arc<Mutex<Vec<Probe>>>,
    says: fn(&Probe) -> Vec<Touched>,
}

impl Prober for Told {
    fn kinds(&self) -> &'static [ProbeKind] {
        ProbeKind::ALL
    }

    fn touch(&mut self, probes: &[Probe]) -> Vec<Touched> {
        self.asked.lock().unwrap().extend(probes);
        probes.iter().flat_map(self.says).collect()
    }
}

/// A guest with one sealed frame, after a complete check.
fn checked(says: fn(&Probe) -> Vec<Touched>) -> (Guest, Vec<Probe>) {
    let mut guest = Guest::new(true);
    guest.unmap_first_block(true);
    let told = Told { asked: Arc::default(), says };
    guest.gate.attach_prober(Box::new(told.clone()));
    assert_eq!(guest.call(Call::Checkpoint).1, Status::Ok);
    assert_eq!(*told.asked.lock().unwrap(), [], "nothing is sealed yet");
    assert_eq!(guest.ops(&[(OpKind::Seal, guest.frames(5, 1))]), Status::Ok);
    guest.still.asked.clear();
    assert_eq!(guest.call(Call::Checkpoint).1, Status::Ok);
    assert_eq!(guest.still.asked, ["stop", "resume"]);
    let asked = told.asked.lock().unwrap().clone();
    (guest, asked)
}

#[test]
fn a_single_frame_that_is_left_open_is_found_at_the_next_complete_check() {
    let (guest, asked) = checked(|_| vec![Touched::WentThrough]);
    let sealed = guest.frames(5, 1).start();
    assert_eq!(asked.len(), 8);
    assert_eq!(asked.iter().filter(|probe| probe.frame == sealed).count(), 6);
    assert!(guest.gate.stage().denies(sealed), "by its own state");
    let result = guest.gate.result();
    let found: Vec<_> = result.findings.iter().map(|f| (f.rule, f.frame)).collect();
    assert!(!found.is_empty() && result.inconclusive.is_empty());
    assert!(found.iter().all(|f| *f == (Rule::SecondStageOpen, Some(sealed))), "{found:?}");
    let summary = guest.gate.probe_summary();
    assert_eq!((summary.seed, summary.each, summary.tally.went_through), (1, 8, 8));
}

#[test]
fn a_single_frame_that_is_denied_although_open_is_found() {
    let (guest, asked) = checked(|_| vec![Touched::Trapped]);
    let sealed = guest.frames(5, 1).start();
    let result = guest.gate.result();
    assert_eq!(result.findings.len(), 2, "{:?}", result.findings);
    for finding in result.findings {
        let frame = finding.frame.unwrap();
        assert!(frame != sealed && asked.iter().any(|probe| probe.frame == frame));
        assert!(finding.detail.starts_with("denied although open"), "{}", finding.detail);
    }
}

#[test]
fn a_prober_that_leaves_out_an_outcome_makes_the_run_inconclusive() {
    let (guest, _) = checked(|_| Vec::new());
    let result = guest.gate.result();
    assert_eq!(result.findings, []);
    let why = "a probe of the second stage failed: nothing was said of it";
    assert_eq!(result.inconclusive, [why]);
    assert_eq!(guest.gate.probe_summary().tally.failed, 8);
}

/// Says that a touch may still be under way.
struct Stuck;

impl Prober for Stuck {
    fn kinds(&self) -> &'static [ProbeKind] {
        ProbeKind::ALL
    }

    fn touch(&mut self, probes: &[Probe]) -> Vec<Touched> {
        vec![Touched::Failed("stuck".to_owned()); probes.len()]
    }

    fn harm(&self) -> Option<&'static str> {
        Some("a touch is under way")
    }
}

#[test]
fn a_guest_is_not_resumed_beside_a_touch_that_may_be_under_way() {
    let mut guest = Guest::new(true);
    guest.unmap_first_block(true);
    guest.gate.attach_prober(Box::new(Stuck));
    assert_eq!(guest.ops(&[(OpKind::Seal, guest.frames(5, 1))]), Status::Ok);
    guest.still.asked.clear();
    let served = guest.gate.serve(Call::Checkpoint, 0, &mut guest.still);
    assert!(matches!(served, Err(GateFailure::Probe("a touch is under way"))), "{served:?}");
    assert_eq!(guest.still.asked, ["stop"]);
}
