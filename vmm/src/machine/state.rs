//! A vCPU's registers as plain data.

use iced_x86::Register;
use kvm_bindings::{kvm_regs, kvm_sregs};
use lacuna_abi::addr::Gpa;
use lacuna_abi::paging::Entry;
use serde::Serialize;

/// General and system registers of a vCPU that is not running.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Registers {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15: in the order of their encoding.
    pub general: [u64; 16],
    /// RIP.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
    /// Selector in CS.
    pub cs: u16,
    /// Selector in SS.
    pub ss: u16,
    /// Base of FS.
    pub fs_base: u64,
    /// Base of GS.
    pub gs_base: u64,
    /// Base of the task-state segment.
    pub tss_base: u64,
    /// Base of the interrupt descriptor table.
    pub idt_base: u64,
    /// Limit of the interrupt descriptor table.
    pub idt_limit: u64,
    /// Base of the global descriptor table.
    pub gdt_base: u64,
    /// Limit of the global descriptor table.
    pub gdt_limit: u64,
}

impl Registers {
    /// RCX.
    pub const RCX: usize = 1;
    /// RSI.
    pub const RSI: usize = 6;
    /// RDI.
    pub const RDI: usize = 7;
    /// RSP.
    pub const RSP: usize = 4;
    /// RBP.
    pub const RBP: usize = 5;

    /// From KVM's structures.
    #[must_use]
    pub fn from_kvm(regs: &kvm_regs, sregs: &kvm_sregs) -> Self {
        Self {
            general: [
                regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi,
                regs.r8, regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
            ],
            rip: regs.rip,
            rflags: regs.rflags,
            cr0: sregs.cr0,
            cr2: sregs.cr2,
            cr3: sregs.cr3,
            cr4: sregs.cr4,
            efer: sregs.efer,
            cs: sregs.cs.selector,
            ss: sregs.ss.selector,
            fs_base: sregs.fs.base,
            gs_base: sregs.gs.base,
            tss_base: sregs.tr.base,
            idt_base: sregs.idt.base,
            idt_limit: sregs.idt.limit.into(),
            gdt_base: sregs.gdt.base,
            gdt_limit: sregs.gdt.limit.into(),
        }
    }

    /// What a register holds in 64-bit mode, or the base of a segment; `None` for one that is not
    /// known here.
    #[must_use]
    pub fn value(&self, register: Register) -> Option<u64> {
        Some(match register {
            Register::CS | Register::DS | Register::ES | Register::SS => 0,
            Register::FS => self.fs_base,
            Register::GS => self.gs_base,
            Register::RIP => self.rip,
            _ if register.is_gpr() => {
                let full = register.full_register();
                let value = *self.general.get(full.number())?;
                let second = [Register::AH, Register::CH, Register::DH, Register::BH];
                match register.size() {
                    8 => value,
                    4 => value & 0xffff_ffff,
                    2 => value & 0xffff,
                    _ if second.contains(&register) => value >> 8 & 0xff,
                    _ => value & 0xff,
                }
            }
            _ => return None,
        })
    }

    /// Physical address of the root.
    #[must_use]
    pub const fn root(&self) -> Gpa {
        Gpa(self.cr3 & Entry::ADDRESS)
    }
}
