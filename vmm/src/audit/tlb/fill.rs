//! Until when a CPU could fill its caches from an address space, or through one path, and what it
//! has dropped of that since.

use super::duty::{PageFlush, Tag, cut};
use lacuna_abi::addr::{FrameRange, Gfn, Gva, PAGE_SIZE};
use lacuna_abi::paging::Level;

/// Flushes of single pages and completed seals that are remembered for an address space that a CPU
/// has left. Of more, the oldest are forgotten: then more is called cached than can be.
const MAX_HEALED: usize = 32;

/// The instruction that drops the paths has been announced: that it was executed is certain only when
/// the CPU's next event has come.
pub(super) const PENDING: u64 = u64::MAX;

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
        /// Number of an event by which that was certain; [`PENDING`] until then.
        by: u64,
    },
    /// The second stage was closed for frames, by the event with this number.
    Frames(FrameRange, u64),
}

impl Healed {
    /// Whether a newer one adds nothing to this.
    fn says(&self, newer: &Self) -> bool {
        match (self, newer) {
            (Self::Frames(old, _), Self::Frames(new, _)) => old.contains_range(*new),
            (
                Self::Pages { flush: old, leaves, paths, .. },
                Self::Pages { flush: new, leaves: new_leaves, paths: new_paths, .. },
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

    fn pending(&self) -> Self {
        match *self {
            Self::Pages { flush, leaves, paths, .. } => {
                Self::Pages { flush, leaves, paths, by: PENDING }
            }
            frames @ Self::Frames(..) => frames,
        }
    }

    fn is_of_frames(&self) -> bool {
        matches!(self, Self::Frames(..))
    }
}

/// Whether something that was cached is gone.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Gone {
    No,
    /// What removes it has been announced: it is there at most until the CPU's next event.
    WithTheNextEvent,
    Certainly,
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
        for healed in &mut self.healed {
            if let Healed::Pages { by, .. } = healed {
                *by = seq.min(*by);
            }
        }
    }

    pub(super) fn heal(&mut self, healed: Healed) {
        match healed {
            // A newer seal says more than an older one, as long as anything is filled.
            Healed::Frames(new, _) if self.until.is_none() => {
                let older =
                    |old: &Healed| matches!(old, Healed::Frames(f, _) if new.contains_range(*f));
                self.healed.retain(|old| !older(old));
            }
            // Nothing came back in between, so that the older of two like ones says it all.
            _ if self.healed.iter().any(|old| self.counts(old) && old.says(&healed)) => return,
            _ => {}
        }
        if self.healed.len() >= MAX_HEALED {
            // Paths that went are the last to be forgotten: seals depend on them.
            let first = self.healed.iter().position(|old| !old.cuts_paths()).unwrap_or(0);
            self.healed.remove(first);
        }
        self.healed.push(healed);
    }

    /// Whether it counts for all that it names, whatever the paths.
    fn counts(&self, healed: &Healed) -> bool {
        match healed {
            Healed::Frames(_, seq) => self.is_over(*seq),
            Healed::Pages { .. } => true,
        }
    }

    /// From now on it is filled through paths of which these went. That one of them went is as
    /// certain as it was, if it could be filled through no others since; else it is with the next
    /// event.
    pub(super) fn cut(&mut self, paths: &[Healed]) {
        let old = std::mem::take(&mut self.healed);
        if paths.is_empty() {
            return;
        }
        self.healed.extend(old.iter().filter(|healed| healed.is_of_frames()));
        self.healed.extend(paths.iter().map(|cut| {
            let known = old.iter().find(|known| known.says(cut));
            known.copied().unwrap_or_else(|| cut.pending())
        }));
    }

    /// Whether the CPU may have cached all of anything.
    #[inline]
    pub(super) fn is_whole(&self) -> bool {
        self.until.is_none() && self.healed.is_empty()
    }

    /// The parts of the run, tagged so, that the CPU may have cached, and whether they are certain to
    /// be gone with its next event. The common case is all or nothing.
    pub(super) fn held(&self, run: &Run, tag: Tag, each: &mut dyn FnMut(Run, bool)) {
        if self.until.is_some_and(|until| run.since >= until) {
            return;
        }
        if self.healed.is_empty() {
            each(*run, false);
            return;
        }
        for entry in run.entries() {
            let gone = self.is_cut_off(entry.va, entry.level, entry.since, |flush, leaves| {
                leaves && flush.reaches(tag)
            });
            if gone == Gone::Certainly {
                continue;
            }
            let mut parts = vec![entry.frames];
            for healed in &self.healed {
                if let Healed::Frames(gone, seq) = healed
                    && (self.is_over(*seq) || self.is_out_of_reach(entry.va, entry.level, *seq))
                {
                    parts = parts.iter().flat_map(|frames| cut(*frames, *gone)).collect();
                }
            }
            let passing = gone == Gone::WithTheNextEvent;
            parts.into_iter().for_each(|frames| each(entry.part(frames), passing));
        }
    }

    /// Whether the CPU no longer has the path through the entry of this level for `va`, granted at
    /// `since`, if it ever had.
    pub(super) fn path_gone(&self, va: Gva, level: Level, since: u64) -> Gone {
        if self.until.is_some_and(|until| since >= until) {
            return Gone::Certainly;
        }
        // A flush that drops all paths is kept with the space.
        self.gone(|flush, _, paths, by| {
            paths && (flush.hits(va, level) || (since >= by && hits_table(flush, va, level)))
        })
    }

    /// Whether nothing could be filled any more at `seq`.
    fn is_over(&self, seq: u64) -> bool {
        self.until.is_some_and(|until| seq >= until)
    }

    /// Whether the paths to the table of the entry for `va` had gone by `seq`: what went then has not
    /// come back.
    fn is_out_of_reach(&self, va: Gva, level: Level, seq: u64) -> bool {
        self.healed.iter().any(|healed| match healed {
            Healed::Pages { flush, paths: true, by, .. } => {
                seq >= *by && hits_table(flush, va, level)
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
    ) -> Gone {
        self.gone(|flush, leaves, paths, by| {
            (flush.hits(va, level) && removes(flush, leaves))
                || (paths && since >= by && hits_table(flush, va, level))
        })
    }

    /// Whether any flush of pages took something away, by what it says of each: the flush, whether
    /// leaves and whether paths went, and since when that is certain.
    fn gone(&self, takes: impl Fn(&PageFlush, bool, bool, u64) -> bool) -> Gone {
        let each = self.healed.iter().map(|healed| match healed {
            Healed::Pages { flush, leaves, paths, by } if takes(flush, *leaves, *paths, *by) => {
                if *by == PENDING {
                    Gone::WithTheNextEvent
                } else {
                    Gone::Certainly
                }
            }
            _ => Gone::No,
        });
        each.max().unwrap_or(Gone::No)
    }
}

/// Whether the flush drops all paths to the table of the entry for `va`: the paths to an address are
/// those to every table on its way.
fn hits_table(flush: &PageFlush, va: Gva, level: Level) -> bool {
    let table = Level::from_number(level.number() + 1);
    table.is_none_or(|above| flush.hits(va, above))
}
