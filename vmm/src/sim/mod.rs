//! The simulated machine: the guest's own allocator and programs in an ordinary process, without
//! KVM, on CPUs whose MMUs are deliberately lazy.
//!
//! Guest memory, first tables, gate, rings, audit and reports are those of KVM runs. What is
//! simulated is below [`lacuna_guest::platform::Platform`]:
//!
//! | file | holds |
//! | --- | --- |
//! | `random` | what is left to chance, from a seed |
//! | `tlb`, `paths` | what a CPU caches of leaf and of upper entries, and what removes it |
//! | `versions` | whether a cached translation can be stale |
//! | `frames` | the second stage as MMUs see it |
//! | `ram` | guest memory by physical address |
//! | `mmu` | translation, speculation |
//! | `probe` | touches frames on purpose |
//! | `attempts` | what the program `probe` needs: accesses that may fault, all invalidations |
//! | `baton`, `schedule` | which CPUs run |
//! | `cpu`, `machine` | a CPU, and all of them as one machine |
//! | `platform`, `calls` | what the guest asks of a CPU, and what it tells the host |
//! | `guest`, `touch`, `crash` | the guest image's main function, and its programs that misbehave |
//! | `run` | threads, from start to end |
//!
//! A guest that loops without ever calling the platform cannot be stopped, because its code runs
//! natively; [`crate::run::Running::wait`] gives it up.
#![forbid(unsafe_code)]

mod attempts;
mod baton;
mod calls;
mod cpu;
mod crash;
mod frames;
mod guest;
mod machine;
mod mmu;
mod paths;
mod platform;
mod probe;
mod ram;
mod random;
mod run;
mod schedule;
#[cfg(test)]
mod tests;
mod tlb;
mod touch;
mod versions;
mod watch;

pub use frames::Frames;
pub(crate) use frames::Secrecy;
pub use guest::Workload;
pub use machine::SimMachine;
pub use mmu::{Fault, Mmu, MmuCounters};
pub use paths::{Path, Paths};
pub use ram::Ram;
pub use random::Random;
pub use run::{Prepared, Simulated, Statistics};
pub use schedule::Schedule;
pub use tlb::{Invalidation, Tlb, Translation};
pub use versions::Versions;

use lacuna_abi::workload::{Crash, Touch};

/// Whether a simulated CPU can touch a sealed frame this way: it executes no instructions of the
/// guest.
#[must_use]
pub const fn can_touch(kind: Touch) -> bool {
    touch::can_touch(kind)
}

/// Whether a simulated machine can fail this way: it has no instructions, stacks or descriptor
/// tables of its own.
#[must_use]
pub const fn can_crash(kind: Crash) -> bool {
    crash::can_crash(kind)
}
