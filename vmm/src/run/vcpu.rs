//! The thread of one vCPU: run, decide, act, until there is an end.

use super::end::{End, GuestEnd, Place};
use crate::gate::{Gate, GateFailure, Served, StoppedCpu};
use crate::image::Image;
use crate::machine::backtrace::{backtrace, place};
use crate::machine::decode::{SealedAccess, View};
use crate::machine::exit::{AccessKind, Action, GuestFault, HostFault, Trouble, decide};
use crate::machine::kvm::{KvmError, Vcpu};
use crate::machine::memory::Memory;
use crate::machine::state::Registers;
use crate::sim::Statistics;
use crate::stop::{Stop, Stopped};
use lacuna_abi::addr::Gva;
use lacuna_abi::gate::{ExceptionReport, vector_name};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Vector of a double fault.
const DOUBLE_FAULT: u64 = 8;
/// Vector of a page fault.
const PAGE_FAULT: u64 = 14;

/// What a vCPU's thread needs.
pub(super) struct Runner {
    pub(super) cpu: u8,
    pub(super) vcpu: Vcpu,
    pub(super) gate: Arc<Mutex<Gate>>,
    pub(super) stop: Arc<Stop>,
    pub(super) image: Arc<Image>,
}

/// What a vCPU's thread leaves.
pub(super) struct Finished {
    pub(super) end: End,
    pub(super) in_guest: Duration,
    pub(super) exits: u64,
    /// Of a simulated machine.
    pub(super) simulation: Option<Statistics>,
}

impl Finished {
    /// An end that no guest had a part in.
    pub(super) const fn without_guest(end: End) -> Self {
        Self { end, in_guest: Duration::ZERO, exits: 0, simulation: None }
    }
}

impl StoppedCpu for Vcpu {
    fn complete(&mut self) {
        Self::complete(self);
    }

    fn registers(&self) -> Result<Registers, KvmError> {
        Self::registers(self)
    }
}

impl Runner {
    /// Runs until there is an end, then checks everything once more.
    pub(super) fn run(mut self) -> Finished {
        let mut in_guest = Duration::ZERO;
        let mut exits = 0;
        let end = loop {
            if let Some(stopped) = self.stop.told() {
                break self.stopped(stopped);
            }
            let entered = Instant::now();
            let exit = self.vcpu.run();
            in_guest += entered.elapsed();
            exits += 1;
            let action = {
                let gate = lock(&self.gate);
                decide(&exit, |frame| gate.stage().denies(frame))
            };
            log::trace!("vCPU {}: {exit:?}: {action:?}", self.cpu);
            match self.act(action) {
                Ok(None) => {}
                Ok(Some(end)) => break end,
                Err(failure) => break failure.into(),
            }
        };
        let end = match end {
            End::Host(_) => end,
            end => {
                let done = matches!(end, End::Exit(0, _));
                let last = lock(&self.gate).finish(self.cpu, &mut self.vcpu, done);
                last.map_or_else(End::from, |()| end)
            }
        };
        Finished { end, in_guest, exits, simulation: None }
    }

    /// Does what an exit calls for; an end, if it is one.
    fn act(&mut self, action: Action) -> Result<Option<End>, GateFailure> {
        let gate = Arc::clone(&self.gate);
        Ok(match action {
            Action::Resume => None,
            Action::Gate(call) => {
                // Bound first: the lock must not be held while the end is described.
                let served = lock(&gate).serve(call, self.cpu, &mut self.vcpu)?;
                match served {
                    Served::Resume => None,
                    Served::Exit(status, counters) => Some(End::Exit(status, counters)),
                    Served::Exception(report) => Some(self.exception(&lock_free(&gate), &report)?),
                    Served::Panic(message) => Some(self.guest_end("panic", message)?),
                }
            }
            Action::UnknownGate(_) => {
                lock(&gate).refuse(self.cpu)?;
                None
            }
            Action::Sealed(gpa, kind) => {
                let registers = self.vcpu.registers()?;
                let access = self.view(&registers, |view| match kind {
                    AccessKind::Unknown => view.identify(gpa),
                    kind => view.explain(gpa, kind),
                });
                Some(self.sealed(access, &registers))
            }
            Action::Decode(trouble) => Some(self.decode(trouble)?),
            Action::TripleFault => Some(self.triple_fault()?),
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

    fn stopped(&mut self, stopped: Stopped) -> End {
        self.vcpu.complete();
        let place = self.vcpu.registers().map(|r| self.place(&r)).unwrap_or_default();
        End::Stopped(stopped, Box::new(place))
    }

    fn sealed(&self, access: SealedAccess, registers: &Registers) -> End {
        let mut place = self.place(registers);
        place.rip = Some(access.rip);
        place.symbol = self.image.symbolise(access.rip);
        End::Sealed(Box::new(access), Box::new(place))
    }

    /// KVM does not say what is wrong: a sealed frame, if the instruction shows one.
    fn decode(&mut self, trouble: Trouble) -> Result<End, GateFailure> {
        let registers = self.vcpu.registers()?;
        if let Some(access) = self.view(&registers, |view| view.find()) {
            return Ok(self.sealed(access, &registers));
        }
        // Nothing that the instruction touches is sealed: perhaps a stack that an event needs.
        if let Some(access) = self.view(&registers, |view| view.find_delivery()) {
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

    fn triple_fault(&mut self) -> Result<End, GateFailure> {
        let mut registers = self.vcpu.registers()?;
        if registers.tss_base == 0 || registers.cr3 == 0 {
            // Some hosts reset the vCPU before they say so: go by its last known state.
            registers = lock(&self.gate).last_registers(self.cpu).unwrap_or(registers);
        }
        if let Some(access) = self.view(&registers, |view| view.find_delivery()) {
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
    fn exception(&mut self, memory: &Memory, report: &ExceptionReport) -> Result<End, GateFailure> {
        let now = self.vcpu.registers()?;
        let mut registers = Registers { rip: report.rip, rflags: report.rflags, ..now };
        registers.general = [
            report.rax, report.rcx, report.rdx, report.rbx, report.rsp, report.rbp, report.rsi,
            report.rdi, report.r8, report.r9, report.r10, report.r11, report.r12, report.r13,
            report.r14, report.r15,
        ];
        if report.vector == PAGE_FAULT
            && let Some(access) = self.view(&registers, |view| view.walk_of(Gva(report.cr2)))
        {
            return Ok(self.sealed(access, &registers));
        }
        // A delivery that a sealed stack stopped ends in a double fault, which has another stack.
        if report.vector == DOUBLE_FAULT
            && let Some(access) = self.view(&registers, |view| view.find_delivery())
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
            if let Some(what) = place(memory.layout(), Gva(report.cr2)) {
                message += &format!(" ({what})");
            }
        }
        let place = self.place(&registers);
        Ok(End::Guest(Box::new(GuestEnd { kind: "exception", message, place })))
    }

    fn guest_end(&mut self, kind: &'static str, message: String) -> Result<End, GateFailure> {
        let place = self.place(&self.vcpu.registers()?);
        Ok(End::Guest(Box::new(GuestEnd { kind, message, place })))
    }

    fn place(&self, registers: &Registers) -> Place {
        let memory = lock_free(&self.gate);
        let inspect = |at, into: &mut [u8]| memory.inspect(at, into);
        let frame = registers.general[Registers::RBP];
        let (root, rip) = (registers.root(), registers.rip);
        Place {
            cpu: self.cpu,
            rip: Some(rip),
            symbol: self.image.symbolise(rip),
            backtrace: backtrace(&self.image, &*memory, &inspect, root, rip, frame),
        }
    }

    fn view<R>(&self, registers: &Registers, f: impl FnOnce(&View<'_, Memory>) -> R) -> R {
        let gate = lock(&self.gate);
        let memory = gate.memory();
        f(&View {
            registers,
            tables: memory,
            inspect: &|at, into| memory.inspect(at, into),
            denied: &|frame| gate.stage().denies(frame),
            function: &|address| self.image.function(address).map(|(start, _)| start),
        })
    }
}

/// The gate; after a panic under its lock what it holds can still be read.
fn lock(gate: &Mutex<Gate>) -> MutexGuard<'_, Gate> {
    gate.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Guest memory, without keeping the lock.
fn lock_free(gate: &Mutex<Gate>) -> Arc<Memory> {
    lock(gate).shared_memory()
}
