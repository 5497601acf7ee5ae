//! A simulated run: one thread a CPU, from the first call to the end.

use super::cpu;
use super::frames::Frames;
use super::guest::{Guest, Metadata, Workload, boot_info};
use super::machine::{Halted, Parts, SimMachine};
use super::mmu::MmuCounters;
use super::probe::MmuProber;
use super::ram::Ram;
use super::schedule::Schedule;
use crate::audit::Mediation;
use crate::gate::Gate;
use crate::machine::memory::{Memory, MemoryError};
use crate::run::End;
use crate::stop::Stop;
use lacuna_abi::addr::Gpa;
use lacuna_abi::boot::{FEATURE_DIRECT_PAGING, FEATURE_GATE_SHOOTDOWN};
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// A machine that has not started.
pub struct Prepared {
    /// Guest memory.
    pub memory: Arc<Memory>,
    /// What its MMUs obey.
    pub frames: Arc<Frames>,
    /// Root that all CPUs start with.
    pub root: Gpa,
    /// Bits of the faults to plant.
    pub faults: u64,
    /// Everything that is left to chance follows from it.
    pub seed: u64,
    /// How its CPUs take turns.
    pub schedule: Schedule,
    /// Tells when the run is to stop.
    pub stop: Arc<Stop>,
    /// What the CPUs run, if not the program that the boot information names.
    pub workload: Option<Arc<dyn Workload>>,
}

/// What a run leaves.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Simulated {
    /// How it ended.
    pub end: End,
    /// Time that CPUs spent in the guest's own code.
    pub in_guest: Duration,
    /// Gate calls.
    pub calls: u64,
    /// What the simulation itself counted.
    pub statistics: Statistics,
}

/// What a simulated machine knows of a run that no real one can tell.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Statistics {
    /// The seed.
    pub seed: u64,
    /// How the CPUs took turns.
    pub schedule: Schedule,
    /// How often another CPU took over.
    pub switches: u64,
    /// Walks of the tables.
    pub walks: u64,
    /// Accesses that CPUs made on their own account.
    pub speculations: u64,
    /// Accesses through a translation that the tables did not give any more.
    pub stale_uses: u64,
    /// Those of them that reached a secret frame and must not happen.
    pub stale_secret_uses: u64,
}

impl Prepared {
    /// Runs to the end, on this thread and one for each CPU.
    #[must_use]
    pub fn run(self, gate: &Arc<Mutex<Gate>>) -> Simulated {
        let (seed, schedule) = (self.seed, self.schedule);
        let statistics = |mmu: MmuCounters, switches| {
            let MmuCounters { walks, speculations, stale_uses, stale_secret_uses } = mmu;
            Statistics {
                seed,
                schedule,
                switches,
                walks,
                speculations,
                stale_uses,
                stale_secret_uses,
            }
        };
        self.try_run(Arc::clone(gate), &statistics).unwrap_or_else(|error| Simulated {
            end: End::Host(error.to_string()),
            in_guest: Duration::ZERO,
            calls: 0,
            statistics: statistics(MmuCounters::default(), 0),
        })
    }

    fn try_run(
        self,
        gate: Arc<Mutex<Gate>>,
        statistics: &dyn Fn(MmuCounters, u64) -> Statistics,
    ) -> Result<Simulated, MemoryError> {
        let Self { memory, frames, root, faults, seed, schedule, stop, workload } = self;
        let prober = MmuProber::new(Arc::clone(&memory), Arc::clone(&frames), seed)?;
        gate.lock().unwrap_or_else(PoisonError::into_inner).attach_prober(Box::new(prober));
        let ram = Ram::new(Arc::clone(&memory), frames);
        let features = boot_info(&memory)?.features;
        let through_gate = features & FEATURE_GATE_SHOOTDOWN != 0;
        let direct = features & FEATURE_DIRECT_PAGING != 0;
        let sightings = {
            let gate = gate.lock().unwrap_or_else(PoisonError::into_inner);
            (gate.audit().mediation() == Mediation::Step).then(|| gate.sightings())
        };
        let parts = Parts {
            ram,
            gate,
            root,
            faults,
            through_gate,
            direct,
            seed,
            schedule,
            stop,
            sightings,
        };
        let machine = SimMachine::new(parts);
        let metadata = Metadata::new(&memory);
        let guest = Guest::new(&machine, &memory, &metadata, workload.as_deref())?;
        let started = Instant::now();
        thread::scope(|scope| {
            for number in 0..machine.cpus.len() {
                let (machine, guest) = (&machine, &guest);
                let name = format!("sim-cpu{number}");
                let spawned = thread::Builder::new()
                    .name(name)
                    .spawn_scoped(scope, move || run_cpu(machine, guest, number));
                if let Err(error) = spawned {
                    let message = format!("cannot start the thread of CPU {number}: {error}");
                    machine.ends(number, End::Host(message));
                }
            }
        });
        let running = started.elapsed();
        let (number, end) = machine.take_end().unwrap_or_else(|| {
            (0, End::Host("all CPUs stopped without an end; this is a fault of the VMM".into()))
        });
        let end = match end {
            End::Host(_) => end,
            end => {
                let done = matches!(end, End::Exit(0, _));
                machine.finish(number, done).map_or_else(End::from, |()| end)
            }
        };
        let in_gate = machine.clock.duration(machine.sum_of_calls(|calls| &calls.ticks));
        Ok(Simulated {
            end,
            in_guest: running.saturating_sub(in_gate),
            calls: machine.sum_of_calls(|calls| &calls.made),
            statistics: statistics(machine.mmu_counters(), machine.turns.switches()),
        })
    }
}

/// The thread of one CPU. The guest's code is left by unwinding, always.
fn run_cpu<'a>(machine: &'a SimMachine, guest: &Guest<'a>, number: usize) {
    cpu::become_cpu(number);
    let _presence = machine.turns.join(number);
    if machine.turns.wait(number).is_err() {
        return;
    }
    let Err(payload) = catch_unwind(AssertUnwindSafe(|| -> () { guest.main(machine) })) else {
        return;
    };
    if payload.is::<Halted>() {
        return;
    }
    // The guest's own panic. Telling the host ends the thread in the same way.
    let message = message(&*payload);
    let told = catch_unwind(AssertUnwindSafe(|| -> () { machine.panicked(number, &message) }));
    if told.is_err_and(|payload| !payload.is::<Halted>()) {
        machine.ends(number, End::Host(format!("reporting a guest's panic failed: {message}")));
    }
}

/// What a panic said.
fn message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| payload.downcast_ref::<&str>().copied());
    text.unwrap_or("a panic without a message").to_owned()
}
