//! Interrupts: the one that asks for shootdowns, how it is sent, and how a CPU waits.

use crate::{cpu, gate, ring, shared};
use core::sync::atomic::AtomicU32;
use core::sync::atomic::Ordering::Relaxed;
use lacuna_abi::MAX_CPUS;
use lacuna_abi::event::{Event, Flush};
use lacuna_abi::gate::{ARGS_WORD, Call, SHOOTDOWN_VECTOR};
use lacuna_guest::platform::CpuSet;
use lacuna_guest::shootdown::{Interrupts, Shootdowns};

/// Turns of waiting after which the host may give this CPU's time to others; a power of two. Where
/// ring 0 is interpreted they take about 0.3 ms, elsewhere a microsecond.
const TURNS: u32 = 8;

/// The shootdowns of this guest.
pub(crate) static SHOOTDOWNS: Shootdowns = Shootdowns::new();

/// Turns of waiting so far.
static WAITED: [AtomicU32; MAX_CPUS] = [const { AtomicU32::new(0) }; MAX_CPUS];

/// One turn of waiting for another CPU.
pub(crate) fn relax() {
    core::hint::spin_loop();
    let waited = &WAITED[cpu::number() % MAX_CPUS];
    let turns = waited.load(Relaxed).wrapping_add(1);
    waited.store(turns, Relaxed);
    if turns.is_multiple_of(TURNS) {
        cpu::gate_call(Call::Yield);
    }
}

/// Lets shootdowns reach this CPU, which takes part in them from here on.
pub(crate) fn enable() {
    cpu::enable_x2apic();
    SHOOTDOWNS.serve(&Wire::default());
    cpu::interrupts_on();
}

/// How interrupts leave this CPU.
#[derive(Clone, Copy, Default)]
pub(crate) struct Wire {
    /// Through the host, not through the CPU's own interrupt controller.
    pub(crate) through_gate: bool,
}

impl Interrupts for Wire {
    fn cpu(&self) -> usize {
        cpu::number()
    }

    fn interrupts_are_on(&self) -> bool {
        cpu::interrupts_are_on()
    }

    fn send(&self, cpus: CpuSet) {
        if self.through_gate {
            shared::call_page(cpu::number())[ARGS_WORD].store(cpus.0.into(), Relaxed);
            if let Err(error) = gate::call(Call::Interrupt) {
                panic!("the host refused to interrupt CPUs {:#b}: {error:?}", cpus.0);
            }
            return;
        }
        for cpu in (0..MAX_CPUS).filter(|cpu| cpus.contains(*cpu)) {
            // The VMM numbers the interrupt controllers like the CPUs.
            cpu::send_interrupt(cpu as u32, SHOOTDOWN_VECTOR);
        }
    }

    // Parts of the code that asks for a shootdown, or serves one, which the sites of records name.
    #[inline(always)]
    fn flush(&self, flush: Flush) {
        ring::flush(cpu::here(), flush);
    }

    #[inline(always)]
    fn acknowledge(&self, number: u64) {
        ring::record(cpu::here(), Event::ShootdownAck(number));
    }

    fn relax(&self) {
        relax();
    }

    fn unanswered(&self, number: u64, cpus: CpuSet) {
        let page = shared::call_page(cpu::number());
        page[ARGS_WORD].store(cpus.0.into(), Relaxed);
        page[ARGS_WORD + 1].store(number, Relaxed);
        // A host that refuses this only keeps no time.
        let _ = gate::call(Call::Unanswered);
    }
}

/// The handler of the shootdown interrupt, on the interrupt stack, with interrupts off.
pub(crate) extern "C" fn shootdown_interrupt() {
    SHOOTDOWNS.serve(&Wire::default());
    cpu::end_of_interrupt();
}
