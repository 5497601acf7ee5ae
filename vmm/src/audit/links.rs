//! How the index follows the tables: entries are stored, tables linked and unlinked.

use super::aliases::Aliases;
use super::index::{Index, Mapping, Rights, Run, TableAt, Walked, is_table};
use super::tables::{LeafTally, Place, TableId};
use super::world::TableWords;
use lacuna_abi::addr::{FrameRange, Gfn, Gpa, Gva};
use lacuna_abi::event::EntryWrite;
use lacuna_abi::gate::PAGE_WORDS;
use lacuna_abi::layout::{Layout, Region};
use lacuna_abi::paging::{ENTRIES, Entry, Level};
use lacuna_abi::walk::child_address;

/// Where the contents of tables come from that no root reached so far.
pub(super) trait Source {
    /// All entries of a table; false where no table can be.
    fn read_table(&self, table: Gfn, into: &mut TableWords) -> bool;
}

impl<F: Fn(Gfn, &mut TableWords) -> bool> Source for F {
    fn read_table(&self, table: Gfn, into: &mut TableWords) -> bool {
        self(table, into)
    }
}

/// A change that is under way.
pub(super) struct Change<'a, S> {
    pub layout: &'a Layout,
    pub source: &'a S,
    /// Number of the grant.
    pub since: u64,
    pub walked: &'a mut Walked,
    /// Tables that may still be found at one place.
    left: usize,
}

impl<'a, S> Change<'a, S> {
    pub(super) const fn new(
        layout: &'a Layout,
        source: &'a S,
        since: u64,
        walked: &'a mut Walked,
    ) -> Self {
        Self { layout, source, since, walked, left: 0 }
    }
}

impl Index {
    /// Registers a root: all that it reaches is found.
    pub(super) fn add_root<S: Source>(&mut self, root: Gpa, change: &mut Change<'_, S>) {
        let place = Place { root, va: Gva(0), rights: Rights::ALL, since: change.since };
        change.left = self.budget();
        self.link(root, root.frame(), Level::Pml4, place, change);
    }

    /// Forgets a root.
    pub(super) fn remove_root(&mut self, root: Gpa, layout: &Layout) {
        if let Some(id) = self.tables.id(root.frame(), Level::Pml4) {
            self.unlink(id, root, Gva(0), layout);
        }
        self.forget_emptied();
    }

    /// Takes a record over: its entries hold what it says, wherever their table is linked, and what
    /// they map and link now is found.
    pub(super) fn apply<S: Source>(
        &mut self,
        write: &EntryWrite,
        id: TableId,
        change: &mut Change<'_, S>,
    ) {
        let new = |index| write.new.nth_of_run(write.level, index);
        let first = write.level.index(write.va);
        self.store(self.tables.frame(id), (first, u64::from(write.count)), new, change);
    }

    /// Stores entries of a page: `count` from `first` on.
    pub(super) fn store<S: Source>(
        &mut self,
        frame: Gfn,
        (first, count): (u64, u64),
        new: impl Fn(u64) -> Entry,
        change: &mut Change<'_, S>,
    ) {
        let end = (first + count).min(ENTRIES);
        for id in self.tables.roles(frame) {
            if id.level() > Level::Pt {
                self.unlink_below(id, (first, end), None, change.layout);
            }
        }
        // What was unlinked may have been the page itself, where it led to itself.
        let mut roles = [None; 4];
        for (role, id) in roles.iter_mut().zip(self.tables.roles(frame)) {
            *role = Some(id);
            self.count_leaves(id, (first, end), false, change.layout);
        }
        if let Some(page) = roles[0].and_then(|id| self.tables.page_mut(id)) {
            for index in first..end {
                let (old, new) = (page.entry(index), new(index - first));
                let mut levels = roles.iter().flatten().map(|id| id.level());
                let kept = levels.any(|level| translates_on(old, new, level));
                let since = if kept { page.since(index) } else { change.since };
                page.set(index, new, since);
            }
        }
        for id in roles.into_iter().flatten() {
            self.count_leaves(id, (first, end), true, change.layout);
        }
        for id in roles.into_iter().flatten() {
            for at in 0..self.tables.places(id).len() {
                let Some(place) = self.tables.places(id).get(at).copied() else { break };
                change.left = self.budget();
                self.follow(id, &place, (first, end), change);
            }
        }
        self.forget_emptied();
    }

    /// Links a table at a place, with all below it. `at` is the entry that leads to it.
    fn link<S: Source>(
        &mut self,
        at: Gpa,
        frame: Gfn,
        level: Level,
        place: Place,
        change: &mut Change<'_, S>,
    ) {
        let unreadable = (place.root, at, frame.gpa(), place.va);
        let Some(id) = self.tables.id(frame, level) else {
            change.walked.unreadable.push(unreadable);
            return;
        };
        let Some(left) = change.left.checked_sub(1) else {
            change.walked.endless = true;
            return;
        };
        change.left = left;
        if self.tables.all_places() >= self.room {
            self.full = true;
            return;
        }
        let fresh = self.tables.roles(frame).next().is_none();
        // One that the same store unlinks and links again holds what the records made of it.
        if self.tables.page(id).is_none() {
            let mut words = [0; PAGE_WORDS];
            if !change.source.read_table(frame, &mut words) {
                change.walked.unreadable.push(unreadable);
                return;
            }
            self.tables.copy(id, &words);
        }
        let first = self.tables.places(id).is_empty();
        if !self.tables.add_place(id, place) {
            return;
        }
        if first {
            self.aliases.settle(id, place.va);
            self.count_leaves(id, (0, ENTRIES), true, change.layout);
        }
        let (root, va) = (place.root, place.va);
        change.walked.tables.push(TableAt { frame, root, va, level, fresh });
        self.follow(id, &place, (0, ENTRIES), change);
    }

    /// Finds what entries of a table map at one of its places, and links what they lead to.
    fn follow<S: Source>(
        &mut self,
        id: TableId,
        place: &Place,
        (first, end): (u64, u64),
        change: &mut Change<'_, S>,
    ) {
        let level = id.level();
        let mut index = first;
        while index < end {
            let Some(page) = self.tables.page(id) else { return };
            let (entry, since) = (page.entry(index), page.since(index));
            let va = child_address(place.va, level, index);
            let count = page.run(level, (index, end));
            if count > 0 {
                let first = Mapping::at(place, va, level, entry, since);
                change.walked.leaves.push(Run { first, count });
            } else if is_table(entry, level)
                && let Some(below) = level.below()
            {
                let at = self.tables.frame(id).gpa().wrapping_add(8 * index);
                let place = place.below(entry, va, since);
                self.link(at, entry.frame(level), below, place, change);
            }
            index += count.max(1);
            if let Some(page) = self.tables.page(id) {
                index += page.gap((index, end));
            }
        }
    }

    /// Takes a table away from a place, with all below it.
    fn unlink(&mut self, id: TableId, root: Gpa, va: Gva, layout: &Layout) {
        let first = self.tables.first_place(id);
        let Some(place) = self.tables.remove_place(id, root, va) else { return };
        self.unlink_below(id, (0, ENTRIES), Some(place), layout);
        if self.tables.places(id).is_empty() {
            self.count_leaves(id, (0, ENTRIES), false, layout);
            self.aliases.leave(id, first);
            self.emptied.push(id);
        }
    }

    /// Forgets the tables that were unlinked and not linked again by the same store.
    fn forget_emptied(&mut self) {
        while let Some(id) = self.emptied.pop() {
            if let Some(page) = self.tables.forget_unlinked(id)
                && let Some(dropped) = &mut self.dropped
            {
                dropped.push((self.tables.frame(id), Box::new(*page.words())));
            }
        }
    }

    /// Takes the tables behind entries of a table away, at one of its places or at all.
    fn unlink_below(
        &mut self,
        id: TableId,
        (first, end): (u64, u64),
        only: Option<Place>,
        layout: &Layout,
    ) {
        let level = id.level();
        let Some(below) = level.below() else { return };
        for index in first..end {
            let Some(page) = self.tables.page(id) else { return };
            let entry = page.entry(index);
            let linked = is_table(entry, level);
            let child = if linked { self.tables.id(entry.frame(level), below) } else { None };
            let Some(child) = child else { continue };
            let places = match only {
                Some(place) => vec![place],
                None => self.tables.places(id).to_vec(),
            };
            for place in places {
                self.unlink(child, place.root, child_address(place.va, level, index), layout);
            }
        }
    }

    /// Counts leaves of a table in or out.
    fn count_leaves(&mut self, id: TableId, (first, end): (u64, u64), add: bool, layout: &Layout) {
        let level = id.level();
        let mut next = first;
        while next < end {
            let Some(page) = self.tables.page(id) else { return };
            let (index, count) = (next, page.run(level, (next, end)));
            if count == 0 {
                next += page.gap((next, end)).max(1);
                continue;
            }
            next += count;
            self.count_run(id, (index, count), page.entry(index), add, layout);
        }
    }

    /// The same for a run of leaves, `count` from entry `index` on, of which `entry` is the first.
    #[inline]
    fn count_run(
        &mut self,
        id: TableId,
        (index, count): (u64, u64),
        entry: Entry,
        add: bool,
        layout: &Layout,
    ) {
        let Self { tables, aliases, zone_executable, .. } = self;
        if let Some(page) = tables.page_mut(id) {
            let tally = page.tally_mut(id);
            count_into(tally, aliases, zone_executable, (id, index, count), entry, add, layout);
        }
    }
}

/// Counts a run of leaves, `count` from entry `index` of the table on, in or out.
#[inline]
pub(super) fn count_into(
    tally: &mut LeafTally,
    aliases: &mut Aliases,
    zone_executable: &mut u64,
    (id, index, count): (TableId, u64, u64),
    entry: Entry,
    add: bool,
    layout: &Layout,
) {
    let level = id.level();
    let frame = entry.frame(level);
    let run = tally_of(layout, level, entry, count);
    let in_zone = run.executable > 0 && touches(&layout.zone, frame, count, level);
    let executable = if in_zone { run.executable } else { 0 };
    if add {
        tally.add(run);
        aliases.add(id, index, frame, count);
        *zone_executable += executable;
    } else {
        tally.take(run);
        aliases.remove(id, index, frame, count);
        *zone_executable -= executable;
    }
}

/// Whether the leaves, `count` from one that maps `first` on, map anything of the region.
fn touches(region: &Region, first: Gfn, count: u64, level: Level) -> bool {
    let mapped = FrameRange::new(first, count * level.frames());
    mapped.zip(region.frames()).is_none_or(|(mapped, all)| mapped.intersection(all).is_some())
}

impl LeafTally {
    const fn add(&mut self, other: Self) {
        self.leaves += other.leaves;
        self.of_pool += other.of_pool;
        self.of_guest += other.of_guest;
        self.executable += other.executable;
    }

    const fn take(&mut self, other: Self) {
        self.leaves -= other.leaves;
        self.of_pool -= other.of_pool;
        self.of_guest -= other.of_guest;
        self.executable -= other.executable;
    }
}

/// What `count` leaves from this one on map.
#[inline]
fn tally_of(layout: &Layout, level: Level, first: Entry, count: u64) -> LeafTally {
    let executable = if first.has(Entry::NO_EXECUTE) { 0 } else { count };
    let start = first.frame(level).gpa();
    let len = count * level.span();
    if layout.zone.contains(start) && start.0 + len <= layout.zone.end().0 {
        return LeafTally { leaves: count, of_pool: 0, of_guest: count, executable };
    }
    tally_each(layout, level, (start, count), executable)
}

/// The same where not all of them map frames of the zone.
fn tally_each(
    layout: &Layout,
    level: Level,
    (start, count): (Gpa, u64),
    executable: u64,
) -> LeafTally {
    let mut tally = LeafTally { leaves: count, executable, ..LeafTally::default() };
    for index in 0..count {
        let from = start.0.saturating_add(index * level.span());
        let touches = |region: &Region| {
            region.len > 0 && from < region.end().0 && from + level.span() > region.gpa.0
        };
        tally.of_pool += u64::from(touches(&layout.pool));
        tally.of_guest += u64::from(layout.regions().iter().any(|(_, region)| touches(region)));
    }
    tally
}

/// Whether a translation that was there stays there: then it is as old as it was.
pub(super) fn translates_on(old: Entry, new: Entry, level: Level) -> bool {
    let same = |bit| old.has(bit) == new.has(bit);
    old.is_present()
        && new.is_present()
        && old.is_leaf(level) == new.is_leaf(level)
        && old.frame(level) == new.frame(level)
        && (!old.is_leaf(level) || same(Entry::GLOBAL))
}

/// The bits of an entry that say what it maps or links and with which rights; the others, accessed
/// and dirty among them, are nobody's business.
pub(super) fn meaning(entry: Entry, level: Level) -> u64 {
    if !entry.is_present() {
        return 0;
    }
    let rights = Entry::PRESENT | Entry::WRITABLE | Entry::USER | Entry::NO_EXECUTE;
    let leaf = entry.is_leaf(level);
    let size = if leaf && level > Level::Pt { Entry::PAGE_SIZE } else { 0 };
    let global = if leaf { Entry::GLOBAL } else { 0 };
    entry.frame(level).gpa().0 | entry.0 & (rights | size | global)
}
