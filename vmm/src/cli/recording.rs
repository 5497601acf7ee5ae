//! `lacuna run --record` and `lacuna audit`.

use super::run::{Failure, Kept, cannot_write};
use super::{AuditArgs, ExitStatus, print};
use crate::config::Config;
use crate::recording::{self, FILE, Origin, ReadError, Recorder, judge_file};
use crate::report::{self as reports, Report};
use crate::run::{Outcome, beginning};
use std::fs;
use std::io;
use std::path::Path;

/// Judges a recording again and prints the report.
#[must_use]
pub fn audit(args: &AuditArgs) -> ExitStatus {
    match try_audit(args) {
        Ok(status) => status,
        Err(Failure(status, message)) => {
            eprintln!("error: {message}");
            status
        }
    }
}

fn try_audit(args: &AuditArgs) -> Result<ExitStatus, Failure> {
    let usage = |error: ReadError| Failure(ExitStatus::Usage, error.to_string());
    let report = judge_file(&args.folder, args.profile).map_err(usage)?;
    let broken = Failure::new(ExitStatus::Inconclusive);
    let shown = match args.json {
        true => report.to_json().map_err(|e| broken(&e))?,
        false => report.to_text(),
    };
    print(&shown).map_err(|e| broken(&e))?;
    Ok(report.verdict.into())
}

/// Starts the recording of a run, if one is wanted. The recording of another run does not stay beside
/// what this run writes.
pub(super) fn create(
    config: &Config,
    out: &Path,
    machine: &reports::Machine,
) -> Result<Option<Recorder>, Failure> {
    let path = out.join(FILE);
    if !config.output.record {
        return match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(cannot_write(&path, &error))
            }
            _ => Ok(None),
        };
    }
    // It has been read once; what a pipe held is gone.
    let text = fs::read_to_string(&config.file).unwrap_or_default();
    let origin = Origin::new(config, text, beginning(config, machine.clone()));
    let limit = config.limits.events_mib.saturating_mul(1 << 20);
    let recorder = Recorder::create(out, limit, origin);
    recorder.map(Some).map_err(|error| cannot_write(&path, &error))
}

/// The recording of a run that has ended, unless it holds bytes of the secret input: a guest could
/// write them into addresses.
pub(super) fn searched(outcome: &Outcome, kept: &mut Kept) -> Option<Box<Recorder>> {
    outcome.with_gate(|gate| {
        let searched = gate.leaks_into_recording();
        let recorder = gate.take_recorder()?;
        let why = match searched {
            Ok(false) => return Some(recorder),
            Ok(true) => None,
            Err(error) => {
                Some(format!("the recording cannot be searched and is taken away: {error}"))
            }
        };
        kept.failures.extend(why);
        if let Err(error) = recorder.discard() {
            kept.failures.push(format!("cannot take the recording {FILE} away: {error}"));
        }
        None
    })
}

/// Writes the end of a recording; what goes wrong is noted in the report.
pub(super) fn finish(recorder: Option<Box<Recorder>>, outcome: &Outcome, report: &mut Report) {
    let Some(recorder) = recorder else { return };
    let secret = report
        .to_json()
        .map_or(true, |json| outcome.with_gate(|gate| gate.holds_secret(json.as_bytes())));
    if secret {
        // The report is withheld too.
        if let Err(error) = recorder.discard() {
            report.inconclusive.push(format!("cannot take the recording {FILE} away: {error}"));
        }
        return;
    }
    let recording::Kept { warning, failure } = recorder.finish(report, outcome.names());
    report.warnings.extend(warning);
    report.inconclusive.extend(failure);
}
