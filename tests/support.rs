//! Calls `lacuna run` and reads its JSON report.

use libtest_mimic::Failed;
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// The binary under test.
pub const LACUNA: &str = env!("CARGO_BIN_EXE_lacuna");

/// What a test ends with.
pub type Check = Result<(), Failed>;

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

    pub fn clean(&self) -> Check {
        self.expect(0, "pass")?;
        ensure(self.counter("events_lost") == 0, "events were lost")?;
        ensure(
            self.report["violations"].as_array().is_some_and(Vec::is_empty),
            &format!("violations: {:#}", self.report["violations"]),
        )
    }
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

/// As [`replay`], all of it secret, with this percentage of what can be converted in place.
pub fn replay_in_place(events: u64, percent: u8) -> String {
    replay(events, "all") + &format!("in_place = {percent}\n")
}

/// Runs the configuration made of these sections with these arguments.
pub fn lacuna(config: &str, args: &[&str]) -> Result<Run, Failed> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("test.toml");
    std::fs::write(&file, config)?;
    let output = Command::new(LACUNA)
        .arg("run")
        .arg(&file)
        .args(["--report", "json"])
        .args(args)
        .stdin(Stdio::null())
        .output()?;
    Run::of(&output)
}

/// Events of the recording that are enough for a window to wrap.
pub const EVENTS: u64 = 260;

/// A guest of 32 MiB whose memory is dirty, so that residue shows.
pub fn dirty(workload: &str) -> String {
    format!(
        "[guest]\nmemory_mib = 32\nfill = 0xA5\n[workload]\n{workload}[audit]\nquiesce_every = 400\n"
    )
}
