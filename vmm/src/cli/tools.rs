//! `lacuna doctor` and `lacuna bench`.

use super::{Bench, BenchArgs, DoctorArgs, ExitStatus, print};
use crate::bench::{self, BenchError};
use crate::doctor::{Doctor, ThisHost, open_kvm};
use std::fmt::Display;

/// Says what this host can do.
#[must_use]
pub fn doctor(args: &DoctorArgs) -> ExitStatus {
    let doctor = Doctor::inspect(&ThisHost);
    let text = if args.json { doctor.to_json() } else { Ok(doctor.to_text()) };
    let status = if doctor.can_run { ExitStatus::Pass } else { ExitStatus::Host };
    show(text, status)
}

/// Measures.
#[must_use]
pub fn bench(args: &BenchArgs) -> ExitStatus {
    let Bench::Boot = args.name;
    let kvm = || open_kvm().map_err(BenchError::from);
    match bench::boot(kvm) {
        Ok(boot) if args.json => {
            let json = serde_json::to_string_pretty(&boot).map(|text| text + "\n");
            show(json, ExitStatus::Pass)
        }
        Ok(boot) => show(Ok::<_, serde_json::Error>(boot.to_text()), ExitStatus::Pass),
        Err(error) => {
            let status = match error {
                BenchError::Host(_) | BenchError::Open(_) => ExitStatus::Host,
                BenchError::NotReady(..) => ExitStatus::GuestError,
                _ => ExitStatus::Inconclusive,
            };
            fail(&error, status)
        }
    }
}

fn show<E: Display>(text: Result<String, E>, status: ExitStatus) -> ExitStatus {
    match text {
        Ok(text) => match print(&text) {
            Ok(()) => status,
            Err(error) => fail(&error, ExitStatus::Inconclusive),
        },
        Err(error) => fail(&error, ExitStatus::Inconclusive),
    }
}

fn fail(error: &dyn Display, status: ExitStatus) -> ExitStatus {
    eprintln!("error: {error}");
    status
}
