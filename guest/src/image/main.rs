//! The guest image: boots straight into 64-bit mode, builds the allocator, starts the other CPUs,
//! runs one program.
//!
//! Unsafe code is confined to `entry` (the first instructions and the stubs), `cpu` (privileged
//! instructions), `attempt` (accesses that may fault), `descriptors` (GDT, IDT, TSS), `memory` (guest memory by address),
//! `shared` (references to the regions that the VMM laid out), and the two programs that misbehave
//! on purpose, `crash` and `touch`.
#![no_std]
#![no_main]

mod attempt;
mod cpu;
mod crash;
mod descriptors;
mod entry;
mod flush;
mod gate;
mod interrupts;
mod machine;
mod memory;
mod report;
mod ring;
mod shared;
mod touch;

use lacuna_abi::boot::BootInfo;
use lacuna_abi::gate::Call;
use lacuna_abi::workload::{Program, Scenario};
use lacuna_guest::alloc::{AllocConfig, PageAllocator};
use lacuna_guest::meta::MemMap;
use lacuna_guest::platform::CpuSet;
use lacuna_guest::programs::staleness::{self, Relay};
use lacuna_guest::programs::{self, ProgramError, Services, Team};
use spin::Once;

use crate::interrupts::SHOOTDOWNS;
use crate::machine::Machine;

/// The program ended as it should.
const DONE: u64 = 0;
/// The program found something wrong.
const FAILED: u64 = 1;

/// The CPUs of the program.
static TEAM: Team = Team::new();
/// How two of them take turns in the program `probe`.
static RELAY: Relay = Relay::new();

/// The machine and the allocator that all CPUs share; CPU 0 makes them before it starts the others.
static MACHINE: Once<Machine> = Once::new();
static ALLOCATOR: Once<PageAllocator<'static, Machine>> = Once::new();

/// The image's main function, on the CPU's main stack.
fn main(cpu: usize) -> ! {
    descriptors::load(cpu);
    let info = shared::boot_info();
    if cpu == 0 {
        prepare(&info);
    }
    let (Some(machine), Some(allocator)) = (MACHINE.get(), ALLOCATOR.get()) else {
        panic!("CPU {cpu} was started before CPU 0 had set up the allocator");
    };
    interrupts::enable();
    let registration = descriptors::registration(cpu);
    if cpu != 0 {
        gate::ready(&registration);
    }
    // Every CPU is there before CPU 0 says so, and before the first shootdown.
    let mut ended = TEAM.barrier(machine);
    if ended.is_ok() {
        if cpu == 0 {
            gate::ready(&registration);
        }
        ended = run(&info, machine, allocator);
    }
    let status = match ended {
        Ok(()) if cpu != 0 => cpu::idle(),
        Ok(()) => DONE,
        // The other CPU ends the run.
        Err(ProgramError::Abandoned) => cpu::idle(),
        Err(error) => {
            machine.log(format_args!("{error}"));
            FAILED
        }
    };
    let mut counters = allocator.counters();
    machine.add_counters(&mut counters);
    gate::exit(status, &counters);
    cpu::stop()
}

/// Sets up what all CPUs share and starts the others.
fn prepare(info: &BootInfo) {
    if let Err(bad) = info.check() {
        panic!("the boot information does not fit this image: {bad:?}");
    }
    let layout = info.layout();
    let machine = MACHINE.call_once(|| Machine::new(info));
    let map = MemMap::new(shared::page_metadata(&layout), shared::block_metadata(&layout), &layout);
    let config = AllocConfig::from_boot(info);
    let allocator = ALLOCATOR.call_once(|| PageAllocator::new(machine, &layout, map, config));
    allocator.add_tables(info.pool_used);
    if let Err(error) = allocator.prepare() {
        panic!("the mermap cannot be prepared: {error:?}");
    }
    if layout.cpus > 1 {
        SHOOTDOWNS.bring_online(CpuSet::first(layout.cpus));
        if let Err(error) = gate::call(Call::StartCpus) {
            panic!("the host refused to start the other CPUs: {error:?}");
        }
    }
}

/// This CPU's part of the program.
fn run(
    info: &BootInfo,
    machine: &Machine,
    allocator: &PageAllocator<'_, Machine>,
) -> Result<(), ProgramError> {
    let args = [info.arg0, info.arg1, info.arg2];
    match Program::from_number(info.program) {
        Some(
            program @ (Program::Idle
            | Program::Replay
            | Program::Secrets
            | Program::Stress
            | Program::Bench
            | Program::Selftest),
        ) => {
            return programs::run(program, args, allocator, machine, machine, &TEAM);
        }
        Some(Program::Touch) if cpu::number() == 0 => touch::run(allocator, machine, info.arg0),
        Some(Program::Touch) => {}
        Some(Program::Crash) => crash::run(machine, info.arg0),
        Some(Program::Flush) if cpu::number() == 0 => flush::run(allocator, machine, args),
        Some(Program::Flush) => {}
        Some(Program::Probe) => match Scenario::from_number(info.arg0) {
            Some(scenario) => {
                let job = (scenario, info.arg1);
                return staleness::run(job, allocator, machine, machine, &TEAM, &RELAY);
            }
            None => panic!("there is no scenario with the number {}", info.arg0),
        },
        None => panic!("no program has the number {}", info.program),
    }
    Ok(())
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    report::panic(format_args!("{info}"));
    // The VMM does not come back from a panic; a hostile one that does finds the CPU stopped.
    cpu::stop()
}

/// Announces nothing and returns nothing: the call exists for its place in the order of events.
pub(crate) fn checkpoint() {
    let _ = gate::call(Call::Checkpoint);
}
