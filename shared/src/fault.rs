//! Faults that can be planted, to show that the checks find them.

macro_rules! faults {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $rule:literal;)*) => {
        /// A slip in the guest's code, planted on request. Only the image built with the feature
        /// `faults` contains them.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        #[repr(u8)]
        pub enum Fault { $($(#[$doc])* $variant,)* }

        impl Fault {
            /// All faults, in the order of their bits.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The name that `--inject` takes.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// The rule that must find it.
            #[must_use]
            pub const fn rule(self) -> &'static str {
                match self { $(Self::$variant => $rule,)* }
            }
        }
    };
}

faults! {
    /// No flush after a block left the direct map.
    SkipFlipFlush = "skip-flip-flush", "stale-direct-map";
    /// CR3 reload where globals must go.
    Cr3FlipFlush = "cr3-flip-flush", "stale-direct-map";
    /// Flush, then clear.
    FlushBeforeUnmap = "flush-before-unmap", "stale-direct-map";
    /// The block's directory entry is not cleared.
    LeaveDirectMapAlias = "leave-direct-map-alias", "direct-map-alias";
    /// Window entry with the Global bit.
    GlobalWindow = "global-window", "global-window";
    /// The window wraps without a flush.
    SkipWindowFlush = "skip-window-flush", "stale-window";
    /// A frame is released while its window entry may be cached.
    FreeBeforeWindowFlush = "free-before-window-flush", "stale-window";
    /// A pool block is never sealed.
    SkipSeal = "skip-seal", "second-stage-open";
    /// Handed out as zero, not zeroed.
    SkipZero = "skip-zero", "residue";
    /// Released to the mapped side unscrubbed.
    SkipScrubOnRemap = "skip-scrub-on-remap", "residue";
}

impl Fault {
    /// The fault's bit in the boot information.
    #[must_use]
    pub const fn bit(self) -> u64 {
        1 << self as u8
    }

    /// The fault with this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|f| f.name() == name)
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
        assert_eq!(Fault::from_name("no-such-fault"), None);
    }
}
