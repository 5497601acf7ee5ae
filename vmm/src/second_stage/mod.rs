//! The second stage: the translation from guest-physical to host memory, and how secret frames
//! are closed in it.

mod guard;
mod memslot;
mod off;
mod pagemap;
mod software;

pub use guard::{Guard, Mechanism};
pub use memslot::{MemSlot, Slots};
pub use off::Off;
pub use software::Software;

use lacuna_abi::addr::{FrameRange, Gfn};

/// The second stage could not be changed: the run ends, because what is closed is not known any
/// more.
#[derive(Debug, thiserror::Error)]
#[error("the second stage cannot {what} {frames}: {error}")]
pub struct SecondStageError {
    /// What was tried: "close" or "open".
    pub what: &'static str,
    /// On which frames.
    pub frames: FrameRange,
    /// What the kernel said.
    pub error: std::io::Error,
}

/// A way to close frames.
pub trait SecondStage: Send {
    /// Name of the back end, as in `--seal`.
    fn name(&self) -> &'static str;

    /// How the back end works, in a few words for the report.
    fn detail(&self) -> String;

    /// Smallest number of bytes that can be closed; 0 if nothing is.
    fn granule(&self) -> u64;

    /// Whether anything is closed at all.
    fn closes(&self) -> bool {
        self.granule() > 0
    }

    /// Makes the state of every granule that holds one of `frames` what it must be: closed where
    /// `may_close` says so for all of its frames, open where it does not.
    ///
    /// # Errors
    /// [`SecondStageError`]; the state is then unknown and the run must end.
    fn update(
        &mut self,
        frames: FrameRange,
        may_close: &dyn Fn(Gfn) -> bool,
    ) -> Result<(), SecondStageError>;

    /// Whether [`Self::update`] with the same arguments must not be called while a vCPU runs: what
    /// it does on the way to the new state shows.
    fn needs_all_stopped(&self, _frames: FrameRange, _may_close: &dyn Fn(Gfn) -> bool) -> bool {
        false
    }

    /// Whether the back end closed this frame.
    fn denies(&self, frame: Gfn) -> bool;

    /// Whether the back end closed all these frames.
    fn denies_all(&self, frames: FrameRange) -> bool {
        frames.iter().all(|frame| self.denies(frame))
    }

    /// Whether the frame is open only because the last update of its granule had to leave it open
    /// for another frame.
    fn holds_open(&self, frame: Gfn) -> bool;
}
