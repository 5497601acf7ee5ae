//! What an entry-write record revokes, at every place of the table, becomes an obligation.

use super::Audit;
use super::index::{Run, Site, TableAt, is_table};
use super::tlb::{CpuSet, EVERY, Leaves, only};
use super::writes::{entries_of, leaf, path_to, revoked};
use lacuna_abi::addr::{FrameRange, Gva};
use lacuna_abi::event::{EntryWrite, mapped_frames};
use lacuna_abi::layout::Place;
use lacuna_abi::paging::{ENTRIES, Entry, Level};

impl Audit {
    /// What the record revokes at one of the places of its table. What was there whatever the record
    /// claims, by the entries `lies`, is owed too.
    pub(super) fn revoke(
        &mut self,
        write: &EntryWrite,
        site: Option<Site>,
        lies: &[u64],
        seq: u64,
    ) {
        if !lies.is_empty() {
            self.oblige_hidden(write, site, lies, seq);
        }
        let grants = if lies.is_empty() { self.grants(write, site) } else { Grants::All(0) };
        self.judge_remap(write, (site, grants), seq);
        self.oblige_leaves(write, (site, grants), seq);
        if write.level > Level::Pt {
            self.oblige_tables(write, seq);
        }
    }

    /// What was there whatever the record claims.
    fn oblige_hidden(&mut self, write: &EntryWrite, site: Option<Site>, lies: &[u64], seq: u64) {
        let (first, _) = entries_of(write);
        let held = |site, index| self.index.leaves_at(site, (first + index, first + index + 1));
        let places = site.into_iter().flat_map(|site| lies.iter().map(move |lie| (site, *lie)));
        let hidden = places.flat_map(|(site, lie)| held(site, lie));
        let hidden: Vec<Leaves> = hidden.flat_map(|run| leaves_of(&run)).collect();
        hidden.iter().for_each(|leaves| self.oblige(leaves, seq));
    }

    /// When the entries of a run were granted that has been told the truth of.
    fn grants(&self, write: &EntryWrite, site: Option<Site>) -> Grants {
        // Of what is not present nothing is owed.
        let Some(site) = site.filter(|_| write.old.is_present()) else { return Grants::All(0) };
        let mut leaves = self.index.leaves_at(site, entries_of(write));
        let since = leaves.next().map_or(0, |run| run.first.since);
        if leaves.all(|run| run.first.since == since) { Grants::All(since) } else { Grants::Each }
    }

    /// Leaves that the record revokes.
    #[inline]
    pub(super) fn oblige_leaves(
        &mut self,
        write: &EntryWrite,
        granted: (Option<Site>, Grants),
        seq: u64,
    ) {
        if let Some(old) = leaf(write.old, write.level)
            && revoked(write.old, write.new, write.level)
        {
            self.revoked_leaves(write, old, granted, |audit, leaves| audit.oblige(leaves, seq));
        }
    }

    /// The leaves of the run that starts with `old`, in parts that were granted together.
    pub(super) fn revoked_leaves(
        &mut self,
        write: &EntryWrite,
        old: Entry,
        (site, grants): (Option<Site>, Grants),
        mut each: impl FnMut(&mut Self, &Leaves),
    ) {
        let EntryWrite { root, va, level, count, .. } = *write;
        let global = old.has(Entry::GLOBAL);
        match grants {
            Grants::All(since) => {
                if let Some(frames) = mapped_frames(old, level, count) {
                    each(self, &Leaves { root, va, level, frames, global, since });
                }
            }
            Grants::Each => {
                let runs =
                    site.into_iter().flat_map(|s| self.index.leaves_at(s, entries_of(write)));
                let parts: Vec<Leaves> = joined(runs.flat_map(|run| leaves_of(&run))).collect();
                parts.iter().for_each(|leaves| each(self, leaves));
            }
        }
    }

    /// Tables that the record takes out of the address space, or grants fewer rights, with the
    /// leaves in them.
    fn oblige_tables(&mut self, write: &EntryWrite, seq: u64) {
        let EntryWrite { root, level, .. } = *write;
        for index in 0..u64::from(write.count) {
            let old = write.old.nth_of_run(level, index);
            let new = write.new.nth_of_run(level, index);
            let Some(below) = level.below().filter(|_| is_table(old, level)) else { continue };
            if !revoked(old, new, level) {
                continue;
            }
            let va = write.va.wrapping_add(index * level.span());
            let span = (va, va.wrapping_add(level.span() - 1));
            let mut tables: Vec<_> = self.index.tables_below(root, span, level).collect();
            let own = TableAt { frame: old.frame(level), root, va, level: below, fresh: false };
            if !tables.contains(&own) {
                tables.push(own);
            }
            tables.iter().for_each(|table| self.oblige_table(table, seq));
        }
    }

    /// One table that is no longer reached where it was, with its own leaves.
    fn oblige_table(&mut self, table: &TableAt, seq: u64) {
        let site = self.index.site(table);
        let leaves: Vec<(Leaves, CpuSet)> =
            self.own_leaves(site).map(|leaves| (leaves, self.among(leaves.va))).collect();
        if !self.config.layout.pool.contains(table.frame.gpa()) {
            leaves.iter().for_each(|(leaves, _)| self.oblige(leaves, seq));
            return;
        }
        let since = site.map_or(0, |site| site.place.since);
        let kept = self.tlb.unlink(&path_to(table, since), &leaves, seq);
        self.note_dropped(kept);
    }

    /// A table's own leaves, at one of its places.
    pub(super) fn own_leaves(&self, site: Option<Site>) -> impl Iterator<Item = Leaves> {
        let runs = site.into_iter().flat_map(|site| self.index.leaves_at(site, (0, ENTRIES)));
        joined(runs.flat_map(|run| leaves_of(&run)))
    }

    /// Makes the leaves a duty of the CPUs that may cache them; of none where no rule asks.
    #[inline]
    pub(super) fn oblige(&mut self, leaves: &Leaves, seq: u64) {
        let among = self.among(leaves.va);
        if among != 0 {
            let kept = self.tlb.revoke(leaves, among, seq);
            self.note_dropped(kept);
        }
    }

    /// The CPUs whose copies of what is mapped at the address are followed: of a window only the
    /// owner's.
    #[inline]
    pub(super) fn among(&self, va: Gva) -> CpuSet {
        match self.config.layout.place_of(va) {
            Place::DirectMap => EVERY,
            Place::Window(_) => self.window_of(va).map_or(0, only),
            Place::Pool | Place::Other => 0,
        }
    }

    /// The CPU in whose window the address lies.
    #[inline]
    pub(super) fn window_of(&self, va: Gva) -> Option<u8> {
        match self.config.layout.place_of(va) {
            Place::Window(owner) => u8::try_from(owner).ok(),
            Place::DirectMap | Place::Pool | Place::Other => None,
        }
    }
}

/// When the entries of a run were granted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Grants {
    /// All by the event with this number.
    All(u64),
    /// Not all by the same.
    Each,
}

/// The leaves of a run, small pages all at once: they lie in one window, larger ones may not.
fn leaves_of(run: &Run) -> impl Iterator<Item = Leaves> + use<> {
    let at_once = run.first.level == Level::Pt;
    let all = at_once.then(|| Leaves { frames: run.frames(), ..run.first.leaves() });
    let each = (!at_once).then(|| run.entries()).into_iter().flatten();
    all.into_iter().chain(each.map(|mapping| mapping.leaves()))
}

/// Joins small pages of one table that follow each other, frames and all: a table of them is mostly
/// one run.
fn joined(leaves: impl Iterator<Item = Leaves>) -> impl Iterator<Item = Leaves> {
    let mut leaves = leaves.peekable();
    std::iter::from_fn(move || {
        let mut run = leaves.next()?;
        while let Some(next) = leaves.next_if(|next| {
            run.level == Level::Pt
                && next.level == Level::Pt
                && (next.global, next.since) == (run.global, run.since)
                && next.va.align_down(Level::Pd.span()) == run.va.align_down(Level::Pd.span())
                && next.va.0 == run.va.0 + run.frames.count() * Level::Pt.span()
                && next.frames.start() == run.frames.end()
        }) {
            let frames =
                FrameRange::new(run.frames.start(), run.frames.count() + next.frames.count());
            run.frames = frames.unwrap_or(run.frames);
        }
        Some(run)
    })
}
