//! Entry-write records: what they revoke becomes an obligation, what they map is judged.

use super::duty::Duty;
use super::epochs::only;
use super::finding::{Finding, Rule};
use super::index::{Mapping, Rights, Run, Site, TableAt, Walked, is_table};
use super::links::{Change, meaning};
use super::obligations::cpu_list;
use super::stale_tables::TableDuty;
use super::tables::Place as TablePlace;
use super::{Audit, MAX_LINK_WORK, TableWords, World};
use lacuna_abi::addr::{FrameRange, Gfn, Gva};
use lacuna_abi::event::{EntryWrite, TableFill, mapped_frames};
use lacuna_abi::layout::Place;
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
        self.judge_claim(cpu, write, site, seq);
        self.revoke(write, seq);
        // One store changes the entry wherever its table is linked.
        let others = site.map(|site| self.index.other_places(write, site)).unwrap_or_default();
        self.link_work += others.len();
        for (root, va) in others {
            let pcid = self.roots.iter().find(|(known, _)| *known == root).map_or(0, |(_, p)| *p);
            self.revoke(&EntryWrite { root, pcid, va, ..*write }, seq);
        }
        let mut walked = std::mem::take(&mut self.walked);
        walked.clear();
        let Self { index, fills, config, .. } = self;
        let source = |table: Gfn, into: &mut TableWords| {
            fills.table(table, into) || world.read_table(table, into)
        };
        let since = if write.grant == 0 { seq } else { write.grant };
        let mut change = Change::new(&config.layout, &source, since, &mut walked);
        match site {
            Some(site) => index.apply(write, site.id, &mut change),
            None => self.judge_stray(cpu, write, seq, &mut walked),
        }
        if !walked.tables.is_empty() {
            self.link_work += walked.tables.len() + walked.leaves.len();
            self.judge_links(cpu, write, &walked, seq);
        }
        self.judge_walked(&walked, Some(cpu), seq);
        self.walked = walked;
    }

    /// What the record revokes at the address that it names.
    fn revoke(&mut self, write: &EntryWrite, seq: u64) {
        self.judge_remap(write, seq);
        self.oblige_leaves(write, seq);
        if write.level > Level::Pt {
            self.oblige_tables(write, seq);
        }
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
            let duties = self.table_duties.of_table(*table, &self.epochs);
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
                self.ledger.violation(Finding { frame, va, cpu, root, ..finding });
            }
        }
    }

    /// `trace-honesty`: what a record says that its entries held is what the records before it made
    /// of them. A revoke cannot be hidden behind a false "before": the translations that are known
    /// to be there become obligations whatever the record claims.
    fn judge_claim(&mut self, cpu: u8, write: &EntryWrite, site: Option<Site>, seq: u64) {
        self.ledger.checked(Rule::TraceHonesty, 1);
        let known =
            site.and_then(|site| self.index.tables.page(site.id).map(|page| (page, site.place)));
        let first = write.level.index(write.va);
        let lies = |index: &u64| {
            let claimed = write.old.nth_of_run(write.level, *index);
            let held = known.as_ref().map_or(Entry::EMPTY, |(page, _)| page.entry(first + index));
            meaning(held, write.level) != meaning(claimed, write.level)
        };
        let mut lies = (0..u64::from(write.count)).filter(lies).peekable();
        let Some(index) = lies.peek() else { return };
        let va = write.va.wrapping_add(index * write.level.span());
        let held = known.as_ref().map(|(page, _)| page.entry(first + index));
        let frame = held.filter(|entry| entry.is_present()).map(|entry| entry.frame(write.level));
        let hidden: Vec<Mapping> = lies
            .filter_map(|index| {
                let (page, place) = known?;
                let entry = leaf(page.entry(first + index), write.level)?;
                let va = write.va.wrapping_add(index * write.level.span());
                Some(Mapping::at(&place, va, write.level, entry, page.since(first + index)))
            })
            .collect();
        let detail =
            "the record's old value is not what earlier records and the first tables left \
                      in the entry; a record must carry the entry as it was before the store"
                .to_owned();
        let finding = Finding::new(Rule::TraceHonesty, seq, detail);
        let (va, root, cpu) = (Some(va), Some(write.root), Some(cpu));
        let finding = Finding { frame, va, cpu, root, ..finding };
        let duties: Vec<Duty> = hidden
            .iter()
            .filter_map(|mapping| {
                let Mapping { root, va, level, global, .. } = *mapping;
                let (frames, pcid) = (mapping.frames(), write.pcid);
                self.with_cpus(Duty { root, pcid, global, level, va, frames, seq, cpus: 0 })
            })
            .collect();
        let mut kept = true;
        for duty in &duties {
            kept &= self.duties.add(duty, &self.epochs).is_ok();
        }
        self.ledger.violation(finding);
        self.note_dropped(!kept);
    }

    /// `stale-window`: a window address that gets a new translation has no old one left on the
    /// window's own CPU.
    fn judge_remap(&mut self, write: &EntryWrite, seq: u64) {
        let Some((owner, grants)) = self.window_of(write.va).zip(leaf(write.new, write.level))
        else {
            return;
        };
        self.ledger.checked(Rule::StaleWindow, u64::from(write.count));
        if self.cpus.may_cache(write.root, false) & !only(owner) != 0 {
            // Copies that other CPUs may have made speculatively are not followed.
            self.ledger.not_checked(Rule::StaleWindow, u64::from(write.count));
        }
        let last = write.va.wrapping_add(write.span() - 1);
        let mut stale = self.duties.at(write.va, last, &self.epochs);
        stale.retain(|duty| duty.global || duty.pcid == write.pcid);
        if let Some(revokes) = leaf(write.old, write.level)
            && revokes.frame(write.level) != grants.frame(write.level)
        {
            stale.extend(self.duty_of(write, revokes, seq));
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
    fn oblige_leaves(&mut self, write: &EntryWrite, seq: u64) {
        if let Some(revokes) = leaf(write.old, write.level)
            && revoked(write.old, write.new, write.level)
            && let Some(duty) = self.duty_of(write, revokes, seq)
        {
            let kept = self.duties.add(&duty, &self.epochs);
            self.note_dropped(kept.is_err());
        }
    }

    /// Tables that the record takes out of the address space, or grants fewer rights, with the
    /// leaves in them.
    fn oblige_tables(&mut self, write: &EntryWrite, seq: u64) {
        let cpus = self.cpus.may_cache(write.root, false);
        for index in 0..u64::from(write.count) {
            let old = write.old.nth_of_run(write.level, index);
            let new = write.new.nth_of_run(write.level, index);
            if !is_table(old, write.level) || !revoked(old, new, write.level) {
                continue;
            }
            let va = write.va.wrapping_add(index * write.level.span());
            let span = (va, va.wrapping_add(write.level.span() - 1));
            let below = self.index.in_span(write.root, span).filter(|m| m.level < write.level);
            let leaves: Vec<Duty> = joined(below.map(|mapping| {
                let Mapping { root, va, level, global, .. } = mapping;
                let (frames, pcid) = (mapping.frames(), write.pcid);
                Duty { root, pcid, global, level, va, frames, seq, cpus: 0 }
            }))
            .filter_map(|duty| self.with_cpus(duty))
            .collect();
            let mut kept = true;
            for duty in &leaves {
                kept &= self.duties.add(duty, &self.epochs).is_ok();
            }
            let mut tables: Vec<_> = self.index.tables_in(write.root, span, write.level).collect();
            tables.push((old.frame(write.level), va));
            tables.retain(|(table, _)| self.config.layout.pool.contains(table.gpa()));
            for (table, va) in tables {
                let duty = TableDuty { root: write.root, pcid: write.pcid, va, seq, cpus };
                kept &= self.table_duties.add(table, duty, &self.epochs);
            }
            self.note_dropped(!kept);
        }
    }

    /// The obligation of a whole run; `None` where no rule asks.
    fn duty_of(&self, write: &EntryWrite, revokes: Entry, seq: u64) -> Option<Duty> {
        let EntryWrite { root, pcid, va, level, count, .. } = *write;
        let frames = mapped_frames(revokes, level, count)?;
        let global = revokes.has(Entry::GLOBAL);
        self.with_cpus(Duty { root, pcid, global, level, va, frames, seq, cpus: 0 })
    }

    /// The obligation with the CPUs that may cache it; of a window only the owner's copy is
    /// followed. `None` where no rule asks.
    fn with_cpus(&self, duty: Duty) -> Option<Duty> {
        let live = self.cpus.may_cache(duty.root, duty.global);
        match self.config.layout.place_of(duty.va) {
            Place::DirectMap => Some(Duty { cpus: live, ..duty }),
            Place::Window(_) => Some(Duty { cpus: live & only(self.window_of(duty.va)?), ..duty }),
            Place::Pool | Place::Other => None,
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

/// Joins small pages of one table that follow each other, frames and all: a table of them is mostly
/// one run.
fn joined(duties: impl Iterator<Item = Duty>) -> impl Iterator<Item = Duty> {
    let mut duties = duties.peekable();
    std::iter::from_fn(move || {
        let mut run = duties.next()?;
        while let Some(next) = duties.next_if(|next| {
            run.level == Level::Pt
                && next.level == Level::Pt
                && next.global == run.global
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

/// A finding about an obligation that is still open on `cpu`.
pub(super) fn stale_finding(rule: Rule, duty: &Duty, cpu: u8, seq: u64, detail: String) -> Finding {
    let (frame, va) = (Some(duty.frames.start()), Some(duty.va));
    let root = Some(duty.root);
    Finding { frame, va, cpu: Some(cpu), root, ..Finding::new(rule, seq, detail) }
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
