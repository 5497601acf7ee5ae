//! The part that talks to KVM: the VM, its memory slots, its vCPUs.
#![allow(unsafe_code)]

mod probe;

pub use probe::ProbeVcpu;

use crate::doctor::{self, HostError};
use crate::machine::exit::Exit;
use crate::machine::memory::Memory;
use crate::machine::state::Registers;
use crate::machine::step::Steppable;
use crate::second_stage::Slots;
use kvm_bindings::{
    KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP,
    KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_RUNNABLE, kvm_enable_cap, kvm_guest_debug,
    kvm_guest_debug_arch, kvm_mp_state, kvm_msi, kvm_regs, kvm_segment, kvm_sregs,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, SyncReg, VcpuExit, VcpuFd, VmFd};
use lacuna_abi::addr::{FrameRange, Gpa, Gva, PAGE_SIZE};
use lacuna_abi::layout::{CPU_DATA, MAIN_STACK};
use std::io;
use std::ops::RangeInclusive;
use std::sync::Arc;

/// Slot of the kernel image.
const IMAGE_SLOT: u32 = 0;
/// Slot of the table pool.
const POOL_SLOT: u32 = 1;
/// Slot of the other low regions.
const LOW_SLOT: u32 = 2;
/// First slot of the zone, behind that of the probe's memory; those behind it belong to the `memslot` back end.
pub const ZONE_SLOT: u32 = 4;

/// CR0: protection, extension type, numeric error, write protect, paging.
pub const CR0: u64 = 1 << 0 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31;
/// CR4: physical-address extension, global pages.
pub const CR4: u64 = 1 << 5 | 1 << 7;
/// EFER: long mode enabled and active, no-execute.
pub const EFER: u64 = 1 << 8 | 1 << 10 | 1 << 11;

/// Where messages to local APICs are written; the destination's number stands from bit 12 on (SDM
/// volume 3, "Message Signalled Interrupts").
const MESSAGE_ADDRESS: u32 = 0xfee0_0000;

/// Nested virtualisation is not passed on: a guest of the guest would have tables and cached
/// translations that no rule sees.
const CPUID_1_ECX_VMX: u32 = 1 << 5;
const CPUID_80000001_ECX_SVM: u32 = 1 << 2;

/// KVM could not do something.
#[derive(Debug, thiserror::Error)]
#[error("KVM cannot {what}: {error}")]
pub struct KvmError {
    /// What was tried.
    pub what: &'static str,
    /// What KVM said.
    pub error: io::Error,
}

trait What<T> {
    fn what(self, what: &'static str) -> Result<T, KvmError>;
}

impl<T> What<T> for Result<T, kvm_ioctls::Error> {
    fn what(self, what: &'static str) -> Result<T, KvmError> {
        self.map_err(|error| KvmError { what, error: io::Error::from_raw_os_error(error.errno()) })
    }
}

/// A virtual machine with its memory.
pub struct Vm {
    kvm: Kvm,
    vm: Arc<VmFd>,
    memory: Arc<Memory>,
}

impl Vm {
    /// Makes a VM and gives it its memory.
    ///
    /// # Errors
    /// [`KvmError`] says which step KVM refused.
    pub fn new(kvm: Kvm, memory: Arc<Memory>) -> Result<Self, KvmError> {
        let vm = kvm.create_vm().what("create a virtual machine")?;
        // Where KVM keeps a task-state segment of its own on Intel: between low memory and the
        // local APIC.
        vm.set_tss_address(0xfffb_d000).what("set the address of its task-state segment")?;
        vm.create_irq_chip().what("create the interrupt controllers")?;
        let vm = Self { kvm, vm: Arc::new(vm), memory };
        let layout = *vm.memory.layout();
        let regions = [
            (IMAGE_SLOT, layout.image.gpa, layout.image.end()),
            (POOL_SLOT, layout.pool.gpa, layout.pool.end()),
            (LOW_SLOT, layout.shared.gpa, layout.low_end()),
        ];
        for (slot, start, end) in regions {
            let region =
                lacuna_abi::layout::Region { gpa: start, va: Gva(0), len: end.0 - start.0 };
            let address = vm.memory.host_address(&region);
            set_slot(&vm.vm, slot, start, region.len, address)?;
        }
        vm.slots()
            .set(ZONE_SLOT, Some(layout.zone_frames()))
            .map_err(|error| KvmError { what: "give the guest its memory", error })?;
        Ok(vm)
    }

    /// The zone's slots, for the `memslot` back end.
    #[must_use]
    pub fn slots(&self) -> ZoneSlots {
        ZoneSlots { vm: Arc::clone(&self.vm), memory: Arc::clone(&self.memory) }
    }

    /// Number of slots that KVM has for the zone.
    #[must_use]
    pub fn zone_slots(&self) -> u32 {
        u32::try_from(self.kvm.get_nr_memslots()).unwrap_or(32).saturating_sub(ZONE_SLOT)
    }

    /// A way to interrupt the VM's vCPUs.
    #[must_use]
    pub fn interrupts(&self) -> Interrupts {
        Interrupts { vm: Arc::clone(&self.vm), _memory: Arc::clone(&self.memory) }
    }

    /// Checks that the VM has what guests need; the VM may have less than `/dev/kvm`.
    ///
    /// # Errors
    /// [`HostError`] names the capability and the remedy.
    pub fn require(&self) -> Result<(), HostError> {
        doctor::require(&self.vm)
    }

    /// Checks that the VM's vCPUs can be stepped.
    ///
    /// # Errors
    /// As [`Self::require`].
    pub fn require_steps(&self) -> Result<(), HostError> {
        doctor::require_steps(&self.vm)
    }

    /// Makes vCPU `cpu`, ready to start at `entry` with the tables of `root`.
    ///
    /// # Errors
    /// [`KvmError`] says which step KVM refused.
    pub fn vcpu(&self, cpu: u8, entry: Gva, root: Gpa) -> Result<Vcpu, KvmError> {
        let fd = self.bare_vcpu(cpu)?;
        let mut sregs = fd.get_sregs().what("read the system registers")?;
        long_mode(&mut sregs, cpu, root);
        fd.set_sregs(&sregs).what("start the vCPU in long mode")?;
        let regs = kvm_regs {
            rip: entry.0,
            // As behind a CALL: the return address' place lies below an aligned stack.
            rsp: MAIN_STACK.top(cpu.into()).0 - 8,
            rdi: cpu.into(),
            rflags: 2,
            ..kvm_regs::default()
        };
        fd.set_regs(&regs).what("set the registers")?;
        // KVM has all but the first wait for another one's start-up interrupt.
        fd.set_mp_state(RUNNABLE).what("make the vCPU runnable")?;
        Ok(Vcpu { fd, _memory: Arc::clone(&self.memory) })
    }

    /// A vCPU as KVM makes it, with the CPUID that guests see. KVM's own registers, by which it would
    /// write to memory that the guest names, page tables too, are not offered, and refused.
    fn bare_vcpu(&self, cpu: u8) -> Result<VcpuFd, KvmError> {
        let fd = self.vm.create_vcpu(cpu.into()).what("create a vCPU")?;
        let refuse = kvm_enable_cap {
            cap: KVM_CAP_ENFORCE_PV_FEATURE_CPUID,
            args: [1, 0, 0, 0],
            ..kvm_enable_cap::default()
        };
        fd.enable_cap(&refuse).what("refuse guests what CPUID does not offer")?;
        let mut cpuid =
            self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).what("say what CPUID offers")?;
        cpuid.retain(|entry| !PARAVIRTUAL.contains(&entry.function));
        for entry in cpuid.as_mut_slice() {
            match entry.function {
                1 => {
                    entry.ebx = entry.ebx & 0x00ff_ffff | u32::from(cpu) << 24;
                    entry.ecx &= !CPUID_1_ECX_VMX;
                }
                0x8000_0001 => entry.ecx &= !CPUID_80000001_ECX_SVM,
                0xb | 0x1f => entry.edx = cpu.into(),
                _ => {}
            }
        }
        fd.set_cpuid2(&cpuid).what("set CPUID")?;
        Ok(fd)
    }
}

/// Leaves of CPUID that a hypervisor has for itself.
const PARAVIRTUAL: RangeInclusive<u32> = 0x4000_0000..=0x4fff_ffff;

/// Where a local APIC's state has the interrupts that wait (SDM volume 3, "Local APIC Register Address
/// Map": IRR).
const LAPIC_REQUESTS: usize = 0x200;

/// Executes instructions when it is run, whatever else was asked of it before.
const RUNNABLE: kvm_mp_state = kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE };

/// System registers of a CPU in 64-bit mode (SDM volume 3, "IA-32e Mode Operation").
fn long_mode(sregs: &mut kvm_sregs, cpu: u8, root: Gpa) {
    let code = kvm_segment {
        limit: u32::MAX,
        selector: 0x08,
        type_: 0xb,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..kvm_segment::default()
    };
    let data = kvm_segment { selector: 0x10, type_: 0x3, l: 0, db: 1, ..code };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.ss, sregs.fs) = (data, data, data, data);
    sregs.gs = kvm_segment { base: CPU_DATA.start(cpu.into()).0, ..data };
    // The task register must hold a busy task-state segment; the guest loads its own.
    sregs.tr = kvm_segment { limit: 103, type_: 0xb, present: 1, ..kvm_segment::default() };
    sregs.cr0 = CR0;
    sregs.cr3 = root.0;
    sregs.cr4 = CR4;
    sregs.efer = EFER;
}

/// The zone's memory slots.
pub struct ZoneSlots {
    vm: Arc<VmFd>,
    memory: Arc<Memory>,
}

impl Slots for ZoneSlots {
    fn set(&mut self, slot: u32, frames: Option<FrameRange>) -> io::Result<()> {
        let zone = self.memory.layout().zone;
        let (start, len) = match frames {
            Some(frames) => (frames.start().gpa(), frames.count() * PAGE_SIZE),
            None => (zone.gpa, 0),
        };
        let offset = start.offset_from(zone.gpa).filter(|o| o.saturating_add(len) <= zone.len);
        let offset = offset.ok_or(io::ErrorKind::InvalidInput)?;
        let address = self.memory.zone_mapping().address() + offset;
        set_slot(&self.vm, slot, start, len, address).map_err(|error| error.error)
    }
}

/// Puts memory of this process behind a slot; a length of 0 deletes it. All callers pass parts of
/// [`Memory`]'s mappings.
fn set_slot(vm: &VmFd, slot: u32, gpa: Gpa, len: u64, address: u64) -> Result<(), KvmError> {
    let region = kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr: gpa.0,
        memory_size: len,
        userspace_addr: address,
    };
    // SAFETY: the callers, all in this module, pass memory that `Memory` maps, and every owner of
    // a descriptor of the VM or of a vCPU also owns the `Memory` and drops it last, so that the
    // mapping outlives the slot. No Rust reference into that memory exists; the guest may write it
    // at any time.
    unsafe { vm.set_user_memory_region(region) }.what("change a memory slot")
}

/// Sends interrupts to the vCPUs of a VM.
#[derive(Clone)]
pub struct Interrupts {
    vm: Arc<VmFd>,
    /// As [`Vcpu`].
    _memory: Arc<Memory>,
}

impl Interrupts {
    /// Sends a fixed interrupt with this vector to vCPU `cpu`.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn send(&self, cpu: u8, vector: u8) -> Result<(), KvmError> {
        let address_lo = MESSAGE_ADDRESS | u32::from(cpu) << 12;
        let message = kvm_msi { address_lo, data: vector.into(), ..kvm_msi::default() };
        match self.vm.signal_msi(message) {
            // KVM found no local APIC for it, because the guest has switched that one off: as on
            // hardware, the interrupt is lost.
            Err(error) if error.errno() == libc::EPERM => Ok(()),
            sent => sent.what("interrupt a vCPU").map(|_taken| ()),
        }
    }
}

/// What has a vCPU come out behind each instruction.
const SINGLE_STEP: kvm_guest_debug = kvm_guest_debug {
    control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP,
    pad: 0,
    arch: kvm_guest_debug_arch { debugreg: [0; 8] },
};

impl Steppable for Vcpu {
    fn step(&mut self) -> Exit {
        // Some hosts forget it at an exit that is no debug exit.
        if let Err(error) = self.fd.set_guest_debug(&SINGLE_STEP) {
            return Exit::Error(error.errno());
        }
        self.run()
    }

    fn complete(&mut self) {
        Self::complete(self);
    }

    fn stepped(&self) -> Registers {
        let all = self.fd.sync_regs();
        Registers::from_kvm(&all.regs, &all.sregs)
    }

    fn put(&mut self, registers: &Registers) -> Result<(), KvmError> {
        let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] =
            registers.general;
        let (rip, rflags) = (registers.rip, registers.rflags);
        let regs = kvm_regs {
            rax,
            rcx,
            rdx,
            rbx,
            rsp,
            rbp,
            rsi,
            rdi,
            r8,
            r9,
            r10,
            r11,
            r12,
            r13,
            r14,
            r15,
            rip,
            rflags,
        };
        self.fd.set_regs(&regs).what("set the registers")
    }
}

/// One virtual CPU.
pub struct Vcpu {
    fd: VcpuFd,
    /// A vCPU's descriptor keeps the VM alive, so it keeps the VM's memory too.
    _memory: Arc<Memory>,
}

impl Vcpu {
    /// Runs the vCPU until it leaves for the VMM.
    pub fn run(&mut self) -> Exit {
        match self.fd.run() {
            Ok(exit) => match exit {
                VcpuExit::IoOut(port, data) => {
                    let mut value = [0; 4];
                    let len = data.len().min(4);
                    value[..len].copy_from_slice(&data[..len]);
                    Exit::PortOut { port, value: u32::from_le_bytes(value), len: data.len() }
                }
                VcpuExit::IoIn(port, data) => {
                    data.fill(0xff);
                    Exit::PortIn { port }
                }
                VcpuExit::MmioRead(gpa, data) => {
                    data.fill(0xff);
                    Exit::MmioRead { gpa: Gpa(gpa) }
                }
                VcpuExit::MmioWrite(gpa, _) => Exit::MmioWrite { gpa: Gpa(gpa) },
                VcpuExit::Hlt => Exit::Halt,
                VcpuExit::Shutdown => Exit::Shutdown,
                VcpuExit::InternalError => Exit::InternalError { suberror: self.suberror() },
                VcpuExit::FailEntry(reason, _) => Exit::FailEntry { reason },
                VcpuExit::MemoryFault { gpa, .. } => Exit::MemoryFault { gpa: Gpa(gpa) },
                VcpuExit::SystemEvent(kind, _) => Exit::SystemEvent { kind },
                VcpuExit::Intr => Exit::Interrupted,
                VcpuExit::Debug(_) => Exit::Stepped,
                _ => Exit::Unexpected(self.fd.get_kvm_run().exit_reason),
            },
            Err(error) => match error.errno() {
                libc::EINTR | libc::EAGAIN => Exit::Interrupted,
                libc::EFAULT => Exit::Fault,
                number => Exit::Error(number),
            },
        }
    }

    /// Completes a pending port or memory access without running the guest: registers and memory
    /// are then one consistent picture.
    pub fn complete(&mut self) {
        self.fd.set_kvm_immediate_exit(1);
        let _ = self.fd.run();
        self.fd.set_kvm_immediate_exit(0);
    }

    /// The registers.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn registers(&self) -> Result<Registers, KvmError> {
        let regs = self.fd.get_regs().what("read the registers")?;
        let sregs = self.fd.get_sregs().what("read the system registers")?;
        Ok(Registers::from_kvm(&regs, &sregs))
    }

    /// Has KVM hand out the registers at every exit, for [`Steppable`].
    ///
    /// # Errors
    /// [`KvmError`] if KVM cannot step.
    pub fn prepare_to_step(&mut self) -> Result<Registers, KvmError> {
        self.fd.set_guest_debug(&SINGLE_STEP).what("step a vCPU")?;
        self.fd.set_sync_valid_reg(SyncReg::Register);
        self.fd.set_sync_valid_reg(SyncReg::SystemRegister);
        self.registers()
    }

    /// Has the vCPU run without stopping behind each instruction.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn run_freely(&mut self) -> Result<(), KvmError> {
        self.fd.set_guest_debug(&kvm_guest_debug::default()).what("step a vCPU no more")?;
        self.fd.clear_sync_valid_reg(SyncReg::Register);
        self.fd.clear_sync_valid_reg(SyncReg::SystemRegister);
        Ok(())
    }

    /// Takes an interrupt with this vector out of the vCPU's interrupt controller, if one waits there.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn take_interrupt(&mut self, vector: u8) -> Result<bool, KvmError> {
        let mut lapic = self.fd.get_lapic().what("read the interrupt controller")?;
        // A bit each in eight registers of 32, 16 bytes apart.
        let at = LAPIC_REQUESTS + usize::from(vector / 32) * 16 + usize::from(vector % 32 / 8);
        let bit = 1_i8.wrapping_shl(u32::from(vector % 8));
        let pending = lapic.regs[at] & bit != 0;
        if pending {
            lapic.regs[at] &= !bit;
            self.fd.set_lapic(&lapic).what("change the interrupt controller")?;
        }
        Ok(pending)
    }

    fn suberror(&mut self) -> u32 {
        let run = self.fd.get_kvm_run();
        // SAFETY: the exit reason was KVM_EXIT_INTERNAL_ERROR, so this is the member that KVM
        // filled in; it is plain data.
        unsafe { run.__bindgen_anon_1.internal.suberror }
    }
}
