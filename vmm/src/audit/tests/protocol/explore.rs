//! Breadth first over every state that two CPUs can bring about.

use super::super::Rule;
use super::machine::{Act, Flush, Machine, N, Seal};
use super::steps::{Slip, Step, Task, script};
use std::collections::HashMap;
use std::collections::hash_map::Entry;

/// Who has a block.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Place {
    Mapped,
    Pool,
    Owned(usize),
    /// A CPU is at a task with it.
    Busy,
}

/// A task under way: how many of its steps are done.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Doing {
    task: Task,
    block: usize,
    done: u8,
}

/// Everything.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct State {
    machine: Machine,
    places: [Place; N],
    doing: [Option<Doing>; N],
    /// What each CPU was asked to flush and has not answered.
    asked: [Option<Flush>; N],
    /// CPUs with window addresses that were used since their last flush.
    used: [bool; N],
}

/// A whole exploration.
#[derive(Clone, Copy, Debug)]
pub(super) struct Explored {
    pub(super) states: usize,
    pub(super) steps: usize,
}

/// The shortest way to break a rule, or to do harm.
#[derive(Clone, Debug)]
pub(super) struct Counterexample {
    pub(super) seal: Seal,
    /// The rule that the last step breaks.
    pub(super) broken: Option<Rule>,
    /// CPU and step, in order.
    pub(super) steps: Vec<(usize, Step)>,
}

/// What ends an exploration early.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Until {
    /// A rule is broken. Harm without a broken rule panics.
    Rule,
    /// Harm is done, whatever the rules say.
    Harm,
}

/// Explores the protocol with a slip.
///
/// # Errors
/// The shortest sequence that breaks a rule, or does harm.
///
/// # Panics
/// If a state does harm although no rule was broken on the way there.
pub(super) fn explore(slip: Slip, seal: Seal, until: Until) -> Result<Explored, Counterexample> {
    let scripts = Scripts::new(slip);
    let start = State {
        machine: Machine::new(),
        places: [Place::Mapped; N],
        doing: [None; N],
        asked: [None; N],
        used: [false; N],
    };
    let mut seen = HashMap::from([(start, 0_usize)]);
    let mut all = vec![(start, None::<(usize, usize, Step)>)];
    let (mut next, mut steps) = (0, 0);
    while let Some(&(state, _)) = all.get(next) {
        for (cpu, step) in state.steps(&scripts) {
            steps += 1;
            let (after, broken) = state.after(cpu, step, &scripts, seal);
            let path = |last: Option<(usize, Step)>| {
                let mut steps: Vec<_> = last.into_iter().collect();
                let mut at = next;
                while let Some((before, cpu, step)) = all[at].1 {
                    steps.push((cpu, step));
                    at = before;
                }
                steps.reverse();
                steps
            };
            let harm = after.machine.harm(seal);
            match (until, broken, harm) {
                (Until::Rule, None, Some(harm)) => {
                    panic!("{harm}, and no rule was broken: {:#?}", path(Some((cpu, step))));
                }
                (Until::Rule, Some(_), _) | (Until::Harm, _, Some(_)) => {
                    return Err(Counterexample { seal, broken, steps: path(Some((cpu, step))) });
                }
                (Until::Rule, None, None) | (Until::Harm, _, None) => {}
            }
            if let Entry::Vacant(entry) = seen.entry(after) {
                entry.insert(all.len());
                all.push((after, Some((next, cpu, step))));
            }
        }
        next += 1;
    }
    Ok(Explored { states: all.len(), steps })
}

/// The steps of every task, for each block and CPU.
struct Scripts(HashMap<(Task, usize, usize), Vec<Step>>);

impl Scripts {
    fn new(slip: Slip) -> Self {
        let mut scripts = HashMap::new();
        for task in [Task::Flip, Task::Use, Task::Free, Task::Back] {
            for (block, cpu) in (0..N).flat_map(|block| (0..N).map(move |cpu| (block, cpu))) {
                scripts.insert((task, block, cpu), script(task, block, cpu, slip));
            }
        }
        Self(scripts)
    }

    fn steps(&self, doing: Doing, cpu: usize) -> &[Step] {
        &self.0[&(doing.task, doing.block, cpu)]
    }
}

impl State {
    /// Everything that can happen next.
    fn steps(&self, scripts: &Scripts) -> Vec<(usize, Step)> {
        let mut steps = Vec::new();
        for cpu in 0..N {
            if let Some(flush) = self.asked[cpu] {
                steps.push((cpu, Step::Interrupt(flush)));
            }
            let Some(doing) = self.doing[cpu] else {
                for (block, place) in self.places.iter().enumerate() {
                    let tasks: &[Task] = match place {
                        Place::Mapped => &[Task::Flip],
                        Place::Pool => &[Task::Use, Task::Back],
                        Place::Owned(owner) if *owner == cpu => &[Task::Use, Task::Free],
                        Place::Owned(_) | Place::Busy => &[],
                    };
                    steps.extend(tasks.iter().map(|task| (cpu, Step::Begin(*task, block))));
                }
                continue;
            };
            let step = scripts.steps(doing, cpu)[usize::from(doing.done)];
            let waits = match step {
                Step::Await => self.asked[N - 1 - cpu].is_some(),
                // One request at a time.
                Step::Send(_) => self.asked[N - 1 - cpu].is_some(),
                _ => false,
            };
            if !waits {
                steps.push((cpu, step));
            }
        }
        steps
    }

    /// The state after a step of `cpu`, and the rule that the step breaks.
    fn after(&self, cpu: usize, step: Step, scripts: &Scripts, seal: Seal) -> (Self, Option<Rule>) {
        let mut next = *self;
        let act = match step {
            Step::Begin(task, block) => {
                next.places[block] = Place::Busy;
                next.doing[cpu] = Some(Doing { task, block, done: 0 });
                let handed_out = self.places[block] == Place::Pool && task == Task::Use;
                if handed_out { Act::HandedOut(block) } else { Act::Nothing }
            }
            Step::Interrupt(flush) => {
                next.asked[cpu] = None;
                Act::Flush(flush)
            }
            Step::Refresh if self.used[cpu] => Act::Flush(Flush::NonGlobal),
            Step::Do(act) => act,
            Step::Send(flush) => {
                next.asked[N - 1 - cpu] = Some(flush);
                Act::Nothing
            }
            Step::Refresh | Step::Await => Act::Nothing,
        };
        match act {
            Act::MapWindow { window, .. } => next.used[window] = true,
            // What is mapped meanwhile may be cached again at once.
            Act::Flush(_) => next.used[cpu] &= self.machine.windows[cpu].is_some(),
            _ => {}
        }
        let broken = next.machine.act(cpu, act, seal);
        if !matches!(step, Step::Begin(..) | Step::Interrupt(_)) {
            next.go_on(cpu, scripts);
        }
        (next, broken)
    }

    /// The step of this CPU's task is done.
    fn go_on(&mut self, cpu: usize, scripts: &Scripts) {
        let Some(doing) = &mut self.doing[cpu] else { return };
        doing.done += 1;
        if usize::from(doing.done) == scripts.steps(*doing, cpu).len() {
            self.places[doing.block] = match doing.task {
                Task::Flip | Task::Free => Place::Pool,
                Task::Use => Place::Owned(cpu),
                Task::Back => Place::Mapped,
            };
            self.doing[cpu] = None;
        }
    }
}
