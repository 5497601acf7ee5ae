//! What the program `probe` observed: plain data, and a table for eyes.

use super::layout::{grouped, paragraph};
use super::{Report, findings, verdict_reasons};
use serde::{Deserialize, Serialize};
use std::fmt::Write;

/// Width of the names of rows, and of each column.
const NAME: usize = 20;
const COLUMN: usize = 8;

/// One case: what was changed, how it was invalidated, by which CPU it was accessed.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Observed {
    /// `clear`, `remap`, `read-only`, `no-execute`, `clear-2m`, `split` or `flip`
    /// ([`Change`](lacuna_abi::observe::Change)).
    pub change: String,
    /// The entry was global.
    pub global: bool,
    /// `own` if the CPU that made the change made the accesses, else `other`.
    pub cpu: String,
    /// What the CPU that made the change invalidated by: `none`, `invlpg`, `cr3`, … `ipi`
    /// ([`Means`](lacuna_abi::observe::Means)).
    pub invalidation: String,
    /// Whether CPU, machine and guest have what it takes.
    pub offered: bool,
    /// Accesses after a change.
    pub rounds: u64,
    /// Those that went where the tables no longer led.
    pub stale: u64,
    /// Those at whose moment the CPU may have cached what leads elsewhere, by the audit's model.
    pub may_be_stale: u64,
    /// Those that went where the model allows nothing to lead: violations of `observed-access`.
    pub contradictions: u64,
}

impl Observed {
    /// The model allows stale accesses, and none was seen.
    #[must_use]
    pub const fn is_unseen(&self) -> bool {
        self.may_be_stale > 0 && self.stale == 0
    }

    /// The row of the table that it stands in.
    fn row(&self) -> String {
        let global = if self.global { "global" } else { "" };
        format!("{:11}{global:7}", self.change)
    }

    fn cell(&self) -> String {
        match self {
            Self { offered: false, .. } => "-".to_owned(),
            Self { contradictions: 1.., stale, .. } => format!("!{stale}"),
            Self { may_be_stale: 0, .. } => ".".to_owned(),
            Self { stale, .. } => stale.to_string(),
        }
    }
}

/// The table of `lacuna probe`, and what is to be said about it.
pub(super) fn render(report: &Report) -> String {
    let mut out = String::new();
    let machine = &report.machine;
    let rounds = report.observed.iter().map(|case| case.rounds).max().unwrap_or(0);
    let setting = format!(
        "{}: stale translations in {} rounds of each case on {}, {} translation ({}; {})",
        report.verdict.name().to_uppercase(),
        grouped(rounds),
        machine.kind,
        machine.translation,
        machine.cpu,
        machine.profile
    );
    paragraph(&mut out, 0, &setting);
    out.push('\n');
    verdict_reasons(&mut out, report);
    for (cpu, title) in [
        ("own", "The CPU that changed the entry accesses it again"),
        ("other", "Another CPU accesses it again"),
    ] {
        let cases = report.observed.iter().filter(|case| case.cpu == cpu);
        if cases.clone().any(|case| case.offered) {
            table(&mut out, title, cases);
        } else {
            paragraph(&mut out, 0, &format!("{title}: not offered on {} vCPU", report.guest.vcpus));
            out.push('\n');
        }
    }
    paragraph(
        &mut out,
        0,
        "A number: the model of what is cached allows stale accesses here, and so many were seen. \
         . none is allowed, and none was seen. ! seen though none is allowed. - not offered here, no \
         such case, or the run did not get there.",
    );
    out.push('\n');
    unseen(&mut out, &report.observed);
    findings(&mut out, report);
    out
}

/// The table alone, for the report of a run.
pub(super) fn tables(out: &mut String, report: &Report) {
    for (cpu, title) in
        [("own", "Observed on the CPU itself"), ("other", "Observed on another CPU")]
    {
        let cases = report.observed.iter().filter(|case| case.cpu == cpu);
        if cases.clone().any(|case| case.offered) {
            table(out, title, cases);
        }
    }
}

fn table<'a>(out: &mut String, title: &str, cases: impl Iterator<Item = &'a Observed> + Clone) {
    let mut means: Vec<&str> = Vec::new();
    let mut rows: Vec<String> = Vec::new();
    for case in cases.clone() {
        if !means.contains(&case.invalidation.as_str()) {
            means.push(&case.invalidation);
        }
        if !rows.contains(&case.row()) {
            rows.push(case.row());
        }
    }
    if rows.is_empty() {
        return;
    }
    _ = writeln!(out, "{title}");
    let mut head = format!("{:NAME$}", "change");
    means.iter().for_each(|means| head += &cell(&shortened(means)));
    paragraph(out, 0, &head);
    for row in rows {
        let mut line = format!("{row:NAME$}");
        for means in &means {
            let here = |case: &&Observed| case.row() == row && case.invalidation == *means;
            let found = cases.clone().find(here);
            line += &cell(&found.map_or_else(|| "-".to_owned(), Observed::cell));
        }
        paragraph(out, 0, &line);
    }
    out.push('\n');
}

/// A name that fits into a column.
fn shortened(means: &str) -> String {
    means.replace("invpcid", "invpc")
}

fn cell(text: &str) -> String {
    format!("{text:>COLUMN$}")
}

/// The cases in which staleness is allowed and none was seen, a line for each row.
fn unseen(out: &mut String, cases: &[Observed]) {
    let unseen: Vec<&Observed> = cases.iter().filter(|case| case.is_unseen()).collect();
    let allowed = cases.iter().filter(|case| case.may_be_stale > 0).count();
    if unseen.is_empty() {
        paragraph(
            out,
            0,
            &format!("Stale accesses were seen in all {allowed} cases that allow them."),
        );
        out.push('\n');
        return;
    }
    let title = format!("Allowed and not seen, in {} of {allowed} cases:", unseen.len());
    paragraph(out, 0, &title);
    let mut rows: Vec<(String, Vec<&str>)> = Vec::new();
    for case in unseen {
        let name = format!("{}{:6}", case.row(), case.cpu);
        match rows.iter_mut().find(|(row, _)| *row == name) {
            Some((_, means)) => means.push(&case.invalidation),
            None => rows.push((name, vec![&case.invalidation])),
        }
    }
    for (row, means) in rows {
        paragraph(out, 2, &format!("{row}{}", means.join(", ")));
    }
    out.push('\n');
}

#[cfg(test)]
mod tests {
    use super::super::Check;
    use super::*;

    fn case(
        change: &str,
        invalidation: &str,
        [rounds, stale, allowed, wrong]: [u64; 4],
    ) -> Observed {
        Observed {
            change: change.into(),
            invalidation: invalidation.into(),
            cpu: "own".into(),
            offered: rounds > 0,
            rounds,
            stale,
            may_be_stale: allowed,
            contradictions: wrong,
            ..Observed::default()
        }
    }

    fn table(observed: Vec<Observed>) -> String {
        Report { observed, ..Report::new() }.to_probe_text()
    }

    #[test]
    fn each_kind_of_case_has_a_sign_of_its_own() {
        let text = table(vec![
            case("clear", "none", [20, 17, 20, 0]),
            case("clear", "invlpg", [20, 0, 0, 0]),
            case("clear", "cr3", [20, 0, 20, 0]),
            case("clear", "invpcid2", [0; 4]),
            case("clear", "pge", [20, 3, 0, 3]),
        ]);
        let rows: Vec<Vec<&str>> = text.lines().map(|l| l.split_whitespace().collect()).collect();
        let head = vec!["change", "none", "invlpg", "cr3", "invpc2", "pge"];
        let place = rows.iter().position(|row| *row == head).unwrap();
        assert_eq!(rows[place + 1], ["clear", "17", ".", "0", "-", "!3"], "{text}");
    }

    #[test]
    fn what_is_allowed_and_was_not_seen_is_listed_and_nothing_else() {
        let seen = case("clear", "none", [20, 17, 20, 0]);
        let text = table(vec![seen.clone(), case("remap", "cr3", [20, 0, 20, 0])]);
        let list = text.split("Allowed and not seen, in 1 of 2 cases:").nth(1).unwrap();
        assert!(
            list.contains("remap") && list.contains("cr3") && !list.contains("clear"),
            "{text}"
        );
        assert!(text.contains("Another CPU accesses it again: not offered"), "{text}");
        let text = table(vec![seen]);
        assert!(text.contains("seen in all 1 cases"), "{text}");
    }

    #[test]
    fn a_report_without_observations_has_no_table() {
        let checks = vec![Check {
            rule: "observed-access".into(),
            checked: 0,
            not_checked: 0,
            violations: 0,
        }];
        let report = Report { checks, ..Report::new() };
        assert!(!report.to_text().contains("Observed on"));
        let observed = vec![case("clear", "none", [20, 17, 20, 0])];
        let report = Report { observed, ..report };
        assert!(report.to_text().contains("Observed on the CPU itself"));
    }
}
