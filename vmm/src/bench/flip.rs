//! `bench flip`: pageblocks leave the direct map and come back, several under one shootdown.

use super::guest::{Effort, Kind, Lab, Policy, Work};
use super::line::{counts_head, counts_row};
use super::sample::{Counts, Sample, multiple, typical};
use super::{BenchError, columns, times};
use lacuna_abi::workload::Bench;
use serde::Serialize;

/// Pageblocks under one shootdown.
const BATCHES: [u64; 3] = [1, 4, 16];
/// KiB of a pageblock.
const BLOCK_KIB: u64 = 2 << 10;

/// Results of the bench.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Flip {
    /// Kind of the machine.
    pub machine: &'static str,
    /// Results by the number of pageblocks under one shootdown.
    pub batches: Vec<Batch>,
}

/// Results for one number of pageblocks.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Batch {
    /// Pageblocks that leave the direct map together.
    pub blocks: f64,
    /// Ticks of the guest's clock for a pageblock: out, zeroed, and back.
    pub block_ticks: f64,
    /// Part of them that went by in gate calls; `null` where the guest cannot tell.
    pub block_gate_ticks: Option<f64>,
    /// `block_ticks` as a multiple of those of a pageblock that flips alone.
    pub ratio: Option<f64>,
    /// Events for a pageblock.
    pub per_block: Counts,
}

/// Measures on the machines of `lab`.
///
/// # Errors
/// [`BenchError`].
pub fn flip(lab: &Lab) -> Result<Flip, BenchError> {
    let kind = |blocks| {
        let policy = Policy::Pool { kib: blocks * BLOCK_KIB };
        Kind::new(Work::Rounds(Bench::Flip, 0), policy)
    };
    let mut samples = Vec::new();
    for blocks in BATCHES {
        // As many pageblocks for each batch, which is what takes the time.
        let effort = lab.effort(
            Effort { warm: 1, rounds: 128 / blocks, pairs: 5 },
            Effort { warm: 1, rounds: 16 / blocks, pairs: 3 },
        );
        samples.extend(lab.compare(&[kind(blocks)], effort)?);
    }
    let mut batches: Vec<Batch> = Vec::new();
    for rounds in &samples {
        let mut batch = batch(rounds);
        let alone = batches.first().map_or(batch.block_ticks, |first| first.block_ticks);
        batch.ratio = multiple(batch.block_ticks, alone);
        batches.push(batch);
    }
    Ok(Flip { machine: lab.machine.name(), batches })
}

/// Results of rounds, in each of which a batch left and came back.
fn batch(rounds: &[Sample]) -> Batch {
    let counts = rounds.first().map_or(Counts::default(), |sample| sample.counts);
    let blocks = counts.flips_out;
    let per_block = |of: fn(&Sample) -> f64| typical(rounds, of) / blocks.max(1.0);
    let gate = per_block(|sample| sample.times.pages_in_gate);
    Batch {
        blocks,
        block_ticks: per_block(|sample| sample.times.pages),
        block_gate_ticks: (gate > 0.0).then_some(gate),
        ratio: None,
        per_block: counts.times(1.0 / blocks.max(1.0)),
    }
}

impl Flip {
    /// The results as a table.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut rows =
            vec![["blocks", "ticks a block", "ratio", "in gate"].map(str::to_owned).to_vec()];
        let mut counts = vec![counts_head("for each block")];
        for batch in &self.batches {
            let share = batch.block_gate_ticks.and_then(|gate| multiple(gate, batch.block_ticks));
            rows.push(vec![
                format!("{:.0}", batch.blocks),
                format!("{:.0}", batch.block_ticks),
                times(batch.ratio),
                share.map_or_else(|| "-".into(), |share| format!("{:.0} %", 100.0 * share)),
            ]);
            counts.push(counts_row(&format!("{:.0} together", batch.blocks), &batch.per_block));
        }
        format!(
            "Pageblocks that flip out, zeroed, and back on {}\n\n{}\n{}",
            self.machine,
            columns(&rows),
            columns(&counts)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample::Times;
    use super::*;

    #[test]
    fn a_batch_is_counted_by_the_block() {
        let counts = Counts { flips_out: 4.0, shootdowns: 2.0, ..Counts::default() };
        let times = Times { pages: 400.0, pages_in_gate: 100.0, ..Times::default() };
        let batch = batch(&[Sample { times, counts }]);
        assert_eq!((batch.blocks, batch.block_ticks), (4.0, 100.0));
        assert_eq!((batch.block_gate_ticks, batch.per_block.shootdowns), (Some(25.0), 0.5));
        let text = Flip { machine: "sim", batches: vec![batch] }.to_text();
        assert!(text.contains("4 together") && text.contains("25 %"), "{text}");
    }
}
