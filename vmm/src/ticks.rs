//! A clock for times that are taken several times in each gate call, and only added up: the
//! processor's time-stamp counter, at half the price of the system's clock.
//!
//! It is used where the kernel itself keeps the time by it, which means that it runs at one pace and
//! shows the same on all processors; elsewhere the system's clock takes its place.

use crate::machine::sys::time_stamp;
use std::time::{Duration, Instant};

/// What the kernel keeps the time by.
const KERNEL_CLOCK: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
/// How often both clocks are read to have them read at the same moment: another thread may run in
/// between.
const TRIES: usize = 5;

/// A clock that started when this was made.
#[derive(Debug)]
pub struct Ticks {
    started: Instant,
    /// The time-stamp counter at that moment; `None` where it is not used.
    stamp: Option<u64>,
}

impl Default for Ticks {
    fn default() -> Self {
        Self::start()
    }
}

impl Ticks {
    /// A clock that starts now.
    #[must_use]
    pub fn start() -> Self {
        let kernel = std::fs::read_to_string(KERNEL_CLOCK);
        let steady = kernel.is_ok_and(|clock| clock.trim() == "tsc");
        Self::of(steady)
    }

    fn of(steady: bool) -> Self {
        let (started, stamp) = both();
        Self { started, stamp: steady.then_some(stamp) }
    }

    /// Ticks since the start.
    #[inline]
    #[must_use]
    pub fn now(&self) -> u64 {
        match self.stamp {
            Some(start) => time_stamp().saturating_sub(start),
            None => nanos(self.started.elapsed()),
        }
    }

    /// The time that so many ticks took, at the pace of the clock since its start.
    #[must_use]
    pub fn duration(&self, ticks: u64) -> Duration {
        let Some(start) = self.stamp else { return Duration::from_nanos(ticks) };
        let (now, stamp) = both();
        let (time, all) = (nanos(now - self.started), stamp.saturating_sub(start));
        let nanos = u128::from(ticks) * u128::from(time) / u128::from(all.max(1));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

/// Both clocks at one moment, as nearly as can be had.
fn both() -> (Instant, u64) {
    let read = || {
        let (before, stamp, after) = (Instant::now(), time_stamp(), Instant::now());
        (after - before, (before, stamp))
    };
    let (mut gap, mut best) = read();
    for (other, pair) in (1..TRIES).map(|_| read()) {
        if other < gap {
            (gap, best) = (other, pair);
        }
    }
    best
}

/// 2^64 nanoseconds are more than five hundred years.
fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread::sleep;

    /// Ticks that were counted within a time, and around another within that, are not longer than the
    /// one and not shorter than the other, however long this thread has to wait in between.
    fn check(clock: &Ticks) {
        let outer = Instant::now();
        let first = clock.now();
        let inner = Instant::now();
        sleep(Duration::from_millis(20));
        let inner = inner.elapsed();
        let last = clock.now();
        let outer = outer.elapsed();
        let counted = clock.duration(last - first);
        assert!(counted >= inner * 9 / 10 && counted <= outer * 11 / 10, "{counted:?}");
        assert_eq!(clock.duration(0), Duration::ZERO);
    }

    #[test]
    fn ticks_are_as_long_as_the_time_that_went_by() {
        check(&Ticks::start());
    }

    #[test]
    fn the_systems_clock_takes_the_place_of_a_counter_that_is_not_steady() {
        let clock = Ticks::of(false);
        check(&clock);
        assert_eq!(clock.duration(7), Duration::from_nanos(7));
    }
}
