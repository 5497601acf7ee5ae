//! The program that fails on purpose, in every way that the VMM must report.
#![allow(unsafe_code)]

use crate::descriptors;
use crate::machine::Machine;
use crate::{cpu, gate, shared};
use core::arch::asm;
use core::hint::black_box;
use core::sync::atomic::AtomicBool;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use lacuna_abi::event::Flush;
use lacuna_abi::gate::{ARGS_WORD, COUNT_WORD, Call};
use lacuna_abi::layout::{MERMAP, WINDOW_STRIDE};
use lacuna_abi::workload::Crash;
use lacuna_guest::platform::{CpuSet, Platform};

/// CPU 1 has turned its interrupts off.
static STUCK: AtomicBool = AtomicBool::new(false);

/// Fails as `kind` says; returns only for those that are survived, and on the CPUs that have no
/// part in it. Not inlined, so that reports name it.
#[inline(never)]
pub(crate) fn run(machine: &Machine, kind: u64) {
    let Some(kind) = Crash::from_number(kind) else {
        panic!("there is no way to fail with the number {kind}");
    };
    let (cpu, last) = (cpu::number(), machine.cpus() - 1);
    match kind {
        Crash::StuckCpu if cpu == 1 => stuck(),
        Crash::StuckCpu if cpu == 0 => {
            wait(machine, || STUCK.load(Acquire));
            machine.shootdown(Flush::Everything, CpuSet::first(machine.cpus()));
        }
        Crash::PanicElsewhere if cpu == last => panic!("asked to, on CPU {cpu}"),
        Crash::PanicElsewhere => wait(machine, || false),
        _ if cpu == 0 => run_alone(kind),
        _ => {}
    }
}

/// Waits for another CPU.
fn wait(machine: &Machine, ready: impl Fn() -> bool) {
    while !ready() {
        machine.relax();
    }
}

/// Never answers an interrupt again. Not inlined, so that reports name it.
#[inline(never)]
fn stuck() {
    cpu::interrupts_off();
    STUCK.store(true, Release);
    loop {
        core::hint::spin_loop();
    }
}

/// The ways to fail that take one CPU.
#[inline(never)]
fn run_alone(kind: Crash) {
    match kind {
        Crash::Panic => panic!("asked to"),
        Crash::PageFault => read(MERMAP.0 + 7 * WINDOW_STRIDE + 0x123),
        Crash::GeneralProtection => read(0x8000_0000_0000_0000),
        // SAFETY: raises an exception, which ends the run.
        Crash::InvalidOpcode => unsafe { asm!("ud2") },
        Crash::StackOverflow => {
            black_box(recurse(u64::MAX));
        }
        Crash::TripleFault => triple_fault(),
        Crash::Hang => loop {
            core::hint::spin_loop();
        },
        Crash::Halt => cpu::stop(),
        Crash::WriteText => {
            // SAFETY: the text is mapped read-only and CR0.WP is set, so that this raises an
            // exception, which ends the run.
            unsafe { ((bad_calls as fn()) as usize as *mut u8).write_volatile(0) };
        }
        Crash::BadCalls => bad_calls(),
        Crash::StuckCpu | Crash::PanicElsewhere => {}
    }
}

fn read(va: u64) {
    // SAFETY: nothing is mapped there, so that this raises an exception, which ends the run. In
    // assembly, because a Rust pointer to nowhere would promise too much.
    unsafe { asm!("mov {0}, [{0}]", inout(reg) va => _, options(nostack, readonly)) };
}

/// Uses up the main stack, down to its guard page.
#[inline(never)]
fn recurse(depth: u64) -> u64 {
    let frame = black_box([depth; 32]);
    if depth == 0 { 0 } else { recurse(depth - 1).wrapping_add(frame[7]) }
}

/// An exception whose stack is not mapped, and the double fault's neither: with an IDT of no
/// entries nothing can be delivered.
fn triple_fault() {
    #[repr(C, packed)]
    struct Pointer(u16, u64);
    let none = Pointer(0, 0);
    descriptors::set_exception_stack(cpu::number(), 0x8000_0000_0000_0000);
    // SAFETY: the guest ends here, on purpose.
    unsafe { asm!("lidt [{}]", "ud2", in(reg) &raw const none) };
}

/// Gate calls that make no sense: each must be answered, none may end the run.
fn bad_calls() {
    let page = shared::call_page(cpu::number());
    for number in [0, 16, 99, u32::MAX] {
        cpu::gate(number);
    }
    let mut noise = 0x9e37_79b9_7f4a_7c15_u64;
    for round in 0..64_u64 {
        for word in 0..40 {
            noise ^= noise << 13;
            noise ^= noise >> 7;
            noise ^= noise << 17;
            page[ARGS_WORD + word].store(noise >> (noise % 60), Relaxed);
        }
        page[COUNT_WORD].store(round * 9, Relaxed);
        for call in [
            Call::Ops,
            Call::RegisterRoot,
            Call::UnregisterRoot,
            Call::Log,
            Call::StartCpus,
            Call::Interrupt,
            Call::Unanswered,
        ] {
            let _ = gate::call(call);
        }
    }
    page[COUNT_WORD].store(u64::MAX, Relaxed);
    let _ = gate::call(Call::Log);
    let _ = gate::call(Call::InputDone);
}
