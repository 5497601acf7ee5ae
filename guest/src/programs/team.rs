//! The CPUs of a program: they meet at barriers, and when one gives up, none waits for it.

use super::ProgramError;
use crate::platform::Platform;
use core::sync::atomic::AtomicBool;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{AcqRel, Acquire, Release};

/// What all CPUs of a program share. All waiting is done with interrupts as they are, so that a
/// CPU that waits with interrupts on takes part in shootdowns.
#[derive(Debug, Default)]
pub struct Team {
    /// Arrivals at barriers, counted on from one barrier to the next.
    arrived: AtomicU64,
    /// CPU 0 has come to the program's end.
    done: AtomicBool,
    /// Some CPU will not arrive any more.
    given_up: AtomicBool,
}

impl Team {
    /// A team whose program has not started.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            arrived: AtomicU64::new(0),
            done: AtomicBool::new(false),
            given_up: AtomicBool::new(false),
        }
    }

    /// Nobody waits for this CPU any more: all waiting ends with [`ProgramError::Abandoned`].
    pub fn give_up(&self) {
        self.given_up.store(true, Release);
    }

    /// Waits until `ready` says so.
    ///
    /// # Errors
    /// [`ProgramError::Abandoned`] once some CPU has given up.
    pub(crate) fn wait_until<P: Platform>(
        &self,
        platform: &P,
        ready: impl Fn() -> bool,
    ) -> Result<(), ProgramError> {
        self.wait_by(|| platform.relax(), ready)
    }

    /// The same, with turns of the caller's own.
    ///
    /// # Errors
    /// [`ProgramError::Abandoned`] once some CPU has given up.
    pub(crate) fn wait_by(
        &self,
        turn: impl Fn(),
        ready: impl Fn() -> bool,
    ) -> Result<(), ProgramError> {
        while !ready() {
            if self.given_up.load(Acquire) {
                return Err(ProgramError::Abandoned);
            }
            turn();
        }
        Ok(())
    }

    /// Waits until every CPU has come here.
    ///
    /// # Errors
    /// [`ProgramError::Abandoned`] once some CPU has given up.
    pub fn barrier<P: Platform>(&self, platform: &P) -> Result<(), ProgramError> {
        let cpus = platform.cpus() as u64;
        let before = self.arrived.fetch_add(1, AcqRel);
        // Nobody arrives at the next barrier before all have arrived at this one.
        let all = (before / cpus + 1) * cpus;
        self.wait_until(platform, || self.arrived.load(Acquire) >= all)
    }

    /// The end of a program on this CPU. All CPUs but 0 wait here for CPU 0, taking part in its
    /// shootdowns meanwhile.
    ///
    /// # Errors
    /// What this CPU's part ended with, or [`ProgramError::Abandoned`].
    pub(super) fn leave<P: Platform>(
        &self,
        platform: &P,
        ended: Result<(), ProgramError>,
    ) -> Result<(), ProgramError> {
        if ended.is_err() {
            self.give_up();
            return ended;
        }
        if platform.cpu() == 0 {
            self.done.store(true, Release);
            return Ok(());
        }
        self.wait_until(platform, || self.done.load(Acquire))
    }
}
