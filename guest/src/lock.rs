//! Spinlocks that are held with interrupts off.

use crate::platform::{InterruptsOff, Platform};
use crate::sync::{AtomicBool, Mutex, MutexGuard};
use core::ops::{Deref, DerefMut};
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

/// A value that interrupt handlers and other CPUs may want too.
pub(crate) struct IrqLock<T>(Mutex<T>);

impl<T> IrqLock<T> {
    /// Wraps `value`.
    pub(crate) fn new(value: T) -> Self {
        Self(Mutex::new(value))
    }

    /// Turns interrupts off, then waits for the lock: an interrupt that wants it on this CPU
    /// cannot find it held.
    #[inline]
    pub(crate) fn lock<'l, P: Platform>(&'l self, platform: &'l P) -> IrqGuard<'l, T, P> {
        let off = InterruptsOff::new(platform);
        loop {
            if let Some(value) = self.0.try_lock() {
                return IrqGuard { value, _off: off };
            }
            platform.relax();
        }
    }
}

/// The lock is held while this lives.
#[must_use = "the lock is free again when this is dropped"]
pub(crate) struct IrqGuard<'l, T, P: Platform> {
    // Dropped in this order: interrupts come back when the lock is free.
    value: MutexGuard<'l, T>,
    _off: InterruptsOff<'l, P>,
}

impl<T, P: Platform> Deref for IrqGuard<'_, T, P> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T, P: Platform> DerefMut for IrqGuard<'_, T, P> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.value
    }
}

/// A lock with nothing in it, for values that are atomics and so can lie in shared memory.
#[derive(Debug, Default)]
pub(crate) struct RawLock(AtomicBool);

impl RawLock {
    /// Waits for the lock, with interrupts off.
    #[inline]
    pub(crate) fn lock<'l, P: Platform>(
        &'l self,
        platform: &P,
        off: InterruptsOff<'l, P>,
    ) -> RawGuard<'l, P> {
        while self.0.compare_exchange(false, true, Acquire, Relaxed).is_err() {
            platform.relax();
        }
        RawGuard { lock: self, _off: off }
    }
}

/// The lock is held while this lives.
#[must_use = "the lock is free again when this is dropped"]
pub(crate) struct RawGuard<'l, P: Platform> {
    lock: &'l RawLock,
    // Dropped after the lock is free.
    _off: InterruptsOff<'l, P>,
}

impl<P: Platform> Drop for RawGuard<'_, P> {
    fn drop(&mut self) {
        self.lock.0.store(false, Release);
    }
}
