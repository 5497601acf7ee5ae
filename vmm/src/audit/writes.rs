//! Entry-write records: what they revoke becomes an obligation, what they map is judged.

use super::finding::{Finding, Revoke, Rule};
use super::index::{Mapping, Rights, Run, Site, TableAt, Walked, is_table};
use super::links::{Change, meaning};
use super::tables::Place as TablePlace;
use super::tlb::{CpuSet, Duty, EVERY, Leaves, Path, TableDuty, Written, cpu_list, members, only};
use super::{Audit, MAX_LINK_WORK, TableWords, World};
use lacuna_abi::addr::{FrameRange, Gfn, Gva};
use lacuna_abi::event::{EntryWrite, TableFill, mapped_frames};
use lacuna_abi::layout::Place;
use lacuna_abi::paging::{ENTRIES, Entry, Level};

impl Audit {
    /// Takes one entry-write record of a CPU.
    pub(super) fn entry_write(
        &mut self,
        cpu: u8,
        write: &EntryWrite,
        seq: u64,
        world: &impl World,
    ) {
        if !is_sound(write) {
            let reason = format!("the entry write {seq} leaves its table or physical memory");
            self.ledger.inconclusive(reason);
            return;
        }
        if !self.is_registered(write.root) {
            // A root that is still being built is walked when it is registered.
            self.ledger.not_checked(Rule::TraceHonesty, 1);
            return;
        }
        if self.link_work >= MAX_LINK_WORK {
            let reason = "too many tables are linked between two quiesce points".to_owned();
            self.ledger.inconclusive(reason);
            return;
        }
        let site = self.index.find(write.root, write.va, write.level);
        let lies = self.judge_claim(cpu, write, site, seq);
        self.revoke(write, site, &lies, seq);
        // One store changes the entry wherever its table is linked.
        let others = site.map(|site| self.index.other_places(write, site)).unwrap_or_default();
        self.link_work += others.len();
        for (site, va) in others {
            let root = site.place.root;
            let pcid = self.roots.iter().find(|(known, _)| *known == root).map_or(0, |(_, p)| *p);
            self.revoke(&EntryWrite { root, pcid, va, ..*write }, Some(site), &lies, seq);
        }
        // A remap carries the number that it took before its store.
        let since = if write.grant == 0 { seq } else { write.grant.min(seq) };
        let stale = self.stale_table_of(site);
        if let Some(table) = stale {
            self.note_written(table, write, since, seq);
        }
        let mut walked = std::mem::take(&mut self.walked);
        walked.clear();
        let Self { index, fills, config, .. } = self;
        let source = |table: Gfn, into: &mut TableWords| {
            fills.table(table, into) || world.read_table(table, into)
        };
        let mut change = Change::new(&config.layout, &source, since, &mut walked);
        match site {
            Some(site) => index.apply(write, site.id, &mut change),
            None => self.judge_stray(cpu, write, seq, &mut walked),
        }
        if !walked.tables.is_empty() {
            self.link_work += walked.tables.len() + walked.leaves.len();
            if let Some(table) = stale {
                self.note_linked(table, write, &walked);
            }
            self.judge_links(cpu, write, &walked, seq);
        }
        self.judge_walked(&walked, Some(cpu), seq);
        self.walked = walked;
    }

    /// What the record revokes at one of the places of its table. What was there whatever the record
    /// claims, by the entries `lies`, is owed too.
    fn revoke(&mut self, write: &EntryWrite, site: Option<Site>, lies: &[u64], seq: u64) {
        let (first, _) = entries_of(write);
        let held = |site, index| self.index.leaves_at(site, (first + index, first + index + 1));
        let places = site.into_iter().flat_map(|site| lies.iter().map(move |lie| (site, *lie)));
        let hidden = places.flat_map(|(site, lie)| held(site, lie));
        let hidden: Vec<Leaves> = hidden.flat_map(|run| leaves_of(&run)).collect();
        hidden.iter().for_each(|leaves| self.oblige(leaves, seq));
        let grants = if lies.is_empty() { self.grants(write, site) } else { Grants::All(0) };
        self.judge_remap(write, (site, grants), seq);
        self.oblige_leaves(write, (site, grants), seq);
        if write.level > Level::Pt {
            self.oblige_tables(write, seq);
        }
    }

    /// When the entries of a run were granted that has been told the truth of.
    fn grants(&self, write: &EntryWrite, site: Option<Site>) -> Grants {
        let Some(site) = site else { return Grants::All(0) };
        let mut leaves = self.index.leaves_at(site, entries_of(write));
        let since = leaves.next().map_or(0, |run| run.first.since);
        if leaves.all(|run| run.first.since == since) { Grants::All(since) } else { Grants::Each }
    }

    /// `trace-honesty`: an entry is written only in a table that its root reaches. What it maps is
    /// judged all the same, as if the path to it granted everything.
    fn judge_stray(&mut self, cpu: u8, write: &EntryWrite, seq: u64, walked: &mut Walked) {
        if !write.new.is_present() {
            return;
        }
        let place = TablePlace { root: write.root, va: write.va, rights: Rights::ALL, since: seq };
        let first = Mapping::at(&place, write.va, write.level, write.new, seq);
        if leaf(write.new, write.level).is_some() {
            walked.leaves.push(Run { first, count: u64::from(write.count) });
        }
        let detail =
            "the record writes an entry of a table that its root does not lead to, as far \
                      as earlier records and the first tables say"
                .to_owned();
        let finding = Finding::new(Rule::TraceHonesty, seq, detail);
        let (frame, va, root) = (Some(first.frame), Some(write.va), Some(write.root));
        self.ledger.violation(Finding { frame, va, cpu: Some(cpu), root, ..finding });
    }

    /// Takes the record of a table that was filled while no root reached it.
    pub(super) fn table_fill(&mut self, cpu: u8, fill: &TableFill, seq: u64) {
        let table = fill.table.frame();
        if !self.config.layout.pool.contains(fill.table) {
            // A root that leads there will be found by `table-alias`.
            return;
        }
        self.ledger.checked(Rule::TraceHonesty, 1);
        if let Some((frame, root, va)) = self.index.table_at(FrameRange::single(table)) {
            let detail = "the record says that a table was filled that a root reaches; entries of \
                          such a table must be recorded one by one"
                .to_owned();
            let finding = Finding::new(Rule::TraceHonesty, seq, detail);
            let (frame, va, root) = (Some(frame), Some(va), Some(root));
            self.ledger.violation(Finding { frame, va, cpu: Some(cpu), root, ..finding });
            return;
        }
        // Whoever fills a table uses its page again, whatever was said of its life.
        self.ledger.checked(Rule::StaleTable, 1);
        self.judge_table_page(table, seq);
        if self.tlb.is_stale_table(table) {
            let (level, bytes) = (fill.level, fill.level.span() << 9);
            let new = mapped_frames(fill.first, level, 512);
            let new = new.map(|frames| (frames, fill.first.has(Entry::GLOBAL)));
            let (offset, revoked, since) = (0, true, seq);
            let kept = self.tlb.written(&Written {
                table,
                offset,
                bytes,
                revoked,
                new,
                level,
                since,
                seq,
            });
            self.note_dropped(kept);
        }
        self.fills.add(fill);
    }

    /// `stale-table`: a table that was linked nowhere is not linked at another place than before
    /// while a CPU may still walk to it from the old one.
    fn judge_links(&mut self, cpu: u8, write: &EntryWrite, walked: &Walked, seq: u64) {
        for TableAt { frame: table, va, fresh, .. } in &walked.tables {
            self.fills.remove(*table);
            if !fresh {
                continue;
            }
            self.ledger.checked(Rule::StaleTable, 1);
            let index = &self.index;
            let here = |duty: &&TableDuty| index.is_linked_at(*table, duty.root, duty.va);
            let duties = self.tlb.of_table(*table);
            for duty in duties.iter().filter(|duty| !here(duty)) {
                let detail = format!(
                    "the table is linked at {va} while {} may still walk to it from {}, unlinked by \
                     event {}; an INVLPG, a root load or a PGE change there in between would have \
                     discharged it",
                    cpu_list(duty.cpus),
                    duty.va,
                    duty.seq
                );
                let finding = Finding::new(Rule::StaleTable, seq, detail);
                let (frame, va) = (Some(*table), Some(*va));
                let (cpu, root) = (Some(cpu), Some(write.root));
                let revoked = revoke_of(duty);
                self.ledger.violation(Finding { frame, va, cpu, root, revoked, ..finding });
            }
        }
    }

    /// `trace-honesty`: what a record says that its entries held is what the records before it made
    /// of them. A revoke cannot be hidden behind a false "before": the translations that are known
    /// to be there become obligations whatever the record claims. The result are the entries, counted
    /// from the record's first, of which it is false.
    fn judge_claim(
        &mut self,
        cpu: u8,
        write: &EntryWrite,
        site: Option<Site>,
        seq: u64,
    ) -> Vec<u64> {
        self.ledger.checked(Rule::TraceHonesty, 1);
        let page = site.and_then(|site| self.index.tables.page(site.id));
        let (first, _) = entries_of(write);
        let held = |index: u64| page.map_or(Entry::EMPTY, |page| page.entry(first + index));
        let is_lie = |index: &u64| {
            let claimed = write.old.nth_of_run(write.level, *index);
            meaning(held(*index), write.level) != meaning(claimed, write.level)
        };
        let lies: Vec<u64> = (0..u64::from(write.count)).filter(is_lie).collect();
        let Some(index) = lies.first() else { return lies };
        let (va, entry) = (write.va.wrapping_add(index * write.level.span()), held(*index));
        let frame = entry.is_present().then(|| entry.frame(write.level));
        let detail =
            "the record's old value is not what earlier records and the first tables left \
                      in the entry; a record must carry the entry as it was before the store"
                .to_owned();
        let finding = Finding::new(Rule::TraceHonesty, seq, detail);
        let (va, root, cpu) = (Some(va), Some(write.root), Some(cpu));
        self.ledger.violation(Finding { frame, va, cpu, root, ..finding });
        lies
    }

    /// `stale-window`: a window address that gets a new translation has no old one left on the
    /// window's own CPU.
    fn judge_remap(&mut self, write: &EntryWrite, granted: (Option<Site>, Grants), seq: u64) {
        let Some((owner, new)) = self.window_of(write.va).zip(leaf(write.new, write.level)) else {
            return;
        };
        self.ledger.checked(Rule::StaleWindow, u64::from(write.count));
        if self.tlb.may_cache(write.root) & !only(owner) != 0 {
            // Copies that other CPUs may have made speculatively are not followed.
            self.ledger.not_checked(Rule::StaleWindow, u64::from(write.count));
        }
        let last = write.va.wrapping_add(write.span() - 1);
        let mut stale = self.tlb.at(write.va, last);
        stale.retain(|duty| duty.tag.is_used_under(write.pcid));
        if let Some(old) = leaf(write.old, write.level)
            && old.frame(write.level) != new.frame(write.level)
        {
            self.revoked_leaves(write, old, granted, |audit, leaves| {
                stale.extend(audit.tlb.would_owe(leaves, only(owner), seq));
            });
        }
        for duty in stale.iter().filter(|duty| duty.cpus & only(owner) != 0) {
            let detail = format!(
                "the address is remapped while CPU {owner} may cache the translation revoked by \
                 event {}; an INVLPG or a root load by CPU {owner} in between, or a completed \
                 seal of the frame, would have discharged it",
                duty.seq
            );
            self.ledger.violation(stale_finding(Rule::StaleWindow, duty, owner, seq, detail));
        }
    }

    /// Leaves that the record revokes.
    fn oblige_leaves(&mut self, write: &EntryWrite, granted: (Option<Site>, Grants), seq: u64) {
        if let Some(old) = leaf(write.old, write.level)
            && revoked(write.old, write.new, write.level)
        {
            self.revoked_leaves(write, old, granted, |audit, leaves| audit.oblige(leaves, seq));
        }
    }

    /// The leaves of the run that starts with `old`, in parts that were granted together.
    fn revoked_leaves(
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
    fn own_leaves(&self, site: Option<Site>) -> impl Iterator<Item = Leaves> {
        let runs = site.into_iter().flat_map(|site| self.index.leaves_at(site, (0, ENTRIES)));
        joined(runs.flat_map(|run| leaves_of(&run)))
    }

    /// The table that a record's entries are in, if CPUs may still walk to it by a revoked path.
    fn stale_table_of(&self, site: Option<Site>) -> Option<Gfn> {
        let site = site.filter(|_| self.tlb.has_stale_tables())?;
        let table = self.index.tables.frame(site.id);
        self.tlb.is_stale_table(table).then_some(table)
    }

    /// What is written into such a table may be cached where it is no longer mapped.
    fn note_written(&mut self, table: Gfn, write: &EntryWrite, since: u64, seq: u64) {
        let level = write.level;
        let new = mapped_frames(write.new, level, write.count);
        let written = Written {
            table,
            offset: write.va.0 & ((level.span() << 9) - 1),
            bytes: write.span(),
            revoked: revoked(write.old, write.new, level),
            new: new.map(|frames| (frames, write.new.has(Entry::GLOBAL))),
            level,
            since,
            seq,
        };
        let kept = self.tlb.written(&written);
        self.note_dropped(kept);
    }

    /// Likewise what is reached through it, wherever it is linked.
    fn note_linked(&mut self, parent: Gfn, write: &EntryWrite, walked: &Walked) {
        let last = write.va.wrapping_add(write.span() - 1);
        let here = |t: &&TableAt| t.root == write.root && t.va >= write.va && t.va <= last;
        for table in walked.tables.iter().filter(here) {
            let leaves: Vec<Leaves> = self.own_leaves(self.index.site(table)).collect();
            let offset = table.va.0 & ((write.level.span() << 9) - 1);
            let kept = self.tlb.linked(parent, offset, &path_to(table, 0), &leaves);
            self.note_dropped(kept);
        }
    }

    /// Makes the leaves a duty of the CPUs that may cache them; of none where no rule asks.
    fn oblige(&mut self, leaves: &Leaves, seq: u64) {
        let among = self.among(leaves.va);
        if among != 0 {
            let kept = self.tlb.revoke(leaves, among, seq);
            self.note_dropped(kept);
        }
    }

    /// The CPUs whose copies of what is mapped at the address are followed: of a window only the
    /// owner's.
    fn among(&self, va: Gva) -> CpuSet {
        match self.config.layout.place_of(va) {
            Place::DirectMap => EVERY,
            Place::Window(_) => self.window_of(va).map_or(0, only),
            Place::Pool | Place::Other => 0,
        }
    }

    /// The CPU in whose window the address lies.
    pub(super) fn window_of(&self, va: Gva) -> Option<u8> {
        match self.config.layout.place_of(va) {
            Place::Window(owner) => u8::try_from(owner).ok(),
            Place::DirectMap | Place::Pool | Place::Other => None,
        }
    }
}

/// When the entries of a run were granted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Grants {
    /// All by the event with this number.
    All(u64),
    /// Not all by the same.
    Each,
}

/// The entries of the table that the record is about: the first, and the one behind the last.
const fn entries_of(write: &EntryWrite) -> (u64, u64) {
    let first = write.level.index(write.va);
    (first, first + write.count as u64)
}

/// The entry that leads to a table.
fn path_to(table: &TableAt, since: u64) -> Path {
    let TableAt { frame, root, va, level, .. } = *table;
    let level = Level::from_number(level.number() + 1).unwrap_or(Level::Pml4);
    Path { root, va, level, table: frame, since }
}

/// The leaves of a run, small pages all at once: they lie in one window, larger ones may not.
fn leaves_of(run: &Run) -> impl Iterator<Item = Leaves> + use<> {
    let at_once = run.first.level == Level::Pt;
    let leaves = |mapping: Mapping, frames: FrameRange| {
        let Mapping { root, va, level, global, since, .. } = mapping;
        Leaves { root, va, level, frames, global, since }
    };
    let all = at_once.then(|| leaves(run.first, run.frames()));
    let each = (!at_once).then(|| run.entries()).into_iter().flatten();
    all.into_iter().chain(each.map(move |mapping| leaves(mapping, mapping.frames())))
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

/// The revoke of a path that a CPU may still cache.
pub(super) fn revoke_of(duty: &TableDuty) -> Option<Revoke> {
    let cpu = members(duty.cpus).next()?;
    Some(Revoke { seq: duty.seq, cpu, va: duty.va })
}

/// A finding about an obligation that is still open on `cpu`.
pub(super) fn stale_finding(rule: Rule, duty: &Duty, cpu: u8, seq: u64, detail: String) -> Finding {
    let (frame, va) = (Some(duty.frames.start()), Some(duty.va));
    let root = Some(duty.root);
    let revoked = Some(Revoke { seq: duty.seq, cpu, va: duty.va });
    Finding { frame, va, cpu: Some(cpu), root, revoked, ..Finding::new(rule, seq, detail) }
}

/// Whether the run lies in one table and everything that it maps can exist.
fn is_sound(write: &EntryWrite) -> bool {
    let exists = |entry: Entry| {
        leaf(entry, write.level).is_none()
            || mapped_frames(entry, write.level, write.count).is_some()
    };
    write.is_well_formed() && exists(write.old) && exists(write.new)
}

/// The entry, if it is present and maps a page.
fn leaf(entry: Entry, level: Level) -> Option<Entry> {
    (entry.is_present() && entry.is_leaf(level)).then_some(entry)
}

/// Whether a write takes away a translation, or a right, that may be cached (SDM volume 3,
/// "Recommended Invalidation"): not present any more, another frame or size, fewer rights, another
/// Global bit.
fn revoked(old: Entry, new: Entry, level: Level) -> bool {
    let lost = |bit| old.has(bit) && !new.has(bit);
    let is_leaf = old.is_leaf(level);
    old.is_present()
        && (!new.is_present()
            || is_leaf != new.is_leaf(level)
            || old.frame(level) != new.frame(level)
            || lost(Entry::WRITABLE)
            || lost(Entry::USER)
            || (new.has(Entry::NO_EXECUTE) && !old.has(Entry::NO_EXECUTE))
            || (is_leaf && old.has(Entry::GLOBAL) != new.has(Entry::GLOBAL)))
}
