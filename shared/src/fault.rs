//! Faults that can be planted, to show that the checks find them.

use crate::named_enum;

named_enum! {
    /// A slip in the guest's code, planted on request with `--inject`. Only the image built with the
    /// feature `faults` contains them.
    #[derive(Hash)]
    #[repr(u8)]
    pub enum Fault {
        /// No flush after a block left the direct map.
        SkipFlipFlush = "skip-flip-flush",
        /// Only the flipping CPU flushes.
        LocalOnlyFlipFlush = "local-only-flip-flush",
        /// CR3 reload where globals must go.
        Cr3FlipFlush = "cr3-flip-flush",
        /// Flush, then clear.
        FlushBeforeUnmap = "flush-before-unmap",
        /// The block's directory entry is not cleared.
        LeaveDirectMapAlias = "leave-direct-map-alias",
        /// Converting in place: one 4 KiB entry of the range stays mapped.
        PartialBlockUnmap = "partial-block-unmap",
        /// Window entry with the Global bit.
        GlobalWindow = "global-window",
        /// Mapped in another CPU's window.
        WrongCpuWindow = "wrong-cpu-window",
        /// The window wraps without a flush.
        SkipWindowFlush = "skip-window-flush",
        /// A frame is released while its window entry may be cached.
        FreeBeforeWindowFlush = "free-before-window-flush",
        /// Converting in place: 2 MiB entry split, range cleared, no flush.
        SplitWithoutFlush = "split-without-flush",
        /// Merging back: table page freed without a flush.
        TableFreeStale = "table-free-stale",
        /// A pool block is never sealed.
        SkipSeal = "skip-seal",
        /// A block is opened for zeroing as soon as its directory entry is cleared: before the batch's
        /// shootdown, and before its seal.
        OpenEarly = "open-early",
        /// Handed out as zero, not zeroed.
        SkipZero = "skip-zero",
        /// Released to the mapped side unscrubbed.
        SkipScrubOnRemap = "skip-scrub-on-remap",
        /// A flush of the direct map is reported and not done on the CPU that flips.
        ForgedFlush = "forged-flush",
        /// A table write is reported that was not done.
        ForgedTableWrite = "forged-table-write",
    }
}

impl Fault {
    /// The rule that must find it.
    #[must_use]
    pub const fn rule(self) -> &'static str {
        match self {
            Self::SkipFlipFlush
            | Self::LocalOnlyFlipFlush
            | Self::Cr3FlipFlush
            | Self::FlushBeforeUnmap
            | Self::SplitWithoutFlush
            | Self::OpenEarly => "stale-direct-map",
            Self::LeaveDirectMapAlias | Self::PartialBlockUnmap => "direct-map-alias",
            Self::GlobalWindow => "global-window",
            Self::WrongCpuWindow => "foreign-alias",
            Self::SkipWindowFlush | Self::FreeBeforeWindowFlush => "stale-window",
            Self::TableFreeStale => "stale-table",
            Self::SkipSeal => "second-stage-open",
            Self::SkipZero | Self::SkipScrubOnRemap => "residue",
            Self::ForgedFlush | Self::ForgedTableWrite => "trace-honesty",
        }
    }

    /// The mediations under which it must be found: whoever believes what the guest reports does not
    /// find a lie that leaves no trace.
    #[must_use]
    pub const fn modes(self) -> &'static [&'static str] {
        match self {
            Self::ForgedFlush => &["step"],
            Self::ForgedTableWrite => &["tables", "step"],
            _ => &["trace", "tables", "step"],
        }
    }

    /// How many vCPUs a guest must have for the slip to be one.
    #[must_use]
    pub const fn vcpus(self) -> u8 {
        match self {
            Self::LocalOnlyFlipFlush | Self::WrongCpuWindow => 2,
            _ => 1,
        }
    }

    /// The fault's bit in the boot information.
    #[must_use]
    pub const fn bit(self) -> u64 {
        1 << self as u8
    }
}

named_enum! {
    /// A slip of the same kinds as [`Fault`]'s, at another place, in the same image. Only tests plant
    /// them, by [`Slip::bit`]: they show that the rules find the class and not the spot.
    #[derive(Hash)]
    #[repr(u8)]
    pub enum Slip {
        /// A flip of several chunks of pageblocks flushes the first block only.
        FlushFirstBlock = "flush-first-block",
        /// The CPU that came online last is left out when pages were converted in place.
        LastCpuLeftOut = "last-cpu-left-out",
        /// The second range of a block that is converted in place: one INVLPG too few.
        FlushOnePageShort = "flush-one-page-short",
        /// Blocks are mapped again before they are released.
        MapBeforeRelease = "map-before-release",
        /// The large entry is written over a table while other pages of its block are converted.
        MergeOverSecret = "merge-over-secret",
        /// Merging back: only the own CPU forgets the table that is freed.
        MergeFlushLocal = "merge-flush-local",
        /// A mapping of the reserve is writable and global whatever was asked for.
        ReserveGlobal = "reserve-global",
        /// Taking a mapping down leaves its last entry.
        WindowEntryLeft = "window-entry-left",
        /// A slot of the 2 MiB part of a window is used again without a flush.
        LargeWindowUnflushed = "large-window-unflushed",
        /// Before blocks are released, only the own CPU's window is flushed.
        ReleaseFlushLocal = "release-flush-local",
        /// Ranges of scrubbed pages go to the pool with all frames sealed but the last.
        SealOneFrameShort = "seal-one-frame-short",
        /// A scrub of several pages leaves out the last.
        ScrubOnePageShort = "scrub-one-page-short",
    }
}

impl Slip {
    /// The rule that must find it.
    #[must_use]
    pub const fn rule(self) -> &'static str {
        match self {
            Self::FlushFirstBlock | Self::LastCpuLeftOut | Self::FlushOnePageShort => {
                "stale-direct-map"
            }
            Self::MapBeforeRelease | Self::MergeOverSecret => "direct-map-alias",
            Self::MergeFlushLocal => "stale-table",
            Self::ReserveGlobal => "global-window",
            Self::WindowEntryLeft => "foreign-alias",
            Self::LargeWindowUnflushed | Self::ReleaseFlushLocal => "stale-window",
            Self::SealOneFrameShort => "second-stage-open",
            Self::ScrubOnePageShort => "residue",
        }
    }

    /// How many vCPUs a guest must have for the slip to be one.
    #[must_use]
    pub const fn vcpus(self) -> u8 {
        match self {
            Self::LastCpuLeftOut | Self::MergeFlushLocal | Self::ReleaseFlushLocal => 2,
            _ => 1,
        }
    }

    /// The slip's bit in the boot information, in the half that the command line cannot reach.
    #[must_use]
    pub const fn bit(self) -> u64 {
        1 << (32 + self as u8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_bits_are_distinct() {
        let mut bits = 0;
        for fault in Fault::ALL {
            assert_eq!(Fault::from_name(fault.name()), Some(*fault));
            assert_eq!(bits & fault.bit(), 0);
            bits |= fault.bit();
        }
        for slip in Slip::ALL {
            assert_eq!(Fault::from_name(slip.name()), None);
            assert_eq!(bits & slip.bit(), 0);
            bits |= slip.bit();
        }
        assert_eq!(Fault::from_name("no-such-fault"), None);
    }
}
