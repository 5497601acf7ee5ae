//! `lacuna check`.

use super::run::{Failure, carry_out, interrupts, withheld};
use super::{CheckArgs, ExitStatus, print};
use crate::check::{
    self, Case, Children, Done, Outcome, Records, Results, Suite, SuiteError, junit, list, table,
};
use crate::report::milliseconds;
use crate::run::Plan;
use std::fs::File;
use std::io::{Read, Write};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::thread::{self, available_parallelism};
use std::time::Instant;

impl CheckArgs {
    /// The suite whose cases are chosen from.
    pub(super) fn suite(&self) -> Result<Suite, SuiteError> {
        self.scenarios.as_deref().map_or_else(Suite::built_in, Suite::load)
    }
}

/// Runs the regression suite and prints a table of results.
#[must_use]
pub fn check(args: &CheckArgs) -> ExitStatus {
    let result = match (&args.child, &args.scenarios) {
        (Some(name), Some(folder)) => child(folder, name),
        _ => try_check(args),
    };
    match result {
        Ok(status) => status,
        Err(Failure(status, message)) => {
            eprintln!("error: {message}");
            status
        }
    }
}

fn try_check(args: &CheckArgs) -> Result<ExitStatus, Failure> {
    let usage = |error: SuiteError| match error {
        SuiteError::Unpack(_) => Failure(ExitStatus::Host, error.to_string()),
        error => Failure(ExitStatus::Usage, error.to_string()),
    };
    let broken = Failure::new(ExitStatus::Inconclusive);
    let started = Instant::now();
    let suite = args.suite().map_err(usage)?;
    let cases = suite.select(args.filter.as_deref(), args.all).map_err(usage)?;
    if args.list {
        let text = if args.json { names(&cases).map_err(|e| broken(&e))? } else { list(&cases) };
        print(&text).map_err(|error| broken(&error))?;
        return Ok(ExitStatus::Pass);
    }
    Suite::prepare(&cases).map_err(usage)?;
    // A file that cannot be written is said before anything runs.
    let junit_file = args.junit.as_deref().map(create).transpose()?;
    let cancelled = interrupts()
        .map_err(|error| Failure(ExitStatus::Host, format!("cannot listen for Ctrl-C: {error}")))?;
    let children = Children::of_this_program(suite.folder()).map_err(|error| broken(&error))?;
    let jobs = args.jobs.or_else(|| available_parallelism().ok()).unwrap_or(NonZeroUsize::MIN);
    let mut progress = Progress { over: 0, all: cases.len() };
    let done = check::run(&cases, jobs, &children, &cancelled, |done| progress.say(done));
    let scenarios = match &args.scenarios {
        Some(folder) => folder.display().to_string(),
        None => "built-in".to_owned(),
    };
    let (filter, all) = (args.filter.clone(), args.all);
    let results = Results { done, took: started.elapsed(), scenarios, filter, all };
    let text = match args.json {
        true => results.to_json().map_err(|error| broken(&error))?,
        false => table(&results),
    };
    print(&text).map_err(|error| broken(&error))?;
    if let Some((mut file, path)) = junit_file {
        file.write_all(junit(&results).as_bytes()).map_err(|error| cannot_write(&path, &error))?;
    }
    Ok(results.counts().status())
}

fn create(path: &Path) -> Result<(File, PathBuf), Failure> {
    let file = File::create(path).map_err(|error| cannot_write(path, &error))?;
    Ok((file, path.to_owned()))
}

fn cannot_write(path: &Path, error: &std::io::Error) -> Failure {
    let path = path.display();
    let message = format!("--junit: cannot write {path}: {error}; name a file that can be written");
    Failure(ExitStatus::Usage, message)
}

/// The names of cases, as JSON.
fn names(cases: &[&Case]) -> Result<String, serde_json::Error> {
    let entry = |case: &&Case| {
        serde_json::json!({
            "name": case.name,
            "expected": case.expected.name(),
            "quick": case.quick,
            "optional": case.optional,
        })
    };
    let entries: Vec<_> = cases.iter().map(entry).collect();
    Ok(serde_json::to_string_pretty(&entries)? + "\n")
}

/// A line on standard error for each case that is over.
struct Progress {
    over: usize,
    all: usize,
}

impl Progress {
    fn say(&mut self, done: &Done<'_>) {
        self.over += 1;
        let Self { over, all } = self;
        let width = all.to_string().len();
        let us = u64::try_from(done.took.as_micros()).unwrap_or(u64::MAX);
        let outcome = done.judgement.outcome;
        let (name, word) = (&done.case.name, outcome.name());
        eprintln!("[{over:width$}/{all}] {word:12} {name} ({})", milliseconds(us));
        if outcome == Outcome::Failed
            && let Some(reason) = done.judgement.reasons.first()
        {
            let mut line = String::new();
            crate::report::layout::paragraph(&mut line, 4, reason);
            eprint!("{line}");
        }
    }
}

/// Runs one case in this process. What it leaves is printed, to be judged by the process that started
/// this one; without which it ends.
fn child(folder: &Path, name: &str) -> Result<ExitStatus, Failure> {
    let usage = |error: &dyn std::error::Error| Failure(ExitStatus::Usage, error.to_string());
    let broken = Failure::new(ExitStatus::Inconclusive);
    let started = Instant::now();
    thread::spawn(|| {
        // Nothing is ever sent: this returns when the other end is closed.
        _ = std::io::stdin().read(&mut [0]);
        std::process::exit(i32::from(ExitStatus::Inconclusive as u8));
    });
    let suite = Suite::load(folder).map_err(|error| usage(&error))?;
    let case = suite.case(name);
    let case = case.ok_or_else(|| Failure(ExitStatus::Usage, format!("no case {name:?}")))?;
    let config = case.config().map_err(|error| usage(&error))?;
    let (plan, warnings) = Plan::new(&config).map_err(|error| usage(&error))?;
    let records = Records::default();
    let watchers: Vec<Box<dyn crate::gate::Observer>> = match case.fault {
        Some(_) => vec![Box::new(records.clone())],
        None => Vec::new(),
    };
    let (outcome, report) = carry_out(&config, plan, warnings, watchers, started)?;
    let left = records.confirm(case, report);
    let json = serde_json::to_string(&left).map_err(|error| broken(&error))?;
    if let Some(failure) = withheld(&outcome, &json) {
        return Err(failure);
    }
    print(&json).map_err(|error| broken(&error))?;
    Ok(ExitStatus::Pass)
}
