//! What a suite came to: counts, the exit status, and the JSON document.

use super::case::Expected;
use super::judge::{Outcome, Ran};
use super::session::Done;
use crate::cli::ExitStatus;
use crate::config::{MachineKind, Mediation, Seal};
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::Duration;

/// Version of the JSON form. Fields may be added without a new version; none is taken away.
const SCHEMA: u32 = 1;

/// How many cases ended how.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Counts {
    /// All.
    pub cases: usize,
    /// As expected.
    pub passed: usize,
    /// Otherwise.
    pub failed: usize,
    /// It cannot be told.
    pub inconclusive: usize,
    /// This host cannot run them, and the suite does not pass without them.
    pub skipped: usize,
    /// This host cannot run them, and their scenario says that they may be missing.
    pub skipped_optional: usize,
    /// The suite was broken off before.
    pub not_run: usize,
}

impl Counts {
    /// Counts these cases.
    pub fn of<'a>(done: impl IntoIterator<Item = &'a Done<'a>>) -> Self {
        let mut counts = Self::default();
        for done in done {
            counts.cases += 1;
            *match (done.judgement.outcome, done.case.optional) {
                (Outcome::Passed, _) => &mut counts.passed,
                (Outcome::Failed, _) => &mut counts.failed,
                (Outcome::Inconclusive, _) => &mut counts.inconclusive,
                (Outcome::Skipped, false) => &mut counts.skipped,
                (Outcome::Skipped, true) => &mut counts.skipped_optional,
                (Outcome::NotRun, _) => &mut counts.not_run,
            } += 1;
        }
        counts
    }

    /// How the process ends. What failed goes before what is in doubt, and that before what could not
    /// run. Where nothing passed, nothing was shown.
    #[must_use]
    pub const fn status(&self) -> ExitStatus {
        if self.failed > 0 {
            ExitStatus::Violation
        } else if self.inconclusive > 0 || self.not_run > 0 {
            ExitStatus::Inconclusive
        } else if self.skipped > 0 || self.passed == 0 {
            ExitStatus::Host
        } else {
            ExitStatus::Pass
        }
    }
}

/// The results of a suite.
#[derive(Debug)]
pub struct Results<'c> {
    /// The cases, in their order.
    pub done: Vec<Done<'c>>,
    /// Time that all of it took.
    pub took: Duration,
    /// Where the scenarios come from: a folder, or `built-in`.
    pub scenarios: String,
    /// The filter, if there was one.
    pub filter: Option<String>,
    /// Whether all cases were asked for, rather than the quick ones.
    pub all: bool,
}

/// The JSON form of results: all of its fields are always there.
#[derive(Debug, Serialize)]
pub struct Document<'a> {
    schema: u32,
    verdict: &'static str,
    exit_status: u8,
    scenarios: &'a str,
    filter: Option<&'a str>,
    all: bool,
    took_ms: u64,
    counts: Counts,
    cases: Vec<Entry<'a>>,
}

#[derive(Debug, Serialize)]
struct Entry<'a> {
    name: &'a str,
    scenario: &'a str,
    machine: MachineKind,
    mediation: Mediation,
    seal: Seal,
    vcpus: u8,
    fault: Option<&'static str>,
    expected: &'a Expected,
    optional: bool,
    outcome: Outcome,
    reasons: &'a [String],
    took_ms: u64,
    /// `null` where there is no report.
    verdict: Option<&'static str>,
    /// How often each rule that the case must exercise was judged.
    required: BTreeMap<&'static str, Option<u64>>,
    /// Findings of the expected rule that the recorded events show too.
    confirmed: Option<u64>,
    violations: Vec<Found<'a>>,
    repeat: String,
}

#[derive(Debug, Serialize)]
struct Found<'a> {
    rule: &'a str,
    frame: Option<crate::report::Address>,
    va: Option<crate::report::Address>,
    vcpu: Option<u8>,
    seq: u64,
    detail: &'a str,
}

/// Milliseconds, as far as they can be counted.
pub(super) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

impl Results<'_> {
    /// How many ended how.
    #[must_use]
    pub fn counts(&self) -> Counts {
        Counts::of(&self.done)
    }

    /// The command that runs a case again.
    #[must_use]
    pub fn repeat(&self, case: &str) -> String {
        let folder = match self.scenarios.as_str() {
            "built-in" => String::new(),
            folder => format!("--scenarios {} ", quoted(folder)),
        };
        format!("lacuna check {folder}{}", quoted(case))
    }

    /// The JSON form, with a line end.
    ///
    /// # Errors
    /// What serde says; results hold nothing that JSON cannot express.
    pub fn to_json(&self) -> Result<String, serde_json::Error> {
        let counts = self.counts();
        let status = counts.status();
        let document = Document {
            schema: SCHEMA,
            verdict: verdict(status),
            exit_status: status as u8,
            scenarios: &self.scenarios,
            filter: self.filter.as_deref(),
            all: self.all,
            took_ms: millis(self.took),
            counts,
            cases: self.done.iter().map(|done| self.entry(done)).collect(),
        };
        Ok(serde_json::to_string_pretty(&document)? + "\n")
    }

    fn entry<'a>(&self, done: &'a Done<'_>) -> Entry<'a> {
        let case = done.case;
        let reported = match &done.ran {
            Ran::Reported(reported) => Some(reported),
            _ => None,
        };
        let report = reported.map(|reported| &reported.report);
        let checked = |rule: &str| {
            let checks = report?.checks.iter().filter(|check| check.rule == rule);
            Some(checks.map(|check| check.checked).sum())
        };
        let found = |v: &'a crate::report::Violation| Found {
            rule: &v.rule,
            frame: v.frame,
            va: v.va,
            vcpu: v.vcpu,
            seq: v.seq,
            detail: &v.detail,
        };
        Entry {
            name: &case.name,
            scenario: &case.scenario,
            machine: case.machine,
            mediation: case.mediation,
            seal: case.seal,
            vcpus: case.vcpus,
            fault: case.fault.map(|fault| fault.name()),
            expected: &case.expected,
            optional: case.optional,
            outcome: done.judgement.outcome,
            reasons: &done.judgement.reasons,
            took_ms: millis(done.took),
            verdict: report.map(|report| report.verdict.name()),
            required: case.require.iter().map(|rule| (rule.name(), checked(rule.name()))).collect(),
            confirmed: reported.map(|reported| reported.confirmed),
            violations: report.into_iter().flat_map(|r| &r.violations).map(found).collect(),
            repeat: self.repeat(&case.name),
        }
    }
}

/// The verdict on a suite, in a word.
pub(super) const fn verdict(status: ExitStatus) -> &'static str {
    match status {
        ExitStatus::Pass => "pass",
        ExitStatus::Host => "skipped",
        ExitStatus::Inconclusive => "inconclusive",
        _ => "fail",
    }
}

/// An argument as a shell takes it.
fn quoted(argument: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/=-_.:,+".contains(c);
    if !argument.is_empty() && argument.chars().all(plain) {
        return argument.to_owned();
    }
    format!("'{}'", argument.replace('\'', "'\\''"))
}
