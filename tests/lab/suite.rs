//! The end-to-end tests on KVM, run inside a lab: the same programs as on the host, built statically.
//! Each test is a process of its own in one boot, so that each has its status.

use crate::in_lab;
use crate::support::{Check, ensure, repository, trial};
use lacuna::lab::{Kind, Order, build_static};
use libtest_mimic::{Failed, Trial};
use serde_json::Value;
use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

/// One trial for each program of which the lab runs something. `LACUNA_LAB_ONLY` narrows them to tests
/// whose names have this in them.
pub fn trials(kind: Kind) -> Vec<Trial> {
    let (lab, programs): (_, &[_]) = match kind {
        Kind::Npt => ("npt", &["kvm", "smp", "step"]),
        Kind::Ept => ("ept", &["kvm", "step"]),
    };
    let trials = programs.iter().map(|name| {
        let title = format!("{lab}::all_tests_of_{name}_pass_inside");
        trial(&title, move || run(kind, name))
    });
    trials.collect()
}

/// Whether the lab runs this test: with EPT, whose emulator is slow, the faults and their clean twins.
fn is_chosen(kind: Kind, test: &str) -> bool {
    let twins = ["replay_is_clean", "replay_in_place_is_clean", "converting_in_place_is_clean"];
    let chosen = ["is_found_under", "without_prezero", "1_vcpus_is_clean", "found_on_1_vcpus"];
    kind == Kind::Npt
        || chosen.iter().any(|part| test.contains(part))
        || twins.iter().any(|twin| test.starts_with(twin))
}

fn run(kind: Kind, name: &str) -> Check {
    let program = program(name)?;
    let only = std::env::var("LACUNA_LAB_ONLY").unwrap_or_default();
    let listed = Command::new(&program).args(["--list", "--format", "terse"]).output()?;
    let listed = String::from_utf8(listed.stdout)?;
    let tests = listed.lines().filter_map(|line| line.strip_suffix(": test"));
    let tests: Vec<_> =
        tests.filter(|test| is_chosen(kind, test) && test.contains(&only)).collect();
    ensure(!tests.is_empty(), &format!("{name} has no such tests: {listed}"))?;
    let order = Order {
        commands: tests.iter().map(|test| ["--exact", test].map(OsString::from).to_vec()).collect(),
        folder: repository().to_owned(),
        files: files()?,
        keep: None,
        environment: vec![("LACUNA_REQUIRE_KVM", "1".into())],
    };
    let started = Instant::now();
    let (ending, out) = in_lab(kind, 1, &order, Some(program))?;
    let failed: Vec<_> =
        tests.iter().zip(&ending.statuses).filter(|(_, status)| **status != 0).collect();
    let (count, seconds) = (tests.len() - failed.len(), started.elapsed().as_secs());
    let done = format!("{count} of {} tests of {name} passed in {seconds} s", tests.len());
    eprintln!("{} lab: {done}", kind.name());
    let said = String::from_utf8_lossy(&out);
    // Each process must have run its test, and none is left out.
    let ran = said.matches("running 1 test\n").count();
    ensure(ran == tests.len() && !said.contains("1 ignored"), &format!("{ran} ran: {said}"))?;
    ensure(failed.is_empty(), &format!("{done}; failed: {failed:?}\n{said}"))
}

/// Builds a program of tests statically.
fn program(name: &str) -> Result<PathBuf, Failed> {
    let words = ["test", "--no-run", "--message-format", "json", "--test", name];
    let messages = String::from_utf8(build_static(repository(), &words)?)?;
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let built = messages.filter(|message| message["target"]["name"] == name);
    let mut program = built.filter_map(|message| message["executable"].as_str().map(PathBuf::from));
    Ok(program.next().ok_or_else(|| format!("cargo names no program of the tests {name}"))?)
}

/// What the tests read and start: the configurations, and the `lacuna` that was built with them.
fn files() -> Result<Vec<PathBuf>, Failed> {
    let mut files = vec![PathBuf::from("target/lab/x86_64-unknown-linux-gnu/lab/lacuna")];
    let mut folders = vec![repository().join("configs")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() { folders.push(path) } else { files.push(path) }
        }
    }
    Ok(files)
}
