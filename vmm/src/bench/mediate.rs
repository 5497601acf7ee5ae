//! `bench mediate`: what it costs that the host sees table writes for itself, against the rings alone.

use super::guest::{Effort, Kind, Lab, Policy, Work};
use super::line::{counts_head, counts_row};
use super::sample::{Counts, Sample, typical, typical_multiple};
use super::{BenchError, columns, times};
use crate::config::Mediation;
use lacuna_abi::workload::Bench;
use serde::Serialize;

/// The mediations that are compared; the first is what the others are multiples of.
const MODES: [Mediation; 2] = [Mediation::Trace, Mediation::Tables];

/// Results of the bench.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Mediate {
    /// Kind of the machine.
    pub machine: &'static str,
    /// Results by what the guest does.
    pub jobs: Vec<Job>,
}

/// What a guest does, mediated in several ways.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Job {
    /// What it is, for a reader.
    pub name: &'static str,
    /// Results by the mediation.
    pub ways: Vec<Way>,
}

/// Results for one mediation.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Way {
    /// Name of the mediation.
    pub mediation: &'static str,
    /// Nanoseconds of the whole machine for a round.
    pub round_ns: f64,
    /// Part of them in which the audit judged.
    pub audit_ns: f64,
    /// `round_ns` as a multiple of the first mediation's, side by side; `null` if that is nothing.
    pub ratio: Option<f64>,
    /// Events for a round.
    pub per_round: Counts,
}

/// What guests do, with the rounds that simulated and real ones are given.
const JOBS: [(&str, Work, Policy, [u64; 2]); 4] = [
    ("pages, used", Work::Rounds(Bench::Secret, 0), Policy::Pool { kib: 8192 }, [40, 2]),
    ("in place", Work::Rounds(Bench::InPlace, 2), Policy::InPlace, [20, 1]),
    ("flips", Work::Rounds(Bench::Flip, 0), Policy::Pool { kib: 32768 }, [40, 2]),
    ("recording", Work::Replay, Policy::Pool { kib: 8192 }, [4000, 200]),
];

/// Measures on the machines of `lab`.
///
/// # Errors
/// [`BenchError`].
pub fn mediate(lab: &Lab) -> Result<Mediate, BenchError> {
    let mut jobs = Vec::new();
    for (name, work, policy, [sim, kvm]) in JOBS {
        let kinds = MODES.map(|mediation| Kind { mediation, ..Kind::new(work, policy) });
        let mut effort = lab.effort(
            Effort { warm: 1, rounds: sim, pairs: 7 },
            Effort { warm: 1, rounds: kvm, pairs: 3 },
        );
        if work == Work::Replay {
            // A round is an event: with a few of them no page is secret.
            effort.rounds = effort.rounds.max(kvm);
        }
        let samples = lab.compare(&kinds, effort)?;
        jobs.push(Job { name, ways: ways(&samples) });
    }
    Ok(Mediate { machine: lab.machine.name(), jobs })
}

/// Results of what was measured side by side, in the order of [`MODES`].
fn ways(samples: &[Vec<Sample>]) -> Vec<Way> {
    let running = |sample: &Sample| sample.times.running;
    let base = samples.first().map(Vec::as_slice).unwrap_or_default();
    let way = |(mediation, rounds): (&Mediation, &Vec<Sample>)| Way {
        mediation: mediation.name(),
        round_ns: typical(rounds, running),
        audit_ns: typical(rounds, |sample| sample.times.audit),
        ratio: typical_multiple(rounds, base, running, running),
        per_round: rounds.first().map_or(Counts::default(), |sample| sample.counts),
    };
    MODES.iter().zip(samples).map(way).collect()
}

impl Mediate {
    /// The results as a table.
    #[must_use]
    pub fn to_text(&self) -> String {
        let head = ["", "mediation", "us a round", "ratio", "audit"];
        let mut rows = vec![head.map(str::to_owned).to_vec()];
        let mut counts = vec![counts_head("for each round")];
        for Job { name, ways } in &self.jobs {
            for way in ways {
                rows.push(vec![
                    (*name).to_owned(),
                    way.mediation.to_owned(),
                    format!("{:.1}", way.round_ns / 1000.0),
                    times(way.ratio),
                    format!("{:.1}", way.audit_ns / 1000.0),
                ]);
                counts.push(counts_row(&format!("{name}, {}", way.mediation), &way.per_round));
            }
        }
        format!(
            "Guests whose table writes the host learns of in several ways, on {}\n\n{}\n{}",
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
    fn each_way_is_a_multiple_of_the_first_side_by_side() {
        let sample = |running: f64, gate_calls: f64| Sample {
            times: Times { running, ..Times::default() },
            counts: Counts { gate_calls, ..Counts::default() },
        };
        // The host slowed down in between.
        let trace = vec![sample(100.0, 2.0), sample(1000.0, 2.0), sample(10.0, 2.0)];
        let tables = vec![sample(150.0, 6.0), sample(1500.0, 6.0), sample(15.0, 6.0)];
        let ways = ways(&[trace, tables]);
        assert_eq!([ways[0].ratio, ways[1].ratio], [Some(1.0), Some(1.5)]);
        assert_eq!((ways[1].mediation, ways[1].per_round.gate_calls), ("tables", 6.0));
        let text = Mediate { machine: "sim", jobs: vec![Job { name: "flips", ways }] }.to_text();
        assert!(text.contains("flips, tables") && text.contains("1.5"), "{text}");
    }
}
