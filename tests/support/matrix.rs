//! What each fault is tried on: workload, seals, numbers of CPUs. One table for all machines;
//! `docs/faults.md` is held against it.

use super::{EVENTS, dirty, replay};
use lacuna_abi::fault::Fault;

/// All seals, but for `auto`, which is one of them.
pub const SEALS: [&str; 3] = ["guard", "memslot", "off"];

/// The seals under which the slip shows. A completed seal makes window flushes superfluous: what the
/// two slips with windows leave behind is gone before it matters.
pub fn seals(fault: Fault) -> &'static [&'static str] {
    match fault {
        Fault::SkipWindowFlush | Fault::FreeBeforeWindowFlush => &["off"],
        _ => &SEALS,
    }
}

/// The workload that takes the path with the slip, without the slip: runs of the same twin are runs
/// of the same configuration.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Twin {
    /// A replay, all of it secret.
    Replay,
    /// The same, long enough for the window of each CPU to wrap.
    Wrapping,
    /// As the first, all that can be of it converted in place.
    InPlace,
    /// The same as the first, zeroed at hand-out and not ahead of demand.
    NoPrezero,
}

impl Twin {
    pub const ALL: [Self; 4] = [Self::Replay, Self::Wrapping, Self::InPlace, Self::NoPrezero];

    /// The twin of a fault.
    pub fn of(fault: Fault) -> Self {
        match fault {
            Fault::PartialBlockUnmap | Fault::SplitWithoutFlush | Fault::TableFreeStale => {
                Self::InPlace
            }
            Fault::SkipWindowFlush | Fault::FreeBeforeWindowFlush => Self::Wrapping,
            // Zeroing at hand-out can be skipped only where the pool is not zeroed ahead of demand.
            Fault::SkipZero => Self::NoPrezero,
            _ => Self::Replay,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Replay => "replay",
            Self::Wrapping => "replay_with_wrapping_windows",
            Self::InPlace => "replay_in_place",
            Self::NoPrezero => "replay_without_prezero",
        }
    }

    /// The configuration, with dirty memory.
    pub fn config(self, cpus: u8) -> String {
        let in_place = if self == Self::InPlace { "in_place = 100\n" } else { "" };
        let prezero = if self == Self::NoPrezero { "prezero = false\n" } else { "" };
        let events = if self == Self::Wrapping { EVENTS * u64::from(cpus) } else { EVENTS };
        let config = dirty(&(replay(events, "all") + in_place));
        let guest = format!("[guest]\nvcpus = {cpus}\n{prezero}");
        config.replace("[guest]\n", &guest)
    }
}
