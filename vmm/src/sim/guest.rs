//! The guest of a simulated machine: what the guest image's main function does, on simulated CPUs.

use super::crash::wait;
use super::machine::SimMachine;
use super::{cpu, crash, touch};
use crate::machine::memory::{Memory, MemoryError};
use crate::machine::sys;
use lacuna_abi::boot::BootInfo;
use lacuna_abi::layout::BOOT_INFO_OFFSET;
use lacuna_abi::workload::{Crash, Program, Scenario, Touch};
use lacuna_guest::alloc::{AllocConfig, PageAllocator};
use lacuna_guest::meta::{BlockMeta, MemMap, PageMeta};
use lacuna_guest::platform::Platform;
use lacuna_guest::programs::staleness::{self, Relay};
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
    relay: Relay,
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

/// The boot information, as the guest finds it.
///
/// # Errors
/// [`MemoryError::Access`] if it cannot be read: a fault of the layout.
pub(super) fn boot_info(memory: &Memory) -> Result<BootInfo, MemoryError> {
    let at = memory.layout().shared.gpa.wrapping_add(BOOT_INFO_OFFSET);
    Ok(BootInfo::from_words(&memory.load_words(at)?))
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
        let info = boot_info(memory)?;
        let layout = info.layout();
        let map = MemMap::new(&metadata.pages, &metadata.blocks, &layout);
        let allocator = PageAllocator::new(machine, &layout, map, AllocConfig::from_boot(&info));
        Ok(Self { info, workload, allocator, team: Team::new(), relay: Relay::new() })
    }

    /// What every CPU runs; the run ends here at last.
    pub(super) fn main(&self, machine: &'a SimMachine) -> ! {
        let number = cpu::number();
        if number == 0 {
            self.prepare(machine);
        }
        machine.enable_interrupts(number);
        if number != 0 {
            machine.ready(number);
        }
        // Every CPU is there before CPU 0 says so, and before the first shootdown.
        let mut ended = self.team.barrier(machine);
        if ended.is_ok() {
            if number == 0 {
                machine.ready(number);
            }
            ended = self.run(machine);
        }
        let status = match ended {
            Ok(()) if number != 0 => wait(machine),
            Ok(()) => DONE,
            // The other CPU ends the run.
            Err(ProgramError::Abandoned) => wait(machine),
            Err(error) => {
                self.team.give_up();
                machine.log(format_args!("{error}"));
                FAILED
            }
        };
        machine.exit(number, status, self.allocator.counters())
    }

    /// Sets up what all CPUs share and starts the others.
    fn prepare(&self, machine: &SimMachine) {
        if let Err(bad) = self.info.check() {
            panic!("the boot information does not fit this guest: {bad:?}");
        }
        self.allocator.add_tables(self.info.pool_used);
        if let Err(error) = self.allocator.prepare() {
            panic!("the mermap cannot be prepared: {error:?}");
        }
        if machine.cpus() > 1 {
            machine.bring_online();
            machine.start_cpus();
        }
    }

    /// This CPU's part of the program.
    fn run(&self, machine: &'a SimMachine) -> Result<(), ProgramError> {
        if let Some(workload) = self.workload {
            return workload.run(machine, &self.allocator, &self.team);
        }
        let BootInfo { arg0, arg1, arg2, program, .. } = self.info;
        let args = [arg0, arg1, arg2];
        match Program::from_number(program) {
            Some(Program::Touch) if cpu::number() != 0 => {}
            Some(Program::Touch) => match Touch::from_number(arg0) {
                Some(kind) => touch::run(&self.allocator, machine, kind),
                None => panic!("there is no touch with the number {arg0}"),
            },
            Some(Program::Crash) => match Crash::from_number(arg0) {
                Some(kind) => crash::run(machine, kind),
                None => panic!("there is no way to fail with the number {arg0}"),
            },
            Some(Program::Probe) => match Scenario::from_number(arg0) {
                Some(scenario) => {
                    let (allocator, team, relay) = (&self.allocator, &self.team, &self.relay);
                    let job = (scenario, arg1);
                    return staleness::run(job, allocator, machine, machine, team, relay);
                }
                None => panic!("there is no scenario with the number {arg0}"),
            },
            Some(program) => {
                let (allocator, team) = (&self.allocator, &self.team);
                return programs::run(program, args, allocator, machine, machine, team);
            }
            None => panic!("no program has the number {program}"),
        }
        Ok(())
    }
}
