//! How long CPUs have waited for others to answer their shootdowns.

use std::time::{Duration, Instant};

/// A shootdown that somebody waits for.
#[derive(Clone, Copy, Debug)]
struct Wait {
    number: u64,
    since: Instant,
    /// For how long vCPUs had stood still before.
    stood_still: Duration,
}

/// The shootdown that each CPU waits for, by what the CPUs say: a guest that says something else
/// each time only keeps the clock from running.
#[derive(Debug)]
pub(super) struct Waits {
    limit: Duration,
    waits: Vec<Option<Wait>>,
}

impl Waits {
    pub(super) fn new(cpus: usize, limit: Duration) -> Self {
        Self { limit, waits: vec![None; cpus] }
    }

    /// CPU `cpu` says that it still waits for answers to its shootdown `number`. How long it has, if
    /// that is more than the limit; the time for which all vCPUs stood still, `stood_still` so far,
    /// does not count.
    pub(super) fn note(
        &mut self,
        cpu: u8,
        number: u64,
        now: Instant,
        stood_still: Duration,
    ) -> Option<Duration> {
        let wait = self.waits.get_mut(usize::from(cpu))?;
        let same = wait.filter(|wait| wait.number == number);
        let Wait { since, stood_still: before, .. } =
            *wait.insert(same.unwrap_or(Wait { number, since: now, stood_still }));
        let waited = now.saturating_duration_since(since);
        let waited = waited.saturating_sub(stood_still.saturating_sub(before));
        (waited > self.limit).then_some(waited)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn the_clock_runs_while_one_cpu_waits_for_one_shootdown() {
        let mut waits = Waits::new(2, 10 * SECOND);
        let start = Instant::now();
        let mut note = |cpu, number, after: u32, still: u32| {
            waits.note(cpu, number, start + after * SECOND, still * SECOND)
        };
        assert_eq!(note(0, 7, 0, 0), None);
        assert_eq!(note(1, 8, 9, 0), None);
        assert_eq!(note(0, 7, 10, 0), None);
        assert_eq!(note(0, 7, 11, 0), Some(11 * SECOND));
        assert_eq!(note(0, 9, 11, 0), None, "another shootdown");
        assert_eq!(note(1, 8, 25, 6), None, "all stood still for six seconds");
        assert_eq!(note(1, 8, 26, 6), Some(11 * SECOND));
        assert_eq!(note(2, 7, 99, 0), None, "no such CPU");
    }
}
