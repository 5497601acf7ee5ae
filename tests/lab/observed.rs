//! What a machine with nested page tables still uses after its tables have changed: seen, and compared
//! with the model.

use crate::support::{Check, Run, ensure, repository};
use crate::{BOOTS, in_lab};
use lacuna::lab::{Kind, Order};
use libtest_mimic::Failed;
use serde_json::Value;
use std::ffi::OsString;
use std::fs;

/// Rounds of each case of `probe`, in which something is stale in nearly every round.
const ROUNDS: &str = "40";
/// Rounds of a flip that another CPU sees, of which it read the stale word in a tenth on an overloaded host:
/// each timer tick of the lab's kernel makes it forget.
const FLIPS: u64 = 100;
/// Seconds after which a run of them stands still: one takes 10 on a host at rest.
const STANDS_STILL: u64 = 120;
/// Runs in which it may be read: that none of all rounds reads it has a chance of less than 1 in 10^13.
const UNSEALED: usize = 3;

/// Runs these commands of `lacuna` in one lab; each prints a report as JSON. In a lab of two processors a
/// vCPU that shuts down or stands still, which none of them can make it do, starts all of them again in
/// another one, loudly (docs/labs.md, "One processor or two").
fn reports(kind: Kind, cpus: u8, order: &Order) -> Result<Vec<Run>, Failed> {
    let mut tries = 1..=BOOTS;
    loop {
        let number = tries.next();
        let runs = reports_once(kind, cpus, order)?;
        let broken = runs.iter().find(|run| {
            let kind = &run.report["guest_error"]["kind"];
            kind == "triple-fault" || kind == "timeout"
        });
        match broken {
            Some(run) if cpus > 1 && number < Some(BOOTS) => {
                let error = &run.report["guest_error"];
                eprintln!("AGAIN: a vCPU of the lab shut down or stood still: {error:#}");
            }
            _ => return Ok(runs),
        }
    }
}

fn reports_once(kind: Kind, cpus: u8, order: &Order) -> Result<Vec<Run>, Failed> {
    let (ending, out) = in_lab(kind, cpus, order, None)?;
    let reports = serde_json::Deserializer::from_slice(&out).into_iter::<Value>();
    let reports: Vec<Value> = reports.collect::<Result<_, _>>()?;
    ensure(
        reports.len() == ending.statuses.len(),
        &format!("{} reports, {:?}: {}", reports.len(), ending.statuses, text(&out)),
    )?;
    let runs = ending.statuses.iter().zip(reports);
    Ok(runs.map(|(status, report)| Run { status: i32::from(*status), report }).collect())
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn words(words: &[&str]) -> Vec<OsString> {
    words.iter().map(OsString::from).collect()
}

/// A case of a run, by its names.
struct Case<'r> {
    value: &'r Value,
}

impl Case<'_> {
    fn is(&self, cpu: &str, invalidation: &str) -> bool {
        self.value["cpu"] == cpu && self.value["invalidation"] == invalidation
    }

    fn global(&self) -> bool {
        self.value["global"] == true
    }

    fn count(&self, name: &str) -> Result<u64, Failed> {
        Ok(self.value[name].as_u64().ok_or_else(|| format!("no {name}: {}", self.value))?)
    }
}

/// The cases that were tried, none of which contradicts the model.
fn cases(run: &Run, at_least: usize) -> Result<Vec<Case<'_>>, Failed> {
    run.expect(0, "pass")?;
    let all = run.report["observed"].as_array().into_iter().flatten();
    let tried: Vec<_> =
        all.filter(|case| case["offered"] == true).map(|value| Case { value }).collect();
    ensure(tried.len() >= at_least, &format!("{} cases were tried", tried.len()))?;
    for case in &tried {
        let (stale, may) = (case.count("stale")?, case.count("may_be_stale")?);
        let right = case.count("contradictions")? == 0 && stale <= may;
        ensure(right, &format!("the model is contradicted: {}", case.value))?;
    }
    Ok(tried)
}

fn probe(kind: Kind, vcpus: u8) -> Result<Run, Failed> {
    let order = Order {
        commands: vec![words(&[
            "probe",
            "--json",
            "--rounds",
            ROUNDS,
            "--vcpus",
            &vcpus.to_string(),
        ])],
        folder: repository().to_owned(),
        ..Order::default()
    };
    reports(kind, vcpus, &order)?.pop().ok_or_else(|| "no report".into())
}

/// On QEMU: what is not invalidated is stale. A CR3 load drops everything there, what is global too.
pub fn npt() -> Check {
    own(&cases(&probe(Kind::Npt, 1)?, 48)?)
}

/// The same on two CPUs, with what another CPU keeps. The emulated machine does not always survive it
/// (docs/labs.md, "One processor or two").
pub fn npt_on_two() -> Check {
    let run = probe(Kind::Npt, 2)?;
    let cases = cases(&run, 108)?;
    own(&cases)?;
    // Ticks of the lab's kernel cost a part of these: not each case must be seen.
    let other = cases.iter().filter(|case| case.is("other", "none"));
    let seen = other.map(|case| case.count("stale")).collect::<Result<Vec<_>, _>>()?;
    ensure(seen.iter().sum::<u64>() > 0, "another CPU was never stale")
}

fn own(cases: &[Case<'_>]) -> Check {
    for case in cases {
        let (stale, may) = (case.count("stale")?, case.count("may_be_stale")?);
        if case.is("own", "none") {
            ensure(stale > 0, &format!("never stale: {}", case.value))?;
        }
        if case.is("own", "cr3") {
            let right = stale == 0 && (may > 0) == case.global();
            ensure(right, &format!("a CR3 load did not flush it: {}", case.value))?;
        }
    }
    Ok(())
}

/// On Bochs: what is global outlives a CR3 load, and nothing else does.
pub fn ept() -> Check {
    let run = probe(Kind::Ept, 1)?;
    let mut loads = 0;
    for case in cases(&run, 108)? {
        let stale = case.count("stale")?;
        if case.is("own", "none") {
            ensure(stale > 0, &format!("never stale: {}", case.value))?;
        }
        if case.is("own", "cr3") {
            ensure((stale > 0) == case.global(), &format!("after a CR3 load: {}", case.value))?;
            loads += 1;
        }
    }
    ensure(loads == 12, &format!("{loads} cases with a CR3 load"))
}

/// A pageblock leaves the direct map while another CPU has it cached, and is written through a window.
/// Without the flush the other CPU reads what was written; a seal before the write makes that a page
/// fault; with the flush nothing is read in any case.
pub fn flip() -> Check {
    let folder = tempfile::tempdir()?;
    let path = repository().join("configs/stale-read.toml");
    let config = fs::read_to_string(path)?;
    let longer = config.replace("rounds = 20\n", &format!("rounds = {FLIPS}\n"));
    ensure(config != longer, "the configuration has no rounds")?;
    let limited = longer.replace("timeout_s = 600\n", &format!("timeout_s = {STANDS_STILL}\n"));
    ensure(limited != longer, "the configuration has no time limit")?;
    fs::write(folder.path().join("flip.toml"), limited)?;
    let run = |more: &[&str]| {
        words(&[&["run", "flip.toml", "--machine", "kvm", "--report", "json"], more].concat())
    };
    let left_out = ["--inject", "skip-flip-flush"];
    let unsealed = run(&[&left_out[..], &["--seal", "off"]].concat());
    let mut commands = vec![unsealed; UNSEALED];
    commands.push(run(&[&left_out[..], &["--seal", "guard"]].concat()));
    commands.extend([run(&["--seal", "off"]), run(&["--seal", "guard"])]);
    let order = Order {
        commands,
        folder: folder.path().to_owned(),
        files: vec!["flip.toml".into()],
        ..Order::default()
    };
    let mut read = 0;
    for (index, run) in reports(Kind::Npt, 2, &order)?.iter().enumerate() {
        let (is_unsealed, is_slip) = (index < UNSEALED, index <= UNSEALED);
        if is_slip {
            run.expect(1, "violation")?;
            ensure(run.check("stale-direct-map", "violations") > 0, "the rule found nothing")?;
        } else {
            run.clean()?;
        }
        let observed = &run.report["observed"];
        let case = Case { value: &observed[0] };
        let may = if is_unsealed { FLIPS } else { 0 };
        ensure(
            observed.as_array().is_some_and(|cases| cases.len() == 1)
                && case.value["change"] == "flip"
                && case.count("rounds")? == FLIPS
                && case.count("may_be_stale")? == may
                && case.count("contradictions")? == 0,
            &format!("command {index}: {observed:#}"),
        )?;
        // What is not stale was a page fault, which is what the tables say.
        let stale = case.count("stale")?;
        eprintln!("flip, command {index}: the marker was read in {stale} of {FLIPS} rounds");
        read += if is_unsealed { stale } else { 0 };
        ensure(stale == 0 || is_unsealed, &format!("command {index}: {observed:#}"))?;
    }
    ensure(read > 0, "the marker was never read without a seal")
}
