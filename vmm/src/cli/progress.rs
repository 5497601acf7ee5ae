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

/// The line of a step whose length is known, and of any other.
const STEP: &str = "{msg} {bar:30} {bytes}/{total_bytes} {eta} left";
const STEP_UNKNOWN: &str = "{spinner} {msg} {elapsed}";

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

/// The steps of a set-up, on standard error: a bar or a spinner on a terminal, else a line each if
/// `lines`.
#[derive(Debug)]
pub(super) struct Steps {
    lines: bool,
    terminal: bool,
    bar: Option<ProgressBar>,
}

impl Steps {
    pub(super) fn new(lines: bool) -> Self {
        Self { lines, terminal: io::stderr().is_terminal(), bar: None }
    }

    /// The next step begins; it takes so many bytes, if that is known.
    pub(super) fn begin(&mut self, what: &str, bytes: Option<u64>) {
        self.finish();
        // Whoever waits for a download wants to know, on a terminal or not.
        if !self.terminal && (self.lines || bytes.is_some()) {
            let size = bytes.map(|bytes| format!(" ({} MiB)", bytes.div_ceil(1 << 20)));
            eprintln!("{what}{}", size.unwrap_or_default());
        }
        if self.terminal {
            let bar = ProgressBar::with_draw_target(bytes, ProgressDrawTarget::stderr());
            let template = if bytes.is_some() { STEP } else { STEP_UNKNOWN };
            let bar = match ProgressStyle::with_template(template) {
                Ok(style) => bar.with_style(style),
                // The style is there for looks only.
                Err(_) => bar,
            };
            bar.set_message(what.to_owned());
            bar.enable_steady_tick(TICK);
            self.bar = Some(bar);
        }
    }

    /// So many bytes of the step are done.
    pub(super) fn at(&self, bytes: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(bytes);
        }
    }

    /// Takes the bar away.
    pub(super) fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Steps {
    fn drop(&mut self) {
        self.finish();
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
        for template in [KNOWN, UNKNOWN, STEP, STEP_UNKNOWN] {
            assert!(ProgressStyle::with_template(template).is_ok());
        }
    }
}
