//! Settings that are one of a few names, and how named values are serialised.

pub use crate::audit::Mediation;
use crate::audit::{Profile, Rule};
use lacuna_abi::fault::Fault;
use lacuna_abi::named_enum;
use lacuna_abi::workload::{Bench, Crash, Scenario, Selftest, Touch};
use serde::{Deserialize, Serialize, Serializer};

named_enum! {
    /// What runs the guest.
    #[derive(Serialize, Deserialize)]
    #[serde(rename_all = "lowercase")]
    pub enum MachineKind {
        /// The host's `/dev/kvm`.
        Kvm = "kvm",
        /// A software MMU in this process.
        Sim = "sim",
    }
}

named_enum! {
    /// How the guest sends the interrupt that asks other CPUs for a shootdown.
    #[derive(Serialize, Deserialize)]
    #[serde(rename_all = "lowercase")]
    pub enum Shootdown {
        /// Through the CPU's own interrupt controller.
        X2apic = "x2apic",
        /// By a gate call: the VMM delivers it.
        Gate = "gate",
    }
}

named_enum! {
    /// How secret frames are closed.
    #[derive(Serialize, Deserialize)]
    #[serde(rename_all = "lowercase")]
    pub enum Seal {
        /// The best that the host can do.
        Auto = "auto",
        /// By removing memory slots, 2 MiB at a time.
        Memslot = "memslot",
        /// In the mapping that KVM uses, page by page.
        Guard = "guard",
        /// Not at all, for comparison.
        Off = "off",
    }
}

named_enum! {
    /// What happens to mapped pages that are freed.
    #[derive(Serialize, Deserialize)]
    #[serde(rename_all = "lowercase")]
    pub enum OnFree {
        /// Nothing.
        Leave = "leave",
        /// They are zeroed.
        Zero = "zero",
        /// They are filled with a pattern, which is checked when they are handed out.
        Poison = "poison",
    }
}

named_enum! {
    /// How the audit takes the processor to invalidate translations.
    #[derive(Serialize, Deserialize)]
    #[serde(rename_all = "kebab-case")]
    pub enum ProfileChoice {
        /// As the host's processor does; as the manual says on a simulated machine.
        Auto = "auto",
        /// As AMD's do.
        Amd = "amd",
        /// As Intel's do.
        Intel = "intel",
        /// As those of Intel's do on which INVLPG may leave global translations.
        IntelInvlpgErratum = "intel-invlpg-erratum",
    }
}

impl ProfileChoice {
    /// The profile chosen, if one is.
    #[must_use]
    pub const fn profile(self) -> Option<Profile> {
        match self {
            Self::Auto => None,
            Self::Amd => Some(Profile::Amd),
            Self::Intel => Some(Profile::Intel),
            Self::IntelInvlpgErratum => Some(Profile::IntelInvlpgErratum),
        }
    }
}

named_enum! {
    /// How the back end `guard` closes memory.
    #[derive(Serialize, Deserialize)]
    #[serde(rename_all = "lowercase")]
    pub enum GuardChoice {
        /// `madvise` where the kernel can do it, `mprotect` elsewhere.
        Auto = "auto",
        /// `MADV_GUARD_INSTALL`.
        Madvise = "madvise",
        /// `mprotect`.
        Mprotect = "mprotect",
    }
}

named_enum! {
    /// Form of the report on standard output.
    #[derive(Serialize, Deserialize)]
    #[serde(rename_all = "lowercase")]
    pub enum ReportFormat {
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

pub(super) fn scenario<S: Serializer>(
    scenario: &Scenario,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(scenario.name())
}

pub(super) fn selftest<S: Serializer>(test: &Selftest, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(test.name())
}

pub(super) fn bench<S: Serializer>(bench: &Bench, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(bench.name())
}

pub(super) fn faults<S: Serializer>(faults: &[Fault], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(faults.iter().map(|fault| fault.name()))
}

pub(super) fn rules<S: Serializer>(rules: &[Rule], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(rules.iter().map(|rule| rule.name()))
}
