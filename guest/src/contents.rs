//! What free pages hold. Freed mapped pages can be zeroed, or filled with a pattern that the next
//! owner finds intact unless somebody wrote to them after they were freed; secret pages that are
//! said to be zero can be looked at.

use crate::alloc::{AllocError, PageAllocator};
use crate::error::UseError;
use crate::meta::Chunk;
use crate::platform::Platform;
use lacuna_abi::addr::{Gfn, PAGE_SIZE};
use lacuna_abi::layout::direct_map;

/// What freed mapped pages hold with [`OnFree::Poison`].
pub const POISON: u64 = 0xaaaa_aaaa_aaaa_aaaa;

/// What happens to mapped pages that are freed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OnFree {
    /// Nothing.
    Leave,
    /// They are zeroed, and not again when they are handed out as zero.
    Zero,
    /// They are filled with a pattern, which is checked when they are handed out.
    Poison,
}

impl OnFree {
    const fn word(self) -> Option<u64> {
        match self {
            Self::Leave => None,
            Self::Zero => Some(0),
            Self::Poison => Some(POISON),
        }
    }
}

impl<P: Platform> PageAllocator<'_, P> {
    /// Treats mapped pages that become free as the configuration says.
    pub(crate) fn clear_freed(&self, chunk: Chunk) {
        let Some(word) = self.config.on_free.word() else { return };
        let frames = self.map.frames(chunk);
        let (va, bytes) = (direct_map(frames.start().gpa()), frames.count() * PAGE_SIZE);
        if word == 0 {
            self.platform.zero(va, bytes);
            self.counts.zeroed_mapped.add(frames.count());
        } else {
            self.platform.fill(va, bytes, word);
        }
        self.map.set_known(frames, true);
    }

    /// Looks at mapped pages that are about to be handed out, those of them that were filled; whether
    /// all are known to be zero.
    ///
    /// # Errors
    /// [`AllocError::Corrupted`]; the pages are withheld.
    pub(crate) fn check_mapped(&self, chunk: Chunk) -> Result<bool, AllocError> {
        let frames = self.map.frames(chunk);
        match self.config.on_free {
            OnFree::Leave => return Ok(false),
            OnFree::Zero => {
                let known = self.map.is_known(frames);
                self.map.set_known(frames, false);
                return Ok(known);
            }
            OnFree::Poison => {}
        }
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
        Ok(false)
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
