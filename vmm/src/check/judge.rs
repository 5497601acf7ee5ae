//! From what a case left to a judgement: one pure function.

use super::case::{Case, Expected, Violation};
use crate::report::{Report, Verdict};
use serde::{Deserialize, Serialize};

/// A run that got as far as a report.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Reported {
    /// The report.
    pub report: Report,
    /// Findings of the expected rule for which the recorded events do not show the same, as sentences.
    pub unconfirmed: Vec<String>,
    /// Findings for which they do.
    pub confirmed: u64,
}

/// What a case left.
#[derive(Clone, PartialEq, Debug)]
pub enum Ran {
    /// A report.
    Reported(Box<Reported>),
    /// This host cannot run it; why.
    Missing(String),
    /// The VMM ended without a report: a fault of the VMM. What is known of it.
    Crashed(String),
    /// It took longer than it may.
    TimedOut,
    /// It was broken off, or never begun.
    Interrupted,
}

/// How a case ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// As expected.
    Passed,
    /// Otherwise.
    Failed,
    /// It cannot be told.
    Inconclusive,
    /// This host cannot run it.
    Skipped,
    /// The suite was broken off before.
    NotRun,
}

impl Outcome {
    /// In a word, for lists.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Passed => "ok",
            Self::Failed => "FAILED",
            Self::Inconclusive => "INCONCLUSIVE",
            Self::Skipped => "SKIPPED",
            Self::NotRun => "NOT RUN",
        }
    }
}

/// The judgement of a case.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Judgement {
    /// How it ended.
    pub outcome: Outcome,
    /// Why it is not as expected, as sentences; empty if it is.
    pub reasons: Vec<String>,
}

impl Judgement {
    fn passed() -> Self {
        Self { outcome: Outcome::Passed, reasons: Vec::new() }
    }

    fn new(outcome: Outcome, reason: impl Into<String>) -> Self {
        Self { outcome, reasons: vec![reason.into()] }
    }

    fn failed(reason: impl Into<String>) -> Self {
        Self::new(Outcome::Failed, reason)
    }
}

/// Compares what a case left with what is expected of it.
#[must_use]
pub fn judge(case: &Case, ran: &Ran) -> Judgement {
    match ran {
        Ran::Reported(reported) => judge_report(case, reported),
        Ran::Missing(what) => Judgement::new(Outcome::Skipped, what),
        Ran::Crashed(what) => Judgement::failed(format!("the VMM failed: {what}")),
        Ran::TimedOut => Judgement::failed(format!(
            "it took longer than {} s ([scenario] timeout_s)",
            case.timeout.as_secs()
        )),
        Ran::Interrupted => Judgement::new(Outcome::NotRun, "the suite was broken off"),
    }
}

fn judge_report(case: &Case, reported: &Reported) -> Judgement {
    let report = &reported.report;
    match &case.expected {
        Expected::Pass => judge_clean(case, report),
        Expected::Violation(violation) => judge_violation(violation, reported),
        Expected::GuestError(message) => {
            let said = report.guest_error.as_ref().map(|error| error.message.as_str());
            let said = said.into_iter().map(str::to_owned).collect();
            ends_with(report, Verdict::GuestError, message.as_deref(), said)
        }
        Expected::Inconclusive(message) => {
            let said = report.inconclusive.clone();
            ends_with(report, Verdict::Inconclusive, message.as_deref(), said)
        }
    }
}

fn checked(report: &Report, rule: &str) -> u64 {
    report.checks.iter().filter(|c| c.rule == rule).map(|c| c.checked).sum()
}

/// A clean case is clean, and exercised what it must.
fn judge_clean(case: &Case, report: &Report) -> Judgement {
    let missing = case.require.iter().filter(|rule| checked(report, rule.name()) == 0);
    let missing = missing.map(|rule| format!("the rule {} was never exercised", rule.name()));
    let missing: Vec<_> = missing.collect();
    match report.verdict {
        Verdict::Pass if missing.is_empty() => Judgement::passed(),
        // What the report says is missing is among them.
        Verdict::Pass => Judgement { outcome: Outcome::Failed, reasons: missing },
        Verdict::Inconclusive if missing.is_empty() => {
            Judgement { outcome: Outcome::Inconclusive, reasons: report.inconclusive.clone() }
        }
        Verdict::Inconclusive => {
            let reasons = missing.into_iter().chain(report.inconclusive.iter().cloned());
            Judgement { outcome: Outcome::Failed, reasons: reasons.collect() }
        }
        Verdict::Violation | Verdict::GuestError => {
            Judgement { outcome: Outcome::Failed, reasons: what_went_wrong(report) }
        }
    }
}

/// A violation of the rule was found, where it is expected, and the events show the same.
fn judge_violation(expected: &Violation, reported: &Reported) -> Judgement {
    let report = &reported.report;
    let rule = expected.rule.name();
    let counted: u64 = report.checks.iter().filter(|c| c.rule == rule).map(|c| c.violations).sum();
    let found: Vec<_> = report.violations.iter().filter(|v| v.rule == rule).collect();
    if counted == 0 || found.is_empty() {
        let mut reasons = vec![format!("no violation of {rule} was found")];
        reasons.extend(what_went_wrong(report));
        return Judgement { outcome: Outcome::Failed, reasons };
    }
    if report.verdict != Verdict::Violation {
        let verdict = report.verdict;
        return Judgement::failed(format!("the verdict is {verdict} in spite of what was found"));
    }
    let place = |v: &&&crate::report::Violation| {
        let told = |name: &str| {
            v.story.iter().filter_map(|step| step.function.as_ref()).any(|f| f.contains(name))
        };
        expected.vcpu.is_none_or(|vcpu| v.vcpu == Some(vcpu))
            && expected.frame.is_none_or(|frame| v.frame.is_some_and(|f| f.0 == frame))
            && expected.function.as_deref().is_none_or(told)
    };
    if found.iter().find(place).is_none() {
        let mut reasons =
            vec![format!("no violation of {rule} is where it should be{}", at(expected))];
        reasons.extend(what_went_wrong(report));
        return Judgement { outcome: Outcome::Failed, reasons };
    }
    match reported.unconfirmed.is_empty() {
        true => Judgement::passed(),
        false => Judgement { outcome: Outcome::Failed, reasons: reported.unconfirmed.clone() },
    }
}

fn at(expected: &Violation) -> String {
    let Violation { vcpu, frame, function, .. } = expected;
    let parts = [
        vcpu.map(|vcpu| format!("vCPU {vcpu}")),
        frame.map(|frame| format!("frame {frame:#x}")),
        function.as_ref().map(|name| format!("function {name:?}")),
    ];
    let parts: Vec<_> = parts.into_iter().flatten().collect();
    if parts.is_empty() { String::new() } else { format!(": {}", parts.join(", ")) }
}

fn ends_with(
    report: &Report,
    verdict: Verdict,
    message: Option<&str>,
    said: Vec<String>,
) -> Judgement {
    if report.verdict != verdict {
        let mut reasons = vec![format!("the verdict is {}, not {verdict}", report.verdict)];
        reasons.extend(what_went_wrong(report));
        return Judgement { outcome: Outcome::Failed, reasons };
    }
    match message {
        Some(message) if !said.iter().any(|text| text.contains(message)) => {
            let said = said.join("; ");
            Judgement::failed(format!("{message:?} is not in what was said: {said}"))
        }
        _ => Judgement::passed(),
    }
}

/// Most findings that are told of a case: the report has all.
const MAX_TOLD: usize = 3;

/// What the report says went wrong, as sentences.
fn what_went_wrong(report: &Report) -> Vec<String> {
    let unexpected: Vec<_> = report.violations.iter().filter(|v| !v.expected).collect();
    let mut told: Vec<_> = unexpected
        .iter()
        .take(MAX_TOLD)
        .map(|v| {
            let place = [
                v.frame.map(|frame| format!(" frame {frame}")),
                v.vcpu.map(|vcpu| format!(" vCPU {vcpu}")),
                Some(format!(" event {}", v.seq)),
            ];
            let place: String = place.into_iter().flatten().collect();
            format!("{} is violated,{place}: {}", v.rule, v.detail)
        })
        .collect();
    if unexpected.len() > MAX_TOLD {
        told.push(format!("and {} more violations", unexpected.len() - MAX_TOLD));
    }
    if let Some(error) = &report.guest_error {
        told.push(format!("guest error: {}", error.message));
    }
    told.extend(report.inconclusive.iter().map(|reason| format!("inconclusive: {reason}")));
    if told.is_empty() {
        told.push(format!("the verdict is {}", report.verdict));
    }
    told
}
