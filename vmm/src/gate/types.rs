//! What goes into a gate and what comes out of it.

use crate::leak::LeakScanner;
use crate::machine::kvm::KvmError;
use crate::machine::memory::{Memory, MemoryError};
use crate::machine::state::Registers;
use crate::second_stage::{SecondStage, SecondStageError};
use crate::stop::Stop;
use lacuna_abi::addr::Gpa;
use lacuna_abi::counter::Counters;
use lacuna_abi::event::Record;
use lacuna_abi::gate::ExceptionReport;
use std::sync::Arc;

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
}

/// Those who follow a run. All methods are called on the thread of the vCPU that left for the
/// host, so they should be quick.
pub trait Observer: Send {
    /// An event, in the order of numbers, after the audit has judged it.
    fn event(&mut self, _record: &Record) {}

    /// A line of the guest's log, control characters replaced.
    fn log(&mut self, _line: &str) {}
}

/// The vCPU that makes a call, stopped.
pub trait StoppedCpu {
    /// Completes a pending access, so that registers and memory are one consistent picture.
    fn complete(&mut self);

    /// The registers.
    ///
    /// # Errors
    /// [`KvmError`].
    fn registers(&self) -> Result<Registers, KvmError>;
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
}

/// What the gate counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct GateCounters {
    /// Calls, of any kind.
    pub calls: u64,
    /// Calls or operations that were refused.
    pub refused: u64,
    /// Seal operations on one range each.
    pub seals: u64,
    /// Open operations on one range each.
    pub opens: u64,
    /// Release operations on one range each.
    pub releases: u64,
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
    /// Root that all CPUs start with.
    pub boot_root: Gpa,
    /// Events between two complete checks.
    pub quiesce_every: u64,
    /// Most findings that are kept in words.
    pub max_findings: usize,
    /// Knows the secret input of the program, if it has one.
    pub scanner: Option<LeakScanner>,
    /// Tells when the run is to stop: long work is broken off then.
    pub stop: Arc<Stop>,
    /// Those who follow the run.
    pub observers: Vec<Box<dyn Observer>>,
}
