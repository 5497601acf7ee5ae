//! One duty, a revoked translation that may still be cached, and what an invalidation of single
//! pages removes of it.

use super::set::CpuSet;
use lacuna_abi::addr::{FrameRange, Gfn, Gpa, Gva, PAGE_SHIFT, PAGE_SIZE};
use lacuna_abi::paging::Level;

/// What a cached translation is tagged with (SDM volume 3, "Process-Context Identifiers (PCIDs)" and
/// "Global Pages" under "Caching Translation Information").
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(in crate::audit) enum Tag {
    /// Used under every PCID; a CR3 load spares it.
    Global,
    /// Used under this PCID; 0 while CR4.PCIDE is clear.
    Pcid(u16),
}

impl Tag {
    /// Whether a CPU that runs under `pcid` uses the translation.
    pub(in crate::audit) fn is_used_under(self, pcid: u16) -> bool {
        self == Self::Global || self == Self::Pcid(pcid)
    }
}

/// A run of revoked translations that some CPUs may still cache.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::audit) struct Duty {
    /// Root of the address space.
    pub root: Gpa,
    /// Tag under which it may be cached.
    pub tag: Tag,
    /// Level of the entries.
    pub level: Level,
    /// First address of the first entry.
    pub va: Gva,
    /// The frames that it led to; of a large page perhaps only a part.
    pub frames: FrameRange,
    /// Number of the event that granted it.
    pub since: u64,
    /// Number of the revoke.
    pub seq: u64,
    /// CPUs that may cache it.
    pub cpus: CpuSet,
    /// It could be cached only in what the CPUs are about to lose by an instruction that they have
    /// announced: it is gone once they have gone on.
    pub passing: bool,
}

impl Duty {
    /// Whether it had the Global bit.
    pub(in crate::audit) fn is_global(&self) -> bool {
        self.tag == Tag::Global
    }

    /// Whether both are the same but for their numbers and CPUs: the newer one replaces the older.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        (self.va, self.frames, self.tag, self.level, self.root, self.passing)
            == (other.va, other.frames, other.tag, other.level, other.root, other.passing)
    }

    /// What duties are sorted by: all of it.
    pub(super) fn order(&self) -> impl Ord + use<> {
        let Self { root, tag, level, va, frames, since, seq, cpus, passing } = *self;
        (seq, va, frames.start(), frames.count(), root, tag, level, since, cpus, passing)
    }

    /// The frame to which it led its first address. Of a large page perhaps only a part is left, and its
    /// address is the page's all the same.
    pub(in crate::audit) const fn base(&self) -> Gfn {
        let start = self.frames.start().0;
        Gfn(match self.level {
            Level::Pt => start,
            level => start & !(level.frames() - 1),
        })
    }

    /// The frame to which it led an address that it spans, if that is left of it.
    pub(in crate::audit) fn frame_at(&self, va: Gva) -> Option<Gfn> {
        let frame = self.base().wrapping_add(va.0.wrapping_sub(self.va.0) / PAGE_SIZE);
        self.frames.contains(frame).then_some(frame)
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
        let duty = *self;
        cut(self.frames, gone).map(move |frames| duty.part(frames))
    }
}

/// What is left of `frames` without `gone`: up to two parts.
pub(super) fn cut(frames: FrameRange, gone: FrameRange) -> impl Iterator<Item = FrameRange> {
    let (start, end) = (frames.start(), frames.end());
    let before = gone.start().0.min(end.0).saturating_sub(start.0);
    let after = gone.end().0.max(start.0);
    let parts =
        [FrameRange::new(start, before), FrameRange::new(Gfn(after), end.0.saturating_sub(after))];
    parts.into_iter().flatten()
}

/// Addresses that a run of INVLPG, or an INVPCID of type 0, names on one CPU.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::audit) struct PageFlush {
    /// First address.
    pub va: Gva,
    /// Number of addresses.
    pub count: u32,
    /// Level 1 steps by 4 KiB, level 2 by 2 MiB.
    pub level: Level,
    /// PCID whose translations go.
    pub pcid: u16,
    /// Global translations of the pages go too.
    pub globals: bool,
    /// Number of the first.
    pub seq: u64,
}

impl PageFlush {
    pub(super) fn last(&self) -> Gva {
        let steps = u64::from(self.count.saturating_sub(1));
        Gva(self.va.0.saturating_add(steps.saturating_mul(self.level.span())))
    }

    /// Whether translations with this tag go.
    pub(super) fn reaches(&self, tag: Tag) -> bool {
        match tag {
            Tag::Global => self.globals,
            Tag::Pcid(pcid) => pcid == self.pcid,
        }
    }

    /// Whether one of the addresses lies in the span of the entry of this level for `va`.
    pub(super) fn hits(&self, va: Gva, level: Level) -> bool {
        let (first, last) = (va.align_down(level.span()).0, va.0 | (level.span() - 1));
        let step = self.level.span();
        let skipped = first.saturating_sub(self.va.0).div_ceil(step);
        skipped < u64::from(self.count)
            && self.va.0.checked_add(skipped * step).is_some_and(|hit| hit >= first && hit <= last)
    }

    /// The frames of the duty whose translations the run removes. INVLPG of any address in a
    /// large page removes all of it, also where it is cached in parts (SDM volume 3, "Operations
    /// that Invalidate TLBs and Paging-Structure Caches").
    pub(super) fn removes(&self, duty: &Duty) -> Option<FrameRange> {
        let touches = self.va <= duty.last() && self.last() >= duty.va;
        if !touches || !self.reaches(duty.tag) || duty.seq >= self.seq {
            return None;
        }
        if duty.level != Level::Pt {
            return self.hits(duty.va, duty.level).then_some(duty.frames);
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
