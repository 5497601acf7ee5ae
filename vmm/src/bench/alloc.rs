//! `bench alloc`: what a secret page costs over its whole cycle, against mapped pages, and under
//! several policies.

use super::guest::{Effort, Kind, Lab, Policy, Work};
use super::line::{self, Line, Subject, counts_head, counts_row};
use super::sample::{Counts, float, multiple, typical, typical_multiple};
use super::speed::{self, Speed};
use super::{BenchError, Goal, columns, times};
use lacuna_abi::addr::BLOCK_FRAMES;
use lacuna_abi::workload::{BENCH_DRY_BLOCKS, Bench};
use serde::Serialize;

/// Orders at which policies are compared.
const ORDERS: [u8; 3] = [0, 4, 9];

/// Order of a pageblock, from which on nothing is converted in place.
const BLOCK_ORDER: u8 = 9;

/// KiB of a pageblock.
const BLOCK_KIB: u64 = 2 << 10;

/// The pool that serves all of a round of [`Bench::Secret`], and is filled at once in one of
/// [`Bench::SecretDry`].
const POOL: Policy = Policy::Pool { kib: BENCH_DRY_BLOCKS * BLOCK_KIB };

/// Line of [`Alloc::pages`] with mapped pages that nobody zeroes.
const UNZEROED: usize = 1;
/// Line of [`Alloc::pages`] with secret pages that were in the pool.
const POOLED: usize = 2;
/// Line of [`Alloc::pages`] with secret pages of pageblocks that flip for them.
const DRY: usize = 3;

/// Results of the bench.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Alloc {
    /// Kind of the machine.
    pub machine: &'static str,
    /// Pages of order 0: mapped ones, and secret ones with and, unless it is to be quick, without a
    /// seal.
    pub pages: Vec<Line>,
    /// Secret pages that are fresh each time.
    pub refill: Refill,
    /// Policies side by side, for several orders.
    pub policies: Vec<Line>,
    /// Policies side by side, replaying a recording of a kernel.
    pub replays: Vec<Replay>,
    /// How fast simulated CPUs allocate and flip; empty on other machines.
    pub speed: Vec<Speed>,
    /// What was aimed at.
    pub goals: Vec<Goal>,
}

/// What fresh secret pages cost until they are handed out: flip, zeroing and hand-out of pages that
/// are never freed, so that each comes from a pageblock that flips for it.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Refill {
    /// Ticks of the guest's clock for a page.
    pub page_ticks: f64,
    /// Part of them that went by in gate calls; `null` where the guest cannot tell.
    pub page_gate_ticks: Option<f64>,
    /// `page_ticks` as a multiple of the cycle of a mapped page that is zeroed on free.
    pub ratio: Option<f64>,
    /// Events for 512 pages that were flipped, zeroed and handed out.
    pub per_512_pages: Counts,
    /// What a use of one of them adds, the scrub that it makes necessary included.
    pub per_use: Counts,
}

/// A recording under one policy.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Replay {
    /// How the allocator behaves.
    pub policy: Policy,
    /// Nanoseconds for an event of the recording.
    pub event_ns: f64,
    /// `event_ns` as a multiple of those of the first policy.
    pub ratio: Option<f64>,
    /// Events on the host's side for each event of the recording.
    pub per_event: Counts,
}

/// Measures on the machines of `lab`.
///
/// # Errors
/// [`BenchError`].
pub fn alloc(lab: &Lab) -> Result<Alloc, BenchError> {
    let pages = pages(lab)?;
    let refill = refill(lab, &pages)?;
    let mut policies = Vec::new();
    for order in ORDERS {
        policies.extend(line::lines(lab, &subjects(order), None, effort(lab, order))?);
    }
    let replays = replays(lab)?;
    let speed = if lab.is_sim() { speed::speed(lab.quick)? } else { Vec::new() };
    let goals = goals(lab, &pages, &refill, &speed);
    let machine = lab.machine.name();
    Ok(Alloc { machine, pages, refill, policies, replays, speed, goals })
}

fn effort(lab: &Lab, order: u8) -> Effort {
    if order == 0 {
        // Short runs, so that the median is of runs that nothing disturbed.
        let sim = Effort { warm: 2, rounds: 12, pairs: 15 };
        lab.effort(sim, Effort { warm: 1, rounds: 1, pairs: 3 })
    } else {
        let sim = Effort { warm: 8, rounds: 64, pairs: 5 };
        lab.effort(sim, Effort { warm: 1, rounds: 2, pairs: 3 })
    }
}

const fn kind(bench: Bench, order: u8, policy: Policy) -> Kind {
    Kind::new(Work::Rounds(bench, order), policy)
}

fn pages(lab: &Lab) -> Result<Vec<Line>, BenchError> {
    let pooled = kind(Bench::Secret, 0, POOL);
    let dry = kind(Bench::SecretDry, 0, POOL);
    let open = |kind: &Kind| Kind { seal: false, ..kind.clone() };
    let subjects = [
        ("mapped, zeroed on free", kind(Bench::MappedZero, 0, Policy::ZeroOnFree)),
        ("mapped, not zeroed", kind(Bench::Mapped, 0, Policy::Plain)),
        ("secret, pool hit", pooled.clone()),
        ("secret, pool dry", dry.clone()),
        ("secret, pool hit, seal off", open(&pooled)),
        ("secret, pool dry, seal off", open(&dry)),
    ]
    .map(|(name, kind)| Subject::new(name, kind));
    // Without a seal the audit has ever more to remember: these take longer than all others.
    let subjects = if lab.quick { &subjects[..=DRY] } else { &subjects[..] };
    line::lines(lab, subjects, Some(UNZEROED), effort(lab, 0))
}

/// Eight refills, each of thirteen pageblocks of sixteen: one is due when less than a quarter of the
/// pool is left. On KVM, where they take long, of two of two.
fn refill(lab: &Lab, pages: &[Line]) -> Result<Refill, BenchError> {
    let pairs = if lab.quick { 1 } else { 3 };
    let (kib, warm, rounds) =
        if lab.is_sim() && !lab.quick { (32 << 10, 26, 104) } else { (4 << 10, 4, 8) };
    let fresh = kind(Bench::SecretKept, 0, Policy::Pool { kib });
    let fresh = Kind { memory_mib: 512, ..fresh };
    let samples = lab.compare(&[fresh], Effort { warm, rounds, pairs })?;
    let samples = samples.first().map_or(&[][..], Vec::as_slice);
    let page_ticks = typical(samples, |s| s.times.pages) / float(BLOCK_FRAMES);
    let gate = typical(samples, |s| s.times.pages_in_gate) / float(BLOCK_FRAMES);
    let base = pages.first().map_or(0.0, |line| line.page_ticks + line.use_ticks);
    Ok(Refill {
        page_ticks,
        page_gate_ticks: (gate > 0.0).then_some(gate),
        ratio: multiple(page_ticks, base),
        per_512_pages: samples.first().map_or(Counts::default(), |sample| per_flip(sample.counts)),
        per_use: pages.get(POOLED).map_or(Counts::default(), |line| line.per_use),
    })
}

/// What a pageblock cost that was flipped and zeroed, however many pages were handed out meanwhile: a
/// refill that falls just into a run, or just out of it, changes nothing.
fn per_flip(counts: Counts) -> Counts {
    counts.times(1.0 / counts.flips_out.max(1.0))
}

/// What is compared at this order: first a whole cycle with flips, ours and as the series has it;
/// page by page; then both with pages that the pool has.
fn subjects(order: u8) -> Vec<Subject> {
    let (ours, series) = (POOL.name(), Policy::PerBlock.name());
    let secret = |name: String, bench, policy| Subject::new(&name, kind(bench, order, policy));
    let in_place = |order| kind(Bench::InPlace, order, Policy::InPlace);
    vec![
        secret(format!("{ours}, pool dry"), Bench::SecretDry, POOL),
        secret(format!("{series}, pool dry"), Bench::SecretDry, Policy::PerBlock),
        if order < BLOCK_ORDER {
            Subject::new(Policy::InPlace.name(), in_place(order))
        } else {
            let name = format!("{}, 512 of order 0", Policy::InPlace.name());
            Subject::new(&name, in_place(0)).in_place_of(order)
        },
        secret(format!("{ours}, pool hit"), Bench::Secret, POOL),
        secret(format!("{series}, pool hit"), Bench::Secret, Policy::PerBlock),
    ]
}

fn replays(lab: &Lab) -> Result<Vec<Replay>, BenchError> {
    let effort = if lab.quick {
        Effort { warm: 50, rounds: 100, pairs: 1 }
    } else {
        lab.effort(
            Effort { warm: 2000, rounds: 8000, pairs: 3 },
            Effort { warm: 100, rounds: 300, pairs: 3 },
        )
    };
    let kinds =
        [POOL, Policy::PerBlock, Policy::InPlace].map(|policy| Kind::new(Work::Replay, policy));
    let samples = lab.compare(&kinds, effort)?;
    let replay = |(kind, rounds): (&Kind, &Vec<_>)| Replay {
        policy: kind.policy,
        event_ns: typical(rounds, |sample| sample.times.running),
        ratio: typical_multiple(
            rounds,
            &samples[0],
            |sample| sample.times.running,
            |sample| sample.times.running,
        ),
        per_event: rounds.first().map_or(Counts::default(), |sample| sample.counts),
    };
    Ok(kinds.iter().zip(&samples).map(replay).collect())
}

fn goals(lab: &Lab, pages: &[Line], refill: &Refill, speed: &[Speed]) -> Vec<Goal> {
    let fresh = &refill.per_512_pages;
    let mut goals = vec![
        Goal::at_most("shootdowns for 512 fresh secret pages", 1.0, Some(fresh.shootdowns)),
        Goal::at_most("local flushes for 512 fresh secret pages", 1.0, Some(fresh.local_flushes)),
        Goal::at_most("gate calls for 512 fresh secret pages", 2.0, Some(fresh.gate_calls)),
    ];
    if !lab.is_sim() {
        return goals;
    }
    // Of the whole cycle: first write and use are part of what a page costs.
    for (index, zeroed, unzeroed) in [
        (POOLED, "cycle, pool hit, to one zeroed on free", "cycle, pool hit, to one not zeroed"),
        (DRY, "cycle, pool dry, to one zeroed on free", "cycle, pool dry, to one not zeroed"),
    ] {
        let Some(line) = pages.get(index) else { continue };
        for (what, ratios) in [(zeroed, Some(line.ratios)), (unzeroed, line.unzeroed_ratios)] {
            let own = ratios.and_then(|ratios| ratios.cycle_without_gate);
            let all = ratios.and_then(|ratios| ratios.cycle);
            goals.push(Goal::at_most(what, 1.15, all).beside("without gate calls", own));
        }
    }
    let hits = speed.iter().find(|speed| speed.work == "pool hits" && speed.cpus == 1);
    let wall = hits.and_then(|speed| speed.per_second);
    let busy = hits.and_then(|speed| speed.per_cpu_second);
    let operations = Goal::at_least("operations a second, audit on", 5e6, wall);
    goals.push(operations.beside("a second of processor time", busy));
    goals
}

impl Alloc {
    /// The results as tables.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut rows = vec![["policy", "ns an event", "ratio"].map(str::to_owned).to_vec()];
        let mut counts = vec![counts_head("for each event")];
        counts.extend(self.replays.iter().map(|replay| {
            rows.push(vec![
                replay.policy.name().to_owned(),
                format!("{:.0}", replay.event_ns),
                times(replay.ratio),
            ]);
            counts_row(replay.policy.name(), &replay.per_event)
        }));
        let mut text = format!(
            "Pages on {}: costs of the whole cycle in steady state, as multiples of the first line \
             and of unzeroed pages. \"Own part\" is without gate calls\n\n{}\n{}\n\
             Policies, as multiples of the first line of each order\n\n",
            self.machine,
            line::table(&self.pages),
            self.refill.to_text(),
        );
        for group in self.policies.chunk_by(|a, b| a.order == b.order) {
            text += &line::table(group);
            text.push('\n');
        }
        text += &format!("Replay of a recording\n\n{}\n{}\n", columns(&rows), columns(&counts));
        if !self.speed.is_empty() {
            text += &format!("Speed, audit on\n\n{}\n", speed::table(&self.speed));
        }
        text + &Goal::table(&self.goals)
    }
}

impl Refill {
    fn to_text(&self) -> String {
        let gate = self.page_gate_ticks.and_then(|gate| multiple(gate, self.page_ticks));
        let rows = [
            ["", "page, ticks", "in gate", "of a mapped page's cycle"].map(str::to_owned).to_vec(),
            vec![
                "fresh secret page".to_owned(),
                format!("{:.0}", self.page_ticks),
                gate.map_or_else(|| "-".into(), |gate| format!("{:.0} %", 100.0 * gate)),
                times(self.ratio),
            ],
        ];
        let counts = [
            counts_head(""),
            counts_row("512 fresh secret pages", &self.per_512_pages),
            counts_row("  a use adds", &self.per_use),
        ];
        format!(
            "Refill: flip, zeroing and hand-out of pages that are never freed\n\n{}\n{}",
            columns(&rows),
            columns(&counts)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refill_is_counted_by_the_pageblocks_that_flipped_for_it() {
        // Thirteen flips in the time of twelve pageblocks' worth of pages.
        let counts = |flips| Counts {
            flips_out: flips,
            local_flushes: flips,
            shootdowns: 1.0,
            ..Counts::default()
        };
        assert_eq!(per_flip(counts(13.0)).local_flushes, 1.0);
        assert_eq!(per_flip(counts(4.0)).shootdowns, 0.25);
        assert_eq!(per_flip(Counts::default()), Counts::default());
    }

    #[test]
    fn page_by_page_stands_beside_the_others_at_every_order() {
        for order in ORDERS {
            let subjects = subjects(order);
            assert_eq!(subjects.len(), 5);
            assert!(format!("{subjects:?}").contains("InPlace"), "order {order}");
        }
        assert!(format!("{:?}", subjects(9)).contains("512 of order 0"));
    }
}
