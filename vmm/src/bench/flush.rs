//! `bench flush`: what a run of INVLPG costs in a guest, as a multiple of a CR3 load.

use super::{BenchError, ratio};
use crate::config::{Config, Overrides};
use crate::run::{Host, Machine, Plan};
use kvm_ioctls::Kvm;
use lacuna_abi::workload::Program;
use serde::Serialize;
use std::fmt::Write;
use std::ops::ControlFlow;
use std::path::Path;

/// Lengths of the runs that are measured.
const RUNS: [u64; 7] = [1, 2, 4, 8, 16, 32, 64];
/// Pages that are loaded from after each invalidation: what else a CPU might have cached.
const TOUCHED: u64 = 8;
/// Invalidations that one guest times; the fastest counts.
const ROUNDS: u64 = 100;
/// Guests of each kind; the fastest counts, because whatever disturbs one only makes it slower.
const GUESTS: usize = 5;
/// Memory of the guests, in MiB.
const MEMORY_MIB: u64 = 16;

/// Results for runs of one length.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Run {
    /// INVLPGs in a row.
    pub pages: u64,
    /// Least ticks of the time-stamp counter for one run and the loads after it.
    pub ticks: u64,
    /// `ticks`, as a multiple of those of a CR3 load.
    pub ratio: f64,
}

/// Results of the bench.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Flush {
    /// Guests of each kind.
    pub guests: usize,
    /// Invalidations that each guest timed.
    pub rounds: u64,
    /// Pages that were loaded from after each.
    pub touched: u64,
    /// Least ticks for a CR3 load and the loads after it.
    pub cr3_ticks: u64,
    /// Results by length of the run.
    pub runs: Vec<Run>,
    /// The longest run that costs no more than a CR3 load; 0 if none does.
    pub break_even: u64,
}

/// Times invalidations in guests, one of each kind if it is to be `quick`.
///
/// # Errors
/// [`BenchError`].
pub fn flush(
    mut kvm: impl FnMut() -> Result<Kvm, BenchError>,
    quick: bool,
) -> Result<Flush, BenchError> {
    let guests = if quick { 1 } else { GUESTS };
    // The kinds take turns, so that what lasts longer than a guest disturbs all of them.
    let mut cr3_ticks = u64::MAX;
    let mut least = [u64::MAX; RUNS.len()];
    for _ in 0..guests {
        cr3_ticks = cr3_ticks.min(one(kvm()?, 0)?);
        for (pages, least) in RUNS.into_iter().zip(&mut least) {
            *least = (*least).min(one(kvm()?, pages)?);
        }
    }
    let run = |(pages, ticks)| Run { pages, ticks, ratio: ratio(ticks, cr3_ticks) };
    let runs: Vec<_> = RUNS.into_iter().zip(least).map(run).collect();
    let break_even = break_even(&runs, cr3_ticks);
    Ok(Flush { guests, rounds: ROUNDS, touched: TOUCHED, cr3_ticks, runs, break_even })
}

/// The longest run that costs no more than a CR3 load, as all shorter ones do.
fn break_even(runs: &[Run], cr3_ticks: u64) -> u64 {
    runs.iter().take_while(|run| run.ticks <= cr3_ticks).last().map_or(0, |run| run.pages)
}

/// Ticks of a guest's fastest round.
fn one(kvm: Kvm, pages: u64) -> Result<u64, BenchError> {
    let text = format!("[guest]\nmemory_mib = {MEMORY_MIB}\n[workload]\nprogram = \"idle\"\n");
    let config = Config::from_text(Path::new("bench-flush"), &text, &Overrides::default())?;
    let (mut plan, _) = Plan::new(&config)?;
    plan.program = Program::Flush;
    plan.args = [pages, TOUCHED, ROUNDS];
    let outcome = Machine::open(Host::Kvm(kvm), plan, Vec::new())?
        .start()?
        .wait(|_| ControlFlow::Continue(()));
    outcome.with_gate(|gate| match gate.memory().progress(0) {
        Ok(ticks) if ticks > 0 => Ok(ticks),
        _ => Err(BenchError::NoTimes(format!("{:?}", outcome.end))),
    })
}

impl Flush {
    /// The results as a table.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut text = format!(
            "Invalidations followed by loads from {} other pages, least of {} rounds in each \
             of {} guests\n\n{:>14}  {:>10}  {:>7}\n{:>14}  {:>10}  {:>7.2}\n",
            self.touched,
            self.rounds,
            self.guests,
            "what",
            "ticks",
            "ratio",
            "CR3 load",
            self.cr3_ticks,
            1.0
        );
        for run in &self.runs {
            let what = format!("{} INVLPG", run.pages);
            // Writing to a string does not fail.
            let _ = writeln!(text, "{what:>14}  {:>10}  {:>7.2}", run.ticks, run.ratio);
        }
        let _ = match self.break_even {
            0 => writeln!(text, "\nA CR3 load is cheaper than any of these runs."),
            pages => writeln!(text, "\nUp to {pages} INVLPG cost no more than a CR3 load."),
        };
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(ticks: [u64; 3]) -> Vec<Run> {
        let run = |(pages, ticks)| Run { pages, ticks, ratio: ratio(ticks, 100) };
        [1, 2, 4].into_iter().zip(ticks).map(run).collect()
    }

    #[test]
    fn the_break_even_is_the_longest_run_before_the_first_that_costs_more() {
        assert_eq!(break_even(&runs([50, 100, 101]), 100), 2);
        assert_eq!(break_even(&runs([101, 90, 90]), 100), 0);
        assert_eq!(break_even(&runs([1, 2, 3]), 100), 4);
    }

    #[test]
    fn a_table_names_every_run_and_the_break_even() {
        let mut flush = Flush {
            guests: 1,
            rounds: 1,
            touched: 3,
            cr3_ticks: 100,
            runs: runs([50, 150, 300]),
            break_even: 1,
        };
        let text = flush.to_text();
        assert!(text.contains("2 INVLPG         150     1.50"), "{text}");
        assert!(text.contains("Up to 1 INVLPG"), "{text}");
        flush.break_even = 0;
        assert!(flush.to_text().contains("cheaper than any"));
    }
}
