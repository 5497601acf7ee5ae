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
    /// Ticks of the guest's clock for a page: allocating and freeing, with all flips, refilling,
    /// zeroing and scrubbing.
    pub page_ticks: f64,
    /// Part of them that went by in gate calls; `null` where the guest cannot tell.
    pub page_gate_ticks: Option<f64>,
    /// Ticks for a use of an allocation: open, map, write a word, unmap, seal.
    pub use_ticks: f64,
    /// Part of them that went by in gate calls; `null` where the guest cannot tell.
    pub use_gate_ticks: Option<f64>,
    /// Nanoseconds for a page in which the host's audit judged.
    pub audit_ns: f64,
    /// Multiples of the first line of the comparison.
    pub ratios: Ratios,
    /// Multiples of mapped pages that are zeroed neither on allocation nor on free; `null` where no
    /// line of the comparison has such pages.
    pub unzeroed_ratios: Option<Ratios>,
    /// Events for a page that is allocated and freed without being used.
    pub per_page: Counts,
    /// What one use of an allocation adds, the scrub that it makes necessary included.
    pub per_use: Counts,
}

/// What a line costs, as multiples of what another costs. Each is `null` if it cannot be told.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Ratios {
    /// The whole cycle: a page and its part of a use.
    pub cycle: Option<f64>,
    /// The same without the ticks in gate calls.
    pub cycle_without_gate: Option<f64>,
    /// The page alone, without its use.
    pub page: Option<f64>,
    /// The same without the ticks in gate calls.
    pub page_without_gate: Option<f64>,
}

/// A line that is to be measured.
#[derive(Clone, Debug)]
pub(super) struct Subject {
    name: String,
    kind: Kind,
    /// Order of the allocations that it stands for: where these cannot be had, many smaller ones
    /// take their place.
    order: u8,
}

impl Subject {
    /// Guests of this kind, whose work is rounds of allocations.
    pub(super) fn new(name: &str, kind: Kind) -> Self {
        let order = match kind.work {
            Work::Rounds(_, order) => order,
            Work::Replay => 0,
        };
        Self { name: name.to_owned(), kind, order }
    }

    /// The same in place of allocations of this order.
    pub(super) fn in_place_of(self, order: u8) -> Self {
        Self { order, ..self }
    }

    /// Pages of a round.
    fn pages(&self) -> u64 {
        let pages = match self.kind.work {
            Work::Rounds(bench, _) => bench.pages(),
            Work::Replay => BLOCK_FRAMES,
        };
        pages.max(1 << self.order)
    }

    /// Uses in a round, one for each allocation that it stands for.
    fn uses(&self) -> u64 {
        self.pages() >> self.order
    }
}

/// Measures guests of these kinds side by side; the first line is the one that the others are
/// compared with, and then the one at `unzeroed`.
///
/// # Errors
/// [`BenchError`].
pub(super) fn lines(
    lab: &Lab,
    subjects: &[Subject],
    unzeroed: Option<usize>,
    effort: Effort,
) -> Result<Vec<Line>, BenchError> {
    let kinds: Vec<Kind> = subjects.iter().map(|subject| subject.kind.clone()).collect();
    let unused: Vec<Kind> = kinds.iter().map(without_use).collect();
    let samples = lab.compare(&kinds, effort)?;
    // Counts do not vary: one pair is enough.
    let unused = lab.compare(&unused, Effort { pairs: 1, ..effort })?;
    // Rounds differ in their pages.
    let per_page = |(subject, rounds): (&Subject, &Vec<Sample>)| {
        let factor = 1.0 / float(subject.pages());
        rounds.iter().map(|sample| sample.times(factor)).collect::<Vec<_>>()
    };
    let samples: Vec<_> = subjects.iter().zip(&samples).map(per_page).collect();
    let unused: Vec<_> = subjects.iter().zip(&unused).map(per_page).collect();
    let base = samples.first().cloned().unwrap_or_default();
    let unzeroed = unzeroed.and_then(|index| samples.get(index));
    let measured = subjects.iter().zip(&samples).zip(&unused);
    Ok(measured
        .map(|((subject, pages), unused)| line(subject, pages, unused, &base, unzeroed))
        .collect())
}

/// The same guest without the uses, where these are more than a store.
fn without_use(kind: &Kind) -> Kind {
    let unused = |bench| match bench {
        Bench::InPlace => Bench::InPlaceUnused,
        Bench::Secret => Bench::SecretUnused,
        Bench::SecretDry => Bench::SecretDryUnused,
        other => other,
    };
    let work = match kind.work {
        Work::Rounds(bench, order) => Work::Rounds(unused(bench), order),
        Work::Replay => Work::Replay,
    };
    Kind { work, ..kind.clone() }
}

/// A line from samples that are each of one page and its part of a use.
fn line(
    subject: &Subject,
    pages: &[Sample],
    unused: &[Sample],
    base: &[Sample],
    unzeroed: Option<&Vec<Sample>>,
) -> Line {
    let Subject { name, kind, order } = subject;
    let pages_of_use = float(subject.pages()) / float(subject.uses());
    let per_page = |of: fn(&Sample) -> f64| typical(pages, of);
    let per_use = |of: fn(&Sample) -> f64| typical(pages, of) * pages_of_use;
    let split = pages.iter().any(|s| s.times.pages_in_gate + s.times.uses_in_gate > 0.0)
        || kind.is_mapped();
    let plain = unused.first().map_or(Counts::default(), |sample| sample.counts);
    let used = pages.first().map_or(Counts::default(), |sample| sample.counts);
    Line {
        name: name.clone(),
        policy: kind.policy,
        order: *order,
        seal: kind.seal,
        page_ticks: per_page(|s| s.times.pages),
        page_gate_ticks: split.then(|| per_page(|s| s.times.pages_in_gate)),
        use_ticks: per_use(|s| s.times.uses),
        use_gate_ticks: split.then(|| per_use(|s| s.times.uses_in_gate)),
        audit_ns: per_page(|s| s.times.audit),
        ratios: Ratios::of(pages, base, split),
        unzeroed_ratios: unzeroed.map(|base| Ratios::of(pages, base, split)),
        per_page: plain,
        per_use: (used - plain).times(pages_of_use),
    }
}

impl Ratios {
    /// Where the guest cannot tell gate calls apart (not `split`), all ticks look like its own.
    fn of(pages: &[Sample], base: &[Sample], split: bool) -> Self {
        let multiple = |of: fn(&Sample) -> f64| typical_multiple(pages, base, of, of);
        Self {
            cycle: multiple(|s| s.times.guest()),
            cycle_without_gate: multiple(|s| s.times.guest() - s.times.in_gate()).filter(|_| split),
            page: multiple(|s| s.times.pages),
            page_without_gate: multiple(|s| s.times.pages - s.times.pages_in_gate)
                .filter(|_| split),
        }
    }
}

/// Lines as a table: times as multiples of the first line's, then counts.
pub(super) fn table(lines: &[Line]) -> String {
    let mut rows = vec![["", "order", "cycle", "own part"].map(str::to_owned).to_vec()];
    let unzeroed = lines.iter().any(|line| line.unzeroed_ratios.is_some());
    if unzeroed {
        rows[0].extend(["of unzeroed", "own part"].map(str::to_owned));
    }
    let rest = ["page alone", "own part", "page, ticks", "use, ticks", "in gate", "audit"];
    rows[0].extend(rest.map(str::to_owned));
    for line in lines {
        let share = |part: Option<f64>, whole: f64| match part {
            Some(part) if whole > 0.0 => format!("{:.0} %", 100.0 * part / whole),
            _ => "-".into(),
        };
        let uses = 1.0 / float(1 << line.order);
        let whole = line.page_ticks + line.use_ticks * uses;
        let gate = line.page_gate_ticks.zip(line.use_gate_ticks);
        let mut row = vec![line.name.clone(), line.order.to_string()];
        row.extend([line.ratios.cycle, line.ratios.cycle_without_gate].map(times));
        if unzeroed {
            let ratios = line.unzeroed_ratios;
            row.push(times(ratios.and_then(|ratios| ratios.cycle)));
            row.push(times(ratios.and_then(|ratios| ratios.cycle_without_gate)));
        }
        row.extend([line.ratios.page, line.ratios.page_without_gate].map(times));
        row.extend([line.page_ticks, line.use_ticks].map(|ticks| format!("{ticks:.0}")));
        row.push(share(gate.map(|(page, used)| page + used * uses), whole));
        row.push(format!("{:.0} ns", line.audit_ns));
        rows.push(row);
    }
    let mut counts = vec![counts_head("")];
    for line in lines {
        counts.push(counts_row(&format!("{}, a page", line.name), &line.per_page));
        counts.push(counts_row("  a use adds", &line.per_use));
    }
    format!("{}\n{}", columns(&rows), columns(&counts))
}

/// Head of a table of counts.
pub(super) fn counts_head(what: &str) -> Vec<String> {
    let head = [
        "gate calls",
        "drains",
        "seals",
        "opens",
        "releases",
        "shootdowns",
        "local flushes",
        "flips out",
        "back",
    ];
    [what].iter().chain(&head).map(|text| (*text).to_owned()).collect()
}

/// Row of a table of counts.
pub(super) fn counts_row(name: &str, counts: &Counts) -> Vec<String> {
    let Counts { gate_calls, ring_drains, seals, opens, releases, .. } = *counts;
    let Counts { shootdowns, local_flushes, flips_out, flips_back, .. } = *counts;
    let numbers = [gate_calls, ring_drains, seals, opens, releases];
    let numbers = numbers.into_iter().chain([shootdowns, local_flushes, flips_out, flips_back]);
    let numbers = numbers.map(|number| format!("{number:.4}"));
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

    fn secret(order: u8) -> Subject {
        let work = Work::Rounds(Bench::Secret, order);
        Subject::new("ours", Kind::new(work, Policy::Pool { kib: 4096 }))
    }

    #[test]
    fn a_line_is_per_page_and_per_use_and_multiples_of_two_others() {
        // Order 4: a use for every 16 pages.
        let pages = [sample(10.0, 5.0, 6.25, 2.0)];
        let unused = [sample(0.0, 0.0, 0.0, 1.0)];
        let base = [sample(2.0, 0.0, 2.0625, 0.0)];
        let unzeroed = vec![sample(1.0, 0.0, 0.625, 0.0)];
        let line = line(&secret(4), &pages, &unused, &base, Some(&unzeroed));
        assert_eq!((line.page_ticks, line.use_ticks), (10.0, 100.0));
        assert_eq!((line.page_gate_ticks, line.ratios.page), (Some(5.0), Some(5.0)));
        assert_eq!((line.ratios.page_without_gate, line.ratios.cycle), (Some(2.5), Some(4.0)));
        let unzeroed = line.unzeroed_ratios.unwrap();
        assert_eq!((unzeroed.cycle, unzeroed.page_without_gate), (Some(10.0), Some(5.0)));
        assert_eq!((line.per_page.gate_calls, line.per_use.gate_calls), (1.0, 16.0));
    }

    #[test]
    fn the_ratio_of_a_cycle_counts_first_write_and_use() {
        // Pages cost the same; what differs is the use.
        let (pages, base) = ([sample(10.0, 0.0, 30.0, 0.0)], [sample(10.0, 0.0, 0.0, 0.0)]);
        let ratios = Ratios::of(&pages, &base, true);
        assert_eq!((ratios.page, ratios.cycle), (Some(1.0), Some(4.0)));
    }

    #[test]
    fn a_guest_that_cannot_tell_gate_calls_apart_has_no_part_of_its_own() {
        let pages = [sample(10.0, 0.0, 10.0, 1.0)];
        let line = line(&secret(0), &pages, &pages, &pages, None);
        assert_eq!((line.page_gate_ticks, line.ratios.cycle_without_gate), (None, None));
        assert_eq!(line.ratios.page, Some(1.0));
    }

    #[test]
    fn only_uses_of_secret_pages_are_left_out() {
        let unused = |bench| {
            let kind = Kind::new(Work::Rounds(bench, 0), Policy::Plain);
            without_use(&kind).work
        };
        assert_eq!(unused(Bench::SecretDry), Work::Rounds(Bench::SecretDryUnused, 0));
        assert_eq!(unused(Bench::InPlace), Work::Rounds(Bench::InPlaceUnused, 0));
        assert_eq!(unused(Bench::Mapped), Work::Rounds(Bench::Mapped, 0));
    }

    #[test]
    fn many_small_allocations_that_stand_for_a_large_one_are_one_use() {
        let subject = secret(0).in_place_of(9);
        assert_eq!((subject.pages(), subject.uses()), (512, 1));
        assert_eq!((secret(0).uses(), secret(10).pages(), secret(10).uses()), (512, 1024, 1));
    }

    #[test]
    fn a_table_has_times_and_counts_of_every_line() {
        let pages = [sample(10.0, 5.0, 10.0, 2.5)];
        let unused = [sample(0.0, 0.0, 0.0, 0.5)];
        let line = line(&secret(0), &pages, &unused, &pages, Some(&pages.to_vec()));
        let text = table(std::slice::from_ref(&line));
        for part in ["ours ", "1.00", "25 %", "ours, a page", "a use adds", "2.0000", "unzeroed"] {
            assert!(text.contains(part), "{part} is missing in\n{text}");
        }
        let text = table(&[Line { unzeroed_ratios: None, ..line }]);
        assert!(!text.contains("unzeroed"), "{text}");
    }
}
