//! Why a machine is told to stop, where everybody who works for it can see it.

use std::sync::atomic::{AtomicU8, Ordering};

/// Told from outside to stop.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Stopped {
    /// Its time was up.
    Timeout = 1,
    /// Somebody cancelled it.
    Cancelled = 2,
}

/// Set once, seen by all: the first reason stays.
#[derive(Debug, Default)]
pub struct Stop(AtomicU8);

impl Stop {
    /// Tells the machine to stop.
    pub fn tell(&self, why: Stopped) {
        let _ = self.0.compare_exchange(0, why as u8, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Why the machine was told to stop, if it was.
    #[must_use]
    pub fn told(&self) -> Option<Stopped> {
        match self.0.load(Ordering::Acquire) {
            0 => None,
            1 => Some(Stopped::Timeout),
            _ => Some(Stopped::Cancelled),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_stays() {
        let stop = Stop::default();
        assert_eq!(stop.told(), None);
        stop.tell(Stopped::Cancelled);
        stop.tell(Stopped::Timeout);
        assert_eq!(stop.told(), Some(Stopped::Cancelled));
    }
}
