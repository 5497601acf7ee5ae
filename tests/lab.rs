//! Labs, end to end: the command line inside an emulated machine with real NPT, and with
//! `LACUNA_LAB_EPT=1` in one with real EPT, called as a user does.
//!
//! The NPT lab runs with `LACUNA_LAB=1`, because it may have to download packages. Where they cannot
//! be had, its tests are listed as ignored and counted. A lab whose packages are there and that does
//! not do what it should is a failure. With `LACUNA_LAB_ALL=1` the end-to-end tests on KVM run inside too.

#[path = "lab/observed.rs"]
mod observed;
#[path = "lab/suite.rs"]
mod suite;
mod support;

use lacuna::lab::{
    Cache, Ending, Kept, Kind, Lab, LabError, Order, Settings, Stream, Watcher, set_up, sets,
};
use lacuna::stop::Stop;
use lacuna_abi::workload::Touch;
use libtest_mimic::{Arguments, Failed, Trial};
use serde_json::Value;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use support::{Check, LACUNA, Run, ensure, repository, trial};

/// The window of a run that is stepped, events of 263: a flip lies in it.
const FROM: &str = "60";
const TO: &str = "120";
/// Instructions of which a window has more.
const STEPPED: u64 = 1000;
/// How long a process may take to start or to be gone.
const PATIENCE: Duration = Duration::from_secs(60);
const TICK: Duration = Duration::from_millis(20);

fn main() {
    let mut arguments = Arguments::from_args();
    // A lab is a machine: side by side they would only slow each other down.
    arguments.test_threads = arguments.test_threads.or(Some(1));
    let asked = |name| std::env::var_os(name).is_some_and(|value| value == "1");
    let mut trials = plain();
    for (kind, variable, mut of_kind) in
        [(Kind::Npt, "LACUNA_LAB", npt()), (Kind::Ept, "LACUNA_LAB_EPT", ept())]
    {
        let name = kind.name();
        if asked("LACUNA_LAB_ALL") {
            of_kind.extend(suite::trials(kind));
            if kind == Kind::Npt {
                let name = "npt::another_cpu_is_stale_and_does_not_contradict_the_model";
                of_kind.push(trial(name, observed::npt_on_two));
            }
        }
        let runs = if asked(variable) {
            arguments.list || prepared(kind)
        } else {
            eprintln!("SKIPPED: {} tests of the {name} lab; {variable}=1 runs them", of_kind.len());
            false
        };
        trials.extend(of_kind.into_iter().map(|trial| trial.with_ignored_flag(!runs)));
    }
    libtest_mimic::run(&arguments, trials).exit();
}

/// What needs no packages.
fn plain() -> Vec<Trial> {
    vec![
        trial("mistakes_in_the_arguments_end_before_a_lab_starts", mistakes),
        trial("status_says_what_is_missing", status_of_nothing),
        trial("a_lab_without_packages_or_network_ends_with_the_remedy", no_packages),
    ]
}

fn npt() -> Vec<Trial> {
    vec![
        trial("npt::doctor_names_npt_with_its_evidence", || doctor("npt")),
        trial("npt::quickstart_passes_and_its_files_come_back", quickstart),
        trial("npt::quickstart_passes_when_the_host_writes_the_tables", tables),
        trial("npt::a_window_of_a_run_is_stepped", || stepped("npt")),
        trial("npt::cases_of_the_regression_suite_pass_and_their_results_come_back", checked),
        trial("npt::a_violation_inside_is_one_outside", || violation("npt")),
        trial("npt::a_triple_fault_inside_is_a_guest_error_outside", guest_error),
        trial("npt::every_touch_of_a_sealed_frame_is_caught", || touches(Kind::Npt)),
        trial("npt::stale_translations_are_seen_and_none_contradicts_the_model", observed::npt),
        trial("npt::an_unflushed_flip_is_read_without_a_seal_and_faults_under_one", observed::flip),
        trial("npt::a_lab_that_takes_too_long_is_ended", timeout),
        trial("npt::ctrl_c_ends_it_and_leaves_no_process", || ended_by("INT", Some(5))),
        trial("npt::sigterm_ends_it_and_leaves_no_process", || ended_by("TERM", Some(5))),
        trial("npt::no_process_is_left_when_lacuna_is_killed", || ended_by("KILL", None)),
    ]
}

fn ept() -> Vec<Trial> {
    vec![
        trial("ept::doctor_names_ept_with_its_evidence", || doctor("ept")),
        trial("ept::a_violation_inside_is_one_outside", || violation("ept")),
        trial("ept::every_touch_of_a_sealed_frame_is_caught", || touches(Kind::Ept)),
        trial("ept::a_window_of_a_run_is_stepped", || stepped("ept")),
        trial("ept::a_global_translation_outlives_a_cr3_load", observed::ept),
    ]
}

struct Steps;

impl Watcher for Steps {
    fn begin(&mut self, what: &str, _: Option<u64>) {
        eprintln!("{what}");
    }

    fn at(&mut self, _: u64) {}

    fn go_on(&mut self) -> Result<(), LabError> {
        Ok(())
    }
}

/// Whether the packages of a lab are there, downloaded now if need be: said loudly if not.
fn prepared(kind: Kind) -> bool {
    let done = Cache::open(None).and_then(|cache| set_up(&cache, &sets(kind, false), &mut Steps));
    match done {
        Ok(()) => true,
        Err(error @ (LabError::Packages(_) | LabError::Host { .. })) => {
            eprintln!("SKIPPED: the {} lab cannot be set up here: {error}", kind.name());
            false
        }
        Err(error) => panic!("the {} lab cannot be set up: {error}", kind.name()),
    }
}

fn call(args: &[&str]) -> Result<Output, Failed> {
    let mut lacuna = Command::new(LACUNA);
    Ok(lacuna.args(args).current_dir(repository()).stdin(Stdio::null()).output()?)
}

fn ended_with(output: &Output, status: i32, needle: &str) -> Check {
    let said = String::from_utf8_lossy(&output.stderr);
    let right = output.status.code() == Some(status) && said.contains(needle);
    ensure(right, &format!("expected {status} and {needle:?}, got {output:?}"))
}

fn mistakes() -> Check {
    ended_with(&call(&["lab", "npt", "--", "run"])?, 2, "required arguments")?;
    ended_with(&call(&["lab", "npt", "--", "run", "none.toml"])?, 2, "none.toml")?;
    ended_with(&call(&["lab", "npt", "--", "check", "no/such/case"])?, 2, "no case matches")?;
    let nowhere = ["lab", "npt", "--", "check", "--junit", "/nowhere/at/all.xml"];
    ended_with(&call(&nowhere)?, 2, "/nowhere/at/all.xml")?;
    ended_with(&call(&["lab", "ept", "--cpus", "2", "--", "doctor"])?, 2, "one processor")?;
    ended_with(&call(&["lab", "npt", "--", "lab", "status"])?, 2, "a lab inside a lab")?;
    ended_with(&call(&["lab", "npt", "--lacuna", "Cargo.toml", "--", "doctor"])?, 2, "no static")
}

fn status_of_nothing() -> Check {
    let folder = tempfile::tempdir()?;
    let cache = folder.path().display().to_string();
    let output = call(&["lab", "status", "--cache", &cache])?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure(output.status.code() == Some(3), &format!("{output:?}"))?;
    ensure(said.contains("lacuna lab ept: has to be set up: lacuna lab setup"), &said)?;
    ensure(!folder.path().join("sets").exists(), "something was made")
}

/// apt stands for a host without one: nothing else on the path.
fn no_packages() -> Check {
    let folder = tempfile::tempdir()?;
    let output = Command::new(LACUNA)
        .args(["lab", "setup", "--cache"])
        .arg(folder.path())
        .env("PATH", folder.path())
        .stdin(Stdio::null())
        .output()?;
    ended_with(&output, 3, "use Debian 12 or later")
}

fn doctor(kind: &str) -> Check {
    let output = call(&["lab", kind, "--", "doctor", "--json"])?;
    ended_with(&output, 0, "")?;
    let doctor: Value = serde_json::from_slice(&output.stdout)?;
    let flavour = &doctor["flavour"];
    let (module, translation) = match kind {
        "npt" => ("kvm_amd", "NPT"),
        _ => ("kvm_intel", "EPT"),
    };
    let right = flavour["module"] == module && flavour["translation"] == translation;
    ensure(right && doctor["can_run"] == true, &format!("{doctor:#}"))?;
    let evidence = format!("/sys/module/{module}/parameters/{kind} is Y");
    ensure(flavour["evidence"] == evidence.as_str(), &format!("{flavour:#}"))
}

fn quickstart() -> Check {
    let folder = tempfile::tempdir()?;
    let out = folder.path().join("a/b");
    let out_text = out.display().to_string();
    let config = "configs/quickstart.toml";
    let output =
        call(&["lab", "npt", "--", "run", config, "--report", "json", "--out", &out_text])?;
    let run = Run::of(&output)?;
    run.clean()?;
    ensure(run.report["machine"]["translation"] == "NPT", &format!("{:#}", run.report))?;
    let evidence = &run.report["machine"]["evidence"];
    let right = evidence == "/sys/module/kvm_amd/parameters/npt is Y";
    ensure(right, &format!("the evidence is {evidence}"))?;
    let report: Value = serde_json::from_slice(&fs::read(out.join("report.json"))?)?;
    ensure(report == run.report, "the report that came back is another")?;
    let events = fs::read(out.join("events.bin"))?;
    let mut count = 0_u64;
    lacuna::events::read_events(&events[..], &mut |_| count += 1)?;
    let recorded = run.counter("events");
    ensure(count >= recorded && recorded > 0, &format!("{count} of {recorded} events came back"))
}

/// Direct paging needs nothing of the second stage: the same on nested tables.
fn tables() -> Check {
    let config = "configs/quickstart.toml";
    let args = ["lab", "npt", "--", "run", config, "--mediate", "tables", "--report", "json"];
    let run = Run::of(&call(&args)?)?;
    run.clean()?;
    let machine = &run.report["machine"];
    ensure(
        machine["mediation"] == "tables" && machine["translation"] == "NPT",
        &format!("{machine:#}"),
    )?;
    run.compared(1000)
}

/// Guest code runs by hardware there, so that other instructions escape a step than where it is interpreted.
fn stepped(kind: &str) -> Check {
    let folder = tempfile::tempdir()?;
    let config = folder.path().join("step.toml");
    fs::write(&config, support::dirty(&support::replay(40, "all")) + support::PATIENCE)?;
    let config = config.display().to_string();
    let window = ["--mediate", "step", "--step-from", FROM, "--step-to", TO];
    let args = [&["lab", kind, "--", "run", &config, "--report", "json"], &window[..]].concat();
    let run = Run::of(&call(&args)?)?;
    run.clean()?;
    let machine = &run.report["machine"];
    let stepped = machine["stepping"]["instructions"].as_u64();
    ensure(stepped > Some(STEPPED) && machine["mediation"] == "step", &format!("{machine:#}"))?;
    run.compared(0)
}

/// Some of the regression suite that the program was built with, in a lab.
fn checked() -> Check {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("junit.xml");
    let junit = file.display().to_string();
    let output = call(&["lab", "npt", "--", "check", "--json", "--junit", &junit, "crash/kvm/*"])?;
    ended_with(&output, 0, "")?;
    let results: Value = serde_json::from_slice(&output.stdout)?;
    let counts = &results["counts"];
    let right = counts["passed"].as_u64() > Some(0) && counts["passed"] == counts["cases"];
    ensure(right, &format!("{counts:#}"))?;
    let junit = fs::read_to_string(file)?;
    ensure(junit.contains("kvm/trace/guard/vcpus=1/crash=panic"), &junit)
}

fn violation(kind: &str) -> Check {
    let folder = tempfile::tempdir()?;
    let config = folder.path().join("touch.toml");
    fs::write(
        &config,
        "[guest]\nmemory_mib = 16\n[workload]\nprogram = \"touch\"\ntouch = \"read\"\n",
    )?;
    let config = config.display().to_string();
    let run = Run::of(&call(&["lab", kind, "--", "run", &config, "--report", "json"])?)?;
    run.expect(1, "violation")
}

/// KVM on AMD resets a vCPU that has shut down; what it is then is no fault of the guest's registers.
fn guest_error() -> Check {
    let folder = tempfile::tempdir()?;
    let config = folder.path().join("crash.toml");
    let crash = "[workload]\nprogram = \"crash\"\ncrash = \"triple-fault\"\n";
    fs::write(&config, format!("[guest]\nmemory_mib = 16\n{crash}"))?;
    let config = config.display().to_string();
    let run = Run::of(&call(&["lab", "npt", "--", "run", &config, "--report", "json"])?)?;
    run.expect(4, "guest-error")?;
    ensure(run.report["guest_error"]["kind"] == "triple-fault", &format!("{:#}", run.report))
}

/// Every kind of touch, under the seals of a kernel without guards, in one lab. With nested tables a
/// closed frame ends `KVM_RUN` with `EFAULT` and nothing else, so that all of it is decoded.
fn touches(kind: Kind) -> Check {
    let folder = tempfile::tempdir()?;
    let mut order = Order {
        folder: folder.path().to_owned(),
        keep: Some(Kept::Folder("out".into())),
        ..Order::default()
    };
    let mut names = Vec::new();
    for (seal, second) in
        [("mprotect", "seal = \"guard\"\nguard = \"mprotect\""), ("memslot", "seal = \"memslot\"")]
    {
        for touch in Touch::ALL {
            let also = if *touch == Touch::PageWalk { ", \"table-alias\"" } else { "" };
            let config = format!(
                "[guest]\nmemory_mib = 16\n[workload]\nprogram = \"touch\"\ntouch = \"{}\"\n\
                 [second_stage]\n{second}\n[audit]\n\
                 expect = [\"sealed-access\", \"foreign-alias\"{also}]\n",
                touch.name()
            );
            let name = format!("{}-{seal}", touch.name());
            let file = format!("{name}.toml");
            fs::write(folder.path().join(&file), config)?;
            order.files.push(file.clone().into());
            let out = format!("out/{name}");
            let command = ["run", &file, "--out", &out, "--report", "json"];
            order.commands.push(command.map(OsString::from).to_vec());
            names.push((name, kind_of(*touch)));
        }
    }
    let (ending, _) = in_lab(kind, 1, &order, None)?;
    let mut wrong = String::new();
    for (status, (name, kind)) in ending.statuses.iter().zip(names) {
        let path = Path::new(&name).join("report.json");
        let report = ending.files.iter().find(|(file, _)| *file == path);
        let report = report.ok_or_else(|| format!("{} did not come back", path.display()))?;
        let report: Value = serde_json::from_slice(&report.1)?;
        let access = &report["sealed_accesses"][0];
        let starts =
            |field: &str, start| access[field].as_str().is_some_and(|v| v.starts_with(start));
        let right = *status == 0
            && access["kind"] == kind
            && starts("gpa", "0x10")
            && starts("rip", "0xffff")
            && access["vcpu"] == 0;
        if !right {
            wrong += &format!("{name} ended with {status}: {report:#}\n");
        }
    }
    ensure(wrong.is_empty(), &wrong)
}

/// The kind that a report must name.
const fn kind_of(touch: Touch) -> &'static str {
    match touch {
        Touch::Read | Touch::String => "read",
        Touch::Write | Touch::Locked | Touch::Stack => "write",
        Touch::Fetch => "fetch",
        Touch::EventDelivery => "event-delivery",
        Touch::PageWalk => "page-walk",
    }
}

/// Runs an order in a lab with so many processors: what came of it, and what it wrote to standard output.
/// If a program is named that one runs, which may take long, and what it writes is shown as it comes.
fn in_lab(
    kind: Kind,
    cpus: u8,
    order: &Order,
    program: Option<PathBuf>,
) -> Result<(Ending, Vec<u8>), Failed> {
    let (npt, shown) = (kind == Kind::Npt, program.is_some());
    let settings = Settings {
        kind,
        backports: false,
        cpus,
        memory_mib: if npt { 1024 } else { 512 },
        timeout: Duration::from_secs(match (&program, npt) {
            (Some(_), _) => 4 * 3600,
            (None, true) => 300,
            (None, false) => 1800,
        }),
        lacuna: program,
    };
    let lab = Lab::prepare(settings, Cache::open(None)?, &mut Steps)?;
    let mut tries = 1..=BOOTS;
    loop {
        let number = tries.next();
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let ending = lab.run(order, &Stop::default(), &mut |stream, bytes| match stream {
            Stream::Out => {
                if shown {
                    eprint!("{}", String::from_utf8_lossy(bytes));
                }
                out.extend(bytes);
            }
            Stream::Err => err.extend(bytes),
        });
        let again = cpus > 1 && number < Some(BOOTS);
        match ending {
            Ok(ending) => return Ok((ending, out)),
            Err(LabError::NoResult { what, last }) if again && panicked(&last) => {
                eprintln!("AGAIN: the lab's own kernel panicked ({what}):\n{last}");
            }
            Err(error @ LabError::Timeout { .. }) if again && !shown => {
                eprintln!("AGAIN: the lab stood still: {error}");
            }
            Err(error) => return Err(format!("{error}\n{}", String::from_utf8_lossy(&err)).into()),
        }
    }
}

/// How often a lab of two processors may be started for one order. Its own kernel, which nothing in it can
/// write to, panics or stands still now and then (docs/labs.md, "One processor or two"). A lab of one
/// processor is started once, and what fails in it is a failure.
const BOOTS: u32 = 3;

/// Whether a console's last lines are those of a kernel that panicked.
fn panicked(last: &str) -> bool {
    last.contains("Kernel Offset: ") || last.contains("Kernel panic")
}

fn timeout() -> Check {
    let output = call(&["lab", "npt", "--timeout", "1", "--", "doctor"])?;
    ended_with(&output, 4, "the lab was stopped after 1 s; give it more with --timeout")
}

/// A lab that starts, and the processes that belong to it.
fn started() -> Result<(Child, Vec<String>), Failed> {
    let lacuna = Command::new(LACUNA)
        .args(["lab", "npt", "--", "run", "configs/quickstart.toml"])
        .current_dir(repository())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let run = format!("runs/{}-", lacuna.id());
    let until = Instant::now() + PATIENCE;
    loop {
        let processes = naming(&run);
        // The emulator, its shell, and the watchdog.
        if processes.len() >= 3 {
            return Ok((lacuna, processes));
        }
        ensure(Instant::now() < until, "no emulator was started")?;
        thread::sleep(TICK);
    }
}

/// Ids of the processes whose command lines have this in them.
fn naming(what: &str) -> Vec<String> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let ids = processes.filter_map(|entry| entry.file_name().into_string().ok());
    ids.filter(|id| {
        let line = fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
        line.windows(what.len()).any(|part| part == what.as_bytes())
    })
    .collect()
}

/// Ends a lab by a signal to lacuna alone.
fn ended_by(signal: &str, status: Option<i32>) -> Check {
    let (mut lacuna, _) = started()?;
    let run = format!("runs/{}-", lacuna.id());
    let id = lacuna.id().to_string();
    let sent = Command::new("kill").args([&format!("-{signal}"), &id]).status()?;
    ensure(sent.success(), "the signal was not sent")?;
    let ended = lacuna.wait()?;
    ensure(ended.code() == status, &format!("it ended with {ended}"))?;
    let until = Instant::now() + PATIENCE;
    while !naming(&run).is_empty() {
        ensure(Instant::now() < until, &format!("processes are left: {:?}", naming(&run)))?;
        thread::sleep(TICK);
    }
    Ok(())
}
