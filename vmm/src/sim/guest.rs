//! The guest of a simulated machine: what the guest image's main function does, on simulated CPUs.

use super::machine::SimMachine;
use super::{cpu, touch};
use crate::machine::memory::{Memory, MemoryError};
use crate::machine::sys;
use lacuna_abi::boot::{BootInfo, FEATURE_FLIP, FEATURE_PREZERO};
use lacuna_abi::layout::BOOT_INFO_OFFSET;
use lacuna_abi::workload::{Crash, Program, Touch};
use lacuna_guest::alloc::{AllocConfig, PageAllocator};
use lacuna_guest::meta::{BlockMeta, MemMap, PageMeta};
use lacuna_guest::platform::Platform;
use lacuna_guest::programs::{self, ProgramError, Services, Team};

/// The program ended as it should.
const DONE: u64 = 0;
/// The program found something wrong.
const FAILED: u64 = 1;

/// What simulated CPUs run in place of the program that the plan names: for tests and measurements
/// of the allocator's own interface.
pub trait Workload: Send + Sync {
    /// One CPU's part: every CPU calls this, with interrupts on, and the run ends when CPU 0
    /// returns.
    ///
    /// # Errors
    /// What is wrong; the run ends then too, as failed.
    fn run<'a>(
        &self,
        machine: &'a SimMachine,
        allocator: &PageAllocator<'a, SimMachine>,
        team: &Team,
    ) -> Result<(), ProgramError>;
}

/// What all CPUs of the guest share.
pub(super) struct Guest<'a> {
    info: BootInfo,
    workload: Option<&'a dyn Workload>,
    allocator: PageAllocator<'a, SimMachine>,
    team: Team,
}

/// Metadata of a zone, in this process and not in guest memory: the guest's code refers to it.
pub(super) struct Metadata {
    pages: Box<[PageMeta]>,
    blocks: Box<[BlockMeta]>,
}

impl Metadata {
    /// That of a zone that was never used.
    pub(super) fn new(memory: &Memory) -> Self {
        let layout = memory.layout();
        let count = |count: u64| usize::try_from(count).unwrap_or(0);
        let pages = sys::zeroed(count(layout.zone_frames().count()));
        Self { pages, blocks: sys::zeroed(count(layout.zone_blocks())) }
    }
}

impl<'a> Guest<'a> {
    /// The guest that the boot information in memory describes.
    ///
    /// # Errors
    /// [`MemoryError::Access`] if it cannot be read: a fault of the layout.
    pub(super) fn new(
        machine: &'a SimMachine,
        memory: &Memory,
        metadata: &'a Metadata,
        workload: Option<&'a dyn Workload>,
    ) -> Result<Self, MemoryError> {
        let page = memory.shared_page(BOOT_INFO_OFFSET)?;
        let mut words = [0; BootInfo::WORDS];
        words.copy_from_slice(&page[..BootInfo::WORDS]);
        let info = BootInfo::from_words(&words);
        let layout = info.layout();
        let map = MemMap::new(&metadata.pages, &metadata.blocks, &layout);
        let config = AllocConfig {
            prezero: info.features & FEATURE_PREZERO != 0,
            flip: info.features & FEATURE_FLIP != 0,
        };
        let allocator = PageAllocator::new(machine, &layout, map, config);
        Ok(Self { info, workload, allocator, team: Team::new() })
    }

    /// What every CPU runs; the run ends here at last.
    pub(super) fn main(&self, machine: &'a SimMachine) -> ! {
        let number = cpu::number();
        if let Err(error) = self.allocator.prepare() {
            panic!("the mermap cannot be prepared: {error:?}");
        }
        machine.ready(number);
        let status = match self.run(machine) {
            // The run ends with CPU 0, or with the one that found out what is wrong.
            Ok(()) if number != 0 => wait(machine),
            Err(ProgramError::Abandoned) => wait(machine),
            Ok(()) => DONE,
            Err(error) => {
                machine.log(format_args!("{error}"));
                FAILED
            }
        };
        machine.exit(number, status, self.allocator.counters())
    }

    fn run(&self, machine: &'a SimMachine) -> Result<(), ProgramError> {
        if let Some(workload) = self.workload {
            return workload.run(machine, &self.allocator, &self.team);
        }
        let BootInfo { arg0, arg1, arg2, program, .. } = self.info;
        let lead = cpu::number() == 0;
        match Program::from_number(program) {
            Some(Program::Touch) if lead => match Touch::from_number(arg0) {
                Some(kind) => touch::run(&self.allocator, machine, kind),
                None => panic!("there is no touch with the number {arg0}"),
            },
            Some(Program::Crash) if lead => crash(machine, arg0),
            Some(Program::Touch | Program::Crash) => wait(machine),
            Some(program) => {
                let args = [arg0, arg1, arg2];
                return programs::run(program, args, &self.allocator, machine, machine, &self.team);
            }
            None => panic!("no program has the number {program}"),
        }
        Ok(())
    }
}

/// Serves interrupts until another CPU ends the run.
fn wait(machine: &SimMachine) -> ! {
    loop {
        machine.relax();
    }
}

/// Fails on purpose, in those ways that a simulated machine has ([`can_crash`]).
fn crash(machine: &SimMachine, kind: u64) {
    match Crash::from_number(kind) {
        Some(Crash::Panic) => panic!("asked to"),
        Some(Crash::PageFault) => {
            let hole = lacuna_abi::layout::window(7).wrapping_add(0x128);
            machine.load(hole);
        }
        Some(Crash::GeneralProtection) => {
            machine.load(lacuna_abi::addr::Gva(1 << 63));
        }
        Some(Crash::WriteText) => machine.store(lacuna_abi::layout::IMAGE, 0),
        // Nobody gets a word in: what a real CPU would have to be kicked out of.
        Some(Crash::Hang) => loop {
            std::hint::spin_loop();
        },
        Some(Crash::Halt) => wait(machine),
        Some(other) => panic!("a simulated CPU cannot fail by {}", other.name()),
        None => panic!("there is no way to fail with the number {kind}"),
    }
}

/// Whether a simulated machine can fail this way: it has no instructions, stacks or descriptor
/// tables of its own.
pub(super) const fn can_crash(kind: Crash) -> bool {
    matches!(
        kind,
        Crash::Panic
            | Crash::PageFault
            | Crash::GeneralProtection
            | Crash::WriteText
            | Crash::Hang
            | Crash::Halt
    )
}
