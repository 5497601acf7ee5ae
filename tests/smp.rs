//! Several vCPUs on `/dev/kvm`, end to end. Ignored or required as the tests in `kvm.rs`.

mod support;

use lacuna::config::MachineKind;
use lacuna::machine::kvm::Vm;
use lacuna::machine::memory::Memory;
use lacuna_abi::addr::{Gpa, Gva};
use lacuna_abi::fault::{Fault, Slip};
use lacuna_abi::gate::SHOOTDOWN_VECTOR;
use lacuna_abi::layout::{Layout, Needs};
use lacuna_abi::workload::Selftest;
use libtest_mimic::Trial;
use std::fmt::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use support::matrix::{Twin, seals};
use support::{
    Check, EVENTS, Run, dirty, ensure, fault_is_found, lacuna, replay, selftest, slips, trial,
};

fn main() {
    support::run(trials(), true);
}

fn trials() -> Vec<Trial> {
    let mut trials = vec![
        trial("eight_vcpus_boot_and_are_judged", eight),
        trial("shootdowns_by_gate_call_are_delivered", by_gate_call),
        trial("an_interrupt_that_no_local_apic_takes_is_lost", lost_interrupt),
        trial("halted_cpus_answer_shootdowns", halted),
        trial("secrets_leave_no_trace_with_idle_cpus_around", secrets),
        trial("a_cpu_that_answers_no_shootdown_is_named_with_its_place", stuck),
        trial("a_panic_on_another_cpu_names_it", panic_elsewhere),
        trial("a_hang_ends_while_another_cpu_is_halted", hang),
        trial("bad_gate_calls_are_answered_beside_another_cpu", bad_calls),
    ];
    for (cpus, seal) in [(2, "guard"), (2, "memslot"), (2, "off"), (4, "guard"), (4, "off")] {
        let name = format!("replay_on_{cpus}_vcpus_is_clean_under_{seal}");
        trials.push(trial(&name, move || clean_replay(cpus, seal)));
    }
    for seal in ["guard", "memslot", "off"] {
        let name = format!("flips_and_foreign_frees_under_quiesce_are_clean_under_{seal}");
        trials.push(trial(&name, move || stress(seal)));
    }
    for test in Selftest::ALL.iter().filter(|test| test.cpus() > 1) {
        trials.push(trial(&format!("selftest::{}", test.name()), move || {
            lacuna(&selftest(*test), &[])?.clean()
        }));
    }
    trials.push(trial("random_requests_on_2_vcpus_find_every_page_as_it_should_be", random));
    for (cpus, seal) in [(2, "guard"), (2, "off")] {
        for twin in Twin::ALL.into_iter().filter(|twin| *twin != Twin::Replay) {
            let name = format!("{}_on_{cpus}_vcpus_is_clean_under_{seal}", twin.name());
            trials
                .push(trial(&name, move || lacuna(&twin.config(cpus), &["--seal", seal])?.clean()));
        }
    }
    let tables = ["--mediate", "tables"];
    trials.push(trial("replay_in_place_on_2_vcpus_is_clean_under_tables", move || {
        lacuna(&Twin::InPlace.config(2), &tables)?.clean()
    }));
    for fault in [Fault::WrongCpuWindow, Fault::ForgedTableWrite] {
        let name = format!("{}_is_found_on_2_vcpus_under_tables", fault.name());
        let found = move || fault_is_found(&Twin::of(fault).config(2), fault, &tables);
        trials.push(trial(&name, found));
    }
    for slip in Slip::ALL.iter().filter(|slip| slip.vcpus() == 2) {
        let seal = slips::seals(*slip)[0];
        let name = format!("slip_{}_is_found_on_2_vcpus_under_{seal}", slip.name());
        trials.push(trial(&name, move || slips::is_found(*slip, MachineKind::Kvm, 2, seal)));
    }
    for fault in Fault::ALL.iter().filter(|fault| fault.modes().contains(&"trace")) {
        for (cpus, seal) in places(*fault) {
            let name = format!("{}_is_found_on_{cpus}_vcpus_under_{seal}", fault.name());
            // The clean twins are `replay…_on_…_vcpus_is_clean_under_…`: the same configurations.
            let config = Twin::of(*fault).config(cpus);
            let found = move || fault_is_found(&config, *fault, &["--seal", seal]);
            trials.push(trial(&name, found));
        }
    }
    trials
}

/// Numbers of vCPUs and seals that a fault is tried with; those with one vCPU are in `kvm.rs`. What
/// only several can show is tried with everything.
fn places(fault: Fault) -> Vec<(u8, &'static str)> {
    let first = |cpus| seals(fault).first().map(|seal| (cpus, *seal));
    if fault.vcpus() == 1 {
        return first(2).into_iter().collect();
    }
    seals(fault).iter().map(|seal| (2, *seal)).chain(first(4)).collect()
}

/// Random requests of every kind on both CPUs, frees on the other CPU among them.
fn random() -> Check {
    let config = "[guest]\nmemory_mib = 32\nvcpus = 2\nfill = 0xa5\n[workload]\n\
                  program = \"stress\"\noperations = 700\nmax_order = 5\n[audit]\n\
                  quiesce_every = 700\n[limits]\ntimeout_s = 120\n";
    let run = lacuna(config, &["--seed", "3"])?;
    run.clean()?;
    for counter in ["alloc_secret", "flip_to_unmapped", "tags_checked"] {
        ensure(run.counter(counter) > 0, &format!("{counter} is 0"))?;
    }
    Ok(())
}

/// The configuration with so many vCPUs.
fn on(cpus: u32, config: &str) -> String {
    config.replace("[guest]\n", &format!("[guest]\nvcpus = {cpus}\n"))
}

fn crash(cpus: u32, crash: &str, limits: &str) -> String {
    format!(
        "[guest]\nmemory_mib = 16\nvcpus = {cpus}\n[workload]\nprogram = \"crash\"\n\
         crash = \"{crash}\"\n[limits]\n{limits}"
    )
}

fn judged_on_all(run: &Run, cpus: u64) -> Check {
    ensure(run.report["guest"]["vcpus"] == cpus, "the report names another number of vCPUs")?;
    // Six judgements of each CPU at each complete check.
    let (judged, quiesces) = (run.check("control-state", "checked"), run.counter("quiesces"));
    ensure(
        judged == 6 * cpus * quiesces && quiesces > 0,
        &format!("control-state was judged {judged} times at {quiesces} complete checks"),
    )
}

fn clean_replay(cpus: u32, seal: &str) -> Check {
    let run = lacuna(&on(cpus, &dirty(&replay(EVENTS, "all"))), &["--seal", seal])?;
    run.clean()?;
    judged_on_all(&run, cpus.into())?;
    let (all, secret) = (run.counter("alloc"), run.counter("alloc_secret"));
    ensure(all == secret && all > 0, &format!("{secret} of {all} are secret"))?;
    ensure(run.counter("work") == EVENTS, "not all events were carried out")?;
    ensure(run.counter("alloc") == run.counter("free"), "not all pages were freed")?;
    ensure(run.counter("shootdowns") > 0, "no shootdown was sent")
}

fn eight() -> Check {
    let run = lacuna("[guest]\nvcpus = 8\n[workload]\nprogram = \"idle\"\n", &[])?;
    run.clean()?;
    judged_on_all(&run, 8)
}

fn by_gate_call() -> Check {
    // Nothing that makes several operations in one call, so that the other calls can be counted.
    let config = on(2, &dirty(&replay(150, "user")))
        .replace("[guest]\n", "[guest]\nprezero = false\n")
        .replace("[audit]\n", "[allocator]\nscrub = false\npool_high_kib = 0\n[audit]\n");
    let calls = |how: &str| -> Result<u64, libtest_mimic::Failed> {
        let config = config.replace("[guest]\n", &format!("[guest]\nshootdown = \"{how}\"\n"));
        let run = lacuna(&config, &[])?;
        run.clean()?;
        ensure(run.counter("shootdowns") > 0, "no shootdown was sent")?;
        let other = run.counter("seals") + run.counter("opens") + run.counter("releases");
        Ok(run.counter("gate_calls").saturating_sub(other))
    };
    let (x2apic, gate) = (calls("x2apic")?, calls("gate")?);
    ensure(gate > x2apic, &format!("{gate} calls beside the operations, {x2apic} without the gate"))
}

/// A guest may have switched a local APIC off, by software or altogether: whatever KVM says of an
/// interrupt for it, that is no failure of the host.
fn lost_interrupt() -> Check {
    let needs = Needs { image: 4096, memory_mib: 16, cpus: 2, input: 0, scratch: 0 };
    let layout = Layout::new(&needs).map_err(|error| format!("{error:?}"))?;
    let vm = Vm::new(lacuna::doctor::open_kvm()?, Arc::new(Memory::new(layout)?))?;
    let _vcpus = [vm.vcpu(0, Gva(0), Gpa(0))?, vm.vcpu(1, Gva(0), Gpa(0))?];
    vm.interrupts().send(1, SHOOTDOWN_VECTOR)?;
    Ok(vm.interrupts().send(7, SHOOTDOWN_VECTOR)?)
}

/// CPUs without a part in the program halt, and the flip of its page waits for them.
fn halted() -> Check {
    let config = "[guest]\nmemory_mib = 16\nvcpus = 4\n[workload]\nprogram = \"touch\"\n\
                  touch = \"read\"\n[audit]\nexpect = [\"foreign-alias\"]\n";
    let run = lacuna(config, &["--seal", "off"])?;
    run.expect(0, "pass")?;
    ensure(run.counter("shootdowns") > 0, "no shootdown was sent")?;
    let run = lacuna(config, &["--seal", "guard"])?;
    run.expect(4, "guest-error")?;
    ensure(run.report["sealed_accesses"][0]["vcpu"] == 0, "the access names another vCPU")
}

fn secrets() -> Check {
    let folder = tempfile::tempdir()?;
    let input = folder.path().join("secret.bin");
    let mut state = 0x1234_5678_9abc_def1_u64;
    let bytes: Vec<u8> = (0..9000)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            b'!' + (state % 90) as u8
        })
        .collect();
    std::fs::write(&input, bytes)?;
    let run = lacuna(&on(2, &dirty(&format!("program = \"secrets\"\ninput = {input:?}\n"))), &[])?;
    run.clean()?;
    ensure(run.check("input-leak", "checked") > 0, "nothing was searched")
}

fn stuck() -> Check {
    let run = lacuna(&crash(2, "stuck-cpu", "shootdown_s = 1\n"), &[])?;
    run.expect(4, "guest-error")?;
    let error = &run.report["guest_error"];
    let message = error["message"].as_str().unwrap_or_default();
    ensure(error["kind"] == "shootdown" && error["vcpu"] == 1, &format!("{error:#}"))?;
    for needle in ["CPU 1 has not answered", "CPU 0", "interrupts off", "shootdown_s"] {
        ensure(message.contains(needle), &format!("{needle:?} is missing in {message}"))?;
    }
    let symbol = error["symbol"].as_str().unwrap_or_default();
    ensure(symbol.contains("stuck"), &format!("{symbol} is not where it loops"))?;
    let frames = error["backtrace"].as_array().map_or(0, Vec::len);
    ensure(frames > 1, &format!("no backtrace: {error:#}"))
}

fn panic_elsewhere() -> Check {
    let run = lacuna(&crash(3, "panic-elsewhere", ""), &[])?;
    run.expect(4, "guest-error")?;
    let error = &run.report["guest_error"];
    ensure(error["kind"] == "panic" && error["vcpu"] == 2, &format!("{error:#}"))?;
    let message = error["message"].as_str().unwrap_or_default();
    ensure(message.contains("on CPU 2"), &format!("the message: {message}"))
}

fn hang() -> Check {
    let started = Instant::now();
    let run = lacuna(&crash(2, "hang", "timeout_s = 1\n"), &[])?;
    run.expect(4, "guest-error")?;
    ensure(run.report["guest_error"]["kind"] == "timeout", "the kind is not timeout")?;
    ensure(started.elapsed() < Duration::from_secs(20), "it took too long")
}

fn bad_calls() -> Check {
    let run = lacuna(&crash(2, "bad-calls", ""), &[])?;
    run.expect(0, "pass")?;
    ensure(run.counter("gate_refused") > 100, "few calls were refused")
}

/// A recording of whole pageblocks and single pages, secret and mapped in turn, each freed on
/// another CPU than the one that asked for it.
fn recording(path: &Path) -> Check {
    let mut csv = String::from("t_us,cpu,op,id,order,migratetype,gfp\n");
    let mut time = 0;
    let mut id = 0;
    for round in 0..4 {
        let gfp = if round % 2 == 0 { "GFP_HIGHUSER|__GFP_ZERO" } else { "GFP_KERNEL" };
        let first = id;
        for step in 0..16 {
            // Six of eight pageblocks, and pages between them.
            let order = if step < 6 { 9 } else { step % 3 };
            let cpu = step % 2;
            writeln!(csv, "{time},{cpu},A,{id},{order},0,{gfp}")?;
            (time, id) = (time + 1, id + 1);
        }
        for (step, freed) in (first..id).enumerate() {
            writeln!(csv, "{time},{},F,{freed},,,", (step + 1) % 2)?;
            time += 1;
        }
    }
    Ok(std::fs::write(path, csv)?)
}

fn stress(seal: &str) -> Check {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("stress.csv");
    recording(&path)?;
    let config = format!(
        "[guest]\nmemory_mib = 16\nvcpus = 2\nprezero = false\n[workload]\nprogram = \"replay\"\n\
         input = {path:?}\n[audit]\nquiesce_every = 10\n"
    );
    let run = lacuna(&config, &["--seal", seal])?;
    run.clean()?;
    judged_on_all(&run, 2)?;
    let (away, back) = (run.counter("flip_to_unmapped"), run.counter("flip_to_mapped"));
    ensure(away >= 12 && back >= 12, &format!("{away} blocks left, {back} came back"))?;
    ensure(run.counter("alloc") == run.counter("free"), "not all pages were freed")?;
    ensure(run.counter("quiesces") > 20, "few complete checks were made")
}
