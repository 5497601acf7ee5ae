//! The thread of one vCPU: run, decide, act, until there is an end.

use super::crew::{Crew, Turn};
use super::end::{End, GuestEnd, Place};
use super::station::{Floor, Station};
use super::stepping::Stepping;
use super::threads::Threads;
use crate::events::{MANY_SIGHTINGS, Sightings};
use crate::gate::{Gate, GateFailure, Served, Vcpus};
use crate::image::Image;
use crate::machine::backtrace::{backtrace, place};
use crate::machine::decode::{SealedAccess, View};
use crate::machine::exit::{
    AccessKind, Action, Exit, GuestFault, HostFault, Trouble, decide, is_yield,
};
use crate::machine::kvm::{Interrupts, KvmError};
use crate::machine::memory::Memory;
use crate::machine::state::Registers;
use crate::machine::step::{Lost, Stepper};
use crate::sim::Statistics;
use crate::stop::{Stop, Stopped};
use lacuna_abi::addr::Gva;
use lacuna_abi::gate::{Call, ExceptionReport, SHOOTDOWN_VECTOR, vector_name};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Vector of a double fault.
const DOUBLE_FAULT: u64 = 8;
/// Vector of a page fault.
const PAGE_FAULT: u64 = 14;
/// RFLAGS.IF: interrupts on.
const RFLAGS_IF: u64 = 1 << 9;
/// Yields in a row after which a vCPU that waits for another leaves the processor for a while.
const RESTLESS: u32 = 4;
/// For how long, at first and at most: for so long an interrupt for it may have to wait.
const REST: Duration = Duration::from_micros(50);
const LONG_REST: Duration = Duration::from_micros(200);

/// What a vCPU's thread reports when it stands still: its registers, if they can be read.
pub(super) type Report = Option<Standing>;

/// Registers of a vCPU that stands still.
#[derive(Clone, Copy)]
pub(super) struct Standing {
    pub(super) registers: Registers,
    /// Whether they are those of a reset that KVM made, and not what the guest had.
    pub(super) was_reset: bool,
}

/// What a vCPU's thread needs.
pub(super) struct Runner {
    pub(super) cpu: u8,
    pub(super) station: Station,
    pub(super) crew: Arc<Crew<Report>>,
    pub(super) threads: Arc<Threads>,
    pub(super) interrupts: Interrupts,
    /// Whether vCPUs are stepped, where a part of the run is.
    pub(super) stepping: Option<Arc<Stepping>>,
    pub(super) sightings: Arc<Sightings>,
    pub(super) gate: Arc<Mutex<Gate>>,
    pub(super) memory: Arc<Memory>,
    pub(super) stop: Arc<Stop>,
    pub(super) image: Arc<Image>,
}

/// What a vCPU's thread leaves.
#[derive(Default)]
pub(super) struct Finished {
    /// The end of the run, if this vCPU ended it.
    pub(super) end: Option<End>,
    pub(super) in_guest: Duration,
    pub(super) exits: u64,
    /// Instructions that were stepped, and how long that took.
    pub(super) stepped: (u64, Duration),
    /// Of a simulated machine.
    pub(super) simulation: Option<Statistics>,
}

impl Runner {
    /// Runs until there is an end, here or on another vCPU.
    pub(super) fn run(mut self) -> Finished {
        let crew = Arc::clone(&self.crew);
        let _presence = crew.join(self.cpu);
        let mut finished = Finished::default();
        let mut yields = 0_u32;
        while crew.enter(self.cpu, || self.station.report()) {
            if let Err(error) = self.switch(&mut finished) {
                finished.end = Some(End::Host(error.to_string()));
                crew.abandon();
                break;
            }
            let entered = Instant::now();
            let exit = self.station.run(self.stepping.as_deref());
            let took = entered.elapsed();
            finished.in_guest += took;
            if self.is_stepped() {
                finished.stepped.1 += took;
            }
            finished.exits += 1;
            crew.leave(self.cpu, self.station.is_calling() && !is_yield(&exit));
            // vCPU 0 never sleeps nor ends before the others: it is the one that stops the run.
            let stopped = self.stop.told().filter(|_| self.cpu == 0);
            if self.is_stepped() && (exit == Exit::Interrupted || is_yield(&exit)) {
                crew.hand_on(self.cpu);
            }
            let much = self.sightings.len() >= MANY_SIGHTINGS || self.station.has_new_control();
            if stopped.is_none() && exit == Exit::Interrupted && !much {
                continue;
            }
            if stopped.is_none() && is_yield(&exit) && !much {
                yields = yields.saturating_add(1);
                if !self.is_stepped() {
                    rest(yields);
                }
                continue;
            }
            yields = 0;
            let Some(turn) = crew.take(self.cpu, || self.station.report()) else { break };
            if let Some(end) = self.with_gate(&turn, &exit, stopped) {
                turn.end();
                finished.end = Some(end);
                break;
            }
        }
        finished.stepped.0 += self.station.stepper().map_or(0, Stepper::steps);
        finished
    }

    const fn is_stepped(&self) -> bool {
        self.station.stepper().is_some()
    }

    /// Begins or ends to step this vCPU, if that is asked.
    fn switch(&mut self, finished: &mut Finished) -> Result<(), KvmError> {
        let Some(stepping) = &self.stepping else { return Ok(()) };
        match (stepping.is_on(), self.station.stepper().is_some()) {
            (true, false) => {
                let (cpu, memory, stop) = (self.cpu, &self.memory, &self.stop);
                let sightings = &self.sightings;
                let stepper = |registers| {
                    let (memory, sightings) = (Arc::clone(memory), Arc::clone(sightings));
                    Stepper::new(cpu, registers, memory, sightings, Arc::clone(stop))
                };
                if self.station.begin_steps(SHOOTDOWN_VECTOR, stepper)? {
                    stepping.inbox.send(cpu);
                }
            }
            (false, true) => {
                finished.stepped.0 += self.station.end_steps();
                if stepping.inbox.take(self.cpu) {
                    self.interrupts.send(self.cpu, SHOOTDOWN_VECTOR)?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// What to do while this vCPU has the gate; the end, if it is one, after everything has been
    /// checked once more.
    fn with_gate(
        &mut self,
        turn: &Turn<'_, Report>,
        exit: &Exit,
        stopped: Option<Stopped>,
    ) -> Option<End> {
        let gate = Arc::clone(&self.gate);
        let mut gate = lock(&gate);
        let acted = match stopped {
            Some(stopped) => Ok(Some(self.stopped(stopped))),
            None => {
                let action = decide(exit, |frame| gate.stage().denies(frame));
                log::trace!("vCPU {}: {exit:?}: {action:?}", self.cpu);
                self.act(action, &mut gate, turn)
            }
        };
        match acted {
            Ok(None) => None,
            Ok(Some(end @ (End::Host(_) | End::Lost(_)))) => Some(end),
            Ok(Some(end)) => {
                let done = matches!(end, End::Exit(0, _));
                let last = gate.finish(self.cpu, &mut self.floor(turn), done);
                Some(last.map_or_else(End::from, |()| end))
            }
            Err(failure) => Some(failure.into()),
        }
    }

    fn floor<'f>(&'f mut self, turn: &'f Turn<'f, Report>) -> Floor<'f> {
        Floor {
            cpu: self.cpu,
            turn,
            station: &mut self.station,
            threads: &self.threads,
            interrupts: &self.interrupts,
            stepping: self.stepping.as_deref(),
        }
    }

    /// Does what an exit calls for; an end, if it is one.
    fn act(
        &mut self,
        action: Action,
        gate: &mut Gate,
        turn: &Turn<'_, Report>,
    ) -> Result<Option<End>, GateFailure> {
        Ok(match action {
            Action::Resume => {
                if self.is_stepped() {
                    gate.take_sightings(self.cpu)?;
                }
                gate.look(self.cpu, &self.floor(turn))?;
                None
            }
            Action::Lost => Some(self.lost_or_last_words(gate, turn)?),
            Action::Gate(call) => match gate.serve(call, self.cpu, &mut self.floor(turn))? {
                Served::Resume => None,
                Served::Exit(status, counters) => Some(End::Exit(status, counters)),
                Served::Exception(report) => Some(self.exception(gate, &report)?),
                Served::Panic(message) => Some(self.guest_end("panic", message)?),
                Served::Unanswered { missing, waited } => {
                    Some(self.unanswered(turn, missing, waited)?)
                }
            },
            Action::UnknownGate(_) => {
                gate.refuse(self.cpu)?;
                None
            }
            Action::Sealed(gpa, kind) => {
                let registers = self.station.registers()?;
                let access = self.view(gate, &registers, |view| match kind {
                    AccessKind::Unknown => view.identify(gpa),
                    kind => view.explain(gpa, kind),
                });
                Some(self.sealed(access, &registers))
            }
            Action::Decode(trouble) => Some(self.decode(gate, trouble)?),
            Action::TripleFault => Some(self.triple_fault(gate)?),
            Action::GuestError(fault) => Some(self.guest_fault(fault)?),
            Action::HostError(fault) => Some(End::Host(match fault {
                HostFault::FailEntry(reason) => {
                    format!("the processor refused to run the guest (reason {reason:#x})")
                }
                HostFault::Run(number) => {
                    let error = std::io::Error::from_raw_os_error(number);
                    format!("KVM cannot run the guest: {error}")
                }
                HostFault::Unexpected(number) => {
                    format!("KVM reports exit {number}, which this VMM did not ask for")
                }
            })),
        })
    }

    /// Stepping lost track. Where the processor runs the handler of an exception without a stop, the vCPU
    /// may have come out to report the guest's end: that says more than where it was lost.
    fn lost_or_last_words(
        &mut self,
        gate: &mut Gate,
        turn: &Turn<'_, Report>,
    ) -> Result<End, GateFailure> {
        let lost = self.station.stepper().and_then(Stepper::lost);
        let call = lost.and_then(|lost| lost.call).map(|exit| decide(&exit, |_| false));
        let why = self.lost();
        let Some(Action::Gate(call @ (Call::Exception | Call::Panic))) = call else {
            return Ok(End::Lost(why));
        };
        gate.inconclusive(why.clone());
        Ok(match gate.serve(call, self.cpu, &mut self.floor(turn))? {
            Served::Exception(report) => self.exception(gate, &report)?,
            Served::Panic(message) => self.guest_end("panic", message)?,
            _ => End::Lost(why),
        })
    }

    /// Where stepping lost track.
    fn lost(&self) -> String {
        let lost = self.station.stepper().and_then(Stepper::lost);
        let Some(Lost { rip, instruction, why, .. }) = lost else {
            return "stepping lost track of a vCPU".to_owned();
        };
        let function = self.image.symbolise(*rip).unwrap_or_else(|| "no known function".into());
        format!(
            "stepping lost track of vCPU {} at {rip:#x} in {function}, at the instruction \
             \"{instruction}\": {why}; what the guest did from there on is not known",
            self.cpu
        )
    }

    fn stopped(&mut self, stopped: Stopped) -> End {
        let standing = self.station.report();
        let place =
            standing.map(|standing| self.place(self.cpu, &standing.registers)).unwrap_or_default();
        End::Stopped(stopped, Box::new(place))
    }

    fn sealed(&self, access: SealedAccess, registers: &Registers) -> End {
        let mut place = self.place(self.cpu, registers);
        place.rip = Some(access.rip);
        place.symbol = self.image.symbolise(access.rip);
        End::Sealed(Box::new(access), Box::new(place))
    }

    /// KVM does not say what is wrong: a sealed frame, if the instruction shows one.
    fn decode(&mut self, gate: &Gate, trouble: Trouble) -> Result<End, GateFailure> {
        let registers = self.station.registers()?;
        if let Some(access) = self.view(gate, &registers, |view| view.find()) {
            return Ok(self.sealed(access, &registers));
        }
        // Nothing that the instruction touches is sealed: perhaps a stack that an event needs.
        if let Some(access) = self.view(gate, &registers, |view| view.find_delivery()) {
            return Ok(self.sealed(access, &registers));
        }
        let message = match trouble {
            Trouble::Emulation(suberror) => format!(
                "KVM cannot emulate the instruction at {:#x} (internal error {suberror}), and no \
                 operand of it lies in a sealed frame",
                registers.rip
            ),
            Trouble::Fault => format!(
                "KVM cannot provide memory that the instruction at {:#x} needs, and no operand of \
                 it lies in a sealed frame",
                registers.rip
            ),
        };
        self.guest_end("emulation", message)
    }

    fn triple_fault(&mut self, gate: &Gate) -> Result<End, GateFailure> {
        let mut registers = self.station.registers()?;
        if registers.tss_base == 0 || registers.cr3 == 0 {
            // Some hosts reset the vCPU before they say so: go by its last known state.
            registers = gate.last_registers(self.cpu).unwrap_or(registers);
        }
        if let Some(access) = self.view(gate, &registers, |view| view.find_delivery()) {
            return Ok(self.sealed(access, &registers));
        }
        let message = "triple fault: an exception could not be delivered, nor the double fault \
                       that followed; look at IDT, TSS and stacks";
        self.guest_end("triple-fault", message.into())
    }

    fn guest_fault(&mut self, fault: GuestFault) -> Result<End, GateFailure> {
        let (kind, message) = match fault {
            GuestFault::Halted => ("halted", "the guest halted with nothing to wake it".into()),
            GuestFault::NoMemory(gpa, kind) => (
                "no-memory",
                format!("{} of guest-physical {gpa}, where there is no memory", kind.name()),
            ),
            GuestFault::NoDevice(port) => {
                ("no-device", format!("access to port {port:#x}, where there is no device"))
            }
            GuestFault::SystemEvent(number) => {
                ("system-event", format!("the guest asked for system event {number}"))
            }
        };
        self.guest_end(kind, message)
    }

    /// An exception that the guest reports about itself. Behind a page fault there may be a walk
    /// through a sealed frame: some hosts turn that into a fault of the guest.
    fn exception(&mut self, gate: &Gate, report: &ExceptionReport) -> Result<End, GateFailure> {
        let now = self.station.registers()?;
        let mut registers = Registers { rip: report.rip, rflags: report.rflags, ..now };
        registers.general = [
            report.rax, report.rcx, report.rdx, report.rbx, report.rsp, report.rbp, report.rsi,
            report.rdi, report.r8, report.r9, report.r10, report.r11, report.r12, report.r13,
            report.r14, report.r15,
        ];
        if report.vector == PAGE_FAULT
            && let Some(access) = self.view(gate, &registers, |view| view.walk_of(Gva(report.cr2)))
        {
            return Ok(self.sealed(access, &registers));
        }
        // A delivery that a sealed stack stopped ends in a double fault, which has another stack.
        if report.vector == DOUBLE_FAULT
            && let Some(access) = self.view(gate, &registers, |view| view.find_delivery())
        {
            return Ok(self.sealed(access, &registers));
        }
        let mut message = format!(
            "{} at rip {:#x}, error code {:#x}",
            vector_name(report.vector),
            report.rip,
            report.error
        );
        if report.vector == PAGE_FAULT {
            message += &format!(", address {:#x}", report.cr2);
            if let Some(what) = place(self.memory.layout(), Gva(report.cr2)) {
                message += &format!(" ({what})");
            }
        }
        let place = self.place(self.cpu, &registers);
        Ok(End::Guest(Box::new(GuestEnd { kind: "exception", message, place })))
    }

    fn guest_end(&mut self, kind: &'static str, message: String) -> Result<End, GateFailure> {
        let place = self.place(self.cpu, &self.station.registers()?);
        Ok(End::Guest(Box::new(GuestEnd { kind, message, place })))
    }

    /// CPUs have not answered a shootdown of this one: says where the first of them is.
    fn unanswered(
        &mut self,
        turn: &Turn<'_, Report>,
        missing: u8,
        waited: Duration,
    ) -> Result<End, GateFailure> {
        let mut floor = self.floor(turn);
        floor.stop();
        let mut places = Vec::new();
        for cpu in (0..8).filter(|cpu| missing & 1 << cpu != 0) {
            places.push((cpu, floor.registers(cpu)?));
        }
        let mut message = String::new();
        for (cpu, registers) in &places {
            let place = self.place(*cpu, registers);
            let at = place.symbol.unwrap_or_else(|| "no known function".into());
            let interrupts = if registers.rflags & RFLAGS_IF == 0 { "off" } else { "on" };
            message += &format!(
                "CPU {cpu} has not answered a shootdown of CPU {} for {} s; it is in {at}, at rip \
                 {:#x}, with interrupts {interrupts}. ",
                self.cpu,
                waited.as_secs(),
                registers.rip,
            );
        }
        message += "A CPU must answer within [limits] shootdown_s: it may not loop or wait with \
                    interrupts off";
        let place = places.first().map(|(cpu, r)| self.place(*cpu, r)).unwrap_or_default();
        Ok(End::Guest(Box::new(GuestEnd { kind: "shootdown", message, place })))
    }

    /// Where a vCPU with these registers is.
    fn place(&self, cpu: u8, registers: &Registers) -> Place {
        let inspect = |at, into: &mut [u8]| self.memory.inspect(at, into);
        let frame = registers.general[Registers::RBP];
        let (root, rip) = (registers.root(), registers.rip);
        Place {
            cpu,
            rip: Some(rip),
            symbol: self.image.symbolise(rip),
            backtrace: backtrace(&self.image, &*self.memory, &inspect, root, rip, frame),
        }
    }

    fn view<R>(
        &self,
        gate: &Gate,
        registers: &Registers,
        f: impl FnOnce(&View<'_, Memory>) -> R,
    ) -> R {
        let memory = &*self.memory;
        f(&View {
            registers,
            tables: memory,
            inspect: &|at, into| memory.inspect(at, into),
            denied: &|frame| gate.stage().denies(frame),
            function: &|address| self.image.function(address).map(|(start, _)| start),
        })
    }
}

/// Gives the processor to others: the longer, the more yields in a row there were.
fn rest(yields: u32) {
    if yields < RESTLESS {
        std::thread::yield_now();
    } else {
        std::thread::sleep((REST * (yields / RESTLESS)).min(LONG_REST));
    }
}

/// The gate, which only the vCPU that has the turn locks while the machine runs; after a panic
/// under its lock what it holds can still be read.
fn lock(gate: &Mutex<Gate>) -> MutexGuard<'_, Gate> {
    gate.lock().unwrap_or_else(PoisonError::into_inner)
}
