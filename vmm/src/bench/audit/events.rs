//! Time for an event: guests with more and fewer CPUs, whose events are judged in turns.

use super::guest::{Guest, Quiet, Step};
use super::naive::Naive;
use super::{
    Audit, BenchError, Effort, Events, MEMORY_MIB, Opens, SECRET_BLOCKS, clean, float, nanoseconds,
    refused, started, tell,
};
use crate::bench::sample::multiple;
use lacuna_abi::gate::OpKind;
use std::hint::black_box;
use std::time::Instant;

/// CPUs of the guests whose events are judged.
const CPUS: [u8; 3] = [1, 2, 4];
/// Rounds of flushes before anything is timed: the audit keeps the last 65,536 records, and until it has
/// that many each one also pays for memory that nothing has touched before.
const SETTLING: u64 = 1 << 14;

/// All kinds of events one after another.
pub(super) const ALL: &str = "all";

/// Events that are timed together.
const CHUNK: usize = 500;

/// What is measured of guests with so many CPUs.
struct Course {
    cpus: u8,
    guest: Guest,
    /// In the guest's typical state, before any of the kinds.
    audit: Audit,
    setup: Vec<Step>,
    kinds: Vec<(&'static str, Vec<Step>)>,
    /// Of each kind, the fastest pass of each [`CHUNK`], in nanoseconds.
    fastest: Vec<Vec<f64>>,
}

impl Course {
    fn new(cpus: u8, effort: Effort) -> Result<Self, BenchError> {
        let mut guest = Guest::new(MEMORY_MIB, usize::from(cpus), 0)?;
        let mut audit = { started(&guest, &Quiet(&guest.memory, guest.root)) };
        let (setup, kinds) = streams(&mut guest, cpus, effort.rounds);
        tell(&mut audit, &setup, &Quiet(&guest.memory, guest.root))?;
        let chunks = |steps: &[Step]| vec![f64::INFINITY; steps.len().div_ceil(CHUNK)];
        let fastest = kinds.iter().map(|(_, steps)| chunks(steps)).collect();
        Ok(Self { cpus, guest, audit, setup, kinds, fastest })
    }

    fn world(&self) -> Quiet<'_> {
        Quiet(&self.guest.memory, self.guest.root)
    }

    /// Judges the events of one kind once.
    fn pass(&mut self, kind: usize) -> Result<(), BenchError> {
        let mut audit = self.audit.clone();
        let world = Quiet(&self.guest.memory, self.guest.root);
        let chunks = self.kinds[kind].1.chunks(CHUNK);
        for (steps, fastest) in chunks.zip(&mut self.fastest[kind]) {
            let started = Instant::now();
            tell(&mut audit, steps, &world)?;
            *fastest = fastest.min(nanoseconds(started));
        }
        clean(black_box(&audit))
    }

    /// What the passes took, beside the naive automaton.
    fn results(&self) -> Result<Vec<Events>, BenchError> {
        let mut naive = Naive::new(self.guest.layout());
        self.setup.iter().for_each(|step| naive.write_only(step));
        let (mut naive_total, mut naive_steps) = (0.0, 0.0);
        let mut results = Vec::new();
        for ((work, steps), fastest) in self.kinds.iter().zip(&self.fastest) {
            let event_ns = fastest.iter().sum::<f64>() / float(steps.len() as u64);
            // The last kind is all the others together.
            let together = *work == ALL;
            let naive_ns = if together { naive_total / naive_steps } else { naive.time(steps) };
            naive_total += naive_ns * float(steps.len() as u64);
            naive_steps += float(steps.len() as u64);
            let (cpus, ratio) = (self.cpus, multiple(naive_ns, event_ns));
            results.push(Events { work, cpus, events: steps.len(), event_ns, naive_ns, ratio });
        }
        if naive.found > 0 {
            return Err(refused("the naive automaton finds something"));
        }
        Ok(results)
    }
}

/// Judges the events of all guests. They take turns, so that what disturbs the machine, or is slow at
/// the start, disturbs all of them.
pub(super) fn judge(effort: Effort) -> Result<(Vec<Events>, Vec<Opens>), BenchError> {
    let mut courses = Vec::new();
    for cpus in CPUS {
        courses.push(Course::new(cpus, effort)?);
    }
    for _ in 0..effort.passes {
        for kind in 0..courses[0].kinds.len() {
            for course in &mut courses {
                course.pass(kind)?;
            }
        }
    }
    let (mut events, mut opens) = (Vec::new(), Vec::new());
    for course in &courses {
        events.extend(course.results()?);
        for (_, steps) in course.kinds.iter().filter(|(work, _)| *work == ALL) {
            let (audit, world) = (course.audit.clone(), course.world());
            opens.push(time_opens(audit, course.cpus, steps, &world)?);
        }
    }
    Ok((events, opens))
}

/// Kinds of events, each as a list of steps, and what leads to the state in which they happen.
pub(super) fn streams(
    guest: &mut Guest,
    cpus: u8,
    rounds: u64,
) -> (Vec<Step>, Vec<(&'static str, Vec<Step>)>) {
    let cpu_of = |round: u64| u8::try_from(round % u64::from(cpus)).unwrap_or(0);
    for block in 0..SECRET_BLOCKS {
        guest.flip(cpu_of(block), block);
    }
    for round in 0..SETTLING {
        guest.flushes(cpu_of(round));
    }
    let setup = guest.take();
    let mut kinds = Vec::new();
    for round in 0..rounds {
        let frames = guest.batch(round * 7 % SECRET_BLOCKS, round);
        guest.pool_hits(cpu_of(round), frames);
    }
    kinds.push(("pool hits", guest.take()));
    for round in 0..rounds {
        let block = SECRET_BLOCKS + round % SECRET_BLOCKS;
        guest.flip(cpu_of(round), block);
        guest.flip_back(cpu_of(round), block);
    }
    kinds.push(("flips", guest.take()));
    for round in 0..rounds {
        let block = 2 * SECRET_BLOCKS + round % SECRET_BLOCKS;
        let table = guest.convert(cpu_of(round), block, 4);
        guest.convert_back(cpu_of(round), block, 4, table);
    }
    kinds.push(("conversions", guest.take()));
    for round in 0..4 * rounds {
        guest.flushes(cpu_of(round));
    }
    kinds.push(("flushes", guest.take()));
    let all = kinds.iter().flat_map(|(_, steps)| steps.iter().copied()).collect();
    kinds.push((ALL, all));
    (setup, kinds)
}

/// Times each open operation by itself.
fn time_opens(
    mut audit: Audit,
    cpus: u8,
    steps: &[Step],
    world: &Quiet<'_>,
) -> Result<Opens, BenchError> {
    let mut micros = Vec::new();
    for step in steps {
        match *step {
            Step::Operation(cpu, op, before, after) if op.kind == OpKind::Open => {
                let started = Instant::now();
                let arrived = black_box(audit.arrival(cpu, op, before, world));
                micros.push(nanoseconds(started) / 1e3);
                arrived.map_err(|status| refused(&format!("{op:?} was refused: {status:?}")))?;
                audit.done(cpu, op, after, world);
            }
            _ => tell(&mut audit, std::slice::from_ref(step), world)?,
        }
    }
    micros.sort_unstable_by(f64::total_cmp);
    let at = |part: usize| micros.get(micros.len() * part / 100).copied().unwrap_or(0.0);
    Ok(Opens { cpus, opens: micros.len(), median_us: at(50), p99_us: at(99) })
}
