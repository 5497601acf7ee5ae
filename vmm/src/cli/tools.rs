//! `lacuna doctor` and `lacuna bench`.

use super::{Bench, BenchArgs, DoctorArgs, ExitStatus, print};
use crate::bench::{self, Alloc, AuditCost, BenchError, Boot, Flip, Flush, Lab, Mediate, Zero};
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
    let Some(bench) = args.name else { return list(args) };
    if args.machine == MachineKind::Sim && !bench.takes_sim() {
        let name = bench.name();
        let others = Bench::ALL.iter().filter(|bench| bench.takes_sim()).map(|bench| bench.name());
        let others = others.collect::<Vec<_>>().join(", ");
        let why = format!(
            "--machine sim: `bench {name}` measures a processor, which a simulated machine has none \
             of; use --machine kvm, or one of {others}"
        );
        return fail(&why, ExitStatus::Usage);
    }
    let lab = Lab::new(args.machine, args.quick);
    let kvm = || open_kvm().map_err(BenchError::from);
    let measured = match bench {
        Bench::Alloc => bench::alloc(&lab).map(|alloc| written(args, &alloc, Alloc::to_text)),
        Bench::Zero => bench::zero(&lab).map(|zero| written(args, &zero, Zero::to_text)),
        Bench::Mediate => bench::mediate(&lab).map(|cost| written(args, &cost, Mediate::to_text)),
        Bench::Flip => bench::flip(&lab).map(|flip| written(args, &flip, Flip::to_text)),
        Bench::Audit => {
            bench::audit(args.quick).map(|cost| written(args, &cost, AuditCost::to_text))
        }
        Bench::Boot => bench::boot(kvm, args.quick).map(|boot| written(args, &boot, Boot::to_text)),
        Bench::Flush => {
            bench::flush(kvm, args.quick).map(|flush| written(args, &flush, Flush::to_text))
        }
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

/// Says what can be measured.
fn list(args: &BenchArgs) -> ExitStatus {
    let names = |bench: &Bench| serde_json::json!({ "name": bench.name(), "what": bench.what(), "sim": bench.takes_sim() });
    let all = Bench::ALL.iter().map(names).collect::<Vec<_>>();
    let to_text = |_: &_| {
        format!("{}\nTo measure: lacuna bench NAME; lacuna bench --help says how\n", Bench::list())
    };
    show(written(args, &all, to_text), ExitStatus::Pass)
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
