//! Counterexamples as sequences that a reader can follow.

use super::explore::Counterexample;
use super::machine::{Act, Flush};
use super::steps::{Step, Task};
use std::fmt::Write as _;

/// The steps, one a line, and what they come to.
pub(super) fn counterexample(found: &Counterexample) -> String {
    let mut text = String::new();
    for (number, (cpu, step)) in (1..).zip(&found.steps) {
        let _ = writeln!(text, "{number:>3}  CPU {cpu}  {}", describe(*step));
    }
    let broken = found.broken.map_or("no rule", |rule| rule.name());
    let _ = writeln!(text, "     breaks {broken}");
    text
}

fn name(block: usize) -> char {
    if block == 0 { 'A' } else { 'B' }
}

fn flush_name(flush: Flush) -> &'static str {
    match flush {
        Flush::Everything => "everything",
        Flush::NonGlobal => "all but global translations",
    }
}

fn describe(step: Step) -> String {
    match step {
        Step::Begin(Task::Flip, block) => format!("begins to flip block {}", name(block)),
        Step::Begin(Task::Use, block) => format!("takes block {}, to use it", name(block)),
        Step::Begin(Task::Free, block) => format!("begins to free block {}", name(block)),
        Step::Begin(Task::Back, block) => format!("begins to give block {} back", name(block)),
        Step::Send(flush) => format!("asks the other CPU to flush {}", flush_name(flush)),
        Step::Await => "has the other CPU's answer".to_owned(),
        Step::Refresh => "flushes its window, if it was used".to_owned(),
        Step::Interrupt(flush) => format!("takes the interrupt: flushes {}", flush_name(flush)),
        Step::Do(act) => describe_act(act),
    }
}

fn describe_act(act: Act) -> String {
    match act {
        Act::ClearDirect(block) => {
            format!("clears the direct map's entry of block {}", name(block))
        }
        Act::MapDirect(block) => format!("maps block {} in the direct map", name(block)),
        Act::Flush(flush) => format!("flushes {}", flush_name(flush)),
        Act::Seal(block) => format!("seals block {}", name(block)),
        Act::Open(block) => format!("opens block {}", name(block)),
        Act::Release(block) => format!("releases block {}", name(block)),
        Act::MapWindow { block, window, global } => {
            let kind = if global { ", global" } else { "" };
            format!("maps block {} in the window of CPU {window}{kind}", name(block))
        }
        Act::ClearWindow { window } => format!("clears the entry in the window of CPU {window}"),
        Act::Zero(block) => format!("zeroes block {}", name(block)),
        Act::Write(block) => format!("writes to block {}", name(block)),
        Act::Pooled(block) => format!("puts block {} into the pool, as zero", name(block)),
        Act::HandedOut(block) => format!("is handed block {} as zero", name(block)),
        Act::Nothing => "does nothing".to_owned(),
    }
}
