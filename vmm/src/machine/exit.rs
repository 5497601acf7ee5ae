//! From a vCPU's exit to what is to be done: one pure function.
//!
//! KVM's exits are first reduced to [`Exit`], a small enum of plain values; [`decide`] knows
//! nothing of KVM and is tested with exits made by hand.

use lacuna_abi::addr::{Gfn, Gpa};
use lacuna_abi::gate::{Call, GATE_PORT};

/// Why `KVM_RUN` came back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exit {
    /// OUT to this port; the value's low bytes, and how many.
    PortOut {
        /// Port.
        port: u16,
        /// Value.
        value: u32,
        /// Bytes.
        len: usize,
    },
    /// IN from this port; the buffer has been filled with ones.
    PortIn {
        /// Port.
        port: u16,
    },
    /// A load from an address without memory; the buffer has been filled with ones.
    MmioRead {
        /// Address.
        gpa: Gpa,
    },
    /// A store to an address without memory.
    MmioWrite {
        /// Address.
        gpa: Gpa,
    },
    /// HLT that KVM does not wait for itself.
    Halt,
    /// Triple fault.
    Shutdown,
    /// KVM gave up; 1 is an instruction that it cannot emulate, 3 a delivery that failed.
    InternalError {
        /// `suberror` of `kvm_run`.
        suberror: u32,
    },
    /// The processor refused to run the guest.
    FailEntry {
        /// The hardware's reason.
        reason: u64,
    },
    /// KVM reports an access to memory that it cannot provide (`KVM_EXIT_MEMORY_FAULT`).
    MemoryFault {
        /// First address.
        gpa: Gpa,
    },
    /// `KVM_RUN` returned `EFAULT` and nothing else.
    Fault,
    /// A step is over.
    Stepped,
    /// Stepping has lost track of the vCPU.
    Lost,
    /// A signal or `immediate_exit` interrupted the run.
    Interrupted,
    /// The guest asks for a reset or shutdown.
    SystemEvent {
        /// Type.
        kind: u32,
    },
    /// `KVM_RUN` failed with this error number.
    Error(i32),
    /// An exit that this VMM does not ask for, by its number.
    Unexpected(u32),
}

/// How a sealed frame was touched.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AccessKind {
    /// A load.
    Read,
    /// A store.
    Write,
    /// An instruction fetch.
    Fetch,
    /// A walk of the guest's page tables.
    PageWalk,
    /// The delivery of an exception or interrupt.
    EventDelivery,
    /// It cannot be told.
    Unknown,
}

impl AccessKind {
    /// Name in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Fetch => "fetch",
            Self::PageWalk => "page-walk",
            Self::EventDelivery => "event-delivery",
            Self::Unknown => "unknown",
        }
    }
}

/// What to do about an exit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Serve this gate call.
    Gate(Call),
    /// A gate call with a number that no call has: answer so.
    UnknownGate(u32),
    /// Run again.
    Resume,
    /// Say where the vCPU was lost, and end.
    Lost,
    /// The guest touched a sealed frame; the exit says where and how.
    Sealed(Gpa, AccessKind),
    /// Perhaps a sealed frame: decode the instruction and walk the tables.
    Decode(Trouble),
    /// Look at the stacks that exceptions are delivered on, then end.
    TripleFault,
    /// The guest did something that ends it.
    GuestError(GuestFault),
    /// The host could not run the guest.
    HostError(HostFault),
}

/// What KVM could not do, when it does not say why.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Trouble {
    /// An instruction that it cannot emulate, or an event that it cannot deliver.
    Emulation(u32),
    /// An access to memory that is not there.
    Fault,
}

/// A guest's fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GuestFault {
    /// It halted with no interrupt to come.
    Halted,
    /// A load or store where there is neither memory nor a device.
    NoMemory(Gpa, AccessKind),
    /// A port without a device.
    NoDevice(u16),
    /// It asked the machine to stop or restart.
    SystemEvent(u32),
}

/// The host's failure.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HostFault {
    /// The processor refused to run the guest.
    FailEntry(u64),
    /// `KVM_RUN` failed.
    Run(i32),
    /// An exit of a kind that was not asked for.
    Unexpected(u32),
}

/// Whether the guest only says that it waits for another CPU.
#[must_use]
pub fn is_yield(exit: &Exit) -> bool {
    *exit == Exit::PortOut { port: GATE_PORT, value: Call::Yield as u32, len: 4 }
}

/// Decides what an exit calls for. `denied` says of a frame whether the second stage closed it.
#[must_use]
pub fn decide(exit: &Exit, denied: impl Fn(Gfn) -> bool) -> Action {
    let access = |gpa: Gpa, kind| {
        if denied(gpa.frame()) {
            Action::Sealed(gpa, kind)
        } else {
            Action::GuestError(GuestFault::NoMemory(gpa, kind))
        }
    };
    match *exit {
        Exit::PortOut { port: GATE_PORT, value, len: 4 } => {
            Call::from_number(value).map_or(Action::UnknownGate(value), Action::Gate)
        }
        Exit::PortOut { port, .. } | Exit::PortIn { port } => {
            Action::GuestError(GuestFault::NoDevice(port))
        }
        Exit::MmioRead { gpa } => access(gpa, AccessKind::Read),
        Exit::MmioWrite { gpa } => access(gpa, AccessKind::Write),
        Exit::MemoryFault { gpa } if denied(gpa.frame()) => {
            Action::Sealed(gpa, AccessKind::Unknown)
        }
        Exit::MemoryFault { .. } | Exit::Fault => Action::Decode(Trouble::Fault),
        Exit::InternalError { suberror } => Action::Decode(Trouble::Emulation(suberror)),
        Exit::Shutdown => Action::TripleFault,
        Exit::Halt => Action::GuestError(GuestFault::Halted),
        Exit::Interrupted | Exit::Stepped => Action::Resume,
        Exit::Lost => Action::Lost,
        Exit::SystemEvent { kind } => Action::GuestError(GuestFault::SystemEvent(kind)),
        Exit::FailEntry { reason } => Action::HostError(HostFault::FailEntry(reason)),
        Exit::Error(number) => Action::HostError(HostFault::Run(number)),
        Exit::Unexpected(number) => Action::HostError(HostFault::Unexpected(number)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLOSED: Gpa = Gpa(0x1_0000_5000);

    fn decided(exit: Exit) -> Action {
        decide(&exit, |frame| frame == CLOSED.frame())
    }

    #[test]
    fn a_gate_call_is_served_and_an_unknown_one_answered() {
        let out = |value, len| Exit::PortOut { port: GATE_PORT, value, len };
        assert_eq!(decided(out(2, 4)), Action::Gate(Call::Ops));
        assert_eq!(decided(out(999, 4)), Action::UnknownGate(999));
        let short = decided(out(2, 1));
        assert_eq!(short, Action::GuestError(GuestFault::NoDevice(GATE_PORT)));
    }

    #[test]
    fn an_access_to_a_closed_frame_is_a_sealed_access() {
        let inside = CLOSED.wrapping_add(0x123);
        assert_eq!(
            decided(Exit::MmioRead { gpa: inside }),
            Action::Sealed(inside, AccessKind::Read)
        );
        assert_eq!(
            decided(Exit::MmioWrite { gpa: inside }),
            Action::Sealed(inside, AccessKind::Write)
        );
        assert_eq!(
            decided(Exit::MemoryFault { gpa: inside }),
            Action::Sealed(inside, AccessKind::Unknown)
        );
    }

    #[test]
    fn an_access_to_nothing_is_the_guests_fault() {
        let gpa = Gpa(0xd000_0000);
        let fault = |kind| Action::GuestError(GuestFault::NoMemory(gpa, kind));
        assert_eq!(decided(Exit::MmioRead { gpa }), fault(AccessKind::Read));
        assert_eq!(decided(Exit::MmioWrite { gpa }), fault(AccessKind::Write));
        let port = decided(Exit::PortIn { port: 0x60 });
        assert_eq!(port, Action::GuestError(GuestFault::NoDevice(0x60)));
    }

    #[test]
    fn what_kvm_does_not_explain_is_decoded() {
        assert_eq!(decided(Exit::Fault), Action::Decode(Trouble::Fault));
        let elsewhere = Exit::MemoryFault { gpa: Gpa(0x5000) };
        assert_eq!(decided(elsewhere), Action::Decode(Trouble::Fault));
        assert_eq!(
            decided(Exit::InternalError { suberror: 1 }),
            Action::Decode(Trouble::Emulation(1))
        );
    }

    #[test]
    fn the_rest_ends_or_resumes() {
        assert_eq!(decided(Exit::Interrupted), Action::Resume);
        assert_eq!(decided(Exit::Stepped), Action::Resume);
        assert_eq!(decided(Exit::Lost), Action::Lost);
        assert_eq!(decided(Exit::Shutdown), Action::TripleFault);
        assert_eq!(decided(Exit::Halt), Action::GuestError(GuestFault::Halted));
        let fail = decided(Exit::FailEntry { reason: 7 });
        assert_eq!(fail, Action::HostError(HostFault::FailEntry(7)));
        assert_eq!(decided(Exit::Error(22)), Action::HostError(HostFault::Run(22)));
        assert_eq!(decided(Exit::Unexpected(42)), Action::HostError(HostFault::Unexpected(42)));
        let reset = decided(Exit::SystemEvent { kind: 2 });
        assert_eq!(reset, Action::GuestError(GuestFault::SystemEvent(2)));
    }
}
