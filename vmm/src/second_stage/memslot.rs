//! `memslot`: a sealed pageblock has no memory slot.
//!
//! The zone starts as one slot. Closing a block splits the slot that holds it: delete, then create
//! what remains on either side, which is not atomic, so that no vCPU may run meanwhile. A block
//! that opens gets a slot of its own; adjacent slots are merged when there are too many. When KVM has
//! no more slots, blocks stay open rather than fail: a seal then does not complete, and says so.

use super::pagemap::PageMap;
use super::{SecondStage, SecondStageError};
use lacuna_abi::addr::{BLOCK_FRAMES, BLOCK_SIZE, FrameRange, Gfn};
use std::collections::BTreeMap;
use std::io;

/// Slots that are kept for opening: a split needs one more, and opening must not fail.
const RESERVE: usize = 4;

/// What the back end needs of KVM: set the memory behind a slot, or none.
pub trait Slots: Send {
    /// Makes `slot` cover `frames`, or nothing.
    ///
    /// # Errors
    /// What KVM says.
    fn set(&mut self, slot: u32, frames: Option<FrameRange>) -> io::Result<()>;
}

/// The `memslot` back end.
pub struct MemSlot<S> {
    slots: S,
    map: PageMap,
    /// Slots by the number of their first frame.
    covered: BTreeMap<u64, (FrameRange, u32)>,
    free: Vec<u32>,
    next: u32,
    limit: u32,
}

impl<S: Slots> MemSlot<S> {
    /// Takes over the zone, which slot `first` covers as a whole. Slots from `first` on, `limit` of
    /// them, belong to the back end.
    #[must_use]
    pub fn new(slots: S, zone: FrameRange, first: u32, limit: u32) -> Self {
        let covered = BTreeMap::from([(zone.start().0, (zone, first))]);
        let map = PageMap::new(zone);
        Self { slots, map, covered, free: Vec::new(), next: first + 1, limit: first + limit }
    }

    fn add(&mut self, frames: FrameRange) -> io::Result<()> {
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None if self.next < self.limit => {
                self.next += 1;
                self.next - 1
            }
            None => return Err(io::Error::other("KVM has no memory slots left")),
        };
        self.slots.set(slot, Some(frames))?;
        self.covered.insert(frames.start().0, (frames, slot));
        Ok(())
    }

    /// Deletes the slot that starts at this frame.
    fn remove(&mut self, start: u64) -> io::Result<()> {
        if let Some((_, slot)) = self.covered.remove(&start) {
            self.slots.set(slot, None)?;
            self.free.push(slot);
        }
        Ok(())
    }

    /// Slots that can still be made, after merging if there are few.
    fn available(&mut self) -> io::Result<usize> {
        let count = |stage: &Self| {
            stage.free.len() + usize::try_from(stage.limit - stage.next).unwrap_or(0)
        };
        if count(self) < RESERVE {
            self.merge()?;
        }
        Ok(count(self))
    }

    /// Takes the memory of `run` away.
    fn close(&mut self, run: FrameRange) -> io::Result<()> {
        while let Some((frames, _)) = self
            .covered
            .range(..run.end().0)
            .next_back()
            .map(|(_, slot)| *slot)
            .filter(|(frames, _)| frames.intersection(run).is_some())
        {
            self.remove(frames.start().0)?;
            let left = run.start().0.saturating_sub(frames.start().0);
            let right = frames.end().0.saturating_sub(run.end().0);
            if let Some(rest) = FrameRange::new(frames.start(), left) {
                self.add(rest)?;
            }
            if let Some(rest) = FrameRange::new(run.end(), right) {
                self.add(rest)?;
            }
        }
        Ok(())
    }

    /// Gives `run`, which no slot covers, its memory back; the frames that got it. Without a slot to
    /// spare the slot before or behind it grows, and what lies between is opened with it.
    fn open(&mut self, run: FrameRange) -> io::Result<FrameRange> {
        if self.available()? > 0 {
            self.add(run)?;
            return Ok(run);
        }
        let before = self.covered.range(..run.start().0).next_back();
        let behind = self.covered.range(run.end().0..).next();
        let (frames, start) = match (before, behind) {
            (Some((_, (frames, _))), _) => {
                (FrameRange::new(frames.start(), run.end().0 - frames.start().0), frames.start())
            }
            (None, Some((_, (frames, _)))) => {
                (FrameRange::new(run.start(), frames.end().0 - run.start().0), frames.start())
            }
            (None, None) => return Err(io::Error::other("KVM has no memory slots left")),
        };
        let frames = frames.ok_or(io::ErrorKind::InvalidInput)?;
        self.remove(start.0)?;
        self.add(frames)?;
        Ok(frames)
    }

    /// Makes one slot of each run of adjacent ones.
    fn merge(&mut self) -> io::Result<()> {
        let all: Vec<_> = self.covered.values().map(|(frames, _)| *frames).collect();
        let mut runs: Vec<FrameRange> = Vec::new();
        for frames in all {
            match runs.last_mut() {
                Some(last) if last.end() == frames.start() => {
                    if let Some(longer) =
                        FrameRange::new(last.start(), last.count() + frames.count())
                    {
                        *last = longer;
                    }
                }
                _ => runs.push(frames),
            }
        }
        for run in runs {
            let parts: Vec<_> =
                self.covered.range(run.start().0..run.end().0).map(|(start, _)| *start).collect();
            if parts.len() > 1 {
                for start in parts {
                    self.remove(start)?;
                }
                self.add(run)?;
            }
        }
        Ok(())
    }
}

impl<S: Slots> SecondStage for MemSlot<S> {
    fn name(&self) -> &'static str {
        "memslot"
    }

    fn detail(&self) -> String {
        format!("sealed pageblocks have no memory slot; {} slots now", self.covered.len())
    }

    fn granule(&self) -> u64 {
        BLOCK_SIZE
    }

    fn update(
        &mut self,
        frames: FrameRange,
        may_close: &dyn Fn(Gfn) -> bool,
    ) -> Result<(), SecondStageError> {
        for part in frames.by_block() {
            let Some(block) = self.map.block(part.start()) else { continue };
            let mut closed = block.count() == BLOCK_FRAMES && block.iter().all(may_close);
            let what = if closed { "close" } else { "open" };
            let failed = |error| SecondStageError { what, frames: block, error };
            let changes = self.map.is_closed(block.start()) != closed;
            if changes && closed && self.available().map_err(failed)? < RESERVE {
                // Held open: the seal does not complete.
                closed = false;
            } else if changes {
                let changed =
                    if closed { self.close(block).map(|()| block) } else { self.open(block) };
                let changed = changed.map_err(failed)?;
                let noted = self.map.apply(changed, |_| closed, |_, _| Ok(()));
                noted.map_err(|(_, _, error)| failed(error))?;
                for opened in changed.by_block().filter(|_| !closed) {
                    self.map.note_block(opened, false);
                }
            }
            self.map.note_block(block, closed);
        }
        Ok(())
    }

    /// A slot is split by deleting it, and memory that stays open would be gone for a moment.
    fn needs_all_stopped(&self, frames: FrameRange, may_close: &dyn Fn(Gfn) -> bool) -> bool {
        frames.by_block().any(|part| {
            self.map.block(part.start()).is_some_and(|block| {
                let closes = block.count() == BLOCK_FRAMES && block.iter().all(may_close);
                closes != self.map.is_closed(block.start())
            })
        })
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::{Arc, Mutex};

    /// Slots that check what KVM would: none overlap, and only existing ones are deleted.
    #[derive(Clone, Default)]
    struct Fake(Arc<Mutex<BTreeMap<u32, FrameRange>>>);

    impl Slots for Fake {
        fn set(&mut self, slot: u32, frames: Option<FrameRange>) -> io::Result<()> {
            let mut slots = self.0.lock().unwrap();
            match frames {
                None => assert!(slots.remove(&slot).is_some(), "slot {slot} does not exist"),
                Some(new) => {
                    assert!(!slots.contains_key(&slot), "slot {slot} exists");
                    assert!(slots.values().all(|old| old.intersection(new).is_none()));
                    slots.insert(slot, new);
                }
            }
            Ok(())
        }
    }

    const START: u64 = 1 << 20;

    fn back_end(blocks: u64, limit: u32) -> (MemSlot<Fake>, Fake) {
        let zone = FrameRange::new(Gfn(START), blocks * BLOCK_FRAMES).unwrap();
        let mut fake = Fake::default();
        fake.set(3, Some(zone)).unwrap();
        (MemSlot::new(fake.clone(), zone, 3, limit), fake)
    }

    fn covered(fake: &Fake, frame: Gfn) -> bool {
        fake.0.lock().unwrap().values().any(|frames| frames.contains(frame))
    }

    proptest! {
        #[test]
        fn what_is_denied_has_no_slot_and_what_must_be_open_has_one(
            ops in prop::collection::vec((0u64..16, any::<bool>()), 1..80), limit in 1u32..40,
        ) {
            let (mut stage, fake) = back_end(16, limit);
            let mut closed = [false; 16];
            for (block, close) in ops {
                closed[block as usize] = close;
                let frames = FrameRange::new(Gfn(START + block * BLOCK_FRAMES), 1).unwrap();
                let wanted = closed;
                let may = |f: Gfn| wanted[((f.0 - START) / BLOCK_FRAMES) as usize];
                stage.update(frames, &may).unwrap();
                for (block, closed) in closed.iter().enumerate() {
                    let frame = Gfn(START + block as u64 * BLOCK_FRAMES + 17);
                    let denied = stage.denies(frame);
                    prop_assert_eq!(covered(&fake, frame), !denied);
                    prop_assert!(*closed || !denied, "block {} must be open", block);
                    // With slots to spare nothing is held open; otherwise it is said.
                    prop_assert!(denied || !closed || stage.holds_open(frame));
                    prop_assert!(denied || !closed || limit < 24);
                }
            }
        }
    }

    #[test]
    fn a_block_with_one_open_frame_stays_open() {
        let (mut stage, fake) = back_end(4, 20);
        let block = FrameRange::new(Gfn(START), BLOCK_FRAMES).unwrap();
        stage.update(block, &|f| f.0 != START + 5).unwrap();
        assert!(!stage.denies(Gfn(START)) && covered(&fake, Gfn(START)));
        assert!(stage.holds_open(Gfn(START)));
        stage.update(block, &|_| true).unwrap();
        assert!(stage.denies(Gfn(START + 5)) && !covered(&fake, Gfn(START)));
    }

    #[test]
    fn without_slots_a_block_is_held_open_and_nothing_fails() {
        let (mut stage, fake) = back_end(8, 2);
        let block = |i| FrameRange::new(Gfn(START + i * BLOCK_FRAMES), 1).unwrap();
        for index in [1, 3, 5] {
            stage.update(block(index), &|_| true).unwrap();
        }
        let frame = Gfn(START + BLOCK_FRAMES);
        assert!(!stage.denies(frame) && covered(&fake, frame) && stage.holds_open(frame));
    }
}
