//! What tables map and link, as the index says it.

use super::tables::{Place, TableId};
use super::tlb::Leaves;
use lacuna_abi::addr::{FrameRange, Gfn, Gpa, Gva, PAGE_SHIFT};
use lacuna_abi::paging::{Entry, Level};
use lacuna_abi::walk::Leaf;

/// Rights that the whole path to an entry grants (SDM volume 3, "Access Rights").
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Rights {
    pub writable: bool,
    pub user: bool,
    pub executable: bool,
}

impl Rights {
    pub(super) const ALL: Self = Self { writable: true, user: true, executable: true };

    pub(super) const fn and(self, entry: Entry) -> Self {
        Self {
            writable: self.writable && entry.has(Entry::WRITABLE),
            user: self.user && entry.has(Entry::USER),
            executable: self.executable && !entry.has(Entry::NO_EXECUTE),
        }
    }
}

/// One leaf entry of a registered root.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Mapping {
    pub root: Gpa,
    pub va: Gva,
    pub level: Level,
    /// First frame.
    pub frame: Gfn,
    pub rights: Rights,
    pub global: bool,
    /// Number of the event that granted the translation; 0 if it is there from the start. Of a
    /// translation that was granted before and lost nothing since, the number of the first grant.
    pub since: u64,
}

impl Mapping {
    /// The frame to which it leads an address that it spans.
    pub(super) const fn frame_at(&self, va: Gva) -> Gfn {
        self.frame.wrapping_add((va.0 & (self.level.span() - 1)) >> PAGE_SHIFT)
    }

    pub(super) fn of_leaf(root: Gpa, leaf: &Leaf) -> Self {
        let Leaf { va, level, writable, user, executable, .. } = *leaf;
        let rights = Rights { writable, user, executable };
        Self { root, va, level, frame: leaf.frame(), rights, global: leaf.global(), since: 0 }
    }

    /// What a leaf entry of `level` maps at `va`, by a table that is linked at `place`.
    pub(super) fn at(place: &Place, va: Gva, level: Level, entry: Entry, since: u64) -> Self {
        Self {
            root: place.root,
            va,
            level,
            frame: entry.frame(level),
            rights: place.rights.and(entry),
            global: entry.has(Entry::GLOBAL),
            since: place.since.max(since),
        }
    }

    /// The frames that it maps.
    pub(super) fn frames(&self) -> FrameRange {
        FrameRange::new(self.frame, self.level.frames()).unwrap_or(FrameRange::single(self.frame))
    }

    /// The same for the obligation that it is if it is revoked.
    pub(super) fn leaves(&self) -> Leaves {
        let Self { root, va, level, global, since, .. } = *self;
        Leaves { root, va, level, frames: self.frames(), global, since }
    }

    /// Whether both say the same of an address, whenever it was granted.
    pub(super) fn says_as(&self, other: &Self) -> bool {
        Self { since: 0, ..*self } == Self { since: 0, ..*other }
    }
}

/// Leaf entries of one table that follow each other, map frames that follow each other, and grant
/// the same.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Run {
    pub first: Mapping,
    pub count: u64,
}

impl Run {
    /// All frames that it maps.
    pub(super) fn frames(&self) -> FrameRange {
        let all = FrameRange::new(self.first.frame, self.count * self.first.level.frames());
        all.unwrap_or_else(|| self.first.frames())
    }

    /// Entry by entry.
    pub(super) fn entries(&self) -> impl Iterator<Item = Mapping> + use<> {
        let Self { first, count } = *self;
        (0..count).map(move |index| Mapping {
            va: first.va.wrapping_add(index * first.level.span()),
            frame: first.frame.wrapping_add(index * first.level.frames()),
            ..first
        })
    }
}

/// A table and one of the places where it is linked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Site {
    pub id: TableId,
    pub place: Place,
}

/// A table where a root reaches it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct TableAt {
    pub frame: Gfn,
    pub root: Gpa,
    /// First address that it spans there.
    pub va: Gva,
    pub level: Level,
    /// No root reached it at any other place before.
    pub fresh: bool,
}

/// What was found to be mapped and linked.
#[derive(Clone, Debug, Default)]
pub(super) struct Walked {
    /// Leaves, for each place in order of address.
    pub leaves: Vec<Run>,
    /// Tables.
    pub tables: Vec<TableAt>,
    /// Tables that cannot be read: root, the entry that points there, where, first address.
    pub unreadable: Vec<(Gpa, Gpa, Gpa, Gva)>,
    /// The walk met more tables than there can be and stopped.
    pub endless: bool,
}

impl Walked {
    /// Makes room for what another walk finds.
    pub(super) fn clear(&mut self) {
        self.leaves.clear();
        self.tables.clear();
        self.unreadable.clear();
        self.endless = false;
    }

    /// Leaves, entry by entry.
    pub(super) fn mappings(&self) -> impl Iterator<Item = Mapping> {
        self.leaves.iter().flat_map(Run::entries)
    }
}
