//! A spinlock that is held with interrupts off.

use crate::platform::{InterruptsOff, Platform};
use core::ops::{Deref, DerefMut};
use spin::{Mutex, MutexGuard};

/// A value that interrupt handlers and other CPUs may want too.
pub(crate) struct IrqLock<T>(Mutex<T>);

impl<T> IrqLock<T> {
    /// Wraps `value`.
    pub(crate) const fn new(value: T) -> Self {
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
