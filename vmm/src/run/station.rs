//! A vCPU where its thread stands, and with it the others, as its gate call sees them.

use super::crew::Turn;
use super::stepping::Stepping;
use super::threads::Threads;
use super::vcpu::{Report, Standing};
use crate::gate::Vcpus;
use crate::machine::exit::Exit;
use crate::machine::kvm::{Interrupts, KvmError, Vcpu};
use crate::machine::state::Registers;
use crate::machine::step::{Steppable, Stepper};
use lacuna_abi::gate::SHOOTDOWN_VECTOR;
use std::io;
use std::time::Instant;

/// CR0.PE: set from the start on, and clear after a reset.
const CR0_PE: u64 = 1;

/// A vCPU, and whether it came out of the guest to make a call that is not completed yet.
pub(super) struct Station {
    vcpu: Vcpu,
    /// What steps it, if anything does.
    stepper: Option<Stepper>,
    /// It was stepped until now: KVM still stops it behind the next instruction.
    still_stops: bool,
    calling: bool,
    shut_down: bool,
    /// Under direct paging: CR0 and CR3 when they were last looked at; `None` if nobody asks.
    control: Option<[u64; 2]>,
}

impl From<Vcpu> for Station {
    fn from(vcpu: Vcpu) -> Self {
        let (stepper, control) = (None, None);
        Self { vcpu, stepper, still_stops: false, calling: false, shut_down: false, control }
    }
}

impl Station {
    /// Runs the vCPU until it comes out.
    pub(super) fn run(&mut self, stepping: Option<&Stepping>) -> Exit {
        let exit = match self.stepper.as_mut().zip(stepping) {
            Some((stepper, stepping)) => stepper.run(&mut self.vcpu, &stepping.inbox),
            None => self.run_freely(),
        };
        self.calling = matches!(exit, Exit::PortOut { .. });
        self.shut_down = exit == Exit::Shutdown;
        exit
    }

    /// Runs the vCPU unstepped. A processor may owe it a debug exception of the last step: that is taken
    /// by one more stop, since without one it would be the guest's.
    fn run_freely(&mut self) -> Exit {
        if self.still_stops {
            let exit = self.vcpu.step();
            if exit == Exit::Interrupted {
                return exit;
            }
            if let Err(error) = self.vcpu.run_freely() {
                return Exit::Error(error.error.raw_os_error().unwrap_or(0));
            }
            self.still_stops = false;
            if exit != Exit::Stepped {
                return exit;
            }
        }
        self.vcpu.run()
    }

    /// Steps the vCPU from here on; whether an interrupt with this vector waits for it in its own
    /// controller, which is taken out there.
    ///
    /// # Errors
    /// [`KvmError`] if KVM cannot.
    pub(super) fn begin_steps(
        &mut self,
        vector: u8,
        stepper: impl FnOnce(Registers) -> Stepper,
    ) -> Result<bool, KvmError> {
        if self.calling {
            self.vcpu.complete();
        }
        self.still_stops = false;
        let pending = self.vcpu.take_interrupt(vector)?;
        self.stepper = Some(stepper(self.vcpu.prepare_to_step()?));
        Ok(pending)
    }

    /// Steps the vCPU no more; how many instructions were stepped.
    pub(super) fn end_steps(&mut self) -> u64 {
        self.still_stops = true;
        self.stepper.take().map_or(0, |stepper| stepper.steps())
    }

    /// Looks at CR0 and CR3 at every exit from here on.
    pub(super) const fn watch_control(&mut self) {
        self.control = Some([0; 2]);
    }

    /// Whether CR0 or CR3 is not what it was at the last exit, or cannot be read: then the gate is to
    /// look.
    pub(super) fn has_new_control(&mut self) -> bool {
        let Some(known) = &mut self.control else { return false };
        let now = self.vcpu.registers().map(|registers| [registers.cr0, registers.cr3]);
        now.map_or(true, |now| std::mem::replace(known, now) != now)
    }

    /// What steps the vCPU.
    pub(super) const fn stepper(&self) -> Option<&Stepper> {
        self.stepper.as_ref()
    }

    /// Whether it came out with an OUT, which a call is.
    pub(super) const fn is_calling(&self) -> bool {
        self.calling
    }

    /// Completes a pending call, so that registers and memory are one consistent picture, and reads
    /// the registers. Any other pending access ends the run and is left as it is: to complete it
    /// would be to answer it.
    pub(super) fn report(&mut self) -> Report {
        if self.calling {
            self.vcpu.complete();
        }
        let registers = self.vcpu.registers().ok()?;
        Some(Standing { registers, was_reset: self.was_reset(&registers) })
    }

    /// The registers as they are.
    ///
    /// # Errors
    /// [`KvmError`].
    pub(super) fn registers(&self) -> Result<Registers, KvmError> {
        self.vcpu.registers()
    }

    /// KVM on AMD resets a vCPU that has shut down before it says so.
    const fn was_reset(&self, registers: &Registers) -> bool {
        self.shut_down && registers.cr0 & CR0_PE == 0
    }
}

/// All vCPUs, while `cpu` has the gate.
pub(super) struct Floor<'f> {
    pub(super) cpu: u8,
    pub(super) turn: &'f Turn<'f, Report>,
    pub(super) station: &'f mut Station,
    pub(super) threads: &'f Threads,
    pub(super) interrupts: &'f Interrupts,
    /// Whether vCPUs are stepped, where a part of the run is.
    pub(super) stepping: Option<&'f Stepping>,
}

impl Vcpus for Floor<'_> {
    fn stop(&mut self) {
        self.turn.stop(&|cpu| self.threads.kick(cpu));
        self.station.report();
    }

    fn let_on(&mut self, cpus: u8, done: &mut dyn FnMut() -> bool, deadline: Instant) {
        self.turn.let_on(cpus, done, deadline, &|cpu| self.threads.kick(cpu));
    }

    fn resume(&mut self) {
        self.turn.resume();
    }

    fn runnable(&self) -> u8 {
        self.turn.runnable()
    }

    fn registers(&self, cpu: u8) -> Result<Registers, KvmError> {
        if cpu == self.cpu {
            return self.station.registers();
        }
        let reported = self.turn.report(cpu).flatten().map(|standing| standing.registers);
        let error = || io::Error::other("it did not say where it stands");
        reported.ok_or_else(|| KvmError { what: "read another vCPU's registers", error: error() })
    }

    fn was_reset(&self, cpu: u8) -> bool {
        if cpu == self.cpu {
            return self.station.registers().is_ok_and(|now| self.station.was_reset(&now));
        }
        self.turn.report(cpu).flatten().is_some_and(|standing| standing.was_reset)
    }

    fn start(&mut self) {
        self.turn.start();
    }

    fn step(&mut self, on: bool) {
        if let Some(stepping) = self.stepping {
            stepping.set(on);
            self.turn.one_at_a_time(on);
        }
    }

    fn interrupt(&mut self, cpus: u8) -> Result<(), KvmError> {
        let stepping = self.stepping.filter(|stepping| stepping.is_on());
        (0..8).filter(|cpu| cpus & 1 << cpu != 0).try_for_each(|cpu| match stepping {
            Some(stepping) => {
                stepping.inbox.send(cpu);
                Ok(())
            }
            None => self.interrupts.send(cpu, SHOOTDOWN_VECTOR),
        })
    }
}
