//! Direct paging: what a guest asks to have written to its tables is judged before it is. What is
//! refused is a violation of the rule that it would break; what is written keeps all rules about
//! mappings, so that they hold at any time, and not only when a record or a check is looked at.
//!
//! `sought` finds what would be mapped, `judge` says whether it may be.

mod judge;
mod sought;

use super::finding::{Finding, Rule};
use super::index::{Rights, base_of};
use super::links::meaning;
use super::story::Moment;
use super::tables::{Place, TableId};
use super::writes::{is_sound, revoke_of, still_walked};
use super::{Audit, World};
use lacuna_abi::addr::{FrameRange, Gfn, Gpa, Gva};
use lacuna_abi::direct::TableOp;
use lacuna_abi::event::{EntryWrite, Event, Record, TableFill};
use lacuna_abi::gate::Status;
use lacuna_abi::paging::{ENTRIES, Entry, Level};
use lacuna_abi::walk::{EVERYTHING, child_address};
use sought::Sought;

/// Why nothing is written.
enum Unfit {
    /// It would break a rule.
    Breaks(Box<Finding>),
    /// To judge it takes more work than there is left until the next complete check.
    TooMuch,
}

impl From<Finding> for Unfit {
    fn from(finding: Finding) -> Self {
        Self::Breaks(Box::new(finding))
    }
}

/// A write that is judged.
struct Asked<'a> {
    table: Gfn,
    write: &'a EntryWrite,
    seq: u64,
}

impl Asked<'_> {
    fn finding(&self, rule: Rule, detail: &str) -> Finding {
        let (va, root) = (Some(self.write.va), Some(self.write.root));
        let frame = Some(self.table);
        Finding { frame, va, root, ..Finding::new(rule, self.seq, detail.to_owned()) }
    }
}

impl Audit {
    /// Judges what code at `site` asks to have written on CPU `cpu`; `seq` is the number that it is
    /// refused under. All writes before it have been told by [`Self::event`].
    ///
    /// # Errors
    /// [`Status::Refused`] if it would break a rule: that is a violation. [`Status::BadArguments`] if it
    /// leaves its table or physical memory, [`Status::BadState`] on a CPU that does not run, or if more
    /// tables are linked than are looked at until the next complete check.
    pub fn admit(
        &mut self,
        cpu: u8,
        (site, op): (u32, &TableOp),
        seq: u64,
        world: &impl World,
    ) -> Result<(), Status> {
        if !self.tlb.is_running(cpu) {
            return Err(Status::BadState);
        }
        let (judged, event) = match op {
            TableOp::Write { write, .. } if !is_sound(write) => return Err(Status::BadArguments),
            TableOp::Write { at, write } => {
                let asked = Asked { table: at.frame(), write, seq };
                (self.judge_asked(*at, &asked, world), Event::EntryWrite(*write))
            }
            TableOp::Fill(fill) => (self.judge_asked_fill(fill, seq), Event::TableFill(*fill)),
        };
        let finding = match judged {
            Ok(()) => return Ok(()),
            Err(Unfit::TooMuch) => {
                self.link_work = super::MAX_LINK_WORK;
                self.is_link_work_used_up();
                return Err(Status::BadState);
            }
            Err(Unfit::Breaks(finding)) => finding,
        };
        self.ledger.checked(finding.rule, 1);
        self.ledger.violation(Finding { cpu: Some(cpu), ..*finding });
        self.tell(&Moment::Asked(&Record { seq, cpu, site, event }), world);
        Err(Status::Refused)
    }

    /// Judges all that a root would map before it is registered.
    ///
    /// # Errors
    /// As [`Self::admit`].
    pub(super) fn admit_root(&mut self, root: Gpa, world: &impl World) -> Result<(), Status> {
        let seq = self.last_seq;
        let place = Place { root, va: Gva(0), rights: Rights::ALL, since: seq };
        let mut sought = self.seek(None);
        let judged = sought
            .table(self, (root.frame(), Level::Pml4), &place, world)
            .and_then(|()| self.judge_sought(&sought, &|_| false, seq));
        self.link_work = self.link_work.saturating_add(sought.work());
        match judged {
            Ok(()) => Ok(()),
            Err(Unfit::TooMuch) => Err(Status::BadState),
            Err(Unfit::Breaks(finding)) => {
                self.ledger.checked(finding.rule, 1);
                self.ledger.violation(*finding);
                self.tell(&Moment::Root(root), world);
                Err(Status::BadRoot)
            }
        }
    }

    /// Frames that are executable by the first tables: the kernel's text, which nothing makes writable,
    /// not even in steps.
    pub(super) fn find_text(&self) -> Vec<FrameRange> {
        let mut text: Vec<FrameRange> = Vec::new();
        for (root, _) in &self.roots {
            let leaves = self.index.walk_copy(*root, EVERYTHING).leaves;
            text.extend(
                leaves.iter().filter(|run| run.first.rights.executable).map(|r| r.frames()),
            );
        }
        text
    }

    fn judge_asked(&mut self, at: Gpa, asked: &Asked<'_>, world: &impl World) -> Result<(), Unfit> {
        let Asked { table, write, seq } = *asked;
        let Some(id) = self.index.tables.id(table, write.level) else {
            return Err(asked.finding(Rule::TableAlias, OUTSIDE).into());
        };
        if self.index.tables.linked_at(table).next().is_none() {
            return self.judge_unlinked(at, asked, world);
        }
        let here = base_of(write.va, write.level);
        let is_here = |place: &Place| (place.root, place.va) == (write.root, here);
        if !self.index.tables.places(id).iter().any(is_here) {
            return Err(asked.finding(Rule::TraceHonesty, NOT_THERE).into());
        }
        let page = self.index.tables.page(id);
        let first = write.level.index(write.va);
        self.judge_old(asked, |index| page.map(|page| page.entry(first + index)))?;
        if !write.new.is_present() {
            return Ok(());
        }
        let mut sought = self.seek(Some((table, *write)));
        let found = self.seek_write(table, write, seq, &mut sought, world);
        self.link_work = self.link_work.saturating_add(sought.work());
        found?;
        let replaced = self.spans_of(table, write);
        let is_replaced = |root: Gpa, va: Gva| {
            let spans = |(of, from, to): &(Gpa, Gva, Gva)| *of == root && *from <= va && va <= *to;
            replaced.iter().any(spans)
        };
        self.judge_sought(&sought, &|mapping| is_replaced(mapping.root, mapping.va), seq)
    }

    /// All that a write would map and link, wherever its table is linked.
    fn seek_write(
        &self,
        table: Gfn,
        write: &EntryWrite,
        seq: u64,
        sought: &mut Sought,
        world: &impl World,
    ) -> Result<(), Unfit> {
        let first = write.level.index(write.va);
        for id in self.index.tables.roles(table) {
            let level = id.level();
            for place in self.index.tables.places(id) {
                sought.next_place(self);
                if level == write.level && super::writes::leaf(write.new, level).is_some() {
                    let va = child_address(place.va, level, first);
                    sought.leaves(place, (va, level), write.new, (write.count.into(), seq))?;
                    continue;
                }
                for index in 0..u64::from(write.count) {
                    let entry = write.new.nth_of_run(write.level, index);
                    let va = child_address(place.va, level, first + index);
                    sought.entry(self, (entry, level), (place, va), (seq, world))?;
                }
            }
        }
        Ok(())
    }

    /// Root, first and last address of what a write replaces, at every place.
    fn spans_of(&self, table: Gfn, write: &EntryWrite) -> Vec<(Gpa, Gva, Gva)> {
        let first = write.level.index(write.va);
        let span = |id: TableId, place: &Place| {
            let va = child_address(place.va, id.level(), first);
            let bytes = id.level().span() * u64::from(write.count);
            (place.root, va, va.wrapping_add(bytes - 1))
        };
        let tables = &self.index.tables;
        let spans = |id| tables.places(id).iter().map(move |place| span(id, place));
        tables.roles(table).flat_map(spans).collect()
    }

    /// A table that no root reaches may hold anything, and is judged when it is linked: unless some CPU
    /// may still walk to it.
    fn judge_unlinked(&self, at: Gpa, asked: &Asked<'_>, world: &impl World) -> Result<(), Unfit> {
        let Asked { table, write, .. } = *asked;
        if self.is_registered(write.root) {
            return Err(asked.finding(Rule::TraceHonesty, NOT_THERE).into());
        }
        self.judge_stale_page(table, asked.seq)?;
        self.judge_old(asked, |index| world.read_entry(at.wrapping_add(8 * index)))
    }

    fn judge_asked_fill(&self, fill: &TableFill, seq: u64) -> Result<(), Unfit> {
        let table = fill.table.frame();
        let finding = |rule, detail: &str| {
            let frame = Some(table);
            Finding { frame, ..Finding::new(rule, seq, detail.to_owned()) }
        };
        if !self.config.layout.pool.contains(fill.table) {
            return Err(finding(Rule::TableAlias, OUTSIDE).into());
        }
        if let Some((_, root, va)) = self.index.table_at(FrameRange::single(table)) {
            let (root, va) = (Some(root), Some(va));
            let finding = finding(
                Rule::TraceHonesty,
                "a table was to be filled that a root reaches; entries of such a table are written \
                 one by one",
            );
            return Err(Finding { root, va, ..finding }.into());
        }
        self.judge_stale_page(table, seq)
    }

    /// `stale-table`: nothing is written to a page that some CPU may still take for a table.
    fn judge_stale_page(&self, table: Gfn, seq: u64) -> Result<(), Unfit> {
        let Some(duty) = self.tlb.of_table(table).into_iter().next() else { return Ok(()) };
        let detail = format!("the table was to be written anew while {}", still_walked(&duty));
        let finding = Finding::new(Rule::StaleTable, seq, detail);
        let (frame, va, root) = (Some(table), Some(duty.va), Some(duty.root));
        Err(Finding { frame, va, root, revoked: revoke_of(&duty), ..finding }.into())
    }

    /// `trace-honesty`: the entries are what the guest says that they are.
    fn judge_old(
        &self,
        asked: &Asked<'_>,
        held: impl Fn(u64) -> Option<Entry>,
    ) -> Result<(), Unfit> {
        let Asked { table, write, .. } = *asked;
        let roles = self.index.tables.roles(table).map(TableId::level);
        let levels: Vec<Level> = roles.chain([write.level]).collect();
        for index in 0..u64::from(write.count).min(ENTRIES) {
            let claimed = write.old.nth_of_run(write.level, index);
            let Some(held) = held(index) else {
                return Err(asked.finding(Rule::TableAlias, OUTSIDE).into());
            };
            let differs = |level: &Level| meaning(held, *level) != meaning(claimed, *level);
            if claimed != held && levels.iter().any(differs) {
                let va = Some(write.va.wrapping_add(index * write.level.span()));
                let frame = held.is_present().then(|| held.frame(write.level));
                let finding = asked.finding(Rule::TraceHonesty, NOT_OLD);
                return Err(Finding { va, frame, ..finding }.into());
            }
        }
        Ok(())
    }
}

const OUTSIDE: &str = "an entry was to be written outside the table pool; every table lies in it";
const NOT_THERE: &str = "an entry was to be written in a table that is not linked where the guest says; \
                         a write must name the place of its table";
const NOT_OLD: &str = "an entry was to be replaced that is not what the guest says; a write must carry \
                       the entry as it was before";
