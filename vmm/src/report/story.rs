//! The story of a violation as an aligned list: event, CPU, kind of step, what happened.

use super::StoryStep;
use super::layout::labelled;
use crate::printable::steers;

const INDENT: usize = 4;

/// Adds the steps, each on a line of its own, wrapped behind its label.
pub(super) fn story(out: &mut String, steps: &[StoryStep]) {
    let rows: Vec<[String; 3]> = steps.iter().map(columns).collect();
    let width =
        |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let [event, cpu, what] = [0, 1, 2].map(width);
    for (row, step) in rows.iter().zip(steps) {
        let [number, on, kind] = row;
        let label = format!("{number:event$}  {on:cpu$}  {kind:what$}  ");
        let text = match &step.function {
            Some(function) => format!("in {function}: {}", step.text),
            None => step.text.clone(),
        };
        labelled(out, INDENT, &label, &text);
    }
}

fn columns(step: &StoryStep) -> [String; 3] {
    let number = step.seq.map_or_else(String::new, |seq| format!("event {seq}"));
    let cpu = step.cpu.map_or_else(String::new, |cpu| format!("CPU {cpu}"));
    let what = step.what.chars().filter(|char| !steers(*char)).take(14).collect();
    [number, cpu, what]
}
