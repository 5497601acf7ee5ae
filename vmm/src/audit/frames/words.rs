//! Frames as bits of words: which words hold the bits of a range, and ranges from frames.

use lacuna_abi::addr::{FrameRange, Gfn};

/// Frames to a word.
pub(super) const WORD: u64 = 64;

/// The words that hold the bits of some frames, as far as they lie in the zone: number of the word,
/// and the bits of the frames.
#[derive(Clone, Copy)]
pub(super) struct Words {
    next: usize,
    last: usize,
    /// Bits of the next word.
    mask: u64,
    last_mask: u64,
}

impl Words {
    #[inline]
    pub(super) fn of(zone: FrameRange, frames: FrameRange) -> Self {
        let first = zone.start().0;
        let start = frames.start().0.max(first) - first;
        let end = frames.end().0.min(zone.end().0).saturating_sub(first);
        if start >= end {
            return Self { next: 1, last: 0, mask: 0, last_mask: 0 };
        }
        let word = |frame: u64| usize::try_from(frame / WORD).unwrap_or(usize::MAX);
        Self {
            next: word(start),
            last: word(end - 1),
            mask: u64::MAX << (start % WORD),
            last_mask: u64::MAX >> (WORD - 1 - (end - 1) % WORD),
        }
    }
}

impl Iterator for Words {
    type Item = (usize, u64);

    #[inline]
    fn next(&mut self) -> Option<(usize, u64)> {
        let at = self.next;
        if at > self.last {
            return None;
        }
        let mask = if at == self.last { self.mask & self.last_mask } else { self.mask };
        self.mask = u64::MAX;
        self.next += 1;
        Some((at, mask))
    }
}

/// The numbers of the bits that are set, in order.
pub(super) fn bits(word: u64) -> impl Iterator<Item = u64> {
    let mut left = word;
    std::iter::from_fn(move || {
        let bit = (left != 0).then(|| left.trailing_zeros())?;
        left &= left - 1;
        Some(u64::from(bit))
    })
}

/// Joins consecutive frames of one pageblock: one finding names them all.
pub(in crate::audit) fn runs(
    frames: impl Iterator<Item = Gfn>,
) -> impl Iterator<Item = FrameRange> {
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
