//! Event records and the rings that carry them from guest to host.
//!
//! One format for the ring and for recordings. Each CPU writes a ring of its own; one counter in
//! the sequence page, shared by all CPUs and the host, numbers the events. A *revoke* takes its
//! number after its effect is visible; a *flush*, a grant and a root load take it before. So a
//! flush that carries a larger number than a revoke really came after it.

use crate::addr::{FrameRange, Gfn, Gpa, Gva, PAGE_SIZE};
use crate::named_enum;
use crate::paging::{Entry, Level};
use crate::walk::entry_address;

/// Words of one record.
pub const RECORD_WORDS: usize = 8;
/// Bytes of one record.
pub const RECORD_BYTES: u64 = 8 * RECORD_WORDS as u64;
/// Records that a ring holds; a power of two.
pub const RING_RECORDS: u64 = 1024;
/// Bytes of a ring: one page of head, tail and intent, then the records.
pub const RING_BYTES: u64 = PAGE_SIZE + RING_RECORDS * RECORD_BYTES;

/// Word of the ring's first page that counts the records written, by the guest.
pub const RING_HEAD_WORD: usize = 0;
/// Word of the ring's first page that is not zero while the CPU may hold a number whose record it
/// has not published, by the guest: set before the number is taken, cleared after the record.
pub const RING_BUSY_WORD: usize = 1;
/// Word of the ring's first page that counts the records taken, by the host; a cache line of its
/// own.
pub const RING_TAIL_WORD: usize = 8;
/// First word of the ring's intent, by the guest ([`Intent`]); a cache line of its own.
pub const RING_INTENT_WORD: usize = 16;
/// Words of an intent. The first is non-zero while the intent stands.
pub const INTENT_WORDS: usize = 8;

/// A write that is under way: published before the store, cleared after the record. While it
/// stands, the entries may be old or new, and its number is not missing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Intent {
    /// The write.
    pub write: EntryWrite,
    /// The number that its record will carry, 0 if none has been taken yet.
    pub seq: u64,
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

/// What one event is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// A run of consecutive entries of one table was written, each by one store.
    EntryWrite(EntryWrite),
    /// A table that no root reaches was filled, before it is linked.
    TableFill(TableFill),
    /// This CPU invalidated translations of its own.
    Flush(Flush),
    /// This CPU changed a control register. Its number is taken before the instruction.
    Control {
        /// Which.
        register: ControlRegister,
        /// What it held.
        old: u64,
        /// What it holds from here on.
        new: u64,
    },
    /// This CPU loaded CR3.
    RootLoad {
        /// Physical address of the root.
        root: Gpa,
        /// Process-context identifier, 0 while CR4.PCIDE is clear.
        pcid: u16,
        /// Bit 63 of the operand was set: nothing was invalidated.
        no_flush: bool,
    },
    /// A step in a frame's life, as the allocator sees it.
    Life(Life, FrameRange),
    /// A CPU acknowledged the shootdown with this number.
    ShootdownAck(u64),
    /// Written by the host only: it carried out this operation.
    Host(HostAct, FrameRange),
}

/// Entries written: entry `i` of the run went from `old.nth_of_run(i)` to `new.nth_of_run(i)`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EntryWrite {
    /// Root of the address space.
    pub root: Gpa,
    /// Process-context identifier of the address space.
    pub pcid: u16,
    /// First virtual address that the first entry spans.
    pub va: Gva,
    /// Level of the table.
    pub level: Level,
    /// Number of entries, at least 1; the run does not leave its table.
    pub count: u32,
    /// The first entry before.
    pub old: Entry,
    /// The first entry after.
    pub new: Entry,
    /// For a remap (present before and after), the number taken before the store, of the grant;
    /// the record's own number is that of the revoke. 0 otherwise.
    pub grant: u64,
}

impl EntryWrite {
    /// Whether the run lies within one table and its address is where an entry's span starts.
    #[must_use]
    pub const fn is_well_formed(&self) -> bool {
        self.count >= 1
            && self.level.index(self.va) + self.count as u64 <= 512
            && self.va.is_aligned(self.level.span())
    }

    /// Virtual bytes that the run spans.
    #[must_use]
    pub const fn span(&self) -> u64 {
        self.count as u64 * self.level.span()
    }

    /// Place of the run's first entry in the table at `table`.
    #[must_use]
    pub const fn place_in(&self, table: Gpa) -> Gpa {
        entry_address(table, self.level, self.va)
    }
}

/// A table filled while no root reached it: entry `i` became `first.nth_of_run(level, i)`, for all
/// of its entries. Without this record the host would have to read the table when it judges the
/// record that links it, and by then the table may have moved on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TableFill {
    /// Place of the table.
    pub table: Gpa,
    /// Its level: 1 or 2.
    pub level: Level,
    /// Its first entry.
    pub first: Entry,
}

impl TableFill {
    /// Whether the table lies on a page and its level can be filled with a run of leaves.
    #[must_use]
    pub const fn is_well_formed(&self) -> bool {
        self.table.is_aligned(PAGE_SIZE) && (self.level as u8) <= Level::Pd as u8
    }

    /// What entry `index` was filled with.
    #[must_use]
    pub const fn entry(&self, index: u64) -> Entry {
        self.first.nth_of_run(self.level, index)
    }
}

/// A local invalidation (SDM volume 3, "Operations that Invalidate TLBs and Paging-Structure
/// Caches").
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flush {
    /// INVLPG for each page of `span` bytes from `va`.
    Pages {
        /// First address.
        va: Gva,
        /// Number of INVLPGs, each one page of `level` further on.
        count: u32,
        /// Level of the pages: 1 steps by 4 KiB, 2 by 2 MiB.
        level: Level,
    },
    /// CR3 was loaded with its own value: all translations of the current PCID but the global ones.
    NonGlobal,
    /// CR4.PGE was cleared and set again, or INVPCID of type 2: everything.
    Everything,
    /// INVPCID of type 0: the page under this PCID, but no global translation.
    PageOfPcid {
        /// An address in the page.
        va: Gva,
        /// The PCID.
        pcid: u16,
    },
    /// INVPCID of type 1: all translations of this PCID but the global ones.
    Pcid(u16),
    /// INVPCID of type 3: all translations of every PCID but the global ones.
    AllPcids,
}

named_enum! {
    /// Registers whose changes decide what may be cached (SDM volume 3, "Operations that Invalidate
    /// TLBs and Paging-Structure Caches").
    #[repr(u8)]
    pub enum ControlRegister {
        /// CR0.
        Cr0 = "cr0",
        /// CR4.
        Cr4 = "cr4",
        /// The MSR IA32_EFER.
        Efer = "efer",
    }
}

named_enum! {
    /// Steps in a frame's life that the allocator reports.
    #[repr(u8)]
    pub enum Life {
        /// On an unmapped free list.
        Pooled = "pooled",
        /// In the pool and known to be zero.
        PooledZero = "pooled-zero",
        /// Handed out, contents undefined.
        HandedOut = "handed-out",
        /// Handed out as zero.
        HandedOutZero = "handed-out-zero",
        /// Given back by its owner.
        Freed = "freed",
        /// Taken off the unmapped lists, on its way back to the mapped side.
        Unpooled = "unpooled",
        /// Became a page table.
        TableAllocated = "table-allocated",
        /// Is no page table any more.
        TableFreed = "table-freed",
    }
}

named_enum! {
    /// What the host did.
    #[repr(u8)]
    pub enum HostAct {
        /// A seal completed: the second stage denies the frames and no translation is left.
        Sealed = "sealed",
        /// The frames are sealed as far as their owner goes, but their granule is still open.
        HeldOpen = "held-open",
        /// The frames were opened.
        Opened = "opened",
        /// The frames were released: secret no more.
        Released = "released",
        /// A quiesce point was judged.
        Quiesced = "quiesced",
        /// An open was refused; its number had been taken.
        Refused = "refused",
    }
}

/// One event with its number and the CPU that it happened on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Record {
    /// Number, from 1.
    pub seq: u64,
    /// CPU.
    pub cpu: u8,
    /// Which code recorded it, for reports: in an image the low half of an address, on simulated
    /// machines a distance from a fixed place; 0 if it is not known.
    pub site: u32,
    /// What happened.
    pub event: Event,
}

/// Why words are no record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BadRecord {
    /// The check word does not match: written half, or garbage.
    Torn,
    /// No event has this kind, level or flavour.
    Unknown,
    /// The fields contradict each other: a run that leaves its table, an empty range.
    Malformed,
}

const CHECK: u64 = 0x6c61_6375_6e61_2121;
const KIND_ENTRY: u64 = 1;
const KIND_FLUSH: u64 = 2;
const KIND_ROOT: u64 = 3;
const KIND_LIFE: u64 = 4;
const KIND_ACK: u64 = 5;
const KIND_HOST: u64 = 6;
const KIND_FILL: u64 = 7;
const KIND_CONTROL: u64 = 8;
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
            Event::Host(act, frames) => (
                head(KIND_HOST, 0, act as u64, self.cpu, 0),
                [0, frames.start().gpa().0, frames.count(), 0, 0],
            ),
        };
        let [root, va, old, new, grant] = rest;
        [self.seq, head, root, va, old, new, grant, last_word(self.seq, head, self.site)]
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
            (KIND_HOST, _) => {
                let act = HostAct::from_number(flavour.into()).ok_or(BadRecord::Unknown)?;
                Event::Host(act, frames()?)
            }
            _ => return Err(BadRecord::Unknown),
        };
        Ok(Self { seq, cpu, site, event })
    }
}

/// First frame and number of frames of a run of entries, for messages and indexes: what `entry`,
/// the first of `count` at `level`, maps. `None` if it is not present or maps no memory that can
/// exist.
#[must_use]
pub fn mapped_frames(entry: Entry, level: Level, count: u32) -> Option<FrameRange> {
    if !entry.is_present() || !entry.is_leaf(level) {
        return None;
    }
    let Gfn(first) = entry.frame(level);
    FrameRange::new(Gfn(first), u64::from(count) * level.frames())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn range() -> impl Strategy<Value = FrameRange> {
        (0..1u64 << 39, 1..1u64 << 20).prop_map(|(s, c)| FrameRange::new(Gfn(s), c).unwrap())
    }

    fn flush() -> impl Strategy<Value = Flush> {
        prop_oneof![
            (any::<u64>(), 1u32..=1 << 20).prop_map(|(va, count)| Flush::Pages {
                va: Gva(va),
                count,
                level: Level::Pt
            }),
            (any::<u64>(), 0u16..4096)
                .prop_map(|(va, pcid)| Flush::PageOfPcid { va: Gva(va), pcid }),
            (0u16..4096).prop_map(Flush::Pcid),
            Just(Flush::NonGlobal),
            Just(Flush::AllPcids),
            Just(Flush::Everything),
        ]
    }

    fn event() -> impl Strategy<Value = Event> {
        let write = (1u8..=4, 0u64..512, 1u32..=512, any::<[u64; 3]>(), 0u64..1 << 35).prop_map(
            |(level, index, count, [old, new, grant], high)| {
                let level = Level::from_number(level).unwrap();
                let index = index.min(512 - u64::from(count));
                let table = (high << 12) & !(level.span() * 512 - 1);
                Event::EntryWrite(EntryWrite {
                    root: Gpa(0x7000),
                    pcid: 5,
                    va: Gva(table + index * level.span()),
                    level,
                    count,
                    old: Entry(old),
                    new: Entry(new),
                    grant,
                })
            },
        );
        let fill = (0..1u64 << 39, 1u8..=2, any::<u64>()).prop_map(|(frame, level, first)| {
            let (table, level) = (Gfn(frame).gpa(), Level::from_number(level).unwrap());
            Event::TableFill(TableFill { table, level, first: Entry(first) })
        });
        prop_oneof![
            write,
            fill,
            flush().prop_map(Event::Flush),
            (0..ControlRegister::ALL.len(), any::<[u64; 2]>()).prop_map(|(i, [old, new])| {
                Event::Control { register: ControlRegister::ALL[i], old, new }
            }),
            any::<bool>().prop_map(|no_flush| Event::RootLoad {
                root: Gpa(0x3000),
                pcid: 9,
                no_flush
            }),
            (0..Life::ALL.len(), range()).prop_map(|(i, r)| Event::Life(Life::ALL[i], r)),
            any::<u64>().prop_map(Event::ShootdownAck),
            (0..HostAct::ALL.len(), range()).prop_map(|(i, r)| Event::Host(HostAct::ALL[i], r)),
        ]
    }

    proptest! {
        #[test]
        fn a_record_survives_its_encoding(
            seq in 1..u64::MAX, cpu: u8, site: u32, event in event(),
        ) {
            let record = Record { seq, cpu, site, event };
            prop_assert_eq!(Record::from_words(&record.to_words()), Ok(record));
        }

        #[test]
        fn any_words_are_decoded_or_refused(words: [u64; RECORD_WORDS]) {
            let _ = Record::from_words(&words);
        }

        #[test]
        fn any_head_with_a_right_check_is_decoded_or_refused(
            mut words: [u64; RECORD_WORDS], kind in 0u64..9, level in 0u64..6, flavour in 0u64..12,
        ) {
            words[1] = words[1] & !0xff_ffff | kind | level << 8 | flavour << 16;
            words[7] = last_word(words[0], words[1], 0);
            if let Ok(record) = Record::from_words(&words) {
                let again = Record::from_words(&record.to_words());
                prop_assert_eq!(again, Ok(record));
            }
        }
    }

    #[test]
    fn a_half_written_record_is_torn() {
        let record = Record { seq: 9, cpu: 0, site: 5, event: Event::Flush(Flush::Everything) };
        for word in [0, 1, 7] {
            let mut words = record.to_words();
            words[word] ^= 4;
            assert_eq!(Record::from_words(&words), Err(BadRecord::Torn), "word {word}");
        }
        assert_eq!(Record::from_words(&[0; RECORD_WORDS]), Err(BadRecord::Torn));
    }

    #[test]
    fn a_run_that_leaves_its_table_is_malformed() {
        let write = EntryWrite {
            root: Gpa(0),
            pcid: 0,
            va: Gva(511 * 4096),
            level: Level::Pt,
            count: 2,
            old: Entry::EMPTY,
            new: Entry::EMPTY,
            grant: 0,
        };
        let record = Record { seq: 1, cpu: 0, site: 0, event: Event::EntryWrite(write) };
        assert_eq!(Record::from_words(&record.to_words()), Err(BadRecord::Malformed));
    }

    #[test]
    fn an_intent_survives_its_encoding_and_none_is_none() {
        let write = EntryWrite {
            root: Gpa(0x5000),
            pcid: 3,
            va: Gva(0x20_0000),
            level: Level::Pd,
            count: 2,
            old: Entry(1),
            new: Entry(2),
            grant: 7,
        };
        for seq in [0, 99] {
            let intent = Intent { write, seq };
            assert_eq!(Intent::from_words(&intent.to_words()), Ok(Some(intent)));
        }
        assert_eq!(Intent::from_words(&[0; INTENT_WORDS]), Ok(None));
        assert_eq!(Intent::from_words(&[5; INTENT_WORDS]), Err(BadRecord::Torn));
    }
}
