//! Guests on KVM that misbehave on purpose. Ignored or required as the tests in `kvm.rs`.
//!
//! `LACUNA_HOSTILE_GUESTS=5000 LACUNA_HOSTILE_SEED=1 cargo test -p lacuna --test hostile` runs as many
//! as are asked for; without it a few hundred.

mod support;

use lacuna::audit::Rule;
use lacuna::config::{Config, Mediation, Overrides, Seal};
use lacuna::hostile::{Notes, Program, Sin};
use lacuna::image::Image;
use lacuna::report::{self, Report, Verdict};
use lacuna::run::{Host, Machine, Plan, Surroundings, report};
use libtest_mimic::{Failed, Trial};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};
use support::{Check, ensure, trial};

/// Longest that a guest runs.
const LIMIT: Duration = Duration::from_millis(150);
/// What it may take beyond that: the last check, on a host that is busy.
const PATIENCE: Duration = Duration::from_secs(30);
/// KiB by which the VMM may have grown after hundreds of guests or thousands: less than one guest takes.
const MAX_GROWTH_KIB: u64 = 24 << 10;

fn main() {
    let mut trials = vec![
        trial("generated_guests_do_no_harm", generated),
        trial("kvm_is_not_made_to_write_page_tables", no_clock),
    ];
    for sin in Sin::ALL {
        let name = format!("{}_is_found_when_stepped", sin.name());
        trials.push(Trial::test(name, move || found(*sin, Seal::Guard, Mediation::Step)));
        if sin.is_undone() {
            let name = format!("{}_is_what_trace_does_not_claim_to_see", sin.name());
            trials.push(Trial::test(name, move || not_seen(*sin)));
            continue;
        }
        for seal in [Seal::Guard, Seal::Memslot, Seal::Off] {
            let name = format!("{}_is_found_under_{}", sin.name(), seal.name());
            trials.push(Trial::test(name, move || found(*sin, seal, Mediation::Trace)));
        }
    }
    support::run(trials, true);
}

/// A guest that has ended.
struct Ran {
    report: Report,
    /// What it left that a rule forbids.
    forbidden: Option<String>,
    /// vCPUs that ran.
    running: usize,
}

fn run(
    (image, vcpus): (&[u8], u8),
    (seal, mediation): (Seal, Mediation),
    timeout: Duration,
) -> Result<Ran, Failed> {
    let text = "[guest]\nmemory_mib = 16\n[workload]\nprogram = \"idle\"\n";
    let overrides =
        Overrides { seal: Some(seal), mediate: Some(mediation), ..Overrides::default() };
    let config = Config::from_text(Path::new("hostile.toml"), text, &overrides)?;
    let (mut plan, _) = Plan::new(&config)?;
    plan.image = Image::parse(image)?;
    plan.vcpus = vcpus;
    plan.timeout = timeout;
    let notes = Notes::default();
    let machine = Machine::open(Host::of(config.machine)?, plan, vec![Box::new(notes.clone())])?;
    let outcome = machine.start()?.wait(|_| ControlFlow::Continue(()));
    let surroundings = Surroundings {
        machine: report::Machine::default(),
        warnings: Vec::new(),
        inconclusive: Vec::new(),
        last_line: None,
        total: Duration::ZERO,
    };
    let report = report(&config, &outcome, surroundings);
    // The VMM takes the pool's first page for the root.
    Ok(outcome.with_gate(|gate| {
        let root = gate.memory().layout().pool.gpa;
        let (forbidden, running) = (notes.forbidden(gate, root), gate.audit().running().count());
        Ran { report, forbidden, running }
    }))
}

/// What it does is a violation of its rule, whatever else is.
fn found(sin: Sin, seal: Seal, mediation: Mediation) -> Check {
    let report = run((&sin.image()?, 1), (seal, mediation), PATIENCE)?.report;
    let all = &report.violations;
    ensure(report.verdict == Verdict::Violation, &format!("{:?}: {all:#?}", report.verdict))?;
    let rule = match (sin, mediation) {
        // It gives its record a number without asking the counter: the one of the store that was seen.
        (Sin::NotFlushed, Mediation::Step) => Rule::TraceHonesty,
        _ => sin.rule(),
    };
    let found = all.iter().any(|violation| violation.rule == rule.name());
    ensure(found, &format!("{} is not among {all:#?}", rule.name()))
}

/// The table of docs/how-it-checks.md, "What each mode cannot see", says so.
fn not_seen(sin: Sin) -> Check {
    let report = run((&sin.image()?, 1), (Seal::Guard, Mediation::Trace), PATIENCE)?.report;
    let said = format!("{:?}: {:#?} {:?}", report.verdict, report.violations, report.inconclusive);
    ensure(report.verdict == Verdict::Pass, &said)
}

/// The MSR is not there: the write is an exception, for which this guest has no handler.
fn no_clock() -> Check {
    let image = Sin::clock_in_a_table()?;
    let report = run((&image, 1), (Seal::Guard, Mediation::Trace), PATIENCE)?.report;
    let said = format!("{:?}: {:?}", report.verdict, report.guest_error);
    ensure(report.verdict == Verdict::GuestError, &said)
}

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().and_then(|number| number.parse().ok()).unwrap_or(otherwise)
}

fn resident_kib() -> Result<u64, Failed> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok());
    kib.ok_or_else(|| "no VmRSS in /proc/self/status".into())
}

/// Nothing that a guest does makes the VMM panic, fail, hang or grow.
fn generated() -> Check {
    let guests = number("LACUNA_HOSTILE_GUESTS", 300);
    let first = number("LACUNA_HOSTILE_SEED", 0);
    let warm = guests / 10;
    let (mut before, mut several) = (0, 0);
    let mut kinds: BTreeMap<(&str, &str), u64> = BTreeMap::new();
    for seed in first..first + guests {
        if seed == first + warm {
            before = resident_kib()?;
        }
        let program = Program::new(seed);
        let seal = [Seal::Guard, Seal::Guard, Seal::Memslot, Seal::Off][(seed / 8 % 4) as usize];
        let started = Instant::now();
        let Ran { report, forbidden, running } =
            run((&program.image, program.vcpus), (seal, Mediation::Trace), LIMIT)
                .map_err(|error| format!("seed {seed}: {}", error.message().unwrap_or_default()))?;
        let took = started.elapsed();
        ensure(took < LIMIT + PATIENCE, &format!("seed {seed} took {took:?}"))?;
        for reason in &report.inconclusive {
            let own = reason.starts_with("the host failed");
            ensure(!own, &format!("seed {seed} ({}): {reason}", program.kind))?;
        }
        several += u64::from(running > 1);
        // With several, it is not noted which CPU opened a frame.
        let forbidden = forbidden.filter(|_| program.vcpus == 1);
        if let (Verdict::Pass, Some(what)) = (report.verdict, forbidden) {
            return Err(
                format!("seed {seed} ({}) passes in spite of this: {what}", program.kind).into()
            );
        }
        *kinds.entry((program.kind, report.verdict.name())).or_default() += 1;
    }
    let after = resident_kib()?;
    println!("{guests} guests from seed {first}, {several} of them on two vCPUs");
    println!("{before} KiB resident before, {after} KiB after");
    for ((kind, verdict), count) in &kinds {
        println!("  {kind:20} {verdict:12} {count}");
    }
    ensure(several > 0 || guests < 100, "no second vCPU ever ran")?;
    let grown = after.saturating_sub(before);
    ensure(grown <= MAX_GROWTH_KIB, &format!("the VMM grew by {grown} KiB"))
}
