//! KVM's device: opening it, and the capabilities that matter.

use super::error::HostError;
use kvm_ioctls::{Cap, Kvm, VmFd};
use lacuna_abi::MAX_CPUS;
use std::ffi::{CString, OsStr};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// KVM's device.
pub const DEVICE: &str = "/dev/kvm";
/// The version of KVM's API; there has been no other since Linux 2.6.22.
const API_VERSION: i32 = 12;

/// A capability and what it is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Capability {
    /// Its name in KVM's documentation.
    pub name: &'static str,
    /// Its number.
    pub cap: Cap,
    /// Smallest answer that is enough.
    pub minimum: i32,
    /// Whether `lacuna run` needs it.
    pub required: bool,
    /// What needs it.
    pub needed_for: &'static str,
    /// What to do where it is missing.
    pub remedy: &'static str,
}

const KERNEL: &str = "use a newer kernel, Linux 6.1 at least";
const X86: &str = "use a kernel with the full x86 KVM (CONFIG_KVM_INTEL or CONFIG_KVM_AMD)";
const NOT_NEEDED: &str = "nothing to do for this version";

const fn required(
    name: &'static str,
    cap: Cap,
    minimum: i32,
    needed_for: &'static str,
    remedy: &'static str,
) -> Capability {
    Capability { name, cap, minimum, required: true, needed_for, remedy }
}

const fn optional(name: &'static str, cap: Cap, needed_for: &'static str) -> Capability {
    Capability { name, cap, minimum: 1, required: false, needed_for, remedy: NOT_NEEDED }
}

/// What stepping needs.
const STEPS: [&str; 2] = ["KVM_CAP_SYNC_REGS", "KVM_CAP_SET_GUEST_DEBUG"];

const fn for_steps(name: &'static str, cap: Cap) -> Capability {
    let needed_for = "single-stepping (--mediate step)";
    Capability { name, cap, minimum: 1, required: false, needed_for, remedy: KERNEL }
}

/// The capabilities that matter.
pub const CAPABILITIES: &[Capability] = &[
    required("KVM_CAP_USER_MEMORY", Cap::UserMemory, 1, "guest memory", KERNEL),
    required(
        "KVM_CAP_IMMEDIATE_EXIT",
        Cap::ImmediateExit,
        1,
        "stopping a vCPU between two instructions",
        KERNEL,
    ),
    required("KVM_CAP_IRQCHIP", Cap::Irqchip, 1, "interrupts", X86),
    required("KVM_CAP_EXT_CPUID", Cap::ExtCpuid, 1, "the guest's CPUID", X86),
    required("KVM_CAP_SET_TSS_ADDR", Cap::SetTssAddr, 1, "guests on Intel processors", X86),
    required("KVM_CAP_MP_STATE", Cap::MpState, 1, "starting vCPUs", X86),
    required("KVM_CAP_MAX_VCPUS", Cap::MaxVcpus, MAX_CPUS as i32, "several vCPUs", KERNEL),
    required("KVM_CAP_NR_MEMSLOTS", Cap::NrMemslots, 16, "the guest's regions", KERNEL),
    optional(
        "KVM_CAP_SIGNAL_MSI",
        Cap::SignalMsi,
        "shootdowns by gate call ([guest] shootdown = \"gate\")",
    ),
    optional(
        "KVM_CAP_MEMORY_FAULT_INFO",
        Cap::MemoryFaultInfo,
        "the address of a sealed access straight from KVM (otherwise the instruction is decoded)",
    ),
    for_steps(STEPS[0], Cap::SyncRegs),
    for_steps(STEPS[1], Cap::SetGuestDebug),
    optional("KVM_CAP_READONLY_MEM", Cap::ReadonlyMem, "read-only slots (a later version)"),
    optional("KVM_CAP_GUEST_MEMFD", Cap::GuestMemfd, "memory that the host cannot read (later)"),
];

/// What KVM answers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KvmFacts {
    /// Version of its API.
    pub api_version: i32,
    /// Its answers, in the order of [`CAPABILITIES`].
    pub values: Vec<i32>,
}

/// Opens [`DEVICE`] and checks its version.
///
/// # Errors
/// [`HostError`], with the remedy.
pub fn open_kvm() -> Result<Kvm, HostError> {
    open_at(Path::new(DEVICE))
}

/// Opens KVM's device at `path`.
pub(super) fn open_at(path: &Path) -> Result<Kvm, HostError> {
    let name = CString::new(OsStr::as_bytes(path.as_os_str()))
        .map_err(|error| HostError::opening(path, error.into()))?;
    let kvm = Kvm::new_with_path(&name)
        .map_err(|error| HostError::opening(path, io::Error::from_raw_os_error(error.errno())))?;
    match kvm.get_api_version() {
        API_VERSION => Ok(kvm),
        found => Err(HostError::ApiVersion { path: path.to_owned(), found }),
    }
}

/// Asks KVM for all of [`CAPABILITIES`]. A virtual machine is asked, not the device: it may have
/// fewer.
pub(super) fn facts(kvm: &Kvm) -> Result<KvmFacts, HostError> {
    let vm = kvm
        .create_vm()
        .map_err(|error| HostError::CreateVm(io::Error::from_raw_os_error(error.errno())))?;
    let values = CAPABILITIES.iter().map(|capability| vm.check_extension_int(capability.cap));
    Ok(KvmFacts { api_version: kvm.get_api_version(), values: values.collect() })
}

/// Checks that a virtual machine has every capability that `lacuna run` needs.
///
/// # Errors
/// [`HostError::Missing`] names the first that is not there.
pub fn require(vm: &VmFd) -> Result<(), HostError> {
    let lacks = |c: &&Capability| c.required && vm.check_extension_int(c.cap) < c.minimum;
    CAPABILITIES.iter().find(lacks).map_or(Ok(()), |capability| Err(capability.into()))
}

/// Checks that a virtual machine's vCPUs can be stepped.
///
/// # Errors
/// As [`require`].
pub fn require_steps(vm: &VmFd) -> Result<(), HostError> {
    let lacks = |c: &&Capability| STEPS.contains(&c.name) && vm.check_extension_int(c.cap) < 1;
    CAPABILITIES.iter().find(lacks).map_or(Ok(()), |capability| Err(capability.into()))
}
