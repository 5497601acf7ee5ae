//! Privileged instructions.
#![allow(unsafe_code)]

use core::arch::asm;
use lacuna_abi::addr::Gva;
use lacuna_abi::gate::{Call, GATE_PORT};

/// CR4.PGE: global pages.
const CR4_PGE: u64 = 1 << 7;
/// RFLAGS.IF: interrupts on.
const RFLAGS_IF: u64 = 1 << 9;

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

/// Physical address of the root.
#[inline]
pub(crate) fn root() -> u64 {
    let cr3: u64;
    // SAFETY: reading CR3 in ring 0 has no effect.
    unsafe { asm!("mov {}, cr3", out(reg) cr3, options(nostack, preserves_flags, nomem)) };
    cr3
}

/// The time-stamp counter, once everything before it is done.
#[inline]
pub(crate) fn timestamp() -> u64 {
    let [low, high]: [u32; 2];
    // SAFETY: reads a counter.
    unsafe { asm!("lfence", "rdtsc", out("eax") low, out("edx") high, options(nostack, nomem)) };
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

/// Stops this CPU for good.
pub(crate) fn stop() -> ! {
    loop {
        // SAFETY: with interrupts off, HLT only waits.
        unsafe { asm!("cli", "hlt", options(nostack)) };
    }
}
