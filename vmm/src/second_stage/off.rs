//! `off`: frames become secret, but nothing is closed.

use super::{SecondStage, SecondStageError};
use lacuna_abi::addr::{FrameRange, Gfn};

/// Closes nothing: for comparison, and for faults that a seal would hide.
#[derive(Debug)]
pub struct Off;

impl SecondStage for Off {
    fn name(&self) -> &'static str {
        "off"
    }

    fn detail(&self) -> String {
        "nothing is closed".into()
    }

    fn granule(&self) -> u64 {
        0
    }

    fn update(&mut self, _: FrameRange, _: &dyn Fn(Gfn) -> bool) -> Result<(), SecondStageError> {
        Ok(())
    }

    fn denies(&self, _: Gfn) -> bool {
        false
    }

    fn holds_open(&self, _: Gfn) -> bool {
        false
    }
}
