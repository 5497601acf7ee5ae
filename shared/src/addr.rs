//! Address kinds as distinct types, so that one cannot be passed for another.

use core::fmt;

/// log2 of the size of a frame.
pub const PAGE_SHIFT: u32 = 12;
/// Size of a frame in bytes.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
/// log2 of the number of frames in a pageblock.
pub const BLOCK_ORDER: u32 = 9;
/// Frames in a pageblock, the unit that flips between mapped and unmapped.
pub const BLOCK_FRAMES: u64 = 1 << BLOCK_ORDER;
/// Size of a pageblock in bytes: what one entry of a page directory maps.
pub const BLOCK_SIZE: u64 = PAGE_SIZE << BLOCK_ORDER;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub u64);

        impl $name {
            /// The address `bytes` further on, or `None` past the end of the address space.
            #[must_use]
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(sum) => Some(Self(sum)),
                    None => None,
                }
            }

            /// The address `bytes` further on; wraps, as the processor's address arithmetic does.
            #[must_use]
            pub const fn wrapping_add(self, bytes: u64) -> Self {
                Self(self.0.wrapping_add(bytes))
            }

            /// Distance in bytes from `start`, or `None` if this address lies before it.
            #[must_use]
            pub const fn offset_from(self, start: Self) -> Option<u64> {
                self.0.checked_sub(start.0)
            }

            /// Whether the address is a multiple of `align`, a power of two.
            #[must_use]
            pub const fn is_aligned(self, align: u64) -> bool {
                self.0 & (align - 1) == 0
            }

            /// The address rounded down to a multiple of `align`, a power of two.
            #[must_use]
            pub const fn align_down(self, align: u64) -> Self {
                Self(self.0 & !(align - 1))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

address!(
    /// A guest virtual address.
    Gva
);
address!(
    /// A guest physical address.
    Gpa
);

impl Gpa {
    /// The frame that holds this address.
    #[must_use]
    pub const fn frame(self) -> Gfn {
        Gfn(self.0 >> PAGE_SHIFT)
    }
}

/// Number of a guest frame: its physical address divided by the page size.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Gfn(pub u64);

impl Gfn {
    /// First address of the frame. Bits above the address space are lost; frames that come from
    /// a guest go through [`FrameRange::new`] first.
    #[must_use]
    pub const fn gpa(self) -> Gpa {
        Gpa(self.0 << PAGE_SHIFT)
    }

    /// The frame `count` further on; wraps.
    #[must_use]
    pub const fn wrapping_add(self, count: u64) -> Self {
        Self(self.0.wrapping_add(count))
    }

    /// First frame of the pageblock that holds this frame.
    #[must_use]
    pub const fn block_start(self) -> Self {
        Self(self.0 & !(BLOCK_FRAMES - 1))
    }
}

impl fmt::Debug for Gfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gfn({:#x})", self.0)
    }
}

impl fmt::Display for Gfn {
    /// The frame's address, which is what a reader compares with other addresses.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.gpa().0)
    }
}

/// A run of consecutive frames, never empty, whose end fits the address space.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FrameRange {
    start: Gfn,
    count: u64,
}

impl FrameRange {
    /// A run of `count` frames from `start`. `None` if it is empty or leaves the 52-bit physical
    /// address space.
    #[must_use]
    pub const fn new(start: Gfn, count: u64) -> Option<Self> {
        let limit = 1u64 << (52 - PAGE_SHIFT);
        if count == 0 || start.0 >= limit || count > limit - start.0 {
            return None;
        }
        Some(Self { start, count })
    }

    /// A run of one frame; the frame is masked into the 52-bit physical address space.
    #[must_use]
    pub const fn single(frame: Gfn) -> Self {
        Self { start: Gfn(frame.0 & ((1 << (52 - PAGE_SHIFT)) - 1)), count: 1 }
    }

    /// First frame.
    #[must_use]
    pub const fn start(self) -> Gfn {
        self.start
    }

    /// Number of frames, at least one.
    #[must_use]
    pub const fn count(self) -> u64 {
        self.count
    }

    /// One past the last frame.
    #[must_use]
    pub const fn end(self) -> Gfn {
        Gfn(self.start.0 + self.count)
    }

    /// Whether the run holds `frame`.
    #[must_use]
    pub const fn contains(self, frame: Gfn) -> bool {
        frame.0 >= self.start.0 && frame.0 < self.start.0 + self.count
    }

    /// Whether the run holds all of `other`.
    #[must_use]
    pub const fn contains_range(self, other: Self) -> bool {
        other.start.0 >= self.start.0 && other.end().0 <= self.end().0
    }

    /// The frames that both runs hold.
    #[inline]
    #[must_use]
    pub fn intersection(self, other: Self) -> Option<Self> {
        let start = self.start.0.max(other.start.0);
        let end = self.end().0.min(other.end().0);
        // Both runs fit the address space, so what they share does.
        (start < end).then(|| Self { start: Gfn(start), count: end - start })
    }

    /// The frames of the run, in order.
    pub fn iter(self) -> impl Iterator<Item = Gfn> {
        (self.start.0..self.start.0 + self.count).map(Gfn)
    }

    /// The run cut at pageblock boundaries: each part lies within one pageblock.
    pub fn by_block(self) -> impl Iterator<Item = Self> {
        let end = self.end().0;
        let mut next = self.start.0;
        core::iter::from_fn(move || {
            if next >= end {
                return None;
            }
            let stop = end.min((next | (BLOCK_FRAMES - 1)) + 1);
            let part = Self { start: Gfn(next), count: stop - next };
            next = stop;
            Some(part)
        })
    }
}

impl fmt::Display for FrameRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start.gpa().0, self.end().gpa().0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    #[test]
    fn empty_and_overflowing_runs_are_refused() {
        assert_eq!(FrameRange::new(Gfn(5), 0), None);
        assert_eq!(FrameRange::new(Gfn(u64::MAX), 1), None);
        assert_eq!(FrameRange::new(Gfn(1), u64::MAX), None);
        assert_eq!(FrameRange::new(Gfn((1 << 40) - 1), 2), None);
        assert!(FrameRange::new(Gfn((1 << 40) - 1), 1).is_some());
    }

    #[test]
    fn runs_are_cut_at_block_boundaries_and_nothing_is_lost() {
        let run = FrameRange::new(Gfn(510), 1030).unwrap();
        let parts: Vec<_> = run.by_block().map(|p| (p.start().0, p.count())).collect();
        assert_eq!(parts, [(510, 2), (512, 512), (1024, 512), (1536, 4)]);
    }

    #[test]
    fn intersection_is_what_both_hold() {
        let a = FrameRange::new(Gfn(10), 10).unwrap();
        let b = FrameRange::new(Gfn(15), 10).unwrap();
        assert_eq!(a.intersection(b), FrameRange::new(Gfn(15), 5));
        assert_eq!(a.intersection(FrameRange::new(Gfn(20), 1).unwrap()), None);
    }

    #[test]
    fn address_arithmetic_is_checked() {
        assert_eq!(Gva(u64::MAX).checked_add(1), None);
        assert_eq!(Gpa(8).offset_from(Gpa(9)), None);
        assert_eq!(Gpa(0x20_1fff).align_down(BLOCK_SIZE), Gpa(0x20_0000));
    }
}
