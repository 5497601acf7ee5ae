//! Which frames of the zone are closed, and the shortest list of changes to get from one state to
//! another. Shared by all back ends that close something.

use lacuna_abi::addr::{BLOCK_FRAMES, FrameRange, Gfn};
use std::collections::HashSet;
use std::io;

/// Closed frames, one bit each; never touched memory for frames that never were.
#[derive(Debug)]
pub(super) struct PageMap {
    zone: FrameRange,
    words: Vec<u64>,
    /// First frames of the pageblocks that were left open as a whole for one of their frames.
    held: HashSet<Gfn>,
}

/// Frames in a word of the map.
const WORD: u64 = 64;

impl PageMap {
    pub(super) fn new(zone: FrameRange) -> Self {
        let words = usize::try_from(zone.count().div_ceil(WORD)).unwrap_or(0);
        Self { zone, words: vec![0; words], held: HashSet::new() }
    }

    /// Frame number counted from the zone's start.
    pub(super) fn index(&self, frame: Gfn) -> Option<u64> {
        self.zone.contains(frame).then(|| frame.0 - self.zone.start().0)
    }

    pub(super) fn is_closed(&self, frame: Gfn) -> bool {
        self.index(frame).is_some_and(|index| self.bit(index))
    }

    /// Whether all these frames are closed.
    pub(super) fn all_closed(&self, frames: FrameRange) -> bool {
        if !self.zone.contains_range(frames) {
            return false;
        }
        let mut next = frames.start().0 - self.zone.start().0;
        let end = next + frames.count();
        while next < end {
            // As many frames as the word holds.
            let count = (WORD - next % WORD).min(end - next);
            let mask = (u64::MAX >> (WORD - count)) << (next % WORD);
            let word = usize::try_from(next / WORD).ok().and_then(|i| self.words.get(i));
            if word.is_none_or(|word| word & mask != mask) {
                return false;
            }
            next += count;
        }
        true
    }

    fn bit(&self, index: u64) -> bool {
        let word = usize::try_from(index / WORD).ok().and_then(|i| self.words.get(i));
        word.is_some_and(|w| w & (1 << (index % WORD)) != 0)
    }

    fn set(&mut self, index: u64, closed: bool) {
        if let Some(word) = usize::try_from(index / WORD).ok().and_then(|i| self.words.get_mut(i)) {
            let bit = 1 << (index % WORD);
            *word = if closed { *word | bit } else { *word & !bit };
        }
    }

    /// Number of borders between closed and open frames in `frames` and at its ends.
    pub(super) fn borders(&self, frames: FrameRange) -> u64 {
        let first = frames.start().0 - self.zone.start().0;
        (first..=first + frames.count())
            .filter(|i| (*i > 0 && self.bit(*i - 1)) != self.bit(*i))
            .count() as u64
    }

    /// Changes the frames whose state differs from `want`, run by run, through `change`; the map
    /// follows each change that succeeded.
    ///
    /// # Errors
    /// The run that failed, and why.
    pub(super) fn apply(
        &mut self,
        frames: FrameRange,
        want: impl Fn(Gfn) -> bool,
        mut change: impl FnMut(FrameRange, bool) -> io::Result<()>,
    ) -> Result<(), (FrameRange, bool, io::Error)> {
        // The run that is being gathered, and what is to become of it.
        let mut pending: Option<(FrameRange, bool)> = None;
        for frame in frames.iter() {
            let closed = want(frame);
            if self.is_closed(frame) == closed {
                self.carry_out(pending.take(), &mut change)?;
                continue;
            }
            let longer = pending.filter(|(_, wanted)| *wanted == closed);
            let longer = longer.and_then(|(run, _)| FrameRange::new(run.start(), run.count() + 1));
            if longer.is_none() {
                self.carry_out(pending, &mut change)?;
            }
            pending = Some((longer.unwrap_or_else(|| FrameRange::single(frame)), closed));
        }
        self.carry_out(pending, &mut change)
    }

    fn carry_out(
        &mut self,
        run: Option<(FrameRange, bool)>,
        change: &mut impl FnMut(FrameRange, bool) -> io::Result<()>,
    ) -> Result<(), (FrameRange, bool, io::Error)> {
        let Some((run, closed)) = run else { return Ok(()) };
        change(run, closed).map_err(|error| (run, closed, error))?;
        for frame in run.iter() {
            self.set(frame.0 - self.zone.start().0, closed);
        }
        Ok(())
    }

    /// Notes of a pageblock that was updated as a whole whether it had to stay open.
    pub(super) fn note_block(&mut self, block: FrameRange, closed: bool) {
        if closed {
            self.held.remove(&block.start());
        } else {
            self.held.insert(block.start());
        }
    }

    /// Whether the pageblock of `frame` had to stay open as a whole.
    pub(super) fn is_held(&self, frame: Gfn) -> bool {
        self.held.contains(&frame.block_start()) && !self.is_closed(frame)
    }

    /// Pageblocks in which some frames are closed and others open.
    pub(super) fn mixed_blocks(&self) -> Vec<FrameRange> {
        let words = usize::try_from(BLOCK_FRAMES / WORD).unwrap_or(8);
        let mixed = |block: &[u64]| {
            block.iter().any(|word| *word != 0) && block.iter().any(|word| *word != u64::MAX)
        };
        let blocks = self.words.chunks(words).zip(self.zone.by_block());
        blocks.filter(|(block, _)| mixed(block)).map(|(_, frames)| frames).collect()
    }

    /// The pageblock that holds `frame`, clipped to the zone.
    pub(super) fn block(&self, frame: Gfn) -> Option<FrameRange> {
        FrameRange::new(frame.block_start(), BLOCK_FRAMES)?.intersection(self.zone)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, count: u64) -> FrameRange {
        FrameRange::new(Gfn(start), count).unwrap()
    }

    #[test]
    fn only_differences_are_changed_and_in_the_longest_runs() {
        let mut map = PageMap::new(range(512, 1024));
        let mut runs = Vec::new();
        let mut go = |map: &mut PageMap, frames, want: &dyn Fn(Gfn) -> bool| {
            runs.clear();
            let log = |run: FrameRange, closed| {
                runs.push((run.start().0, run.count(), closed));
                Ok(())
            };
            map.apply(frames, want, log).unwrap();
            runs.clone()
        };
        assert_eq!(go(&mut map, range(512, 8), &|f| f.0 != 515), [(512, 3, true), (516, 4, true)]);
        assert_eq!(go(&mut map, range(512, 8), &|_| true), [(515, 1, true)]);
        assert_eq!(go(&mut map, range(512, 8), &|_| true), []);
        assert_eq!(map.borders(range(512, 8)), 2);
        assert_eq!(map.borders(range(514, 2)), 0);
        assert_eq!(go(&mut map, range(514, 2), &|_| false), [(514, 2, false)]);
        assert_eq!(map.borders(range(512, 8)), 4);
        assert!(map.is_closed(Gfn(512)) && !map.is_closed(Gfn(515)) && !map.is_closed(Gfn(0)));
    }

    #[test]
    fn a_failed_change_leaves_the_map_as_it_was() {
        let mut map = PageMap::new(range(0, 64));
        let fail = |_: FrameRange, _| Err(io::ErrorKind::OutOfMemory.into());
        let (run, closed, _) = map.apply(range(3, 4), |_| true, fail).unwrap_err();
        assert_eq!((run, closed), (range(3, 4), true));
        assert!(!map.is_closed(Gfn(3)));
    }
}
