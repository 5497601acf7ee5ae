//! The guest image: boots straight into 64-bit mode, builds the allocator, runs one program.
//!
//! Unsafe code is confined to `entry` (the first instructions and the exception stubs), `cpu`
//! (privileged instructions), `descriptors` (GDT, IDT, TSS), `memory` (guest memory by address),
//! `shared` (references to the regions that the VMM laid out), and the two programs that misbehave
//! on purpose, `crash` and `touch`.
#![no_std]
#![no_main]

mod cpu;
mod crash;
mod descriptors;
mod entry;
mod gate;
mod machine;
mod memory;
mod report;
mod ring;
mod shared;
mod touch;

use lacuna_abi::boot::{BootInfo, FEATURE_FLIP, FEATURE_PREZERO};
use lacuna_abi::gate::Call;
use lacuna_abi::workload::Program;
use lacuna_guest::alloc::{AllocConfig, PageAllocator};
use lacuna_guest::meta::MemMap;
use lacuna_guest::programs::{ProgramError, Services, replay, secrets};

use crate::machine::Machine;

/// The program ended as it should.
const DONE: u64 = 0;
/// The program found something wrong.
const FAILED: u64 = 1;

/// The image's main function, on the CPU's main stack.
fn main(cpu: usize) -> ! {
    descriptors::load(cpu);
    let info = shared::boot_info();
    if let Err(bad) = info.check() {
        panic!("the boot information does not fit this image: {bad:?}");
    }
    let layout = info.layout();
    let machine = Machine::new(&info);
    let map = MemMap::new(shared::page_metadata(&layout), shared::block_metadata(&layout), &layout);
    let config = AllocConfig {
        prezero: info.features & FEATURE_PREZERO != 0,
        flip: info.features & FEATURE_FLIP != 0,
    };
    let allocator = PageAllocator::new(&machine, &layout, map, config);
    allocator.add_tables(info.pool_used);
    if let Err(error) = allocator.prepare() {
        panic!("the mermap cannot be prepared: {error:?}");
    }
    gate::ready(&descriptors::registration(cpu));
    let status = match run(&info, &machine, &allocator) {
        Ok(()) => DONE,
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

fn run(
    info: &BootInfo,
    machine: &Machine,
    allocator: &PageAllocator<'_, Machine>,
) -> Result<(), ProgramError> {
    match Program::from_number(info.program) {
        Some(Program::Idle) => Ok(()),
        Some(Program::Replay) => replay::run(allocator, machine, machine, info.arg0, info.arg1),
        Some(Program::Secrets) => secrets::run(allocator, machine, machine, info.arg0),
        Some(Program::Touch) => {
            touch::run(allocator, machine, info.arg0);
            Ok(())
        }
        Some(Program::Crash) => {
            crash::run(info.arg0);
            Ok(())
        }
        None => panic!("no program has the number {}", info.program),
    }
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
