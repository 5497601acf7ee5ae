//! `lacuna probe`: which stale translations this machine shows.

use super::run::{Failure, carry_out, withheld};
use super::{ExitStatus, ProbeArgs, print};
use crate::config::{Config, MachineKind, Overrides};
use crate::run::Plan;
use std::path::Path;
use std::thread::available_parallelism;
use std::time::Instant;

/// Prints the table of this machine.
#[must_use]
pub fn probe(args: &ProbeArgs) -> ExitStatus {
    match try_probe(args) {
        Ok(status) => status,
        Err(Failure(status, message)) => {
            eprintln!("error: {message}");
            status
        }
    }
}

fn try_probe(args: &ProbeArgs) -> Result<ExitStatus, Failure> {
    let started = Instant::now();
    let usage = Failure::new(ExitStatus::Usage);
    let broken = Failure::new(ExitStatus::Inconclusive);
    let config = config(args).map_err(|error| usage(&error))?;
    let (plan, warnings) = Plan::new(&config).map_err(|error| usage(&error))?;
    let (outcome, mut report) = carry_out(&config, plan, warnings, Vec::new(), started)?;
    report.config = None;
    let shown = match args.json {
        true => report.to_json().map_err(|error| broken(&error))?,
        false => report.to_probe_text(),
    };
    if let Some(failure) = withheld(&outcome, &shown) {
        return Err(failure);
    }
    print(&shown).map_err(|error| broken(&error))?;
    Ok(report.verdict.into())
}

/// A guest that does nothing else. Its one complete check in between is the one that bounds how many
/// tables are linked; touches of frames on purpose would drop what is to be seen.
fn config(args: &ProbeArgs) -> Result<Config, crate::config::ConfigError> {
    let cpus = available_parallelism().map_or(1, usize::from);
    let vcpus = args.vcpus.map_or_else(|| cpus.clamp(1, 2), usize::from);
    let text = format!(
        "[guest]\nmemory_mib = 32\nvcpus = {vcpus}\n\
         [workload]\nprogram = \"probe\"\nrounds = {}\n\
         [allocator]\npool_low_kib = 0\npool_high_kib = 0\n\
         [audit]\nquiesce_every = {}\nprobes = 0\nrequire = [\"observed-access\"]\n\
         [limits]\ntimeout_s = 86400\n",
        args.rounds,
        i64::MAX,
    );
    let machine = Some(args.machine.unwrap_or(MachineKind::Kvm));
    let overrides = Overrides { machine, seed: args.seed, ..Overrides::default() };
    Config::from_text(Path::new("probe"), &text, &overrides)
}
