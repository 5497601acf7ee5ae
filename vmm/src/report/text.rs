//! The text form of a report.

use super::layout::{grouped, labelled, milliseconds, paragraph};
use super::observed::tables;
use super::story::story;
use super::{Address, Probes, Report, Simulation, Stepping, Verdict};
use std::fmt::{Display, Write};

/// Most violations, and most sealed accesses, that are shown one by one.
const SHOWN: usize = 20;
/// Width of the names in front of a line.
const LABEL: usize = 15;

/// Counters that belong together. What is not listed here follows under "other".
const GROUPS: &[(&str, &[&str])] = &[
    (
        "allocations",
        &[
            "alloc",
            "alloc_secret",
            "free",
            "free_secret",
            "alloc_fail",
            "alloc_fail_noblock",
            "alloc_fail_no_block",
            "alloc_fallback",
        ],
    ),
    ("zeroed pages", &["zeroed_mapped", "zeroed_flip", "zeroed_alloc", "zeroed_scrub"]),
    (
        "mapping",
        &[
            "flip_to_unmapped",
            "flip_to_mapped",
            "shootdowns",
            "windows",
            "windows_reserved",
            "window_flushes",
            "local_flushes",
        ],
    ),
    (
        "in place",
        &[
            "converted",
            "converted_pages",
            "restored",
            "parked",
            "splits",
            "merges",
            "nr_table_pages",
        ],
    ),
    (
        "background",
        &[
            "balance_refill",
            "balance_reclaim",
            "scrubs",
            "scrubs_atomic",
            "drains",
            "compact_success",
            "compact_fail",
            "pages_moved",
        ],
    ),
    ("checked pages", &["tags_checked", "poison_checked", "zero_checked"]),
    ("gate", &["gate_calls", "gate_refused", "ring_drains", "seals", "opens", "releases"]),
    ("tables", &["table_writes", "table_writes_refused"]),
    ("events", &["events", "events_lost", "quiesces"]),
    (
        "pages at end",
        &["nr_free_mapped", "nr_free_unmapped", "nr_allocated", "nr_withheld", "nr_fresh"],
    ),
];

/// Freetypes, as the names of their counters end.
const FREETYPES: [&str; 6] = [
    "unmovable",
    "movable",
    "reclaimable",
    "unmapped_unmovable",
    "unmapped_movable",
    "unmapped_reclaimable",
];
/// What is counted for each.
const PLACES: [&str; 4] = ["free", "cached", "allocated", "total"];

pub(super) fn render(report: &Report) -> String {
    let mut out = String::new();
    headline(&mut out, report);
    setting(&mut out, report);
    verdict_reasons(&mut out, report);
    findings(&mut out, report);
    sealed_accesses(&mut out, report);
    tables(&mut out, report);
    rules(&mut out, report);
    counters(&mut out, report);
    freetypes(&mut out, report);
    timing(&mut out, report);
    out
}

/// Whether something was found that the configuration expects.
fn expected(report: &Report) -> bool {
    !report.violations.is_empty() || !report.sealed_accesses.is_empty()
}

fn headline(out: &mut String, report: &Report) {
    let sentence = match report.verdict {
        Verdict::Pass if expected(report) => "nothing was found but what is expected",
        Verdict::Pass => "every rule that was exercised holds",
        Verdict::Violation => "a rule was violated",
        Verdict::Inconclusive => "not everything that had to be checked could be checked",
        Verdict::GuestError => "the guest failed",
    };
    let name = report.verdict.name().to_uppercase();
    paragraph(out, 0, &format!("{name}: {sentence}"));
    out.push('\n');
}

fn setting(out: &mut String, report: &Report) {
    let Report { machine, second_stage, guest, .. } = report;
    if let Some(config) = &report.config {
        line(out, "config", config);
    }
    if !report.inject.is_empty() {
        line(out, "planted faults", &report.inject.join(", "));
    }
    let cpu = &machine.cpu;
    let evidence = match machine.evidence.as_str() {
        "" => String::new(),
        evidence => format!(" ({evidence})"),
    };
    line(
        out,
        "machine",
        &format!(
            "{}, {} translation{evidence}, Linux {}, {cpu}; invalidation profile {}; mediation: {}",
            machine.kind, machine.translation, machine.kernel, machine.profile, machine.mediation
        ),
    );
    if let Some(simulation) = &machine.simulation {
        let Simulation { seed, schedule, switches, stale_uses, stale_secret_uses, .. } = simulation;
        let repeats = match schedule.as_str() {
            "seeded" => format!("seed {seed} repeats it"),
            _ => "it cannot be repeated".to_owned(),
        };
        let [switches, stale_uses, secret] =
            [switches, stale_uses, stale_secret_uses].map(|count| grouped(*count));
        line(
            out,
            "simulation",
            &format!(
                "{repeats}; {switches} switches between CPUs; {stale_uses} uses of stale \
                 translations, {secret} of them of secret frames that must not happen"
            ),
        );
    }
    if let Some(stepping) = &machine.stepping {
        line(out, "stepped", &stepped(stepping));
    }
    if second_stage.granule == 0 {
        line(out, "second stage", &format!("{}: {}", second_stage.backend, second_stage.detail));
        line(
            out,
            "WARNING",
            "nothing is closed: the second stage denies the guest no secret frame",
        );
    } else {
        let granule = grouped(second_stage.granule);
        let text =
            format!("{}, granule {granule} bytes: {}", second_stage.backend, second_stage.detail);
        line(out, "second stage", &text);
        probes(out, &second_stage.probes);
    }
    let boot = guest.boot_us.map_or_else(
        || "it did not get as far as its allocator".to_owned(),
        |us| format!("allocator ready after {}", milliseconds(us)),
    );
    let vcpus = if guest.vcpus == 1 { "vCPU" } else { "vCPUs" };
    line(
        out,
        "guest",
        &format!(
            "program {}, {} MiB, {} {vcpus}; {boot}",
            guest.program,
            grouped(guest.memory_mib),
            guest.vcpus
        ),
    );
    if let (Some(us), Some(each)) = (guest.work_us, guest.us_per_event) {
        let unit = match guest.program.as_str() {
            "replay" => "trace events",
            "secrets" => "pages",
            _ => "units of work",
        };
        let work = grouped(guest.work);
        line(out, "work", &format!("{work} {unit} in {}, {each:.2} us each", milliseconds(us)));
    }
    for warning in &report.warnings {
        line(out, "warning", warning);
    }
    out.push('\n');
}

/// What was touched to see whether the second stage does what it says.
fn probes(out: &mut String, probes: &Probes) {
    let Probes { seed, each, trapped, went_through, failed, held_open, without, why, .. } = probes;
    let [each, trapped, went_through, held_open, failed, without] =
        [each, trapped, went_through, held_open, failed, without].map(|count| grouped(*count));
    let mut text = format!(
        "{trapped} trapped, {went_through} went through ({each} a check, drawn from seed {seed})"
    );
    for (count, what) in [(held_open, "held open by their granule"), (failed, "failed")] {
        if count != "0" {
            text += &format!(", {count} {what}");
        }
    }
    if let Some(why) = why {
        text += &format!("; {without} checks without: {why}");
    }
    line(out, "probes", &text);
}

pub(super) fn verdict_reasons(out: &mut String, report: &Report) {
    if let Some(error) = &report.guest_error {
        let mut place = vec![error.kind.clone()];
        place.extend(error.vcpu.map(|vcpu| format!("vCPU {vcpu}")));
        place.extend(error.rip.map(|rip| at(rip, error.symbol.as_deref())));
        labelled(out, 0, "Guest error: ", &place.join(", "));
        paragraph(out, 2, &error.message);
        for (index, frame) in error.backtrace.iter().enumerate() {
            let symbol = frame.symbol.as_deref().unwrap_or("?");
            labelled(out, 2, &format!("#{index:<3}"), &format!("{}  {symbol}", frame.rip));
        }
        out.push('\n');
    }
    if !report.inconclusive.is_empty() {
        out.push_str("Inconclusive, because:\n");
        for reason in &report.inconclusive {
            labelled(out, 0, "- ", reason);
        }
        out.push('\n');
    }
}

pub(super) fn findings(out: &mut String, report: &Report) {
    for (index, violation) in report.violations.iter().take(SHOWN).enumerate() {
        let expected = if violation.expected { " (expected)" } else { "" };
        let head = format!("Violation {}{expected}: ", index + 1);
        labelled(out, 0, &head, &violation.rule);
        let known =
            |name: &str, value: Option<&dyn Display>| value.map(|value| format!("{name} {value}"));
        let facts: Vec<_> = [
            known("frame", violation.frame.as_ref().map(|v| v as _)),
            known("at", violation.va.as_ref().map(|v| v as _)),
            known("vCPU", violation.vcpu.as_ref().map(|v| v as _)),
            known("root", violation.root.as_ref().map(|v| v as _)),
            known("event", Some(&violation.seq)),
        ]
        .into_iter()
        .flatten()
        .collect();
        paragraph(out, 2, &facts.join(", "));
        paragraph(out, 2, &violation.detail);
        if !violation.story.is_empty() {
            paragraph(out, 2, "How it came to that:");
            story(out, &violation.story);
        }
        out.push('\n');
    }
    // The list itself may be cut short; the counts are exact.
    let total: u64 = report.checks.iter().map(|check| check.violations).sum();
    let listed = report.violations.len().min(SHOWN) as u64;
    more(out, "violations", total.max(report.violations.len() as u64) - listed);
}

fn sealed_accesses(out: &mut String, report: &Report) {
    if report.sealed_accesses.is_empty() {
        return;
    }
    out.push_str("Accesses to sealed frames:\n");
    for access in report.sealed_accesses.iter().take(SHOWN) {
        let mut text = access.kind.clone();
        match access.gpa {
            Some(gpa) => _ = write!(text, " of {gpa}"),
            None => text.push_str(" of an unknown address"),
        }
        if let Some(va) = access.va {
            _ = write!(text, " through {va}");
        }
        _ = write!(text, ", vCPU {}", access.vcpu);
        if let Some(rip) = access.rip {
            _ = write!(text, ", {}", at(rip, access.symbol.as_deref()));
        }
        if access.expected {
            text.push_str(" (expected)");
        }
        labelled(out, 0, "- ", &text);
    }
    more(out, "accesses", report.sealed_accesses.len().saturating_sub(SHOWN) as u64);
    out.push('\n');
}

fn rules(out: &mut String, report: &Report) {
    if report.checks.is_empty() {
        return;
    }
    _ = writeln!(out, "{:20}{:>14}{:>14}{:>12}", "Rule", "checked", "not checked", "violations");
    for check in &report.checks {
        let note = match (check.checked, check.violations) {
            (_, 1..) => "  VIOLATED",
            (0, _) if check.not_checked > 0 => "  could not be checked",
            (0, _) => "  never exercised",
            _ => "",
        };
        let [checked, not_checked, violations] =
            [check.checked, check.not_checked, check.violations].map(grouped);
        let row = format!("{:20}{checked:>14}{not_checked:>14}{violations:>12}", check.rule);
        paragraph(out, 0, &format!("{row}{note}"));
    }
    out.push('\n');
}

fn counters(out: &mut String, report: &Report) {
    let elsewhere = |name: &str| {
        let place = |place: &&str| name.strip_prefix(&format!("nr_{place}_"));
        GROUPS.iter().any(|(_, names)| names.contains(&name))
            || PLACES.iter().find_map(place).is_some_and(|kind| FREETYPES.contains(&kind))
    };
    let others: Vec<_> =
        report.counters.keys().map(String::as_str).filter(|name| !elsewhere(name)).collect();
    let all = GROUPS.iter().map(|(title, names)| (*title, *names)).chain([("other", &*others)]);
    for (title, names) in all {
        let value = |name: &&str| {
            let value = report.counters.get(*name)?;
            // A space that does not break keeps the value beside its name.
            Some(format!("{name}\u{a0}{}", grouped(*value)))
        };
        let values: Vec<_> = names.iter().filter_map(value).collect();
        let zero = |name: &&str| report.counters.get(*name).is_none_or(|value| *value == 0);
        if !names.iter().all(zero) {
            line(out, title, &values.join(", "));
        }
    }
}

/// Where the pages of each freetype are that has any.
fn freetypes(out: &mut String, report: &Report) {
    let pages = |place: &str, kind: &str| {
        report.counters.get(format!("nr_{place}_{kind}").as_str()).copied().unwrap_or(0)
    };
    let mut label = "by freetype";
    for kind in FREETYPES.iter().filter(|kind| pages("total", kind) > 0) {
        let [free, cached, allocated, total] = PLACES.map(|place| grouped(pages(place, kind)));
        let text = format!(
            "{total} {} pages: {free} free, {cached} on lists of CPUs, {allocated} allocated",
            kind.replace('_', " ")
        );
        line(out, label, &text);
        label = "";
    }
}

fn timing(out: &mut String, report: &Report) {
    let timing = &report.timing;
    let [setup, guest, gate, audit, total] =
        [timing.setup_us, timing.guest_us, timing.gate_us, timing.audit_us, timing.total_us]
            .map(milliseconds);
    line(
        out,
        "time",
        &format!("{total}: set-up {setup}, guest {guest}, gate {gate}, audit {audit}"),
    );
}

fn line(out: &mut String, label: &str, text: &str) {
    labelled(out, 0, &format!("{label:LABEL$}"), text);
}

fn at(rip: Address, symbol: Option<&str>) -> String {
    symbol.map_or_else(|| format!("at {rip}"), |symbol| format!("at {rip} in {symbol}"))
}

fn more(out: &mut String, what: &str, count: u64) {
    if count > 0 {
        paragraph(out, 0, &format!("… and {} more {what}", grouped(count)));
    }
}

/// How much was stepped, which part of the run that was, and how fast.
fn stepped(stepping: &Stepping) -> String {
    let Stepping { instructions, us, from, to, window_accesses } = stepping;
    let part = match (from, to) {
        (None, _) => {
            return "nothing was stepped".into();
        }
        (Some(0), None) => "all of the run".to_owned(),
        (Some(from), None) => format!("from event {from} on"),
        (Some(from), Some(to)) => format!("events {from} to {to} alone"),
    };
    let rate = stepping
        .per_second()
        .map_or_else(String::new, |rate| format!(", {} a second", grouped(rate)));
    let (instructions, time) = (grouped(*instructions), milliseconds(*us));
    let accesses = grouped(*window_accesses);
    format!(
        "{instructions} instructions in {time}{rate}; {part}; {accesses} accesses through windows"
    )
}
