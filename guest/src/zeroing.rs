//! Zeroing of secret frames: through windows, pageblock by pageblock, each part exactly its own
//! pages.

use crate::alloc::PageAllocator;
use crate::error::UseError;
use crate::mermap::{MermapError, Protection};
use crate::platform::{GateError, InterruptsOff, Platform, planted, slips};
use lacuna_abi::addr::{FrameRange, Gfn, PAGE_SIZE};
use lacuna_abi::gate::OpKind;

/// Why frames are zeroed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Purpose {
    /// Their pageblock enters the pool.
    Flip,
    /// They are handed out as zero.
    HandOut,
    /// They were freed, or leave the unmapped side.
    Scrub,
}

impl<P: Platform> PageAllocator<'_, P> {
    /// Zeroes those of the sealed frames that are not known to be zero, run by run: open, map,
    /// zero, unmap, seal.
    ///
    /// # Errors
    /// [`UseError`]; the runs before are zero and sealed, and the one that failed is sealed too,
    /// except after [`UseError::Unsealed`].
    pub(crate) fn zero_unknown(
        &self,
        frames: FrameRange,
        purpose: Purpose,
    ) -> Result<(), UseError> {
        self.each_unknown_run(frames, |run| self.use_open(run, || self.zero_open(run, purpose)))
    }

    /// Zeroes those of the open frames that are not known to be zero.
    ///
    /// # Errors
    /// As [`Self::zero_open`].
    pub(crate) fn zero_unknown_open(
        &self,
        frames: FrameRange,
        purpose: Purpose,
    ) -> Result<(), MermapError> {
        self.each_unknown_run(frames, |run| self.zero_open(run, purpose))
    }

    /// Hands `body` the runs of frames that are not known to be zero, each within a pageblock.
    fn each_unknown_run<E>(
        &self,
        frames: FrameRange,
        mut body: impl FnMut(FrameRange) -> Result<(), E>,
    ) -> Result<(), E> {
        for part in frames.by_block() {
            let (block, first) = self.map.part(part);
            let (mut next, end) = (first, first + part.count());
            while let Some((from, to)) = block.unknown_run(next, end) {
                let start = Gfn(part.start().0 + (from - first));
                if let Some(run) = FrameRange::new(start, to - from) {
                    body(run)?;
                }
                next = to;
            }
        }
        Ok(())
    }

    /// The first page of sealed frames of one pageblock that is not zero, with the word that is not.
    ///
    /// # Errors
    /// As [`Self::zero_unknown`].
    pub(crate) fn find_nonzero(&self, part: FrameRange) -> Result<Option<(Gfn, u64)>, UseError> {
        let mut found = None;
        self.use_open(part, || {
            for frame in part.iter() {
                let off = InterruptsOff::new(self.platform);
                let mapping = self.mermap.get_reserved(frame, Protection::READ, off)?;
                let words = (0..PAGE_SIZE).step_by(8);
                let word = |at| self.platform.load(mapping.va().wrapping_add(at));
                if let Some(other) = words.map(word).find(|word| *word != 0) {
                    found = Some((frame, other));
                    break;
                }
            }
            Ok(())
        })?;
        Ok(found)
    }

    /// Opens the frames, lets `body` use them, seals them again.
    fn use_open(
        &self,
        frames: FrameRange,
        body: impl FnOnce() -> Result<(), MermapError>,
    ) -> Result<(), UseError> {
        self.platform.gate(&[(OpKind::Open, frames)]).map_err(UseError::Gate)?;
        let used = body();
        self.seal_open(frames)?;
        used.map_err(UseError::Window)
    }

    /// Seals frames that are open.
    pub(crate) fn seal_open(&self, frames: FrameRange) -> Result<(), UseError> {
        let sealed: Result<(), GateError> = self.platform.gate(&[(OpKind::Seal, frames)]);
        sealed.map_err(UseError::Unsealed)
    }

    /// Zeroes open frames and remembers that they are zero.
    ///
    /// # Errors
    /// [`MermapError`] if neither a window nor the reserve could be had; what was zeroed is known.
    pub(crate) fn zero_open(
        &self,
        frames: FrameRange,
        purpose: Purpose,
    ) -> Result<(), MermapError> {
        let slip = match purpose {
            Purpose::Flip | Purpose::HandOut => planted!(self.platform, SkipZero),
            Purpose::Scrub => planted!(self.platform, SkipScrubOnRemap),
        };
        if slip {
            // A page that skipped its scrub is not believed to be zero: the slip shows where the
            // frame is released, not where it is handed out next.
            self.map.set_known(frames, purpose != Purpose::Scrub);
            return Ok(());
        }
        for part in frames.by_block() {
            let short = purpose == Purpose::Scrub && slips!(self.platform, ScrubOnePageShort);
            self.zero_part(if short { all_but_the_last(part) } else { part })?;
            self.map.set_known(part, true);
            self.zeroed(purpose, part.count());
        }
        Ok(())
    }

    /// Zeroes open frames of one pageblock: through one window, or page by page through the
    /// reserve where no window can be had.
    fn zero_part(&self, part: FrameRange) -> Result<(), MermapError> {
        if let Ok(mapping) = self.mermap.get(part, Protection::READ_WRITE) {
            self.platform.zero(mapping.va(), part.count() * PAGE_SIZE);
            return Ok(());
        }
        for frame in part.iter() {
            let off = InterruptsOff::new(self.platform);
            let mapping = self.mermap.get_reserved(frame, Protection::READ_WRITE, off)?;
            self.platform.zero(mapping.va(), PAGE_SIZE);
        }
        Ok(())
    }

    fn zeroed(&self, purpose: Purpose, pages: u64) {
        let count = match purpose {
            Purpose::Flip => &self.counts.zeroed_flip,
            Purpose::HandOut => &self.counts.zeroed_alloc,
            Purpose::Scrub => &self.counts.zeroed_scrub,
        };
        count.add(pages);
    }
}

/// The frames without the last of several.
pub(crate) fn all_but_the_last(frames: FrameRange) -> FrameRange {
    FrameRange::new(frames.start(), frames.count() - 1).unwrap_or(frames)
}
