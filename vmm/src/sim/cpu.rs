//! One simulated CPU: its MMU, its interrupt flag, and what comes from outside.

use super::mmu::Mmu;
use spin::{Mutex, MutexGuard};
use std::cell::Cell;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64};

/// An interrupt has been sent and not been taken.
const INTERRUPT: u8 = 1 << 0;
/// The CPU has to stand by.
const KICK: u8 = 1 << 1;

thread_local! {
    /// Number of the CPU whose code this thread runs: what GS is on a real one.
    static NUMBER: Cell<usize> = const { Cell::new(0) };
}

/// Number of the CPU whose code this thread runs.
#[inline]
pub(super) fn number() -> usize {
    NUMBER.get()
}

/// This thread runs the code of CPU `number` from now on.
pub(super) fn become_cpu(number: usize) {
    NUMBER.set(number);
}

/// What a CPU's calls to the host count.
#[derive(Debug, Default)]
pub(super) struct Calls {
    /// Calls made.
    pub(super) made: AtomicU64,
    /// Those that were refused.
    pub(super) refused: AtomicU64,
    /// Ticks of the machine's clock that they took.
    pub(super) ticks: AtomicU64,
}

/// A CPU. Its own cache lines: every CPU writes to its own all the time.
#[repr(align(128))]
pub(super) struct Cpu {
    /// A lock that spins, because nobody ever waits for it: it is let go by a plain store.
    mmu: Mutex<Mmu>,
    /// Calls of the platform until the next look at what is left to chance.
    until: AtomicU64,
    interrupts_off: AtomicBool,
    pending: AtomicU8,
    pub(super) calls: Calls,
}

impl Cpu {
    /// A CPU that has not started; its interrupts are off.
    pub(super) fn new(number: usize, seed: u64) -> Self {
        Self {
            mmu: Mutex::new(Mmu::new(number, seed)),
            until: AtomicU64::new(0),
            interrupts_off: AtomicBool::new(true),
            pending: AtomicU8::new(0),
            calls: Calls::default(),
        }
    }

    /// The MMU; nobody else asks for it while the CPU runs.
    #[inline]
    pub(super) fn mmu(&self) -> MutexGuard<'_, Mmu> {
        self.mmu.lock()
    }

    /// Counts a call; whether it is time to look at what is left to chance.
    #[inline]
    pub(super) fn is_due(&self) -> bool {
        let until = self.until.load(Relaxed);
        self.until.store(until.saturating_sub(1), Relaxed);
        until == 0
    }

    pub(super) fn look_again_after(&self, calls: u64) {
        self.until.store(calls, Relaxed);
    }

    /// Turns interrupts off; whether they were on. Only the CPU itself does this.
    #[inline]
    pub(super) fn interrupts_off(&self) -> bool {
        let were_on = self.interrupts_are_on();
        self.interrupts_off.store(true, Relaxed);
        were_on
    }

    #[inline]
    pub(super) fn interrupts_restore(&self, were_on: bool) {
        self.interrupts_off.store(!were_on, Relaxed);
    }

    #[inline]
    pub(super) fn interrupts_are_on(&self) -> bool {
        !self.interrupts_off.load(Relaxed)
    }

    /// Whether anything came from outside that was not attended to.
    #[inline]
    pub(super) fn is_wanted(&self) -> bool {
        self.pending.load(Acquire) != 0
    }

    /// Takes the interrupt, if one was sent and interrupts are on.
    pub(super) fn takes_interrupt(&self) -> bool {
        self.interrupts_are_on() && self.take(INTERRUPT)
    }

    /// Takes the kick, if there was one.
    pub(super) fn takes_kick(&self) -> bool {
        self.take(KICK)
    }

    /// Sends the interrupt.
    pub(super) fn interrupt(&self) {
        self.pending.fetch_or(INTERRUPT, AcqRel);
    }

    /// Has the CPU stand by at its next call of the platform.
    pub(super) fn kick(&self) {
        self.pending.fetch_or(KICK, AcqRel);
    }

    fn take(&self, what: u8) -> bool {
        self.pending.fetch_and(!what, AcqRel) & what != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interrupt_waits_until_interrupts_are_on_and_is_taken_once() {
        let cpu = Cpu::new(0, 0);
        cpu.interrupt();
        cpu.interrupt();
        assert!(cpu.is_wanted() && !cpu.takes_interrupt());
        cpu.interrupts_restore(true);
        assert!(cpu.takes_interrupt() && !cpu.takes_interrupt() && !cpu.is_wanted());
        assert!(cpu.interrupts_off() && !cpu.interrupts_off());
    }

    #[test]
    fn a_kick_does_not_wait() {
        let cpu = Cpu::new(0, 0);
        cpu.kick();
        assert!(cpu.takes_kick() && !cpu.takes_kick());
    }

    #[test]
    fn looks_are_as_far_apart_as_was_drawn() {
        let cpu = Cpu::new(0, 0);
        assert!(cpu.is_due());
        cpu.look_again_after(3);
        assert_eq!([0; 4].map(|_| cpu.is_due()), [false, false, false, true]);
    }
}
