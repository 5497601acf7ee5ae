//! What the tests on `/dev/kvm` share.

use crate::support::{Check, ensure, lacuna};
use lacuna_abi::addr::{FrameRange, Gpa};
use lacuna_abi::event::{Event, HostAct, Life};
use libtest_mimic::{Arguments, Trial};

/// Runs the tests. Where `/dev/kvm` cannot be used they are listed as ignored, unless
/// `LACUNA_REQUIRE_KVM` is 1.
pub fn run(trials: Vec<Trial>) {
    let args = Arguments::from_args();
    let usable = std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
    let required = std::env::var_os("LACUNA_REQUIRE_KVM").is_some_and(|value| value == "1");
    let skip = !usable && !required;
    let trials: Vec<_> = trials.into_iter().map(|t| t.with_ignored_flag(skip)).collect();
    if skip {
        eprintln!(
            "SKIPPED: /dev/kvm cannot be used here, so {} end-to-end tests do not run; \
             `lacuna doctor` says why, LACUNA_REQUIRE_KVM=1 makes them fail",
            trials.len()
        );
    }
    libtest_mimic::run(&args, trials).exit();
}

/// Runs the configuration with the fault planted: the rule finds it, in frames that were secret.
pub fn fault_is_found(config: &str, fault: &str, rule: &str, seal: &str) -> Check {
    let folder = tempfile::tempdir()?;
    let out = folder.path().display().to_string();
    let run = lacuna(config, &["--seal", seal, "--inject", fault, "--out", &out])?;
    run.expect(1, "violation")?;
    let violations = run.report["violations"].as_array().ok_or("no violations")?;
    let found: Vec<_> = violations.iter().filter(|v| v["rule"] == rule).collect();
    ensure(!found.is_empty(), &format!("{rule} is not among {violations:#?}"))?;
    // The right frames: those that the host sealed or opened in this run, and for a block that was
    // never sealed, those that the guest says it put into the pool.
    // A table that the guest made is right for the rule on tables.
    let mut secret: Vec<FrameRange> = Vec::new();
    let events = std::fs::File::open(folder.path().join("events.bin"))?;
    lacuna::events::read_events(
        std::io::BufReader::new(events),
        &mut |record| match record.event {
            Event::Host(HostAct::Sealed | HostAct::HeldOpen | HostAct::Opened, frames)
            | Event::Life(Life::Pooled | Life::PooledZero, frames) => secret.push(frames),
            Event::Life(Life::TableAllocated, frames) if rule == "stale-table" => {
                secret.push(frames);
            }
            _ => {}
        },
    )?;
    for violation in &found {
        let frame = violation["frame"].as_str().unwrap_or_default();
        let frame = u64::from_str_radix(frame.trim_start_matches("0x"), 16).unwrap_or(0);
        let known = secret.iter().any(|range| range.contains(Gpa(frame).frame()));
        ensure(known, &format!("the frame never was secret, nor a table: {violation:#}"))?;
    }
    Ok(())
}
