//! Every planted fault, and slips at other places, on the simulated machine: each is found by its
//! rule, and without it the same run is clean. (On KVM: `kvm.rs`, `smp.rs`.)

mod support;

use lacuna::audit::Rule;
use lacuna::config::{MachineKind, Mediation};
use lacuna_abi::fault::{Fault, Slip};
use libtest_mimic::Trial;
use support::matrix::{SEALS, Twin, seals};
use support::{Check, ensure, fault_is_found, is_judged_the_same, lacuna, slips, trial};

fn main() {
    support::run(trials(), false);
}

fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for cpus in [1, 2, 4] {
        for twin in Twin::ALL {
            for seal in SEALS {
                let name = format!("{}_is_clean_on_{cpus}_cpus_under_{seal}", twin.name());
                trials.push(trial(&name, move || clean_twin(twin, cpus, seal)));
            }
        }
        for twin in Twin::ALL {
            let name = format!("{}_is_clean_on_{cpus}_cpus_when_stepped", twin.name());
            trials.push(trial(&name, move || clean_when_stepped(twin, cpus)));
        }
        for fault in Fault::ALL.iter().filter(|fault| fault.vcpus() <= cpus) {
            let seal = seals(*fault)[0];
            let name = format!("{}_is_found_on_{cpus}_cpus_when_stepped", fault.name());
            let args = ["--machine", "sim", "--seal", seal, "--mediate", "step"];
            let config = Twin::of(*fault).config(cpus);
            trials.push(trial(&name, move || fault_is_found(&config, *fault, &args)));
            if !fault.modes().contains(&"trace") {
                let name = format!("{}_is_believed_on_{cpus}_cpus_under_trace", fault.name());
                trials.push(trial(&name, move || believed(*fault, cpus)));
                continue;
            }
            for seal in seals(*fault) {
                let name = format!("{}_is_found_on_{cpus}_cpus_under_{seal}", fault.name());
                let args = ["--machine", "sim", "--seal", *seal];
                let config = Twin::of(*fault).config(cpus);
                trials.push(trial(&name, move || fault_is_found(&config, *fault, &args)));
            }
        }
    }
    trials.extend(under_tables());
    for inject in [&[][..], &["--inject", "forged-flush"], &["--inject", "forged-table-write"]] {
        let what = inject.last().unwrap_or(&"clean_run");
        let name = format!("a_recording_of_a_stepped_{what}_is_judged_the_same");
        trials.push(trial(&name, move || {
            let args = [&["--machine", "sim", "--mediate", "step"], inject].concat();
            is_judged_the_same(&Twin::Replay.config(2), &args)
        }));
    }
    for fault in [Fault::SkipWindowFlush, Fault::FreeBeforeWindowFlush] {
        let name = format!("a_completed_seal_makes_up_for_{}", fault.name());
        trials.push(trial(&name, move || healed(fault)));
    }
    for slip in Slip::ALL {
        for seal in slips::seals(*slip) {
            for cpus in [1, 2, 4].into_iter().filter(|cpus| *cpus >= slip.vcpus()).take(2) {
                let name = format!("slip_{}_is_found_on_{cpus}_cpus_under_{seal}", slip.name());
                let found = move || slips::is_found(*slip, MachineKind::Sim, cpus, seal);
                trials.push(trial(&name, found));
            }
        }
    }
    for mediation in [Mediation::Tables, Mediation::Step] {
        for cpus in [1, 2] {
            for slip in Slip::ALL.iter().filter(|slip| slip.vcpus() <= cpus) {
                let seal = slips::seals(*slip)[0];
                let (slip_name, mode) = (slip.name(), mediation.name());
                let name = format!("slip_{slip_name}_is_found_on_{cpus}_cpus_under_{mode}");
                let found =
                    move || slips::is_found_under(mediation, *slip, MachineKind::Sim, cpus, seal);
                trials.push(trial(&name, found));
            }
        }
    }
    for rule in Rule::ALL {
        let name = format!("a_run_that_requires_{}_must_exercise_it", rule.name());
        trials.push(trial(&name, move || required(*rule)));
    }
    trials
}

/// The same under direct paging: what would break a rule is refused, and found.
fn under_tables() -> Vec<Trial> {
    let mut trials = Vec::new();
    for cpus in [1, 2] {
        for twin in Twin::ALL {
            let name = format!("{}_is_clean_on_{cpus}_cpus_under_tables", twin.name());
            trials.push(trial(&name, move || clean_under_tables(twin, cpus)));
        }
        let found = |fault: &&Fault| fault.vcpus() <= cpus && fault.modes().contains(&"tables");
        for fault in Fault::ALL.iter().filter(found) {
            let seal = seals(*fault)[0];
            let name = format!("{}_is_found_on_{cpus}_cpus_under_tables", fault.name());
            let args = ["--machine", "sim", "--seal", seal, "--mediate", "tables"];
            let config = Twin::of(*fault).config(cpus);
            trials.push(trial(&name, move || fault_is_found(&config, *fault, &args)));
        }
    }
    for fault in ["", "global-window", "leave-direct-map-alias", "forged-table-write"] {
        let name = format!("a_recording_of_{fault}_under_tables_is_judged_the_same");
        let config = Twin::InPlace.config(2);
        let mut args = vec!["--machine", "sim", "--mediate", "tables"];
        args.extend(["--inject", fault].iter().filter(|_| !fault.is_empty()));
        trials.push(trial(&name, move || is_judged_the_same(&config, &args)));
    }
    trials
}

fn clean_under_tables(twin: Twin, cpus: u8) -> Check {
    let run = sim(&twin.config(cpus), &["--mediate", "tables"])?;
    run.clean()?;
    ensure(run.report["machine"]["mediation"] == "tables", "the host did not write the tables")?;
    ensure(run.counter("table_writes") > 100, "nothing was written")?;
    ensure(run.counter("table_writes_refused") == 0, "something was refused")?;
    for rule in ["trace-honesty", "table-alias", "control-state"] {
        let [checked, left] = ["checked", "not_checked"].map(|count| run.check(rule, count));
        ensure(checked > 1000 && left == 0, &format!("{rule}: {checked} checked, {left} not"))?;
    }
    Ok(())
}

/// Runs on the simulated machine.
fn sim(config: &str, args: &[&str]) -> Result<support::Run, libtest_mimic::Failed> {
    lacuna(config, &[&["--machine", "sim"], args].concat())
}

/// The twin of the faults that have this configuration.
fn clean_twin(twin: Twin, cpus: u8, seal: &str) -> Check {
    let run = sim(&twin.config(cpus), &["--seal", seal])?;
    run.clean()?;
    ensure(run.report["inconclusive"] == serde_json::json!([]), "something is doubtful")?;
    ensure(twin != Twin::Wrapping || run.counter("window_flushes") > 0, "no window wrapped")
}

/// The same where the machine sees for itself what its CPUs do.
fn clean_when_stepped(twin: Twin, cpus: u8) -> Check {
    let run = sim(&twin.config(cpus), &["--mediate", "step"])?;
    run.clean()?;
    ensure(run.report["machine"]["mediation"] == "step", "it was not stepped")?;
    run.compared(1000)
}

/// A lie that leaves no trace: who believes the records finds nothing.
fn believed(fault: Fault, cpus: u8) -> Check {
    sim(&Twin::of(fault).config(cpus), &["--inject", fault.name()])?.clean()
}

/// With a page's own granule every seal completes at once, and discharges what the slip left.
fn healed(fault: Fault) -> Check {
    let config = Twin::of(fault).config(1);
    sim(&config, &["--seal", "guard", "--inject", fault.name()])?.clean()
}

/// Rules that every guest exercises, because it has tables and registers.
const ALWAYS: [Rule; 7] = [
    Rule::DirectMapAlias,
    Rule::ForeignAlias,
    Rule::TableAlias,
    Rule::WriteExecute,
    Rule::UserAccess,
    Rule::ControlState,
    Rule::TraceHonesty,
];

fn required(rule: Rule) -> Check {
    let name = rule.name();
    let config = format!(
        "[guest]\nmemory_mib = 16\n[workload]\nprogram = \"idle\"\n[audit]\nrequire = [{name:?}]\n"
    );
    let run = sim(&config, &[])?;
    let checked = run.check(name, "checked");
    if ALWAYS.contains(&rule) {
        ensure(checked > 0, "it was not exercised")?;
        return run.expect(0, "pass");
    }
    ensure(checked == 0, "it was exercised")?;
    run.expect(5, "inconclusive")?;
    let reason = format!("the rule {name} is required and was never checked");
    ensure(run.report["inconclusive"].to_string().contains(&reason), &run.report.to_string())
}
