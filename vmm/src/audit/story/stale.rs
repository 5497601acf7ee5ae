//! Stories of translations that may still be cached: who made them, who revoked them, and why each
//! flush since did not remove them.

use super::{Finding, Origin, Rule, Step, Teller, What, note, old_at, shortened, step, words};
use crate::audit::finding::Revoke;
use lacuna_abi::addr::{Gfn, Gva};
use lacuna_abi::event::{Event, Flush, HostAct, Record};
use lacuna_abi::layout::Place;
use lacuna_abi::paging::{Entry, Level};

/// How far before a revoke a flush is told of, in event numbers: one that came just too early.
const SHORTLY: u64 = 32;

/// The translation that may still be cached.
struct Old {
    global: bool,
    pcid: u16,
    va: Gva,
    level: Level,
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
            return finding.va.map_or_else(Vec::new, |va| {
                let link = self.origin(finding.root, va, end, table);
                vec![self.made(link.as_ref(), va, table.is_some())]
            });
        };
        let Revoke { seq, cpu, va } = revoke;
        let origin = self.origin(finding.root, va, seq, table);
        let revoked = self.history.get(seq);
        let old = self.old(&revoke, revoked, origin.as_ref(), table);
        let mut steps = vec![self.made(origin.as_ref(), old.va, old.table)];
        let early = self.flushes(seq.saturating_sub(SHORTLY)..seq, cpu).last();
        steps.extend(early.map(|record| self.flush(record, &old, true)));
        steps.push(match revoked {
            Some(record) => step(record, What::Revoked, revoked_text(record, va)),
            None => Step { seq: Some(seq), ..note(What::Revoked, self.unknown("not kept")) },
        });
        let mut between: Vec<Step> = self
            .flushes(seq.saturating_add(1)..end, cpu)
            .map(|record| self.flush(record, &old, false))
            .collect();
        between.extend(self.acknowledgements(seq, end, cpu));
        between.extend(finding.frame.into_iter().flat_map(|frame| self.seals(frame, seq, end)));
        between.sort_by_key(|step| step.seq);
        let mut between = shortened(between, "of the like, none of which counts");
        // What is left out has no number of its own, and stays where it is.
        if let Some(elsewhere) = self.elsewhere(seq, end, cpu) {
            let later = |step: &Step| step.seq > elsewhere.seq;
            let place = between.iter().position(later).unwrap_or(between.len());
            between.insert(place, elsewhere);
        }
        steps.extend(between);
        steps
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
        let (global, level) = known.map_or_else(
            || (self.config.layout.place_of(va) == Place::DirectMap, Level::Pt),
            |(entry, level)| (entry.has(Entry::GLOBAL), level),
        );
        Old { global, pcid, va, level, table: table.is_some() }
    }

    /// The step that made the translation or linked the table.
    pub(super) fn made(&self, origin: Option<&Origin<'_>>, va: Gva, table: bool) -> Step {
        let Some(Origin { record, entry, level, fill }) = origin else {
            let what = if table { "linked the table for" } else { "mapped" };
            let before = format!("before the guest started: the VMM {what} {va}");
            let text = match self.history.begins_at() {
                Some(_) => format!("made {}", self.unknown("")),
                None => before,
            };
            return note(What::Made, text);
        };
        let at = va.align_down(level.span());
        let what = if table { "linked" } else { "mapped" };
        let how = fill.map_or_else(String::new, |fill| {
            format!(", by linking the table that event {} had filled", fill.seq)
        });
        step(record, What::Made, format!("{what} {} at {at}{how}", words::entry(*entry, *level)))
    }

    /// Flushes and root loads of a CPU with numbers in a range, in order.
    fn flushes(
        &self,
        numbers: std::ops::Range<u64>,
        cpu: u8,
    ) -> impl DoubleEndedIterator<Item = &Record> {
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

    fn acknowledgements(&self, from: u64, end: u64, cpu: u8) -> impl Iterator<Item = Step> {
        self.history.back().filter(move |r| r.seq > from && r.seq < end && r.cpu == cpu).filter_map(
            |record| match record.event {
                Event::ShootdownAck(_) => {
                    let text =
                        format!("{}: it had done no more than the above", words::record(record));
                    Some(step(record, What::Acknowledged, text))
                }
                _ => None,
            },
        )
    }

    /// Seals of the frame that closed nothing, and so dropped no translation.
    fn seals(&self, frame: Gfn, from: u64, end: u64) -> impl Iterator<Item = Step> {
        let why = if self.config.seal_closes {
            "its granule was held open: no translation was dropped"
        } else {
            "the seal is off: nothing was closed and no translation dropped"
        };
        self.acts(frame, end).take_while(move |(record, _)| record.seq > from).filter_map(
            move |(record, act)| {
                let text = format!("had the frame sealed: does not count, because {why}");
                (act == HostAct::HeldOpen).then(|| step(record, What::Sealed, text))
            },
        )
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
        let nothing = format!("removes nothing of what CPU {blamed} caches");
        if found.len() == 1 {
            let text = format!("{}: {nothing}", words::record(first));
            return Some(step(first, What::Flush, text));
        }
        let mut cpus: Vec<u8> = found.iter().map(|record| record.cpu).collect();
        cpus.sort_unstable();
        cpus.dedup();
        let cpus: Vec<String> = cpus.iter().map(u8::to_string).collect();
        let (count, last) = (found.len(), last.seq);
        let text = format!(
            "up to event {last}, {count} flushes on CPU {}: none {nothing}",
            cpus.join(", ")
        );
        let text = text.replace("none removes nothing", "none removes anything");
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

fn revoked_text(record: &Record, va: Gva) -> String {
    let Event::EntryWrite(write) = &record.event else { return words::record(record) };
    let left = "; until it flushes, a CPU may go on using the old translation";
    format!("{}{left}", words::write(write, va))
}
