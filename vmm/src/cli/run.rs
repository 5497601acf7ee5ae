//! `lacuna run`.

use super::{ExitStatus, Progress, RunArgs, print, recording};
use crate::config::{Config, MachineKind, ReportFormat, Workload};
use crate::doctor::{Flavour, HostFacts, ThisHost};
use crate::events::EventFile;
use crate::gate::Observer;
use crate::report::{self as reports, Report};
use crate::run::{Host, Machine, Outcome, Plan, Surroundings, complete, outline, profile};
use lacuna_abi::event::Record;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;
use std::error::Error;
use std::fs;
use std::io;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// A run that did not get as far as a report: what to say, and how to end.
pub(super) struct Failure(pub(super) ExitStatus, pub(super) String);

impl Failure {
    pub(super) fn new(status: ExitStatus) -> impl Fn(&dyn Error) -> Self {
        move |error| Self(status, error.to_string())
    }
}

/// Runs a guest and prints the report. What goes wrong before is said on standard error.
#[must_use]
pub fn run(args: &RunArgs) -> ExitStatus {
    match try_run(args) {
        Ok(status) => status,
        Err(Failure(status, message)) => {
            eprintln!("error: {message}");
            status
        }
    }
}

fn try_run(args: &RunArgs) -> Result<ExitStatus, Failure> {
    let started = Instant::now();
    let usage = Failure::new(ExitStatus::Usage);
    let config = Config::load(&args.config, &args.overrides()).map_err(|e| usage(&e))?;
    let (plan, warnings) = Plan::new(&config).map_err(|e| usage(&e))?;
    let (outcome, report) = carry_out(&config, plan, warnings, started)?;
    publish(&config, &outcome, report)
}

/// Runs a guest, shows how far it is, and keeps what the configuration says.
pub(super) fn carry_out(
    config: &Config,
    plan: Plan,
    warnings: Vec<String>,
    started: Instant,
) -> Result<(Outcome, Report), Failure> {
    let host = Failure::new(ExitStatus::Host);
    let total = expected_work(config, &plan);
    let machine = Host::of(config.machine).map_err(|error| {
        Failure(ExitStatus::Host, format!("{error}; --machine sim needs no KVM"))
    })?;
    let log = GuestLog::new(config.limits.guest_log_kib);
    let mut observers: Vec<Box<dyn Observer>> = vec![Box::new(log.clone())];
    let described = describe_machine(config);
    let mut recorder = None;
    let events = match &config.output.out {
        Some(out) => {
            let events = Events::create(out, config.limits.events_mib)?;
            observers.push(Box::new(events.clone()));
            recorder = recording::create(config, out, &described)?;
            Some(events)
        }
        None => None,
    };
    let interrupted = interrupts()
        .map_err(|error| Failure(ExitStatus::Host, format!("cannot listen for Ctrl-C: {error}")))?;
    let machine =
        Machine::open_recorded(machine, plan, observers, recorder).map_err(|e| host(&e))?;
    let running = machine.start().map_err(|e| host(&e))?;
    let mut progress = Progress::new(total);
    let outcome = running.wait(|done| {
        progress.set(done);
        if interrupted.load(Ordering::Relaxed) {
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    });
    progress.finish();
    // Files first: what is found in them, or cannot be kept, belongs into the report.
    let mut kept = Kept::default();
    if let (Some(out), Some(events)) = (&config.output.out, events) {
        events.finish(out, &outcome, &mut kept);
        log.keep(out, &outcome, &mut kept);
    }
    kept.warnings.extend(log.warning());
    let recorder = recording::searched(&outcome, &mut kept);
    let surroundings = Surroundings {
        machine: described,
        warnings: warnings.into_iter().chain(kept.warnings).collect(),
        inconclusive: kept.failures,
        last_line: log.last_line(),
        total: started.elapsed(),
    };
    let mut report = outline(config, &outcome, surroundings);
    recording::finish(recorder, &outcome, &mut report);
    let report = complete(config, &outcome, report);
    Ok((outcome, report))
}

/// Why the text must not be shown: it holds bytes of the secret input.
pub(super) fn withheld(outcome: &Outcome, text: &str) -> Option<Failure> {
    let leaks = outcome.with_gate(|gate| gate.leaks_into("the report", text.as_bytes()));
    let message = "the report is withheld: it holds bytes of the secret input (input-leak)";
    leaks.then(|| Failure(ExitStatus::Violation, message.into()))
}

/// What became of the files of `--out`.
#[derive(Default)]
pub(super) struct Kept {
    pub(super) warnings: Vec<String>,
    pub(super) failures: Vec<String>,
}

impl Kept {
    fn failed(&mut self, path: &Path, error: &io::Error) {
        self.failures.push(format!("cannot write {}: {error}", path.display()));
    }
}

/// What ran the guest, for the report.
fn describe_machine(config: &Config) -> reports::Machine {
    let facts = HostFacts::read(&ThisHost);
    let unknown = || "unknown".to_owned();
    let (translation, evidence) = match config.machine {
        MachineKind::Kvm => {
            let flavour = Flavour::detect(&ThisHost);
            (flavour.translation.name(), flavour.evidence)
        }
        MachineKind::Sim => ("software", String::new()),
    };
    reports::Machine {
        kind: config.machine.name().to_owned(),
        translation: translation.to_owned(),
        evidence,
        mediation: config.mediation.name().to_owned(),
        kernel: facts.kernel.unwrap_or_else(unknown),
        profile: profile(config).name().to_owned(),
        cpu: facts.cpu_model.or(facts.cpu_vendor).unwrap_or_else(unknown),
        simulation: None,
        stepping: None,
    }
}

/// Units of work that the progress bar counts to.
fn expected_work(config: &Config, plan: &Plan) -> Option<u64> {
    matches!(config.workload, Workload::Replay { .. }).then_some(plan.args[0])
}

/// Writes and prints the report, unless it holds bytes of the secret input. A report that cannot be
/// written is printed all the same.
fn publish(config: &Config, outcome: &Outcome, mut report: Report) -> Result<ExitStatus, Failure> {
    let broken = |error: &dyn Error| Failure(ExitStatus::Inconclusive, error.to_string());
    let mut json = report.to_json().map_err(|e| broken(&e))?;
    if let Some(failure) = withheld(outcome, &json).or_else(|| withheld(outcome, &report.to_text()))
    {
        return Err(failure);
    }
    if let Some(out) = &config.output.out {
        let path = out.join("report.json");
        if let Err(error) = fs::write(&path, &json) {
            report.inconclusive.push(format!("cannot write {}: {error}", path.display()));
            report.judge(&config.audit);
            json = report.to_json().map_err(|e| broken(&e))?;
        }
    }
    let shown = match config.output.report {
        ReportFormat::Json => json,
        ReportFormat::Text => report.to_text(),
    };
    print(&shown).map_err(|e| broken(&e))?;
    Ok(report.verdict.into())
}

/// Set by the first Ctrl-C or SIGTERM; the second ends the process at once.
pub(super) fn interrupts() -> io::Result<Arc<AtomicBool>> {
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        let status = i32::from(ExitStatus::Inconclusive as u8);
        flag::register_conditional_shutdown(signal, status, Arc::clone(&interrupted))?;
        flag::register(signal, Arc::clone(&interrupted))?;
    }
    Ok(interrupted)
}

pub(super) fn cannot_write(path: &Path, error: &io::Error) -> Failure {
    let path = path.display();
    let message = format!("--out: cannot write {path}: {error}; name a folder that can be written");
    Failure(ExitStatus::Usage, message)
}

/// The guest's log, up to a bound.
#[derive(Clone)]
struct GuestLog(Arc<Mutex<LogState>>);

struct LogState {
    text: String,
    left: usize,
    cut: u64,
}

impl GuestLog {
    fn new(kib: u64) -> Self {
        let left = usize::try_from(kib.saturating_mul(1024)).unwrap_or(usize::MAX);
        Self(Arc::new(Mutex::new(LogState { text: String::new(), left, cut: 0 })))
    }

    fn with<R>(&self, f: impl FnOnce(&mut LogState) -> R) -> R {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn text(&self) -> String {
        self.with(|state| state.text.clone())
    }

    /// Writes the log, unless it holds bytes of the secret input.
    fn keep(&self, out: &Path, outcome: &Outcome, kept: &mut Kept) {
        let path = out.join("guest.log");
        let mut text = self.text();
        // Each call was searched when it came; together they may hold more.
        if outcome.with_gate(|gate| gate.leaks_into("guest.log", text.as_bytes())) {
            text = "(withheld: the log holds bytes of the secret input)\n".into();
        }
        if let Err(error) = fs::write(&path, text) {
            kept.failed(&path, &error);
        }
    }

    fn last_line(&self) -> Option<String> {
        self.with(|state| state.text.lines().last().map(str::to_owned))
    }

    fn warning(&self) -> Option<String> {
        let cut = self.with(|state| state.cut);
        (cut > 0)
            .then(|| format!("{cut} lines of the guest's log were cut ([limits] guest_log_kib)"))
    }
}

impl Observer for GuestLog {
    fn log(&mut self, line: &str) {
        self.with(|state| {
            let needed = line.len() + 1;
            if needed > state.left {
                state.cut += 1;
                return;
            }
            state.left -= needed;
            for line in line.lines() {
                log::info!("guest: {line}");
            }
            state.text.push_str(line);
            state.text.push('\n');
        });
    }
}

/// The events file of `--out`.
#[derive(Clone)]
struct Events(Arc<Mutex<EventsState>>);

struct EventsState {
    file: Option<EventFile>,
    error: Option<io::Error>,
}

const EVENTS: &str = "events.bin";

impl Events {
    fn create(out: &Path, mib: u64) -> Result<Self, Failure> {
        fs::create_dir_all(out).map_err(|error| cannot_write(out, &error))?;
        let path = out.join(EVENTS);
        let file = EventFile::create(&path, mib.saturating_mul(1 << 20));
        let file = Some(file.map_err(|error| cannot_write(&path, &error))?);
        Ok(Self(Arc::new(Mutex::new(EventsState { file, error: None }))))
    }

    /// Closes the file. A guest could write its secret into addresses, so the file is searched too.
    fn finish(&self, out: &Path, outcome: &Outcome, kept: &mut Kept) {
        let path = out.join(EVENTS);
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let EventsState { file, error } = &mut *state;
        let cut = match (error.take(), file.take()) {
            (Some(error), _) => Err(error),
            (None, Some(file)) => file.finish(),
            (None, None) => Ok(0),
        };
        let searched = cut.and_then(|cut| {
            let bytes = fs::read(&path)?;
            if outcome.with_gate(|gate| gate.leaks_into(EVENTS, &bytes)) {
                fs::remove_file(&path)?;
            }
            Ok(cut)
        });
        match searched {
            Ok(0) => {}
            Ok(cut) => kept
                .warnings
                .push(format!("{cut} events did not fit in {EVENTS} ([limits] events_mib)")),
            Err(error) => kept.failed(&path, &error),
        }
    }
}

impl Observer for Events {
    fn event(&mut self, record: &Record) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let EventsState { file, error } = &mut *state;
        if let Some(Err(failed)) = file.as_mut().map(|file| file.push(record)) {
            // Reported at the end; the run itself does not depend on it.
            *file = None;
            *error = Some(failed);
        }
    }
}
