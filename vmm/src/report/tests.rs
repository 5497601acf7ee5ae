use super::*;
use crate::audit::Rule;
use crate::config::{Audit, Expect, ProfileChoice};
use serde_json::{Value, json};

fn audit() -> Audit {
    Audit {
        profile: ProfileChoice::Auto,
        quiesce_every: 1000,
        probes: 8,
        require: Vec::new(),
        expect: Expect::default(),
    }
}

fn check(rule: Rule, checked: u64, not_checked: u64, violations: u64) -> Check {
    Check { rule: rule.name().to_owned(), checked, not_checked, violations }
}

fn violation(rule: Rule) -> Violation {
    Violation {
        rule: rule.name().to_owned(),
        frame: Some(Address(0x1_0020_0000)),
        va: Some(Address(0xffff_8881_0020_0000)),
        vcpu: Some(0),
        root: Some(Address(0x40_0000)),
        seq: 1234,
        detail: "the block's directory entry is still present; clear it before the seal".to_owned(),
        story: vec![StoryStep {
            seq: Some(3),
            cpu: Some(1),
            what: "made".into(),
            function: Some("convert::PageAllocator::show".into()),
            text: "mapped it".into(),
        }],
        expected: false,
    }
}

fn access() -> SealedAccess {
    SealedAccess {
        gpa: Some(Address(0x1_0040_0000)),
        kind: "read".to_owned(),
        vcpu: 0,
        rip: Some(Address(0xffff_ffff_8020_1234)),
        va: Some(Address(0xffff_8881_0040_0000)),
        symbol: Some("lacuna_guest::programs::touch+0x40".to_owned()),
        expected: false,
    }
}

/// A run in which nothing went wrong.
fn clean() -> Report {
    let mut report = Report::new();
    report.config = Some("configs/quickstart.toml".to_owned());
    report.machine = Machine {
        kind: "kvm".into(),
        translation: "NPT".into(),
        evidence: "npt is Y".into(),
        mediation: "trace".into(),
        profile: "amd".into(),
        kernel: "6.18.0".into(),
        cpu: "AMD EPYC".into(),
        simulation: None,
        stepping: None,
    };
    let probes = Probes { seed: 7, each: 8, trapped: 60, went_through: 20, ..Probes::default() };
    report.second_stage = SecondStage {
        backend: "guard".into(),
        granule: 4096,
        detail: "madvise guards".into(),
        probes,
    };
    report.guest = Guest {
        vcpus: 1,
        memory_mib: 64,
        program: "replay".into(),
        boot_us: Some(12_345),
        ..Guest::default()
    };
    report.guest.set_work(2500, 6_120_000);
    for (name, value) in
        [("alloc", 1637), ("alloc_secret", 908), ("events", 54_321), ("events_lost", 0), ("odd", 7)]
    {
        report.counters.insert(name.to_owned(), value);
    }
    report.checks =
        vec![check(Rule::DirectMapAlias, 12_345, 0, 0), check(Rule::StaleTable, 0, 0, 0)];
    report
}

fn broken() -> Report {
    let mut report = clean();
    report.checks[0].violations = 1;
    report.violations.push(violation(Rule::DirectMapAlias));
    report
}

fn judged(mut report: Report, audit: &Audit) -> Report {
    report.judge(audit);
    report
}

#[test]
fn the_json_form_has_exactly_the_fields_of_the_contract() {
    let mut report = broken();
    report.sealed_accesses.push(access());
    report.inject.push("leave-direct-map-alias".into());
    report.observed.push(Observed {
        change: "remap".into(),
        global: true,
        cpu: "other".into(),
        invalidation: "cr3".into(),
        offered: true,
        rounds: 20,
        stale: 17,
        may_be_stale: 20,
        contradictions: 0,
    });
    report.guest_error = Some(GuestError {
        kind: "panic".into(),
        message: "no".into(),
        vcpu: Some(0),
        rip: Some(Address(0xffff_ffff_8020_0000)),
        symbol: None,
        backtrace: vec![Frame { rip: Address(1), symbol: Some("main+0x1".into()) }],
    });
    let report = judged(report, &audit());
    let found: Value = serde_json::from_str(&report.to_json().unwrap()).unwrap();
    let expected = json!({
        "schema": 1,
        "verdict": "violation",
        "config": "configs/quickstart.toml",
        "inject": ["leave-direct-map-alias"],
        "machine": {
            "kind": "kvm", "translation": "NPT", "evidence": "npt is Y", "mediation": "trace", "kernel": "6.18.0",
            "profile": "amd",
            "cpu": "AMD EPYC", "simulation": null, "stepping": null,
        },
        "second_stage": {
            "backend": "guard", "granule": 4096, "detail": "madvise guards",
            "probes": {
                "seed": 7, "each": 8, "trapped": 60, "went_through": 20, "failed": 0,
                "held_open": 0, "seal_off": 0, "without": 0, "why": null,
            },
        },
        "guest": {
            "vcpus": 1, "memory_mib": 64, "program": "replay", "boot_us": 12345,
            "work_us": 6_120_000, "work": 2500, "us_per_event": 2448.0,
        },
        "counters": {
            "alloc": 1637, "alloc_secret": 908, "events": 54321, "events_lost": 0, "odd": 7,
        },
        "checks": [
            {"rule": "direct-map-alias", "checked": 12345, "not_checked": 0, "violations": 1},
            {"rule": "stale-table", "checked": 0, "not_checked": 0, "violations": 0},
        ],
        "observed": [{
            "change": "remap", "global": true, "cpu": "other", "invalidation": "cr3", "offered": true,
            "rounds": 20, "stale": 17, "may_be_stale": 20, "contradictions": 0
        }],
        "sealed_accesses": [{
            "gpa": "0x100400000", "kind": "read", "vcpu": 0, "rip": "0xffffffff80201234",
            "va": "0xffff888100400000", "symbol": "lacuna_guest::programs::touch+0x40",
            "expected": false,
        }],
        "violations": [{
            "rule": "direct-map-alias", "frame": "0x100200000", "va": "0xffff888100200000",
            "vcpu": 0, "root": "0x400000", "seq": 1234,
            "detail": "the block's directory entry is still present; clear it before the seal",
            "story": [{
                "seq": 3, "cpu": 1, "what": "made", "function": "convert::PageAllocator::show",
                "text": "mapped it",
            }],
            "expected": false,
        }],
        "inconclusive": [],
        "guest_error": {
            "kind": "panic", "message": "no", "vcpu": 0, "rip": "0xffffffff80200000",
            "symbol": null, "backtrace": [{"rip": "0x1", "symbol": "main+0x1"}],
        },
        "warnings": [],
        "timing": {"setup_us": 0, "guest_us": 0, "gate_us": 0, "audit_us": 0, "total_us": 0},
    });
    assert_eq!(found, expected);
    assert_eq!(serde_json::from_value::<Report>(found).unwrap(), report);
}

#[test]
fn what_is_no_address_is_refused() {
    for text in ["\"12\"", "\"0x\"", "\"0x+1\"", "\"0xg\"", "12"] {
        assert!(serde_json::from_str::<Address>(text).is_err(), "{text}");
    }
}

#[test]
fn a_clean_run_passes_and_each_finding_changes_the_verdict() {
    assert_eq!(judged(clean(), &audit()).verdict, Verdict::Pass);
    assert_eq!(judged(broken(), &audit()).verdict, Verdict::Violation);
    let mut counted_only = broken();
    counted_only.violations.clear();
    assert_eq!(judged(counted_only, &audit()).verdict, Verdict::Violation);
    let mut lost = clean();
    lost.counters.insert("events_lost".into(), 3);
    let lost = judged(lost, &audit());
    assert_eq!(lost.verdict, Verdict::Inconclusive);
    assert_eq!(lost.inconclusive, ["3 events were lost"]);
}

#[test]
fn an_unexpected_sealed_access_is_a_guest_error_and_an_expected_one_is_not() {
    let mut report = clean();
    report.sealed_accesses.push(access());
    let unexpected = judged(report.clone(), &audit());
    assert_eq!(unexpected.verdict, Verdict::GuestError);
    let error = unexpected.guest_error.unwrap();
    assert_eq!(error.kind, "sealed-access");
    assert!(error.message.contains("0x100400000 (read)"), "{}", error.message);
    let expect = Expect { sealed_access: true, rules: Vec::new() };
    let expected = judged(report, &Audit { expect: expect.clone(), ..audit() });
    assert_eq!(expected.verdict, Verdict::Pass);
    assert!(expected.sealed_accesses[0].expected);
    let missing = judged(clean(), &Audit { expect, ..audit() });
    assert_eq!(missing.verdict, Verdict::Inconclusive);
}

#[test]
fn an_expected_violation_does_not_count_but_its_absence_does() {
    let expect = Expect { sealed_access: false, rules: vec![Rule::DirectMapAlias] };
    let expecting = Audit { expect, ..audit() };
    let found = judged(broken(), &expecting);
    assert_eq!(found.verdict, Verdict::Pass);
    assert!(found.violations[0].expected);
    let absent = judged(clean(), &expecting);
    assert_eq!(absent.verdict, Verdict::Inconclusive);
    let reason = "a violation of direct-map-alias was expected, none was found";
    assert_eq!(absent.inconclusive, [reason]);
    let mut another = broken();
    another.checks[1].violations = 1;
    assert_eq!(judged(another, &expecting).verdict, Verdict::Violation);
}

#[test]
fn a_required_rule_must_have_been_checked() {
    let require = |rule| Audit { require: vec![rule], ..audit() };
    assert_eq!(judged(clean(), &require(Rule::DirectMapAlias)).verdict, Verdict::Pass);
    for never in [Rule::StaleTable, Rule::Residue] {
        let report = judged(clean(), &require(never));
        assert_eq!(report.verdict, Verdict::Inconclusive, "{never:?}");
    }
}

#[test]
fn every_rule_that_is_required_and_never_checked_makes_a_run_inconclusive() {
    for rule in Rule::ALL {
        let requiring = Audit { require: vec![*rule], ..audit() };
        let mut report = clean();
        report.checks.retain(|check| check.rule != rule.name());
        let report = judged(report, &requiring);
        assert_eq!(report.verdict, Verdict::Inconclusive);
        assert!(report.inconclusive.iter().any(|reason| reason.contains(rule.name())));
    }
}

#[test]
fn judging_twice_changes_nothing() {
    let requiring = Audit { require: vec![Rule::StaleTable], ..audit() };
    let once = judged(clean(), &requiring);
    assert_eq!(judged(once.clone(), &requiring), once);
}

#[test]
fn the_text_form_says_what_matters() {
    let text = judged(clean(), &audit()).to_text();
    for part in [
        "PASS: every rule that was exercised holds\n",
        "config         configs/quickstart.toml\n",
        "machine        kvm, NPT translation (npt is Y), Linux 6.18.0, AMD EPYC; invalidation profile amd;\n",
        "               mediation: trace\n",
        "second stage   guard, granule 4,096 bytes: madvise guards\n",
        "guest          program replay, 64 MiB, 1 vCPU; allocator ready after 12.3 ms\n",
        "work           2,500 trace events in 6,120.0 ms, 2448.00 us each\n",
        "direct-map-alias            12,345             0           0\n",
        "stale-table                      0             0           0  never exercised\n",
        "allocations    alloc\u{a0}1,637, alloc_secret\u{a0}908\n",
        "other          odd\u{a0}7\n",
    ] {
        assert!(text.contains(part), "{part:?} is not in\n{text}");
    }
    assert!(!text.contains("WARNING"), "{text}");
    assert!(!text.contains("Violation"), "{text}");
}

#[test]
fn the_text_form_shows_findings_accesses_and_reasons() {
    let mut report = broken();
    report.sealed_accesses.push(access());
    report.inconclusive.push("a ring was overwritten".into());
    report.checks[0].violations = 5;
    report.inject.push("leave-direct-map-alias".into());
    let text = judged(report, &audit()).to_text();
    for part in [
        "VIOLATION: a rule was violated\n",
        "planted faults leave-direct-map-alias\n",
        "Violation 1: direct-map-alias\n  frame 0x100200000, at 0xffff888100200000, vCPU 0, root \
         0x400000, event 1234\n  the block's directory entry is still present; clear it",
        "… and 4 more violations\n",
        "Guest error: sealed-access, vCPU 0, at 0xffffffff80201234 in lacuna_guest::programs::",
        "- read of 0x100400000 through 0xffff888100400000, vCPU 0, at 0xffffffff80201234 in",
        "Inconclusive, because:\n- a ring was overwritten\n",
        "  VIOLATED\n",
    ] {
        assert!(text.contains(part), "{part:?} is not in\n{text}");
    }
}

fn told(seq: Option<u64>, cpu: Option<u8>, what: &str, function: &str, text: &str) -> StoryStep {
    let function = Some(function.to_owned()).filter(|name| !name.is_empty());
    StoryStep { seq, cpu, what: what.into(), function, text: text.into() }
}

#[test]
fn a_story_is_an_aligned_list_that_wraps_behind_its_labels() {
    let mut report = broken();
    let violation = &mut report.violations[0];
    violation.rule = Rule::StaleDirectMap.name().into();
    violation.detail = "CPU 1 may still cache the direct map's global translation".into();
    violation.story = vec![
        told(None, None, "made", "", "before the guest started: the VMM mapped 0xffff888100200000"),
        told(
            Some(41),
            Some(0),
            "revoked",
            "flip::PageAllocator::remove_from_direct_map",
            "cleared the entry for 0xffff888100200000, of the frame 0x100200000 (2 MiB, writable, \
             global); until it flushes, a CPU may go on using the old translation",
        ),
        told(
            Some(1042),
            Some(1),
            "flush",
            "shootdown::Shootdowns::serve",
            "reloaded CR3: does not count, because it spares global translations, and this one was \
             global",
        ),
        told(None, None, "left-out", "", "7 more of the like, none of which counts"),
        told(Some(1234), Some(0), "mattered", "", "asked the host to open 512 frames"),
        told(None, None, "right", "", "on CPU 1, between event 41 and the call: an INVLPG"),
    ];
    let text = report.to_text();
    let start = text.find("Violation 1").unwrap();
    let end = start + text[start..].find("\n\n").unwrap();
    let expected = "\
Violation 1: stale-direct-map
  frame 0x100200000, at 0xffff888100200000, vCPU 0, root 0x400000, event 1234
  CPU 1 may still cache the direct map's global translation
  How it came to that:
                       made      before the guest started: the VMM mapped 0xffff888100200000
    event 41    CPU 0  revoked   in flip::PageAllocator::remove_from_direct_map: cleared the entry
                                 for 0xffff888100200000, of the frame 0x100200000 (2 MiB, writable,
                                 global); until it flushes, a CPU may go on using the old
                                 translation
    event 1042  CPU 1  flush     in shootdown::Shootdowns::serve: reloaded CR3: does not count,
                                 because it spares global translations, and this one was global
                       left-out  7 more of the like, none of which counts
    event 1234  CPU 0  mattered  asked the host to open 512 frames
                       right     on CPU 1, between event 41 and the call: an INVLPG";
    assert_eq!(&text[start..end], expected, "\n{}", &text[start..end]);
}

#[test]
fn a_simulated_run_says_what_repeats_it() {
    for (schedule, said) in [("seeded", "seed 77 repeats it"), ("threads", "it cannot be repeated")]
    {
        let mut report = clean();
        let schedule = schedule.to_owned();
        let simulation =
            Simulation { seed: 77, schedule, stale_uses: 1234, ..Simulation::default() };
        report.machine.simulation = Some(simulation);
        let text = report.to_text();
        assert!(text.contains(said) && text.contains("1,234 uses of stale"), "{text}");
        let json = report.to_json().unwrap();
        assert_eq!(serde_json::from_str::<Report>(&json).unwrap(), report);
    }
    assert!(!clean().to_text().contains("simulation"));
}

#[test]
fn a_stepped_run_says_how_much_was_stepped_and_how_fast() {
    let mut report = clean();
    let (instructions, us, from, to) = (90_000, 2_000_000, Some(0), None);
    let stepping = Stepping { instructions, us, from, to, window_accesses: 1_234 };
    report.machine.stepping = Some(stepping);
    let text = report.to_text();
    assert!(text.contains("90,000 instructions in 2,000.0 ms, 45,000 a second; all"), "{text}");
    assert!(text.contains("1,234 accesses"), "{text}");
    let stepping = Stepping { from: Some(70), to: Some(90), ..Stepping::default() };
    report.machine.stepping = Some(stepping);
    let text = report.to_text();
    assert!(text.contains("events 70 to 90 alone"), "{text}");
    report.machine.stepping = Some(Stepping::default());
    assert!(report.to_text().contains("nothing was stepped"), "{}", report.to_text());
    assert!(!clean().to_text().contains("stepped"));
}

#[test]
fn a_second_stage_that_closes_nothing_is_warned_of() {
    let mut report = clean();
    report.second_stage = SecondStage { backend: "off".into(), ..SecondStage::default() };
    let text = report.to_text();
    assert!(text.contains("WARNING        nothing is closed"), "{text}");
}

#[test]
fn what_was_touched_is_said_and_why_it_was_not() {
    let mut report = clean();
    let text = report.to_text();
    let line = "probes         60 trapped, 20 went through (8 a check, drawn from seed 7)\n";
    assert!(text.contains(line), "{text}");
    let why = Some("[audit] probes is 0".to_owned());
    report.second_stage.probes = Probes { without: 3, held_open: 2, why, ..Probes::default() };
    let text = report.to_text();
    let says = "2 held open by their granule; 3 checks without: [audit] probes is 0";
    assert!(text.replace("\n               ", " ").contains(says), "{text}");
}

#[test]
fn a_guest_that_never_got_ready_has_no_figures() {
    let mut report = clean();
    report.guest = Guest { vcpus: 1, memory_mib: 64, ..Guest::default() };
    let text = report.to_text();
    assert!(text.contains("it did not get as far as its allocator"), "{text}");
    assert!(!text.contains("us each"), "{text}");
    report.guest.set_work(0, 5);
    assert_eq!(report.guest.us_per_event, None);
}

#[test]
fn what_a_guest_says_can_neither_widen_nor_colour_the_text() {
    let mut report = broken();
    let hostile = format!("\u{1b}[2J{}\r\n\u{9b}31m{}", "long ".repeat(100), "x".repeat(300));
    report.guest_error = Some(GuestError {
        kind: "panic".into(),
        message: hostile.clone(),
        vcpu: Some(0),
        rip: Some(Address(u64::MAX)),
        symbol: Some(hostile.clone()),
        backtrace: vec![Frame { rip: Address(u64::MAX), symbol: Some(hostile.clone()) }; 3],
    });
    report.violations[0].detail = hostile.clone();
    report.violations[0].story.push(StoryStep {
        seq: Some(u64::MAX),
        cpu: Some(u8::MAX),
        what: hostile.clone(),
        function: Some(hostile.clone()),
        text: hostile.clone(),
    });
    report.inconclusive.push(hostile.clone());
    report.warnings.push(hostile.clone());
    report.sealed_accesses.push(SealedAccess { symbol: Some(hostile), ..access() });
    for line in report.to_text().lines() {
        assert!(line.chars().count() <= 100, "{line}");
        assert!(!line.chars().any(char::is_control), "{line:?}");
    }
}
