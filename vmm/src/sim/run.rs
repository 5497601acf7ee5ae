//! A simulated run: one thread a CPU, from the first call to the end.

use super::cpu;
use super::frames::Frames;
use super::guest::{Guest, Metadata, Workload};
use super::machine::{Halted, Parts, SimMachine};
use super::ram::Ram;
use crate::gate::Gate;
use crate::machine::memory::{Memory, MemoryError};
use crate::run::End;
use crate::stop::Stop;
use lacuna_abi::addr::Gpa;
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// A machine that has not started.
pub struct Prepared {
    /// Guest memory.
    pub memory: Arc<Memory>,
    /// What its MMUs obey.
    pub frames: Arc<Frames>,
    /// Its gate.
    pub gate: Arc<Mutex<Gate>>,
    /// Root that all CPUs start with.
    pub root: Gpa,
    /// Bits of the faults to plant.
    pub faults: u64,
    /// Everything that is left to chance follows from it.
    pub seed: u64,
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
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Statistics {
    /// The seed.
    pub seed: u64,
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
    pub fn run(self) -> Simulated {
        let seed = self.seed;
        self.try_run().unwrap_or_else(|error| Simulated {
            end: End::Host(error.to_string()),
            in_guest: Duration::ZERO,
            calls: 0,
            statistics: Statistics { seed, ..Statistics::default() },
        })
    }

    fn try_run(self) -> Result<Simulated, MemoryError> {
        let Self { memory, frames, gate, root, faults, seed, stop, workload } = self;
        let ram = Ram::new(Arc::clone(&memory), frames)?;
        let machine = SimMachine::new(Parts { ram, gate, root, faults, seed, stop });
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
        let sum = |of: fn(&cpu::Cpu) -> u64| machine.cpus.iter().map(of).sum::<u64>();
        let in_gate = Duration::from_nanos(sum(|cpu| cpu.in_gate.load(Relaxed)));
        let mmu = machine.mmu_counters();
        Ok(Simulated {
            end,
            in_guest: running.saturating_sub(in_gate),
            calls: sum(|cpu| cpu.calls.load(Relaxed)),
            statistics: Statistics {
                seed,
                switches: machine.baton.passed(),
                walks: mmu.walks,
                speculations: mmu.speculations,
                stale_uses: mmu.stale_uses,
                stale_secret_uses: mmu.stale_secret_uses,
            },
        })
    }
}

/// The thread of one CPU. The guest's code is left by unwinding, always.
fn run_cpu<'a>(machine: &'a SimMachine, guest: &Guest<'a>, number: usize) {
    cpu::become_cpu(number);
    if machine.baton.wait(number).is_err() {
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
