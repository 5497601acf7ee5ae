//! `bench audit`: what the audit costs, fed with what guests do, written down beforehand: time for an
//! event beside a naive automaton, the check at a gate open, a full comparison of a guest's tables,
//! memory.

mod events;
mod guest;
mod naive;

use super::boot::own_resident_kib;
use super::sample::{float, median};
use super::{BenchError, Goal, columns, times};
use crate::audit::Audit;
use crate::doctor::{Doctor, ThisHost};
use guest::{Guest, Quiet, Step};
use serde::Serialize;
use std::hint::black_box;
use std::time::Instant;

/// CPUs of the guests whose memory and tables are measured.
const MANY: u8 = 4;
/// Memory of the guests, in MiB, but for that with the largest tables.
const MEMORY_MIB: u64 = 8 << 10;
/// Memory of the guest with the largest tables, in MiB.
const LARGE_MIB: u64 = 64 << 10;
/// Pageblocks that have left the direct map in a guest's typical state.
const SECRET_BLOCKS: u64 = 256;
const EFFORT: Effort = Effort { rounds: 200, passes: 15, checks: 200 };
const QUICK: Effort = Effort { rounds: 2, passes: 1, checks: 1 };

/// How much is measured.
#[derive(Clone, Copy)]
struct Effort {
    /// Rounds of each kind of event.
    rounds: u64,
    /// How often they are judged; of each chunk the fastest pass counts, since others disturb
    /// the machine.
    passes: usize,
    /// Complete checks.
    checks: usize,
}

/// Results of the bench.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct AuditCost {
    /// The host's processor.
    pub processor: String,
    /// Events by kind and number of CPUs, in guests of 8 GiB.
    pub events: Vec<Events>,
    /// The check at a gate open, in the same guests.
    pub opens: Vec<Opens>,
    /// Complete checks by the guest's memory and state.
    pub checks: Vec<Check>,
    /// Memory of the audit by the guest's state.
    pub memory: Vec<Footprint>,
    /// What was aimed at.
    pub goals: Vec<Goal>,
}

/// Events of one kind.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Events {
    /// "pool hits", "flips", "conversions", "flushes", or "all" one after another.
    pub work: &'static str,
    /// CPUs of the guest.
    pub cpus: u8,
    /// Events, gate operations included, that were judged.
    pub events: usize,
    /// Nanoseconds for one, in the fastest of several passes.
    pub event_ns: f64,
    /// The same of an automaton with one state for each page and CPU, over the first of them.
    pub naive_ns: f64,
    /// `naive_ns` as a multiple of `event_ns`.
    pub ratio: Option<f64>,
}

/// The check of open calls on their arrival.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Opens {
    /// CPUs of the guest.
    pub cpus: u8,
    /// Open operations.
    pub opens: usize,
    /// Median microseconds.
    pub median_us: f64,
    /// Microseconds that one in a hundred exceeds.
    pub p99_us: f64,
}

/// A complete check at a quiesce point.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Check {
    /// Memory of the guest in MiB.
    pub memory_mib: u64,
    /// Its secret pageblocks.
    pub secret_blocks: u64,
    /// Median microseconds.
    pub check_us: f64,
    /// Median microseconds of a walk over the same tables that does nothing else.
    pub walk_us: f64,
}

/// What an audit takes.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Footprint {
    /// State of the guest of 8 GiB.
    pub state: &'static str,
    /// Resident KiB more than without the audit.
    pub resident_kib: u64,
}

/// Measures, as little as can be if it is to be `quick`.
///
/// # Errors
/// [`BenchError`].
pub fn audit(quick: bool) -> Result<AuditCost, BenchError> {
    measure(if quick { QUICK } else { EFFORT })
}

fn measure(effort: Effort) -> Result<AuditCost, BenchError> {
    // Memory first: what was freed before would hide what is taken.
    let memory = vec![footprint(false)?, footprint(true)?];
    let (events, opens) = events::judge(effort)?;
    let checks = vec![
        check(LARGE_MIB, 0, effort)?,
        check(LARGE_MIB, 8 * SECRET_BLOCKS, effort)?,
        check(MEMORY_MIB, SECRET_BLOCKS, effort)?,
    ];
    let worst = |values: &mut dyn Iterator<Item = f64>| values.reduce(f64::max);
    let all = &mut events.iter().filter(|e| e.work == events::ALL).map(|e| e.event_ns);
    let kib = |state: &Footprint| Some(float(state.resident_kib) / 1024.0);
    let goals = vec![
        Goal::at_most("nanoseconds an event", 50.0, worst(all)),
        Goal::at_most(
            "microseconds for the check at an open, all but 1 %",
            10.0,
            worst(&mut opens.iter().map(|o| o.p99_us)),
        ),
        Goal::at_most(
            "microseconds to compare the tables of 64 GiB",
            100.0,
            Some(checks[0].check_us),
        ),
        Goal::at_most("MiB for a guest of 8 GiB", 64.0, kib(&memory[0])),
        Goal::at_most("MiB with every pageblock split", 64.0, kib(&memory[1])),
    ];
    let processor = Doctor::inspect(&ThisHost).host.cpu_model.unwrap_or_else(|| "unknown".into());
    Ok(AuditCost { processor, events, opens, checks, memory, goals })
}

/// An audit that is told the steps must have nothing to say.
fn tell(audit: &mut Audit, steps: &[Step], world: &Quiet<'_>) -> Result<(), BenchError> {
    for step in steps {
        match step {
            Step::Record(record) => audit.event(record, world),
            Step::Operation(cpu, op, before, after) => {
                let arrived = audit.arrival(*cpu, *op, *before, world);
                arrived.map_err(|status| refused(&format!("{op:?} was refused: {status:?}")))?;
                audit.done(*cpu, *op, *after, world);
            }
        }
    }
    Ok(())
}

fn clean(audit: &Audit) -> Result<(), BenchError> {
    let result = audit.result();
    match (result.findings.first(), result.inconclusive.first()) {
        (None, None) => Ok(()),
        found => Err(refused(&format!("the events are not clean: {found:?}"))),
    }
}

fn refused(why: &str) -> BenchError {
    BenchError::NotMeasured("the audit".into(), why.to_owned())
}

fn started(guest: &Guest, world: &Quiet<'_>) -> Audit {
    let mut audit = Audit::new(guest.config(), world);
    for cpu in (0..=u8::MAX).take(guest.layout().cpus) {
        audit.start_cpu(cpu);
        audit.register_cpu(cpu, lacuna_abi::gate::CpuRegistration::default());
    }
    audit
}

/// Complete checks of a guest with so many secret pageblocks.
fn check(memory_mib: u64, secret_blocks: u64, effort: Effort) -> Result<Check, BenchError> {
    let mut guest = Guest::new(memory_mib, usize::from(MANY), 0)?;
    let mut audit = { started(&guest, &Quiet(&guest.memory, guest.root)) };
    (0..secret_blocks).for_each(|block| guest.flip(0, block));
    let steps = guest.take();
    let world = Quiet(&guest.memory, guest.root);
    tell(&mut audit, &steps, &world)?;
    let (mut checks, mut walks) = (Vec::new(), Vec::new());
    for round in 0..effort.checks {
        let started = Instant::now();
        audit.quiesce(1 << 40, &world);
        let checked = nanoseconds(started);
        let started = Instant::now();
        black_box(walk(&guest));
        if round >= effort.checks / 10 {
            checks.push(checked / 1e3);
            walks.push(nanoseconds(started) / 1e3);
        }
    }
    clean(&audit)?;
    Ok(Check { memory_mib, secret_blocks, check_us: median(checks), walk_us: median(walks) })
}

/// Leaves that a walk over the guest's tables meets.
fn walk(guest: &Guest) -> u64 {
    use lacuna_abi::walk::{EVERYTHING, Visit, visit};
    let mut leaves = 0;
    let mut count = |met| leaves += u64::from(matches!(met, Visit::Leaf(_)));
    let walked = visit(&guest.memory, guest.root, EVERYTHING, usize::MAX, &mut count);
    if walked.is_ok() { leaves } else { 0 }
}

/// Memory of an audit, in the typical state or with every pageblock split and converted in part.
fn footprint(split: bool) -> Result<Footprint, BenchError> {
    let spare = if split { MEMORY_MIB / 2 } else { 0 };
    let mut guest = Guest::new(MEMORY_MIB, usize::from(MANY), spare)?;
    let before = own_resident_kib()?;
    let mut audit = { started(&guest, &Quiet(&guest.memory, guest.root)) };
    let blocks = if split { MEMORY_MIB / 2 } else { SECRET_BLOCKS };
    let mut steps = 0;
    for block in 0..blocks {
        let cpu = u8::try_from(block % u64::from(MANY)).unwrap_or(0);
        if split {
            guest.convert(cpu, block, 4);
        } else {
            guest.flip(cpu, block);
            for round in 0..16 {
                let frames = guest.batch(block, round);
                guest.pool_hits(cpu, frames);
            }
        }
        let told = guest.take();
        steps += told.len();
        tell(&mut audit, &told, &Quiet(&guest.memory, guest.root))?;
    }
    audit.quiesce(1 << 40, &Quiet(&guest.memory, guest.root));
    let resident_kib = own_resident_kib()?.saturating_sub(before);
    black_box(steps);
    clean(&audit)?;
    let state = if split { "every pageblock split" } else { "typical" };
    Ok(Footprint { state, resident_kib })
}

fn nanoseconds(since: Instant) -> f64 {
    float(u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX))
}

impl AuditCost {
    /// The results as tables.
    #[must_use]
    pub fn to_text(&self) -> String {
        let head = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let mut events = vec![head(&["events", "CPUs", "number", "ns each", "naive ns", "ratio"])];
        events.extend(self.events.iter().map(|e| {
            let numbers = [e.event_ns, e.naive_ns].map(|ns| format!("{ns:.0}"));
            let [event_ns, naive_ns] = numbers;
            let (cpus, count) = (e.cpus.to_string(), e.events.to_string());
            vec![e.work.to_owned(), cpus, count, event_ns, naive_ns, times(e.ratio)]
        }));
        let mut opens = vec![head(&["opens", "CPUs", "median µs", "99 % within µs"])];
        opens.extend(self.opens.iter().map(|o| {
            let [median, p99] = [o.median_us, o.p99_us].map(|us| format!("{us:.2}"));
            vec![o.opens.to_string(), o.cpus.to_string(), median, p99]
        }));
        let mut checks =
            vec![head(&["guest MiB", "secret blocks", "complete check µs", "walk µs"])];
        checks.extend(self.checks.iter().map(|c| {
            let [check, walk] = [c.check_us, c.walk_us].map(|us| format!("{us:.0}"));
            vec![c.memory_mib.to_string(), c.secret_blocks.to_string(), check, walk]
        }));
        let mut memory = vec![head(&["guest of 8 GiB", "KiB of the audit"])];
        memory.extend(
            self.memory.iter().map(|m| vec![m.state.to_owned(), m.resident_kib.to_string()]),
        );
        format!(
            "The audit, on one core: {}\n`lacuna bench audit`\n\n{}\n{}\n{}\n{}\n{}",
            self.processor,
            columns(&events),
            columns(&opens),
            columns(&checks),
            columns(&memory),
            Goal::table(&self.goals)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::events::streams;
    use super::naive::Naive;
    use super::*;

    #[test]
    fn what_the_guests_do_is_clean_for_audit_and_naive_automaton_and_everything_is_measured() {
        let mut guest = Guest::new(MEMORY_MIB, 2, 0).unwrap();
        let mut audit = { started(&guest, &Quiet(&guest.memory, guest.root)) };
        let (setup, kinds) = streams(&mut guest, 2, 4);
        let world = Quiet(&guest.memory, guest.root);
        tell(&mut audit, &setup, &world).unwrap();
        for (_, steps) in &kinds[..4] {
            tell(&mut audit, steps, &world).unwrap();
        }
        audit.quiesce(1 << 40, &world);
        clean(&audit).unwrap();
    }

    #[test]
    fn a_guest_that_forgets_a_shootdown_is_noticed_by_both() {
        let mut guest = Guest::new(MEMORY_MIB, 2, 0).unwrap();
        let mut audit = { started(&guest, &Quiet(&guest.memory, guest.root)) };
        guest.flip(0, 3);
        let steps: Vec<_> = guest.take();
        let forgetful = |step: &&Step| !matches!(step, Step::Record(record) if matches!(record.event, lacuna_abi::event::Event::Flush(_)));
        let steps: Vec<_> = steps.iter().filter(forgetful).copied().collect();
        let world = Quiet(&guest.memory, guest.root);
        tell(&mut audit, &steps, &world).unwrap();
        assert!(clean(&audit).is_err());
        let mut naive = Naive::new(guest.layout());
        steps.iter().for_each(|step| naive.step(step));
        assert!(naive.found > 0);
    }

    #[test]
    fn tables_name_every_measurement() {
        let text = AuditCost {
            processor: "one".into(),
            events: vec![Events {
                work: "all",
                cpus: 2,
                events: 10,
                event_ns: 40.0,
                naive_ns: 400.0,
                ratio: Some(10.0),
            }],
            opens: vec![Opens { cpus: 2, opens: 5, median_us: 0.5, p99_us: 1.5 }],
            checks: vec![Check { memory_mib: 64, secret_blocks: 1, check_us: 20.0, walk_us: 9.0 }],
            memory: vec![Footprint { state: "typical", resident_kib: 77 }],
            goals: vec![Goal::at_most("x", 1.0, None)],
        }
        .to_text();
        for part in ["10.00", "1.50", "typical", "not met", "one"] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}
