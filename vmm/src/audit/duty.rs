//! One duty, a revoked translation that may still be cached, and what INVLPG removes of it.

use super::epochs::CpuSet;
use lacuna_abi::addr::{BLOCK_ORDER, FrameRange, Gfn, Gpa, Gva, PAGE_SHIFT, PAGE_SIZE};
use lacuna_abi::paging::Level;

/// A run of revoked translations that some CPUs may still cache.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Duty {
    /// Root of the address space.
    pub root: Gpa,
    /// PCID under which it may be cached.
    pub pcid: u16,
    /// It had the Global bit: a CR3 load spares it.
    pub global: bool,
    /// Level of the entries.
    pub level: Level,
    /// First address of the first entry.
    pub va: Gva,
    /// The frames that it led to; of a large page perhaps only a part.
    pub frames: FrameRange,
    /// Number of the revoke.
    pub seq: u64,
    /// CPUs that may cache it.
    pub cpus: CpuSet,
}

/// Everything but the number and the CPUs: a duty with the same key replaces the older one.
pub(super) type Key = (Gpa, u16, bool, Level, Gva, FrameRange);

/// Where an index finds a duty: whether it is of a 1 GiB page, number of the 2 MiB or 1 GiB
/// part of memory or of the address space, identity.
pub(super) type Spot = (bool, u64, u64);

impl Duty {
    pub(super) const fn key(&self) -> Key {
        (self.root, self.pcid, self.global, self.level, self.va, self.frames)
    }

    pub(super) fn is_wide(&self) -> bool {
        self.level > Level::Pd
    }

    pub(super) const fn frame_spot(&self, wide: bool, id: u64) -> Spot {
        (wide, frame_part(self.frames.start(), wide), id)
    }

    pub(super) const fn va_spot(&self, wide: bool, id: u64) -> Spot {
        (wide, va_part(self.va, wide), id)
    }

    /// Last address that the duty spans.
    pub(super) fn last(&self) -> Gva {
        match self.level {
            Level::Pt => self.va.wrapping_add(self.frames.count() * PAGE_SIZE - 1),
            level => self.va.wrapping_add(level.span() - 1),
        }
    }

    /// The duty for a part of its frames.
    pub(super) fn part(&self, frames: FrameRange) -> Self {
        let skipped = frames.start().0 - self.frames.start().0;
        let va = match self.level {
            Level::Pt => self.va.wrapping_add(skipped * PAGE_SIZE),
            _ => self.va,
        };
        Self { va, frames, ..*self }
    }

    /// The part of the duty in `first..=last`, which it touches; a large page stays whole.
    pub(super) fn between(&self, first: Gva, last: Gva) -> Self {
        if self.level != Level::Pt {
            return *self;
        }
        let page = |va: Gva| va.0.saturating_sub(self.va.0) >> PAGE_SHIFT;
        let start = page(first);
        let end = (page(last) + 1).min(self.frames.count());
        let frames =
            FrameRange::new(self.frames.start().wrapping_add(start), end.saturating_sub(start));
        frames.map_or(*self, |frames| self.part(frames))
    }

    /// What is left of the duty without `gone`: up to two parts.
    pub(super) fn without(&self, gone: FrameRange) -> impl Iterator<Item = Self> {
        let (start, end) = (self.frames.start(), self.frames.end());
        let before = gone.start().0.saturating_sub(start.0);
        let after = end.0.saturating_sub(gone.end().0);
        let parts = [FrameRange::new(start, before), FrameRange::new(gone.end(), after)];
        let duty = *self;
        parts.into_iter().flatten().map(move |frames| duty.part(frames))
    }
}

pub(super) const fn frame_part(frame: Gfn, wide: bool) -> u64 {
    frame.0 >> if wide { 2 * BLOCK_ORDER } else { BLOCK_ORDER }
}

pub(super) const fn va_part(va: Gva, wide: bool) -> u64 {
    va.0 >> (PAGE_SHIFT + if wide { 2 * BLOCK_ORDER } else { BLOCK_ORDER })
}

/// Addresses that a run of INVLPG names.
#[derive(Clone, Copy, Debug)]
pub(super) struct PageFlush {
    /// First address.
    pub va: Gva,
    /// Number of INVLPGs.
    pub count: u32,
    /// Level 1 steps by 4 KiB, level 2 by 2 MiB.
    pub level: Level,
    /// PCID under which they ran.
    pub pcid: u16,
    /// Number of the first.
    pub seq: u64,
}

impl PageFlush {
    pub(super) fn last(&self) -> Gva {
        let steps = u64::from(self.count.saturating_sub(1));
        Gva(self.va.0.saturating_add(steps.saturating_mul(self.level.span())))
    }

    /// The frames of the duty whose translations the run removes. INVLPG of any address in a
    /// large page removes all of it, also where it is cached in parts.
    pub(super) fn removes(&self, duty: &Duty) -> Option<FrameRange> {
        let reaches = self.va <= duty.last() && self.last() >= duty.va;
        let tagged = duty.global || duty.pcid == self.pcid;
        if !reaches || !tagged || duty.seq >= self.seq {
            return None;
        }
        if duty.level != Level::Pt {
            // Consecutive steps are no further apart than a large page is long: one hits it.
            return Some(duty.frames);
        }
        let page = |va: Gva| va.0 >> PAGE_SHIFT;
        let (first, count) = match self.level {
            Level::Pt => (page(self.va), u64::from(self.count)),
            level => {
                // The one address of the run in this 2 MiB.
                let offset = self.va.0 & (level.span() - 1);
                (page(Gva(duty.va.align_down(level.span()).0 | offset)), 1)
            }
        };
        let from = first.max(page(duty.va));
        let to = first.saturating_add(count).min(page(duty.va) + duty.frames.count());
        let start = Gfn(duty.frames.start().0 + from.checked_sub(page(duty.va))?);
        FrameRange::new(start, to.checked_sub(from)?)
    }
}
