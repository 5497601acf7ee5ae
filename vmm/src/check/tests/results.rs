//! Many cases: who runs them, what they come to, and the forms of the results.

use super::super::case::{Expected, Violation};
use super::super::judge::{Outcome, Ran, judge};
use super::super::results::{Counts, Results};
use super::super::session::{Done, Runner, run};
use super::super::{junit, list, table};
use super::judgements::{case, clean, left, violated};
use super::*;
use crate::audit::Rule;
use crate::cli::ExitStatus;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

/// Cases of three kinds: clean, one with a fault, and one that must fail.
fn three() -> Vec<Case> {
    let text = scenario("[[scenario.fault]]\ninject = [\"skip-scrub-on-remap\"]");
    let mut all = cases(&text);
    let mut third = case(Expected::GuestError(None));
    third.name = "other <&> \"case\"".into();
    third.scenario = "other".into();
    all.push(third);
    all
}

fn results<'c>(cases: &'c [Case], left: Vec<Ran>) -> Results<'c> {
    let done = cases.iter().zip(left).map(|(case, ran)| Done {
        case,
        judgement: judge(case, &ran),
        ran,
        took: Duration::from_millis(1500),
    });
    Results {
        done: done.collect(),
        took: Duration::from_secs(3),
        scenarios: "my folder".into(),
        filter: None,
        all: false,
    }
}

/// As expected, but for the last.
fn ran(last: Ran) -> Vec<Ran> {
    vec![left(clean()), left(violated(Rule::Residue)), last]
}

#[test]
fn the_exit_status_follows_from_the_worst_case() {
    let passed = |n| Counts { cases: n, passed: n, ..Counts::default() };
    for (counts, status) in [
        (passed(3), ExitStatus::Pass),
        (Counts { failed: 1, skipped: 1, inconclusive: 1, ..passed(3) }, ExitStatus::Violation),
        (Counts { inconclusive: 1, skipped: 1, ..passed(3) }, ExitStatus::Inconclusive),
        (Counts { not_run: 1, skipped: 1, ..passed(3) }, ExitStatus::Inconclusive),
        (Counts { skipped: 1, ..passed(3) }, ExitStatus::Host),
        (Counts { skipped_optional: 1, ..passed(3) }, ExitStatus::Pass),
        // Optional or not: where nothing ran, nothing was shown.
        (Counts { skipped_optional: 1, ..passed(0) }, ExitStatus::Host),
        (passed(0), ExitStatus::Host),
    ] {
        assert_eq!(counts.status(), status, "{counts:?}");
    }
}

#[test]
fn an_optional_case_may_be_missing_and_another_may_not() {
    let mut cases = three();
    let missing = || ran(Ran::Missing("no KVM".into()));
    assert_eq!(results(&cases, missing()).counts().status(), ExitStatus::Host);
    cases[2].optional = true;
    assert_eq!(results(&cases, missing()).counts().status(), ExitStatus::Pass);
}

#[test]
fn the_table_counts_each_kind_and_tells_what_failed() {
    let cases = three();
    let text = table(&results(&cases, ran(Ran::Crashed("signal 11".into()))));
    let has = |line: &str| assert!(text.contains(line), "{line:?} is missing in\n{text}");
    has(
        "FAIL: not every case ended as it must\n3 cases: 2 as expected, 1 failed, 0 inconclusive, 0 skipped",
    );
    has("some      sim              1/1          1/1            -        0    3,000.0 ms");
    has("other     sim                -            -          0/1        0    1,500.0 ms");
    has("FAILED: other <&> \"case\"\n  expected guest-error\n  the VMM failed: signal 11");
    has("again: lacuna check --scenarios 'my folder' 'other <&> \"case\"'");
}

#[test]
fn what_was_skipped_is_said_once_with_its_remedy_and_counted() {
    let cases = three();
    let missing = || Ran::Missing("/dev/kvm is not there".into());
    let text = table(&results(&cases, vec![left(clean()), missing(), missing()]));
    assert!(text.contains("SKIPPED: this host cannot run all of the cases"), "{text}");
    assert!(text.contains("2 skipped"), "{text}");
    assert_eq!(text.matches("SKIPPED: 2 cases: /dev/kvm is not there").count(), 1, "{text}");
    assert!(text.contains("'*/sim/*'"), "{text}");
}

#[test]
fn junit_says_the_same_to_a_parser() {
    let cases = three();
    let xml = junit(&results(&cases, ran(Ran::Crashed("a <b>\u{1b}[0m & \"c\"".into()))));
    let document = roxmltree::Document::parse(&xml).unwrap();
    let root = document.root_element();
    assert_eq!(root.tag_name().name(), "testsuites");
    let count = |node: roxmltree::Node<'_, '_>, name| node.attribute(name).unwrap().to_owned();
    assert_eq!((count(root, "tests"), count(root, "errors")), ("3".into(), "1".into()));
    let suites: Vec<_> = root.children().filter(roxmltree::Node::is_element).collect();
    assert_eq!(suites.len(), 2);
    for suite in &suites {
        assert_eq!(suite.tag_name().name(), "testsuite");
        let tests: Vec<_> = suite.children().filter(roxmltree::Node::is_element).collect();
        assert_eq!(count(*suite, "tests"), tests.len().to_string());
        for test in tests {
            assert_eq!(test.tag_name().name(), "testcase");
            assert_eq!(test.attribute("time"), Some("1.500"));
            assert_eq!(test.attribute("classname"), suite.attribute("name"));
        }
    }
    let error = suites[1].descendants().find(|node| node.has_tag_name("error")).unwrap();
    assert_eq!(error.attribute("message"), Some("the VMM failed: a <b>\u{fffd}[0m & \"c\""));
    assert!(error.text().unwrap().contains("again: lacuna check"));
}

#[test]
fn junit_has_a_failure_for_what_was_found_and_an_error_where_a_case_could_not_run() {
    let mut cases = three();
    let of = |cases: &[Case], last| {
        let xml = junit(&results(cases, ran(last)));
        let document = roxmltree::Document::parse(&xml).unwrap();
        let kinds = ["failure", "error", "skipped"];
        kinds.map(|kind| document.descendants().filter(|node| node.has_tag_name(kind)).count())
    };
    assert_eq!(of(&cases, left(clean())), [1, 0, 0]);
    assert_eq!(of(&cases, Ran::Missing("no KVM".into())), [0, 1, 0]);
    assert_eq!(of(&cases, Ran::Interrupted), [0, 0, 1]);
    cases[2].optional = true;
    assert_eq!(of(&cases, Ran::Missing("no KVM".into())), [0, 0, 1]);
}

#[test]
fn the_json_document_holds_every_case() {
    let mut cases = three();
    cases[0].require = vec![Rule::TableAlias];
    let json = results(&cases, ran(Ran::TimedOut)).to_json().unwrap();
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(
        (&json["schema"], &json["verdict"], &json["exit_status"]),
        (&1.into(), &"fail".into(), &1.into())
    );
    assert_eq!(json["counts"]["passed"], 2);
    let [clean, fault, failed] = [0, 1, 2].map(|index| &json["cases"][index]);
    assert_eq!(
        (&clean["outcome"], &clean["required"]["table-alias"]),
        (&"passed".into(), &1.into())
    );
    assert_eq!(
        (&fault["fault"], &fault["expected"]),
        (&"skip-scrub-on-remap".into(), &"residue".into())
    );
    assert_eq!(fault["violations"][0]["frame"], "0x100200000");
    assert_eq!(
        (&failed["outcome"], &failed["verdict"]),
        (&"failed".into(), &serde_json::Value::Null)
    );
}

#[test]
fn a_list_has_a_line_for_each_case() {
    let cases = three();
    let text = list(&cases.iter().collect::<Vec<_>>());
    assert_eq!(text.lines().count(), 3);
    assert!(text.lines().nth(1).unwrap().ends_with("/skip-scrub-on-remap  residue"), "{text}");
}

/// Panics on the first case, and answers the others.
struct Panics(AtomicUsize);

impl Runner for Panics {
    fn run(&self, _: &Case, _: &AtomicBool) -> Ran {
        assert!(self.0.fetch_add(1, Ordering::Relaxed) > 0, "the runner has a fault");
        left(clean())
    }
}

#[test]
fn a_crash_of_one_case_does_not_end_the_suite() {
    let cases = three();
    let all: Vec<_> = cases.iter().collect();
    let jobs = NonZeroUsize::MIN;
    let mut told = 0;
    let done =
        run(&all, jobs, &Panics(AtomicUsize::new(0)), &AtomicBool::new(false), |_| told += 1);
    let outcomes: Vec<_> = done.iter().map(|done| done.judgement.outcome).collect();
    assert_eq!(outcomes, [Outcome::Failed, Outcome::Failed, Outcome::Failed]);
    assert!(matches!(done[0].ran, Ran::Crashed(_)) && matches!(done[1].ran, Ran::Reported(_)));
    assert_eq!(told, 3);
}

/// Breaks the suite off in its second case.
struct Breaks(AtomicUsize);

impl Runner for Breaks {
    fn run(&self, case: &Case, cancelled: &AtomicBool) -> Ran {
        if self.0.fetch_add(1, Ordering::Relaxed) == 1 {
            cancelled.store(true, Ordering::Relaxed);
        }
        match case.expected {
            Expected::Violation(Violation { rule, .. }) => left(violated(rule)),
            _ => left(clean()),
        }
    }
}

#[test]
fn a_suite_that_is_broken_off_keeps_what_was_done_and_is_no_success() {
    let cases = three();
    let all: Vec<_> = cases.iter().collect();
    let breaks = Breaks(AtomicUsize::new(0));
    let done = run(&all, NonZeroUsize::MIN, &breaks, &AtomicBool::new(false), |_| ());
    let outcomes: Vec<_> = done.iter().map(|done| done.judgement.outcome).collect();
    assert_eq!(outcomes, [Outcome::Passed, Outcome::NotRun, Outcome::NotRun]);
    assert_eq!(breaks.0.load(Ordering::Relaxed), 2, "none begins after that");
    assert_eq!(Counts::of(&done).status(), ExitStatus::Inconclusive);
}
