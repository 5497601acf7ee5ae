//! What a machine is to be and to do: plain data, made from a configuration.

use crate::audit::{Mediation, Profile};
use crate::config::{Config, GuardChoice, MachineKind, OnFree, Seal, Shootdown, Steps, Workload};
use crate::doctor::{HostFacts, ThisHost};
use crate::image::{Image, ImageError, ORDINARY, WITH_FAULTS};
use crate::leak::MAX_SECRET;
use crate::trace::{self, Selection, TraceError};
use lacuna_abi::boot::{
    FEATURE_CHECK_ZERO, FEATURE_DIRECT_PAGING, FEATURE_FLIP, FEATURE_GATE_SHOOTDOWN,
    FEATURE_POISON, FEATURE_PREZERO, FEATURE_SCRUB, FEATURE_ZERO_ON_FREE, MIN_FREE_BY_SIZE,
};
use lacuna_abi::layout::MIN_MEMORY_MIB;
use lacuna_abi::workload::{
    BENCH_CPU_WORDS, Program, SLOT_BYTES, STRESS_CPU_WORDS, secrets_scratch, selftest_scratch,
};
use std::num::NonZeroU8;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Most findings that are kept in words; the counts stay exact.
const MAX_FINDINGS: usize = 100;

/// A file that the configuration names cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The embedded image: a fault of the build.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The user's own image.
    #[error("[guest] image: {0}: {1}; docs/guests.md says what an image must be")]
    OwnImage(PathBuf, ImageError),
    /// The user's own image cannot be read.
    #[error("[guest] image: cannot read {0}: {1}; check the path")]
    ReadImage(PathBuf, std::io::Error),
    /// The recording.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// The secret input.
    #[error("cannot read the input {0}: {1}; check [workload] input")]
    Input(PathBuf, std::io::Error),
    /// Faults cannot be planted in a user's own image.
    #[error("--inject plants faults in the embedded image only; remove [guest] image or --inject")]
    ForeignFaults,
}

/// One machine and its program.
#[derive(Debug)]
pub struct Plan {
    /// Kernel image.
    pub image: Image,
    /// Memory for the guest's allocator.
    pub memory_mib: u64,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Byte that the allocator's memory is filled with before the start.
    pub fill: Option<u8>,
    /// `FEATURE_*` bits of the boot information.
    pub features: u64,
    /// Bits of the faults to plant.
    pub faults: u64,
    /// Seed for the guest.
    pub seed: u64,
    /// Pages that the guest's allocator keeps, as in the boot information: for callers that cannot
    /// wait, and free in the pool, at least and at most.
    pub marks: [u64; 3],
    /// Program.
    pub program: Program,
    /// Its arguments.
    pub args: [u64; 3],
    /// Contents of the input region; wiped from the VMM's memory once the guest has them.
    pub input: Vec<u8>,
    /// Whether the input is secret, to be searched for.
    pub secret_input: bool,
    /// Bytes of workload memory.
    pub scratch: u64,
    /// Back end of the second stage.
    pub seal: Seal,
    /// How the guard seal closes memory.
    pub guard: GuardChoice,
    /// Borders between closed and open memory that `mprotect` may make.
    pub vma_budget: Option<u32>,
    /// What the host sees for itself.
    pub mediation: Mediation,
    /// Which part of the run is stepped, where that is the mediation.
    pub steps: Steps,
    /// How the CPUs invalidate translations.
    pub profile: Profile,
    /// Events between two complete checks.
    pub quiesce_every: u64,
    /// Frames that are touched at each complete check, to see what the second stage does.
    pub probes: u64,
    /// Most findings that are kept in words.
    pub max_findings: usize,
    /// Longest that a CPU may take to answer a shootdown.
    pub shootdown_limit: Duration,
    /// Longest time from the first instruction to the end.
    pub timeout: Duration,
}

/// What the program of a configuration is given.
struct Work {
    args: [u64; 3],
    input: Vec<u8>,
    scratch: u64,
    warnings: Vec<String>,
}

impl Plan {
    /// The plan of a configuration: reads the files that it names. Also returns what is odd about
    /// them, as sentences.
    ///
    /// # Errors
    /// [`PlanError`] names the file and the remedy.
    pub fn new(config: &Config) -> Result<(Self, Vec<String>), PlanError> {
        let image = match &config.guest.image {
            Some(_) if !config.inject.is_empty() => return Err(PlanError::ForeignFaults),
            Some(path) => {
                let file = std::fs::read(path);
                let file = file.map_err(|error| PlanError::ReadImage(path.clone(), error))?;
                Image::parse(&file).map_err(|error| PlanError::OwnImage(path.clone(), error))?
            }
            None if config.inject.is_empty() => Image::parse(ORDINARY)?,
            None => Image::parse(WITH_FAULTS)?,
        };
        let work = work(config)?;
        let allocator = &config.allocator;
        let features = [
            (true, FEATURE_FLIP),
            (config.guest.prezero, FEATURE_PREZERO),
            (allocator.on_free == OnFree::Poison, FEATURE_POISON),
            (allocator.on_free == OnFree::Zero, FEATURE_ZERO_ON_FREE),
            (allocator.scrub, FEATURE_SCRUB),
            (allocator.check_zero, FEATURE_CHECK_ZERO),
            (config.guest.shootdown == Shootdown::Gate, FEATURE_GATE_SHOOTDOWN),
            (config.mediation == Mediation::Tables, FEATURE_DIRECT_PAGING),
        ];
        let features = features.iter().filter(|(on, _)| *on).fold(0, |bits, (_, bit)| bits | bit);
        let plan = Self {
            image,
            memory_mib: config.guest.memory_mib,
            vcpus: config.guest.vcpus,
            fill: config.guest.fill,
            features,
            faults: config.inject.iter().fold(0, |bits, fault| bits | fault.bit()),
            seed: config.guest.seed,
            marks: [
                allocator.min_free_kib.map_or(MIN_FREE_BY_SIZE, |kib| kib / 4),
                allocator.pool_low_kib / 4,
                allocator.pool_high_kib / 4,
            ],
            program: config.workload.program(),
            args: work.args,
            input: work.input,
            secret_input: config.workload.program() == Program::Secrets,
            scratch: work.scratch,
            seal: config.second_stage.seal,
            guard: config.second_stage.guard,
            vma_budget: config.second_stage.vma_budget,
            mediation: config.mediation,
            steps: config.steps,
            profile: profile(config),
            quiesce_every: config.audit.quiesce_every,
            probes: config.audit.probes,
            max_findings: MAX_FINDINGS,
            shootdown_limit: Duration::from_secs(config.limits.shootdown_s),
            timeout: Duration::from_secs(config.limits.timeout_s),
        };
        Ok((plan, work.warnings))
    }
}

/// How the CPUs of this configuration invalidate translations: as it says, or as the processor that
/// they run on does. Simulated ones do what the manual says.
#[must_use]
pub fn profile(config: &Config) -> Profile {
    config.audit.profile.profile().unwrap_or_else(|| match config.machine {
        MachineKind::Kvm => HostFacts::read(&ThisHost).profile,
        MachineKind::Sim => Profile::Intel,
    })
}

fn work(config: &Config) -> Result<Work, PlanError> {
    let nothing = Work { args: [0; 3], input: Vec::new(), scratch: 0, warnings: Vec::new() };
    Ok(match &config.workload {
        Workload::Idle => nothing,
        Workload::Stress { operations, max_order } => Work {
            args: [*operations, (*max_order).into(), config.guest.seed],
            scratch: u64::from(config.guest.vcpus) * STRESS_CPU_WORDS * 8,
            ..nothing
        },
        Workload::Selftest { test, operations } => Work {
            args: [*test as u64, operations.unwrap_or(0), 0],
            scratch: selftest_scratch(config.guest.memory_mib << 8),
            ..nothing
        },
        Workload::Bench { bench, order, rounds } => Work {
            args: [*bench as u64, (*order).into(), *rounds],
            scratch: u64::from(config.guest.vcpus) * BENCH_CPU_WORDS * 8,
            ..nothing
        },
        Workload::Probe { scenario, rounds } => {
            Work { args: [*scenario as u64, *rounds, 0], ..nothing }
        }
        Workload::Touch { touch } => Work { args: [*touch as u64, 0, 0], ..nothing },
        Workload::Crash { crash } => Work { args: [*crash as u64, 0, 0], ..nothing },
        Workload::Replay { input, events, secret, in_place } => {
            let cpus = NonZeroU8::new(config.guest.vcpus).unwrap_or(NonZeroU8::MIN);
            let (events, in_place) = (*events, *in_place);
            let selection = Selection { events, secret: secret.clone(), in_place, cpus };
            let replay = trace::load(input, &selection)?;
            let words = replay.ops.iter().flat_map(|op| op.to_words());
            Work {
                args: [replay.ops.len() as u64, replay.slots.into(), 0],
                input: words.flat_map(u64::to_le_bytes).collect(),
                scratch: u64::from(replay.slots) * SLOT_BYTES,
                warnings: replay.stats.warnings,
            }
        }
        Workload::Secrets { input } => secret(input)?,
    })
}

/// The configuration has bounded the input's size to what any guest can hold.
fn secret(path: &Path) -> Result<Work, PlanError> {
    let input = std::fs::read(path).map_err(|error| PlanError::Input(path.to_owned(), error))?;
    let len = input.len() as u64;
    Ok(Work { args: [len, 0, 0], input, scratch: secrets_scratch(len), warnings: Vec::new() })
}

const _: () = assert!(MAX_SECRET <= (MIN_MEMORY_MIB << 20) / 4);
