//! Poison: freed mapped pages are filled with a pattern, and who gets them next finds it intact
//! unless somebody wrote to them after they were freed.

use crate::alloc::{AllocError, PageAllocator};
use crate::error::UseError;
use crate::meta::Chunk;
use crate::platform::Platform;
use lacuna_abi::addr::{Gfn, PAGE_SIZE};
use lacuna_abi::layout::direct_map;

/// What freed mapped pages hold.
pub const POISON: u64 = 0xaaaa_aaaa_aaaa_aaaa;

impl<P: Platform> PageAllocator<'_, P> {
    /// Fills mapped pages that become free.
    pub(crate) fn poison(&self, chunk: Chunk) {
        if !self.config.poison {
            return;
        }
        let frames = self.map.frames(chunk);
        self.platform.fill(direct_map(frames.start().gpa()), frames.count() * PAGE_SIZE, POISON);
        self.map.set_known(frames, true);
    }

    /// Checks mapped pages that are about to be handed out, those of them that were filled.
    ///
    /// # Errors
    /// [`AllocError::Corrupted`]; the pages are withheld.
    pub(crate) fn check_poison(&self, chunk: Chunk) -> Result<(), AllocError> {
        if !self.config.poison {
            return Ok(());
        }
        let frames = self.map.frames(chunk);
        for part in frames.by_block() {
            let (block, first) = self.map.part(part);
            for (page, frame) in (first..).zip(part.iter()) {
                if block.unknown_run(page, page + 1).is_none()
                    && let Some(found) = self.find_other(frame, POISON)
                {
                    self.withhold(chunk, false);
                    return Err(AllocError::Corrupted { frame, found });
                }
            }
        }
        self.counts.poison_checked.add(frames.count());
        self.map.set_known(frames, false);
        Ok(())
    }

    /// The first word of a mapped page that is not `value`.
    fn find_other(&self, frame: Gfn, value: u64) -> Option<u64> {
        let start = direct_map(frame.gpa());
        (0..PAGE_SIZE)
            .step_by(8)
            .map(|offset| self.platform.load(start.wrapping_add(offset)))
            .find(|word| *word != value)
    }

    /// Checks that sealed pages which are said to be zero are, before they are handed out.
    ///
    /// # Errors
    /// [`AllocError::Corrupted`]; the pages are withheld. Or a refusal of the host.
    pub(crate) fn check_zero(&self, chunk: Chunk) -> Result<(), AllocError> {
        if !self.config.check_zero {
            return Ok(());
        }
        let frames = self.map.frames(chunk);
        for part in frames.by_block() {
            match self.find_nonzero(part) {
                Ok(None) => {}
                Ok(Some((frame, found))) => {
                    self.withhold(chunk, false);
                    return Err(AllocError::Corrupted { frame, found });
                }
                Err(error) => {
                    if matches!(error, UseError::Unsealed(_)) {
                        self.withhold(chunk, false);
                    } else {
                        self.put(chunk);
                    }
                    return Err(error.into());
                }
            }
        }
        self.counts.zero_checked.add(frames.count());
        Ok(())
    }
}
