//! The live machine as the audit sees it.

use crate::audit::{CpuState, Denial, TableWords, World};
use crate::machine::memory::Memory;
use crate::machine::state::Registers;
use crate::second_stage::SecondStage;
use lacuna_abi::addr::{FrameRange, Gfn, Gpa};
use lacuna_abi::event::EntryWrite;
use lacuna_abi::paging::Entry;
use lacuna_abi::walk::Tables;

/// Memory, second stage and registers of a machine whose vCPUs stand still.
#[derive(Clone, Copy)]
pub(super) struct LiveWorld<'a> {
    pub(super) memory: &'a Memory,
    pub(super) stage: &'a dyn SecondStage,
    pub(super) cpus: &'a [Option<Registers>],
    pub(super) intents: &'a [Option<EntryWrite>],
    /// Looks may take in all of the guest's memory: they are to take up none of the host's.
    pub(super) frugal: bool,
}

impl Tables for LiveWorld<'_> {
    fn read_entry(&self, at: Gpa) -> Option<Entry> {
        self.memory.read_entry(at)
    }
}

impl World for LiveWorld<'_> {
    fn read_table(&self, table: Gfn, into: &mut TableWords) -> bool {
        self.memory.read_table(table, into)
    }

    fn content_is_zero(&self, frame: Gfn) -> Option<bool> {
        if self.frugal { self.memory.is_zero(frame) } else { self.memory.is_zero_in_use(frame) }
    }

    fn first_nonzero(&self, frame: Gfn) -> Option<u64> {
        self.memory.first_nonzero(frame)
    }

    fn denial(&self, frame: Gfn) -> Denial {
        if !self.stage.closes() {
            Denial::NotEnforced
        } else if self.stage.denies(frame) {
            Denial::Denied
        } else if self.stage.holds_open(frame) {
            Denial::HeldOpen
        } else {
            Denial::Open
        }
    }

    fn denies_all(&self, frames: FrameRange) -> bool {
        self.stage.closes() && self.stage.denies_all(frames)
    }

    fn cpu_state(&self, cpu: u8) -> Option<CpuState> {
        self.cpus.get(usize::from(cpu))?.as_ref().map(CpuState::from)
    }

    fn intent(&self, cpu: u8) -> Option<EntryWrite> {
        *self.intents.get(usize::from(cpu))?
    }
}

impl From<&Registers> for CpuState {
    fn from(registers: &Registers) -> Self {
        Self {
            cr0: registers.cr0,
            cr3: registers.cr3,
            cr4: registers.cr4,
            efer: registers.efer,
            idt_base: registers.idt_base,
            idt_limit: registers.idt_limit,
            gdt_base: registers.gdt_base,
            gdt_limit: registers.gdt_limit,
        }
    }
}
