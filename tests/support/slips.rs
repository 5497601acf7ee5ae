//! Slips at other places than the named faults, planted through the library: the command line has
//! no name for them.

use super::matrix::{SEALS, Twin};
use super::{Check, EVENTS, ensure};
use lacuna::audit::{AuditResult, Finding};
use lacuna::check::{Seen, Witness};
use lacuna::config::{Config, MachineKind, Mediation, Overrides};
use lacuna::gate::Observer;
use lacuna::image::{Image, ORDINARY, WITH_FAULTS};
use lacuna::run::{End, Host, Machine, Plan};
use lacuna_abi::event::{HostAct, Record};
use lacuna_abi::fault::Slip;
use libtest_mimic::Failed;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::{Arc, Mutex};

/// A run that has ended.
struct Ran {
    result: AuditResult,
    end: End,
    witness: Witness,
}

struct Recorder(Arc<Mutex<Vec<Record>>>);

impl Observer for Recorder {
    fn event(&mut self, record: &Record) {
        self.0.lock().expect("no test panics with it").push(*record);
    }
}

/// Runs the configuration with this image and these bits in the boot information.
fn run(
    config: &str,
    (machine, mediation): (MachineKind, Mediation),
    image: &[u8],
    bits: u64,
) -> Result<Ran, Failed> {
    let (machine, mediate) = (Some(machine), Some(mediation));
    let overrides = Overrides { machine, mediate, ..Overrides::default() };
    let config = Config::from_text(Path::new("slip.toml"), config, &overrides)?;
    let (mut plan, _) = Plan::new(&config)?;
    plan.image = Image::parse(image)?;
    plan.faults = bits;
    let records = Arc::new(Mutex::new(Vec::new()));
    let recorder = Box::new(Recorder(Arc::clone(&records)));
    let machine = Machine::open(Host::of(config.machine)?, plan, vec![recorder])?;
    let outcome = machine.start()?.wait(|_| ControlFlow::Continue(()));
    let result = outcome.with_gate(|gate| gate.result());
    let witness = Witness(std::mem::take(&mut *records.lock().expect("as above")));
    Ok(Ran { result, end: outcome.end, witness })
}

fn is_clean(ran: &Ran) -> Check {
    ensure(matches!(ran.end, End::Exit(0, _)), &format!("{:?}", ran.end))?;
    ensure(ran.result.findings.is_empty(), &format!("{:#?}", ran.result.findings))?;
    ensure(ran.result.inconclusive.is_empty(), &format!("{:?}", ran.result.inconclusive))
}

/// The seals under which the slip shows, as with the faults.
pub fn seals(slip: Slip) -> &'static [&'static str] {
    match slip {
        Slip::LargeWindowUnflushed | Slip::ReleaseFlushLocal => &["off"],
        _ => &SEALS,
    }
}

/// The workload that takes the path with the slip.
fn config(slip: Slip, cpus: u8, seal: &str) -> String {
    let seal = format!("[second_stage]\nseal = \"{seal}\"\n");
    let (twin, allocator) = match slip {
        // The start of the recording has single pages only.
        Slip::FlushOnePageShort => {
            let stress = "program = \"stress\"\noperations = 200\nmax_order = 3\n";
            return format!("[guest]\nmemory_mib = 16\nvcpus = {cpus}\n[workload]\n{stress}{seal}");
        }
        Slip::LastCpuLeftOut | Slip::MergeOverSecret | Slip::MergeFlushLocal => (Twin::InPlace, ""),
        // Several blocks under one shootdown, more of them than the window has places.
        Slip::FlushFirstBlock | Slip::LargeWindowUnflushed => {
            (Twin::Replay, "[allocator]\npool_high_kib = 14336\n")
        }
        // Pages that are looked at through the reserve.
        Slip::ReserveGlobal => (Twin::Replay, "[allocator]\ncheck_zero = true\n"),
        _ => (Twin::Replay, ""),
    };
    // A third of the events is enough for conversions, which cost two shootdowns each.
    let mut config = twin.config(cpus);
    if twin == Twin::InPlace {
        config = config.replace(&format!("events = {EVENTS}\n"), "events = 90\n");
    }
    format!("{config}{allocator}{seal}")
}

/// The twin without the slip is clean; with it, the rule finds it, in frames and on CPUs for which
/// the events show the same.
pub fn is_found(slip: Slip, machine: MachineKind, cpus: u8, seal: &str) -> Check {
    is_found_under(Mediation::Trace, slip, machine, cpus, seal)
}

/// The same where the host itself sees what this mediation says.
pub fn is_found_under(
    mediation: Mediation,
    slip: Slip,
    machine: MachineKind,
    cpus: u8,
    seal: &str,
) -> Check {
    let config = config(slip, cpus, seal);
    let machine = (machine, mediation);
    is_clean(&run(&config, machine, WITH_FAULTS, 0)?)?;
    let ran = run(&config, machine, WITH_FAULTS, slip.bit())?;
    let found: Vec<&Finding> =
        ran.result.findings.iter().filter(|found| found.rule.name() == slip.rule()).collect();
    let all = &ran.result.findings;
    ensure(!found.is_empty(), &format!("{} is not among {all:#?}, {:?}", slip.rule(), ran.end))?;
    for finding in found {
        let seen = Seen {
            rule: finding.rule.name().to_owned(),
            frame: finding.frame.ok_or("no frame")?,
            va: finding.va,
            cpu: finding.cpu,
            seq: finding.seq,
        };
        ran.witness.confirms(&seen)?;
        let ends = |acts: &[HostAct]| acts.iter().any(|a| ran.witness.ends_a_range(seen.frame, *a));
        let place = match slip {
            Slip::LastCpuLeftOut => seen.cpu == Some(cpus - 1),
            Slip::FlushOnePageShort => ends(&[HostAct::Sealed, HostAct::HeldOpen]),
            Slip::SealOneFrameShort | Slip::ScrubOnePageShort | Slip::WindowEntryLeft => {
                ends(&[HostAct::Opened])
            }
            _ => true,
        };
        ensure(place, &format!("not where the slip is: {seen:?}"))?;
    }
    Ok(())
}

/// An image that never asks is clean whatever the boot information says; the twin, which asks, is
/// not.
pub fn the_ordinary_image_does_not_listen(machine: MachineKind) -> Check {
    let config = config(Slip::SealOneFrameShort, 1, "guard");
    let machine = (machine, Mediation::Trace);
    is_clean(&run(&config, machine, ORDINARY, u64::MAX)?)?;
    let listens = run(&config, machine, WITH_FAULTS, u64::MAX)?;
    ensure(!listens.result.findings.is_empty(), "the image with faults does not listen either")
}
