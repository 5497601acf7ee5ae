//! Stepped guests on KVM: `--mediate step`. Short runs in little memory; the whole table of faults is
//! tried on simulated machines (`faults.rs`).

mod support;

use lacuna_abi::fault::Fault;
use libtest_mimic::Trial;
use support::{
    Check, Run, dirty, ensure, fault_is_found, is_judged_the_same, lacuna, replay, trial,
};

/// Events of the recording: enough for a flip, windows, and the way back.
const EVENTS: u64 = 40;
/// Faults of which each takes another way to be found, with the vCPUs that they are tried on.
const FAULTS: &[(Fault, u8)] = &[
    (Fault::SkipFlipFlush, 1),
    (Fault::GlobalWindow, 1),
    (Fault::ForgedFlush, 1),
    (Fault::ForgedTableWrite, 1),
    (Fault::LocalOnlyFlipFlush, 2),
    (Fault::WrongCpuWindow, 2),
];

fn main() {
    support::run(trials(), true);
}

fn trials() -> Vec<Trial> {
    let mut trials = vec![
        trial("a_window_of_a_run_is_stepped_and_the_rest_is_not", window),
        trial("a_run_that_ends_before_it_is_stepped_is_inconclusive", never),
        trial("every_observation_agrees_with_the_model_when_stepped", probe),
        trial("a_recording_of_a_window_is_judged_the_same", recorded),
        trial("an_exception_is_reported_when_stepped", exception),
        trial("a_sealed_access_is_caught_when_stepped", sealed),
    ];
    for vcpus in [1, 2] {
        let name = format!("a_replay_on_{vcpus}_vcpus_is_clean_when_stepped");
        trials.push(trial(&name, move || clean(vcpus)));
    }
    for (fault, vcpus) in FAULTS {
        let name = format!("{}_is_found_on_{vcpus}_vcpus_when_stepped", fault.name());
        let found = || fault_is_found(&config(*vcpus), *fault, &["--mediate", "step"]);
        trials.push(trial(&name, found));
    }
    trials
}

fn config(vcpus: u8) -> String {
    dirty(&replay(EVENTS, "all")).replace("[guest]\n", &format!("[guest]\nvcpus = {vcpus}\n"))
}

fn stepped(config: &str, args: &[&str]) -> Result<Run, libtest_mimic::Failed> {
    lacuna(config, &[&["--mediate", "step"], args].concat())
}

fn clean(vcpus: u8) -> Check {
    let run = stepped(&config(vcpus), &[])?;
    run.clean()?;
    let stepping = &run.report["machine"]["stepping"];
    ensure(stepping["instructions"].as_u64() > Some(50_000), &stepping.to_string())?;
    ensure(stepping["from"] == 0 && stepping["to"].is_null(), &stepping.to_string())?;
    ensure(stepping["window_accesses"].as_u64() > Some(100), &stepping.to_string())?;
    run.compared(1000)?;
    ensure(run.check("stale-direct-map", "checked") > 0, "no block was judged")
}

fn window() -> Check {
    for vcpus in [1, 2] {
        let run = stepped(&config(vcpus), &["--step-from", "60", "--step-to", "120"])?;
        run.clean()?;
        let stepping = &run.report["machine"]["stepping"];
        let ends = ["from", "to"].map(|end| stepping[end].as_u64().unwrap_or(0));
        ensure(ends[0] >= 60 && ends[1] > 120, &stepping.to_string())?;
        ensure(stepping["instructions"].as_u64() > Some(100), &stepping.to_string())?;
        let warned = run.report["warnings"].to_string().contains("not all of the run was stepped");
        ensure(warned, "no warning")?;
    }
    Ok(())
}

fn recorded() -> Check {
    is_judged_the_same(&config(1), &["--mediate", "step", "--step-from", "60", "--step-to", "120"])
}

fn never() -> Check {
    let run = stepped(&config(1), &["--step-from", "1000000"])?;
    run.expect(5, "inconclusive")?;
    let why = run.report["inconclusive"].to_string();
    ensure(why.contains("nothing was stepped"), &why)
}

fn program(program: &str) -> String {
    format!("[guest]\nmemory_mib = 16\n[workload]\n{program}")
}

/// Page faults that the guest survives, and every invalidation that the processor offers.
fn probe() -> Check {
    let run = stepped(&program("program = \"probe\"\n"), &[])?;
    if run.report["verdict"] == "inconclusive" {
        // Some hosts execute a handler, and what comes behind it, without a stop.
        let why = run.report["inconclusive"].to_string();
        return ensure(why.contains("stepping lost track of vCPU 0"), &why);
    }
    run.clean()?;
    ensure(run.check("observed-access", "checked") > 0, "nothing was observed")
}

fn exception() -> Check {
    let run = stepped(&program("program = \"crash\"\ncrash = \"page-fault\"\n"), &[])?;
    run.expect(4, "guest-error")?;
    let message = run.report["guest_error"]["message"].to_string();
    ensure(message.contains("#PF page fault"), &message)
}

fn sealed() -> Check {
    let run = stepped(&program("program = \"touch\"\ntouch = \"read\"\n"), &[])?;
    let accesses = run.report["sealed_accesses"].to_string();
    ensure(accesses.contains("\"kind\":\"read\""), &accesses)
}
