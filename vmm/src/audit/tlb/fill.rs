//! Until when a CPU could fill its caches from an address space, or through one path, and what it
//! has dropped of that since.

use super::duty::{PageFlush, Tag, cut};
use lacuna_abi::addr::{FrameRange, Gfn, Gva, PAGE_SIZE};
use lacuna_abi::paging::Level;

/// Flushes of single pages and completed seals that are remembered for an address space that a CPU
/// has left. Of more, the oldest are forgotten: then more is called cached than can be.
const MAX_HEALED: usize = 32;

/// Something that the CPU dropped after it could last fill it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Healed {
    /// Pages were invalidated.
    Pages {
        flush: PageFlush,
        /// The translations themselves went.
        leaves: bool,
        /// The paths that lead to the pages went: through them nothing is filled any more.
        paths: bool,
    },
    /// The second stage was closed for frames.
    Frames(FrameRange),
}

impl Healed {
    /// Whether a newer one adds nothing to this.
    fn says(&self, newer: &Self) -> bool {
        match (self, newer) {
            (Self::Frames(old), Self::Frames(new)) => old.contains_range(*new),
            (
                Self::Pages { flush: old, leaves, paths },
                Self::Pages { flush: new, leaves: new_leaves, paths: new_paths },
            ) => {
                let like = PageFlush { seq: old.seq, ..*new } == *old;
                like && leaves == new_leaves && paths == new_paths
            }
            _ => false,
        }
    }

    pub(super) fn cuts_paths(&self) -> bool {
        matches!(self, Self::Pages { paths: true, .. })
    }
}

/// When one CPU can fill its caches from something.
#[derive(Clone, Debug, Default)]
pub(super) struct Fill {
    /// `None` while it can, else the number of an event by which it no longer could.
    pub until: Option<u64>,
    /// An instruction after which it no longer can has been announced.
    pub leaving: bool,
    pub healed: Vec<Healed>,
}

/// A run of entries of one table that map consecutive frames.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Run {
    pub va: Gva,
    pub level: Level,
    pub frames: FrameRange,
    pub global: bool,
    /// Number of the event that granted them.
    pub since: u64,
}

impl Run {
    fn part(&self, frames: FrameRange) -> Self {
        let skipped = frames.start().0 - self.frames.start().0;
        let va = match self.level {
            Level::Pt => self.va.wrapping_add(skipped * PAGE_SIZE),
            _ => self.va,
        };
        Self { va, frames, ..*self }
    }

    /// The entries one by one.
    pub(super) fn entries(self) -> impl Iterator<Item = Self> {
        let step = self.level.frames();
        (0..self.frames.count().div_ceil(step)).filter_map(move |index| {
            let start = self.frames.start().0 + index * step;
            let count = step.min(self.frames.end().0 - start);
            let frames = FrameRange::new(Gfn(start), count)?;
            Some(Self { va: self.va.wrapping_add(index * self.level.span()), frames, ..self })
        })
    }
}

impl Fill {
    /// It can be filled from now on; what went is filled again, but through paths that went.
    pub(super) fn resume(&mut self) {
        if self.until.take().is_some() {
            self.healed.retain(Healed::cuts_paths);
        }
        self.leaving = false;
    }

    /// An instruction has been announced after which it can no longer be filled. That is certain
    /// only when the CPU's next event has come.
    pub(super) fn end(&mut self) {
        self.leaving = self.until.is_none();
    }

    /// The CPU has gone on: what it announced has been carried out.
    pub(super) fn went_on(&mut self, seq: u64) {
        if std::mem::take(&mut self.leaving) {
            self.until = Some(seq);
        }
    }

    pub(super) fn heal(&mut self, healed: Healed) {
        // Nothing came back in between, so that the older of two like ones says it all.
        if self.healed.iter().any(|old| old.says(&healed)) {
            return;
        }
        if self.healed.len() >= MAX_HEALED {
            self.healed.remove(0);
        }
        self.healed.push(healed);
    }

    /// Whether the CPU may have cached all of anything.
    #[inline]
    pub(super) fn is_whole(&self) -> bool {
        self.until.is_none() && self.healed.is_empty()
    }

    /// The parts of the run, tagged so, that the CPU may have cached. The common case is all or
    /// nothing.
    pub(super) fn held(&self, run: &Run, tag: Tag, each: &mut dyn FnMut(Run)) {
        if self.until.is_some_and(|until| run.since >= until) {
            return;
        }
        if self.healed.is_empty() {
            each(*run);
            return;
        }
        for entry in run.entries() {
            if self.is_cut_off(entry.va, entry.level, entry.since, |flush, leaves| {
                leaves && flush.reaches(tag)
            }) {
                continue;
            }
            let mut parts = vec![entry.frames];
            for healed in &self.healed {
                if let Healed::Frames(gone) = healed {
                    parts = parts.iter().flat_map(|frames| cut(*frames, *gone)).collect();
                }
            }
            parts.into_iter().for_each(|frames| each(entry.part(frames)));
        }
    }

    /// Whether the CPU may have cached the path through the entry of this level for `va`, granted at
    /// `since`, and still has it.
    pub(super) fn holds_path(&self, va: Gva, level: Level, since: u64) -> bool {
        let in_time = self.until.is_none_or(|until| since < until);
        // A flush that drops all paths is kept with the space.
        in_time && !self.is_cut_off_path(va, level, since)
    }

    fn is_cut_off_path(&self, va: Gva, level: Level, since: u64) -> bool {
        self.healed.iter().any(|healed| match healed {
            Healed::Pages { flush, paths: true, .. } => {
                flush.hits(va, level) || is_unreachable(flush, va, level, since)
            }
            _ => false,
        })
    }

    fn is_cut_off(
        &self,
        va: Gva,
        level: Level,
        since: u64,
        removes: impl Fn(&PageFlush, bool) -> bool,
    ) -> bool {
        self.healed.iter().any(|healed| match healed {
            Healed::Pages { flush, leaves, paths } => {
                (flush.hits(va, level) && removes(flush, *leaves))
                    || (*paths && is_unreachable(flush, va, level, since))
            }
            Healed::Frames(_) => false,
        })
    }
}

/// Whether the flush dropped all paths to the table of the entry for `va` before that was granted:
/// the paths to an address are those to every table on its way.
fn is_unreachable(flush: &PageFlush, va: Gva, level: Level, since: u64) -> bool {
    let table = Level::from_number(level.number() + 1);
    since >= flush.seq && table.is_none_or(|above| flush.hits(va, above))
}
