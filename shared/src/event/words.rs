//! Events as words: what rings, intents and recordings hold.

use super::{
    BadRecord, ControlRegister, EntryWrite, Event, Flush, HostAct, INTENT_WORDS, Intent, Life,
    RECORD_WORDS, Record, TableFill,
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
    /// The record's words: number, head, root and PCID, address, old, new, grant, check and site.
    #[inline]
    #[must_use]
    pub fn to_words(&self) -> [u64; RECORD_WORDS] {
        let (head, rest) = match self.event {
            Event::EntryWrite(w) => (
                head(KIND_ENTRY, w.level.number(), 0, self.cpu, w.count),
                [w.root.0 | u64::from(w.pcid), w.va.0, w.old.0, w.new.0, w.grant],
            ),
            Event::TableFill(TableFill { table, level, first }) => {
                (head(KIND_FILL, level.number(), 0, self.cpu, 0), [0, table.0, 0, first.0, 0])
            }
            Event::Flush(Flush::Pages { va, count, level }) => {
                (head(KIND_FLUSH, level.number(), 0, self.cpu, count), [0, va.0, 0, 0, 0])
            }
            Event::Flush(Flush::NonGlobal) => (head(KIND_FLUSH, 0, 1, self.cpu, 0), [0; 5]),
            Event::Flush(Flush::Everything) => (head(KIND_FLUSH, 0, 2, self.cpu, 0), [0; 5]),
            Event::Flush(Flush::PageOfPcid { va, pcid }) => {
                (head(KIND_FLUSH, 0, 3, self.cpu, 0), [u64::from(pcid), va.0, 0, 0, 0])
            }
            Event::Flush(Flush::Pcid(pcid)) => {
                (head(KIND_FLUSH, 0, 4, self.cpu, 0), [u64::from(pcid), 0, 0, 0, 0])
            }
            Event::Flush(Flush::AllPcids) => (head(KIND_FLUSH, 0, 5, self.cpu, 0), [0; 5]),
            Event::Control { register, old, new } => {
                (head(KIND_CONTROL, 0, register as u64, self.cpu, 0), [0, 0, old, new, 0])
            }
            Event::RootLoad { root, pcid, no_flush } => (
                head(KIND_ROOT, 0, u64::from(no_flush), self.cpu, 0),
                [root.0 | u64::from(pcid), 0, 0, 0, 0],
            ),
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
            Event::Host(act, frames) => (
                head(KIND_HOST, 0, act as u64, self.cpu, 0),
                [0, frames.start().gpa().0, frames.count(), 0, 0],
            ),
        };
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
            (KIND_FILL, 0) => {
                let fill = TableFill { table: Gpa(va), level: level()?, first: Entry(new) };
                if !fill.is_well_formed() {
                    return Err(BadRecord::Malformed);
                }
                Event::TableFill(fill)
            }
            (KIND_FLUSH, 0) => {
                let level = level()?;
                if count == 0 || u64::from(count) > 1 << 20 || level > Level::Pd {
                    return Err(BadRecord::Malformed);
                }
                Event::Flush(Flush::Pages { va: Gva(va), count, level })
            }
            (KIND_FLUSH, 1) => Event::Flush(Flush::NonGlobal),
            (KIND_FLUSH, 2) => Event::Flush(Flush::Everything),
            (KIND_FLUSH, 3) => Event::Flush(Flush::PageOfPcid { va: Gva(va), pcid }),
            (KIND_FLUSH, 4) => Event::Flush(Flush::Pcid(pcid)),
            (KIND_FLUSH, 5) => Event::Flush(Flush::AllPcids),
            (KIND_CONTROL, _) => {
                let register =
                    ControlRegister::from_number(flavour.into()).ok_or(BadRecord::Unknown)?;
                Event::Control { register, old, new }
            }
            (KIND_ROOT, 0 | 1) => Event::RootLoad { root, pcid, no_flush: flavour == 1 },
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

#[cfg(test)]
mod tests;
