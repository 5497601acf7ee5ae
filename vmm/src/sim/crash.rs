//! The program that fails on purpose, as far as a simulated machine can.

use super::cpu;
use super::machine::SimMachine;
use lacuna_abi::addr::Gva;
use lacuna_abi::event::Flush;
use lacuna_abi::layout::{IMAGE, window};
use lacuna_abi::workload::Crash;
use lacuna_guest::platform::{CpuSet, Platform};
use std::hint::spin_loop;
use std::sync::atomic::Ordering::{Acquire, Release};

/// Whether a simulated machine can fail this way: it has no instructions, stacks or descriptor
/// tables of its own.
pub(super) const fn can_crash(kind: Crash) -> bool {
    match kind {
        Crash::Panic
        | Crash::PageFault
        | Crash::GeneralProtection
        | Crash::WriteText
        | Crash::Hang
        | Crash::Halt
        | Crash::StuckCpu
        | Crash::PanicElsewhere => true,
        Crash::InvalidOpcode | Crash::StackOverflow | Crash::TripleFault | Crash::BadCalls => false,
    }
}

/// Fails as `kind` says; returns on the CPUs that have no part in it.
pub(super) fn run(machine: &SimMachine, kind: Crash) {
    let (number, last) = (cpu::number(), machine.cpus() - 1);
    match kind {
        Crash::StuckCpu if number == 1 => {
            machine.interrupts_off();
            machine.stuck.store(true, Release);
            wait(machine);
        }
        Crash::StuckCpu if number == 0 => {
            while !machine.stuck.load(Acquire) {
                machine.relax();
            }
            machine.shootdown(Flush::Everything, CpuSet::first(machine.cpus()));
        }
        Crash::PanicElsewhere if number == last => panic!("asked to, on CPU {number}"),
        Crash::PanicElsewhere => wait(machine),
        _ if number == 0 => run_alone(machine, kind),
        _ => {}
    }
}

/// Waits, as long as the run lasts.
pub(super) fn wait(machine: &SimMachine) -> ! {
    loop {
        machine.relax();
    }
}

/// The ways to fail that take one CPU.
fn run_alone(machine: &SimMachine, kind: Crash) {
    match kind {
        Crash::Panic => panic!("asked to"),
        Crash::PageFault => _ = machine.load(window(7).wrapping_add(0x128)),
        Crash::GeneralProtection => _ = machine.load(Gva(1 << 63)),
        Crash::WriteText => machine.store(IMAGE, 0),
        // Nobody gets a word in: what a real CPU would have to be kicked out of.
        Crash::Hang => loop {
            spin_loop();
        },
        Crash::Halt => wait(machine),
        other => panic!("a simulated CPU cannot fail by {}", other.name()),
    }
}
