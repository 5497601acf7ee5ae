//! What goes into a gate and what comes out of it.

use crate::audit::{Mediation, Probe, ProbeKind, Profile, Touched};
use crate::config::Steps;
use crate::leak::LeakScanner;
use crate::machine::kvm::KvmError;
use crate::machine::memory::{Memory, MemoryError};
use crate::machine::state::Registers;
use crate::recording::Recorder;
use crate::second_stage::{SecondStage, SecondStageError};
use crate::stop::Stop;
use lacuna_abi::addr::{FrameRange, Gpa};
use lacuna_abi::counter::Counters;
use lacuna_abi::event::{HostAct, Record};
use lacuna_abi::gate::ExceptionReport;
use lacuna_abi::layout::Needs;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The host failed; the run ends without a judgement.
#[derive(Debug, thiserror::Error)]
pub enum GateFailure {
    /// Guest memory could not be reached.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM failed.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The second stage could not be changed.
    #[error(transparent)]
    SecondStage(#[from] SecondStageError),
    /// Guest memory could not be searched.
    #[error("cannot search guest memory for the secret input: {0}")]
    Search(std::io::Error),
    /// Frames were touched on purpose, and the guest may not run on as if they had not been.
    #[error("the guest is not resumed after its frames were touched: {0}")]
    Probe(&'static str),
}

/// Those who follow a run. All methods are called on the thread of a vCPU that left for the host,
/// one at a time, so they should be quick.
pub trait Observer: Send {
    /// An event, in the order of numbers, after the audit has judged it.
    fn event(&mut self, _record: &Record) {}

    /// A gate operation has taken effect, and the guest does not know yet. Its record comes later, in
    /// its turn.
    fn operation(&mut self, _act: HostAct, _frames: FrameRange) {}

    /// A line of the guest's log, control characters replaced.
    fn log(&mut self, _line: &str) {}
}

/// The vCPUs of a machine, as the one that makes a call can have them stand still. Sets of vCPUs
/// have a bit for each.
pub trait Vcpus {
    /// All stand still from here on, out of guest mode, pending accesses completed: registers and
    /// memory are one consistent picture. Those that stand still already go on doing so.
    fn stop(&mut self);

    /// Lets these, which stand still, go on until `done` says so or `deadline` comes; then they
    /// stand still again.
    fn let_on(&mut self, cpus: u8, done: &mut dyn FnMut() -> bool, deadline: Instant);

    /// All may go on.
    fn resume(&mut self);

    /// The others that will execute further instructions when they go on, rather than wait for a
    /// call of their own to be served.
    fn runnable(&self) -> u8;

    /// Registers of one that stands still.
    ///
    /// # Errors
    /// [`KvmError`].
    fn registers(&self, cpu: u8) -> Result<Registers, KvmError>;

    /// Whether these registers are those of a reset that KVM made when the vCPU shut down, and not
    /// what the guest had.
    fn was_reset(&self, _cpu: u8) -> bool {
        false
    }

    /// Starts the others.
    fn start(&mut self);

    /// Steps the vCPUs from here on, or does so no more. All stand still.
    fn step(&mut self, _on: bool) {}

    /// Sends these the interrupt that asks for shootdowns.
    ///
    /// # Errors
    /// [`KvmError`].
    fn interrupt(&mut self, cpus: u8) -> Result<(), KvmError>;
}

/// Touches frames on purpose, to see whether the second stage stops it. Used only while all vCPUs stand
/// still.
pub trait Prober: Send {
    /// The ways in which it can touch.
    fn kinds(&self) -> &'static [ProbeKind];

    /// Makes these touches, one after the other, in a time that is bounded; what came of each.
    fn touch(&mut self, probes: &[Probe]) -> Vec<Touched>;

    /// Why the guest must not run on: a touch may still be under way, or was not undone.
    fn harm(&self) -> Option<&'static str> {
        None
    }
}

/// What a served call means for the vCPU.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Served {
    /// Run on.
    Resume,
    /// The program is done, with this status and these counters.
    Exit(u64, Box<Counters>),
    /// The guest reports an exception.
    Exception(Box<ExceptionReport>),
    /// The guest panicked, with this message.
    Panic(String),
    /// CPUs have not answered the caller's shootdown for longer than allowed.
    Unanswered {
        /// These, one bit each.
        missing: u8,
        /// For how long.
        waited: Duration,
    },
}

/// What the gate counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct GateCounters {
    /// Calls, of any kind.
    pub calls: u64,
    /// Calls that only made room in a ring.
    pub ring_drains: u64,
    /// Calls or operations that were refused.
    pub refused: u64,
    /// Seal operations on one range each.
    pub seals: u64,
    /// Open operations on one range each.
    pub opens: u64,
    /// Release operations on one range each.
    pub releases: u64,
    /// Entries written for the guest, under direct paging.
    pub table_writes: u64,
    /// Writes to tables that were refused.
    pub table_refusals: u64,
    /// Events taken from the rings.
    pub events: u64,
    /// Points at which everything was checked.
    pub quiesces: u64,
}

/// How a gate is set up.
pub struct GateSetup {
    /// Guest memory.
    pub memory: Arc<Memory>,
    /// What closes frames.
    pub stage: Box<dyn SecondStage>,
    /// What the host sees for itself, from the start.
    pub mediation: Mediation,
    /// Which part of the run that is, where it is stepped.
    pub steps: Steps,
    /// Root that every CPU starts with; CPU 0 runs from the start.
    pub boot_root: Gpa,
    /// How the CPUs invalidate translations.
    pub profile: Profile,
    /// Events between two complete checks.
    pub quiesce_every: u64,
    /// Most findings that are kept in words.
    pub max_findings: usize,
    /// Frames that are touched at each complete check, to see what the second stage does.
    pub probes: u64,
    /// What follows from it is which.
    pub seed: u64,
    /// Longest that a CPU may take to answer a shootdown.
    pub shootdown_limit: Duration,
    /// Knows the secret input of the program, if it has one.
    pub scanner: Option<LeakScanner>,
    /// Tells when the run is to stop: long work is broken off then.
    pub stop: Arc<Stop>,
    /// Those who follow the run.
    pub observers: Vec<Box<dyn Observer>>,
    /// What records the run, if anything does, and what the layout was made from.
    pub recorder: Option<(Box<Recorder>, Needs)>,
}
