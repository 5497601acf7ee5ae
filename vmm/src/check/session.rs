//! Runs cases, several at a time, whatever happens to one of them.

use super::case::Case;
use super::judge::{Judgement, Ran, judge};
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// What runs a case.
pub trait Runner: Sync {
    /// Runs the case to its end, or until `cancelled` is set; within the case's time limit.
    fn run(&self, case: &Case, cancelled: &AtomicBool) -> Ran;
}

/// A case that is over.
#[derive(Clone, Debug)]
pub struct Done<'c> {
    /// The case.
    pub case: &'c Case,
    /// What it left.
    pub ran: Ran,
    /// The judgement.
    pub judgement: Judgement,
    /// Time that it took.
    pub took: Duration,
}

/// Runs these cases, `jobs` at a time, and judges them. `each` is told of a case that is over, in the
/// order in which they end; the result has the order of the cases. Once `cancelled` is set no case
/// begins, and those that are not over count as not run.
pub fn run<'c>(
    cases: &[&'c Case],
    jobs: NonZeroUsize,
    runner: &dyn Runner,
    cancelled: &AtomicBool,
    mut each: impl FnMut(&Done<'c>),
) -> Vec<Done<'c>> {
    let next = AtomicUsize::new(0);
    let mut done: Vec<Option<Done<'c>>> = vec![None; cases.len()];
    thread::scope(|scope| {
        let (tell, told) = mpsc::channel();
        for _ in 0..jobs.get().min(cases.len()) {
            let (tell, next) = (tell.clone(), &next);
            scope.spawn(move || {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(case) = cases.get(index) else { return };
                    let over = one(case, runner, cancelled);
                    if tell.send((index, over)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(tell);
        for (index, over) in told {
            each(&over);
            done[index] = Some(over);
        }
    });
    done.into_iter().flatten().collect()
}

fn one<'c>(case: &'c Case, runner: &dyn Runner, cancelled: &AtomicBool) -> Done<'c> {
    let started = Instant::now();
    let is_cancelled = || cancelled.load(Ordering::Relaxed);
    let ran = match is_cancelled() {
        true => Ran::Interrupted,
        false => catch_unwind(AssertUnwindSafe(|| runner.run(case, cancelled)))
            .unwrap_or_else(|_| Ran::Crashed("a panic in the runner of cases".into())),
    };
    // Whoever breaks the suite off may have broken off the case's run too.
    let ran = if is_cancelled() { Ran::Interrupted } else { ran };
    Done { case, judgement: judge(case, &ran), ran, took: started.elapsed() }
}
