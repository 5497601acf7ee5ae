//! One line of a comparison: what pages and their uses cost under one policy.

use super::guest::{Effort, Kind, Lab, Policy, Work};
use super::sample::{Counts, Sample, float, typical, typical_multiple};
use super::{BenchError, columns, times};
use lacuna_abi::addr::BLOCK_FRAMES;
use lacuna_abi::workload::Bench;
use serde::Serialize;

/// Pages of one order, allocated, used once and freed under one policy.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Line {
    /// What it is, for a reader.
    pub name: String,
    /// How the allocator behaves.
    pub policy: Policy,
    /// Order of the allocations.
    pub order: u8,
    /// Whether secret frames are closed.
    pub seal: bool,
    /// Ticks of the guest's clock for a page: allocating and freeing, with all refilling, zeroing
    /// and scrubbing.
    pub page_ticks: f64,
    /// Part of them that went by in gate calls; `null` where the guest cannot tell.
    pub page_gate_ticks: Option<f64>,
    /// Ticks for a use of an allocation: open, map, write a word, unmap, seal.
    pub use_ticks: f64,
    /// Part of them that went by in gate calls; `null` where the guest cannot tell.
    pub use_gate_ticks: Option<f64>,
    /// Nanoseconds for a page in which the host's audit judged.
    pub audit_ns: f64,
    /// `page_ticks` as a multiple of those of the line that this one is compared with.
    pub page_ratio: Option<f64>,
    /// The same without the ticks in gate calls.
    pub page_guest_ratio: Option<f64>,
    /// Ticks for a page and its uses, as a multiple.
    pub cycle_ratio: Option<f64>,
    /// The same without the ticks in gate calls.
    pub cycle_guest_ratio: Option<f64>,
    /// Events for 512 pages that are allocated and freed without being used.
    pub per_512_pages: Counts,
    /// What one use of an allocation adds, the scrub that it makes necessary included.
    pub per_use: Counts,
}

/// Measures guests of these kinds side by side; the first line is the one that the others are
/// compared with.
///
/// # Errors
/// [`BenchError`].
pub(super) fn lines(
    lab: &Lab,
    named: &[(&str, Kind)],
    effort: Effort,
) -> Result<Vec<Line>, BenchError> {
    let kinds: Vec<Kind> = named.iter().map(|(_, kind)| kind.clone()).collect();
    let unused: Vec<Kind> = kinds.iter().map(without_use).collect();
    let samples = lab.compare(&kinds, effort)?;
    // Counts do not vary: one pair is enough.
    let unused = lab.compare(&unused, Effort { pairs: 1, ..effort })?;
    let base = samples.first().cloned().unwrap_or_default();
    let lines = named.iter().zip(&samples).zip(&unused);
    Ok(lines
        .map(|(((name, kind), rounds), unused)| line(name, kind, rounds, unused, &base))
        .collect())
}

/// The same guest without the uses, where these are more than a store.
fn without_use(kind: &Kind) -> Kind {
    let work = match kind.work {
        Work::Rounds(Bench::InPlace, order) => Work::Rounds(Bench::InPlaceUnused, order),
        Work::Rounds(Bench::Secret, order) => Work::Rounds(Bench::SecretUnused, order),
        work => work,
    };
    Kind { work, ..kind.clone() }
}

fn line(name: &str, kind: &Kind, rounds: &[Sample], unused: &[Sample], base: &[Sample]) -> Line {
    let order = match kind.work {
        Work::Rounds(_, order) => order,
        Work::Replay => 0,
    };
    let pages = float(BLOCK_FRAMES);
    let uses = float((BLOCK_FRAMES >> order).max(1));
    let per_page = |of: fn(&Sample) -> f64| typical(rounds, |sample| of(sample) / pages);
    let per_use = |of: fn(&Sample) -> f64| typical(rounds, |sample| of(sample) / uses);
    let multiple = |of: fn(&Sample) -> f64| typical_multiple(rounds, base, of, of);
    let split = rounds.iter().any(|s| s.times.pages_in_gate + s.times.uses_in_gate > 0.0)
        || kind.is_mapped();
    // Where the guest cannot tell, all ticks look like its own.
    let own = |ratio: Option<f64>| ratio.filter(|_| split);
    let plain = unused.first().map_or(Counts::default(), |sample| sample.counts);
    let used = rounds.first().map_or(Counts::default(), |sample| sample.counts);
    Line {
        name: name.to_owned(),
        policy: kind.policy,
        order,
        seal: kind.seal,
        page_ticks: per_page(|s| s.times.pages),
        page_gate_ticks: split.then(|| per_page(|s| s.times.pages_in_gate)),
        use_ticks: per_use(|s| s.times.uses),
        use_gate_ticks: split.then(|| per_use(|s| s.times.uses_in_gate)),
        audit_ns: per_page(|s| s.times.audit),
        page_ratio: multiple(|s| s.times.pages),
        page_guest_ratio: own(multiple(|s| s.times.pages - s.times.pages_in_gate)),
        cycle_ratio: multiple(|s| s.times.guest()),
        cycle_guest_ratio: own(multiple(|s| {
            s.times.guest() - s.times.pages_in_gate - s.times.uses_in_gate
        })),
        per_512_pages: plain,
        per_use: (used - plain).times(1.0 / uses),
    }
}

/// Lines as a table: times as multiples of the first line's, then counts.
pub(super) fn table(lines: &[Line]) -> String {
    let head =
        ["", "order", "page", "own part", "cycle", "own part", "use, ticks", "in gate", "audit"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for line in lines {
        let share = |part: Option<f64>, whole: f64| match part {
            Some(part) if whole > 0.0 => format!("{:.0} %", 100.0 * part / whole),
            _ => "-".into(),
        };
        let uses = float((BLOCK_FRAMES >> line.order).max(1)) / float(BLOCK_FRAMES);
        let whole = line.page_ticks + line.use_ticks * uses;
        let gate = line.page_gate_ticks.zip(line.use_gate_ticks);
        rows.push(vec![
            line.name.clone(),
            line.order.to_string(),
            times(line.page_ratio),
            times(line.page_guest_ratio),
            times(line.cycle_ratio),
            times(line.cycle_guest_ratio),
            format!("{:.0}", line.use_ticks),
            share(gate.map(|(page, used)| page + used * uses), whole),
            format!("{:.0} ns", line.audit_ns),
        ]);
    }
    let mut counts = vec![counts_head("")];
    for line in lines {
        counts.push(counts_row(&format!("{}, 512 pages", line.name), &line.per_512_pages));
        counts.push(counts_row("  a use adds", &line.per_use));
    }
    format!("{}\n{}", columns(&rows), columns(&counts))
}

/// Head of a table of counts.
pub(super) fn counts_head(what: &str) -> Vec<String> {
    let head =
        ["gate calls", "drains", "seals", "opens", "releases", "shootdowns", "local flushes"];
    [what].iter().chain(&head).map(|text| (*text).to_owned()).collect()
}

/// Row of a table of counts.
pub(super) fn counts_row(name: &str, counts: &Counts) -> Vec<String> {
    let Counts { gate_calls, ring_drains, seals, opens, releases, .. } = *counts;
    let numbers =
        [gate_calls, ring_drains, seals, opens, releases, counts.shootdowns, counts.local_flushes];
    let numbers = numbers.iter().map(|number| format!("{number:.3}"));
    std::iter::once(name.to_owned()).chain(numbers).collect()
}

#[cfg(test)]
mod tests {
    use super::super::sample::Times;
    use super::*;

    fn sample(pages: f64, gate: f64, uses: f64, gate_calls: f64) -> Sample {
        Sample {
            times: Times { pages, pages_in_gate: gate, uses, ..Times::default() },
            counts: Counts { gate_calls, ..Counts::default() },
        }
    }

    fn secret(order: u8) -> Kind {
        Kind::new(Work::Rounds(Bench::Secret, order), Policy::Pool { kib: 4096 })
    }

    #[test]
    fn a_line_is_per_page_and_per_use_and_a_multiple_of_the_base() {
        // Order 4: 32 allocations and uses in a round of 512 pages.
        let rounds = [sample(5120.0, 2560.0, 3200.0, 66.0)];
        let line = line(
            "x",
            &secret(4),
            &rounds,
            &[sample(0.0, 0.0, 0.0, 2.0)],
            &[sample(1024.0, 0.0, 1056.0, 0.0)],
        );
        assert_eq!((line.page_ticks, line.use_ticks), (10.0, 100.0));
        assert_eq!((line.page_gate_ticks, line.page_ratio), (Some(5.0), Some(5.0)));
        assert_eq!((line.page_guest_ratio, line.cycle_ratio), (Some(2.5), Some(4.0)));
        assert_eq!((line.per_512_pages.gate_calls, line.per_use.gate_calls), (2.0, 2.0));
    }

    #[test]
    fn a_guest_that_cannot_tell_gate_calls_apart_has_no_part_of_its_own() {
        let rounds = [sample(10.0, 0.0, 10.0, 1.0)];
        let line = line("x", &secret(0), &rounds, &rounds, &rounds);
        assert_eq!((line.page_gate_ticks, line.page_guest_ratio), (None, None));
        assert_eq!(line.page_ratio, Some(1.0));
    }

    #[test]
    fn only_uses_of_secret_pages_are_left_out() {
        assert_eq!(without_use(&secret(9)).work, Work::Rounds(Bench::SecretUnused, 9));
        let mapped = Kind::new(Work::Rounds(Bench::Mapped, 0), Policy::Plain);
        assert_eq!(without_use(&mapped), mapped);
    }

    #[test]
    fn a_table_has_times_and_counts_of_every_line() {
        let rounds = [sample(5120.0, 2560.0, 5120.0, 1026.0)];
        let unused = [sample(0.0, 0.0, 0.0, 2.0)];
        let text = table(&[line("ours", &secret(0), &rounds, &unused, &rounds)]);
        for part in ["ours ", "1.00", "25 %", "ours, 512 pages", "a use adds", "2.000"] {
            assert!(text.contains(part), "{part} is missing in\n{text}");
        }
    }
}
