//! End to end on the simulated machine: the command line as a user calls it, judged by its JSON
//! report and its exit status. Nothing here needs `/dev/kvm`.

mod benches;
mod stories;
mod support;

use benches::quick;
use lacuna::config::{Config, MachineKind, Overrides};
use lacuna::run::{End, Host, Machine, Plan};
use lacuna::stop::Stopped;
use lacuna_abi::workload::Selftest;
use libtest_mimic::Trial;
use serde_json::Value;
use std::ops::ControlFlow;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
use stories::{STORIES, story_is_told};
use support::matrix::SEALS;
use support::{
    Check, EVENTS, LACUNA, Run, dirty, ensure, is_judged_the_same, lacuna, replay, repository,
    selftest, trial,
};

fn main() {
    support::run(trials(), false);
}

fn trials() -> Vec<Trial> {
    let mut trials = vec![
        trial("a_seed_repeats_a_run_byte_for_byte", one_seed),
        trial("different_seeds_make_different_runs", two_seeds),
        trial("many_seeds_are_clean_and_no_secret_is_used_through_a_stale_translation", many_seeds),
        trial("a_stale_translation_of_a_secret_is_seen_in_use", stale_use),
        trial("secrets_leave_no_trace", secrets),
        trial("a_large_guest_takes_little_memory", sparse),
        trial("a_hang_ends_with_its_timeout", hang),
        trial("a_cpu_that_answers_no_shootdown_is_named", stuck_cpu),
        trial("a_panic_on_another_cpu_is_named", panic_elsewhere),
        trial("shootdowns_through_the_gate_are_clean", gate_shootdowns),
        trial("a_bench_prints_what_it_measured_and_what_was_aimed_at", bench_zero),
        trial("a_quick_bench_of_flips_counts_a_shootdown_for_each_batch", bench_flip),
        trial("a_quick_bench_of_mediations_counts_a_call_for_each_write", bench_mediate),
        trial("a_quick_bench_of_pages_has_every_line_with_its_counts_and_ratios", bench_alloc),
        trial("being_told_to_stop_ends_a_run_wherever_it_is", cancel),
        trial("without_prezero_pages_are_zeroed_when_handed_out", no_prezero),
    ];
    for cpus in [1, 2, 4] {
        for seal in SEALS {
            let name = format!("quickstart_is_clean_on_{cpus}_cpus_under_{seal}");
            trials.push(trial(&name, move || quickstart(cpus, seal)));
        }
    }
    for test in Selftest::ALL {
        let name = format!("selftest_{}_passes_under_tables", test.name());
        let args = ["--machine", "sim", "--mediate", "tables"];
        trials.push(trial(&name, move || lacuna(&selftest(*test), &args)?.clean()));
    }
    for scenario in ["table", "flip"] {
        let config = format!(
            "[guest]\nmemory_mib = 16\nvcpus = 2\n[workload]\nprogram = \"probe\"\nscenario = \"{scenario}\"\n"
        );
        let name = format!("what_a_cpu_may_observe_stale_is_the_same_under_tables_{scenario}");
        let args = ["--machine", "sim", "--mediate", "tables"];
        trials.push(trial(&name, move || lacuna(&config, &args)?.clean()));
    }
    for (name, config, args) in to_record() {
        let name = format!("a_recorded_{name}_is_judged_the_same");
        trials.push(trial(&name, move || {
            let args: Vec<&str> = args.iter().copied().chain(["--machine", "sim"]).collect();
            is_judged_the_same(&config, &args)
        }));
    }
    for story in STORIES {
        let name = format!("{}_tells_its_story", story.fault);
        trials.push(trial(&name, || story_is_told(story, &["--machine", "sim"])));
    }
    for test in Selftest::ALL {
        trials.push(trial(test.name(), move || sim(&selftest(*test), &[])?.clean()));
    }
    for cpus in [1, 4] {
        let name = format!("random_requests_on_{cpus}_cpus_find_every_page_as_it_should_be");
        trials.push(trial(&name, move || stress(cpus)));
    }
    for touch in ["read", "write", "page-walk"] {
        for seal in ["guard", "memslot"] {
            let name = format!("a_{touch}_of_a_sealed_frame_is_caught_under_{seal}");
            trials.push(trial(&name, move || sealed_touch(touch, seal)));
        }
    }
    // An empty /dev takes a mount namespace, which not every user may have.
    let hides = without_devices(&["--version"]).is_ok_and(|output| output.status.success());
    let no_kvm = trial("without_kvm_run_names_the_simulated_machine", no_kvm);
    trials.push(no_kvm.with_ignored_flag(!hides));
    for (crash, needles) in CRASHES {
        let name = format!("a_{crash}_is_reported");
        trials.push(trial(&name, move || crash_is_reported(crash, needles)));
    }
    trials
}

/// Ways to fail, and what kind and message must say.
const CRASHES: &[(&str, &[&str])] = &[
    ("panic", &["panic", "asked to"]),
    ("page-fault", &["exception", "#PF", "0xffff9101c0000128", "error code 0x0"]),
    ("general-protection", &["exception", "#GP"]),
    ("write-text", &["exception", "#PF", "error code 0x3"]),
];

/// Runs on the simulated machine.
fn sim(config: &str, args: &[&str]) -> Result<Run, libtest_mimic::Failed> {
    lacuna(config, &[&["--machine", "sim"], args].concat())
}

fn simulation(run: &Run, name: &str) -> u64 {
    run.report["machine"]["simulation"][name].as_u64().unwrap_or(u64::MAX)
}

fn on_cpus(cpus: u8, config: &str) -> String {
    let own = config.lines().filter(|line| !line.starts_with("vcpus"));
    let rest: String = own.flat_map(|line| [line, "\n"]).collect();
    rest.replace("[guest]\n", &format!("[guest]\nvcpus = {cpus}\n"))
}

fn quickstart(cpus: u8, seal: &str) -> Check {
    let configs = repository().join("configs");
    let config = std::fs::read_to_string(configs.join("quickstart.toml"))?;
    let data = format!("\"{}/data/", configs.display());
    let config = config.replace("vcpus = 2\n", &format!("vcpus = {cpus}\n"));
    let config = config.replace("\"data/", &data);
    let run = sim(&config, &["--seal", seal])?;
    run.clean()?;
    ensure(run.report["machine"]["kind"] == "sim", "the report names another machine")?;
    ensure(run.report["guest"]["vcpus"] == cpus, "the report names other CPUs")?;
    ensure(run.report["second_stage"]["backend"] == *seal, "the report names another seal")?;
    ensure(simulation(&run, "stale_secret_uses") == 0, "a secret was used while stale")?;
    let switches = simulation(&run, "switches");
    ensure((switches > 100) == (cpus > 1), &format!("{switches} switches"))?;
    let granule = if seal == "memslot" { 2 << 20 } else { 4096 };
    ensure(seal == "off" || run.report["second_stage"]["granule"] == granule, "another granule")?;
    for counter in ["alloc_secret", "flip_to_mapped", "shootdowns", "window_flushes", "opens"] {
        ensure(run.counter(counter) > 0, &format!("the counter {counter} is zero"))?;
    }
    ensure(run.counter("work") >= 2000, "fewer than 2,000 events of the recording")
}

/// Runs to be recorded: name, configuration, arguments.
fn to_record() -> Vec<(&'static str, String, &'static [&'static str])> {
    let configs = repository().join("configs");
    let quickstart = std::fs::read_to_string(configs.join("quickstart.toml")).unwrap_or_default();
    let quickstart = quickstart.replace("\"data/", &format!("\"{}/data/", configs.display()));
    let stress = "[guest]\nmemory_mib = 32\nvcpus = 4\n[workload]\nprogram = \"stress\"\noperations = 5000\n";
    let probe =
        "[guest]\nmemory_mib = 32\nvcpus = 2\n[workload]\nprogram = \"probe\"\nrounds = 2\n";
    let touch = "[workload]\nprogram = \"touch\"\ntouch = \"read\"\n";
    vec![
        ("quickstart", quickstart.clone(), &[]),
        ("quickstart_without_a_seal", quickstart.clone(), &["--seal", "off"]),
        ("local_only_flush", quickstart.clone(), &["--inject", "local-only-flip-flush"]),
        ("stale_table", quickstart.clone(), &["--inject", "table-free-stale"]),
        ("wrong_cpu_window", quickstart, &["--inject", "wrong-cpu-window"]),
        ("stress_on_four_cpus", stress.to_owned(), &[]),
        ("probe", probe.to_owned(), &[]),
        ("sealed_access", touch.to_owned(), &[]),
    ]
}

fn bench_zero() -> Check {
    let results = quick("zero", "sim")?;
    for field in ["window_page_ticks", "direct_page_ticks", "speed_ratio"] {
        let positive = results[field].as_f64().is_some_and(|value| value > 0.0);
        ensure(positive, &format!("{field} is not measured: {results:#}"))?;
    }
    // An address of the window is used again for each pageblock; the direct map needs no flush.
    let flushes = |way: &str| results[way]["local_flushes"].as_f64();
    ensure(flushes("window") == Some(1.0), &format!("{results:#}"))?;
    ensure(flushes("direct") == Some(0.0), &format!("{results:#}"))?;
    let goal = &results["goals"][0];
    ensure(goal["goal"] == 0.95 && goal["value"] == results["speed_ratio"], &format!("{goal:#}"))?;
    let met = results["speed_ratio"].as_f64().map(|ratio| ratio >= 0.95);
    ensure(goal["met"].as_bool() == met, &format!("{goal:#}"))
}

fn bench_mediate() -> Check {
    let results = quick("mediate", "sim")?;
    let jobs = results["jobs"].as_array().ok_or("there are no jobs")?;
    ensure(jobs.len() == 4, &format!("{results:#}"))?;
    for job in jobs {
        let calls = |way: usize| job["ways"][way]["per_round"]["gate_calls"].as_f64();
        ensure(job["ways"][0]["mediation"] == "trace", &format!("{job:#}"))?;
        ensure(job["ways"][1]["mediation"] == "tables", &format!("{job:#}"))?;
        ensure(calls(1) > calls(0), &format!("{job:#}"))?;
        ensure(job["ways"][1]["ratio"].as_f64() > Some(0.0), &format!("{job:#}"))?;
    }
    Ok(())
}

fn bench_flip() -> Check {
    let results = quick("flip", "sim")?;
    let batches = results["batches"].as_array().ok_or("there are no batches")?;
    ensure(batches.len() == 3, &format!("{results:#}"))?;
    for (batch, blocks) in batches.iter().zip([1.0, 4.0, 16.0]) {
        let per_block = |name: &str| batch["per_block"][name].as_f64().map(|n| n * blocks);
        ensure(batch["blocks"] == blocks, &format!("not {blocks} blocks: {batch:#}"))?;
        // One shootdown takes them out, another ends the windows through which they were zeroed.
        ensure(per_block("shootdowns") == Some(2.0), &format!("{batch:#}"))?;
        ensure(per_block("flips_back") == Some(blocks), &format!("{batch:#}"))?;
        ensure(batch["block_ticks"].as_f64() > Some(0.0), &format!("{batch:#}"))?;
    }
    Ok(())
}

fn bench_alloc() -> Check {
    let results = quick("alloc", "sim")?;
    let lines = |name: &str| results[name].as_array().cloned().unwrap_or_default();
    let (pages, policies) = (lines("pages"), lines("policies"));
    ensure(pages.len() == 4 && policies.len() == 15, &format!("{results:#}"))?;
    for line in pages.iter().chain(&policies) {
        for ratio in ["cycle", "cycle_without_gate", "page", "page_without_gate"] {
            let measured = line["ratios"][ratio].as_f64().is_some_and(|ratio| ratio >= 0.0);
            ensure(measured, &format!("{ratio} is not measured: {line:#}"))?;
        }
        // A use is one open and one seal, unless 512 small allocations stand for a large one; what
        // is more belongs to the scrub that a use makes necessary.
        let uses = &line["per_use"];
        let mapped = line["name"].as_str().is_some_and(|name| name.starts_with("mapped"));
        let calls = |name: &str| uses[name].as_f64().unwrap_or(-1.0);
        let used = |name: &str| if mapped { calls(name) == 0.0 } else { calls(name) >= 1.0 };
        let all = ["gate_calls", "seals", "opens"].iter().all(|name| used(name));
        ensure(all, &format!("counts of a use: {line:#}"))?;
    }
    for (index, line) in pages.iter().enumerate() {
        ensure(line["unzeroed_ratios"]["cycle"].is_number(), &format!("{line:#}"))?;
        // Pages of a dry pool come from pageblocks that flip, those of the others do not.
        let flips = line["per_page"]["flips_out"].as_f64().map(|n| n * 512.0);
        ensure(flips == Some(if index < 3 { 0.0 } else { 1.0 }), &format!("{line:#}"))?;
    }
    let small = policies.iter().any(|line| {
        line["order"] == 9
            && line["name"].as_str().is_some_and(|name| name.contains("512 of order 0"))
    });
    ensure(small, "nothing goes page by page at order 9")?;
    ensure(results["refill"]["page_ticks"].as_f64() > Some(0.0), &format!("{results:#}"))?;
    let speed = lines("speed");
    let cpus: Vec<_> = speed.iter().filter_map(|line| line["cpus"].as_u64()).collect();
    ensure(cpus == [1, 1, 2, 2, 4, 4, 8, 8], &format!("{speed:#?}"))
}

fn stress(cpus: u8) -> Check {
    let config = "[guest]\nmemory_mib = 64\nfill = 0xa5\n[allocator]\non_free = \"poison\"\n\
                  [workload]\nprogram = \"stress\"\noperations = 4000\n[audit]\n\
                  quiesce_every = 5000\n";
    for seed in ["1", "2", "3"] {
        let run = sim(&on_cpus(cpus, config), &["--seed", seed])?;
        run.clean()?;
        let secret = ["alloc_secret", "flip_to_unmapped", "converted", "parked", "scrubs_atomic"];
        for counter in secret.into_iter().chain(["tags_checked", "poison_checked"]) {
            ensure(run.counter(counter) > 0, &format!("{counter} is 0"))?;
        }
        ensure(simulation(&run, "stale_secret_uses") == 0, "a secret was used while stale")?;
    }
    Ok(())
}

/// A run with these arguments: its events file, and its report without what takes time.
fn events_and_findings(cpus: u8, args: &[&str]) -> Result<(Vec<u8>, Value), libtest_mimic::Failed> {
    let folder = tempfile::tempdir()?;
    let out = folder.path().display().to_string();
    let config = on_cpus(cpus, &dirty(&replay(150, "user")));
    let run = sim(&config, &[&["--out", &out], args].concat())?;
    run.clean()?;
    let mut report = run.report;
    for timed in ["timing", "guest", "config"] {
        report[timed] = Value::Null;
    }
    Ok((std::fs::read(folder.path().join("events.bin"))?, report))
}

fn one_seed() -> Check {
    for cpus in [1, 4] {
        let (a, b) = (
            events_and_findings(cpus, &["--seed", "5"])?,
            events_and_findings(cpus, &["--seed", "5"])?,
        );
        ensure(!a.0.is_empty() && a.0 == b.0, "the events differ")?;
        ensure(a.1 == b.1, &format!("the reports differ:\n{:#}\n{:#}", a.1, b.1))?;
    }
    Ok(())
}

fn two_seeds() -> Check {
    let (a, b) =
        (events_and_findings(4, &["--seed", "5"])?, events_and_findings(4, &["--seed", "6"])?);
    ensure(a.0 != b.0, "two seeds gave the same events")
}

fn many_seeds() -> Check {
    for seed in 0..30_u64 {
        let cpus = [1, 2, 3, 4, 8][seed as usize % 5];
        let seal = SEALS[seed as usize % 3];
        let config = on_cpus(cpus, &dirty(&replay(EVENTS, "all")));
        let run = sim(&config, &["--seed", &seed.to_string(), "--seal", seal])?;
        run.clean()?;
        let secret = simulation(&run, "stale_secret_uses");
        ensure(secret == 0, &format!("seed {seed}: {secret} stale uses of secrets"))?;
    }
    Ok(())
}

/// The clean twin is `many_seeds…`: the same workload without the slip.
fn stale_use() -> Check {
    let config = dirty(&replay(EVENTS, "all"));
    for seed in 0..20_u64 {
        let args = ["--seal", "off", "--inject", "skip-flip-flush", "--seed", &seed.to_string()];
        let run = sim(&config, &args)?;
        run.expect(1, "violation")?;
        if simulation(&run, "stale_secret_uses") > 0 {
            return ensure(simulation(&run, "stale_uses") > 0, "the counts contradict each other");
        }
    }
    Err("twenty seeds, and no CPU used a stale translation of a secret frame".into())
}

fn sealed_touch(touch: &str, seal: &str) -> Check {
    // A touch of a sealed frame is possible only through a mapping that should be gone.
    let expect = match touch {
        "page-walk" => "\"sealed-access\", \"foreign-alias\", \"table-alias\"",
        _ => "\"sealed-access\", \"foreign-alias\"",
    };
    let config = format!(
        "[guest]\nmemory_mib = 16\nvcpus = 2\n[workload]\nprogram = \"touch\"\ntouch = \"{touch}\"\n"
    );
    let run = sim(&config, &["--seal", seal])?;
    ensure(run.status == 1, &format!("unexpected: a violation is left\n{:#}", run.report))?;
    let access = &run.report["sealed_accesses"][0];
    ensure(access["kind"] == touch, &format!("expected a {touch}:\n{:#}", run.report))?;
    ensure(access["gpa"].as_str().is_some_and(|gpa| gpa.starts_with("0x10")), "no address")?;
    ensure(access["va"].as_str().is_some_and(|va| va.starts_with("0xffff91")), "no address")?;
    ensure(access["vcpu"] == 0 && access["rip"].is_null(), "the wrong CPU, or an invented RIP")?;
    let run = sim(&format!("{config}[audit]\nexpect = [{expect}]\n"), &["--seal", seal])?;
    run.expect(0, "pass")?;
    // With the seal off nothing stops it, and the program says so.
    let run = sim(&config, &["--seal", "off"])?;
    ensure(run.report["sealed_accesses"] == serde_json::json!([]), "stopped without a seal")
}

fn crash_is_reported(crash: &str, needles: &[&str]) -> Check {
    let config =
        format!("[guest]\nmemory_mib = 16\n[workload]\nprogram = \"crash\"\ncrash = \"{crash}\"\n");
    let run = sim(&config, &[])?;
    run.expect(4, "guest-error")?;
    let error = &run.report["guest_error"];
    let message = error["message"].as_str().unwrap_or_default();
    for needle in needles {
        let found = message.contains(needle) || error["kind"] == *needle;
        ensure(found, &format!("{needle:?} is missing in {error:#}"))?;
    }
    ensure(error["vcpu"] == 0, "no CPU is named")
}

fn stuck_cpu() -> Check {
    let config = "[guest]\nmemory_mib = 16\nvcpus = 2\n[workload]\nprogram = \"crash\"\n\
                  crash = \"stuck-cpu\"\n[limits]\nshootdown_s = 1\n";
    let run = sim(config, &[])?;
    run.expect(4, "guest-error")?;
    let error = &run.report["guest_error"];
    ensure(error["kind"] == "shootdown" && error["vcpu"] == 1, &format!("{error:#}"))?;
    ensure(error["message"].to_string().contains("CPUs [1] have not"), &format!("{error:#}"))
}

fn panic_elsewhere() -> Check {
    let config = "[guest]\nmemory_mib = 16\nvcpus = 3\n[workload]\nprogram = \"crash\"\n\
                  crash = \"panic-elsewhere\"\n";
    let run = sim(config, &[])?;
    run.expect(4, "guest-error")?;
    let error = &run.report["guest_error"];
    ensure(error["kind"] == "panic" && error["vcpu"] == 2, &format!("{error:#}"))?;
    ensure(error["message"] == "asked to, on CPU 2", &format!("{error:#}"))
}

fn gate_shootdowns() -> Check {
    let config = on_cpus(4, &dirty(&replay(EVENTS, "all")));
    let [x2apic, gate] = ["x2apic", "gate"].map(|how| {
        let how = format!("[guest]\nshootdown = {how:?}\n");
        sim(&config.replace("[guest]\n", &how), &[])
    });
    let (x2apic, gate) = (x2apic?, gate?);
    x2apic.clean()?;
    gate.clean()?;
    let more = gate.counter("gate_calls").saturating_sub(x2apic.counter("gate_calls"));
    ensure(more > 0, "no call sent an interrupt")
}

fn secrets() -> Check {
    let input = repository().join("configs/data/secret.txt");
    for seal in SEALS {
        let config = dirty(&format!("program = \"secrets\"\ninput = {input:?}\n"));
        let run = sim(&on_cpus(2, &config), &["--seal", seal])?;
        run.clean()?;
        ensure(run.check("input-leak", "checked") > 0, "nothing was searched")?;
        ensure(run.counter("work") > 0, "nothing was stored")?;
    }
    Ok(())
}

fn no_prezero() -> Check {
    let config = dirty(&replay(EVENTS, "all")).replace("[guest]\n", "[guest]\nprezero = false\n");
    let run = sim(&config, &[])?;
    run.clean()?;
    ensure(run.counter("zeroed_flip") == 0, "pages were zeroed at the flip")?;
    ensure(run.counter("zeroed_alloc") > 0, "no page was zeroed when it was handed out")
}

/// 32 GiB, of which the program uses a few pages.
fn sparse() -> Check {
    let config = format!(
        "[guest]\nmemory_mib = 32768\n[workload]\n{}[audit]\nquiesce_every = 100000\n",
        replay(150, "user")
    );
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("test.toml");
    std::fs::write(&file, config)?;
    let command = format!(
        "{LACUNA} run {} --machine sim --report json & pid=$!; peak=0; \
         while kill -0 $pid 2>/dev/null; do \
           now=$(awk '/VmHWM/ {{print $2}}' /proc/$pid/status 2>/dev/null); \
           [ -n \"$now\" ] && peak=$now; sleep 0.02; \
         done; wait $pid || exit; echo $peak >&2",
        file.display()
    );
    let output = Command::new("sh").args(["-c", &command]).output()?;
    Run::of(&output)?.clean()?;
    let peak: u64 = String::from_utf8_lossy(&output.stderr).trim().parse().unwrap_or(0);
    ensure(peak > 0 && peak < 400 << 10, &format!("{peak} KiB were resident"))
}

/// A guest that waits is stopped where it waits; one that never calls its platform is given up.
fn hang() -> Check {
    for (crash, given_up) in [("halt", false), ("hang", true)] {
        let config = format!(
            "[guest]\nmemory_mib = 16\n[workload]\nprogram = \"crash\"\ncrash = \"{crash}\"\n\
             [limits]\ntimeout_s = 1\n"
        );
        let started = Instant::now();
        let run = sim(&config, &[])?;
        run.expect(4, "guest-error")?;
        ensure(run.report["guest_error"]["kind"] == "timeout", "the kind is not timeout")?;
        let said = run.report["inconclusive"].to_string().contains("never calls its platform");
        ensure(said == given_up, &format!("{crash}: {:#}", run.report))?;
        ensure(started.elapsed() < Duration::from_secs(20), "it took too long")?;
    }
    Ok(())
}

/// Runs `lacuna` where `/dev` is empty.
fn without_devices(args: &[&str]) -> std::io::Result<std::process::Output> {
    let script = "mount -t tmpfs none /dev && exec \"$0\" \"$@\"";
    Command::new("unshare").args(["-rm", "sh", "-c", script, LACUNA]).args(args).output()
}

fn no_kvm() -> Check {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("idle.toml");
    std::fs::write(&file, "[workload]\nprogram = \"idle\"\n")?;
    let file = file.display().to_string();
    let output = without_devices(&["run", &file])?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure(output.status.code() == Some(3), &format!("status {:?}", output.status))?;
    ensure(stderr.contains("--machine sim"), &format!("the message: {stderr}"))?;
    let output = without_devices(&["run", &file, "--machine", "sim", "--report", "json"])?;
    Run::of(&output)?.clean()
}

/// Whatever the guest's code is doing, being told to stop unwinds it: nothing panics twice, no lock
/// stays taken, the end is the one that was asked for, and what the run left can be checked.
fn cancel() -> Check {
    let overrides = Overrides { machine: Some(MachineKind::Sim), ..Overrides::default() };
    let text = on_cpus(4, &dirty(&replay(100_000, "all")));
    let config = Config::from_text(Path::new("cancel.toml"), &text, &overrides)?;
    let mut stopped = 0;
    for round in 0..16 {
        let (mut plan, _) = Plan::new(&config)?;
        plan.seed = round;
        let running = Machine::open(Host::of(config.machine)?, plan, Vec::new())?.start()?;
        let cancel = running.cancel_handle();
        std::thread::sleep(Duration::from_micros(500 + 2000 * round));
        cancel.cancel();
        let outcome = running.wait(|_| ControlFlow::Continue(()));
        match &outcome.end {
            End::Stopped(Stopped::Cancelled, _) => stopped += 1,
            End::Exit(0, _) => {}
            end => return Err(format!("round {round}: {end:?}").into()),
        }
        let findings = outcome.with_gate(|gate| gate.result().findings);
        ensure(findings.is_empty(), &format!("round {round}: {findings:#?}"))?;
    }
    ensure(stopped > 8, &format!("only {stopped} runs were stopped"))
}
