//! One simulated CPU: its MMU, its interrupt flag, and what other CPUs ask of it.

use super::mmu::Mmu;
use lacuna_abi::event::Flush;
use std::cell::Cell;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::sync::{Mutex, MutexGuard, PoisonError};

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

/// A flush that another CPU asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Request {
    /// What to flush.
    pub(super) flush: Flush,
    /// Number of the shootdown.
    pub(super) number: u64,
    /// The CPU that waits.
    pub(super) from: usize,
}

/// A CPU. Its own cache lines: every CPU writes to its own all the time.
#[repr(align(128))]
pub(super) struct Cpu {
    mmu: Mutex<Mmu>,
    /// Calls until the next look at what is left to chance.
    until: AtomicU64,
    interrupts_off: AtomicBool,
    /// An interrupt has been sent and not been taken.
    interrupt: AtomicBool,
    requests: Mutex<Vec<Request>>,
    /// CPUs that have not acknowledged this CPU's shootdown yet.
    unanswered: AtomicUsize,
    /// Gate calls made, those that were refused, and the nanoseconds that they took.
    pub(super) calls: AtomicU64,
    pub(super) refused: AtomicU64,
    pub(super) in_gate: AtomicU64,
}

impl Cpu {
    pub(super) fn new(number: usize, seed: u64) -> Self {
        Self {
            mmu: Mutex::new(Mmu::new(number, seed)),
            until: AtomicU64::new(0),
            interrupts_off: AtomicBool::new(false),
            interrupt: AtomicBool::new(false),
            requests: Mutex::new(Vec::new()),
            unanswered: AtomicUsize::new(0),
            calls: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            in_gate: AtomicU64::new(0),
        }
    }

    /// The MMU; nobody else asks for it while the CPU runs.
    #[inline]
    pub(super) fn mmu(&self) -> MutexGuard<'_, Mmu> {
        self.mmu.lock().unwrap_or_else(PoisonError::into_inner)
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

    /// Whether an interrupt has been sent and can be taken.
    #[inline]
    pub(super) fn takes_interrupt(&self) -> bool {
        self.interrupt.load(Acquire) && self.interrupts_are_on()
    }

    /// Asks the CPU for a flush, and interrupts it.
    pub(super) fn ask(&self, request: Request) {
        self.requests().push(request);
        self.interrupt.store(true, Release);
    }

    /// What is asked of the CPU since the last call.
    pub(super) fn take_requests(&self) -> Vec<Request> {
        self.interrupt.store(false, Release);
        std::mem::take(&mut *self.requests())
    }

    pub(super) fn await_acknowledgements(&self, count: usize) {
        self.unanswered.store(count, Release);
    }

    pub(super) fn acknowledged(&self) {
        self.unanswered.fetch_sub(1, AcqRel);
    }

    pub(super) fn is_unanswered(&self) -> bool {
        self.unanswered.load(Acquire) != 0
    }

    fn requests(&self) -> MutexGuard<'_, Vec<Request>> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
