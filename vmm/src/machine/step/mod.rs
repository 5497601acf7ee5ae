//! Steps a vCPU: every instruction is looked at before it runs, and what it did is told from memory
//! and registers alone.
//!
//! KVM does not stop behind every instruction: which it passes over depends on the host (handlers of
//! exceptions, what follows a MOV SS, an OUT). So each stop must be where the last instruction may have
//! led; where it is not, the vCPU is lost, and the run cannot pass. What KVMs disagree on most, IRETQ,
//! HLT and the delivery of interrupts, is carried out here.
//!
//! | file | holds |
//! | --- | --- |
//! | `space` | what registers lead to |
//! | `effects` | what an instruction is about to do |
//! | `account` | what it did |
//! | `delivery` | interrupts, returns from them, exceptions |

mod account;
mod delivery;
mod effects;
mod space;
#[cfg(test)]
mod tests;

use crate::events::{MANY_SIGHTINGS, Sightings};
use crate::machine::exit::Exit;
use crate::machine::kvm::KvmError;
use crate::machine::memory::{Memory, MemoryError};
use crate::machine::state::Registers;
use crate::stop::Stop;
use effects::{Foresight, Intended, Special};
use iced_x86::{Formatter, Instruction, IntelFormatter};
use lacuna_abi::addr::Gva;
use lacuna_abi::event::RING_BUSY_WORD;
use lacuna_abi::layout::ring_offset;
use space::Space;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Release};

/// RFLAGS.TF: a trap behind each instruction.
const RFLAGS_TF: u64 = 1 << 8;
/// RFLAGS.IF: interrupts on.
const RFLAGS_IF: u64 = 1 << 9;
/// RFLAGS.DF: strings run downwards.
const RFLAGS_DF: u64 = 1 << 10;
/// MSR of the x2APIC's interrupt command.
const X2APIC_COMMAND: u64 = 0x830;

/// Instructions for which a vCPU runs before it is another's turn.
const QUANTUM: u64 = 2000;
/// More of them for one that owes the host a record.
const GRACE: u64 = 20_000;
/// Stops without progress after which a vCPU is lost.
const MAX_REPEATS: u32 = 1000;
/// Instructions between two looks at whether the run is to stop.
const LOOK_EVERY: u64 = 64;

/// A vCPU that can be stepped.
pub trait Steppable {
    /// Executes an instruction, or what KVM takes for one.
    fn step(&mut self) -> Exit;

    /// Completes a pending port access without executing anything.
    fn complete(&mut self);

    /// The registers after the last step.
    fn stepped(&self) -> Registers;

    /// Puts general registers, RIP and RFLAGS in place.
    ///
    /// # Errors
    /// Why they cannot be put there.
    fn put(&mut self, registers: &Registers) -> Result<(), KvmError>;
}

/// Interrupts that were sent to vCPUs and not delivered yet.
#[derive(Debug)]
pub struct Inbox(Vec<AtomicBool>);

impl Inbox {
    /// Of so many vCPUs.
    #[must_use]
    pub fn new(cpus: usize) -> Self {
        Self((0..cpus).map(|_| AtomicBool::new(false)).collect())
    }

    /// Sends the shootdown interrupt to a vCPU.
    pub fn send(&self, cpu: u8) {
        if let Some(pending) = self.0.get(usize::from(cpu)) {
            pending.store(true, Release);
        }
    }

    fn is_pending(&self, cpu: u8) -> bool {
        self.0.get(usize::from(cpu)).is_some_and(|pending| pending.load(Acquire))
    }

    /// Takes a vCPU's interrupt back, if one was sent.
    pub fn take(&self, cpu: u8) -> bool {
        self.0.get(usize::from(cpu)).is_some_and(|pending| pending.swap(false, AcqRel))
    }
}

/// Where a vCPU was lost.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Lost {
    /// Address of the instruction.
    pub rip: u64,
    /// The instruction, as far as it could be read.
    pub instruction: String,
    /// What is wrong.
    pub why: String,
    /// The call with which the vCPU came out, if it did.
    pub call: Option<Exit>,
}

/// Steps one vCPU.
pub struct Stepper {
    cpu: u8,
    memory: Arc<Memory>,
    sightings: Arc<Sightings>,
    stop: Arc<Stop>,
    foresight: Foresight,
    registers: Registers,
    /// The last instruction holds back interrupts for one more (STI).
    shadow: bool,
    repeats: u32,
    steps: u64,
    /// The call with which the vCPU has just come out.
    call: Option<Exit>,
    lost: Option<Lost>,
}

/// Why a vCPU is lost.
type Why = String;

impl Stepper {
    /// Steps vCPU `cpu`, which has these registers, from here on.
    #[must_use]
    pub fn new(
        cpu: u8,
        registers: Registers,
        memory: Arc<Memory>,
        sightings: Arc<Sightings>,
        stop: Arc<Stop>,
    ) -> Self {
        Self {
            cpu,
            memory,
            sightings,
            stop,
            foresight: Foresight::default(),
            registers,
            shadow: false,
            repeats: 0,
            steps: 0,
            call: None,
            lost: None,
        }
    }

    /// Instructions that were stepped.
    #[must_use]
    pub const fn steps(&self) -> u64 {
        self.steps
    }

    /// Where the vCPU was lost, after [`Exit::Lost`].
    #[must_use]
    pub const fn lost(&self) -> Option<&Lost> {
        self.lost.as_ref()
    }

    /// Runs until the vCPU comes out, it is another's turn, or the run is to stop.
    pub fn run(&mut self, vcpu: &mut impl Steppable, inbox: &Inbox) -> Exit {
        let started = self.steps;
        loop {
            let done = self.steps - started;
            if done.is_multiple_of(LOOK_EVERY) && self.stop.told().is_some() {
                return Exit::Interrupted;
            }
            if done >= QUANTUM && (done >= QUANTUM + GRACE || !self.owes()) {
                return Exit::Interrupted;
            }
            // What was seen is judged before more of it is kept.
            if done > 0 && self.sightings.len() >= MANY_SIGHTINGS {
                return Exit::Interrupted;
            }
            match self.step(vcpu, inbox) {
                Ok(None) => {}
                Ok(Some(exit)) => return exit,
                Err(why) => {
                    let rip = self.registers.rip;
                    let instruction = self.space().decode().map(text).unwrap_or_default();
                    self.lost = Some(Lost { rip, instruction, why, call: self.call });
                    return Exit::Lost;
                }
            }
        }
    }

    /// One instruction; an exit, if it leads to one.
    fn step(&mut self, vcpu: &mut impl Steppable, inbox: &Inbox) -> Result<Option<Exit>, Why> {
        self.call = None;
        if inbox.is_pending(self.cpu) && !self.shadow && self.registers.rflags & RFLAGS_IF != 0 {
            inbox.take(self.cpu);
            self.registers = self.deliver(lacuna_abi::gate::SHOOTDOWN_VECTOR)?;
            put(vcpu, &self.registers)?;
        }
        let before = self.registers;
        let Some(instruction) = self.space().decode() else {
            // A fetch that fails: an exit, or an exception.
            return self.foreign_step(vcpu);
        };
        let intended = self.intend(instruction)?;
        match intended.special {
            Some(Special::Halt) => return self.halt(&instruction, vcpu).map(Some),
            Some(Special::InterruptReturn) => {
                self.registers = self.interrupt_return()?;
                put(vcpu, &self.registers)?;
                self.counted(false);
                return Ok(None);
            }
            Some(Special::OwnInterrupt) => {
                return Err(
                    "it sends an interrupt through the CPU's own controller, which a step \
                            would lose; use gate calls ([guest] shootdown)"
                        .into(),
                );
            }
            _ => {}
        }
        let second = self.second(&intended)?;
        let exit = vcpu.step();
        match exit {
            Exit::PortOut { .. } => {
                vcpu.complete();
                self.call = Some(exit);
            }
            Exit::Stepped | Exit::Interrupted => {}
            other => return Ok(Some(other)),
        }
        let after = vcpu.stepped();
        if exit == Exit::Interrupted && after.rip == before.rip && after.general == before.general {
            return Ok(Some(exit));
        }
        self.registers = after;
        let went_on = self.follow(&before, &intended, second.as_ref(), &after);
        if let Err(why) = went_on {
            // Where it was is what a reader can use.
            self.registers = before;
            return Err(why);
        }
        let sti = instruction.mnemonic() == iced_x86::Mnemonic::Sti;
        // Unless KVM has executed the next instruction with it.
        let alone = after.rip == instruction.next_ip();
        self.counted(sti && before.rflags & RFLAGS_IF == 0 && alone);
        Ok((exit != Exit::Stepped).then_some(exit))
    }

    const fn counted(&mut self, shadow: bool) {
        self.steps += 1;
        self.shadow = shadow;
    }

    /// What the instruction at RIP is about to do.
    fn intend(&mut self, instruction: Instruction) -> Result<Intended, Why> {
        let Self { foresight, registers, memory, .. } = self;
        foresight.of(instruction, &Space { registers, memory }).map_err(str::to_owned)
    }

    /// What the instruction behind this one is about to do, where KVM may execute both in one step.
    fn second(&mut self, first: &Intended) -> Result<Option<Intended>, Why> {
        if !matches!(first.special, Some(Special::Shadow | Special::Out)) {
            return Ok(None);
        }
        let mut registers = self.registers;
        registers.rip = first.instruction.next_ip();
        if first.instruction.mnemonic() == iced_x86::Mnemonic::Pop {
            let rsp = &mut registers.general[Registers::RSP];
            *rsp = rsp.wrapping_add(8);
        }
        let Self { foresight, memory, .. } = self;
        let space = Space { registers: &registers, memory };
        let Some(instruction) = space.decode() else { return Ok(None) };
        let exchanged = first.instruction.mnemonic() == iced_x86::Mnemonic::Swapgs;
        if exchanged && instruction.memory_segment() == iced_x86::Register::GS {
            return Err("what follows it uses the GS that it exchanges".into());
        }
        foresight.of(instruction, &space).map(Some).map_err(str::to_owned)
    }

    /// Notes what was done between two stops, which must be where the instruction led.
    fn follow(
        &mut self,
        before: &Registers,
        intended: &Intended,
        second: Option<&Intended>,
        after: &Registers,
    ) -> Result<(), Why> {
        if intended.flow.allows(after.rip) {
            self.repeats = 0;
            return self.note(before, intended, after);
        }
        // A debug exit is no proof of progress.
        if after.rip == before.rip && after.general == before.general {
            self.repeats += 1;
            return if self.repeats < MAX_REPEATS {
                Ok(())
            } else {
                Err("it is executed and never goes on".into())
            };
        }
        self.repeats = 0;
        if let Some(second) = second.filter(|second| second.flow.allows(after.rip)) {
            if matches!(second.special, Some(Special::Halt | Special::InterruptReturn)) {
                return Err("it was executed together with what follows it".into());
            }
            self.note(before, intended, after)?;
            return self.note(before, second, after);
        }
        if self.is_exception(before, intended, after)? {
            // What was stored before it stays stored.
            return self.note_changed(before, intended, after);
        }
        Err(format!("it leads to {:#x}, where it cannot lead", after.rip))
    }

    /// An instruction that cannot be read: nothing can be said of it but where it leads.
    fn foreign_step(&mut self, vcpu: &mut impl Steppable) -> Result<Option<Exit>, Why> {
        match vcpu.step() {
            Exit::Stepped => Err("it cannot be read and was executed".into()),
            exit => Ok(Some(exit)),
        }
    }

    /// The step's own trap flag is not the guest's: some hosts push it.
    fn hide_trap_flag(&self, va: Gva) {
        let at = self.space().translate(va);
        if let Some(at) = at.filter(|at| at.is_aligned(8) && !self.space().in_pool(*at))
            && let Ok(flags) = self.memory.load(at)
            && flags & RFLAGS_TF != 0
        {
            // Low memory, as the load has shown.
            let _ = self.memory.store(at, flags & !RFLAGS_TF);
        }
    }

    /// HLT: with interrupts on it is another's turn, and then it is over, as after any interrupt.
    fn halt(&mut self, instruction: &Instruction, vcpu: &mut impl Steppable) -> Result<Exit, Why> {
        if self.registers.rflags & RFLAGS_IF == 0 || self.memory.layout().cpus == 1 {
            return Ok(Exit::Halt);
        }
        self.registers.rip = instruction.next_ip();
        put(vcpu, &self.registers)?;
        self.counted(false);
        Ok(Exit::Interrupted)
    }

    /// Whether the CPU says that it may hold a number whose record it has not published.
    fn owes(&self) -> bool {
        let ring = self.memory.layout().shared.gpa.wrapping_add(ring_offset(self.cpu.into()));
        self.memory.load(ring.wrapping_add(8 * RING_BUSY_WORD as u64)).is_ok_and(|busy| busy != 0)
    }

    fn space(&self) -> Space<'_> {
        Space { registers: &self.registers, memory: &self.memory }
    }
}

fn failed(error: MemoryError) -> Why {
    error.to_string()
}

fn put(vcpu: &mut impl Steppable, registers: &Registers) -> Result<(), Why> {
    vcpu.put(registers).map_err(|error| error.to_string())
}

/// An instruction, in Intel syntax.
fn text(instruction: Instruction) -> String {
    let mut text = String::new();
    IntelFormatter::new().format(&instruction, &mut text);
    text
}
