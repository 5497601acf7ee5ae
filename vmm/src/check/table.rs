//! Lists and tables for eyes.

use super::case::{Case, Expected};
use super::judge::Outcome;
use super::results::{Counts, Results, verdict};
use super::session::Done;
use crate::cli::ExitStatus;
use crate::report::layout::paragraph;
use crate::report::{grouped, milliseconds};
use std::collections::BTreeSet;
use std::fmt::Write;

/// The names of cases and what is expected of each, a line each.
#[must_use]
pub fn list(cases: &[&Case]) -> String {
    let width = cases.iter().map(|case| case.name.chars().count()).max().unwrap_or(0);
    let line = |case: &&Case| {
        let optional = if case.optional { ", optional" } else { "" };
        format!("{:width$}  {}{optional}\n", case.name, case.expected.name())
    };
    cases.iter().map(line).collect()
}

/// What a suite came to: a line for each scenario and machine, then each case that did not end as
/// expected, with the reasons and the command that runs it again.
#[must_use]
pub fn table(results: &Results<'_>) -> String {
    let counts = results.counts();
    let mut out = headline(&counts);
    out.push('\n');
    let rows: Vec<_> = rows(&results.done);
    let width = rows.iter().map(|row| row.name.chars().count()).max().unwrap_or(0).max(8);
    // Writing to a string does not fail.
    _ = writeln!(
        out,
        "{:width$}  machine        clean       faults        other  skipped          time",
        "scenario"
    );
    for row in &rows {
        let [clean, faults, other] = row.kinds.map(|(good, all)| match all {
            0 => "-".to_owned(),
            _ => format!("{}/{}", grouped(good), grouped(all)),
        });
        _ = writeln!(
            out,
            "{:width$}  {:7}  {clean:>11}  {faults:>11}  {other:>11}  {:>7}  {:>12}",
            row.name,
            row.machine,
            row.skipped,
            milliseconds(row.us)
        );
    }
    for outcome in [Outcome::Failed, Outcome::Inconclusive, Outcome::Skipped] {
        details(&mut out, results, outcome);
    }
    out
}

fn headline(counts: &Counts) -> String {
    let what = match counts.status() {
        ExitStatus::Pass => "every clean case is clean, every fault was found by its rule",
        ExitStatus::Host => "this host cannot run all of the cases",
        ExitStatus::Inconclusive => "it cannot be told of all cases",
        _ => "not every case ended as it must",
    };
    let Counts { cases, passed, failed, inconclusive, skipped, skipped_optional, not_run } = counts;
    let mut text = format!(
        "{}: {what}\n{cases} cases: {passed} as expected, {failed} failed, {inconclusive} \
         inconclusive, {} skipped",
        verdict(counts.status()).to_uppercase(),
        skipped + skipped_optional
    );
    if *skipped_optional > 0 {
        _ = write!(text, " ({skipped_optional} of them optional)");
    }
    if *not_run > 0 {
        _ = write!(text, ", {not_run} not run");
    }
    text + "\n"
}

/// The cases of a scenario on a machine.
struct Row<'a> {
    name: &'a str,
    machine: &'static str,
    /// Clean ones, those with a fault, others: as expected, and all that ran.
    kinds: [(u64, u64); 3],
    skipped: u64,
    us: u64,
}

fn rows<'a>(done: &'a [Done<'_>]) -> Vec<Row<'a>> {
    let mut rows: Vec<Row<'a>> = Vec::new();
    for done in done {
        let (name, machine) = (done.case.scenario.as_str(), done.case.machine.name());
        let known = rows.iter().position(|row| (row.name, row.machine) == (name, machine));
        let index = known.unwrap_or_else(|| {
            rows.push(Row { name, machine, kinds: [(0, 0); 3], skipped: 0, us: 0 });
            rows.len() - 1
        });
        let row = &mut rows[index];
        row.us += u64::try_from(done.took.as_micros()).unwrap_or(u64::MAX);
        if matches!(done.judgement.outcome, Outcome::Skipped | Outcome::NotRun) {
            row.skipped += 1;
            continue;
        }
        let kind = match (done.case.fault, &done.case.expected) {
            (Some(_), _) => 1,
            (None, Expected::Pass) => 0,
            _ => 2,
        };
        row.kinds[kind].0 += u64::from(done.judgement.outcome == Outcome::Passed);
        row.kinds[kind].1 += 1;
    }
    rows
}

fn details(out: &mut String, results: &Results<'_>, outcome: Outcome) {
    let these = || results.done.iter().filter(|done| done.judgement.outcome == outcome);
    if outcome == Outcome::Skipped {
        // Of many that lack the same thing, it is said once.
        let reasons: BTreeSet<_> = these().flat_map(|done| &done.judgement.reasons).collect();
        for reason in reasons {
            let count = these().filter(|done| done.judgement.reasons.contains(reason)).count();
            out.push('\n');
            paragraph(out, 0, &format!("SKIPPED: {count} cases: {reason}"));
        }
        if these().any(|done| !done.case.optional) {
            let remedy = "a FILTER such as '*/sim/*' asks for those alone that can run here";
            paragraph(out, 2, remedy);
        }
        return;
    }
    for done in these() {
        out.push('\n');
        paragraph(out, 0, &format!("{}: {}", outcome.name(), done.case.name));
        paragraph(out, 2, &format!("expected {}", done.case.expected.name()));
        for reason in &done.judgement.reasons {
            paragraph(out, 2, reason);
        }
        paragraph(out, 2, &format!("again: {}", results.repeat(&done.case.name)));
    }
}
