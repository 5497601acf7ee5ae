//! `second-stage-open` by real accesses, at a quiesce point: draws frames, has them touched, hands
//! the audit what came of it.

use super::{Gate, GateFailure, Prober};
use crate::audit::{ProbeTally, Touched};
use crate::second_stage::{Off, SecondStage};
use crate::sim::Random;

/// Which of the sources of a seed the draws come from: one that no CPU has.
const STREAM: u64 = 0x0070_726f_6265;

/// What the gate touches frames with.
pub(super) struct Probes {
    seed: u64,
    random: Random,
    /// Touches at each quiesce point.
    each: u64,
    prober: Option<Box<dyn Prober>>,
    why_none: Option<String>,
}

impl Probes {
    pub(super) fn new(each: u64, seed: u64) -> Self {
        let random = Random::new(seed, STREAM);
        Self { seed, random, each, prober: None, why_none: None }
    }
}

/// What a report says of touches.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ProbeSummary {
    /// What the draws follow from.
    pub seed: u64,
    /// Touches at each quiesce point.
    pub each: u64,
    /// What was touched.
    pub tally: ProbeTally,
    /// Why there is nothing to touch with, if that is so.
    pub why_none: Option<String>,
}

impl Gate {
    /// From here on frames are touched with `prober`.
    pub fn attach_prober(&mut self, prober: Box<dyn Prober>) {
        self.probes.prober = Some(prober);
    }

    /// Notes why there is no prober: what it would have touched counts as not checked.
    pub fn lacks_prober(&mut self, why: String) {
        self.probes.why_none = Some(why);
    }

    /// Puts another second stage in the place of the machine's own, before the guest starts: one
    /// that adds to it, or, for tests, one that fails to do what it says.
    pub fn wrap_stage(&mut self, wrap: impl FnOnce(Box<dyn SecondStage>) -> Box<dyn SecondStage>) {
        let own = std::mem::replace(&mut self.stage, Box::new(Off));
        self.stage = wrap(own);
    }

    /// What was touched so far.
    #[must_use]
    pub fn probe_summary(&self) -> ProbeSummary {
        let Probes { seed, each, why_none, .. } = &self.probes;
        let (seed, each, why_none) = (*seed, *each, why_none.clone());
        ProbeSummary { seed, each, tally: self.audit.probe_tally(), why_none }
    }

    /// Has frames touched and the outcome judged. All vCPUs stand still.
    ///
    /// # Errors
    /// [`GateFailure::Probe`] if they must not go on.
    pub(super) fn probe(&mut self, seq: u64) -> Result<(), GateFailure> {
        let kinds = self.probes.prober.as_ref().map_or(&[][..], |prober| prober.kinds());
        let (each, mut random) = (self.probes.each, self.probes.random.clone());
        let probes = self.with_audit(|audit, world| {
            audit.choose_probes(each, kinds, &mut |below| random.below(below), world)
        });
        self.probes.random = random;
        if probes.is_empty() {
            return Ok(());
        }
        let Some(prober) = &mut self.probes.prober else { return Ok(()) };
        let mut said = prober.touch(&probes).into_iter();
        let harm = prober.harm();
        let silent = || Touched::Failed("nothing was said of it".into());
        let touched = probes.into_iter().map(|probe| (probe, said.next().unwrap_or_else(silent)));
        let touched: Vec<_> = touched.collect();
        self.with_audit(|audit, world| audit.judge_probes(&touched, seq, world));
        harm.map_or(Ok(()), |why| Err(GateFailure::Probe(why)))
    }
}
