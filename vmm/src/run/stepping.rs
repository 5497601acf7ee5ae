//! Whether vCPUs are stepped just now, and their interrupts meanwhile.

use crate::machine::step::Inbox;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Acquire, Release};

/// What the threads of all vCPUs share of that.
pub(super) struct Stepping {
    on: AtomicBool,
    pub(super) inbox: Inbox,
}

impl Stepping {
    /// Of so many vCPUs, stepped from the start or not.
    pub(super) fn new(cpus: usize, on: bool) -> Self {
        Self { on: AtomicBool::new(on), inbox: Inbox::new(cpus) }
    }

    /// Whether vCPUs are to be stepped when they enter the guest.
    pub(super) fn is_on(&self) -> bool {
        self.on.load(Acquire)
    }

    /// From here on they are, or are not. All stand still.
    pub(super) fn set(&self, on: bool) {
        self.on.store(on, Release);
    }
}
