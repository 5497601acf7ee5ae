//! What a guest spent: taken from one run, or as the difference of a long run and a short one, which
//! leaves out what happens only once.

use crate::gate::GateCounters;
use lacuna_abi::counter::Counters;
use serde::Serialize;
use std::ops::Sub;
use std::time::Duration;

/// Events that cost time on any machine.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize)]
pub struct Counts {
    /// Gate calls, those that only make room in an event ring included.
    pub gate_calls: f64,
    /// Gate calls that only make room in an event ring.
    pub ring_drains: f64,
    /// Seal operations on one range each.
    pub seals: f64,
    /// Open operations on one range each.
    pub opens: f64,
    /// Release operations on one range each.
    pub releases: f64,
    /// Flushes sent to a set of CPUs.
    pub shootdowns: f64,
    /// Flushes of window addresses on their own CPU.
    pub local_flushes: f64,
    /// Pageblocks that left the direct map.
    pub flips_out: f64,
    /// Pageblocks that came back.
    pub flips_back: f64,
}

/// A count as a number to calculate with: exact up to 2^53, which no run reaches.
#[allow(clippy::cast_precision_loss)]
pub(super) const fn float(count: u64) -> f64 {
    count as f64
}

impl Counts {
    /// What host and guest counted.
    pub(super) fn of(gate: &GateCounters, guest: &Counters) -> Self {
        Self {
            gate_calls: float(gate.calls),
            ring_drains: float(gate.ring_drains),
            seals: float(gate.seals),
            opens: float(gate.opens),
            releases: float(gate.releases),
            shootdowns: float(guest.shootdowns),
            local_flushes: float(guest.local_flushes),
            flips_out: float(guest.flip_to_unmapped),
            flips_back: float(guest.flip_to_mapped),
        }
    }

    /// Each number, multiplied.
    #[must_use]
    pub(super) fn times(self, factor: f64) -> Self {
        self.with(Self::default(), |a, _| a * factor)
    }

    fn with(self, other: Self, f: impl Fn(f64, f64) -> f64) -> Self {
        Self {
            gate_calls: f(self.gate_calls, other.gate_calls),
            ring_drains: f(self.ring_drains, other.ring_drains),
            seals: f(self.seals, other.seals),
            opens: f(self.opens, other.opens),
            releases: f(self.releases, other.releases),
            shootdowns: f(self.shootdowns, other.shootdowns),
            local_flushes: f(self.local_flushes, other.local_flushes),
            flips_out: f(self.flips_out, other.flips_out),
            flips_back: f(self.flips_back, other.flips_back),
        }
    }
}

impl Sub for Counts {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        self.with(other, |a, b| a - b)
    }
}

/// Time in ticks of the guest's clock, unless it says otherwise.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub(super) struct Times {
    /// Allocating and freeing, with all the refilling, zeroing and scrubbing that is part of it.
    pub(super) pages: f64,
    /// Part of it that went by in gate calls; 0 where the guest cannot tell.
    pub(super) pages_in_gate: f64,
    /// Using what was allocated.
    pub(super) uses: f64,
    /// Part of it that went by in gate calls; 0 where the guest cannot tell.
    pub(super) uses_in_gate: f64,
    /// Whole run, in nanoseconds.
    pub(super) running: f64,
    /// Part of it in which the audit judged, in nanoseconds.
    pub(super) audit: f64,
}

impl Times {
    /// All that the guest timed.
    pub(super) fn guest(&self) -> f64 {
        self.pages + self.uses
    }

    /// Part of it that went by in gate calls; 0 where the guest cannot tell.
    pub(super) fn in_gate(&self) -> f64 {
        self.pages_in_gate + self.uses_in_gate
    }

    fn map(self, f: impl Fn(f64) -> f64) -> Self {
        Self {
            pages: f(self.pages),
            pages_in_gate: f(self.pages_in_gate),
            uses: f(self.uses),
            uses_in_gate: f(self.uses_in_gate),
            running: f(self.running),
            audit: f(self.audit),
        }
    }
}

/// One run, or the difference of two.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub(super) struct Sample {
    pub(super) times: Times,
    pub(super) counts: Counts,
}

impl Sample {
    /// What a run spent.
    pub(super) fn of(
        gate: &GateCounters,
        guest: &Counters,
        running: Duration,
        audit: Duration,
    ) -> Self {
        let nanos = |time: Duration| float(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
        let times = Times {
            pages: float(guest.ticks_alloc.saturating_add(guest.ticks_free)),
            pages_in_gate: float(guest.ticks_gate_pages),
            uses: float(guest.ticks_use),
            uses_in_gate: float(guest.ticks_gate_use),
            running: nanos(running),
            audit: nanos(audit),
        };
        Self { times, counts: Counts::of(gate, guest) }
    }

    /// Each number, multiplied.
    pub(super) fn times(&self, factor: f64) -> Self {
        Self { times: self.times.map(|time| time * factor), counts: self.counts.times(factor) }
    }

    /// This long run without what a short one of the same kind spent, for each of `more` rounds.
    /// Time that the short one took longer, by chance, counts as none.
    pub(super) fn per_round(&self, short: &Self, more: f64) -> Self {
        let less = |of: fn(&Times) -> f64| ((of(&self.times) - of(&short.times)) / more).max(0.0);
        let times = Times {
            pages: less(|t| t.pages),
            pages_in_gate: less(|t| t.pages_in_gate),
            uses: less(|t| t.uses),
            uses_in_gate: less(|t| t.uses_in_gate),
            running: less(|t| t.running),
            audit: less(|t| t.audit),
        };
        Self { times, counts: (self.counts - short.counts).times(1.0 / more) }
    }
}

/// The middle one of several numbers, or the mean of the two in the middle; 0 of none.
pub(super) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.get(middle) {
        None => 0.0,
        Some(upper) if values.len() % 2 == 1 => *upper,
        Some(upper) => (values[middle - 1] + upper) / 2.0,
    }
}

/// `value` as a multiple of `base`; `None` if that is nothing, because the base took no time that
/// could be measured.
pub(super) fn multiple(value: f64, base: f64) -> Option<f64> {
    (base > 0.0).then(|| value / base)
}

/// The median of `of` over the rounds.
pub(super) fn typical(rounds: &[Sample], of: impl Fn(&Sample) -> f64) -> f64 {
    median(rounds.iter().map(of).collect())
}

/// The median, over rounds that were measured side by side, of `of` for one kind of guest as a
/// multiple of `base_of` for another.
pub(super) fn typical_multiple(
    rounds: &[Sample],
    base: &[Sample],
    of: impl Fn(&Sample) -> f64,
    base_of: impl Fn(&Sample) -> f64,
) -> Option<f64> {
    let pairs = rounds.iter().zip(base);
    let multiples: Option<Vec<f64>> = pairs.map(|(a, b)| multiple(of(a), base_of(b))).collect();
    multiples.filter(|multiples| !multiples.is_empty()).map(median)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(pages: f64, gate_calls: f64) -> Sample {
        Sample {
            times: Times { pages, ..Times::default() },
            counts: Counts { gate_calls, ..Counts::default() },
        }
    }

    #[test]
    fn what_happens_only_once_is_not_in_the_difference_of_two_runs() {
        let once = (1000.0, 7.0);
        let run = |rounds: f64| sample(once.0 + 30.0 * rounds, once.1 + 2.0 * rounds);
        let round = run(14.0).per_round(&run(4.0), 10.0);
        assert_eq!((round.times.pages, round.counts.gate_calls), (30.0, 2.0));
        // A short run that was held up says nothing of what a round costs, and no time is negative.
        assert_eq!(run(4.0).per_round(&run(14.0), 10.0).times.pages, 0.0);
    }

    #[test]
    fn the_median_is_the_middle_one() {
        assert_eq!(median(vec![9.0, 1.0, 5.0]), 5.0);
        assert_eq!(median(vec![4.0, 1.0, 9.0, 2.0]), 3.0);
        assert_eq!(median(Vec::new()), 0.0);
    }

    #[test]
    fn multiples_are_taken_side_by_side_and_then_the_middle_one_counts() {
        // The machine became slower in between: side by side it is twice the base each time.
        let base = [1.0, 10.0, 100.0].map(|time| sample(time, 0.0));
        let twice = [2.0, 20.0, 200.0].map(|time| sample(time, 0.0));
        let pages = |s: &Sample| s.times.pages;
        assert_eq!(typical_multiple(&twice, &base, pages, pages), Some(2.0));
        assert_eq!(typical_multiple(&twice, &[sample(0.0, 0.0)], pages, pages), None);
        assert_eq!(typical_multiple(&twice, &[], pages, pages), None);
    }

    #[test]
    fn host_and_guest_counts_come_from_where_they_are_counted() {
        let gate =
            GateCounters { calls: 5, ring_drains: 1, seals: 2, opens: 3, ..Default::default() };
        let guest = Counters {
            shootdowns: 7,
            local_flushes: 8,
            gate_calls: 99,
            ticks_alloc: 10,
            ticks_free: 20,
            ticks_use: 40,
            ..Default::default()
        };
        let nanos = Duration::from_nanos;
        let sample = Sample::of(&gate, &guest, nanos(300), nanos(200));
        let Counts { gate_calls, ring_drains, seals, opens, shootdowns, local_flushes, .. } =
            sample.counts;
        assert_eq!((gate_calls, ring_drains, seals, opens), (5.0, 1.0, 2.0, 3.0));
        assert_eq!((shootdowns, local_flushes), (7.0, 8.0));
        assert_eq!((sample.times.pages, sample.times.guest()), (30.0, 70.0));
        assert_eq!((sample.times.running, sample.times.audit), (300.0, 200.0));
    }
}
