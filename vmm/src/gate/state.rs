//! What can be read off a gate, while its machine runs and after.

use super::{Gate, GateCounters};
use crate::audit::{Audit, AuditResult, CaseTally};
use crate::events::Sightings;
use crate::machine::memory::Memory;
use crate::machine::state::Registers;
use crate::recording::Recorder;
use crate::second_stage::SecondStage;
use lacuna_abi::observe::Case;
use std::sync::Arc;
use std::time::{Duration, Instant};

impl Gate {
    /// What the audit found.
    #[must_use]
    pub fn result(&self) -> AuditResult {
        self.audit.result()
    }

    /// The audit.
    #[must_use]
    pub fn audit(&self) -> &Audit {
        &self.audit
    }

    /// What records the run, if anything does.
    pub fn recorder(&mut self) -> Option<&mut Recorder> {
        self.audit.recorder()
    }

    /// Ends the recording: what is judged from here on is not in it.
    pub fn take_recorder(&mut self) -> Option<Box<Recorder>> {
        self.audit.take_recorder()
    }

    /// What the guest observed of each case of the program `probe`.
    pub fn observations(&self) -> impl Iterator<Item = (Case, CaseTally)> {
        self.audit.observations()
    }

    /// Where whoever sees what CPUs do puts it.
    #[must_use]
    pub fn sightings(&self) -> Arc<Sightings> {
        Arc::clone(&self.sightings)
    }

    /// Notes why the run cannot be called passed.
    pub fn inconclusive(&mut self, reason: String) {
        self.audit.inconclusive(reason);
    }

    /// What the gate counted.
    #[must_use]
    pub const fn counters(&self) -> GateCounters {
        self.counters
    }

    /// Events that were lost.
    #[must_use]
    pub const fn events_lost(&self) -> u64 {
        self.sequencer.lost()
    }

    /// When the guest said that its allocator is ready.
    #[must_use]
    pub const fn ready_at(&self) -> Option<Instant> {
        self.ready_at
    }

    /// Time that the audit took.
    #[must_use]
    pub fn audit_time(&self) -> Duration {
        self.clock.duration(self.audit_ticks)
    }

    /// The second stage.
    #[must_use]
    pub fn stage(&self) -> &dyn SecondStage {
        &*self.stage
    }

    /// Guest memory.
    #[must_use]
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Guest memory, shared.
    #[must_use]
    pub fn shared_memory(&self) -> Arc<Memory> {
        Arc::clone(&self.memory)
    }

    /// Registers of a CPU at the last complete check.
    #[must_use]
    pub fn last_registers(&self, cpu: u8) -> Option<Registers> {
        *self.cpus.get(usize::from(cpu))?
    }

    /// Number of the last event, for findings that no event leads to.
    #[must_use]
    pub fn last_event(&self) -> u64 {
        self.memory.last_event_number().unwrap_or(0)
    }
}
