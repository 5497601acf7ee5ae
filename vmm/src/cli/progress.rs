//! A bar that shows how far a run is, where somebody is there to see it.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

/// A run that ends earlier shows no bar.
const DELAY: Duration = Duration::from_secs(1);
/// Pause between two looks at the clock while no progress is made.
const TICK: Duration = Duration::from_millis(200);

/// The line of a run whose length is known.
const KNOWN: &str = "{bar:40} {pos}/{len} {elapsed}, {eta} left";
/// The line of any other run.
const UNKNOWN: &str = "{spinner} {pos} {elapsed}";

/// Progress of a run, shown on standard error if that is a terminal and the run is not over soon.
#[derive(Debug)]
pub struct Progress {
    total: Option<u64>,
    started: Instant,
    terminal: bool,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Progress towards `total` units, or of unknown length.
    #[must_use]
    pub fn new(total: Option<u64>) -> Self {
        Self { total, started: Instant::now(), terminal: io::stderr().is_terminal(), bar: None }
    }

    /// Says that `done` units are done.
    pub fn set(&mut self, done: u64) {
        let elapsed = self.started.elapsed();
        if self.terminal && elapsed >= DELAY {
            let total = self.total;
            self.bar.get_or_insert_with(|| bar(total, elapsed)).set_position(done);
        }
    }

    /// Takes the bar away.
    pub fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
        self.terminal = false;
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}

fn bar(total: Option<u64>, elapsed: Duration) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr());
    let template = if total.is_some() { KNOWN } else { UNKNOWN };
    let bar = bar.with_elapsed(elapsed);
    bar.enable_steady_tick(TICK);
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        // The style is there for looks only.
        Err(_) => bar,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn started(ago: Duration, terminal: bool) -> Progress {
        let started = Instant::now().checked_sub(ago).unwrap();
        Progress { total: Some(10), started, terminal, bar: None }
    }

    #[test]
    fn a_bar_is_shown_on_a_terminal_once_a_run_is_long() {
        for (ago, terminal, shown) in
            [(DELAY, true, true), (DELAY, false, false), (Duration::ZERO, true, false)]
        {
            let mut progress = started(ago, terminal);
            progress.set(5);
            assert_eq!(progress.bar.is_some(), shown, "{ago:?} {terminal}");
        }
    }

    #[test]
    fn a_finished_bar_stays_away() {
        let mut progress = started(DELAY, true);
        progress.set(5);
        assert_eq!(progress.bar.as_ref().map(ProgressBar::position), Some(5));
        progress.finish();
        progress.set(6);
        assert!(progress.bar.is_none());
    }

    #[test]
    fn the_templates_are_right() {
        for template in [KNOWN, UNKNOWN] {
            assert!(ProgressStyle::with_template(template).is_ok());
        }
    }
}
