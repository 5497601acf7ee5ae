//! Guests that misbehave on purpose, and what must hold all the same.
//!
//! [`torment`] makes of any bytes a guest's doings on shared memory, call pages, rings, tables and
//! registers, and gate calls on a real gate with a second stage in software. It needs no KVM: a fuzzer
//! feeds it (`vmm/fuzz/fuzz_targets/hostile.rs`), tests replay what the fuzzer kept. [`Program`] makes
//! of a seed a guest image for a real machine, and [`Sin`] those that certainly do what a rule forbids.
//!
//! A guest may do as it likes. The VMM does not panic or fail for it, what it keeps is bounded, and a
//! guest that leaves something forbidden in its tables or registers is never clean: [`torment`]
//! compares the audit with an oracle that shares no code with it.
#![forbid(unsafe_code)]

mod asm;
mod choices;
mod elf;
mod notes;
mod oracle;
mod program;
mod rig;
mod script;
mod sins;
#[cfg(test)]
mod tests;

pub use elf::elf;
pub use notes::Notes;
pub use program::Program;
pub use sins::Sin;

use crate::audit::Mediation;
use choices::Choices;
use rig::Rig;

/// Most steps of one guest.
const MAX_STEPS: usize = 4096;
/// Most reasons of doubt that may be kept of one guest, and most bytes of each.
const MAX_REASONS: usize = 1000;
const MAX_REASON: usize = 10_000;

/// How a guest that was made of bytes ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ended {
    /// Steps that it made.
    pub steps: usize,
    /// Gate calls among them.
    pub calls: u64,
    /// Nothing was found, and nothing is in doubt.
    pub clean: bool,
    /// What the oracle found in tables and registers, if anything.
    pub forbidden: Option<String>,
}

/// Runs the guest that these bytes make, and checks it once more at its end.
///
/// # Errors
/// What does not hold, in a sentence: the gate failed, keeps too much, or called a guest clean that is
/// not.
pub fn torment(bytes: &[u8]) -> Result<Ended, String> {
    let mut choices = Choices::new(bytes);
    let shape = choices.below(4);
    let mediation = if shape < 2 { Mediation::Trace } else { Mediation::Tables };
    let mut rig = Rig::new(shape % 2 + 1, choices.flag(), mediation)?;
    let mut steps = 0;
    while !choices.is_empty() && steps < MAX_STEPS && script::step(&mut rig, &mut choices)? {
        steps += 1;
    }
    rig.finish()?;
    let result = rig.result();
    let kept = result.inconclusive.len();
    if kept > MAX_REASONS || result.inconclusive.iter().any(|why| why.len() > MAX_REASON) {
        return Err(format!("{kept} reasons of doubt are kept"));
    }
    if result.findings.len() > rig::MAX_FINDINGS {
        return Err(format!("{} findings are kept", result.findings.len()));
    }
    rig.second_stage_is_right()?;
    let clean = rig.is_clean();
    let forbidden = rig.forbidden();
    match forbidden {
        Some(what) if clean => Err(format!("called clean, in spite of this: {what}")),
        forbidden => Ok(Ended { steps, calls: rig.calls(), clean, forbidden }),
    }
}
