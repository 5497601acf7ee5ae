//! Configurations: TOML files, checked and resolved to plain data before anything is started.
//!
//! Every mistake is found here, and named with file, line, field and remedy; what comes out is
//! complete, has its paths resolved and can be serialised.
#![forbid(unsafe_code)]

mod error;
mod fields;
mod flags;
mod input;
mod names;
mod raw;
mod resolve;
mod source;
mod template;
#[cfg(test)]
mod tests;
mod workload;

pub use error::{ConfigError, Place};
pub(crate) use fields::{CONFIG, Schema, field};
pub use fields::{FIELDS, Field};
pub use names::{
    GuardChoice, MachineKind, Mediation, OnFree, ProfileChoice, ReportFormat, Seal, Shootdown,
};
pub(crate) use source::{Source, read};
pub(crate) use template::{Setting, Template};

use crate::audit::Rule;
use crate::trace::Secret;
use lacuna_abi::fault::Fault;
use lacuna_abi::workload::{Bench, Crash, Program, Scenario, Selftest, Touch};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// What a run does: the file and what the command line put in place of it.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Config {
    /// The file.
    pub file: PathBuf,
    /// What runs the guest.
    pub machine: MachineKind,
    /// How the host learns of table writes.
    pub mediation: Mediation,
    /// Which part of a run is stepped.
    pub steps: Steps,
    /// The guest.
    pub guest: Guest,
    /// Its allocator.
    pub allocator: Allocator,
    /// What the guest does.
    pub workload: Workload,
    /// How secret frames are closed.
    pub second_stage: SecondStage,
    /// What is checked, and when.
    pub audit: Audit,
    /// Bounds.
    pub limits: Limits,
    /// Faults to plant, without repetition.
    #[serde(serialize_with = "names::faults")]
    pub inject: Vec<Fault>,
    /// Where results go.
    pub output: Output,
}

/// The event numbers between which a guest is stepped, both included.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct Steps {
    /// First.
    pub from: u64,
    /// Last.
    pub to: u64,
}

impl Steps {
    /// From the start to the end of a run.
    pub const ALL: Self = Self { from: 0, to: u64::MAX };
}

/// Section `[guest]`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Guest {
    /// Memory of the allocator in MiB.
    pub memory_mib: u64,
    /// Number of virtual CPUs.
    pub vcpus: u8,
    /// How shootdown interrupts are sent.
    pub shootdown: Shootdown,
    /// Another image than the embedded one.
    pub image: Option<PathBuf>,
    /// Byte that the allocator's memory is filled with before the start.
    pub fill: Option<u8>,
    /// Whether secret pages are zeroed ahead of demand.
    pub prezero: bool,
    /// Seed of whatever the guest draws at random.
    pub seed: u64,
}

/// Section `[allocator]`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Allocator {
    /// KiB of mapped memory that are kept for callers that cannot wait; what suits the size if
    /// `None`.
    pub min_free_kib: Option<u64>,
    /// KiB of free secret pages below which pageblocks flip ahead of demand.
    pub pool_low_kib: u64,
    /// KiB of free secret pages up to which they do.
    pub pool_high_kib: u64,
    /// What happens to freed mapped pages.
    pub on_free: OnFree,
    /// Whether freed secret pages are zeroed, rather than when they are handed out as zero.
    pub scrub: bool,
    /// Whether secret pages are looked at before they are handed out as zero.
    pub check_zero: bool,
}

/// Section `[workload]`: a program and what belongs to it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(tag = "program", rename_all = "kebab-case")]
pub enum Workload {
    /// Boots and ends.
    Idle,
    /// Replays a recording.
    Replay {
        /// The recording.
        input: PathBuf,
        /// Number of its events that are taken; all if `None`.
        events: Option<u64>,
        /// Which of its allocations become secret.
        secret: Secret,
        /// Percentage of its secret allocations that are mapped first and converted in place: the
        /// last ones of those that can be.
        in_place: u8,
    },
    /// Stores a file in secret pages.
    Secrets {
        /// The file.
        input: PathBuf,
    },
    /// Random requests on every CPU.
    Stress {
        /// Operations on each CPU.
        operations: u64,
        /// Largest order.
        max_order: u8,
    },
    /// Tests the allocator and the mermap from inside.
    Selftest {
        /// The test.
        #[serde(serialize_with = "names::selftest")]
        test: Selftest,
        /// Operations of a test that counts such; its own number if `None`.
        operations: Option<u64>,
    },
    /// Measures.
    Bench {
        /// What.
        #[serde(serialize_with = "names::bench")]
        bench: Bench,
        /// Order of the allocations.
        order: u8,
        /// Number of rounds.
        rounds: u64,
    },
    /// Looks for stale translations.
    Probe {
        /// Which.
        #[serde(serialize_with = "names::scenario")]
        scenario: Scenario,
        /// Rounds of each case.
        rounds: u64,
    },
    /// Touches a sealed frame.
    Touch {
        /// How.
        #[serde(serialize_with = "names::touch")]
        touch: Touch,
    },
    /// Fails.
    Crash {
        /// How.
        #[serde(serialize_with = "names::crash")]
        crash: Crash,
    },
}

impl Workload {
    /// The program of the guest image.
    #[must_use]
    pub const fn program(&self) -> Program {
        match self {
            Self::Idle => Program::Idle,
            Self::Replay { .. } => Program::Replay,
            Self::Secrets { .. } => Program::Secrets,
            Self::Stress { .. } => Program::Stress,
            Self::Selftest { .. } => Program::Selftest,
            Self::Bench { .. } => Program::Bench,
            Self::Probe { .. } => Program::Probe,
            Self::Touch { .. } => Program::Touch,
            Self::Crash { .. } => Program::Crash,
        }
    }

    /// The input file, if the program has one.
    #[must_use]
    pub fn input(&self) -> Option<&Path> {
        match self {
            Self::Replay { input, .. } | Self::Secrets { input } => Some(input),
            Self::Idle
            | Self::Stress { .. }
            | Self::Selftest { .. }
            | Self::Bench { .. }
            | Self::Probe { .. }
            | Self::Touch { .. }
            | Self::Crash { .. } => None,
        }
    }
}

/// Section `[second_stage]`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct SecondStage {
    /// The back end.
    pub seal: Seal,
    /// How the back end `guard` closes memory.
    pub guard: GuardChoice,
    /// Most borders between closed and open memory that `mprotect` may make; the back end's own
    /// choice if `None`.
    pub vma_budget: Option<u32>,
}

/// Section `[audit]`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Audit {
    /// How the processor invalidates translations.
    pub profile: ProfileChoice,
    /// Events between complete checks.
    pub quiesce_every: u64,
    /// Frames that are touched at each of them.
    pub probes: u64,
    /// Rules that the run must exercise; one that it did not makes the run inconclusive.
    #[serde(serialize_with = "names::rules")]
    pub require: Vec<Rule>,
    /// What the run is expected to find.
    pub expect: Expect,
}

/// Findings that do not count against a run. One that does not occur makes it inconclusive.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Expect {
    /// The guest touches a sealed frame.
    pub sealed_access: bool,
    /// These rules are violated.
    #[serde(serialize_with = "names::rules")]
    pub rules: Vec<Rule>,
}

/// Section `[limits]`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Limits {
    /// Seconds after which a guest that has not ended is stopped.
    pub timeout_s: u64,
    /// Seconds that a CPU may take to answer a shootdown.
    pub shootdown_s: u64,
    /// KiB of the guest's log that are kept.
    pub guest_log_kib: u64,
    /// MiB that the file of events may grow to.
    pub events_mib: u64,
}

/// Where results go; the command line alone says so.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Output {
    /// Form of the report on standard output.
    pub report: ReportFormat,
    /// Folder for report, guest log and events.
    pub out: Option<PathBuf>,
    /// Whether a recording is made there too.
    pub record: bool,
}

/// What the command line puts in place of the file's settings; each field is named like its flag.
/// Relative paths are relative to the working directory.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Overrides {
    /// `--machine`
    pub machine: Option<MachineKind>,
    /// `--mediate`
    pub mediate: Option<Mediation>,
    /// `--step-from`
    pub step_from: Option<u64>,
    /// `--step-to`
    pub step_to: Option<u64>,
    /// `--seal`
    pub seal: Option<Seal>,
    /// `--input`
    pub input: Option<PathBuf>,
    /// `--inject`, names of faults
    pub inject: Vec<String>,
    /// `--seed`
    pub seed: Option<u64>,
    /// `--report`
    pub report: Option<ReportFormat>,
    /// `--out`
    pub out: Option<PathBuf>,
    /// `--record`
    pub record: bool,
}

impl Config {
    /// Reads, checks and resolves the configuration in `file`. Files that it names are looked at,
    /// but read only later.
    ///
    /// # Errors
    /// [`ConfigError`] for the first mistake found.
    pub fn load(file: &Path, overrides: &Overrides) -> Result<Self, ConfigError> {
        Self::from_text(file, &read(file)?, overrides)
    }

    /// Checks and resolves the configuration in `text`, as if it were the contents of `file`.
    ///
    /// # Errors
    /// [`ConfigError`] for the first mistake found.
    pub fn from_text(file: &Path, text: &str, overrides: &Overrides) -> Result<Self, ConfigError> {
        Template { file, text, beside: None }.config(&[], overrides)
    }
}
