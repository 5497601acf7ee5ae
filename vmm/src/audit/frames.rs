//! The host's own state of every zone frame: secret or not, open where, said to be zero or not.
//!
//! Nothing here is read back from the guest. The state of a pageblock is a few bits for each frame,
//! 64 frames to a word, so that a whole pageblock costs little more than a frame. The vectors are
//! zero at the start and touched only where something happens, so a large zone costs nothing until it
//! is used.

use lacuna_abi::addr::{BLOCK_FRAMES, FrameRange, Gfn};
use lacuna_abi::event::Life;
use lacuna_abi::layout::Layout;

/// Frames to a word.
const WORD: u64 = 64;
/// Pageblocks to a word.
const BLOCKS: usize = 64;
/// A bit for each frame of a pageblock.
type Bits = [u64; (BLOCK_FRAMES / WORD) as usize];
/// What is known of the frames of a pageblock.
type Block = [Bits; 6];

/// From the return of the seal call to the return of the release call.
const SECRET: usize = 0;
/// Open on some CPU: its count there is not zero.
const OPEN: usize = 1;
/// The seal completed since the frame was last open.
const COMPLETE: usize = 2;
/// Reported to be on an unmapped list.
const POOLED: usize = 3;
/// Reported to be on an unmapped list and zero.
const KNOWN_ZERO: usize = 4;
/// Handed out as zero, and not opened since.
const FIRST_OPEN: usize = 5;

/// State of every frame of the zone. Questions about frames outside are answered with "no".
#[derive(Clone, Debug)]
pub struct Frames {
    zone: FrameRange,
    blocks: Vec<Block>,
    /// A bit for each pageblock that may have a secret frame, or one on an unmapped list.
    some_secret: Vec<u64>,
    some_pooled: Vec<u64>,
    /// For each CPU, how often it has each frame open.
    opens: Vec<Vec<u8>>,
}

impl Frames {
    /// The state at the start: nothing is secret.
    #[must_use]
    pub fn new(layout: &Layout) -> Self {
        let zone = layout.zone_frames();
        let size = |parts: u64| usize::try_from(parts).unwrap_or(0);
        let blocks = zone.count().div_ceil(BLOCK_FRAMES);
        let block: Block = Default::default();
        Self {
            zone,
            blocks: vec![block; size(blocks)],
            some_secret: vec![0; size(blocks.div_ceil(WORD))],
            some_pooled: vec![0; size(blocks.div_ceil(WORD))],
            opens: (0..layout.cpus).map(|_| vec![0; size(zone.count())]).collect(),
        }
    }

    /// Whether the frame is secret.
    #[must_use]
    pub fn is_secret(&self, frame: Gfn) -> bool {
        self.has(frame, SECRET)
    }

    /// Whether any CPU has the frame open.
    #[must_use]
    pub fn is_open(&self, frame: Gfn) -> bool {
        self.has(frame, OPEN)
    }

    /// How often this CPU has the frame open.
    #[must_use]
    pub fn open_count(&self, frame: Gfn, cpu: u8) -> u8 {
        let opens = self.slot(frame).and_then(|slot| self.opens.get(usize::from(cpu))?.get(slot));
        opens.copied().unwrap_or(0)
    }

    /// Whether the second stage may deny the frame: it is secret and open on no CPU.
    #[must_use]
    pub fn may_close(&self, frame: Gfn) -> bool {
        self.is_secret(frame) && !self.is_open(frame)
    }

    /// Whether the second stage may deny all these frames.
    #[must_use]
    pub fn all_may_close(&self, frames: FrameRange) -> bool {
        self.zone.contains_range(frames)
            && self
                .words(frames)
                .all(|(block, word, mask)| sealed(&self.blocks[block], word) & mask == mask)
    }

    /// Number of secret frames in the range.
    #[must_use]
    pub fn secret_in(&self, frames: FrameRange) -> u64 {
        let count = |(block, word, mask): (usize, usize, u64)| {
            u64::from((self.blocks[block][SECRET][word] & mask).count_ones())
        };
        self.words(frames).map(count).sum()
    }

    /// First secret frame in the range for which `wanted` holds.
    pub(super) fn find_secret(
        &self,
        frames: FrameRange,
        wanted: impl Fn(Gfn) -> bool,
    ) -> Option<Gfn> {
        self.with(frames, SECRET).find(|frame| wanted(*frame))
    }

    /// First sealed frame in the range: secret, and open on no CPU.
    pub(super) fn find_sealed(&self, frames: FrameRange) -> Option<Gfn> {
        self.those(frames, sealed).next()
    }

    /// First frame in the range that a CPU has open.
    pub(super) fn find_open(&self, frames: FrameRange) -> Option<Gfn> {
        self.with(frames, OPEN).next()
    }

    /// The secret frames that are open nowhere, in order.
    pub(super) fn sealed(&self) -> impl Iterator<Item = Gfn> {
        self.secret_blocks().flat_map(move |block| self.those(block, sealed))
    }

    /// Pageblocks with secret frames, cut to the zone, in order.
    pub(super) fn secret_blocks(&self) -> impl Iterator<Item = FrameRange> {
        self.blocks_in(&self.some_secret)
    }

    /// The frames that were reported to be on an unmapped list and are not secret, in order.
    pub(super) fn pooled_but_ordinary(&self) -> impl Iterator<Item = Gfn> {
        let ordinary = |block: &Block, word: usize| block[POOLED][word] & !block[SECRET][word];
        self.blocks_in(&self.some_pooled).flat_map(move |block| self.those(block, ordinary))
    }

    /// The frames that were reported to be on an unmapped list and zero, in order.
    pub(super) fn known_zero(&self) -> impl Iterator<Item = Gfn> {
        self.blocks_in(&self.some_pooled).flat_map(|block| self.with(block, KNOWN_ZERO))
    }

    /// Secret frames that are sealed but not yet completed, in the pageblock of which this is a part,
    /// but not in the part. Most often there are none.
    pub(super) fn held_beside(&self, part: FrameRange) -> impl Iterator<Item = Gfn> {
        let block = FrameRange::new(part.start().block_start(), BLOCK_FRAMES);
        let held = |block: &Block, word: usize| sealed(block, word) & !block[COMPLETE][word];
        let held = self.those(block.unwrap_or(part), held);
        held.filter(move |frame| !part.contains(*frame))
    }

    /// Frames that were handed out as zero, and whose next open will be the first since.
    pub(super) fn due_for_first_open(&self, frames: FrameRange) -> impl Iterator<Item = Gfn> {
        self.with(frames, FIRST_OPEN)
    }

    /// Whether this CPU has all these frames open.
    pub(super) fn all_open(&self, frames: FrameRange, cpu: u8) -> bool {
        let counts = self.counts(frames, usize::from(cpu));
        counts.is_some_and(|counts| counts.iter().all(|count| *count > 0))
    }

    /// Whether this CPU could open all these frames once more.
    pub(super) fn has_room(&self, frames: FrameRange, cpu: u8) -> bool {
        let counts = self.counts(frames, usize::from(cpu));
        counts.is_none_or(|counts| counts.iter().all(|count| *count < u8::MAX))
    }

    /// Takes one open of this CPU back and makes the frames secret.
    pub(super) fn seal(&mut self, frames: FrameRange, cpu: u8) {
        let Some(frames) = frames.intersection(self.zone) else { return };
        if let Some(counts) = self.counts_mut(frames, usize::from(cpu)) {
            counts.iter_mut().for_each(|count| *count = count.saturating_sub(1));
        }
        for part in frames.by_block() {
            // All at once, so that whole words are taken: none is open on any CPU, mostly.
            let all = (0..self.opens.len()).filter_map(|cpu| self.counts(part, cpu));
            let some = all.fold(0, |some, counts| counts.iter().fold(some, |some, c| some | c));
            let open = |frame: Gfn| {
                (0..=u8::MAX).zip(&self.opens).any(|(cpu, _)| self.open_count(frame, cpu) > 0)
            };
            let open: Vec<Gfn> =
                if some == 0 { Vec::new() } else { part.iter().filter(|f| open(*f)).collect() };
            self.set(part, [(SECRET, true), (OPEN, false)]);
            open.into_iter().for_each(|frame| self.set(FrameRange::single(frame), [(OPEN, true)]));
        }
    }

    /// Counts one open of this CPU; the caller made sure that there is room for it.
    pub(super) fn open(&mut self, frames: FrameRange, cpu: u8) {
        let Some(counts) = self.counts_mut(frames, usize::from(cpu)) else { return };
        counts.iter_mut().for_each(|count| *count = count.saturating_add(1));
        self.set(frames, [(OPEN, true), (COMPLETE, false), (FIRST_OPEN, false)]);
    }

    /// Notes that the second stage denies the frames and that no translation to them is left.
    pub(super) fn complete(&mut self, frames: FrameRange) {
        self.set(frames, [(COMPLETE, true)]);
    }

    /// Whether the second stage denies all these frames since their last seal completed.
    pub(super) fn all_complete(&self, frames: FrameRange) -> bool {
        self.zone.contains_range(frames)
            && self
                .words(frames)
                .all(|(block, word, mask)| self.blocks[block][COMPLETE][word] & mask == mask)
    }

    /// Makes the frames ordinary again.
    pub(super) fn release(&mut self, frames: FrameRange) {
        self.set(frames, [(SECRET, false), (COMPLETE, false), (FIRST_OPEN, false)]);
    }

    /// Notes a step in the frames' life as the guest reports it.
    pub(super) fn note_life(&mut self, frames: FrameRange, life: Life) {
        let zero = life == Life::PooledZero;
        let pooled = zero || life == Life::Pooled;
        let first = life == Life::HandedOutZero;
        self.set(frames, [(POOLED, pooled), (KNOWN_ZERO, zero), (FIRST_OPEN, first)]);
    }

    fn has(&self, frame: Gfn, flag: usize) -> bool {
        self.words(FrameRange::single(frame))
            .any(|(block, word, mask)| self.blocks[block][flag][word] & mask != 0)
    }

    fn slot(&self, frame: Gfn) -> Option<usize> {
        let inside = self.zone.contains(frame);
        usize::try_from(frame.0.checked_sub(self.zone.start().0)?).ok().filter(|_| inside)
    }

    /// How often a CPU has each of these frames open; `None` if they do not all lie in the zone.
    fn counts(&self, frames: FrameRange, cpu: usize) -> Option<&[u8]> {
        let (first, last) = (self.slot(frames.start())?, self.slot(Gfn(frames.end().0 - 1))?);
        self.opens.get(cpu)?.get(first..=last)
    }

    fn counts_mut(&mut self, frames: FrameRange, cpu: usize) -> Option<&mut [u8]> {
        let (first, last) = (self.slot(frames.start())?, self.slot(Gfn(frames.end().0 - 1))?);
        self.opens.get_mut(cpu)?.get_mut(first..=last)
    }

    /// Sets or clears flags: the only place that does.
    fn set<const N: usize>(&mut self, frames: FrameRange, changes: [(usize, bool); N]) {
        for (block, word, mask) in words_of(self.zone, frames) {
            for (flag, value) in changes {
                let bits = &mut self.blocks[block][flag];
                bits[word] = if value { bits[word] | mask } else { bits[word] & !mask };
                let left = value || bits[word] != 0 || bits.iter().any(|word| *word != 0);
                let some = match flag {
                    SECRET => &mut self.some_secret,
                    POOLED => &mut self.some_pooled,
                    _ => continue,
                };
                let (some, bit) = (&mut some[block / BLOCKS], 1 << (block % BLOCKS));
                *some = if left { *some | bit } else { *some & !bit };
            }
        }
    }

    /// Frames of the range with this flag, in order.
    fn with(&self, frames: FrameRange, flag: usize) -> impl Iterator<Item = Gfn> {
        self.those(frames, move |block, word| block[flag][word])
    }

    /// Frames of the range whose bit is set in what `bits` says of a word of a pageblock.
    fn those(
        &self,
        frames: FrameRange,
        bits: impl Fn(&Block, usize) -> u64,
    ) -> impl Iterator<Item = Gfn> {
        let first = self.zone.start().0;
        self.words(frames).flat_map(move |(block, word, mask)| {
            let mut left = bits(&self.blocks[block], word) & mask;
            let base = first + block as u64 * BLOCK_FRAMES + word as u64 * WORD;
            std::iter::from_fn(move || {
                let bit = (left != 0).then(|| left.trailing_zeros())?;
                left &= left - 1;
                Some(Gfn(base + u64::from(bit)))
            })
        })
    }

    /// Pageblocks whose bit is set, cut to the zone.
    fn blocks_in(&self, some: &[u64]) -> impl Iterator<Item = FrameRange> {
        (0_u64..).zip(some).filter(|(_, bits)| **bits != 0).flat_map(move |(at, bits)| {
            let set = (0..WORD).filter(move |bit| bits >> bit & 1 != 0);
            set.filter_map(move |bit| {
                let start = self.zone.start().wrapping_add((at * WORD + bit) * BLOCK_FRAMES);
                FrameRange::new(start, BLOCK_FRAMES)?.intersection(self.zone)
            })
        })
    }

    fn words(&self, frames: FrameRange) -> impl Iterator<Item = (usize, usize, u64)> + use<> {
        words_of(self.zone, frames)
    }
}

/// Of a word of a pageblock the frames that are sealed: secret, and open on no CPU.
const fn sealed(block: &Block, word: usize) -> u64 {
    block[SECRET][word] & !block[OPEN][word]
}

/// The words that hold bits of these frames, as far as they lie in the zone: pageblock, word in it,
/// bits of the frames.
fn words_of(
    zone: FrameRange,
    frames: FrameRange,
) -> impl Iterator<Item = (usize, usize, u64)> + use<> {
    let inside = frames.intersection(zone);
    let (mut next, end) = inside.map_or((0, 0), |inside| {
        (inside.start().0 - zone.start().0, inside.end().0 - zone.start().0)
    });
    std::iter::from_fn(move || {
        if next >= end {
            return None;
        }
        let bit = next % WORD;
        let count = (WORD - bit).min(end - next);
        let mask = (u64::MAX >> (WORD - count)) << bit;
        let block = usize::try_from(next / BLOCK_FRAMES).ok()?;
        let word = usize::try_from(next % BLOCK_FRAMES / WORD).ok()?;
        next += count;
        Some((block, word, mask))
    })
}

/// Joins consecutive frames of one pageblock: one finding names them all.
pub(super) fn runs(frames: impl Iterator<Item = Gfn>) -> impl Iterator<Item = FrameRange> {
    let mut frames = frames.peekable();
    std::iter::from_fn(move || {
        let first = frames.next()?;
        let mut count = 1;
        while frames
            .next_if(|next| next.0 == first.0 + count && next.block_start() == first.block_start())
            .is_some()
        {
            count += 1;
        }
        FrameRange::new(first, count)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_abi::layout::Needs;

    fn frames() -> (Frames, FrameRange) {
        let needs = Needs { image: 1, memory_mib: 16, cpus: 2, input: 0, scratch: 0 };
        let layout = Layout::new(&needs).unwrap();
        (Frames::new(&layout), layout.zone_frames())
    }

    fn one(frame: Gfn) -> FrameRange {
        FrameRange::single(frame)
    }

    #[test]
    fn a_frame_may_be_closed_once_every_cpu_has_sealed_it_as_often_as_it_opened_it() {
        let (mut frames, zone) = frames();
        let frame = zone.start();
        frames.seal(one(frame), 0);
        assert!(frames.may_close(frame));
        frames.open(one(frame), 0);
        frames.open(one(frame), 1);
        frames.open(one(frame), 1);
        frames.seal(one(frame), 1);
        frames.seal(one(frame), 0);
        assert!(!frames.may_close(frame));
        frames.seal(one(frame), 1);
        assert!(frames.may_close(frame));
        frames.release(one(frame));
        assert!(!frames.may_close(frame) && !frames.is_secret(frame));
    }

    #[test]
    fn block_counts_agree_with_the_frames() {
        let (mut frames, zone) = frames();
        let block = FrameRange::new(zone.start(), BLOCK_FRAMES).unwrap();
        frames.seal(block, 0);
        assert_eq!(frames.secret_in(zone), BLOCK_FRAMES);
        assert!(frames.all_may_close(block));
        let last = Gfn(block.end().0 - 1);
        frames.open(one(last), 1);
        assert!(!frames.all_may_close(block));
        frames.seal(one(last), 1);
        frames.release(one(last));
        assert!(!frames.all_may_close(block));
        assert_eq!(frames.secret_in(block), BLOCK_FRAMES - 1);
        assert_eq!(frames.sealed().count(), 511);
    }

    #[test]
    fn held_frames_are_those_whose_seal_did_not_complete() {
        let (mut frames, zone) = frames();
        let frame = zone.start();
        frames.seal(one(frame), 0);
        frames.seal(one(frame.wrapping_add(1)), 0);
        frames.complete(one(frame));
        let beside = |frames: &Frames, at: Gfn| -> Vec<_> { frames.held_beside(one(at)).collect() };
        assert_eq!(beside(&frames, frame), [frame.wrapping_add(1)]);
        // Its own frame is not beside it.
        assert_eq!(beside(&frames, frame.wrapping_add(1)), []);
        frames.release(one(frame));
        frames.seal(one(frame), 0);
        assert_eq!(beside(&frames, frame.wrapping_add(1)), [frame]);
        assert_eq!(beside(&frames, frame.wrapping_add(2)).len(), 2);
    }

    #[test]
    fn runs_join_consecutive_frames_of_one_block() {
        let frames = [5, 6, 8, 510, 511, 512].map(Gfn);
        let joined: Vec<_> = runs(frames.into_iter()).map(|r| (r.start().0, r.count())).collect();
        assert_eq!(joined, [(5, 2), (8, 1), (510, 2), (512, 1)]);
    }

    #[test]
    fn ranges_touch_their_own_frames_only() {
        let (mut frames, zone) = frames();
        for (first, count) in [(0, 1), (63, 2), (64, 64), (500, 600), (1, 1023), (512, 512)] {
            let range = FrameRange::new(Gfn(zone.start().0 + first), count).unwrap();
            frames.seal(range, 0);
            assert_eq!(frames.secret_in(zone), count);
            assert!(frames.sealed().eq(range.iter()));
            assert!(frames.all_may_close(range));
            frames.open(range, 1);
            assert!(frames.all_open(range, 1) && !frames.all_open(range, 0));
            let middle = one(range.start().wrapping_add(count / 2));
            frames.seal(middle, 1);
            assert!(!frames.all_open(range, 1));
            assert_eq!(frames.all_may_close(range), count == 1);
            assert!(frames.all_may_close(middle));
            frames.seal(range, 1);
            assert!(frames.all_may_close(range));
            frames.release(range);
            assert_eq!(frames.secret_blocks().count(), 0);
        }
    }

    #[test]
    fn steps_of_life_replace_each_other() {
        let (mut frames, zone) = frames();
        let range = FrameRange::new(zone.start().wrapping_add(7), 3).unwrap();
        frames.note_life(range, Life::PooledZero);
        assert!(frames.known_zero().eq(range.iter()));
        assert!(frames.pooled_but_ordinary().eq(range.iter()));
        frames.note_life(range, Life::Pooled);
        assert_eq!(frames.known_zero().count(), 0);
        assert!(frames.pooled_but_ordinary().eq(range.iter()));
        frames.note_life(range, Life::HandedOutZero);
        assert_eq!(frames.pooled_but_ordinary().count(), 0);
        assert!(frames.due_for_first_open(zone).eq(range.iter()));
        frames.seal(range, 0);
        frames.open(one(range.start()), 0);
        assert_eq!(frames.due_for_first_open(zone).count(), 2);
        frames.note_life(range, Life::HandedOut);
        assert_eq!(frames.due_for_first_open(zone).count(), 0);
    }

    #[test]
    fn frames_outside_the_zone_are_never_anything() {
        let (mut frames, zone) = frames();
        for frame in [Gfn(0), zone.end(), Gfn(u64::MAX)] {
            frames.seal(one(frame), 0);
            frames.open(one(frame), 0);
            assert!(!frames.is_secret(frame) && !frames.is_open(frame));
        }
        frames.open(one(zone.start()), 200);
        assert!(!frames.is_open(zone.start()));
    }
}
