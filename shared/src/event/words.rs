//! Events as words: what rings, intents and recordings hold.

use super::{
    BadRecord, ControlRegister, EntryStores, EntryWrite, Event, Flush, HostAct, INTENT_WORDS,
    Intent, Life, RECORD_WORDS, Record, Sighting, TableFill,
};
use crate::addr::{FrameRange, Gpa, Gva};
use crate::observe::{Case, Observation, Seen};
use crate::paging::{Entry, Level};

const CHECK: u64 = 0x6c61_6375_6e61_2121;
const KIND_ENTRY: u64 = 1;
const KIND_FLUSH: u64 = 2;
const KIND_ROOT: u64 = 3;
const KIND_LIFE: u64 = 4;
const KIND_ACK: u64 = 5;
const KIND_HOST: u64 = 6;
const KIND_FILL: u64 = 7;
const KIND_CONTROL: u64 = 8;
const KIND_OBSERVED: u64 = 9;
const KIND_SEEN_STORES: u64 = 10;
const KIND_SEEN_FILL: u64 = 11;
const KIND_SEEN_FLUSH: u64 = 12;
const KIND_SEEN_CONTROL: u64 = 13;
const KIND_SEEN_ROOT: u64 = 14;
const KIND_SEEN_ACCESS: u64 = 15;
const PCID_MASK: u64 = 0xfff;

const fn head(kind: u64, level: u8, flavour: u64, cpu: u8, count: u32) -> u64 {
    kind | (level as u64) << 8 | flavour << 16 | (cpu as u64) << 24 | (count as u64) << 32
}

/// The check word of a record with these first words.
const fn check(seq: u64, head: u64) -> u64 {
    seq ^ head.rotate_left(17) ^ CHECK
}

/// The last word of a record: a check in its low half, the site in its high half.
const fn last_word(seq: u64, head: u64, site: u32) -> u64 {
    let check = check(seq, head);
    (check ^ check >> 32) & 0xffff_ffff | (site as u64) << 32
}

/// A head, and the words behind it: root and PCID, address, old, new, grant.
type Words = (u64, [u64; 5]);

fn fill_words(kind: u64, cpu: u8, fill: &TableFill) -> Words {
    let TableFill { table, level, first } = *fill;
    (head(kind, level.number(), 0, cpu, 0), [0, table.0, 0, first.0, 0])
}

fn root_words(kind: u64, cpu: u8, (root, pcid, no_flush): (Gpa, u16, bool)) -> Words {
    (head(kind, 0, u64::from(no_flush), cpu, 0), [root.0 | u64::from(pcid), 0, 0, 0, 0])
}

fn control_words(kind: u64, cpu: u8, (register, old, new): (ControlRegister, u64, u64)) -> Words {
    (head(kind, 0, register as u64, cpu, 0), [0, 0, old, new, 0])
}

fn flush_words(kind: u64, cpu: u8, flush: &Flush) -> Words {
    match *flush {
        Flush::Pages { va, count, level } => {
            (head(kind, level.number(), 0, cpu, count), [0, va.0, 0, 0, 0])
        }
        Flush::NonGlobal => (head(kind, 0, 1, cpu, 0), [0; 5]),
        Flush::Everything => (head(kind, 0, 2, cpu, 0), [0; 5]),
        Flush::PageOfPcid { va, pcid } => {
            (head(kind, 0, 3, cpu, 0), [u64::from(pcid), va.0, 0, 0, 0])
        }
        Flush::Pcid(pcid) => (head(kind, 0, 4, cpu, 0), [u64::from(pcid), 0, 0, 0, 0]),
        Flush::AllPcids => (head(kind, 0, 5, cpu, 0), [0; 5]),
    }
}

impl Intent {
    /// State and run, number, root and PCID, address, old, new, grant, check.
    #[must_use]
    pub fn to_words(&self) -> [u64; INTENT_WORDS] {
        let Self { write: w, seq } = *self;
        let state = head(KIND_ENTRY, w.level.number(), 0, 0, w.count);
        let root = w.root.0 | u64::from(w.pcid);
        [state, seq, root, w.va.0, w.old.0, w.new.0, w.grant, check(0, state)]
    }

    /// The intent of these words; `Ok(None)` if none stands.
    ///
    /// # Errors
    /// [`BadRecord`], whatever the words are.
    pub fn from_words(words: &[u64; INTENT_WORDS]) -> Result<Option<Self>, BadRecord> {
        let [state, seq, root, va, old, new, grant, sum] = *words;
        if state == 0 {
            return Ok(None);
        }
        // The number stays outside the check: it is filled in while the intent stands.
        if sum != check(0, state) {
            return Err(BadRecord::Torn);
        }
        let record = [1, state, root, va, old, new, grant, last_word(1, state, 0)];
        match Record::from_words(&record)?.event {
            Event::EntryWrite(write) => Ok(Some(Self { write, seq })),
            _ => Err(BadRecord::Unknown),
        }
    }
}

impl Record {
    /// The head, and all words but number, head and check.
    #[inline]
    fn payload(&self) -> Words {
        match self.event {
            Event::EntryWrite(w) => (
                head(KIND_ENTRY, w.level.number(), 0, self.cpu, w.count),
                [w.root.0 | u64::from(w.pcid), w.va.0, w.old.0, w.new.0, w.grant],
            ),
            Event::TableFill(fill) => fill_words(KIND_FILL, self.cpu, &fill),
            Event::Flush(flush) => flush_words(KIND_FLUSH, self.cpu, &flush),
            Event::Control { register, old, new } => {
                control_words(KIND_CONTROL, self.cpu, (register, old, new))
            }
            Event::RootLoad { root, pcid, no_flush } => {
                root_words(KIND_ROOT, self.cpu, (root, pcid, no_flush))
            }
            Event::Life(life, frames) => (
                head(KIND_LIFE, 0, life as u64, self.cpu, 0),
                [0, frames.start().gpa().0, frames.count(), 0, 0],
            ),
            Event::ShootdownAck(number) => {
                (head(KIND_ACK, 0, 0, self.cpu, 0), [0, 0, number, 0, 0])
            }
            Event::Observed(Observation { case, va, seen }) => {
                let (flavour, reached) = match seen {
                    Seen::Fault => (0, 0),
                    Seen::Reached(gpa) => (1, gpa.0),
                    Seen::NotOffered => (2, 0),
                };
                (head(KIND_OBSERVED, 0, flavour, self.cpu, case.number()), [0, va.0, reached, 0, 0])
            }
            Event::Seen(sighting) => self.seen(&sighting),
            Event::Host(act, frames) => (
                head(KIND_HOST, 0, act as u64, self.cpu, 0),
                [0, frames.start().gpa().0, frames.count(), 0, 0],
            ),
        }
    }

    /// The same of what the host saw.
    fn seen(&self, sighting: &Sighting) -> Words {
        match *sighting {
            Sighting::Stores(EntryStores { at, level, count, old, new, grant }) => (
                head(KIND_SEEN_STORES, level.number(), 0, self.cpu, count),
                [0, at.0, old.0, new.0, grant],
            ),
            Sighting::Fill(fill) => fill_words(KIND_SEEN_FILL, self.cpu, &fill),
            Sighting::Flush(flush) => flush_words(KIND_SEEN_FLUSH, self.cpu, &flush),
            Sighting::Control { register, old, new } => {
                control_words(KIND_SEEN_CONTROL, self.cpu, (register, old, new))
            }
            Sighting::RootLoad { root, pcid, no_flush } => {
                root_words(KIND_SEEN_ROOT, self.cpu, (root, pcid, no_flush))
            }
            Sighting::Access { va, write } => {
                (head(KIND_SEEN_ACCESS, 0, u64::from(write), self.cpu, 0), [0, va.0, 0, 0, 0])
            }
        }
    }

    /// The record's words: number, head, root and PCID, address, old, new, grant, check and site.
    #[inline]
    #[must_use]
    pub fn to_words(&self) -> [u64; RECORD_WORDS] {
        let (head, rest) = self.payload();
        let [root, va, old, new, grant] = rest;
        [self.seq, head, root, va, old, new, grant, last_word(self.seq, head, self.site)]
    }

    /// The record of these words, all but the last, and of this site: where something else guards
    /// the words against being torn.
    ///
    /// # Errors
    /// As [`Self::from_words`].
    pub fn from_parts(words: &[u64; RECORD_WORDS - 1], site: u32) -> Result<Self, BadRecord> {
        let [seq, head, root, va, old, new, grant] = *words;
        Self::from_words(&[seq, head, root, va, old, new, grant, last_word(seq, head, site)])
    }

    /// The record of these words.
    ///
    /// # Errors
    /// [`BadRecord`], whatever the words are; nothing is assumed of them.
    #[inline]
    pub fn from_words(words: &[u64; RECORD_WORDS]) -> Result<Self, BadRecord> {
        let [seq, head, root, va, old, new, grant, sum] = *words;
        let site = (sum >> 32) as u32;
        if seq == 0 || sum != last_word(seq, head, site) {
            return Err(BadRecord::Torn);
        }
        let [kind, level, flavour, cpu, c0, c1, c2, c3] = head.to_le_bytes();
        let count = u32::from_le_bytes([c0, c1, c2, c3]);
        let pcid = u16::try_from(root & PCID_MASK).map_err(|_| BadRecord::Malformed)?;
        let root = Gpa(root & !PCID_MASK);
        let frames = || FrameRange::new(Gpa(va).frame(), old).ok_or(BadRecord::Malformed);
        let level = || Level::from_number(level).ok_or(BadRecord::Unknown);
        let event = match (u64::from(kind), flavour) {
            (KIND_ENTRY, 0) => {
                let write = EntryWrite {
                    root,
                    pcid,
                    va: Gva(va),
                    level: level()?,
                    count,
                    old: Entry(old),
                    new: Entry(new),
                    grant,
                };
                if !write.is_well_formed() {
                    return Err(BadRecord::Malformed);
                }
                Event::EntryWrite(write)
            }
            (KIND_SEEN_STORES, 0) => {
                let (level, [old, new]) = (level()?, [old, new].map(Entry));
                let stores = EntryStores { at: Gpa(va), level, count, old, new, grant };
                if !stores.is_well_formed() {
                    return Err(BadRecord::Malformed);
                }
                Event::Seen(Sighting::Stores(stores))
            }
            (KIND_FILL | KIND_SEEN_FILL, 0) => {
                let fill = TableFill { table: Gpa(va), level: level()?, first: Entry(new) };
                if !fill.is_well_formed() {
                    return Err(BadRecord::Malformed);
                }
                if u64::from(kind) == KIND_FILL {
                    Event::TableFill(fill)
                } else {
                    Event::Seen(Sighting::Fill(fill))
                }
            }
            (KIND_FLUSH, _) => Event::Flush(flush(flavour, level, count, (va, pcid))?),
            (KIND_SEEN_FLUSH, _) => {
                Event::Seen(Sighting::Flush(flush(flavour, level, count, (va, pcid))?))
            }
            (KIND_CONTROL | KIND_SEEN_CONTROL, _) => {
                let register =
                    ControlRegister::from_number(flavour.into()).ok_or(BadRecord::Unknown)?;
                if u64::from(kind) == KIND_CONTROL {
                    Event::Control { register, old, new }
                } else {
                    Event::Seen(Sighting::Control { register, old, new })
                }
            }
            (KIND_ROOT, 0 | 1) => Event::RootLoad { root, pcid, no_flush: flavour == 1 },
            (KIND_SEEN_ROOT, 0 | 1) => {
                Event::Seen(Sighting::RootLoad { root, pcid, no_flush: flavour == 1 })
            }
            (KIND_SEEN_ACCESS, 0 | 1) => {
                Event::Seen(Sighting::Access { va: Gva(va), write: flavour == 1 })
            }
            (KIND_LIFE, _) => {
                let life = Life::from_number(flavour.into()).ok_or(BadRecord::Unknown)?;
                Event::Life(life, frames()?)
            }
            (KIND_ACK, 0) => Event::ShootdownAck(old),
            (KIND_OBSERVED, 0..=2) => {
                let case = Case::from_number(count).ok_or(BadRecord::Malformed)?;
                let seen = match flavour {
                    0 => Seen::Fault,
                    1 => Seen::Reached(Gpa(old)),
                    _ => Seen::NotOffered,
                };
                Event::Observed(Observation { case, va: Gva(va), seen })
            }
            (KIND_HOST, _) => {
                let act = HostAct::from_number(flavour.into()).ok_or(BadRecord::Unknown)?;
                Event::Host(act, frames()?)
            }
            _ => return Err(BadRecord::Unknown),
        };
        Ok(Self { seq, cpu, site, event })
    }
}

/// The flush of this flavour.
fn flush(
    flavour: u8,
    level: impl Fn() -> Result<Level, BadRecord>,
    count: u32,
    (va, pcid): (u64, u16),
) -> Result<Flush, BadRecord> {
    Ok(match flavour {
        0 => {
            let level = level()?;
            if count == 0 || u64::from(count) > 1 << 20 || level > Level::Pd {
                return Err(BadRecord::Malformed);
            }
            Flush::Pages { va: Gva(va), count, level }
        }
        1 => Flush::NonGlobal,
        2 => Flush::Everything,
        3 => Flush::PageOfPcid { va: Gva(va), pcid },
        4 => Flush::Pcid(pcid),
        5 => Flush::AllPcids,
        _ => return Err(BadRecord::Unknown),
    })
}

#[cfg(test)]
mod tests;
