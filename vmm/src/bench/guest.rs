//! Guests that are measured: which there are, how one is run, and how several are compared.

use super::BenchError;
use super::sample::{Sample, float};
use crate::config::{Config, MachineKind, Mediation, Overrides, Seal};
use crate::run::{End, Host, Machine, Plan};
use crate::sim::Schedule;
use crate::trace::{self, Secret, Selection};
use lacuna_abi::workload::{Bench, Program, SLOT_BYTES};
use std::num::NonZeroU8;
use std::ops::ControlFlow;
use std::path::Path;

/// The recording that replays take: the one of the quickstart.
const RECORDING: &[u8] = include_bytes!("../../../configs/data/compile.csv.gz");

/// What a guest does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Work {
    /// The program `bench`, with allocations of this order.
    Rounds(Bench, u8),
    /// The recording, a round for each of its events.
    Replay,
}

/// A kind of guest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Kind {
    pub(super) work: Work,
    pub(super) policy: Policy,
    /// Whether secret frames are closed.
    pub(super) seal: bool,
    pub(super) cpus: u8,
    pub(super) memory_mib: u64,
    /// How the host learns of table writes.
    pub(super) mediation: Mediation,
}

/// How the guest's allocator behaves.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// A pool of zeroed pages, refilled many pageblocks at a time when three quarters are used up;
    /// freed pages are scrubbed together.
    Pool {
        /// Size of the pool in KiB.
        kib: u64,
    },
    /// One pageblock at a time leaves the direct map, and pages are zeroed when they are handed out.
    PerBlock,
    /// Each allocation leaves the direct map by itself and comes back by itself; orders from 9 on,
    /// which cannot, take whole pageblocks.
    InPlace,
    /// Freed mapped pages are zeroed.
    ZeroOnFree,
    /// Freed mapped pages stay as they are.
    Plain,
}

impl Policy {
    /// Name in tables.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Pool { .. } => "zeroed ahead",
            Self::PerBlock => "per block",
            Self::InPlace => "page by page",
            Self::ZeroOnFree => "mapped, zeroed on free",
            Self::Plain => "mapped",
        }
    }

    /// The sections of a configuration that say so.
    fn sections(self) -> String {
        let (prezero, allocator) = match self {
            Self::Pool { kib } => {
                (true, format!("pool_low_kib = {}\npool_high_kib = {kib}", kib / 4))
            }
            Self::PerBlock => (false, "scrub = false\npool_low_kib = 0\npool_high_kib = 0".into()),
            Self::InPlace => (true, "pool_low_kib = 0\npool_high_kib = 0".into()),
            Self::ZeroOnFree => (true, "on_free = \"zero\"".into()),
            Self::Plain => (true, "on_free = \"leave\"".into()),
        };
        format!("prezero = {prezero}\n[allocator]\n{allocator}\n")
    }
}

/// How often guests are run, and for how long.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Effort {
    /// Rounds of a short run.
    pub(super) warm: u64,
    /// Rounds that a long run has more.
    pub(super) rounds: u64,
    /// Pairs of a short and a long run of each kind; the median counts.
    pub(super) pairs: usize,
}

/// Runs guests on one kind of machine.
pub struct Lab {
    /// The machine.
    pub machine: MachineKind,
    /// How simulated CPUs take turns.
    pub(super) schedule: Schedule,
    /// Runs are as short as they can be: their counts mean something, their times little.
    pub quick: bool,
}

impl Lab {
    /// A lab with machines of this kind.
    #[must_use]
    pub const fn new(machine: MachineKind, quick: bool) -> Self {
        Self { machine, schedule: Schedule::Seeded, quick }
    }

    /// What is worth doing on these machines, which are simulated or not.
    pub(super) fn effort(&self, sim: Effort, kvm: Effort) -> Effort {
        match (self.quick, self.is_sim()) {
            (true, _) => Effort { warm: 1, rounds: 1, pairs: 1 },
            (false, true) => sim,
            (false, false) => kvm,
        }
    }

    /// Whether the machines are simulated.
    pub(super) fn is_sim(&self) -> bool {
        self.machine == MachineKind::Sim
    }

    /// What a round costs in guests of these kinds: for each kind as many samples as there are pairs
    /// of runs. The kinds take turns, so that what disturbs the host disturbs all of them.
    ///
    /// # Errors
    /// [`BenchError`].
    pub(super) fn compare(
        &self,
        kinds: &[Kind],
        effort: Effort,
    ) -> Result<Vec<Vec<Sample>>, BenchError> {
        let mut samples = vec![Vec::new(); kinds.len()];
        let Effort { warm, rounds, pairs } = effort;
        for _ in 0..pairs {
            for (kind, samples) in kinds.iter().zip(&mut samples) {
                let short = self.run(kind, warm)?;
                let long = self.run(kind, warm + rounds)?;
                let mut sample = long.per_round(&short, float(rounds));
                if self.quick {
                    // Of so short runs the difference is chance.
                    sample.times = long.times(1.0 / float(warm + rounds)).times;
                }
                samples.push(sample);
            }
        }
        Ok(samples)
    }

    /// One run of so many rounds. Everything is checked: a guest with a finding is not measured.
    ///
    /// # Errors
    /// [`BenchError`].
    pub(super) fn run(&self, kind: &Kind, rounds: u64) -> Result<Sample, BenchError> {
        let plan = plan(kind, rounds)?;
        let host = match self.machine {
            MachineKind::Kvm => Host::of(MachineKind::Kvm)?,
            MachineKind::Sim => Host::Sim(self.schedule),
        };
        let outcome =
            Machine::open(host, plan, Vec::new())?.start()?.wait(|_| ControlFlow::Continue(()));
        outcome.with_gate(|gate| {
            let result = gate.result();
            let End::Exit(0, guest) = &outcome.end else {
                return Err(BenchError::NotMeasured(kind.name(), format!("{:?}", outcome.end)));
            };
            let wrong = result.inconclusive.first().cloned();
            let finding = result.findings.first().map(|finding| finding.detail.clone());
            if let Some(why) = finding.or(wrong) {
                return Err(BenchError::NotMeasured(kind.name(), why));
            }
            let (host, running, audit) = (gate.counters(), outcome.running, gate.audit_time());
            Ok(Sample::of(&host, guest, running, audit))
        })
    }
}

impl Kind {
    /// A guest with one CPU and a seal.
    pub(super) const fn new(work: Work, policy: Policy) -> Self {
        let mediation = Mediation::Trace;
        Self { work, policy, seal: true, cpus: 1, memory_mib: 128, mediation }
    }

    /// Whether its pages are in the direct map: it makes no gate calls.
    pub(super) const fn is_mapped(&self) -> bool {
        matches!(self.work, Work::Rounds(Bench::Mapped | Bench::MappedZero, _))
    }

    /// What it does, for messages.
    fn name(&self) -> String {
        format!("{:?} with {:?}", self.work, self.policy)
    }
}

/// The plan of a guest of this kind.
fn plan(kind: &Kind, rounds: u64) -> Result<Plan, BenchError> {
    let (bench, order) = match kind.work {
        Work::Rounds(bench, order) => (bench, order),
        Work::Replay => (Bench::Secret, 0),
    };
    // One complete check, at the end: they are not what is measured.
    let text = format!(
        "[workload]\nprogram = \"bench\"\nbench = \"{}\"\norder = {order}\nrounds = {rounds}\n\
         [audit]\nquiesce_every = {}\n[limits]\ntimeout_s = 600\n\
         [guest]\nmemory_mib = {}\nvcpus = {}\n{}",
        bench.name(),
        i64::MAX,
        kind.memory_mib,
        kind.cpus,
        kind.policy.sections(),
    );
    let seal = if kind.seal { Seal::Auto } else { Seal::Off };
    let mediate = Some(kind.mediation);
    let overrides = Overrides { seal: Some(seal), mediate, ..Overrides::default() };
    let config = Config::from_text(Path::new("bench"), &text, &overrides)?;
    let (mut plan, _) = Plan::new(&config)?;
    if kind.work == Work::Replay {
        let cpus = NonZeroU8::new(kind.cpus).unwrap_or(NonZeroU8::MIN);
        let in_place = if kind.policy == Policy::InPlace { 100 } else { 0 };
        let selection = Selection { events: Some(rounds), secret: Secret::User, in_place, cpus };
        let replay = trace::parse(RECORDING, &selection).map_err(crate::run::PlanError::from)?;
        plan.program = Program::Replay;
        plan.args = [replay.ops.len() as u64, replay.slots.into(), 0];
        let words = replay.ops.iter().flat_map(|op| op.to_words());
        plan.input = words.flat_map(u64::to_le_bytes).collect();
        plan.scratch = u64::from(replay.slots) * SLOT_BYTES;
    }
    Ok(plan)
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_abi::boot::{FEATURE_PREZERO, FEATURE_SCRUB, FEATURE_ZERO_ON_FREE};

    fn plan_of(policy: Policy) -> Plan {
        plan(&Kind::new(Work::Rounds(Bench::Secret, 4), policy), 3).unwrap()
    }

    #[test]
    fn a_policy_reaches_the_guest() {
        let pool = plan_of(Policy::Pool { kib: 8192 });
        assert_eq!(pool.features & FEATURE_PREZERO, FEATURE_PREZERO);
        assert_eq!(pool.marks[1..], [512, 2048]);
        let per_block = plan_of(Policy::PerBlock);
        assert_eq!(per_block.features & (FEATURE_PREZERO | FEATURE_SCRUB), 0);
        assert_eq!(per_block.marks[1..], [0, 0]);
        assert_ne!(plan_of(Policy::ZeroOnFree).features & FEATURE_ZERO_ON_FREE, 0);
        assert_eq!(plan_of(Policy::Plain).features & FEATURE_ZERO_ON_FREE, 0);
    }

    #[test]
    fn a_guest_is_given_its_rounds_or_so_many_events() {
        let rounds = plan_of(Policy::Plain);
        assert_eq!((rounds.program, rounds.args), (Program::Bench, [Bench::Secret as u64, 4, 3]));
        let replay = plan(&Kind::new(Work::Replay, Policy::PerBlock), 50).unwrap();
        assert_eq!((replay.program, replay.args[0]), (Program::Replay, 50));
        assert_eq!(replay.input.len(), 50 * 16);
    }
}
