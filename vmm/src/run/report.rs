//! From the end of a run to its report.

use super::Outcome;
use super::end::{End, Place};
use super::violations::violations;
use crate::audit::{Audit, CaseTally, Mediation, ProbeTally, Rule, Tally};
use crate::config::{self, Config, MachineKind};
use crate::gate::ProbeSummary;
use crate::machine::decode::SealedAccess;
use crate::names::Names;
use crate::report::{self, Address, Check, Frame, GuestError, Report};
use crate::sim::Statistics;
use crate::stop::Stopped;
use lacuna_abi::counter::Counters;
use lacuna_abi::observe::Case;
use std::time::Duration;

/// What a report says of the host, and of the time around the run.
pub struct Surroundings {
    /// The host.
    pub machine: report::Machine,
    /// What is odd about the configuration's files, as sentences.
    pub warnings: Vec<String>,
    /// Why the run cannot pass whatever was found: results that could not be kept.
    pub inconclusive: Vec<String>,
    /// Last line of the guest's log.
    pub last_line: Option<String>,
    /// Time from the start of the process' work to now.
    pub total: Duration,
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// The report of a run, judged.
#[must_use]
pub fn report(config: &Config, outcome: &Outcome, surroundings: Surroundings) -> Report {
    complete(config, outcome, outline(config, outcome, surroundings))
}

/// What is known before a run.
#[must_use]
pub fn beginning(config: &Config, machine: report::Machine) -> Report {
    let mut report = Report::new();
    report.config = Some(config.file.display().to_string());
    report.inject = config.inject.iter().map(|fault| fault.name().to_owned()).collect();
    report.machine = machine;
    report.guest.vcpus = config.guest.vcpus;
    report.guest.memory_mib = config.guest.memory_mib;
    report.guest.program = config.workload.program().name().to_owned();
    report
}

/// The report of a run with everything that the audit does not say.
#[must_use]
pub fn outline(config: &Config, outcome: &Outcome, surroundings: Surroundings) -> Report {
    let Surroundings { machine, mut warnings, inconclusive, last_line, total } = surroundings;
    let mut report = beginning(config, machine);
    report.machine.simulation = outcome.simulation.map(simulation);
    let mut never_stepped = None;
    outcome.with_gate(|gate| {
        if config.mediation == Mediation::Step && config.machine == MachineKind::Kvm {
            let (instructions, time) = outcome.stepped;
            let part = gate.stepped();
            let (from, to) = part.map_or((None, None), |(from, to)| (Some(from), to));
            let us = micros(time);
            let window_accesses = gate.audit().uses();
            report.machine.stepping =
                Some(report::Stepping { instructions, us, from, to, window_accesses });
            if part.is_none() {
                never_stepped = Some(format!(
                    "nothing was stepped: there was no gate call behind event {} (--step-from)",
                    config.steps.from
                ));
            } else if part != Some((0, None)) {
                warnings.push(
                    "not all of the run was stepped: outside of that part the guest's own records \
                     of table writes and flushes are believed"
                        .into(),
                );
            }
        }
        let stage = gate.stage();
        report.second_stage.backend = stage.name().to_owned();
        report.second_stage.granule = stage.granule();
        report.second_stage.detail = stage.detail();
        report.second_stage.probes = probes(gate.probe_summary());
        if let Some(why) = report.second_stage.probes.why.as_ref().filter(|_| stage.closes()) {
            warnings.push(format!(
                "no frame is touched to see whether the seal holds: {why}; second-stage-open rests \
                 on what the second stage says of itself"
            ));
        }
        if !stage.closes() {
            warnings.push(
                "the seal is off: secret frames are not closed, and second-stage-open is not checked".into(),
            );
        }
        let counted = gate.counters();
        for (name, value) in [
            ("gate_calls", counted.calls),
            ("gate_refused", counted.refused),
            ("ring_drains", counted.ring_drains),
            ("seals", counted.seals),
            ("opens", counted.opens),
            ("releases", counted.releases),
            ("events", counted.events),
            ("events_lost", gate.events_lost()),
            ("quiesces", counted.quiesces),
            ("exits", outcome.exits),
        ] {
            report.counters.insert(name.to_owned(), value);
        }
        if gate.audit().mediation() == Mediation::Tables {
            report.counters.insert("table_writes".to_owned(), counted.table_writes);
            report.counters.insert("table_writes_refused".to_owned(), counted.table_refusals);
        }
        report.inconclusive = inconclusive;
        report.inconclusive.extend(never_stepped);
        if gate.input_is_outstanding() && matches!(outcome.end, End::Exit(0, _)) {
            report.inconclusive.push("the guest never took over its secret input".into());
        }
        let boot = gate.ready_at().map(|ready| ready.saturating_duration_since(outcome.started));
        report.guest.boot_us = boot.map(micros);
        let audit = gate.audit_time();
        report.timing = report::Timing {
            setup_us: micros(outcome.opening),
            guest_us: micros(outcome.in_guest),
            gate_us: micros(outcome.running.saturating_sub(outcome.in_guest + audit)),
            audit_us: micros(audit),
            total_us: micros(total),
        };
        end(&mut report, &outcome.end, config, last_line);
        if let End::Exit(_, counters) = &outcome.end {
            add_counters(&mut report, counters);
            let work = outcome.in_guest.saturating_sub(boot.unwrap_or_default());
            report.guest.set_work(counters.work, micros(work));
        }
    });
    report.warnings = warnings;
    report
}

/// The outline of a report with what the audit says, judged.
#[must_use]
pub fn complete(config: &Config, outcome: &Outcome, outline: Report) -> Report {
    outcome.with_gate(|gate| judged(outline, gate.audit(), &outcome.names, &config.audit))
}

/// The same for any audit, live or of a recording.
#[must_use]
pub(crate) fn judged(
    mut report: Report,
    audit: &Audit,
    names: &Names,
    expected: &config::Audit,
) -> Report {
    let result = audit.result();
    let check = |(rule, tally): &(Rule, Tally)| Check {
        rule: rule.name().to_owned(),
        checked: tally.checked,
        not_checked: tally.not_checked,
        violations: tally.violations,
    };
    report.checks = result.tallies.iter().map(check).collect();
    report.observed = audit.observations().map(observed).collect();
    report.violations = violations(result.findings, names);
    report.inconclusive.splice(0..0, result.inconclusive);
    report.judge(expected);
    report
}

/// The guest's own counters; where the host counts the same thing, the host's number stands.
fn add_counters(report: &mut Report, counters: &Counters) {
    for (name, value) in Counters::FIELDS.iter().zip(counters.to_words()) {
        report.counters.entry((*name).to_owned()).or_insert(value);
    }
}

fn end(report: &mut Report, end: &End, config: &Config, last_line: Option<String>) {
    let error = |kind: &str, message: String, place: Option<&Place>| GuestError {
        kind: kind.to_owned(),
        message,
        vcpu: place.map(|place| place.cpu),
        rip: place.and_then(|place| place.rip).map(Address),
        symbol: place.and_then(|place| place.symbol.clone()),
        backtrace: place.map(frames).unwrap_or_default(),
    };
    match end {
        End::Exit(0, _) => {}
        End::Exit(status, _) => {
            let why = last_line.unwrap_or_else(|| "it left no line in its log".into());
            let message = format!("the program failed with status {status}: {why}");
            report.guest_error = Some(error("program", message, None));
        }
        End::Sealed(access, place) => report.sealed_accesses.push(sealed(access, place)),
        End::Guest(end) => {
            report.guest_error = Some(error(end.kind, end.message.clone(), Some(&end.place)));
        }
        End::Stopped(Stopped::Timeout, place) => {
            let message = format!(
                "the guest did not end within {} s ([limits] timeout_s)",
                config.limits.timeout_s
            );
            report.guest_error = Some(error("timeout", message, Some(place)));
        }
        End::Stopped(Stopped::Cancelled, place) => {
            let place = place.symbol.clone().or_else(|| place.rip.map(|rip| format!("{rip:#x}")));
            let place =
                place.map_or_else(String::new, |place| format!(", the guest was at {place}"));
            report.inconclusive.push(format!("the run was interrupted{place}"));
        }
        End::Lost(message) => report.inconclusive.push(message.clone()),
        End::Host(message) => report.inconclusive.push(format!("the host failed: {message}")),
    }
}

fn sealed(access: &SealedAccess, place: &Place) -> report::SealedAccess {
    report::SealedAccess {
        gpa: Some(Address(access.gpa.0)),
        kind: access.kind.name().to_owned(),
        vcpu: place.cpu,
        rip: place.rip.map(Address),
        va: access.va.map(|va| Address(va.0)),
        symbol: place.symbol.clone(),
        expected: false,
    }
}

fn observed((case, tally): (Case, CaseTally)) -> report::Observed {
    let CaseTally { rounds, stale, allowed, contradictions, not_offered } = tally;
    report::Observed {
        change: case.change().name().to_owned(),
        global: case.global(),
        cpu: if case.other() { "other" } else { "own" }.to_owned(),
        invalidation: case.means().name().to_owned(),
        offered: not_offered == 0,
        rounds,
        stale,
        may_be_stale: allowed,
        contradictions,
    }
}

fn probes(summary: ProbeSummary) -> report::Probes {
    let ProbeSummary { seed, each, tally, why_none } = summary;
    let turned_off = || (each == 0).then(|| "[audit] probes is 0".to_owned());
    let why = why_none.or_else(turned_off).filter(|_| tally.without > 0);
    touched(report::Probes { seed, each, why, ..report::Probes::default() }, tally)
}

/// The same touches, counted so.
pub(crate) fn touched(probes: report::Probes, tally: ProbeTally) -> report::Probes {
    let report::Probes { seed, each, why, .. } = probes;
    let ProbeTally { trapped, went_through, failed, held_open, seal_off, without } = tally;
    report::Probes { seed, each, trapped, went_through, failed, held_open, seal_off, without, why }
}

fn simulation(statistics: Statistics) -> report::Simulation {
    let Statistics { seed, schedule, switches, walks, speculations, stale_uses, stale_secret_uses } =
        statistics;
    let schedule = schedule.name().to_owned();
    report::Simulation {
        seed,
        schedule,
        switches,
        walks,
        speculations,
        stale_uses,
        stale_secret_uses,
    }
}

fn frames(place: &Place) -> Vec<Frame> {
    let frames = place.backtrace.iter();
    frames.map(|(rip, symbol)| Frame { rip: Address(*rip), symbol: symbol.clone() }).collect()
}
