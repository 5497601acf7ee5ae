//! Which simulated CPUs run, and how the one that makes a gate call has the others stand still.

use super::baton::{Baton, Over};
use super::cpu::Cpu;
use crate::gate::Vcpus;
use crate::machine::kvm::KvmError;
use crate::machine::state::Registers;
use crate::run::crew::{Crew, Presence, Turn};
use std::time::Instant;

/// How the CPUs of a simulated machine take turns.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Schedule {
    /// One at a time; who is next follows from the seed, so that a run can be repeated exactly.
    Seeded,
    /// All at once, as the host's scheduler has it: for stress. Such a run cannot be repeated.
    Threads,
}

impl Schedule {
    /// Name in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Seeded => "seeded",
            Self::Threads => "threads",
        }
    }
}

/// The CPUs' threads, by schedule.
pub(super) enum Turns {
    Seeded(Baton),
    Threads(Crew<()>),
}

impl Turns {
    pub(super) fn new(schedule: Schedule, cpus: usize, seed: u64) -> Self {
        match schedule {
            Schedule::Seeded => Self::Seeded(Baton::new(cpus, seed)),
            Schedule::Threads => Self::Threads(Crew::new(cpus)),
        }
    }

    /// This thread is CPU `number` until what this returns is dropped.
    pub(super) fn join(&self, number: usize) -> Option<Presence<'_, ()>> {
        match self {
            Self::Seeded(_) => None,
            Self::Threads(crew) => Some(crew.join(number as u8)),
        }
    }

    /// Waits until CPU `number` may run.
    ///
    /// # Errors
    /// [`Over`].
    pub(super) fn wait(&self, number: usize) -> Result<(), Over> {
        match self {
            Self::Seeded(baton) => baton.wait(number),
            Self::Threads(crew) if crew.enter(number as u8, || ()) => Ok(()),
            Self::Threads(_) => Err(Over),
        }
    }

    /// Lets others run, if it is their turn. A CPU is `idle` when it can only go on once another
    /// has done something.
    ///
    /// # Errors
    /// [`Over`].
    pub(super) fn pass(&self, number: usize, idle: bool) -> Result<(), Over> {
        match self {
            Self::Seeded(baton) => return baton.pass(number, idle),
            Self::Threads(_) if idle => std::thread::yield_now(),
            Self::Threads(_) => {}
        }
        Ok(())
    }

    /// Comes out of the guest's code to where it may have to stand still.
    ///
    /// # Errors
    /// [`Over`].
    pub(super) fn stand_by(&self, number: usize) -> Result<(), Over> {
        if let Self::Threads(crew) = self {
            crew.leave(number as u8, false);
        }
        self.wait(number)
    }

    /// Something happened that idle CPUs may be waiting for.
    pub(super) fn stir(&self) {
        if let Self::Seeded(baton) = self {
            baton.stir();
        }
    }

    /// Ends the run: whoever waits stops waiting.
    pub(super) fn end(&self) {
        match self {
            Self::Seeded(baton) => baton.end(),
            Self::Threads(crew) => crew.abandon(),
        }
    }

    /// How often another CPU took over; not known of threads.
    pub(super) fn switches(&self) -> u64 {
        match self {
            Self::Seeded(baton) => baton.passed(),
            Self::Threads(_) => 0,
        }
    }

    /// Has `serve` make a gate call for CPU `number`, one CPU at a time.
    ///
    /// # Errors
    /// [`Over`].
    pub(super) fn with_gate<R>(
        &self,
        number: usize,
        floor: &FloorPlan<'_>,
        serve: impl FnOnce(&mut dyn Vcpus) -> R,
    ) -> Result<R, Over> {
        match self {
            Self::Seeded(baton) => Ok(serve(&mut Floor { plan: floor, by: By::Baton(baton) })),
            Self::Threads(crew) => {
                crew.leave(number as u8, true);
                let turn = crew.take(number as u8, || ()).ok_or(Over)?;
                let served = serve(&mut Floor { plan: floor, by: By::Turn(&turn) });
                drop(turn);
                self.wait(number).map(|()| served)
            }
        }
    }
}

/// What a gate call may ask of the CPUs.
pub(super) struct FloorPlan<'m> {
    pub(super) cpus: &'m [Cpu],
    /// The registers of a CPU.
    pub(super) registers: &'m dyn Fn() -> Registers,
}

/// How CPUs are made to stand still.
enum By<'t> {
    /// They do: one has the baton, which is the caller.
    Baton(&'t Baton),
    Turn(&'t Turn<'t, ()>),
    /// Their threads have ended.
    Ended,
}

/// The CPUs while one has the gate.
struct Floor<'f, 'm> {
    plan: &'f FloorPlan<'m>,
    by: By<'f>,
}

/// The CPUs after the run.
pub(super) fn ended<'f>(plan: &'f FloorPlan<'_>) -> impl Vcpus + 'f {
    Floor { plan, by: By::Ended }
}

impl Vcpus for Floor<'_, '_> {
    fn stop(&mut self) {
        if let By::Turn(turn) = self.by {
            turn.stop(&|cpu| self.plan.kick(cpu));
        }
    }

    fn let_on(&mut self, cpus: u8, done: &mut dyn FnMut() -> bool, deadline: Instant) {
        if let By::Turn(turn) = self.by {
            turn.let_on(cpus, done, deadline, &|cpu| self.plan.kick(cpu));
        }
    }

    fn resume(&mut self) {
        if let By::Turn(turn) = self.by {
            turn.resume();
        }
    }

    /// Who stands by for the baton does so between two calls of its platform, where it owes
    /// nothing.
    fn runnable(&self) -> u8 {
        match self.by {
            By::Turn(turn) => turn.runnable(),
            By::Baton(_) | By::Ended => 0,
        }
    }

    fn registers(&self, _: u8) -> Result<Registers, KvmError> {
        Ok((self.plan.registers)())
    }

    fn start(&mut self) {
        match self.by {
            By::Baton(baton) => baton.start(),
            By::Turn(turn) => turn.start(),
            By::Ended => {}
        }
    }

    fn interrupt(&mut self, cpus: u8) -> Result<(), KvmError> {
        for (_, cpu) in (0..).zip(self.plan.cpus).filter(|(number, _)| cpus & (1 << number) != 0) {
            cpu.interrupt();
        }
        Ok(())
    }
}

impl FloorPlan<'_> {
    /// Has a CPU stand by at its next call of the platform.
    fn kick(&self, cpu: u8) {
        if let Some(cpu) = self.cpus.get(usize::from(cpu)) {
            cpu.kick();
        }
    }
}
