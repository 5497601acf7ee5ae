//! `bench alloc`: what a secret page costs over its whole cycle, against a mapped page, and under
//! several policies.

use super::guest::{Effort, Kind, Lab, Policy, Work};
use super::line::{self, Line, counts_head, counts_row};
use super::sample::{Counts, typical, typical_multiple};
use super::speed::{self, Speed};
use super::{BenchError, Goal, columns, times};
use lacuna_abi::workload::Bench;
use serde::Serialize;

/// Orders at which policies are compared.
const ORDERS: [u8; 3] = [0, 4, 9];

/// Order of a pageblock, from which on nothing is converted in place.
const BLOCK_ORDER: u8 = 9;

/// Results of the bench.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Alloc {
    /// Kind of the machine.
    pub machine: &'static str,
    /// Pages of order 0: mapped ones, and secret ones with and without a seal.
    pub pages: Vec<Line>,
    /// Events for 512 secret pages that are fresh each time: flip, zeroing and hand-out.
    pub refill: Counts,
    /// Policies side by side, for several orders.
    pub policies: Vec<Line>,
    /// Policies side by side, replaying a recording of a kernel.
    pub replays: Vec<Replay>,
    /// How fast simulated CPUs allocate and flip; empty on other machines.
    pub speed: Vec<Speed>,
    /// What was aimed at.
    pub goals: Vec<Goal>,
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
    // A round takes a pageblock, so that the pool is never used up.
    let pool = Policy::Pool { kib: 4 << 10 };
    let effort = |order: u8| match (lab.is_sim(), order) {
        // Short runs, so that the median is of runs that nothing disturbed.
        (true, 0) => Effort { warm: 2, rounds: 12, pairs: 15 },
        (true, _) => Effort { warm: 8, rounds: 128, pairs: 3 },
        (false, 0) => Effort { warm: 1, rounds: 1, pairs: 3 },
        (false, _) => Effort { warm: 1, rounds: 2, pairs: 2 },
    };
    let kind = |bench, order, policy| Kind::new(Work::Rounds(bench, order), policy);
    let ours = kind(Bench::Secret, 0, pool);
    let pages = line::lines(
        lab,
        &[
            ("mapped, zeroed on free", kind(Bench::MappedZero, 0, Policy::ZeroOnFree)),
            ("mapped, not zeroed", kind(Bench::Mapped, 0, Policy::Plain)),
            ("secret, zeroed", ours.clone()),
            ("secret, zeroed, seal off", Kind { seal: false, ..ours }),
        ],
        effort(0),
    )?;
    // Whole refills, each of twelve pageblocks of sixteen, or of two on KVM, where they take long.
    let (kib, warm, rounds) = if lab.is_sim() { (32 << 10, 25, 96) } else { (4 << 10, 4, 8) };
    let fresh = Policy::Pool { kib };
    let fresh = Kind { memory_mib: 512, ..kind(Bench::SecretKept, 0, fresh) };
    let refill = lab.compare(&[fresh], Effort { warm, rounds, pairs: 1 })?;
    let refill = refill[0].first().map_or(Counts::default(), |sample| sample.counts);
    let mut policies = Vec::new();
    for order in ORDERS {
        let mut named = vec![
            (pool.name(), kind(Bench::Secret, order, pool)),
            (Policy::PerBlock.name(), kind(Bench::Secret, order, Policy::PerBlock)),
        ];
        if order < BLOCK_ORDER {
            named.push((Policy::InPlace.name(), kind(Bench::InPlace, order, Policy::InPlace)));
        }
        policies.extend(line::lines(lab, &named, effort(order))?);
    }
    let replays = replays(lab, pool)?;
    let speed = if lab.is_sim() { speed::speed()? } else { Vec::new() };
    let goals = goals(lab, &pages, &refill, &speed);
    let machine = lab.machine.name();
    Ok(Alloc { machine, pages, refill, policies, replays, speed, goals })
}

fn replays(lab: &Lab, pool: Policy) -> Result<Vec<Replay>, BenchError> {
    let effort = if lab.is_sim() {
        Effort { warm: 2000, rounds: 8000, pairs: 3 }
    } else {
        Effort { warm: 100, rounds: 300, pairs: 1 }
    };
    let kinds =
        [pool, Policy::PerBlock, Policy::InPlace].map(|policy| Kind::new(Work::Replay, policy));
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

fn goals(lab: &Lab, pages: &[Line], refill: &Counts, speed: &[Speed]) -> Vec<Goal> {
    let mut goals = vec![
        Goal::at_most("shootdowns for 512 fresh secret pages", 1.0, Some(refill.shootdowns)),
        Goal::at_most("local flushes for 512 fresh secret pages", 1.0, Some(refill.local_flushes)),
        Goal::at_most("gate calls for 512 fresh secret pages", 2.0, Some(refill.gate_calls)),
    ];
    if lab.is_sim() {
        let secret = pages.iter().find(|line| line.name == "secret, zeroed");
        let own = secret.and_then(|line| line.page_guest_ratio);
        let all = secret.and_then(|line| line.page_ratio);
        goals.extend([
            Goal::at_most("secret page against one zeroed on free, without gate calls", 1.15, own),
            Goal::at_most("secret page against one zeroed on free, with gate calls", 1.15, all),
        ]);
        let hits = speed.iter().find(|speed| speed.work == "pool hits" && speed.cpus == 1);
        let wall = hits.and_then(|speed| speed.per_second);
        let busy = hits.and_then(|speed| speed.per_cpu_second);
        goals.extend([
            Goal::at_least("operations a second, audit on", 5e6, wall),
            Goal::at_least("operations a second of processor time, audit on", 5e6, busy),
        ]);
    }
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
        let fresh = [counts_head(""), counts_row("512 fresh secret pages", &self.refill)];
        let mut text = format!(
            "Pages on {}: costs in steady state, as multiples of the first line\n\n{}\n\
             Refill: flip, zeroing and hand-out of pages that are never freed\n\n{}\n\
             Policies, as multiples of the first line of each order\n\n",
            self.machine,
            line::table(&self.pages),
            columns(&fresh),
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
