//! `guard`: frames are closed in the mapping that KVM uses, page by page.
//!
//! With `madvise` guards no VMA is split. With `mprotect` each border between closed and open
//! memory is the border of a VMA, and a hostile guest could drive their number to the kernel's
//! limit: past a budget, pageblocks are closed and opened as a whole.

use super::pagemap::PageMap;
use super::{SecondStage, SecondStageError};
use crate::machine::memory::Memory;
use crate::machine::sys::{self, Access, HostMapping};
use lacuna_abi::addr::{BLOCK_SIZE, FrameRange, Gfn, PAGE_SIZE};
use std::io;
use std::sync::Arc;

/// How memory is closed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mechanism {
    /// `MADV_GUARD_INSTALL`: Linux 6.15 for shared mappings.
    Madvise,
    /// `mprotect`, with at most this many borders between closed and open memory.
    Mprotect {
        /// Borders that may exist before pageblocks are closed as a whole.
        budget: u64,
    },
}

impl Mechanism {
    /// Tries a guard on memory of the kind that guests get.
    ///
    /// # Errors
    /// What the kernel says: `InvalidInput` where it does not know guards, or not for files.
    pub fn probe_madvise() -> io::Result<()> {
        let len = PAGE_SIZE as usize;
        let file = sys::memory_file(c"lacuna-probe", PAGE_SIZE)?;
        let mapping = HostMapping::new(&file, len)?;
        mapping.set(Access::Guard, 0, len, true)?;
        mapping.set(Access::Guard, 0, len, false)
    }

    /// `mprotect` with a budget of three quarters of the VMAs that this process may have.
    #[must_use]
    pub fn mprotect() -> Self {
        let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count").ok();
        let limit = limit.and_then(|text| text.trim().parse::<u64>().ok()).unwrap_or(65_530);
        Self::Mprotect { budget: limit / 4 * 3 }
    }

    /// Guards where the kernel has them for this memory, `mprotect` otherwise.
    #[must_use]
    pub fn best() -> Self {
        match Self::probe_madvise() {
            Ok(()) => Self::Madvise,
            Err(error) => {
                log::info!("no madvise guards on shared memory here ({error}): using mprotect");
                Self::mprotect()
            }
        }
    }
}

/// The `guard` back end.
pub struct Guard {
    memory: Arc<Memory>,
    mechanism: Mechanism,
    map: PageMap,
    borders: u64,
    coarse: bool,
}

impl Guard {
    /// Closes memory of this guest by `mechanism`.
    #[must_use]
    pub fn new(memory: Arc<Memory>, mechanism: Mechanism) -> Self {
        let map = PageMap::new(memory.layout().zone_frames());
        Self { memory, mechanism, map, borders: 0, coarse: false }
    }

    /// Brings `frames` to the wanted state.
    fn apply(
        &mut self,
        frames: FrameRange,
        want: &dyn Fn(Gfn) -> bool,
    ) -> Result<(), (FrameRange, bool, io::Error)> {
        let how = match self.mechanism {
            Mechanism::Madvise => Access::Guard,
            Mechanism::Mprotect { .. } => Access::Protection,
        };
        let start = self.memory.layout().zone_frames().start();
        let mapping = self.memory.zone_mapping();
        let before = self.map.borders(frames);
        let result = self.map.apply(frames, want, |run, closed| {
            let bytes = |pages: u64| {
                usize::try_from(pages * PAGE_SIZE).map_err(|_| io::ErrorKind::InvalidInput)
            };
            mapping.set(how, bytes(run.start().0 - start.0)?, bytes(run.count())?, closed)
        });
        self.borders = (self.borders + self.map.borders(frames)).saturating_sub(before);
        result
    }

    /// Closes the pageblock of each frame only if all of it may be closed.
    fn apply_by_block(
        &mut self,
        frames: FrameRange,
        may_close: &dyn Fn(Gfn) -> bool,
    ) -> Result<(), (FrameRange, bool, io::Error)> {
        for part in frames.by_block() {
            if let Some(block) = self.map.block(part.start()) {
                let closed = block.iter().all(may_close);
                self.apply(block, &|_| closed)?;
                self.map.note_block(block, closed);
            }
        }
        Ok(())
    }
}

impl SecondStage for Guard {
    fn name(&self) -> &'static str {
        "guard"
    }

    fn detail(&self) -> String {
        match self.mechanism {
            Mechanism::Madvise => "madvise guards on KVM's mapping".into(),
            Mechanism::Mprotect { budget } if self.coarse => {
                format!("mprotect on KVM's mapping; past {budget} borders, closed by pageblock")
            }
            Mechanism::Mprotect { budget } => {
                format!("mprotect on KVM's mapping, {} of {budget} borders used", self.borders)
            }
        }
    }

    fn granule(&self) -> u64 {
        if self.coarse { BLOCK_SIZE } else { PAGE_SIZE }
    }

    fn update(
        &mut self,
        frames: FrameRange,
        may_close: &dyn Fn(Gfn) -> bool,
    ) -> Result<(), SecondStageError> {
        if !self.coarse {
            let result = self.apply(frames, may_close);
            let over = match self.mechanism {
                Mechanism::Mprotect { budget } => self.borders > budget,
                Mechanism::Madvise => false,
            };
            match result {
                Ok(()) if !over => return Ok(()),
                Err((run, closed, error)) if self.mechanism == Mechanism::Madvise => {
                    return Err(failure(run, closed, error));
                }
                _ => {
                    log::warn!("the guard seal now closes whole pageblocks: too many VMAs");
                    self.coarse = true;
                    // Also the blocks of earlier calls: from now on borders lie between blocks only.
                    for block in self.map.mixed_blocks() {
                        self.apply_by_block(block, may_close)
                            .map_err(|(run, closed, error)| failure(run, closed, error))?;
                    }
                }
            }
        }
        let result = self.apply_by_block(frames, may_close);
        result.map_err(|(run, closed, error)| failure(run, closed, error))
    }

    fn denies(&self, frame: Gfn) -> bool {
        self.map.is_closed(frame)
    }

    fn denies_all(&self, frames: FrameRange) -> bool {
        self.map.all_closed(frames)
    }

    fn holds_open(&self, frame: Gfn) -> bool {
        self.map.is_held(frame)
    }
}

fn failure(frames: FrameRange, closed: bool, error: io::Error) -> SecondStageError {
    SecondStageError { what: if closed { "close" } else { "open" }, frames, error }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_abi::layout::{Layout, Needs};

    fn guard(mechanism: Mechanism) -> (Guard, Gfn) {
        let needs = Needs { image: 4096, memory_mib: 16, cpus: 1, input: 0, scratch: 0 };
        let memory = Memory::new(Layout::new(&needs).unwrap()).unwrap();
        let first = memory.layout().zone_frames().start();
        (Guard::new(Arc::new(memory), mechanism), first)
    }

    fn range(start: Gfn, offset: u64, count: u64) -> FrameRange {
        FrameRange::new(start.wrapping_add(offset), count).unwrap()
    }

    #[test]
    fn frames_are_closed_and_opened_one_by_one() {
        for mechanism in [Mechanism::best(), Mechanism::mprotect()] {
            let (mut guard, first) = guard(mechanism);
            guard.update(range(first, 0, 512), &|_| true).unwrap();
            guard.update(range(first, 7, 1), &|_| false).unwrap();
            assert!(guard.denies(first) && !guard.denies(first.wrapping_add(7)));
            assert!(guard.denies(first.wrapping_add(8)));
            assert!(!guard.denies(first.wrapping_add(512)));
            assert_eq!(guard.granule(), PAGE_SIZE);
            guard.update(range(first, 0, 512), &|_| false).unwrap();
            assert!(!guard.denies(first));
        }
    }

    #[test]
    fn growing_the_granule_sweeps_the_blocks_of_earlier_calls() {
        let (mut guard, first) = guard(Mechanism::Mprotect { budget: 10 });
        let one = |f: Gfn| f.0 % 512 == 3;
        for block in 0..8 {
            guard.update(range(first, 512 * block + 3, 1), &one).unwrap();
        }
        assert_eq!(guard.granule(), BLOCK_SIZE);
        assert_eq!(guard.borders, 0);
        assert!((0..8).all(|block| guard.holds_open(first.wrapping_add(512 * block + 3))));
    }

    #[test]
    fn past_the_budget_the_granule_grows_and_nothing_fails() {
        let (mut guard, first) = guard(Mechanism::Mprotect { budget: 10 });
        // Every other frame of the first block, then the rest of it.
        let odd = |f: Gfn| f.0 % 2 == 1;
        for offset in 0..512 {
            guard.update(range(first, offset, 1), &odd).unwrap();
        }
        assert_eq!(guard.granule(), BLOCK_SIZE);
        assert!(!guard.denies(first.wrapping_add(511)), "the block is not wholly closable");
        assert!(guard.holds_open(first) && !guard.holds_open(first.wrapping_add(512)));
        assert!(guard.borders <= 2, "{} borders are left", guard.borders);
        guard.update(range(first, 3, 1), &|_| true).unwrap();
        assert!(guard.denies(first) && guard.denies(first.wrapping_add(511)));
        assert!(!guard.holds_open(first));
        assert!(guard.detail().contains("by pageblock"));
    }
}
