//! `lacuna doctor` and `lacuna bench`.

use super::{Bench, BenchArgs, DoctorArgs, ExitStatus, print};
use crate::bench::{self, Alloc, AuditCost, BenchError, Boot, Flip, Flush, Lab, Zero};
use crate::config::MachineKind;
use crate::doctor::{Doctor, ThisHost, open_kvm};
use serde::Serialize;
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
    if args.machine == MachineKind::Sim && !args.name.takes_sim() {
        let name = args.name.name();
        let why = format!(
            "--machine sim: `bench {name}` measures a processor, which a simulated machine has none \
             of; use --machine kvm, or one of alloc, zero and flip"
        );
        return fail(&why, ExitStatus::Usage);
    }
    let lab = Lab::new(args.machine);
    let kvm = || open_kvm().map_err(BenchError::from);
    let measured = match args.name {
        Bench::Alloc => bench::alloc(&lab).map(|alloc| written(args, &alloc, Alloc::to_text)),
        Bench::Zero => bench::zero(&lab).map(|zero| written(args, &zero, Zero::to_text)),
        Bench::Flip => bench::flip(&lab).map(|flip| written(args, &flip, Flip::to_text)),
        Bench::Audit => bench::audit().map(|cost| written(args, &cost, AuditCost::to_text)),
        Bench::Boot => bench::boot(kvm).map(|boot| written(args, &boot, Boot::to_text)),
        Bench::Flush => bench::flush(kvm).map(|flush| written(args, &flush, Flush::to_text)),
    };
    match measured {
        Ok(text) => show(text, ExitStatus::Pass),
        Err(error) => {
            let status = match error {
                BenchError::Host(_) | BenchError::Open(_) => ExitStatus::Host,
                BenchError::NotReady(..) | BenchError::NoTimes(_) | BenchError::NotMeasured(..) => {
                    ExitStatus::GuestError
                }
                _ => ExitStatus::Inconclusive,
            };
            fail(&error, status)
        }
    }
}

/// Results as they were asked for.
fn written<T: Serialize>(
    args: &BenchArgs,
    results: &T,
    to_text: fn(&T) -> String,
) -> serde_json::Result<String> {
    if args.json {
        return serde_json::to_string_pretty(results).map(|text| text + "\n");
    }
    Ok(to_text(results))
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
