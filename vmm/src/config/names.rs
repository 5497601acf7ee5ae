//! Settings that are one of a few names, and how named values are serialised.

use crate::audit::Rule;
use lacuna_abi::fault::Fault;
use lacuna_abi::workload::{Crash, Touch};
use serde::{Deserialize, Serialize, Serializer};

macro_rules! named {
    ($($(#[$edoc:meta])* $enum:ident { $($(#[$doc:meta])* $variant:ident = $name:literal,)* })*) => {$(
        $(#[$edoc])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
        pub enum $enum { $($(#[$doc])* #[serde(rename = $name)] $variant,)* }

        impl $enum {
            /// All values.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The name used in configurations and on the command line.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// The value of this name.
            #[must_use]
            pub fn from_name(name: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|value| value.name() == name)
            }
        }
    )*};
}

named! {
    /// What runs the guest.
    MachineKind {
        /// The host's `/dev/kvm`.
        Kvm = "kvm",
        /// A software MMU in this process.
        Sim = "sim",
    }

    /// How the host learns of table writes.
    Mediation {
        /// From event rings that the guest writes.
        Trace = "trace",
        /// By carrying them out itself.
        Tables = "tables",
        /// By single-stepping the guest.
        Step = "step",
    }

    /// How secret frames are closed.
    Seal {
        /// The best that the host can do.
        Auto = "auto",
        /// By removing memory slots, 2 MiB at a time.
        Memslot = "memslot",
        /// In the mapping that KVM uses, page by page.
        Guard = "guard",
        /// Not at all, for comparison.
        Off = "off",
    }

    /// How the back end `guard` closes memory.
    GuardChoice {
        /// `madvise` where the kernel can do it, `mprotect` elsewhere.
        Auto = "auto",
        /// `MADV_GUARD_INSTALL`.
        Madvise = "madvise",
        /// `mprotect`.
        Mprotect = "mprotect",
    }

    /// Form of the report on standard output.
    ReportFormat {
        /// For eyes.
        Text = "text",
        /// The contract.
        Json = "json",
    }
}

pub(super) fn touch<S: Serializer>(touch: &Touch, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(touch.name())
}

pub(super) fn crash<S: Serializer>(crash: &Crash, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(crash.name())
}

pub(super) fn faults<S: Serializer>(faults: &[Fault], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(faults.iter().map(|fault| fault.name()))
}

pub(super) fn rules<S: Serializer>(rules: &[Rule], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(rules.iter().map(|rule| rule.name()))
}
