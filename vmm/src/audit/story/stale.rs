//! Stories of translations that may still be cached: who made them, who revoked them, and why each
//! flush since did not remove them.

use super::{Finding, Maker, Origin, Rule, Step, Teller, What, ends, note, old_at, step, words};
use crate::audit::finding::Revoke;
use crate::audit::tlb::{cpu_list, only};
use lacuna_abi::addr::{Gfn, Gva};
use lacuna_abi::event::{Event, Flush, HostAct, Record};
use lacuna_abi::layout::Place;
use lacuna_abi::paging::{Entry, Level};
use std::ops::Range;

/// How far before a revoke a flush is told of, in event numbers: one that came just too early.
const SHORTLY: u64 = 32;

/// The translation that may still be cached.
struct Old {
    global: bool,
    pcid: u16,
    va: Gva,
    level: Level,
    /// The entry, as far as it is known.
    entry: Option<(Entry, Level)>,
    /// It is a path to a table, in the paging-structure caches.
    table: bool,
}

/// Why a flush did not remove a translation (SDM volume 3, "Operations that Invalidate TLBs and
/// Paging-Structure Caches").
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Shortfall {
    Early,
    SparesGlobals,
    OtherPcid,
    OtherAddress,
    Bit63,
    NotAll,
}

impl Shortfall {
    const fn why(self) -> &'static str {
        match self {
            Self::Early => {
                "it came before the revoke: what it removed could be cached again before the entry \
                 changed"
            }
            Self::SparesGlobals => "it spares global translations, and this one was global",
            Self::OtherPcid => "it is for another PCID",
            Self::OtherAddress => "it is of another address",
            Self::Bit63 => "bit 63 of the operand was set, so that it flushed nothing",
            Self::NotAll => "it does not remove everything that may be cached there",
        }
    }
}

impl Teller<'_> {
    /// Made, revoked, and every flush from shortly before the revoke up to the moment.
    pub(super) fn stale(&self, finding: &Finding) -> Vec<Step> {
        let end = self.end(finding);
        let table = finding.frame.filter(|_| finding.rule == Rule::StaleTable);
        let Some(revoke) = finding.revoked.or_else(|| self.find_revoke(finding, table, end)) else {
            // A table that is still linked: nothing was revoked.
            let link = finding.va.zip(table);
            let link = link.map(|(va, table)| (va, self.linker(finding.root, va, table, end)));
            return link.iter().map(|(va, link)| self.made(link, *va, None)).collect();
        };
        let Revoke { seq, cpu, va } = revoke;
        let maker = match table {
            Some(table) => self.linker(finding.root, va, table, seq),
            None => self.maker(finding.root, va, seq),
        };
        let revoked = self.history.get(seq);
        let old = self.old(&revoke, revoked, maker.origin(), table);
        let mut steps = vec![self.made(&maker, va, old.entry)];
        let shortly = seq.saturating_sub(SHORTLY);
        let shortly = maker.origin().map_or(shortly, |made| shortly.max(made.record.seq));
        let early = self.flushes(shortly..seq, cpu).last();
        steps.extend(early.map(|record| self.flush(record, &old, true)));
        steps.push(match revoked {
            Some(record) => step(record, What::Revoked, revoked_text(record, &old)),
            None => Step { seq: Some(seq), ..note(What::Revoked, self.unknown("not kept")) },
        });
        let mut between = self.between(finding.frame, &old, (seq, end, cpu));
        if let Some(elsewhere) = self.elsewhere(seq, end, cpu) {
            // What is left out has no number of its own, and stays where it is.
            let later = |step: &Step| step.seq > elsewhere.seq;
            let place = between.iter().position(later).unwrap_or(between.len());
            between.insert(place, elsewhere);
        }
        steps.extend(between);
        steps
    }

    /// What came after the revoke on the CPU that may cache the translation, and did not remove it.
    fn between(
        &self,
        frame: Option<Gfn>,
        old: &Old,
        (from, end, cpu): (u64, u64, u8),
    ) -> Vec<Step> {
        let after = from.saturating_add(1);
        let mut records: Vec<&Record> = self.flushes(after..end, cpu).collect();
        records.extend(self.history.back().filter(|record| {
            let acknowledges = matches!(record.event, Event::ShootdownAck(_));
            (after..end).contains(&record.seq) && record.cpu == cpu && acknowledges
        }));
        records.extend(frame.into_iter().flat_map(|frame| self.vain_seals(frame, after..end)));
        records.sort_by_key(|record| record.seq);
        let (first, left, last) = ends(records);
        let tell = |record: &&Record| match record.event {
            Event::ShootdownAck(_) => {
                let text = format!("{}: it had done no more than the above", words::record(record));
                step(record, What::Acknowledged, text)
            }
            Event::Host(..) => step(record, What::Sealed, self.vain_seal()),
            _ => self.flush(record, old, false),
        };
        let out = (left > 0)
            .then(|| note(What::LeftOut, format!("{left} more of the like, none of which counts")));
        first.iter().map(tell).chain(out).chain(last.iter().map(tell)).collect()
    }

    /// The last record that took away the finding's translation, where the finding does not say.
    fn find_revoke(&self, finding: &Finding, table: Option<Gfn>, end: u64) -> Option<Revoke> {
        let (va, cpu) = finding.va.zip(finding.cpu)?;
        let linked = |entry: Entry, level: Level| {
            table.is_none_or(|table| !entry.is_leaf(level) && entry.frame(level) == table)
        };
        let record = self.history.back().filter(|record| record.seq <= end).find(|record| {
            let Event::EntryWrite(write) = &record.event else { return false };
            finding.root.is_none_or(|root| root == write.root)
                && old_at(write, va).is_some_and(|old| {
                    old.is_present()
                        && linked(old, write.level)
                        && super::new_at(write, va) != Some(old)
                })
        })?;
        Some(Revoke { seq: record.seq, cpu, va })
    }

    fn old(
        &self,
        revoke: &Revoke,
        revoked: Option<&Record>,
        origin: Option<&Origin<'_>>,
        table: Option<Gfn>,
    ) -> Old {
        let va = revoke.va;
        let write = revoked.and_then(|record| match &record.event {
            Event::EntryWrite(write) => Some(write),
            _ => None,
        });
        let pcid = write.map_or(0, |write| write.pcid);
        let taken = write.and_then(|write| Some((old_at(write, va)?, write.level)));
        let leaf = taken.filter(|(entry, level)| entry.is_present() && entry.is_leaf(*level));
        let known = leaf.or_else(|| origin.map(|origin| (origin.entry, origin.level)));
        let entry = taken.filter(|(entry, level)| {
            entry.is_present() && (entry.is_leaf(*level) || table.is_some())
        });
        let (global, level) = known.map_or_else(
            || (self.config.layout.place_of(va) == Place::DirectMap, Level::Pt),
            |(entry, level)| (entry.has(Entry::GLOBAL), level),
        );
        Old { global, pcid, va, level, entry, table: table.is_some() }
    }

    /// The step that made the translation or linked the table; without a record of it, what is known
    /// of the entry says what it was.
    pub(super) fn made(&self, maker: &Maker<'_>, va: Gva, known: Option<(Entry, Level)>) -> Step {
        let Maker::Record(Origin { record, entry, level, fill }) = maker else {
            let what = known.map_or_else(
                || format!("mapped {va}"),
                |(entry, level)| words::made(entry, level, va),
            );
            let text = match (maker, self.history.begins_at()) {
                (Maker::Nobody, _) => format!("no record tells who {what}"),
                (_, Some(_)) => format!("made {}", self.unknown("")),
                (_, None) => format!("before the guest started: the VMM {what}"),
            };
            return note(What::Made, text);
        };
        let how = fill.map_or_else(String::new, |fill| {
            format!(", by linking the table that event {} had filled", fill.seq)
        });
        step(record, What::Made, format!("{}{how}", words::made(*entry, *level, va)))
    }

    /// Flushes and root loads of a CPU with numbers in a range, in order.
    fn flushes(&self, numbers: Range<u64>, cpu: u8) -> impl DoubleEndedIterator<Item = &Record> {
        let flushes = |record: &Record| {
            matches!(record.event, Event::Flush(_) | Event::RootLoad { .. }) && record.cpu == cpu
        };
        let mut found: Vec<&Record> =
            self.history.back().filter(|r| numbers.contains(&r.seq) && flushes(r)).collect();
        found.sort_by_key(|record| record.seq);
        found.into_iter()
    }

    fn flush(&self, record: &Record, old: &Old, early: bool) -> Step {
        let why = if early { Shortfall::Early } else { self.shortfall(record, old) };
        let text = format!("{}: does not count, because {}", words::record(record), why.why());
        step(record, What::Flush, text)
    }

    /// Why a flush after the revoke, on the right CPU, left the translation where it was.
    fn shortfall(&self, record: &Record, old: &Old) -> Shortfall {
        let spares = old.global && !old.table;
        let of_pcid = |pcid: u16| match pcid == old.pcid {
            _ if spares => Shortfall::SparesGlobals,
            false => Shortfall::OtherPcid,
            true => Shortfall::NotAll,
        };
        match record.event {
            Event::RootLoad { no_flush: true, .. } => Shortfall::Bit63,
            Event::RootLoad { pcid, .. } | Event::Flush(Flush::Pcid(pcid)) => of_pcid(pcid),
            Event::Flush(Flush::NonGlobal) => of_pcid(self.pcid_at(record)),
            Event::Flush(Flush::AllPcids) if spares => Shortfall::SparesGlobals,
            Event::Flush(Flush::PageOfPcid { va, pcid }) => match of_pcid(pcid) {
                Shortfall::NotAll if !covers(va, 1, Level::Pt, old) => Shortfall::OtherAddress,
                other => other,
            },
            Event::Flush(Flush::Pages { va, count, level }) => {
                if !old.table && !covers(va, count, level, old) {
                    Shortfall::OtherAddress
                } else if !spares && self.pcid_at(record) != old.pcid {
                    Shortfall::OtherPcid
                } else {
                    Shortfall::NotAll
                }
            }
            _ => Shortfall::NotAll,
        }
    }

    /// The PCID under which a CPU made a record.
    fn pcid_at(&self, record: &Record) -> u16 {
        let loads = |older: &Record| match older.event {
            Event::RootLoad { pcid, .. } if older.cpu == record.cpu => Some(pcid),
            _ => None,
        };
        self.history.back().filter(|older| older.seq < record.seq).find_map(loads).unwrap_or(0)
    }

    /// Seals of the frame that closed nothing, and so dropped no translation.
    fn vain_seals(&self, frame: Gfn, numbers: Range<u64>) -> impl Iterator<Item = &Record> {
        let acts = self.acts(frame, numbers.end);
        let acts = acts.filter(move |(record, _)| record.seq >= numbers.start);
        acts.filter(|(_, act)| *act == HostAct::HeldOpen).map(|(record, _)| record)
    }

    fn vain_seal(&self) -> String {
        let why = if self.config.seal_closes {
            "its granule was held open: no translation was dropped"
        } else {
            "the seal is off: nothing was closed and no translation dropped"
        };
        format!("had the frame sealed: does not count, because {why}")
    }

    /// Flushes on other CPUs, in one line.
    fn elsewhere(&self, from: u64, end: u64, blamed: u8) -> Option<Step> {
        let flushes = |record: &&Record| {
            matches!(record.event, Event::Flush(_))
                && record.cpu != blamed
                && record.seq > from
                && record.seq < end
        };
        let mut found: Vec<&Record> = self.history.back().filter(flushes).collect();
        found.sort_by_key(|record| record.seq);
        let (first, last) = (*found.first()?, *found.last()?);
        if found.len() == 1 {
            let text =
                format!("{}: it removes nothing of what CPU {blamed} caches", words::record(first));
            return Some(step(first, What::Flush, text));
        }
        let on = found.iter().fold(0, |set, record| set | only(record.cpu));
        let text = format!(
            "up to event {}, {} flushes on {}: none removes anything of what CPU {blamed} caches",
            last.seq,
            found.len(),
            cpu_list(on)
        );
        Some(Step { seq: Some(first.seq), ..note(What::Flush, text) })
    }
}

/// Whether a run of INVLPG names the translation: any address in a large page, or this very page.
fn covers(va: Gva, count: u32, level: Level, old: &Old) -> bool {
    let page = old.level.span();
    let first = old.va.align_down(page);
    (0..u64::from(count))
        .take(1 << 10)
        .any(|index| va.wrapping_add(index * level.span()).align_down(page) == first)
}

fn revoked_text(record: &Record, old: &Old) -> String {
    let Event::EntryWrite(write) = &record.event else { return words::record(record) };
    let left = match old.table {
        true => "until it flushes, a CPU may go on walking through the table",
        false => "until it flushes, a CPU may go on using the old translation",
    };
    format!("{}; {left}", words::write(write, old.va))
}
