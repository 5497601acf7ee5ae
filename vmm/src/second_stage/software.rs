//! The second stage of a simulated machine: what the back ends decide, and software MMUs obey.

use super::memslot::{MemSlot, Slots};
use super::pagemap::PageMap;
use super::{SecondStage, SecondStageError};
use crate::sim::Frames;
use lacuna_abi::addr::{BLOCK_FRAMES, BLOCK_SIZE, FrameRange, Gfn, PAGE_SIZE};
use std::io;
use std::sync::Arc;

/// `guard` or `memslot`, with software MMUs in place of KVM.
pub struct Software {
    zone: FrameRange,
    frames: Arc<Frames>,
    back: Back,
}

enum Back {
    /// `guard`: page by page.
    Pages(PageMap),
    /// `memslot`: the real back end, over slots that nothing depends on.
    Blocks(MemSlot<NoSlots>),
}

impl Software {
    /// Closes pages of this zone, as `guard` does.
    #[must_use]
    pub fn guard(frames: Arc<Frames>, zone: FrameRange) -> Self {
        Self { zone, frames, back: Back::Pages(PageMap::new(zone)) }
    }

    /// Closes pageblocks of this zone, as `memslot` does.
    #[must_use]
    pub fn memslot(frames: Arc<Frames>, zone: FrameRange) -> Self {
        let slots = MemSlot::new(NoSlots, zone, 0, u32::MAX);
        Self { zone, frames, back: Back::Blocks(slots) }
    }
}

impl SecondStage for Software {
    fn name(&self) -> &'static str {
        match &self.back {
            Back::Pages(_) => "guard",
            Back::Blocks(stage) => stage.name(),
        }
    }

    fn detail(&self) -> String {
        match self.granule() {
            PAGE_SIZE => "page by page, in software".into(),
            _ => "by pageblock, in software".into(),
        }
    }

    fn granule(&self) -> u64 {
        match &self.back {
            Back::Pages(_) => PAGE_SIZE,
            Back::Blocks(_) => BLOCK_SIZE,
        }
    }

    fn update(
        &mut self,
        frames: FrameRange,
        may_close: &dyn Fn(Gfn) -> bool,
    ) -> Result<(), SecondStageError> {
        match &mut self.back {
            Back::Pages(map) => {
                let change = |run, closed| {
                    self.frames.set(run, closed);
                    Ok(())
                };
                let what = |closed| if closed { "close" } else { "open" };
                map.apply(frames, may_close, change).map_err(|(frames, closed, error)| {
                    SecondStageError { what: what(closed), frames, error }
                })
            }
            Back::Blocks(stage) => {
                stage.update(frames, may_close)?;
                for part in frames.by_block() {
                    let block = FrameRange::new(part.start().block_start(), BLOCK_FRAMES);
                    let Some(block) = block.and_then(|block| block.intersection(self.zone)) else {
                        continue;
                    };
                    let closed = stage.denies(block.start());
                    if self.frames.is_closed(block.start()) != closed {
                        self.frames.set(block, closed);
                    }
                }
                Ok(())
            }
        }
    }

    fn denies(&self, frame: Gfn) -> bool {
        match &self.back {
            Back::Pages(map) => map.is_closed(frame),
            Back::Blocks(stage) => stage.denies(frame),
        }
    }

    fn denies_all(&self, frames: FrameRange) -> bool {
        match &self.back {
            Back::Pages(map) => map.all_closed(frames),
            Back::Blocks(stage) => stage.denies_all(frames),
        }
    }

    fn holds_open(&self, frame: Gfn) -> bool {
        match &self.back {
            Back::Pages(_) => false,
            Back::Blocks(stage) => stage.holds_open(frame),
        }
    }
}

/// Slots of which there are always enough: then a block's own state says all.
struct NoSlots;

impl Slots for NoSlots {
    fn set(&mut self, _: u32, _: Option<FrameRange>) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ZONE: u64 = 4 << 9;

    fn range(start: u64, count: u64) -> FrameRange {
        FrameRange::new(Gfn((1 << 20) + start), count).unwrap()
    }

    proptest! {
        /// The MMUs see what the back end says, and that is what the granule allows.
        #[test]
        fn what_is_closed_is_what_may_be(
            steps in prop::collection::vec((0..ZONE, 1..600_u64, any::<bool>()), 1..20),
            blocks: bool,
        ) {
            let zone = range(0, ZONE);
            let frames = Arc::new(Frames::new(zone));
            let mut stage = match blocks {
                true => Software::memslot(Arc::clone(&frames), zone),
                false => Software::guard(Arc::clone(&frames), zone),
            };
            let mut may = vec![false; ZONE as usize];
            let index = |frame: Gfn| (frame.0 - (1 << 20)) as usize;
            for (start, count, close) in steps {
                let named = range(start, count.min(ZONE - start));
                named.iter().for_each(|frame| may[index(frame)] = close);
                stage.update(named, &|frame| may[index(frame)]).unwrap();
                for frame in zone.iter() {
                    let block = index(frame) & !511;
                    let want = match blocks {
                        true => may[block..block + 512].iter().all(|may| *may),
                        false => may[index(frame)],
                    };
                    prop_assert_eq!(stage.denies(frame), want);
                    prop_assert_eq!(frames.is_closed(frame), want);
                }
            }
        }
    }
}
