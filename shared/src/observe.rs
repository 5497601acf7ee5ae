//! What the program `probe` observes: accesses right after a change of the tables and an invalidation,
//! made so that nothing but the CPU's own caches can answer otherwise than the tables.
//!
//! A *case* is one combination of what was changed, how it was invalidated, whether the old entry was
//! global, and whether the CPU that changed it or another one makes the access.

use crate::addr::{Gpa, Gva};
use crate::named_enum;

named_enum! {
    /// What is changed between the two accesses.
    #[repr(u8)]
    pub enum Change {
        /// A 4 KiB entry is cleared.
        Clear = "clear",
        /// A 4 KiB entry maps another frame.
        Remap = "remap",
        /// A 4 KiB entry loses R/W.
        ReadOnly = "read-only",
        /// A 4 KiB entry of code gets XD.
        NoExecute = "no-execute",
        /// A 2 MiB entry is cleared.
        ClearLarge = "clear-2m",
        /// A 2 MiB entry gives way to a table of 4 KiB entries for other frames.
        Split = "split",
        /// A pageblock leaves the direct map and becomes secret, as the allocator does it.
        Flip = "flip",
    }
}

impl Change {
    /// The access that is tried: one that the change forbids, or that it leads elsewhere.
    #[must_use]
    pub const fn access(self) -> Access {
        match self {
            Self::ReadOnly => Access::Write,
            Self::NoExecute => Access::Fetch,
            _ => Access::Read,
        }
    }
}

named_enum! {
    /// How the CPU that made the change invalidates.
    #[repr(u8)]
    pub enum Means {
        /// Not at all.
        None = "none",
        /// INVLPG of the address.
        Invlpg = "invlpg",
        /// MOV to CR3 of the same value, CR4.PCIDE clear.
        Cr3 = "cr3",
        /// MOV to CR3 with bit 63 set, CR4.PCIDE set.
        Cr3NoFlush = "cr3-63",
        /// INVPCID of type 0: the address under PCID 0.
        InvpcidAddress = "invpcid0",
        /// INVPCID of type 1: PCID 0.
        InvpcidContext = "invpcid1",
        /// INVPCID of type 2: everything.
        InvpcidAll = "invpcid2",
        /// INVPCID of type 3: everything but globals.
        InvpcidNonGlobal = "invpcid3",
        /// CR4.PGE cleared and set.
        Pge = "pge",
        /// An interrupt has the other CPU execute INVLPG.
        Ipi = "ipi",
    }
}

named_enum! {
    /// Kinds of access.
    #[repr(u8)]
    pub enum Access {
        /// A load.
        Read = "read",
        /// A store.
        Write = "write",
        /// An instruction fetch.
        Fetch = "fetch",
    }
}

/// One combination.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Case {
    change: u8,
    means: u8,
    global: bool,
    other: bool,
}

impl Case {
    /// The combination of these.
    #[must_use]
    pub const fn new(change: Change, means: Means, global: bool, other: bool) -> Self {
        Self { change: change as u8, means: means as u8, global, other }
    }

    /// What is changed.
    #[must_use]
    pub fn change(self) -> Change {
        Change::from_number(self.change.into()).unwrap_or(Change::Clear)
    }

    /// How it is invalidated.
    #[must_use]
    pub fn means(self) -> Means {
        Means::from_number(self.means.into()).unwrap_or(Means::None)
    }

    /// The entry that is changed has the Global bit.
    #[must_use]
    pub const fn global(self) -> bool {
        self.global
    }

    /// Another CPU than the one that changes the entry makes both accesses.
    #[must_use]
    pub const fn other(self) -> bool {
        self.other
    }

    /// Whether there can be such a case: the CPU itself needs no interrupt, and a pageblock that flips
    /// is flushed by the allocator, or not, and watched by another CPU.
    #[must_use]
    pub fn makes_sense(self) -> bool {
        match self.change() {
            Change::Flip => self.means() == Means::None && self.global && self.other,
            _ => self.means() != Means::Ipi || self.other,
        }
    }

    /// All cases that make sense, in the order of their numbers.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..Self::COUNT as u32).filter_map(Self::from_number)
    }

    /// One more than the largest number.
    pub const COUNT: usize = 4 * Change::ALL.len() * Means::ALL.len();

    /// The case's number, below [`Self::COUNT`].
    #[must_use]
    pub const fn number(self) -> u32 {
        let kind = self.change as u32 * Means::ALL.len() as u32 + self.means as u32;
        4 * kind + 2 * self.other as u32 + self.global as u32
    }

    /// The case with this number, if it makes sense.
    #[must_use]
    pub fn from_number(number: u32) -> Option<Self> {
        let means = u64::from(number / 4) % Means::ALL.len() as u64;
        let change = Change::from_number(u64::from(number / 4) / Means::ALL.len() as u64)?;
        let means = Means::from_number(means)?;
        let case = Self::new(change, means, number & 1 != 0, number & 2 != 0);
        case.makes_sense().then_some(case)
    }
}

/// What became of an access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Seen {
    /// A page fault.
    Fault,
    /// It reached the frame at this address, as the contents showed.
    Reached(Gpa),
    /// It was not made: the CPU, the machine or the guest has no such thing.
    NotOffered,
}

/// One access that was observed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Observation {
    /// The case that it belongs to.
    pub case: Case,
    /// Its address.
    pub va: Gva,
    /// What became of it.
    pub seen: Seen,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    #[test]
    fn numbers_and_cases_lead_to_each_other() {
        let all: Vec<Case> = Case::all().collect();
        assert!(all.iter().all(|case| Case::from_number(case.number()) == Some(*case)));
        // Six changes of the table: two kinds of entry, ten means on another CPU and nine on its own.
        assert_eq!(all.len(), 6 * 2 * (10 + 9) + 1);
        assert_eq!(Case::from_number(Case::COUNT as u32), None);
        assert_eq!(Case::from_number(u32::MAX), None);
    }

    #[test]
    fn what_makes_no_sense_has_no_number() {
        let own_interrupt = Case::new(Change::Clear, Means::Ipi, false, false);
        assert_eq!(Case::from_number(own_interrupt.number()), None);
        let flip = Case::new(Change::Flip, Means::None, true, true);
        assert_eq!(Case::from_number(flip.number()), Some(flip));
        assert_eq!((flip.change(), flip.means()), (Change::Flip, Means::None));
    }
}
