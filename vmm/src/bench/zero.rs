//! `bench zero`: zeroing a pageblock through a window, against the direct map.

use super::guest::{Effort, Kind, Lab, Policy, Work};
use super::line::{counts_head, counts_row};
use super::sample::{Counts, float, typical, typical_multiple};
use super::{BenchError, Goal, columns, times};
use lacuna_abi::addr::BLOCK_FRAMES;
use lacuna_abi::layout::WINDOW_LARGE_SLOTS;
use lacuna_abi::workload::Bench;
use serde::Serialize;

/// Results of the bench.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Zero {
    /// Kind of the machine.
    pub machine: &'static str,
    /// Pageblocks that were zeroed each way, in each of the pairs of runs.
    pub blocks: u64,
    /// Ticks of the guest's clock for a page through a window that is mapped for each pageblock.
    pub window_page_ticks: f64,
    /// Ticks for a page through the direct map.
    pub direct_page_ticks: f64,
    /// Speed through windows, as a multiple of that through the direct map.
    pub speed_ratio: Option<f64>,
    /// Events for a pageblock through a window.
    pub window: Counts,
    /// Events for a pageblock through the direct map.
    pub direct: Counts,
    /// What was aimed at.
    pub goals: Vec<Goal>,
}

/// Measures on the machines of `lab`.
///
/// # Errors
/// [`BenchError`].
pub fn zero(lab: &Lab) -> Result<Zero, BenchError> {
    let mut effort = lab.effort(
        Effort { warm: 20, rounds: 400, pairs: 15 },
        Effort { warm: 4, rounds: 8, pairs: 5 },
    );
    // Until every address of the window was used once none needs a flush.
    effort.warm = effort.warm.max(WINDOW_LARGE_SLOTS);
    let kind = |bench| Kind::new(Work::Rounds(bench, 9), Policy::Pool { kib: 0 });
    let samples = lab.compare(&[kind(Bench::ZeroWindow), kind(Bench::ZeroDirect)], effort)?;
    let (window, direct) = (&samples[0], &samples[1]);
    let speed_ratio =
        typical_multiple(direct, window, |sample| sample.times.uses, |sample| sample.times.uses);
    let ticks = |rounds: &[_]| typical(rounds, |sample| sample.times.uses / float(BLOCK_FRAMES));
    let counts = |rounds: &[super::sample::Sample]| {
        rounds.first().map_or(Counts::default(), |sample| sample.counts)
    };
    Ok(Zero {
        machine: lab.machine.name(),
        blocks: effort.rounds,
        window_page_ticks: ticks(window),
        direct_page_ticks: ticks(direct),
        speed_ratio,
        window: counts(window),
        direct: counts(direct),
        goals: vec![Goal::at_least("speed through windows", 0.95, speed_ratio)],
    })
}

impl Zero {
    /// The results as a table.
    #[must_use]
    pub fn to_text(&self) -> String {
        let row = |name: &str, ticks: f64, speed| {
            vec![name.to_owned(), format!("{ticks:.1}"), times(speed)]
        };
        let rows = [
            ["", "ticks a page", "speed"].map(str::to_owned).to_vec(),
            row("direct map", self.direct_page_ticks, Some(1.0)),
            row("window", self.window_page_ticks, self.speed_ratio),
        ];
        let counts = [
            counts_head("for each pageblock"),
            counts_row("direct map", &self.direct),
            counts_row("window", &self.window),
        ];
        format!(
            "Zeroing pageblocks on {}, {} each way in a run\n\n{}\n{}\n{}",
            self.machine,
            self.blocks,
            columns(&rows),
            columns(&counts),
            Goal::table(&self.goals)
        )
    }
}
