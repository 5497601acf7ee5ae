//! The host's own state of every zone frame: secret or not, open where, said to be zero or not.
//!
//! Nothing here is read back from the guest. The vectors are zero at the start and touched only
//! where something happens, so a large zone costs nothing until it is used.

use lacuna_abi::addr::{BLOCK_FRAMES, FrameRange, Gfn};
use lacuna_abi::event::Life;
use lacuna_abi::layout::Layout;

/// From the return of the seal call to the return of the release call.
const SECRET: u8 = 1 << 0;
/// Open on some CPU: its count there is not zero.
const OPEN: u8 = 1 << 1;
/// The seal completed since the frame was last open.
const COMPLETE: u8 = 1 << 2;
/// Reported to be on an unmapped list.
const POOLED: u8 = 1 << 3;
/// Reported to be on an unmapped list and zero.
const KNOWN_ZERO: u8 = 1 << 4;
/// Handed out as zero, and not opened since.
const FIRST_OPEN: u8 = 1 << 5;

/// How many frames of a pageblock are in a state, so that whole blocks are judged at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Counts {
    secret: u16,
    open: u16,
    pooled: u16,
    held: u16,
}

impl Counts {
    /// What one frame with these flags contributes to its block.
    fn of(flags: u8) -> Self {
        let is = |all: u8, none: u8| u16::from(flags & all == all && flags & none == 0);
        Self {
            secret: is(SECRET, 0),
            open: is(OPEN, 0),
            pooled: is(POOLED, 0),
            held: is(SECRET, OPEN | COMPLETE),
        }
    }
}

/// State of every frame of the zone. Questions about frames outside are answered with "no".
#[derive(Clone, Debug)]
pub struct Frames {
    zone: FrameRange,
    cpus: usize,
    flags: Vec<u8>,
    opens: Vec<u8>,
    blocks: Vec<Counts>,
}

impl Frames {
    /// The state at the start: nothing is secret.
    #[must_use]
    pub fn new(layout: &Layout) -> Self {
        let zone = layout.zone_frames();
        let count = usize::try_from(zone.count()).unwrap_or(0);
        let blocks = usize::try_from(zone.count().div_ceil(BLOCK_FRAMES)).unwrap_or(0);
        Self {
            zone,
            cpus: layout.cpus,
            flags: vec![0; count],
            opens: vec![0; count * layout.cpus],
            blocks: vec![Counts::default(); blocks],
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
        self.open_slot(frame, cpu).map_or(0, |slot| self.opens[slot])
    }

    /// Whether the second stage may deny the frame: it is secret and open on no CPU.
    #[must_use]
    pub fn may_close(&self, frame: Gfn) -> bool {
        self.is_secret(frame) && !self.is_open(frame)
    }

    /// Whether the second stage may deny all these frames; quick where they are whole pageblocks.
    #[must_use]
    pub fn all_may_close(&self, frames: FrameRange) -> bool {
        self.zone.contains_range(frames)
            && frames.by_block().all(|part| match self.block(part.start()) {
                Some(c) if u64::from(c.secret) == BLOCK_FRAMES && c.open == 0 => true,
                Some(c) if c.secret == 0 => false,
                _ => part.iter().all(|frame| self.may_close(frame)),
            })
    }

    /// Number of secret frames in the range; quick where they are whole pageblocks.
    #[must_use]
    pub fn secret_in(&self, frames: FrameRange) -> u64 {
        let Some(frames) = frames.intersection(self.zone) else { return 0 };
        let count = |part: FrameRange| match self.block(part.start()) {
            Some(c) if c.secret == 0 => 0,
            Some(c) if part.count() == BLOCK_FRAMES => u64::from(c.secret),
            _ => part.iter().map(|frame| u64::from(self.is_secret(frame))).sum(),
        };
        frames.by_block().map(count).sum()
    }

    /// First secret frame in the range for which `wanted` holds.
    pub(super) fn find_secret(
        &self,
        frames: FrameRange,
        wanted: impl Fn(Gfn) -> bool,
    ) -> Option<Gfn> {
        self.in_blocks(frames, |c| c.secret > 0, SECRET).find(|frame| wanted(*frame))
    }

    /// First sealed frame in the range: secret, and open on no CPU.
    pub(super) fn find_sealed(&self, frames: FrameRange) -> Option<Gfn> {
        let mut secret = self.in_blocks(frames, |c| c.secret > c.open, SECRET);
        secret.find(|frame| !self.has(*frame, OPEN))
    }

    /// First frame in the range that a CPU has open.
    pub(super) fn find_open(&self, frames: FrameRange) -> Option<Gfn> {
        self.in_blocks(frames, |c| c.open > 0, OPEN).next()
    }

    /// The secret frames, in order.
    pub(super) fn secret(&self) -> impl Iterator<Item = Gfn> {
        self.in_blocks(self.zone, |c| c.secret > 0, SECRET)
    }

    /// The frames that were reported to be on an unmapped list, in order.
    pub(super) fn pooled(&self) -> impl Iterator<Item = Gfn> {
        self.in_blocks(self.zone, |c| c.pooled > 0, POOLED)
    }

    /// Secret frames that are sealed but not yet completed, in the pageblock of which this is a part,
    /// but not in the part. Most often there are none.
    pub(super) fn held_beside(&self, part: FrameRange) -> impl Iterator<Item = Gfn> {
        let start = part.start();
        let own = part.iter().filter(|frame| self.is_held(*frame)).count();
        let block = FrameRange::new(start.block_start(), BLOCK_FRAMES);
        let block = block.unwrap_or(FrameRange::single(start));
        self.in_blocks(block, move |c| usize::from(c.held) > own, SECRET)
            .filter(move |frame| self.is_held(*frame) && !part.contains(*frame))
    }

    fn is_held(&self, frame: Gfn) -> bool {
        self.has(frame, SECRET) && !self.has(frame, OPEN) && !self.has(frame, COMPLETE)
    }

    /// Whether the frame was handed out as zero and this will be its first open since.
    pub(super) fn first_open_is_due(&self, frame: Gfn) -> bool {
        self.has(frame, FIRST_OPEN)
    }

    /// Whether the frame was reported to be on an unmapped list and zero.
    pub(super) fn is_known_zero(&self, frame: Gfn) -> bool {
        self.has(frame, KNOWN_ZERO)
    }

    /// Takes one open of this CPU back and makes the frame secret.
    pub(super) fn seal(&mut self, frame: Gfn, cpu: u8) {
        if let Some(slot) = self.open_slot(frame, cpu) {
            self.opens[slot] = self.opens[slot].saturating_sub(1);
        }
        let open = (0..self.cpus)
            .any(|c| u8::try_from(c).is_ok_and(|cpu| self.open_count(frame, cpu) > 0));
        self.update(frame, |flags| {
            *flags |= SECRET;
            if !open {
                *flags &= !OPEN;
            }
        });
    }

    /// Counts one open of this CPU; the caller made sure that there is room for it.
    pub(super) fn open(&mut self, frame: Gfn, cpu: u8) {
        if let Some(slot) = self.open_slot(frame, cpu) {
            self.opens[slot] = self.opens[slot].saturating_add(1);
            self.update(frame, |flags| *flags = (*flags | OPEN) & !(COMPLETE | FIRST_OPEN));
        }
    }

    /// Notes that the second stage denies the frame and that no translation to it is left.
    pub(super) fn complete(&mut self, frame: Gfn) {
        self.update(frame, |flags| *flags |= COMPLETE);
    }

    /// Whether the second stage denies the frame since its last seal completed.
    pub(super) fn is_complete(&self, frame: Gfn) -> bool {
        self.has(frame, COMPLETE)
    }

    /// Makes the frame ordinary again.
    pub(super) fn release(&mut self, frame: Gfn) {
        self.update(frame, |flags| *flags &= !(SECRET | COMPLETE | FIRST_OPEN));
    }

    /// Notes a step in the frame's life as the guest reports it.
    pub(super) fn note_life(&mut self, frame: Gfn, life: Life) {
        const LIFE: u8 = POOLED | KNOWN_ZERO | FIRST_OPEN;
        let set = match life {
            Life::Pooled => POOLED,
            Life::PooledZero => POOLED | KNOWN_ZERO,
            Life::HandedOutZero => FIRST_OPEN,
            Life::HandedOut
            | Life::Freed
            | Life::Unpooled
            | Life::TableAllocated
            | Life::TableFreed => 0,
        };
        self.update(frame, |flags| *flags = *flags & !LIFE | set);
    }

    fn has(&self, frame: Gfn, flag: u8) -> bool {
        self.slot(frame).is_some_and(|slot| self.flags[slot] & flag != 0)
    }

    fn slot(&self, frame: Gfn) -> Option<usize> {
        let offset = frame.0.checked_sub(self.zone.start().0)?;
        usize::try_from(offset).ok().filter(|slot| *slot < self.flags.len())
    }

    fn open_slot(&self, frame: Gfn, cpu: u8) -> Option<usize> {
        let cpu = usize::from(cpu);
        self.slot(frame).filter(|_| cpu < self.cpus).map(|slot| slot * self.cpus + cpu)
    }

    fn block(&self, frame: Gfn) -> Option<Counts> {
        let offset = frame.0.checked_sub(self.zone.start().0)?;
        self.blocks.get(usize::try_from(offset / BLOCK_FRAMES).ok()?).copied()
    }

    /// Changes a frame's flags and keeps its block's counts in step: the only place that does.
    fn update(&mut self, frame: Gfn, change: impl FnOnce(&mut u8)) {
        let Some(slot) = self.slot(frame) else { return };
        let before = Counts::of(self.flags[slot]);
        change(&mut self.flags[slot]);
        let after = Counts::of(self.flags[slot]);
        let frames_per_block = usize::try_from(BLOCK_FRAMES).unwrap_or(usize::MAX);
        let Some(block) = self.blocks.get_mut(slot / frames_per_block) else { return };
        block.secret = block.secret + after.secret - before.secret;
        block.open = block.open + after.open - before.open;
        block.pooled = block.pooled + after.pooled - before.pooled;
        block.held = block.held + after.held - before.held;
    }

    /// Frames with `flag` in those blocks of the range whose counts are `interesting`.
    fn in_blocks(
        &self,
        frames: FrameRange,
        interesting: impl Fn(Counts) -> bool,
        flag: u8,
    ) -> impl Iterator<Item = Gfn> {
        frames
            .intersection(self.zone)
            .into_iter()
            .flat_map(FrameRange::by_block)
            .filter(move |part| self.block(part.start()).is_some_and(&interesting))
            .flat_map(FrameRange::iter)
            .filter(move |frame| self.has(*frame, flag))
    }
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

    #[test]
    fn a_frame_may_be_closed_once_every_cpu_has_sealed_it_as_often_as_it_opened_it() {
        let (mut frames, zone) = frames();
        let frame = zone.start();
        frames.seal(frame, 0);
        assert!(frames.may_close(frame));
        frames.open(frame, 0);
        frames.open(frame, 1);
        frames.open(frame, 1);
        frames.seal(frame, 1);
        frames.seal(frame, 0);
        assert!(!frames.may_close(frame));
        frames.seal(frame, 1);
        assert!(frames.may_close(frame));
        frames.release(frame);
        assert!(!frames.may_close(frame) && !frames.is_secret(frame));
    }

    #[test]
    fn block_counts_agree_with_the_frames() {
        let (mut frames, zone) = frames();
        let block = FrameRange::new(zone.start(), BLOCK_FRAMES).unwrap();
        block.iter().for_each(|frame| frames.seal(frame, 0));
        assert_eq!(frames.secret_in(zone), BLOCK_FRAMES);
        assert!(frames.all_may_close(block));
        let last = Gfn(block.end().0 - 1);
        frames.open(last, 1);
        assert!(!frames.all_may_close(block));
        frames.seal(last, 1);
        frames.release(last);
        assert!(!frames.all_may_close(block));
        assert_eq!(frames.secret_in(block), BLOCK_FRAMES - 1);
        assert_eq!(frames.secret().count(), 511);
    }

    #[test]
    fn held_frames_are_those_whose_seal_did_not_complete() {
        let (mut frames, zone) = frames();
        let frame = zone.start();
        frames.seal(frame, 0);
        frames.seal(frame.wrapping_add(1), 0);
        frames.complete(frame);
        let beside = |frames: &Frames, at: Gfn| -> Vec<_> {
            frames.held_beside(FrameRange::single(at)).collect()
        };
        assert_eq!(beside(&frames, frame), [frame.wrapping_add(1)]);
        // Its own frame is not beside it.
        assert_eq!(beside(&frames, frame.wrapping_add(1)), []);
        frames.release(frame);
        frames.seal(frame, 0);
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
    fn frames_outside_the_zone_are_never_anything() {
        let (mut frames, zone) = frames();
        for frame in [Gfn(0), zone.end(), Gfn(u64::MAX)] {
            frames.seal(frame, 0);
            frames.open(frame, 0);
            assert!(!frames.is_secret(frame) && !frames.is_open(frame));
        }
        frames.open(zone.start(), 200);
        assert!(!frames.is_open(zone.start()));
    }
}
