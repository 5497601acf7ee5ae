//! Calls `lacuna run` and reads its JSON report.

#![allow(dead_code, reason = "each test program uses its part")]

#[path = "support/matrix.rs"]
pub mod matrix;
#[path = "support/slips.rs"]
pub mod slips;

use lacuna::check::{Seen, Witness};
use lacuna::report::Violation;
use lacuna_abi::event::HostAct;
use lacuna_abi::fault::Fault;
use lacuna_abi::workload::Selftest;
use libtest_mimic::{Arguments, Failed, Trial};
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// The binary under test.
pub const LACUNA: &str = env!("CARGO_BIN_EXE_lacuna");

/// What a test ends with.
pub type Check = Result<(), Failed>;

/// Runs the tests, which need `/dev/kvm` or do not.
pub fn run(trials: Vec<Trial>, need_kvm: bool) {
    let trials = if need_kvm { needing_kvm(trials) } else { trials };
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

/// Lists these tests as ignored where `/dev/kvm` cannot be used, unless `LACUNA_REQUIRE_KVM` is 1.
pub fn needing_kvm(trials: Vec<Trial>) -> Vec<Trial> {
    let usable = std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
    let required = std::env::var_os("LACUNA_REQUIRE_KVM").is_some_and(|value| value == "1");
    let skip = !usable && !required;
    let ignored = |trial: Trial| if skip { trial.with_ignored_flag(true) } else { trial };
    let trials: Vec<_> = trials.into_iter().map(ignored).collect();
    if skip {
        eprintln!(
            "SKIPPED: /dev/kvm cannot be used here, so {} end-to-end tests do not run; \
             `lacuna doctor` says why, LACUNA_REQUIRE_KVM=1 makes them fail",
            trials.len()
        );
    }
    trials
}

pub fn trial(name: &str, run: impl FnOnce() -> Check + Send + 'static) -> Trial {
    Trial::test(name, run)
}

/// What a call of `lacuna` left.
pub struct Run {
    pub status: i32,
    pub report: Value,
}

impl Run {
    pub fn of(output: &Output) -> Result<Self, Failed> {
        let stdout = String::from_utf8_lossy(&output.stdout);
        let stderr = String::from_utf8_lossy(&output.stderr);
        let report = serde_json::from_str(&stdout)
            .map_err(|e| format!("no JSON report: {e}\nstdout: {stdout}\nstderr: {stderr}"))?;
        let status = output.status.code().ok_or("ended by a signal")?;
        Ok(Self { status, report })
    }

    pub fn expect(&self, status: i32, verdict: &str) -> Check {
        ensure(
            self.status == status && self.report["verdict"] == verdict,
            &format!("expected {status} {verdict}, got {}\n{:#}", self.status, self.report),
        )
    }

    pub fn counter(&self, name: &str) -> u64 {
        self.report["counters"][name].as_u64().unwrap_or(0)
    }

    pub fn check(&self, rule: &str, count: &str) -> u64 {
        let checks = self.report["checks"].as_array().into_iter().flatten();
        checks.filter(|c| c["rule"] == rule).filter_map(|c| c[count].as_u64()).sum()
    }

    /// What the guest reported was compared with what the host saw, more than so often and to the end.
    pub fn compared(&self, at_least: u64) -> Check {
        let [compared, left] =
            ["checked", "not_checked"].map(|count| self.check("trace-honesty", count));
        ensure(compared > at_least && left == 0, &format!("{compared} compared, {left} not"))
    }

    pub fn clean(&self) -> Check {
        self.expect(0, "pass")?;
        ensure(self.counter("events_lost") == 0, "events were lost")?;
        ensure(
            self.report["violations"].as_array().is_some_and(Vec::is_empty),
            &format!("violations: {:#}", self.report["violations"]),
        )
    }
}

/// Records the run of this configuration: `lacuna audit` prints the same report, with the same status.
pub fn is_judged_the_same(config: &str, args: &[&str]) -> Check {
    let folder = tempfile::tempdir()?;
    let out = folder.path().display().to_string();
    let run = lacuna(config, &[args, &["--record", "--out", &out]].concat())?;
    let output = Command::new(LACUNA).args(["audit", &out, "--json"]).output()?;
    let again = Run::of(&output)?;
    ensure(again.status == run.status, &format!("status {} after {}", again.status, run.status))?;
    let different = |name: &&String| again.report[name.as_str()] != run.report[name.as_str()];
    let fields = run.report.as_object().ok_or("no report")?;
    let names: Vec<_> = fields.keys().filter(different).collect();
    ensure(names.is_empty(), &format!("other {names:?}:\n{:#}\n{:#}", again.report, run.report))?;
    ensure(run.counter("events") > 0, "no events")
}

pub fn ensure(holds: bool, otherwise: &str) -> Check {
    if holds { Ok(()) } else { Err(otherwise.into()) }
}

pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the repository")
}

fn recording() -> String {
    repository().join("configs/data/compile.csv.gz").display().to_string()
}

pub fn replay(events: u64, secret: &str) -> String {
    let input = recording();
    format!("program = \"replay\"\ninput = {input:?}\nevents = {events}\nsecret = {secret:?}\n")
}

/// Limits of a run that does not set its own: time enough for a host that is busy.
pub const PATIENCE: &str = "[limits]\ntimeout_s = 600\n";

/// Runs the configuration made of these sections with these arguments.
pub fn lacuna(config: &str, args: &[&str]) -> Result<Run, Failed> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("test.toml");
    let limits = if config.contains("[limits]") { "" } else { PATIENCE };
    std::fs::write(&file, format!("{config}{limits}"))?;
    let output = Command::new(LACUNA)
        .arg("run")
        .arg(&file)
        .args(["--report", "json"])
        .args(args)
        .stdin(Stdio::null())
        .output()?;
    Run::of(&output)
}

/// A configuration that runs a test of allocator and mermap in the guest itself.
pub fn selftest(test: Selftest) -> String {
    format!(
        "[guest]\nmemory_mib = 16\nvcpus = {}\nfill = 0xa5\n[workload]\nprogram = \"selftest\"\n\
         test = \"{}\"\n",
        test.cpus(),
        test.name()
    )
}

/// Events of the recording that are enough for a window to wrap.
pub const EVENTS: u64 = 260;

/// A guest of 32 MiB whose memory is dirty, so that residue shows.
pub fn dirty(workload: &str) -> String {
    format!(
        "[guest]\nmemory_mib = 32\nfill = 0xA5\n[workload]\n{workload}[audit]\nquiesce_every = 400\n"
    )
}

/// Runs the configuration with the fault planted: exit status 1, and its rule finds it, each time in
/// a frame and on a CPU for which the recorded events show the same.
pub fn fault_is_found(config: &str, fault: Fault, args: &[&str]) -> Check {
    let folder = tempfile::tempdir()?;
    let out = folder.path().display().to_string();
    let run = lacuna(config, &[args, &["--inject", fault.name(), "--out", &out]].concat())?;
    run.expect(1, "violation")?;
    ensure(run.check(fault.rule(), "violations") > 0, "the count says that there is none")?;
    let violations = run.report["violations"].as_array().ok_or("no violations")?;
    let found: Vec<_> = violations.iter().filter(|v| v["rule"] == fault.rule()).collect();
    ensure(!found.is_empty(), &format!("{} is not among {violations:#?}", fault.rule()))?;
    let mut witness = Witness(Vec::new());
    let events = std::fs::File::open(folder.path().join("events.bin"))?;
    let events = std::io::BufReader::new(events);
    lacuna::events::read_events(events, &mut |record| witness.0.push(record))?;
    for violation in found {
        let violation: Violation = serde_json::from_value(violation.clone())?;
        witness.confirms_violation(&violation)?;
        let named = violation.frame.is_some();
        ensure(named || fault == Fault::ForgedFlush, &format!("no frame: {violation:?}"))?;
        if fault == Fault::PartialBlockUnmap {
            // The slip forgets the last page of each range.
            let seen = Seen::of(&violation)?;
            let last = [HostAct::Sealed, HostAct::HeldOpen];
            let last = last.iter().any(|act| witness.ends_a_range(seen.frame, *act));
            ensure(last, &format!("not the page that was forgotten: {seen:?}"))?;
        }
    }
    Ok(())
}
