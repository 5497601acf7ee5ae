//! Where the atomics and the mutex of shared structures come from: the machine's own, or, in the
//! models of `models`, those of a checker that tries every order (`--cfg loom`).
//!
//! Counters and flags that mean something by themselves take `core`'s: no model is about them.

#[cfg(loom)]
pub(crate) mod checked;

#[cfg(loom)]
pub(crate) use checked::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Mutex, MutexGuard};
#[cfg(not(loom))]
pub(crate) use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64};
#[cfg(not(loom))]
pub(crate) use spin::{Mutex, MutexGuard};
