//! Each judgement, with a twin in which it goes the other way.

use super::super::case::{Expected, Violation};
use super::super::judge::{Outcome, Ran, Reported, judge};
use super::*;
use crate::audit::Rule;
use crate::report::{self, Address, Check, GuestError, Report, StoryStep, Verdict};

/// A case of which this is expected.
pub(super) fn case(expected: Expected) -> Case {
    let mut case = cases(&scenario("")).remove(0);
    case.expected = expected;
    case
}

pub(super) fn check(rule: Rule, checked: u64, violations: u64) -> Check {
    Check { rule: rule.name().into(), checked, not_checked: 0, violations }
}

pub(super) fn found(rule: Rule) -> report::Violation {
    report::Violation {
        rule: rule.name().into(),
        frame: Some(Address(0x1_0020_0000)),
        va: None,
        vcpu: Some(1),
        root: None,
        seq: 9,
        detail: "it is wrong".into(),
        story: vec![StoryStep {
            seq: None,
            cpu: None,
            what: "made".into(),
            function: Some("flip::close".into()),
            text: String::new(),
        }],
        expected: false,
    }
}

/// A report in which one rule was judged, and nothing is wrong.
pub(super) fn clean() -> Report {
    Report {
        verdict: Verdict::Pass,
        checks: vec![check(Rule::TableAlias, 1, 0), check(Rule::Residue, 0, 0)],
        ..Report::new()
    }
}

/// A report in which this rule is violated.
pub(super) fn violated(rule: Rule) -> Report {
    Report {
        verdict: Verdict::Violation,
        checks: vec![check(rule, 1, 1)],
        violations: vec![found(rule)],
        ..Report::new()
    }
}

pub(super) fn left(report: Report) -> Ran {
    Ran::Reported(Box::new(Reported { report, unconfirmed: Vec::new(), confirmed: 0 }))
}

fn judged(case: &Case, report: Report) -> (Outcome, String) {
    let judgement = judge(case, &left(report));
    (judgement.outcome, judgement.reasons.join("; "))
}

#[track_caller]
fn fails(case: &Case, report: Report, needle: &str) {
    let (outcome, reasons) = judged(case, report);
    assert_eq!(outcome, Outcome::Failed, "{reasons}");
    assert!(reasons.contains(needle), "{reasons}");
}

#[track_caller]
fn passes(case: &Case, report: Report) {
    assert_eq!(judged(case, report), (Outcome::Passed, String::new()));
}

#[test]
fn a_clean_case_passes_and_one_that_is_not_clean_fails() {
    let case = case(Expected::Pass);
    passes(&case, clean());
    let checks = vec![check(Rule::TableAlias, 1, 0)];
    let report = Report { checks, ..violated(Rule::Residue) };
    fails(&case, report, "residue is violated, frame 0x100200000 vCPU 1 event 9: it is wrong");
    let error = GuestError {
        kind: "panic".into(),
        message: "it gave up".into(),
        vcpu: None,
        rip: None,
        symbol: None,
        backtrace: Vec::new(),
    };
    let report = Report { verdict: Verdict::GuestError, guest_error: Some(error), ..clean() };
    fails(&case, report, "guest error: it gave up");
}

#[test]
fn a_required_rule_that_was_not_exercised_fails() {
    let mut case = case(Expected::Pass);
    case.require = vec![Rule::TableAlias, Rule::Residue];
    fails(&case, clean(), "the rule residue was never exercised");
    // The report's own requirement makes it inconclusive: that is no excuse.
    let doubtful = Report { verdict: Verdict::Inconclusive, ..clean() };
    fails(&case, doubtful, "the rule residue was never exercised");
    let checks = vec![check(Rule::TableAlias, 1, 0), check(Rule::Residue, 1, 0)];
    passes(&case, Report { checks, ..clean() });
    // A rule that a report does not name was not exercised either.
    case.require = vec![Rule::UserAccess];
    fails(&case, clean(), "user-access");
}

#[test]
fn doubt_about_a_clean_case_is_neither_success_nor_failure() {
    let case = case(Expected::Pass);
    let inconclusive = vec!["3 events were lost".to_owned()];
    let report = Report { verdict: Verdict::Inconclusive, inconclusive, ..clean() };
    assert_eq!(judged(&case, report), (Outcome::Inconclusive, "3 events were lost".into()));
}

#[test]
fn a_fault_that_is_not_found_fails_and_so_does_one_found_by_another_rule() {
    let case = case(Expected::Violation(Violation::of(Rule::Residue)));
    passes(&case, violated(Rule::Residue));
    fails(&case, clean(), "no violation of residue was found");
    fails(
        &case,
        violated(Rule::GlobalWindow),
        "no violation of residue was found; global-window is violated",
    );
    // Findings beside the expected one are allowed.
    let mut both = violated(Rule::Residue);
    both.violations.insert(0, found(Rule::GlobalWindow));
    passes(&case, both);
    // Neither a count without a finding nor a finding without a count will do.
    fails(&case, Report { violations: Vec::new(), ..violated(Rule::Residue) }, "no violation");
    fails(&case, Report { checks: Vec::new(), ..violated(Rule::Residue) }, "no violation");
    let report = Report { verdict: Verdict::Pass, ..violated(Rule::Residue) };
    fails(&case, report, "the verdict is pass in spite of");
}

#[test]
fn a_fault_must_be_found_where_the_scenario_says() {
    let at = |vcpu, frame, function: Option<&str>| {
        let function = function.map(str::to_owned);
        case(Expected::Violation(Violation { rule: Rule::Residue, vcpu, frame, function }))
    };
    let report = || violated(Rule::Residue);
    passes(&at(Some(1), Some(0x1_0020_0000), Some("flip::")), report());
    fails(&at(Some(0), None, None), report(), "is where it should be: vCPU 0");
    fails(&at(None, Some(0x1_0020_1000), None), report(), "frame 0x100201000");
    fails(&at(None, None, Some("mermap::")), report(), "function \"mermap::\"");
}

#[test]
fn a_finding_that_the_events_do_not_show_fails() {
    let case = case(Expected::Violation(Violation::of(Rule::Residue)));
    let ran = |unconfirmed| {
        let report = violated(Rule::Residue);
        judge(&case, &Ran::Reported(Box::new(Reported { report, unconfirmed, confirmed: 1 })))
    };
    assert_eq!(ran(Vec::new()).outcome, Outcome::Passed);
    assert_eq!(ran(vec!["the events do not show it".into()]).outcome, Outcome::Failed);
}

#[test]
fn a_guest_error_must_be_one_and_say_what_it_should() {
    let expected = |message: Option<&str>| case(Expected::GuestError(message.map(str::to_owned)));
    let error = GuestError {
        kind: "triple-fault".into(),
        message: "triple fault: no IDT".into(),
        vcpu: None,
        rip: None,
        symbol: None,
        backtrace: Vec::new(),
    };
    let report =
        || Report { verdict: Verdict::GuestError, guest_error: Some(error.clone()), ..clean() };
    passes(&expected(None), report());
    passes(&expected(Some("triple fault")), report());
    fails(&expected(Some("panic")), report(), "\"panic\" is not in what was said");
    fails(&expected(None), clean(), "the verdict is pass, not guest-error");
    fails(&expected(None), violated(Rule::Residue), "residue is violated");
}

#[test]
fn doubt_can_be_what_is_expected() {
    let expected = |message: &str| case(Expected::Inconclusive(Some(message.to_owned())));
    let inconclusive = vec!["3 events were lost".to_owned()];
    let report =
        || Report { verdict: Verdict::Inconclusive, inconclusive: inconclusive.clone(), ..clean() };
    passes(&expected("events were lost"), report());
    fails(&expected("missing"), report(), "\"missing\" is not in what was said");
    fails(&expected("lost"), clean(), "the verdict is pass, not inconclusive");
}

#[test]
fn what_left_no_report_is_told_apart() {
    let case = case(Expected::Pass);
    for (ran, outcome, needle) in [
        (Ran::Missing("no KVM".into()), Outcome::Skipped, "no KVM"),
        (Ran::Crashed("signal 11".into()), Outcome::Failed, "the VMM failed: signal 11"),
        (Ran::TimedOut, Outcome::Failed, "longer than 300 s ([scenario] timeout_s)"),
        (Ran::Interrupted, Outcome::NotRun, "broken off"),
    ] {
        let judgement = judge(&case, &ran);
        assert_eq!(judgement.outcome, outcome);
        assert!(judgement.reasons[0].contains(needle), "{judgement:?}");
    }
}
