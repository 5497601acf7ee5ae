//! The host's own state of every zone frame: secret or not, open where, said to be zero or not.
//!
//! Nothing here is read back from the guest. The state is a few bits for each frame, 64 frames to a
//! word, so that a whole pageblock costs little more than a frame; the words of the same 64 frames
//! lie together, so that a frame costs one line of the cache. The vectors are zero at the start and
//! touched only where something happens, so a large zone costs nothing until it is used.

mod counts;
#[cfg(test)]
mod tests;
mod words;

pub(in crate::audit) use words::runs;

use counts::Counts;
use lacuna_abi::addr::{BLOCK_FRAMES, FrameRange, Gfn};
use lacuna_abi::event::Life;
use lacuna_abi::layout::Layout;
use words::{WORD, Words, bits};

/// Words to a pageblock.
const BLOCK_WORDS: usize = (BLOCK_FRAMES / WORD) as usize;
/// Pageblocks to a word.
const BLOCKS: usize = 64;
/// What is known of 64 frames: a word for each flag.
type Flags = [u64; 6];

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
    flags: Vec<Flags>,
    /// A bit for each pageblock that may have a secret frame, or one on an unmapped list.
    some_secret: Vec<u64>,
    some_pooled: Vec<u64>,
    /// How often each CPU has each frame open.
    opens: Counts,
}

impl Frames {
    /// The state at the start: nothing is secret.
    #[must_use]
    pub fn new(layout: &Layout) -> Self {
        let zone = layout.zone_frames();
        let size = |parts: u64| usize::try_from(parts).unwrap_or(0);
        let words = size(zone.count().div_ceil(BLOCK_FRAMES)) * BLOCK_WORDS;
        let blocks = words.div_ceil(BLOCK_WORDS * BLOCKS);
        Self {
            zone,
            flags: vec![[0; 6]; words],
            some_secret: vec![0; blocks],
            some_pooled: vec![0; blocks],
            opens: Counts::new(layout.cpus, words),
        }
    }

    /// Whether the frame is secret.
    #[must_use]
    pub fn is_secret(&self, frame: Gfn) -> bool {
        self.some(FrameRange::single(frame), |flags| flags[SECRET])
    }

    /// Whether any CPU has the frame open.
    #[must_use]
    pub fn is_open(&self, frame: Gfn) -> bool {
        self.some(FrameRange::single(frame), |flags| flags[OPEN])
    }

    /// How often this CPU has the frame open.
    #[must_use]
    pub fn open_count(&self, frame: Gfn, cpu: u8) -> u8 {
        let mut at = self.words(FrameRange::single(frame));
        at.next().map_or(0, |at| self.opens.of(at, cpu))
    }

    /// Whether the second stage may deny the frame: it is secret and open on no CPU.
    #[must_use]
    pub fn may_close(&self, frame: Gfn) -> bool {
        self.some(FrameRange::single(frame), sealed)
    }

    /// Whether the second stage may deny all these frames.
    #[must_use]
    pub fn all_may_close(&self, frames: FrameRange) -> bool {
        self.all(frames, sealed)
    }

    /// Number of secret frames in the range.
    #[must_use]
    pub fn secret_in(&self, frames: FrameRange) -> u64 {
        let count = |(at, mask): (usize, u64)| (self.flags[at][SECRET] & mask).count_ones();
        self.words(frames).map(|word| u64::from(count(word))).sum()
    }

    /// The frames of the zone.
    pub(super) const fn zone(&self) -> FrameRange {
        self.zone
    }

    /// Whether any of these frames is secret.
    pub(super) fn some_secret(&self, frames: FrameRange) -> bool {
        self.some(frames, |flags| flags[SECRET])
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
        let ordinary = |flags: &Flags| flags[POOLED] & !flags[SECRET];
        self.blocks_in(&self.some_pooled).flat_map(move |block| self.those(block, ordinary))
    }

    /// The frames that were reported to be on an unmapped list and zero, in order.
    pub(super) fn known_zero(&self) -> impl Iterator<Item = Gfn> {
        self.blocks_in(&self.some_pooled).flat_map(|block| self.with(block, KNOWN_ZERO))
    }

    /// Secret frames that are sealed but not yet completed, in the pageblock of which this is a part,
    /// but not in the part. Most often there are none.
    pub(super) fn held_beside(&self, part: FrameRange) -> impl Iterator<Item = Gfn> {
        let block = FrameRange::new(part.start().block_start(), BLOCK_FRAMES).unwrap_or(part);
        let held = |flags: &Flags| sealed(flags) & !flags[COMPLETE];
        self.those(block, held).filter(move |frame| !part.contains(*frame))
    }

    /// Whether there may be any such frame in the pageblock of this one.
    pub(super) fn some_held(&self, frame: Gfn) -> bool {
        let first = Words::of(self.zone, FrameRange::single(frame)).next();
        let block = first.map_or(0, |(at, _)| at / BLOCK_WORDS) * BLOCK_WORDS;
        let flags = self.flags.get(block..block + BLOCK_WORDS).unwrap_or_default();
        flags.iter().fold(0, |some, flags| some | sealed(flags) & !flags[COMPLETE]) != 0
    }

    /// Frames that were handed out as zero, and whose next open will be the first since.
    pub(super) fn due_for_first_open(&self, frames: FrameRange) -> impl Iterator<Item = Gfn> {
        self.with(frames, FIRST_OPEN)
    }

    /// Whether they all are.
    pub(super) fn all_due_for_first_open(&self, frames: FrameRange) -> bool {
        self.all(frames, |flags| flags[FIRST_OPEN])
    }

    /// Whether all these frames are secret and open on this CPU.
    pub(super) fn all_secret_and_open(&self, frames: FrameRange, cpu: u8) -> bool {
        let all = |at: usize| self.flags[at][SECRET] & self.opens.some(at, cpu);
        self.zone.contains_range(frames)
            && self.words(frames).all(|(at, mask)| all(at) & mask == mask)
    }

    /// Whether there are any.
    pub(super) fn some_due_for_first_open(&self, frames: FrameRange) -> bool {
        self.some(frames, |flags| flags[FIRST_OPEN])
    }

    /// Whether this CPU could open all these frames once more.
    pub(super) fn has_room(&self, frames: FrameRange, cpu: u8) -> bool {
        self.words(frames).all(|word| self.opens.has_room(word, cpu))
    }

    /// Takes one open of this CPU back and makes the frames secret.
    pub(super) fn seal(&mut self, frames: FrameRange, cpu: u8) {
        for (at, mask) in self.words(frames) {
            self.opens.take((at, mask), cpu);
            let open = self.opens.anywhere(at) & mask;
            let flags = &mut self.flags[at];
            flags[OPEN] = flags[OPEN] & !mask | open;
            flags[SECRET] |= mask;
            note(&mut self.some_secret, at);
        }
    }

    /// Counts one open of this CPU; the caller made sure that there is room for it.
    pub(super) fn open(&mut self, frames: FrameRange, cpu: u8) {
        if !self.zone.contains_range(frames) || !self.opens.knows(cpu) {
            return;
        }
        for (at, mask) in self.words(frames) {
            self.opens.add((at, mask), cpu);
            let flags = &mut self.flags[at];
            flags[OPEN] |= mask;
            flags[COMPLETE] &= !mask;
            flags[FIRST_OPEN] &= !mask;
        }
    }

    /// Notes that the second stage denies the frames and that no translation to them is left.
    pub(super) fn complete(&mut self, frames: FrameRange) {
        for (at, mask) in self.words(frames) {
            self.flags[at][COMPLETE] |= mask;
        }
    }

    /// Whether the second stage denies all these frames since their last seal completed.
    pub(super) fn all_complete(&self, frames: FrameRange) -> bool {
        self.all(frames, |flags| flags[COMPLETE])
    }

    /// Makes the frames ordinary again.
    pub(super) fn release(&mut self, frames: FrameRange) {
        for (at, mask) in self.words(frames) {
            let flags = &mut self.flags[at];
            flags[COMPLETE] &= !mask;
            flags[FIRST_OPEN] &= !mask;
            self.clear(at, mask, SECRET);
        }
    }

    /// Notes a step in the frames' life as the guest reports it.
    pub(super) fn note_life(&mut self, frames: FrameRange, life: Life) {
        let zero = life == Life::PooledZero;
        let pooled = zero || life == Life::Pooled;
        let first = life == Life::HandedOutZero;
        let put = |old: u64, mask: u64, value: bool| if value { old | mask } else { old & !mask };
        for (at, mask) in self.words(frames) {
            let flags = &mut self.flags[at];
            flags[KNOWN_ZERO] = put(flags[KNOWN_ZERO], mask, zero);
            flags[FIRST_OPEN] = put(flags[FIRST_OPEN], mask, first);
            if pooled {
                flags[POOLED] |= mask;
                note(&mut self.some_pooled, at);
            } else {
                self.clear(at, mask, POOLED);
            }
        }
    }

    /// Clears one of the two flags of which it is noted which pageblocks may have it.
    #[inline]
    fn clear(&mut self, at: usize, mask: u64, flag: usize) {
        let word = &mut self.flags[at][flag];
        if *word & mask == 0 {
            return;
        }
        *word &= !mask;
        if *word != 0 {
            return;
        }
        let block = at / BLOCK_WORDS;
        let words = &self.flags[block * BLOCK_WORDS..(block + 1) * BLOCK_WORDS];
        if words.iter().all(|flags| flags[flag] == 0) {
            let some = if flag == SECRET { &mut self.some_secret } else { &mut self.some_pooled };
            some[block / BLOCKS] &= !(1 << (block % BLOCKS));
        }
    }

    /// Whether all the frames lie in the zone and have their bit in what `wanted` says of a word.
    #[inline]
    fn all(&self, frames: FrameRange, wanted: impl Fn(&Flags) -> u64) -> bool {
        self.zone.contains_range(frames)
            && self.words(frames).all(|(at, mask)| wanted(&self.flags[at]) & mask == mask)
    }

    /// Whether any of the frames has.
    #[inline]
    fn some(&self, frames: FrameRange, wanted: impl Fn(&Flags) -> u64) -> bool {
        self.words(frames).any(|(at, mask)| wanted(&self.flags[at]) & mask != 0)
    }

    /// Frames of the range with this flag, in order.
    fn with(&self, frames: FrameRange, flag: usize) -> impl Iterator<Item = Gfn> {
        self.those(frames, move |flags| flags[flag])
    }

    /// Frames of the range whose bit is set in what `wanted` says of a word.
    fn those(
        &self,
        frames: FrameRange,
        wanted: impl Fn(&Flags) -> u64,
    ) -> impl Iterator<Item = Gfn> {
        let first = self.zone.start().0;
        self.words(frames).flat_map(move |(at, mask)| {
            let base = first + at as u64 * WORD;
            bits(wanted(&self.flags[at]) & mask).map(move |bit| Gfn(base + bit))
        })
    }

    /// Pageblocks whose bit is set, cut to the zone.
    fn blocks_in(&self, some: &[u64]) -> impl Iterator<Item = FrameRange> {
        (0_u64..).zip(some).flat_map(move |(at, word)| {
            bits(*word).filter_map(move |bit| {
                let start = self.zone.start().wrapping_add((at * WORD + bit) * BLOCK_FRAMES);
                FrameRange::new(start, BLOCK_FRAMES)?.intersection(self.zone)
            })
        })
    }

    #[inline]
    fn words(&self, frames: FrameRange) -> Words {
        Words::of(self.zone, frames)
    }
}

/// Of 64 frames those that are sealed: secret, and open on no CPU.
const fn sealed(flags: &Flags) -> u64 {
    flags[SECRET] & !flags[OPEN]
}

/// Notes that the pageblock of a word may have frames with a flag.
#[inline]
fn note(some: &mut [u64], at: usize) {
    let block = at / BLOCK_WORDS;
    some[block / BLOCKS] |= 1 << (block % BLOCKS);
}
