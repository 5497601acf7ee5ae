//! Entry-write records: what they claim, map and link is judged; `revokes` makes what they revoke
//! obligations.

use super::finding::{Finding, Revoke, Rule};
use super::index::{Mapping, Rights, Run, Site, TableAt, Walked, is_table};
use super::links::{Change, meaning};
use super::tables::{Place as TablePlace, TableId};
use super::tlb::{Duty, Leaves, Path, TableDuty, Written, cpu_list, members};
use super::{Audit, TableWords, World};
use lacuna_abi::addr::{FrameRange, Gfn};
use lacuna_abi::event::{EntryWrite, TableFill, mapped_frames};
use lacuna_abi::paging::{Entry, Level};

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
        let Some((_, pcid)) = self.roots.iter().find(|(root, _)| *root == write.root).copied()
        else {
            // A root that is still being built is walked when it is registered.
            self.ledger.not_checked(Rule::TraceHonesty, 1);
            return;
        };
        if write.pcid != pcid {
            self.judge_pcid(cpu, write, pcid, seq);
        }
        let write = &EntryWrite { pcid, ..*write };
        // What the host wrote itself was admitted, and its copy must follow it.
        if !self.is_direct() && self.is_link_work_used_up() {
            return;
        }
        // A remap carries the number that it took before its store.
        let since = if write.grant == 0 { seq } else { write.grant.min(seq) };
        let site = self.index.find_again(write.root, write.va, write.level);
        let plain = |site| self.plain_write(cpu, write, (site, since), seq);
        if !site.is_some_and(plain) {
            self.any_write(cpu, write, (site, since), (seq, world));
        }
    }

    /// `trace-honesty`: a record names the PCID that its root is registered with.
    fn judge_pcid(&mut self, cpu: u8, write: &EntryWrite, pcid: u16, seq: u64) {
        let detail = format!(
            "the record names PCID {}, but its root is registered with PCID {pcid}",
            write.pcid
        );
        let finding = Finding::new(Rule::TraceHonesty, seq, detail);
        let (va, root) = (Some(write.va), Some(write.root));
        self.ledger.violation(Finding { va, cpu: Some(cpu), root, ..finding });
    }

    /// Takes a write of any kind, of entries that grant since `since`.
    fn any_write(
        &mut self,
        cpu: u8,
        write: &EntryWrite,
        (site, since): (Option<Site>, u64),
        (seq, world): (u64, &impl World),
    ) {
        let lies = self.judge_claim(cpu, write, site, seq);
        self.revoke(write, site, &lies, seq);
        if let Some(site) = site {
            self.revoke_elsewhere(write, site, &lies, seq);
        }
        let stale = self.stale_table_of(site);
        if let Some(table) = stale {
            self.note_written(table, &Entries::of(write), since, seq);
        }
        let mut walked = std::mem::take(&mut self.walked);
        walked.clear();
        let Self { index, fills, config, mediation, .. } = self;
        let source = |table: Gfn, into: &mut TableWords| {
            fills.loose(table, into, *mediation, &config.layout, world)
        };
        let mut change = Change::new(&config.layout, &source, since, &mut walked);
        match site {
            Some(site) => index.apply(write, site.id, &mut change),
            None => self.judge_stray(cpu, write, seq, &mut walked),
        }
        self.keep_dropped();
        if !walked.tables.is_empty() {
            self.link_work += walked.tables.len() + walked.leaves.len();
            if let Some(table) = stale {
                self.note_linked(table, write, &walked);
            }
            self.judge_links(Some(cpu), &walked, seq);
            self.judge_linked_windows(&walked, since, seq);
        }
        self.judge_walked(&walked, Some(cpu), seq);
        self.walked = walked;
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
        self.count_claim();
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
            // What it held before is not known any more: all of it counts as taken away.
            let entries =
                Entries { level: fill.level, first: 0, count: 512, old: None, new: fill.first };
            self.note_written(table, &entries, seq, seq);
        }
        self.fills.add(fill);
    }

    /// `stale-table`: a table that was linked nowhere is not linked at another place than before
    /// while a CPU may still walk to it from the old one.
    pub(super) fn judge_links(&mut self, cpu: Option<u8>, walked: &Walked, seq: u64) {
        for TableAt { frame: table, root, va, fresh, .. } in &walked.tables {
            self.fills.remove(*table);
            if !fresh {
                continue;
            }
            self.ledger.checked(Rule::StaleTable, 1);
            let index = &self.index;
            let here = |duty: &&TableDuty| index.is_linked_at(*table, duty.root, duty.va);
            let duties = self.tlb.of_table(*table);
            for duty in duties.iter().filter(|duty| !here(duty)) {
                let detail = format!("the table is linked at {va} while {}", still_walked(duty));
                let finding = Finding::new(Rule::StaleTable, seq, detail);
                let (frame, va) = (Some(*table), Some(*va));
                let (root, revoked) = (Some(*root), revoke_of(duty));
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
        self.count_claim();
        let tables = &self.index.tables;
        let page = site.and_then(|site| tables.page(site.id));
        let (first, _) = entries_of(write);
        let held = |index: u64| page.map_or(Entry::EMPTY, |page| page.entry(first + index));
        // What it says at every level that the page serves at, and at the record's in any case.
        let roles = site.into_iter().flat_map(|site| tables.roles(tables.frame(site.id)));
        let levels: Vec<Level> = roles.map(TableId::level).chain([write.level]).collect();
        let is_lie = |index: &u64| {
            let (claimed, held) = (write.old.nth_of_run(write.level, *index), held(*index));
            let differs = |level: &Level| meaning(held, *level) != meaning(claimed, *level);
            claimed != held && levels.iter().any(differs)
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

    /// The table that a record's entries are in, if CPUs may still walk to it by a revoked path.
    fn stale_table_of(&self, site: Option<Site>) -> Option<Gfn> {
        let site = site.filter(|_| self.tlb.has_stale_tables())?;
        let table = self.index.tables.frame(site.id);
        self.tlb.is_stale_table(table).then_some(table)
    }

    /// What is written into such a table may be cached where it is no longer mapped.
    pub(super) fn note_written(&mut self, table: Gfn, entries: &Entries, since: u64, seq: u64) {
        for level in self.tlb.stale_levels(table) {
            if level == entries.level {
                self.note_written_as(table, (level, entries), since, seq);
                continue;
            }
            // A run steps by the level of the record.
            for index in 0..u64::from(entries.count) {
                let entry = entries.nth(index);
                self.note_written_as(table, (level, &entry), since, seq);
                // What is reached from there through another table is not followed.
                if is_table(entry.new, level) {
                    self.note_too_many();
                }
            }
        }
    }

    /// The same of entries of a table of this level.
    fn note_written_as(
        &mut self,
        table: Gfn,
        (level, entries): (Level, &Entries),
        since: u64,
        seq: u64,
    ) {
        let Entries { first, count, old, new, .. } = *entries;
        let mapped = mapped_frames(new, level, count);
        let written = Written {
            table,
            offset: first * level.span(),
            bytes: u64::from(count) * level.span(),
            revoked: old.is_none_or(|old| revoked(old, new, level)),
            new: mapped.map(|frames| (frames, new.has(Entry::GLOBAL))),
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
}

/// A run of entries that were written, of a table of this level: the first ones, before and after.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entries {
    pub level: Level,
    pub first: u64,
    pub count: u32,
    /// `None` if it is not known.
    pub old: Option<Entry>,
    pub new: Entry,
}

impl Entries {
    fn of(write: &EntryWrite) -> Self {
        let EntryWrite { level, count, old, new, .. } = *write;
        Self { level, first: level.index(write.va), count, old: Some(old), new }
    }

    /// One of them.
    fn nth(&self, index: u64) -> Self {
        let nth = |entry: Entry| entry.nth_of_run(self.level, index);
        let (old, new) = (self.old.map(nth), nth(self.new));
        Self { first: self.first + index, count: 1, old, new, ..*self }
    }
}

/// The entries of the table that the record is about: the first, and the one behind the last.
pub(super) const fn entries_of(write: &EntryWrite) -> (u64, u64) {
    let first = write.level.index(write.va);
    (first, first + write.count as u64)
}

/// The entry that leads to a table.
pub(super) fn path_to(table: &TableAt, since: u64) -> Path {
    let TableAt { frame, root, va, level, .. } = *table;
    let level = Level::from_number(level.number() + 1).unwrap_or(Level::Pml4);
    Path { root, va, level, table: frame, since }
}

/// Who may still take a revoked path to a table, and what would have ended that.
pub(super) fn still_walked(duty: &TableDuty) -> String {
    format!(
        "{} may still walk to it from {}, unlinked by event {}; an INVLPG, a root load or a PGE change \
         there in between would have discharged it",
        cpu_list(duty.cpus),
        duty.va,
        duty.seq
    )
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
#[inline]
pub(super) fn is_sound(write: &EntryWrite) -> bool {
    let exists = |entry: Entry| {
        leaf(entry, write.level).is_none()
            || mapped_frames(entry, write.level, write.count).is_some()
    };
    write.is_well_formed() && exists(write.old) && exists(write.new)
}

/// The entry, if it is present and maps a page.
pub(super) fn leaf(entry: Entry, level: Level) -> Option<Entry> {
    (entry.is_present() && entry.is_leaf(level)).then_some(entry)
}

/// Whether a write takes away a translation, or a right, that may be cached (SDM volume 3,
/// "Recommended Invalidation"): not present any more, another frame or size, fewer rights, another
/// Global bit.
#[inline]
pub(super) fn revoked(old: Entry, new: Entry, level: Level) -> bool {
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
