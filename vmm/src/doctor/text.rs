//! The text form of what the doctor found.

use super::{CapabilityState, Doctor};
use crate::report::grouped;
use crate::report::layout::{labelled, paragraph};
use std::fmt::Write;

const LABEL: usize = 12;

pub(super) fn render(doctor: &Doctor) -> String {
    let mut out = String::new();
    if doctor.can_run {
        out.push_str("OK: lacuna run can work here\n");
    } else {
        out.push_str("NOT OK: lacuna run cannot work here\n");
        for problem in &doctor.problems {
            labelled(&mut out, 0, "- ", &problem.what);
            labelled(&mut out, 2, "remedy: ", &problem.remedy);
        }
    }
    out.push('\n');
    host(&mut out, doctor);
    if !doctor.capabilities.is_empty() {
        out.push('\n');
        capabilities(&mut out, doctor);
    }
    if !doctor.notes.is_empty() {
        out.push('\n');
        for note in &doctor.notes {
            labelled(&mut out, 0, "note: ", note);
        }
    }
    out
}

fn host(out: &mut String, doctor: &Doctor) {
    let host = &doctor.host;
    let unknown = || "unknown".to_owned();
    let module = doctor.flavour.module.as_deref().unwrap_or("KVM's module not found");
    let translation = doctor.flavour.translation.name();
    let evidence = &doctor.flavour.evidence;
    line(out, "KVM", &format!("{module}, {translation} translation ({evidence})"));
    let mut cpu = host.cpu_model.clone().unwrap_or_else(unknown);
    if let Some(vendor) = &host.cpu_vendor {
        _ = write!(cpu, " ({vendor})");
    }
    if !host.cpu_flags.is_empty() {
        _ = write!(cpu, ", flags {}", host.cpu_flags.join(" "));
    }
    _ = write!(cpu, "; invalidation profile {}", host.profile.name());
    line(out, "processor", &cpu);
    let guards = match host.guards_by_version {
        Some(true) => "guards for shared mappings by its version",
        Some(false) => "no guards for shared mappings by its version",
        None => "guards for shared mappings unknown",
    };
    let kernel = host.kernel.clone().unwrap_or_else(unknown);
    line(out, "kernel", &format!("{kernel}, {guards} (checked for real when a run starts)"));
    let number = |value: Option<u64>| value.map_or_else(unknown, grouped);
    line(
        out,
        "memory",
        &format!(
            "{} MiB, {} MiB available; at most {} mappings a process",
            number(host.memory_mib),
            number(host.available_mib),
            number(host.max_map_count)
        ),
    );
}

fn capabilities(out: &mut String, doctor: &Doctor) {
    paragraph(out, 0, "KVM's capabilities:");
    for capability in &doctor.capabilities {
        let state = match (capability.present, capability.required) {
            (true, _) => "yes",
            (false, true) => "MISSING",
            (false, false) => "no",
        };
        // Where one is enough, the answer is no count.
        let count = match capability {
            CapabilityState { value, minimum: 2.., .. } => format!(" ({value})"),
            _ => String::new(),
        };
        let label = format!("  {state:9}{:27}", capability.name);
        labelled(out, 0, &label, &format!("{}{count}", capability.needed_for));
    }
}

fn line(out: &mut String, label: &str, text: &str) {
    labelled(out, 0, &format!("{label:LABEL$}"), text);
}
