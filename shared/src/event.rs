//! Event records and the rings that carry them from guest to host.
//!
//! One format for the ring and for recordings. Each CPU writes a ring of its own; one counter in
//! the sequence page, shared by all CPUs and the host, numbers the events. A *revoke* takes its
//! number after its effect is visible; a *flush*, a grant and a root load take it before. So a
//! flush that carries a larger number than a revoke really came after it.

mod words;

use crate::addr::{FrameRange, Gfn, Gpa, Gva, PAGE_SIZE};
use crate::named_enum;
use crate::observe::Observation;
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
    /// An access of the program `probe`. Its number is taken before the access: what the CPU did
    /// before has a smaller one.
    Observed(Observation),
    /// Written by the host only: it carried out this operation.
    Host(HostAct, FrameRange),
    /// Written by the host only: what it saw this CPU do, whatever the guest says of it.
    Seen(Sighting),
}

/// What the host itself sees a CPU do, by one of the mediations that need no honest guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sighting {
    /// Entries were stored.
    Stores(EntryStores),
    /// A table that no root reaches was filled.
    Fill(TableFill),
    /// As [`Event::Flush`].
    Flush(Flush),
    /// As [`Event::Control`].
    Control {
        /// Which.
        register: ControlRegister,
        /// What it held.
        old: u64,
        /// What it holds from here on.
        new: u64,
    },
    /// As [`Event::RootLoad`].
    RootLoad {
        /// Physical address of the root.
        root: Gpa,
        /// Process-context identifier.
        pcid: u16,
        /// Bit 63 of the operand was set.
        no_flush: bool,
    },
    /// A page of a window was read or written. Accesses of a CPU to one page, with nothing else that was
    /// seen of it in between, are told once.
    Access {
        /// An address in the page.
        va: Gva,
        /// It was written.
        write: bool,
    },
}

/// Consecutive words of a page of the table pool that were stored, wherever the page is linked: word
/// `i` went from `old.nth_of_run(level, i)` to `new.nth_of_run(level, i)`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EntryStores {
    /// Place of the first.
    pub at: Gpa,
    /// Level that a run of several steps by.
    pub level: Level,
    /// Number of words, at least 1; the run does not leave its page.
    pub count: u32,
    /// The first before.
    pub old: Entry,
    /// The first after.
    pub new: Entry,
    /// As [`EntryWrite::grant`].
    pub grant: u64,
}

impl EntryStores {
    /// Whether the run lies within one page and starts at a word.
    #[must_use]
    pub const fn is_well_formed(&self) -> bool {
        self.at.is_aligned(8)
            && self.count >= 1
            && self.index() + self.count as u64 <= PAGE_SIZE / 8
    }

    /// Place of the first in its page, in words.
    #[must_use]
    pub const fn index(&self) -> u64 {
        self.at.0 % PAGE_SIZE / 8
    }
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
        /// On an unmapped free list. Of pages that somebody had it also says that they were given
        /// back: pages that go onto a list at once are reported once.
        Pooled = "pooled",
        /// In the pool and known to be zero; otherwise as [`Life::Pooled`].
        PooledZero = "pooled-zero",
        /// Handed out, contents undefined.
        HandedOut = "handed-out",
        /// Handed out as zero.
        HandedOutZero = "handed-out-zero",
        /// Given back by its owner, and not on a list yet: to be scrubbed, mapped or withheld.
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
        /// A write to tables was refused, under direct paging: the frames that it would have mapped, or
        /// the table.
        WriteRefused = "write-refused",
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
