//! How a violation came about, step by step: told from the last records when it is found.
//!
//! | file | tells |
//! | --- | --- |
//! | `stale` | of translations that may still be cached: made, revoked, the flushes that did not count |
//! | `mapping` | of mappings that must not be: who made them, since when the frame is secret |
//! | `state` | of frames, entries and registers: what was last said of them |
//! | `observed` | of accesses that went where nothing led: the entry's last records, the CPU's flushes |
//! | `outcome` | the moment at which it mattered, and what would have been right |
//! | `words` | what one record says |

mod mapping;
mod observed;
mod outcome;
mod stale;
mod state;
mod words;

use super::finding::{Finding, Rule, Step, What};
use super::frames::Frames;
use super::history::History;
use super::{Audit, AuditConfig, World};
use lacuna_abi::addr::{Gfn, Gpa, Gva};
use lacuna_abi::event::{EntryWrite, Event, HostAct, Record};
use lacuna_abi::gate::Op;
use lacuna_abi::paging::{Entry, Level};

/// Most steps of one kind that are told before the middle is left out, and those that then remain at
/// each end.
const MANY: usize = 6;
const ENDS: usize = 2;

/// What was being judged when something was found.
pub(super) enum Moment<'a> {
    /// A record.
    Record(&'a Record),
    /// A write to tables that was asked for and is not made.
    Asked(&'a Record),
    /// A gate operation of this CPU, on its arrival.
    Call(u8, Op),
    /// A root that is being registered.
    Root(Gpa),
    /// The complete check.
    Quiesce,
    /// Touches of a probe, after the complete check.
    Probe,
    /// The search for bytes of the secret input.
    Search,
}

impl Audit {
    /// Gives the findings that came of this moment their stories.
    #[inline]
    pub(super) fn tell(&mut self, moment: &Moment<'_>, world: &impl World) {
        if self.ledger.owes_stories() {
            self.tell_all(moment, &|frame| world.first_nonzero(frame));
        }
    }

    #[cold]
    pub(super) fn tell_all(
        &mut self,
        moment: &Moment<'_>,
        first_nonzero: &dyn Fn(Gfn) -> Option<u64>,
    ) {
        let Self { ledger, history, frames, config, .. } = self;
        let teller = Teller { history, frames, config, moment, first_nonzero };
        ledger.tell(|finding, all| teller.story(finding, all));
    }
}

/// What a story is made of.
struct Teller<'a> {
    history: &'a History,
    frames: &'a Frames,
    config: &'a AuditConfig,
    moment: &'a Moment<'a>,
    first_nonzero: &'a dyn Fn(Gfn) -> Option<u64>,
}

impl Teller<'_> {
    /// The steps of a finding, in order; the last two are the moment and what would have been right.
    fn story(&self, finding: &Finding, all: &[Finding]) -> Vec<Step> {
        let mut steps = match finding.rule {
            Rule::StaleDirectMap | Rule::StaleWindow | Rule::StaleTable => self.stale(finding),
            Rule::DirectMapAlias
            | Rule::ForeignAlias
            | Rule::GlobalWindow
            | Rule::TableAlias
            | Rule::WriteExecute
            | Rule::UserAccess => self.mapping(finding, all),
            Rule::SecondStageOpen | Rule::Residue | Rule::InputLeak => self.life_of(finding),
            Rule::TraceHonesty => self.records_of_entry(finding),
            Rule::ControlState => self.records_of_registers(finding),
            Rule::ObservedAccess => self.observed(finding),
        };
        steps.push(self.mattered(finding));
        steps.push(self.right(finding));
        steps
    }

    /// The record behind which the finding's moment lies: what is told came before.
    fn end(&self, finding: &Finding) -> u64 {
        match self.moment {
            Moment::Record(record) | Moment::Asked(record) => record.seq,
            _ => finding.seq.saturating_add(1),
        }
    }

    /// What made the translation of `va` that there was before `before`: the last record of an
    /// entry for it.
    fn maker(&self, root: Option<Gpa>, va: Gva, before: u64) -> Maker<'_> {
        let mut older = self.writes(root, va, before);
        let Some((record, entry, level)) = older.next() else { return Maker::FirstTables };
        if !entry.is_present() {
            Maker::Nobody
        } else if entry.is_leaf(level) {
            Maker::Record(Origin { record, entry, level, fill: None })
        } else {
            self.fill(record, entry.frame(level), va).map_or(Maker::Nobody, Maker::Record)
        }
    }

    /// What last linked a table for `va`, before `before`.
    fn linker(&self, root: Option<Gpa>, va: Gva, table: Gfn, before: u64) -> Maker<'_> {
        let leads_there = |(_, entry, level): &(&Record, Entry, Level)| {
            entry.is_present() && !entry.is_leaf(*level) && entry.frame(*level) == table
        };
        let link = self.writes(root, va, before).find(leads_there);
        link.map_or(Maker::FirstTables, |(record, entry, level)| {
            Maker::Record(Origin { record, entry, level, fill: None })
        })
    }

    /// The records of entries for `va`, before `before`, with what they left there; the newest first.
    fn writes(
        &self,
        root: Option<Gpa>,
        va: Gva,
        before: u64,
    ) -> impl Iterator<Item = (&Record, Entry, Level)> {
        let older = self.history.back().filter(move |record| record.seq < before);
        older.filter_map(move |record| match &record.event {
            Event::EntryWrite(write) if root.is_none_or(|root| root == write.root) => {
                Some((record, new_at(write, va)?, write.level))
            }
            _ => None,
        })
    }

    /// The translation of `va` that came with the link of a table, from the record of its fill.
    fn fill<'h>(&'h self, link: &'h Record, table: Gfn, va: Gva) -> Option<Origin<'h>> {
        let mut older = self.history.back().filter(|record| record.seq < link.seq);
        older.find_map(|record| match &record.event {
            Event::TableFill(fill) if fill.table.frame() == table => {
                let entry = fill.entry(fill.level.index(va));
                Some(Origin { record: link, entry, level: fill.level, fill: Some(record) })
                    .filter(|_| entry.is_present())
            }
            _ => None,
        })
    }

    /// What is said of something of which no record is kept.
    fn unknown(&self, otherwise: &str) -> String {
        self.history.begins_at().map_or_else(
            || otherwise.to_owned(),
            |first| format!("by event {first}, of which no more is kept"),
        )
    }

    /// What the host did to a frame before `before`, the newest first.
    fn acts(&self, frame: Gfn, before: u64) -> impl Iterator<Item = (&Record, HostAct)> {
        self.history.back().filter(move |record| record.seq < before).filter_map(move |record| {
            match record.event {
                Event::Host(act, frames) if frames.contains(frame) => Some((record, act)),
                _ => None,
            }
        })
    }
}

/// Who made a translation.
enum Maker<'h> {
    Record(Origin<'h>),
    /// No record that is kept is of its entry.
    FirstTables,
    /// The last record of its entry does not say so.
    Nobody,
}

impl<'h> Maker<'h> {
    const fn origin(&self) -> Option<&Origin<'h>> {
        match self {
            Self::Record(origin) => Some(origin),
            Self::FirstTables | Self::Nobody => None,
        }
    }
}

/// How a translation came to be.
struct Origin<'h> {
    /// The write of the entry, or of one that led to its table.
    record: &'h Record,
    /// The entry.
    entry: Entry,
    level: Level,
    /// The fill of its table, if it came with that.
    fill: Option<&'h Record>,
}

/// The entry for `va` as a write left it, if it lies in the run.
fn new_at(write: &EntryWrite, va: Gva) -> Option<Entry> {
    Some(write.new.nth_of_run(write.level, place_in_run(write, va)?))
}

/// The entry for `va` as it was before a write, if it lies in the run.
fn old_at(write: &EntryWrite, va: Gva) -> Option<Entry> {
    Some(write.old.nth_of_run(write.level, place_in_run(write, va)?))
}

fn place_in_run(write: &EntryWrite, va: Gva) -> Option<u64> {
    let offset = va.offset_from(write.va).filter(|offset| *offset < write.span())?;
    Some(offset / write.level.span())
}

/// A step that a record tells of.
fn step(record: &Record, what: What, text: String) -> Step {
    let site = Some(record.site).filter(|site| *site != 0);
    Step { seq: Some(record.seq), cpu: Some(record.cpu), what, site, text }
}

/// A step without a record.
const fn note(what: What, text: String) -> Step {
    Step { seq: None, cpu: None, what, site: None, text }
}

/// What is told of many: all, or both ends and how many lie between them.
fn ends<T>(mut many: Vec<T>) -> (Vec<T>, usize, Vec<T>) {
    if many.len() <= MANY {
        return (many, 0, Vec::new());
    }
    let last = many.split_off(many.len() - ENDS);
    let left = many.len() - ENDS;
    many.truncate(ENDS);
    (many, left, last)
}
