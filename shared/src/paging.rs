//! Page-table entries of 4-level paging (Intel SDM volume 3, "4-Level Paging and 5-Level
//! Paging").

use crate::addr::{Gfn, Gpa, Gva, PAGE_SHIFT};
use core::fmt;

/// Entries in one table.
pub const ENTRIES: u64 = 512;

/// The level of a table, and of the entries in it: 1 for a page table (PTE) up to 4 for the root
/// (PML4E).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum Level {
    /// Page table; its entries map 4 KiB.
    Pt = 1,
    /// Page directory; its entries map 2 MiB or point to a page table.
    Pd = 2,
    /// Page-directory-pointer table; its entries map 1 GiB or point to a page directory.
    Pdpt = 3,
    /// The root; its entries point to page-directory-pointer tables.
    Pml4 = 4,
}

impl Level {
    /// The level with this number.
    #[must_use]
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Pt),
            2 => Some(Self::Pd),
            3 => Some(Self::Pdpt),
            4 => Some(Self::Pml4),
            _ => None,
        }
    }

    /// Number of the level, 1 to 4.
    #[must_use]
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// The level below; `None` below a page table.
    #[must_use]
    pub const fn below(self) -> Option<Self> {
        Self::from_number(self as u8 - 1)
    }

    /// log2 of the bytes that one entry of this level spans.
    #[must_use]
    pub const fn span_shift(self) -> u32 {
        PAGE_SHIFT + 9 * (self as u32 - 1)
    }

    /// Bytes that one entry of this level spans.
    #[must_use]
    pub const fn span(self) -> u64 {
        1 << self.span_shift()
    }

    /// Frames that one entry of this level spans.
    #[must_use]
    pub const fn frames(self) -> u64 {
        1 << (self.span_shift() - PAGE_SHIFT)
    }

    /// Index of the entry for `va` in a table of this level.
    #[must_use]
    pub const fn index(self, va: Gva) -> u64 {
        (va.0 >> self.span_shift()) & (ENTRIES - 1)
    }
}

/// One page-table entry.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Entry(pub u64);

impl Entry {
    /// An entry that maps nothing.
    pub const EMPTY: Self = Self(0);
    /// P: present.
    pub const PRESENT: u64 = 1 << 0;
    /// R/W: writable.
    pub const WRITABLE: u64 = 1 << 1;
    /// U/S: reachable from ring 3.
    pub const USER: u64 = 1 << 2;
    /// A: accessed.
    pub const ACCESSED: u64 = 1 << 5;
    /// D: dirty.
    pub const DIRTY: u64 = 1 << 6;
    /// PS: the entry of a page directory or page-directory-pointer table maps a page.
    pub const PAGE_SIZE: u64 = 1 << 7;
    /// G: the translation survives a CR3 load.
    pub const GLOBAL: u64 = 1 << 8;
    /// XD: not executable (with EFER.NXE).
    pub const NO_EXECUTE: u64 = 1 << 63;
    /// Bits that hold the physical address of a table or a 4 KiB page.
    pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

    /// Present, accessed and dirty, writable, not executable: what a data page of the guest has.
    /// Accessed and dirty are set from the start so that no walk ever writes to a table.
    pub const DATA: u64 =
        Self::PRESENT | Self::WRITABLE | Self::ACCESSED | Self::DIRTY | Self::NO_EXECUTE;
    /// As [`Self::DATA`], but read-only.
    pub const READ_ONLY: u64 = Self::PRESENT | Self::ACCESSED | Self::NO_EXECUTE;
    /// Present, accessed, executable and read-only: kernel text.
    pub const TEXT: u64 = Self::PRESENT | Self::ACCESSED;
    /// An entry that points to a table: it forbids nothing, the leaf decides.
    pub const TABLE: u64 = Self::PRESENT | Self::WRITABLE | Self::ACCESSED;

    /// An entry for `frame` with these flag bits.
    #[must_use]
    pub const fn new(frame: Gfn, flags: u64) -> Self {
        Self((frame.gpa().0 & Self::ADDRESS) | (flags & !Self::ADDRESS))
    }

    /// Whether all of these flag bits are set.
    #[must_use]
    pub const fn has(self, flags: u64) -> bool {
        self.0 & flags == flags
    }

    /// P.
    #[must_use]
    pub const fn is_present(self) -> bool {
        self.has(Self::PRESENT)
    }

    /// Whether the entry, found in a table of `level`, maps a page (and does not point to a
    /// table). Only asked of present entries.
    #[must_use]
    pub const fn is_leaf(self, level: Level) -> bool {
        match level {
            Level::Pt => true,
            Level::Pd | Level::Pdpt => self.has(Self::PAGE_SIZE),
            Level::Pml4 => false,
        }
    }

    /// The table that the entry points to, or the first frame of the page that a leaf of `level`
    /// maps. The PAT bit of a large page (bit 12) is not part of its address.
    #[must_use]
    pub const fn frame(self, level: Level) -> Gfn {
        let gpa = Gpa(self.0 & Self::ADDRESS);
        if matches!(level, Level::Pd | Level::Pdpt) && self.has(Self::PAGE_SIZE) {
            return Gfn(gpa.frame().0 & !(level.frames() - 1));
        }
        gpa.frame()
    }

    /// The flag bits, without the address.
    #[must_use]
    pub const fn flags(self) -> u64 {
        self.0 & !Self::ADDRESS
    }

    /// The entry `index` places further on in a run that starts with this one: a run maps
    /// consecutive frames with equal flags, and an entry that is not present stays as it is.
    #[must_use]
    pub const fn nth_of_run(self, level: Level, index: u64) -> Self {
        if self.is_present() {
            Self(self.0.wrapping_add(index.wrapping_mul(level.span())))
        } else {
            self
        }
    }
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Entry({:#x})", self.0)
    }
}

/// Whether `va` is canonical: bits 63 to 47 are all equal.
#[must_use]
pub const fn is_canonical(va: Gva) -> bool {
    let top = va.0 >> 47;
    top == 0 || top == 0x1_ffff
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_span_what_the_manual_says() {
        assert_eq!(Level::Pt.span(), 4 << 10);
        assert_eq!(Level::Pd.span(), 2 << 20);
        assert_eq!(Level::Pdpt.span(), 1 << 30);
        assert_eq!(Level::Pml4.span(), 512 << 30);
        assert_eq!(Level::Pd.frames(), 512);
        assert_eq!(Level::Pml4.index(Gva(0xffff_8880_0000_0000)), 273);
        assert_eq!(Level::Pt.below(), None);
    }

    #[test]
    fn the_pat_bit_of_a_large_page_is_not_part_of_its_address() {
        let entry = Entry(0x0060_0000 | 0x1000 | Entry::PRESENT | Entry::PAGE_SIZE);
        assert_eq!(entry.frame(Level::Pd), Gfn(0x600));
        assert_eq!(Entry(0x0060_1000 | Entry::PRESENT).frame(Level::Pt), Gfn(0x601));
    }

    #[test]
    fn a_run_maps_consecutive_frames_and_keeps_its_flags() {
        let first = Entry::new(Gfn(7), Entry::DATA);
        assert_eq!(first.nth_of_run(Level::Pt, 3), Entry::new(Gfn(10), Entry::DATA));
        assert_eq!(Entry::EMPTY.nth_of_run(Level::Pt, 3), Entry::EMPTY);
    }

    #[test]
    fn canonical_addresses_are_the_two_halves() {
        assert!(is_canonical(Gva(0x7fff_ffff_ffff)));
        assert!(is_canonical(Gva(0xffff_8000_0000_0000)));
        assert!(!is_canonical(Gva(0x8000_0000_0000)));
        assert!(!is_canonical(Gva(0xffff_0000_0000_0000)));
    }
}
