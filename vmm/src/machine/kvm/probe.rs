//! The vCPU that touches frames on purpose.
#![forbid(unsafe_code)]

use super::{Exit, KvmError, RUNNABLE, Vcpu, Vm, What, long_mode, set_slot};
use crate::machine::probe::{PROBE_BYTES, PROBE_START, ProbeEnd, ProbeStart};
use kvm_bindings::{KVM_VCPUEVENT_VALID_NMI_PENDING, kvm_regs, kvm_sregs, kvm_vcpu_events};
use std::sync::Arc;

/// Slot of the probe vCPU's own memory.
const PROBE_SLOT: u32 = 3;
/// IA32_APIC_BASE: the local APIC is there. Without it no interrupt of any kind reaches the vCPU (SDM
/// volume 3, "Local APIC Status and Location").
const APIC_ENABLED: u64 = 1 << 11;

impl Vm {
    /// Makes the probe vCPU, with memory of its own that is closed to the guest. Its number follows
    /// those of the guest's vCPUs, and it has no local APIC that they could send anything to.
    ///
    /// # Errors
    /// [`KvmError`] says which step KVM refused.
    pub fn probe_vcpu(&self) -> Result<ProbeVcpu, KvmError> {
        let probe = self.memory.probe();
        set_slot(&self.vm, PROBE_SLOT, PROBE_START, PROBE_BYTES, probe.address())?;
        let cpu = u8::try_from(self.memory.layout().cpus).unwrap_or(u8::MAX);
        let fd = self.bare_vcpu(cpu)?;
        let mut sregs = fd.get_sregs().what("read the system registers")?;
        long_mode(&mut sregs, 0, PROBE_START);
        // Whatever it is interrupted by, it shuts down rather than run anything.
        (sregs.idt.base, sregs.idt.limit) = (0, 0);
        (sregs.gdt.base, sregs.gdt.limit) = (0, 0);
        sregs.apic_base &= !APIC_ENABLED;
        // From the start: what a guest sent it before its first touch would be pending.
        fd.set_sregs(&sregs).what("take the probe vCPU's local APIC away")?;
        Ok(ProbeVcpu { vcpu: Vcpu { fd, _memory: Arc::clone(&self.memory) }, sregs })
    }
}

/// The vCPU that touches frames on purpose. It runs nothing that the guest wrote.
pub struct ProbeVcpu {
    vcpu: Vcpu,
    /// What its system registers hold before each touch.
    sregs: kvm_sregs,
}

impl ProbeVcpu {
    /// Puts it into the state in which it starts, whatever came before: 64-bit mode on the tables of
    /// its own memory, nothing pending.
    ///
    /// # Errors
    /// [`KvmError`] says which step KVM refused.
    pub fn reset(&mut self) -> Result<(), KvmError> {
        self.vcpu.complete();
        let fd = &self.vcpu.fd;
        fd.set_mp_state(RUNNABLE).what("make the probe vCPU runnable")?;
        fd.set_sregs(&self.sregs).what("set the probe vCPU's system registers")?;
        self.drop_events()
    }

    /// Has it execute from `rip` on, with interrupts off, until it leaves. An access that was not
    /// answered is completed first, into a register that is then overwritten, and a pending
    /// exception is dropped.
    ///
    /// # Errors
    /// [`KvmError`] says which step KVM refused.
    pub fn run(&mut self, start: &ProbeStart) -> Result<(Exit, ProbeEnd), KvmError> {
        self.vcpu.complete();
        self.drop_events()?;
        let ProbeStart { rip, rax, rbx, rdx } = *start;
        let regs = kvm_regs { rip, rax, rbx, rdx, rflags: 2, ..kvm_regs::default() };
        self.vcpu.fd.set_regs(&regs).what("set the probe vCPU's registers")?;
        let exit = self.vcpu.run();
        let regs = self.vcpu.fd.get_regs().what("read the probe vCPU's registers")?;
        Ok((exit, ProbeEnd { rip: regs.rip, rax: regs.rax }))
    }

    fn drop_events(&self) -> Result<(), KvmError> {
        let flags = KVM_VCPUEVENT_VALID_NMI_PENDING;
        let none = kvm_vcpu_events { flags, ..kvm_vcpu_events::default() };
        self.vcpu.fd.set_vcpu_events(&none).what("clear the probe vCPU's events")
    }
}
