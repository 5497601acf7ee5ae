//! Which entries map a frame: kept from entry-write records, so that a check costs what it names
//! and not what is mapped.

use lacuna_abi::addr::{BLOCK_ORDER, FrameRange, Gfn, Gpa, Gva};
use lacuna_abi::event::EntryWrite;
use lacuna_abi::paging::{Entry, Level};
use lacuna_abi::walk::{Leaf, Tables, Visit, entry_address, locate, visit};
use std::collections::{BTreeMap, BTreeSet};

/// Rights that the whole path to an entry grants (SDM volume 3, "Access Rights").
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Rights {
    pub writable: bool,
    pub user: bool,
    pub executable: bool,
}

impl Rights {
    const ALL: Self = Self { writable: true, user: true, executable: true };

    const fn and(self, entry: Entry) -> Self {
        Self {
            writable: self.writable && entry.has(Entry::WRITABLE),
            user: self.user && entry.has(Entry::USER),
            executable: self.executable && !entry.has(Entry::NO_EXECUTE),
        }
    }

    /// Frames are found by whether they are writable or executable.
    const fn class(self) -> u8 {
        (self.writable as u8) | (self.executable as u8) << 1
    }
}

/// Classes of [`Rights::class`] with and without write or execute access.
const ANY: &[u8] = &[0, 1, 2, 3];
const WRITABLE: &[u8] = &[1, 3];
const EXECUTABLE: &[u8] = &[2, 3];

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
    /// Number of the event that granted it; 0 from the start. Nothing cached it before.
    pub since: u64,
}

impl Mapping {
    fn of_leaf(root: Gpa, leaf: &Leaf) -> Self {
        let Leaf { va, level, writable, user, executable, .. } = *leaf;
        let rights = Rights { writable, user, executable };
        Self { root, va, level, frame: leaf.frame(), rights, global: leaf.global(), since: 0 }
    }

    /// The frames that it maps.
    pub(super) fn frames(&self) -> FrameRange {
        FrameRange::new(self.frame, self.level.frames()).unwrap_or(FrameRange::single(self.frame))
    }

    /// Whether both say the same of their place, since whenever.
    pub(super) fn says(&self, other: &Self) -> bool {
        Self { since: other.since, ..*self } == *other
    }

    /// Takes the number of the grant over from what the entry said before, if that was the same
    /// translation: who cached it then may still do so, whatever became of its rights.
    fn inherit(&mut self, old: Option<&Self>) {
        if let Some(old) = old
            && (old.frame, old.global) == (self.frame, self.global)
        {
            self.since = old.since;
        }
    }

    const fn by_va(&self) -> ByVa {
        (self.root, self.va, self.level)
    }

    const fn by_frame(&self) -> ByFrame {
        (self.rights.class(), self.level, self.frame, self.root, self.va)
    }
}

/// A table that is linked, and the number of the event that did so.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Link {
    frame: Gfn,
    since: u64,
}

type ByVa = (Gpa, Gva, Level);
type ByFrame = (u8, Level, Gfn, Gpa, Gva);

/// What a walk found.
#[derive(Clone, Debug, Default)]
pub(super) struct Walked {
    /// Leaves, in order of address.
    pub leaves: Vec<Mapping>,
    /// Tables: frame, first address, level.
    pub tables: Vec<(Gfn, Gva, Level)>,
    /// Tables that cannot be read: the entry that points there, where, first address.
    pub unreadable: Vec<(Gpa, Gpa, Gva)>,
    /// The walk met more tables than there can be and stopped.
    pub endless: bool,
}

/// Walks what `root` reaches in `first..=last`, reading at most `budget` tables.
pub(super) fn walk(tables: &impl Tables, root: Gpa, range: (Gva, Gva), budget: usize) -> Walked {
    let mut walked = Walked::default();
    let ended = visit(tables, root, range, budget, &mut |met| match met {
        Visit::Leaf(leaf) => walked.leaves.push(Mapping::of_leaf(root, &leaf)),
        Visit::Table { frame, level, va } => walked.tables.push((frame, va, level)),
        Visit::Unreadable { at, table, va } => walked.unreadable.push((at, table, va)),
    });
    walked.endless = ended.is_err();
    walked
}

/// Rights of the tables above the entry of `level` for `va`. Where the path has gone since the
/// record was written, the rest counts as granting everything: the leaf's own bits then decide.
pub(super) fn path_rights(tables: &impl Tables, root: Gpa, va: Gva, level: Level) -> Rights {
    let mut rights = Rights::ALL;
    let mut table = root;
    for here in [Level::Pml4, Level::Pdpt, Level::Pd] {
        if here <= level {
            break;
        }
        let entry = tables.read_entry(entry_address(table, here, va)).unwrap_or(Entry::EMPTY);
        if !entry.is_present() || entry.is_leaf(here) {
            break;
        }
        rights = rights.and(entry);
        table = entry.frame(here).gpa();
    }
    rights
}

/// Mappings and tables of all registered roots.
#[derive(Clone, Debug)]
pub(super) struct Index {
    mappings: BTreeMap<ByVa, Mapping>,
    by_frame: BTreeSet<ByFrame>,
    tables: BTreeMap<ByVa, Link>,
    /// Number of places at which each table is linked.
    links: BTreeMap<Gfn, usize>,
    budget: usize,
    full: bool,
}

impl Index {
    /// An index for guests whose table pool has `budget` pages: a walk reads no more tables, and
    /// no more entries can exist.
    pub(super) const fn new(budget: usize) -> Self {
        Self {
            mappings: BTreeMap::new(),
            by_frame: BTreeSet::new(),
            tables: BTreeMap::new(),
            links: BTreeMap::new(),
            budget,
            full: false,
        }
    }

    /// Tables that one walk may read.
    pub(super) const fn budget(&self) -> usize {
        self.budget
    }

    /// Whether mappings had to be left out because more were reported than can exist.
    pub(super) const fn is_full(&self) -> bool {
        self.full
    }

    /// Mappings of any of these frames.
    pub(super) fn of_frames(&self, frames: FrameRange) -> impl Iterator<Item = &Mapping> {
        self.overlapping(ANY, frames)
    }

    /// A writable mapping of any of these frames.
    pub(super) fn writable(&self, frames: FrameRange) -> Option<&Mapping> {
        self.overlapping(WRITABLE, frames).next()
    }

    /// An executable mapping of any of these frames.
    pub(super) fn executable(&self, frames: FrameRange) -> Option<&Mapping> {
        self.overlapping(EXECUTABLE, frames).next()
    }

    /// What the entry of this level at this address maps, as far as is known.
    pub(super) fn get(&self, root: Gpa, va: Gva, level: Level) -> Option<&Mapping> {
        self.mappings.get(&(root, va, level))
    }

    /// Every mapping, in order of root and address.
    pub(super) fn all(&self) -> impl Iterator<Item = &Mapping> {
        self.mappings.values()
    }

    /// Mappings of `root` that start in `first..=last`, in order of address.
    pub(super) fn in_span(
        &self,
        root: Gpa,
        (first, last): (Gva, Gva),
    ) -> impl Iterator<Item = &Mapping> {
        self.mappings.range((root, first, Level::Pt)..=(root, last, Level::Pml4)).map(|(_, m)| m)
    }

    /// Tables below `level` that span from an address in `first..=last`: frame, address, level.
    pub(super) fn tables_below(
        &self,
        root: Gpa,
        (first, last): (Gva, Gva),
        level: Level,
    ) -> impl Iterator<Item = (Gfn, Gva, Level)> {
        self.tables
            .range((root, first, Level::Pt)..=(root, last, Level::Pml4))
            .filter(move |((_, _, table), _)| *table < level)
            .map(|((_, va, table), link)| (link.frame, *va, *table))
    }

    /// Number of the event that linked the table of this level there; 0 if it is not known.
    pub(super) fn linked_since(&self, root: Gpa, va: Gva, level: Level) -> u64 {
        self.tables.get(&(root, va, level)).map_or(0, |link| link.since)
    }

    /// The table of this level that is linked there.
    pub(super) fn table(&self, root: Gpa, va: Gva, level: Level) -> Option<Gfn> {
        self.tables.get(&(root, va.align_down(level.span() << 9), level)).map(|link| link.frame)
    }

    /// As [`Self::tables_below`]: frame and address.
    pub(super) fn tables_in(
        &self,
        root: Gpa,
        span: (Gva, Gva),
        level: Level,
    ) -> impl Iterator<Item = (Gfn, Gva)> {
        self.tables_below(root, span, level).map(|(frame, va, _)| (frame, va))
    }

    /// Where a frame is linked as a table, if anywhere.
    pub(super) fn table_at(&self, frames: FrameRange) -> Option<(Gfn, Gpa, Gva)> {
        self.links.range(frames.start()..frames.end()).next()?;
        let (key, link) = self.tables.iter().find(|(_, link)| frames.contains(link.frame))?;
        Some((link.frame, key.0, key.1))
    }

    /// Number of places at which a frame is linked as a table.
    pub(super) fn links(&self, frame: Gfn) -> usize {
        self.links.get(&frame).copied().unwrap_or(0)
    }

    /// Takes a record over and returns what the entries map now. Leaves are taken from the record;
    /// where a table is linked or unlinked, what lies below is read from memory. `since` is the
    /// number of the grant.
    pub(super) fn apply(&mut self, write: &EntryWrite, since: u64, tables: &impl Tables) -> Walked {
        let last = write.va.wrapping_add(write.span() - 1);
        let links = write.level > Level::Pt
            && (is_table(write.old, write.level)
                || is_table(write.new, write.level)
                || self.tables_in(write.root, (write.va, last), write.level).next().is_some());
        if links {
            self.apply_links(write, last, since, tables)
        } else {
            self.apply_leaves(write, since, tables)
        }
    }

    fn apply_leaves(&mut self, write: &EntryWrite, since: u64, tables: &impl Tables) -> Walked {
        let path = path_rights(tables, write.root, write.va, write.level);
        let mut walked = Walked::default();
        for index in 0..u64::from(write.count) {
            let va = write.va.wrapping_add(index * write.level.span());
            let old = self.remove(&(write.root, va, write.level));
            let entry = write.new.nth_of_run(write.level, index);
            if entry.is_present() && entry.is_leaf(write.level) {
                let mut mapping = Mapping {
                    root: write.root,
                    va,
                    level: write.level,
                    frame: entry.frame(write.level),
                    rights: path.and(entry),
                    global: entry.has(Entry::GLOBAL),
                    since,
                };
                mapping.inherit(old.as_ref());
                self.insert(mapping);
                walked.leaves.push(mapping);
            }
        }
        walked
    }

    fn apply_links(
        &mut self,
        write: &EntryWrite,
        last: Gva,
        since: u64,
        tables: &impl Tables,
    ) -> Walked {
        // The entries may have been written again since: what the record says comes first.
        let place = locate(tables, write.root, write.va, write.level).ok();
        let read = |at: Gpa| {
            let offset = place.and_then(|place| at.offset_from(place));
            match offset.filter(|offset| *offset < 8 * u64::from(write.count)) {
                Some(offset) => Some(write.new.nth_of_run(write.level, offset / 8)),
                None => tables.read_entry(at),
            }
        };
        let mut walked = walk(&read, write.root, (write.va, last), self.budget);
        let inside = |va: Gva| va >= write.va && va <= last;
        walked.leaves.retain(|leaf| inside(leaf.va) && leaf.level <= write.level);
        walked.tables.retain(|(_, va, level)| inside(*va) && *level < write.level);
        walked.leaves.iter_mut().for_each(|leaf| leaf.since = since);
        self.replace_since(write.root, (write.va, last), write.level, &walked, since);
        walked
    }

    /// Replaces what `root` maps in a span, at `level` and below, by what a walk found there.
    pub(super) fn replace(
        &mut self,
        root: Gpa,
        (first, last): (Gva, Gva),
        level: Level,
        walked: &Walked,
    ) {
        self.replace_since(root, (first, last), level, walked, 0);
    }

    /// The same with the number of the grant for tables that were not linked there before.
    fn replace_since(
        &mut self,
        root: Gpa,
        (first, last): (Gva, Gva),
        level: Level,
        walked: &Walked,
        since: u64,
    ) {
        let span = (root, first, Level::Pt)..=(root, last, Level::Pml4);
        let mut old: Vec<Mapping> = self.in_span(root, (first, last)).copied().collect();
        old.retain(|mapping| mapping.level <= level);
        for mapping in &old {
            self.remove(&mapping.by_va());
        }
        let mut links: Vec<(ByVa, Link)> =
            self.tables.range(span).map(|(key, link)| (*key, *link)).collect();
        links.retain(|(key, _)| key.2 < level);
        for (key, _) in &links {
            self.remove_table(key);
        }
        for leaf in &walked.leaves {
            let mut leaf = *leaf;
            let at = old.binary_search_by_key(&leaf.by_va(), Mapping::by_va);
            leaf.inherit(at.ok().map(|at| &old[at]));
            self.insert(leaf);
        }
        for (frame, va, level) in &walked.tables {
            // One table may be linked at many places, but hardly by a guest that means well.
            if self.tables.len() >= self.budget.saturating_mul(64) {
                self.full = true;
                break;
            }
            let key = (root, *va, *level);
            self.remove_table(&key);
            let old = links.binary_search_by_key(&key, |(key, _)| *key).ok().map(|at| links[at].1);
            let old = old.filter(|link| link.frame == *frame);
            let since = old.map_or(since, |link| link.since);
            self.tables.insert(key, Link { frame: *frame, since });
            *self.links.entry(*frame).or_default() += 1;
        }
    }

    /// Forgets a root.
    pub(super) fn remove_root(&mut self, root: Gpa) {
        self.replace(root, (Gva(0), Gva(u64::MAX)), Level::Pml4, &Walked::default());
        let first = (root, Gva(0), Level::Pt);
        let keys = self.tables.range(first..=(root, Gva(u64::MAX), Level::Pml4));
        let keys: Vec<ByVa> = keys.map(|(key, _)| *key).collect();
        keys.iter().for_each(|key| self.remove_table(key));
    }

    fn remove_table(&mut self, key: &ByVa) {
        let Some(Link { frame, .. }) = self.tables.remove(key) else { return };
        if let Some(links) = self.links.get_mut(&frame) {
            *links -= 1;
            if *links == 0 {
                self.links.remove(&frame);
            }
        }
    }

    fn insert(&mut self, mapping: Mapping) {
        self.remove(&mapping.by_va());
        if self.mappings.len() >= self.budget.saturating_mul(512) {
            self.full = true;
            return;
        }
        self.by_frame.insert(mapping.by_frame());
        self.mappings.insert(mapping.by_va(), mapping);
    }

    fn remove(&mut self, key: &ByVa) -> Option<Mapping> {
        let mapping = self.mappings.remove(key)?;
        self.by_frame.remove(&mapping.by_frame());
        Some(mapping)
    }

    fn overlapping(
        &self,
        classes: &'static [u8],
        frames: FrameRange,
    ) -> impl Iterator<Item = &Mapping> {
        const LEVELS: [(Level, u32); 3] =
            [(Level::Pt, 0), (Level::Pd, BLOCK_ORDER), (Level::Pdpt, 2 * BLOCK_ORDER)];
        let ranges = classes.iter().flat_map(|class| LEVELS.map(|level| (*class, level)));
        ranges.flat_map(move |(class, (level, order))| {
            let first = Gfn(frames.start().0 >> order << order);
            let from = (class, level, first, Gpa(0), Gva(0));
            let to = (class, level, frames.end(), Gpa(0), Gva(0));
            let keys = self.by_frame.range(from..to);
            keys.filter_map(|key| self.mappings.get(&(key.3, key.4, key.1)))
        })
    }
}

/// Whether a present entry of this level points to a table.
pub(super) fn is_table(entry: Entry, level: Level) -> bool {
    level > Level::Pt && entry.is_present() && !entry.is_leaf(level)
}
