//! Privileged instructions.
#![allow(unsafe_code)]

use core::arch::asm;
use core::arch::x86_64::{__cpuid, __cpuid_count};
use lacuna_abi::addr::Gva;
use lacuna_abi::gate::{Call, GATE_PORT};

/// CR4.PGE: global pages.
const CR4_PGE: u64 = 1 << 7;
/// CR4.PCIDE: process-context identifiers.
pub(crate) const CR4_PCIDE: u64 = 1 << 17;
/// CPUID: PCID in ECX of leaf 1, INVPCID in EBX of leaf 7.
const CPUID_1_ECX_PCID: u32 = 1 << 17;
const CPUID_7_EBX_INVPCID: u32 = 1 << 10;
/// Bit 63 of a MOV to CR3: nothing is invalidated.
const CR3_NO_FLUSH: u64 = 1 << 63;
/// RFLAGS.IF: interrupts on.
const RFLAGS_IF: u64 = 1 << 9;
/// IA32_APIC_BASE, and in it: enabled, x2APIC mode (SDM volume 3, "Extended XAPIC (x2APIC)").
const APIC_BASE: u32 = 0x1b;
const APIC_ENABLED_X2APIC: u32 = 1 << 11 | 1 << 10;
/// x2APIC MSRs: end of interrupt, spurious-interrupt vector, interrupt command.
const X2APIC_EOI: u32 = 0x80b;
const X2APIC_SPURIOUS: u32 = 0x80f;
const X2APIC_COMMAND: u32 = 0x830;
/// In the spurious-interrupt vector register: enabled by software.
const APIC_SOFTWARE_ENABLED: u32 = 1 << 8;
/// Vector of interrupts that turn out to be none.
pub(crate) const SPURIOUS_VECTOR: u8 = 0xff;

/// Number of this CPU, from its per-CPU data.
#[inline]
pub(crate) fn number() -> usize {
    let number: usize;
    // SAFETY: the VMM points GS at the CPU's data area before the first instruction, nothing
    // changes it, and its first word holds the number.
    unsafe {
        asm!("mov {}, gs:[0]", out(reg) number, options(nostack, preserves_flags, readonly));
    }
    number
}

/// Turns interrupts off; says whether they were on.
#[inline]
pub(crate) fn interrupts_off() -> bool {
    let flags: u64;
    // SAFETY: reading RFLAGS through the stack and clearing IF change no memory that Rust knows of.
    unsafe { asm!("pushfq", "pop {}", "cli", out(reg) flags) };
    flags & RFLAGS_IF != 0
}

/// Turns interrupts on.
#[inline]
pub(crate) fn interrupts_on() {
    // SAFETY: every vector that can arrive has a handler on a stack of its own.
    unsafe { asm!("sti", options(nostack)) };
}

/// Whether interrupts are on.
#[inline]
pub(crate) fn interrupts_are_on() -> bool {
    let flags: u64;
    // SAFETY: reads RFLAGS through the stack.
    unsafe { asm!("pushfq", "pop {}", out(reg) flags, options(preserves_flags)) };
    flags & RFLAGS_IF != 0
}

fn write_msr(msr: u32, high: u32, low: u32) {
    // SAFETY: the callers, all here, write registers of this CPU's interrupt controller; the
    // vectors that they make arrive have handlers.
    unsafe {
        asm!("wrmsr", in("ecx") msr, in("edx") high, in("eax") low, options(nostack));
    }
}

/// Switches this CPU's interrupt controller on, in x2APIC mode.
pub(crate) fn enable_x2apic() {
    let (low, high): (u32, u32);
    // SAFETY: reading IA32_APIC_BASE has no effect.
    unsafe {
        asm!("rdmsr", in("ecx") APIC_BASE, out("eax") low, out("edx") high, options(nostack));
    }
    write_msr(APIC_BASE, high, low | APIC_ENABLED_X2APIC);
    write_msr(X2APIC_SPURIOUS, 0, APIC_SOFTWARE_ENABLED | u32::from(SPURIOUS_VECTOR));
}

/// Sends a fixed interrupt to the CPU whose interrupt controller has this number; it finds what was
/// stored before. A WRMSR to the controller waits for no store, other than one to most registers
/// (SDM volume 3, "x2APIC Register Access Semantics"): the fences do. Without them the other CPU may
/// look before it can see what it was interrupted for, and there is no second interrupt.
pub(crate) fn send_interrupt(apic: u32, vector: u8) {
    // SAFETY: as `write_msr`; the fences only order. MFENCE and LFENCE use no register of SSE.
    unsafe {
        asm!(
            "mfence",
            "lfence",
            "wrmsr",
            in("ecx") X2APIC_COMMAND,
            in("edx") apic,
            in("eax") u32::from(vector),
            options(nostack),
        );
    }
}

/// Tells the interrupt controller that the interrupt is handled.
#[inline]
pub(crate) fn end_of_interrupt() {
    write_msr(X2APIC_EOI, 0, 0);
}

/// Physical address of the root.
#[inline]
pub(crate) fn root() -> u64 {
    let cr3: u64;
    // SAFETY: reading CR3 in ring 0 has no effect.
    unsafe { asm!("mov {}, cr3", out(reg) cr3, options(nostack, preserves_flags, nomem)) };
    cr3
}

/// The time-stamp counter. What is timed is far longer than what a CPU may reorder around it.
#[inline]
pub(crate) fn timestamp() -> u64 {
    let [low, high]: [u32; 2];
    // SAFETY: reads a counter.
    unsafe { asm!("rdtsc", out("eax") low, out("edx") high, options(nostack, nomem)) };
    u64::from(high) << 32 | u64::from(low)
}

/// INVLPG.
#[inline]
pub(crate) fn invalidate_page(va: Gva) {
    // SAFETY: an invalidation makes the CPU read the tables again; it changes no mapping.
    unsafe { asm!("invlpg [{}]", in(reg) va.0, options(nostack, preserves_flags)) };
}

/// Loads CR3 with its own value: every non-global translation goes.
#[inline]
pub(crate) fn flush_non_global() {
    // SAFETY: as `invalidate_page`; the root stays the same.
    unsafe { asm!("mov {0}, cr3", "mov cr3, {0}", out(reg) _, options(nostack, preserves_flags)) };
}

/// Loads CR3 with its own value and bit 63, for which CR4.PCIDE must be set: no translation has to go.
pub(crate) fn load_root_without_flush() {
    let root = root() | CR3_NO_FLUSH;
    // SAFETY: the root stays the same.
    unsafe { asm!("mov cr3, {}", in(reg) root, options(nostack, preserves_flags)) };
}

/// CR4.
pub(crate) fn cr4() -> u64 {
    let cr4: u64;
    // SAFETY: reading CR4 in ring 0 has no effect.
    unsafe { asm!("mov {}, cr4", out(reg) cr4, options(nostack, preserves_flags, nomem)) };
    cr4
}

/// Changes CR4, in nothing but PCIDE.
pub(crate) fn set_cr4(cr4: u64) {
    // SAFETY: the callers change what translations are tagged with; CR3 names PCID 0, as it must.
    unsafe { asm!("mov cr4, {}", in(reg) cr4, options(nostack, preserves_flags)) };
}

/// Whether the processor offers PCIDs.
pub(crate) fn has_pcid() -> bool {
    __cpuid(1).ecx & CPUID_1_ECX_PCID != 0
}

/// Whether the processor offers INVPCID.
pub(crate) fn has_invpcid() -> bool {
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).ebx & CPUID_7_EBX_INVPCID != 0
}

/// INVPCID of this type, with a descriptor of PCID and address. Only where it is offered: an
/// interpreting KVM does not know it. A function of its own, so that a test sees that nothing else
/// holds the instruction.
#[inline(never)]
pub(crate) fn invpcid(kind: u64, descriptor: [u64; 2]) {
    // SAFETY: as `invalidate_page`; the descriptor is read.
    unsafe {
        asm!(
            "invpcid {}, [{}]",
            in(reg) kind, in(reg) &raw const descriptor,
            options(nostack, preserves_flags),
        );
    }
}

/// The low half of an address in the function that this is called from.
#[inline(always)]
pub(crate) fn here() -> u32 {
    let address: u64;
    // SAFETY: computes an address.
    unsafe { asm!("lea {}, [rip]", out(reg) address, options(nostack, preserves_flags, nomem)) };
    // The image lies in the highest 2 GiB, so that the low half says it all.
    address as u32
}

/// Clears and sets CR4.PGE: every translation goes. Interrupts are off in between, so that nothing
/// runs without global pages.
#[inline]
pub(crate) fn flush_everything() {
    let were_on = interrupts_off();
    // SAFETY: as `invalidate_page`; CR4 ends as it was.
    unsafe {
        asm!(
            "mov {old}, cr4",
            "mov {new}, {old}",
            "and {new}, {without}",
            "mov cr4, {new}",
            "mov cr4, {old}",
            old = out(reg) _,
            new = out(reg) _,
            without = const !(CR4_PGE as i32),
            options(nostack),
        );
    }
    if were_on {
        interrupts_on();
    }
}

/// Leaves for the host with the number of a gate call.
#[inline]
pub(crate) fn gate(call: u32) {
    // SAFETY: the host reads and writes the call page, the rings and frames that no Rust object
    // lies in; the default clobbers make the compiler forget what it knew of memory.
    unsafe { asm!("out dx, eax", in("dx") GATE_PORT, in("eax") call, options(nostack)) };
}

/// Leaves for the host with `call`.
#[inline]
pub(crate) fn gate_call(call: Call) {
    gate(call as u32);
}

/// Halts this CPU for good, but for its interrupts.
pub(crate) fn idle() -> ! {
    loop {
        // SAFETY: every vector that can arrive has a handler on a stack of its own.
        unsafe { asm!("sti", "hlt", options(nostack)) };
    }
}

/// Stops this CPU for good.
pub(crate) fn stop() -> ! {
    loop {
        // SAFETY: with interrupts off, HLT only waits.
        unsafe { asm!("cli", "hlt", options(nostack)) };
    }
}
