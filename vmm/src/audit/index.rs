//! Which entries map a frame: looked up in the host's own copy of every table that a registered root
//! reaches, so that a check costs what it names and not what is mapped.
//!
//! The copy follows the entry-write records. `tables` holds it, `links` keeps it, `aliases` finds
//! the entries that map a frame.

use super::aliases::Aliases;
pub(super) use super::found::{Mapping, Rights, Run, Site, TableAt, Walked};
use super::recent::Recent;
use super::tables::{Place, TableId, Tables};
use super::world::TableWords;
use lacuna_abi::addr::{BLOCK_FRAMES, FrameRange, Gfn, Gpa, Gva};
use lacuna_abi::event::EntryWrite;
use lacuna_abi::layout::Layout;
use lacuna_abi::paging::{ENTRIES, Entry, Level, is_canonical};
use lacuna_abi::walk::{Tables as ReadTables, Visit, child_address, visit};

/// Walks all that `root` reaches in memory, reading at most `budget` tables.
pub(super) fn walk(tables: &impl ReadTables, root: Gpa, budget: usize) -> Walked {
    let mut walked = Walked::default();
    let everything = lacuna_abi::walk::EVERYTHING;
    let ended = visit(tables, root, everything, budget, &mut |met| match met {
        Visit::Leaf(leaf) => {
            walked.leaves.push(Run { first: Mapping::of_leaf(root, &leaf), count: 1 });
        }
        Visit::Table { frame, level, va } => {
            walked.tables.push(TableAt { frame, root, va, level, fresh: false });
        }
        Visit::Unreadable { at, table, va } => walked.unreadable.push((root, at, table, va)),
    });
    walked.endless = ended.is_err();
    walked
}

/// Mappings and tables of all registered roots.
#[derive(Clone, Debug)]
pub(super) struct Index {
    pub(super) tables: Tables,
    pub(super) aliases: Aliases,
    /// Places at which tables may be linked, all together.
    pub(super) room: usize,
    pub(super) full: bool,
    /// Tables that the store under way has taken from their last place.
    pub(super) emptied: Vec<TableId>,
    /// Tables that were unlinked, with what they held, where that has to be known.
    pub(super) dropped: Option<Vec<(Gfn, Box<TableWords>)>>,
    /// Entries that map frames of the zone and are not XD by themselves.
    pub(super) zone_executable: u64,
    zone: FrameRange,
    recent: Recent,
}

impl Index {
    pub(super) fn new(layout: &Layout) -> Self {
        let tables = Tables::new(layout);
        // Roots share tables, but hardly all of a pool that is used up.
        let room = 8 * tables.budget();
        Self {
            tables,
            aliases: Aliases::new(layout),
            room,
            full: false,
            emptied: Vec::new(),
            dropped: None,
            zone_executable: 0,
            zone: layout.zone_frames(),
            recent: Recent::default(),
        }
    }

    /// Whether what unlinked tables held is kept for whoever takes it.
    pub(super) fn keep_dropped(&mut self, keep: bool) {
        self.dropped = keep.then(Vec::new);
    }

    /// Tables that were unlinked since this was last asked.
    pub(super) fn take_dropped(&mut self) -> Vec<(Gfn, Box<TableWords>)> {
        self.dropped.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Tables that one walk may read: no more can exist.
    pub(super) const fn budget(&self) -> usize {
        self.tables.budget()
    }

    /// Whether tables had to be left out because they are linked at too many places.
    pub(super) const fn is_full(&self) -> bool {
        self.full
    }

    /// Whether it is quickly seen that nothing maps these frames, which lie in one pageblock: that has
    /// left the direct map, or they have.
    #[inline]
    pub(super) fn maps_nothing(&self, part: FrameRange) -> bool {
        let Some(((large, index), small)) = self.aliases.only_homes(part) else { return false };
        let Some(page) = self.tables.page(large) else { return false };
        let entry = page.entry(index);
        if entry.is_present() && entry.is_leaf(Level::Pd) {
            return false;
        }
        let first = part.start().0 & (ENTRIES - 1);
        let holds_none = |small| {
            let page = self.tables.page(small);
            page.is_some_and(|page| page.gap((first, first + part.count())) == part.count())
        };
        small.is_none_or(holds_none)
    }

    /// Whether it is quickly seen that nothing maps these frames.
    #[inline]
    pub(super) fn maps_nothing_of(&self, frames: FrameRange) -> bool {
        let last = frames.end().0 - 1;
        if frames.start().block_start() == Gfn(last).block_start() {
            return self.maps_nothing(frames);
        }
        frames.by_block().all(|part| self.maps_nothing(part))
    }

    /// Mappings of any of these frames.
    pub(super) fn of_frames(&self, frames: FrameRange) -> impl Iterator<Item = Mapping> {
        self.overlapping(frames, |_| true)
    }

    /// A writable mapping of any of these frames.
    pub(super) fn writable(&self, frames: FrameRange) -> Option<Mapping> {
        self.overlapping(frames, |_| true).find(|mapping| mapping.rights.writable)
    }

    /// An executable mapping of any of these frames.
    #[inline]
    pub(super) fn executable(&self, frames: FrameRange) -> Option<Mapping> {
        if self.zone_executable == 0 && self.zone.contains_range(frames) {
            return None;
        }
        let some = |id: TableId| self.tables.tally(id).executable > 0;
        self.overlapping(frames, some).find(|mapping| mapping.rights.executable)
    }

    /// The table of `level` that `root` reaches for `va`, with the place where it is linked there.
    pub(super) fn find(&self, root: Gpa, va: Gva, level: Level) -> Option<Site> {
        if !is_canonical(va) {
            return None;
        }
        let mut here = Level::Pml4;
        let mut id = self.tables.id(root.frame(), here)?;
        while here > level {
            let entry = self.tables.page(id)?.entry(here.index(va));
            if !is_table(entry, here) {
                return None;
            }
            let below = here.below()?;
            id = self.tables.id(entry.frame(here), below)?;
            here = below;
        }
        let base = base_of(va, level);
        let places = self.tables.places(id);
        let place = *places.iter().find(|place| place.root == root && place.va == base)?;
        Some(Site { id, place })
    }

    /// The same; it is remembered as long as no table comes or goes anywhere.
    #[inline]
    pub(super) fn find_again(&mut self, root: Gpa, va: Gva, level: Level) -> Option<Site> {
        if !is_canonical(va) {
            return None;
        }
        let key = (root, base_of(va, level), level);
        let changes = self.tables.changes();
        if let Some(site) = self.recent.get(key, changes) {
            return Some(site);
        }
        let site = self.find(root, va, level)?;
        self.recent.put(key, site, changes);
        Some(site)
    }

    /// The table with the place where it is linked there, if it is.
    pub(super) fn site(&self, table: &TableAt) -> Option<Site> {
        let id = self.tables.id(table.frame, table.level)?;
        let here = |place: &&Place| (place.root, place.va) == (table.root, table.va);
        let place = *self.tables.places(id).iter().find(here)?;
        Some(Site { id, place })
    }

    /// Every other place at which the entries of a run are reached, whose table is linked at `here`
    /// too, with the address of the first.
    pub(super) fn other_places(&self, write: &EntryWrite, here: Site) -> Vec<(Site, Gva)> {
        let Site { id, place } = here;
        let places = self.tables.places(id);
        if places.len() <= 1 {
            return Vec::new();
        }
        let index = write.level.index(write.va);
        let other = |other: &&Place| (other.root, other.va) != (place.root, place.va);
        let others = places.iter().filter(other).map(|place| Site { id, place: *place });
        others.map(|site| (site, child_address(site.place.va, write.level, index))).collect()
    }

    /// Whether the table's page is a table of one level only, at one place.
    pub(super) fn is_linked_once(&self, id: TableId) -> bool {
        self.tables.page(id).is_some_and(|page| page.is_linked_once(id))
    }

    /// Every place at which the page of this table is linked as a table of another level.
    pub(super) fn other_roles(&self, here: Site) -> Vec<Site> {
        let roles = self.tables.roles(self.tables.frame(here.id)).filter(|id| *id != here.id);
        let sites = |id| self.tables.places(id).iter().map(move |place| Site { id, place: *place });
        roles.flat_map(sites).collect()
    }

    /// Leaves by entries `from..to` of a table, at one of its places.
    pub(super) fn leaves_at(
        &self,
        site: Site,
        (from, to): (u64, u64),
    ) -> impl Iterator<Item = Run> {
        let Site { id, place } = site;
        let (level, page) = (id.level(), self.tables.page(id));
        let mut next = from;
        std::iter::from_fn(move || {
            let page = page?;
            while next < to.min(ENTRIES) {
                let index = next;
                let count = page.run(level, (index, to));
                next += if count > 0 { count } else { page.gap((index, to)).max(1) };
                if count > 0 {
                    let va = child_address(place.va, level, index);
                    let first =
                        Mapping::at(&place, va, level, page.entry(index), page.since(index));
                    return Some(Run { first, count });
                }
            }
            None
        })
    }

    /// What `root` maps in a span, in order of address: all entries that start in it.
    pub(super) fn in_span(
        &self,
        root: Gpa,
        span: (Gva, Gva),
    ) -> impl Iterator<Item = Mapping> + use<> {
        let walked = self.walk_copy(root, span);
        walked
            .leaves
            .into_iter()
            .flat_map(|run| run.entries())
            .filter(move |mapping| mapping.va >= span.0 && mapping.va <= span.1)
    }

    /// Tables below `level` that span from an address in a span.
    pub(super) fn tables_below(
        &self,
        root: Gpa,
        span: (Gva, Gva),
        level: Level,
    ) -> impl Iterator<Item = TableAt> + use<> {
        let inside =
            move |table: &TableAt| table.va >= span.0 && table.va <= span.1 && table.level < level;
        let walked = self.walk_copy(root, span);
        walked.tables.into_iter().filter(inside)
    }

    /// Where a frame is linked as a table, if anywhere.
    pub(super) fn table_at(&self, frames: FrameRange) -> Option<(Gfn, Gpa, Gva)> {
        let linked = |frame| self.tables.linked_at(frame).next();
        frames
            .intersection(self.tables.pool())?
            .iter()
            .find_map(|frame| linked(frame).map(|place| (frame, place.root, place.va)))
    }

    /// Whether a table is linked at this place.
    pub(super) fn is_linked_at(&self, frame: Gfn, root: Gpa, va: Gva) -> bool {
        self.tables.linked_at(frame).any(|place| (place.root, place.va) == (root, va))
    }

    /// Walks the copy; stops where the copy does.
    pub(super) fn walk_copy(&self, root: Gpa, span: (Gva, Gva)) -> Walked {
        let mut walked = Walked::default();
        if let Some(id) = self.tables.id(root.frame(), Level::Pml4) {
            let place = Place { root, va: Gva(0), rights: Rights::ALL, since: 0 };
            let place = self.tables.places(id).iter().find(|p| p.root == root).unwrap_or(&place);
            self.walk_table(id, place, span, &mut walked);
        }
        walked
    }

    fn walk_table(&self, id: TableId, place: &Place, (from, to): (Gva, Gva), walked: &mut Walked) {
        if walked.tables.len() >= self.room {
            walked.endless = true;
            return;
        }
        let Some(page) = self.tables.page(id) else { return };
        let (frame, level) = (self.tables.frame(id), id.level());
        let Place { root, va, .. } = *place;
        walked.tables.push(TableAt { frame, root, va, level, fresh: false });
        let base_last = match level {
            Level::Pml4 => Gva(u64::MAX),
            level => place.va.wrapping_add(level.span() * ENTRIES - 1),
        };
        let mut index = if from > place.va { level.index(from) } else { 0 };
        let end = if to < base_last { level.index(to) + 1 } else { ENTRIES };
        while index < end {
            let entry = page.entry(index);
            let (va, since) = (child_address(place.va, level, index), page.since(index));
            let count = page.run(level, (index, end));
            if count > 0 {
                let first = Mapping::at(place, va, level, entry, since);
                walked.leaves.push(Run { first, count });
            } else if is_table(entry, level)
                && let Some(below) = level.below()
                && let Some(below) = self.tables.id(entry.frame(level), below)
            {
                self.walk_table(below, &place.below(entry, va, since), (from, to), walked);
            }
            index += if count > 0 { count } else { page.gap((index, end)).max(1) };
        }
    }

    /// Mappings of any of the frames by tables that are `wanted`.
    fn overlapping(
        &self,
        frames: FrameRange,
        wanted: impl Fn(TableId) -> bool + Copy,
    ) -> impl Iterator<Item = Mapping> {
        let parts = frames.by_block().filter(|part| !self.maps_nothing(*part));
        let near = parts.flat_map(move |part| {
            let tables = self.aliases.of_block(part).filter(move |found| wanted(found.table));
            tables.flat_map(move |found| self.entries_of(found.table, found.entries, part))
        });
        let wide = self.aliases.wide(frames).filter(move |table| wanted(*table));
        near.chain(wide.flat_map(move |table| self.entries_of(table, (0, ENTRIES), frames)))
    }

    /// Mappings of any of the frames by entries `from..to` of a table.
    fn entries_of(
        &self,
        id: TableId,
        (from, to): (u64, u64),
        frames: FrameRange,
    ) -> impl Iterator<Item = Mapping> {
        let level = id.level();
        let page = self.tables.page(id);
        let hits = (from..to).filter_map(move |index| {
            let page = page?;
            let entry = page.entry(index);
            let leaf = entry.is_present() && entry.is_leaf(level);
            let start = entry.frame(level).0;
            let touches = start < frames.end().0 && start + level.frames() > frames.start().0;
            (leaf && touches).then(|| (index, entry, page.since(index)))
        });
        hits.flat_map(move |(index, entry, since)| {
            self.tables.places(id).iter().map(move |place| {
                let va = child_address(place.va, level, index);
                Mapping::at(place, va, level, entry, since)
            })
        })
    }
}

/// Where a table of `level` spans from that has the entry for `va`.
pub(super) fn base_of(va: Gva, level: Level) -> Gva {
    match level {
        Level::Pml4 => Gva(0),
        level => va.align_down(level.span() * ENTRIES),
    }
}

/// Whether a present entry of this level points to a table.
pub(super) fn is_table(entry: Entry, level: Level) -> bool {
    level > Level::Pt && entry.is_present() && !entry.is_leaf(level)
}

const _: () = assert!(BLOCK_FRAMES == ENTRIES, "a page table maps a pageblock");
