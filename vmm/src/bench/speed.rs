//! How many allocations and flips simulated CPUs make in a second while the audit judges them.

use super::guest::{Effort, Kind, Lab, Policy, Work};
use super::line::{counts_head, counts_row};
use super::sample::{Counts, Sample, float, median};
use super::{BenchError, columns};
use crate::config::{MachineKind, Mediation};
use crate::sim::Schedule;
use lacuna_abi::addr::BLOCK_FRAMES;
use lacuna_abi::workload::Bench;
use serde::Serialize;
use std::io;

/// CPUs of the guests that are compared.
const CPUS: [u8; 4] = [1, 2, 4, 8];
/// Length of the kernel's clock ticks in `/proc`, in seconds: the same on all x86 machines.
const CLOCK_TICK: f64 = 0.01;

/// Speed of guests with so many CPUs, each a thread of this process that runs freely.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Speed {
    /// "pool hits": secret pages that the pool has are allocated and freed, an operation each.
    /// "flips": pageblocks leave the direct map and come back, an operation for both.
    pub work: &'static str,
    /// CPUs of the guest.
    pub cpus: u8,
    /// Operations of all CPUs together in a second; `null` where that is too short to be measured.
    pub per_second: Option<f64>,
    /// Operations in a second of processor time of this process; `null` where that is too short to
    /// be measured.
    pub per_cpu_second: Option<f64>,
    /// Events for an operation.
    pub per_operation: Counts,
}

/// Measures.
///
/// # Errors
/// [`BenchError`].
pub(super) fn speed(quick: bool) -> Result<Vec<Speed>, BenchError> {
    // Whole runs, so that processor time, which is counted in hundredths of a second, means something.
    let (less, pairs) = if quick { (40, 1) } else { (1, 5) };
    let mut speeds = Vec::new();
    for cpus in CPUS {
        let kind = |bench, kib| Kind {
            cpus,
            memory_mib: 256,
            mediation: Mediation::Trace,
            ..Kind::new(Work::Rounds(bench, 0), Policy::Pool { kib })
        };
        let share = u64::from(cpus);
        let hits = Effort { warm: 100 / less, rounds: (4800 / less / share).max(1), pairs };
        let per_round = float(2 * BLOCK_FRAMES * share);
        let hit = kind(Bench::SecretUnused, 64 << 10);
        speeds.push(one("pool hits", &hit, hits, |_| per_round)?);
        let flips = Effort { warm: 2, rounds: (320 / less / share).max(1), pairs };
        let flip = kind(Bench::Flip, 2 << 10);
        speeds.push(one("flips", &flip, flips, |round| round.counts.flips_out)?);
    }
    Ok(speeds)
}

fn one(
    work: &'static str,
    kind: &Kind,
    effort: Effort,
    operations: impl Fn(&Sample) -> f64,
) -> Result<Speed, BenchError> {
    // One CPU takes no turns with others, so that the seeded schedule costs it nothing.
    let schedule = if kind.cpus == 1 { Schedule::Seeded } else { Schedule::Threads };
    let lab = Lab { schedule, ..Lab::new(MachineKind::Sim, false) };
    let (mut wall, mut busy, mut per_operation) = (Vec::new(), Vec::new(), Counts::default());
    for _ in 0..effort.pairs {
        let started = processor_time()?;
        let short = lab.run(kind, effort.warm)?;
        let between = processor_time()?;
        let long = lab.run(kind, effort.warm + effort.rounds)?;
        let ended = processor_time()?;
        let round = long.per_round(&short, float(effort.rounds));
        let done = operations(&round);
        per_operation = round.counts.times(1.0 / done.max(1.0));
        wall.push(rate(done, round.times.running * 1e-9));
        let more = (ended - between) - (between - started);
        busy.push(rate(done * float(effort.rounds), more));
    }
    let middle = |rates: Vec<Option<f64>>| rates.into_iter().collect::<Option<_>>().map(median);
    let (per_second, per_cpu_second) = (middle(wall), middle(busy));
    Ok(Speed { work, cpus: kind.cpus, per_second, per_cpu_second, per_operation })
}

/// Operations a second; `None` where the time is within a few ticks of nothing.
fn rate(operations: f64, seconds: f64) -> Option<f64> {
    (seconds > 0.0).then(|| operations / seconds)
}

/// Processor time of all threads of this process so far, ended ones included, in seconds.
fn processor_time() -> io::Result<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let ticks = processor_ticks(&stat);
    let ticks = ticks.ok_or_else(|| io::Error::other("/proc/self/stat has no utime and stime"))?;
    Ok(float(ticks) * CLOCK_TICK)
}

/// User and system time in a line of `/proc/PID/stat`. The name in it may hold anything, brackets
/// and spaces too; `utime` and `stime` are the 12th and 13th field after it.
fn processor_ticks(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut fields = fields.split(' ').skip(11);
    let mut next = || fields.next()?.parse::<u64>().ok();
    Some(next()? + next()?)
}

/// Speeds as a table.
pub(super) fn table(speeds: &[Speed]) -> String {
    let head = ["work", "CPUs", "a second", "a second of processor time"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    let mut counts = vec![counts_head("for each operation")];
    for Speed { work, cpus, per_second, per_cpu_second, per_operation } in speeds {
        let rate =
            |rate: &Option<f64>| rate.map_or_else(|| "-".into(), |rate| format!("{rate:.0}"));
        let rates = [per_second, per_cpu_second].map(rate);
        rows.push([[(*work).to_owned(), cpus.to_string()], rates].concat());
        counts.push(counts_row(&format!("{work}, CPUs: {cpus}"), per_operation));
    }
    format!("{}\n{}", columns(&rows), columns(&counts))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_is_user_and_system_time_whatever_the_name() {
        let stat = "7 (a) b (c) R 1 7 7 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 1 0 5";
        assert_eq!(processor_ticks(stat), Some(300));
        assert_eq!(processor_ticks("7 (a) R 1"), None);
        assert!(processor_time().unwrap() >= 0.0);
    }

    #[test]
    fn no_time_gives_no_rate() {
        assert_eq!((rate(10.0, 2.0), rate(10.0, 0.0)), (Some(5.0), None));
    }
}
