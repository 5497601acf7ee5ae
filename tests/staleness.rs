//! `lacuna probe` and the program behind it, end to end: the model of what is cached against what a
//! machine shows, and both against the manual.
//!
//! The trials on KVM are ignored or required as the tests in `kvm.rs`.

mod support;

use libtest_mimic::Failed;
use serde_json::Value;
use std::process::Command;
use support::{Check, LACUNA, Run, ensure, lacuna, needing_kvm, repository, trial};

fn main() {
    let mut trials = vec![
        trial("on_sim_what_the_manual_allows_is_seen_and_nothing_else", manual_on_sim),
        trial("on_one_simulated_cpu_another_is_not_offered", one_cpu),
        trial("the_table_is_printed_for_eyes", printed),
        trial("a_guest_without_a_place_for_it_is_told_why", no_place),
    ];
    for seal in ["off", "guard", "memslot"] {
        for (fault, stale) in
            [("skip-flip-flush", true), ("local-only-flip-flush", true), ("", false)]
        {
            let how = if fault.is_empty() { "with_its_flush" } else { fault };
            let name = format!("a_flip_{how}_under_{seal}");
            trials.push(trial(&name, move || flip(fault, seal, stale, "sim")));
        }
    }
    trials.extend(needing_kvm(vec![
        trial("on_kvm_the_table_is_complete_and_nothing_contradicts_the_model", manual_on_kvm),
        trial("on_kvm_a_flip_without_its_flush_faults_under_a_seal", || {
            flip("skip-flip-flush", "guard", true, "kvm")
        }),
    ]));
    support::run(trials, false);
}

/// Runs `lacuna probe` with these arguments.
fn probe(args: &[&str]) -> Result<Run, Failed> {
    Run::of(&Command::new(LACUNA).arg("probe").arg("--json").args(args).output()?)
}

/// Whether a CPU may go on using what was there before, read off the manual and written by hand (Intel
/// SDM volume 3, "Operations that Invalidate TLBs and Paging-Structure Caches", "Propagation of
/// Paging-Structure Changes to Multiple Processors").
fn manual_allows(invalidation: &str, global: bool, other: bool) -> bool {
    match (other, invalidation) {
        // Nothing that one CPU executes removes what another has cached, but an interrupt that has it
        // do so.
        (true, "ipi") => false,
        (true, _) => true,
        (false, "none" | "cr3-63") => true,
        // Global translations of the page too; everything.
        (false, "invlpg" | "invpcid2" | "pge") => false,
        // These spare what is global.
        (false, "cr3" | "invpcid0" | "invpcid1" | "invpcid3") => global,
        (false, unknown) => panic!("{unknown}"),
    }
}

/// The cases of a run, with whether each is allowed by the manual.
fn cases(run: &Run) -> Vec<(&Value, bool)> {
    let all = run.report["observed"].as_array().into_iter().flatten();
    all.map(|case| {
        let invalidation = case["invalidation"].as_str().unwrap_or("?");
        (case, manual_allows(invalidation, case["global"] == true, case["cpu"] == "other"))
    })
    .collect()
}

/// All cases are there, each with its rounds or not offered; the model allows what the manual does.
fn complete(run: &Run, rounds: u64) -> Check {
    run.expect(0, "pass")?;
    let cases = cases(run);
    ensure(cases.len() == 6 * 2 * 19, &format!("{} cases", cases.len()))?;
    for (case, allowed) in cases {
        let expected = if case["offered"] == true { rounds } else { 0 };
        let may = if allowed { expected } else { 0 };
        ensure(
            case["rounds"] == expected
                && case["may_be_stale"] == may
                && case["contradictions"] == 0,
            &format!("{expected} rounds, {may} of them perhaps stale: {case}"),
        )?;
    }
    Ok(())
}

fn manual_on_sim() -> Check {
    for seed in ["1", "2", "3"] {
        let args = ["--machine", "sim", "--vcpus", "2", "--rounds", "12", "--seed", seed];
        let run = probe(&args)?;
        complete(&run, 12)?;
        for (case, allowed) in cases(&run) {
            let offered = case["change"] != "no-execute";
            let seen = case["stale"].as_u64().is_some_and(|stale| stale > 0);
            ensure(
                case["offered"] == offered && seen == (offered && allowed),
                &format!("seed {seed}: {case}"),
            )?;
        }
    }
    Ok(())
}

fn one_cpu() -> Check {
    let run = probe(&["--machine", "sim", "--vcpus", "1", "--rounds", "2"])?;
    complete(&run, 2)?;
    for (case, _) in cases(&run) {
        let offered = case["cpu"] == "own" && case["change"] != "no-execute";
        ensure(case["offered"] == offered, &case.to_string())?;
    }
    Ok(())
}

fn printed() -> Check {
    let args = ["probe", "--machine", "sim", "--vcpus", "2", "--rounds", "3"];
    let output = Command::new(LACUNA).args(args).output()?;
    let text = String::from_utf8(output.stdout)?;
    ensure(output.status.success(), &text)?;
    let cells = |row: &str| {
        let line = text.lines().find(|line| line.starts_with(row))?;
        Some(line[row.len()..].split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    };
    let global = cells("split      global").ok_or("no row of global splits")?;
    ensure(global == ["3", ".", "3", "3", "3", "3", ".", "3", "."], &text)?;
    let without = cells("no-execute global").ok_or("no row of code")?;
    ensure(without.iter().all(|cell| cell == "-"), &text)?;
    ensure(text.lines().all(|line| line.chars().count() <= 100), "a line is too long")
}

/// The zone ends with its last page directory.
fn no_place() -> Check {
    let config = "[guest]\nmemory_mib = 1024\n[workload]\nprogram = \"probe\"\n";
    let run = lacuna(config, &["--machine", "sim"])?;
    run.expect(4, "guest-error")?;
    let message = run.report["guest_error"]["message"].as_str().unwrap_or_default();
    ensure(message.contains("memory_mib may not be a multiple of 1024"), message)
}

fn manual_on_kvm() -> Check {
    let run = probe(&["--machine", "kvm", "--vcpus", "2", "--rounds", "2"])?;
    complete(&run, 2)?;
    for (case, _) in cases(&run) {
        // What every processor has, whatever else CPUID offers.
        let always = ["none", "invlpg", "cr3", "pge", "ipi"];
        let must = always.iter().any(|name| case["invalidation"] == *name);
        ensure(!must || case["offered"] == true, &format!("not offered: {case}"))?;
    }
    Ok(())
}

/// A pageblock flips while another CPU has it cached: without its flush and without a seal it is read
/// there after it was written through a window, under a seal it faults.
fn flip(fault: &str, seal: &str, is_slip: bool, machine: &str) -> Check {
    let config = repository().join("configs/stale-read.toml");
    let mut command = Command::new(LACUNA);
    command.args(["run", "--report", "json", "--seal", seal, "--machine", machine]).arg(config);
    if is_slip {
        command.args(["--inject", fault]);
    }
    let run = Run::of(&command.output()?)?;
    if is_slip {
        run.expect(1, "violation")?;
        ensure(run.check("stale-direct-map", "violations") > 0, "the missing flush is not found")?;
    } else {
        run.clean()?;
    }
    let observed = &run.report["observed"];
    let may = if is_slip && seal == "off" { 20 } else { 0 };
    let stale = if machine == "sim" { may } else { 0 };
    ensure(
        observed.as_array().is_some_and(|cases| cases.len() == 1)
            && observed[0]["change"] == "flip"
            && observed[0]["rounds"] == 20
            && observed[0]["may_be_stale"] == may
            && observed[0]["contradictions"] == 0,
        &format!("{observed:#}"),
    )?;
    let seen = observed[0]["stale"].as_u64().unwrap_or(u64::MAX);
    // A simulated CPU forgets at random.
    ensure((seen == 0) == (stale == 0) && seen <= may, &format!("{seen} stale: {observed:#}"))
}
