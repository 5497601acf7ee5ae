//! The second stage as a simulated MMU looks at it: which frames are closed, and since when.
//!
//! What a CPU caches under the second stage are combined translations, and closing a frame drops
//! them on every CPU (SDM volume 3, "Invalidation of Guest-Physical and Combined Mappings"). No
//! cache is searched for that: every closing has a number, a translation remembers the last one
//! before it was made, and it is gone for a frame that was closed since.

use crate::gate::Observer;
use crate::machine::sys;
use lacuna_abi::addr::{FrameRange, Gfn};
use lacuna_abi::event::HostAct;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};

/// The frame is closed. The other bits are the number of its last closing.
const CLOSED: u64 = 1 << 63;

/// The frames of a zone. Only these can ever be closed.
#[derive(Debug)]
pub struct Frames {
    zone: FrameRange,
    states: Box<[AtomicU64]>,
    closings: AtomicU64,
    /// One bit a frame: the host calls it secret.
    secret: Box<[AtomicU64]>,
}

impl Frames {
    /// A zone that is open throughout.
    #[must_use]
    pub fn new(zone: FrameRange) -> Self {
        let count = usize::try_from(zone.count()).unwrap_or(0);
        let (states, secret) = (sys::zeroed(count), sys::zeroed(count.div_ceil(64)));
        Self { zone, states, closings: AtomicU64::new(0), secret }
    }

    /// What a translation that is made from now on remembers. To be asked before the tables are
    /// read.
    #[inline]
    #[must_use]
    pub fn stamp(&self) -> u64 {
        self.closings.load(Acquire)
    }

    /// Whether a translation with this stamp is still there for `frame`: it is open, and was not
    /// closed since.
    #[inline]
    #[must_use]
    pub fn keeps(&self, frame: Gfn, stamp: u64) -> bool {
        self.state(frame).is_none_or(|state| state.load(Acquire) <= stamp)
    }

    /// Whether the frame is closed.
    #[inline]
    #[must_use]
    pub fn is_closed(&self, frame: Gfn) -> bool {
        self.state(frame).is_some_and(|state| state.load(Acquire) & CLOSED != 0)
    }

    /// Closes or opens these frames of the zone. One caller at a time: whoever has the gate.
    pub fn set(&self, frames: FrameRange, closed: bool) {
        let closing = if closed { self.closings.fetch_add(1, AcqRel) + 1 } else { 0 };
        for state in frames.iter().filter_map(|frame| self.state(frame)) {
            if closed {
                state.store(closing | CLOSED, Release);
            } else {
                state.store(state.load(Relaxed) & !CLOSED, Release);
            }
        }
    }

    /// Whether the host calls the frame secret.
    #[must_use]
    pub fn is_secret(&self, frame: Gfn) -> bool {
        self.secret_bit(frame).is_some_and(|(word, bit)| word.load(Relaxed) & bit != 0)
    }

    /// Notes whether the host calls these frames secret.
    pub(super) fn set_secret(&self, frames: FrameRange, secret: bool) {
        let Some(inside) = frames.intersection(self.zone) else { return };
        let (mut next, end) = (inside.start().0, inside.end().0);
        while next < end
            && let Some((word, bit)) = self.secret_bit(Gfn(next))
        {
            // As many as there are in this word.
            let count = (64 - u64::from(bit.trailing_zeros())).min(end - next);
            let bits = (u64::MAX >> (64 - count)) << bit.trailing_zeros();
            if secret {
                word.fetch_or(bits, Relaxed);
            } else {
                word.fetch_and(!bits, Relaxed);
            }
            next += count;
        }
    }

    #[inline]
    fn state(&self, frame: Gfn) -> Option<&AtomicU64> {
        let index = frame.0.checked_sub(self.zone.start().0)?;
        self.states.get(usize::try_from(index).ok()?)
    }

    fn secret_bit(&self, frame: Gfn) -> Option<(&AtomicU64, u64)> {
        let index = frame.0.checked_sub(self.zone.start().0)?;
        let word = self.secret.get(usize::try_from(index / 64).ok()?)?;
        Some((word, 1 << (index % 64)))
    }
}

/// Follows a run to know which frames are secret, with the seal off too. It must know before the guest
/// goes on: a frame that was released may be mapped, and unmapped again, before its record is taken.
pub(crate) struct Secrecy(pub(crate) Arc<Frames>);

impl Observer for Secrecy {
    fn operation(&mut self, act: HostAct, frames: FrameRange) {
        let secret = match act {
            HostAct::Sealed | HostAct::HeldOpen => true,
            HostAct::Released => false,
            HostAct::Opened | HostAct::Quiesced | HostAct::Refused | HostAct::WriteRefused => {
                return;
            }
        };
        self.0.set_secret(frames, secret);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, count: u64) -> FrameRange {
        FrameRange::new(Gfn(start), count).unwrap()
    }

    #[test]
    fn closing_ends_older_translations_for_good_and_newer_ones_until_it_opens() {
        let frames = Frames::new(range(512, 512));
        let old = frames.stamp();
        assert!(frames.keeps(Gfn(600), old) && !frames.is_closed(Gfn(600)));
        frames.set(range(600, 2), true);
        assert!(frames.is_closed(Gfn(601)) && !frames.keeps(Gfn(601), frames.stamp()));
        frames.set(range(600, 1), false);
        assert!(!frames.is_closed(Gfn(600)) && frames.is_closed(Gfn(601)));
        assert!(!frames.keeps(Gfn(600), old), "opening brings no translation back");
        assert!(frames.keeps(Gfn(600), frames.stamp()));
        assert!(frames.keeps(Gfn(602), old), "another frame's translation stays");
    }

    #[test]
    fn what_lies_outside_the_zone_is_never_closed() {
        let frames = Frames::new(range(512, 512));
        frames.set(range(500, 600), true);
        assert!(!frames.is_closed(Gfn(511)) && !frames.is_closed(Gfn(1024)));
        assert!(frames.is_closed(Gfn(512)) && frames.is_closed(Gfn(1023)));
        assert!(frames.keeps(Gfn(1), 0));
    }

    #[test]
    fn secrecy_is_what_the_host_says() {
        let frames = Arc::new(Frames::new(range(512, 512)));
        let mut follower = Secrecy(Arc::clone(&frames));
        let mut tell = |act| {
            follower.operation(act, range(570, 8));
            frames.is_secret(Gfn(577))
        };
        assert!(!tell(HostAct::Refused));
        assert!(tell(HostAct::HeldOpen));
        assert!(tell(HostAct::Opened));
        assert!(!tell(HostAct::Released));
        assert!(tell(HostAct::Sealed));
        assert!(!frames.is_secret(Gfn(569)) && !frames.is_secret(Gfn(578)));
    }
}
