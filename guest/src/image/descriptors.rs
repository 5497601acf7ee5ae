//! GDT, TSS and IDT (Intel SDM volume 3, "Protected-Mode Memory Management", "Task Management",
//! "Interrupt and Exception Handling"). Every handler runs on an IST stack of its CPU.
#![allow(unsafe_code)]

use crate::cpu::SPURIOUS_VECTOR;
use crate::entry::{VECTORS, shootdown_stub, spurious_stub, stub};
use core::arch::asm;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use lacuna_abi::gate::{CpuRegistration, SHOOTDOWN_VECTOR};
use lacuna_abi::layout::{
    CPU_DATA, CpuPart, DOUBLE_FAULT_STACK, EXCEPTION_STACK, INTERRUPT_STACK, MACHINE_CHECK_STACK,
    MAIN_STACK, NMI_STACK,
};

/// Selector of the 64-bit code segment, as the VMM set it.
const CODE_SELECTOR: u64 = 0x08;
/// Selector of the task-state segment.
const TSS_SELECTOR: u16 = 0x18;
/// 64-bit code segment: present, ring 0, execute and read, accessed.
const CODE_SEGMENT: u64 = 0x00af_9b00_0000_ffff;
/// Data segment: present, ring 0, read and write, accessed.
const DATA_SEGMENT: u64 = 0x00cf_9300_0000_ffff;
/// Type of an available 64-bit TSS descriptor, present.
const TSS_TYPE: u64 = 0x89 << 40;
/// Type of a 64-bit interrupt gate, present, ring 0.
const INTERRUPT_GATE: u64 = 0x8e00 << 32;

/// Where the GDT lies in the per-CPU data.
const GDT_OFFSET: u64 = 0x100;
/// Entries of the GDT: null, code, data, TSS (two).
const GDT_WORDS: u64 = 5;
/// Where the TSS lies in the per-CPU data; one 4-byte field lies before each aligned 8-byte one.
const TSS_OFFSET: u64 = 0x204;
/// Bytes of a TSS.
const TSS_BYTES: u64 = 104;

/// Stacks by IST number, from 1.
const IST: [CpuPart; 5] =
    [EXCEPTION_STACK, DOUBLE_FAULT_STACK, NMI_STACK, MACHINE_CHECK_STACK, INTERRUPT_STACK];
const NMI: usize = 2;
const DOUBLE_FAULT: usize = 8;
const MACHINE_CHECK: usize = 18;
/// Gates of the IDT; those of vectors that nothing sends stay empty.
const GATES: usize = 256;

/// The interrupt descriptor table: one for all CPUs, gates with 16 bytes each.
#[repr(C, align(16))]
struct Idt([AtomicU64; 2 * GATES]);

static IDT: Idt = Idt([const { AtomicU64::new(0) }; 2 * GATES]);
static IDT_BUILT: AtomicBool = AtomicBool::new(false);

/// Operand of LGDT and LIDT.
#[repr(C, packed)]
struct Pointer {
    limit: u16,
    base: u64,
}

/// IST number of a vector's stack.
const fn ist_of(vector: usize) -> u64 {
    match vector {
        DOUBLE_FAULT => 2,
        NMI => 3,
        MACHINE_CHECK => 4,
        0..VECTORS => 1,
        _ => 5,
    }
}

/// Builds and loads the descriptor tables of CPU `cpu`, which runs this.
pub(crate) fn load(cpu: usize) {
    build_idt();
    build_gdt_and_tss(cpu);
    let tables = registration(cpu);
    let gdt = pointer(tables.gdt_base, tables.gdt_limit);
    let idt = pointer(tables.idt_base, tables.idt_limit);
    // SAFETY: the GDT was built just now with the segments that CS and SS already hold, the TSS
    // with stacks that are mapped, the IDT with stubs of the image; all of them live for ever.
    unsafe {
        asm!(
            "lgdt [{}]", "lidt [{}]", "ltr {:x}",
            in(reg) &raw const gdt, in(reg) &raw const idt, in(reg) TSS_SELECTOR,
            options(readonly, nostack, preserves_flags),
        );
    }
}

/// What `cpu` has loaded, for the host to compare with.
pub(crate) fn registration(cpu: usize) -> CpuRegistration {
    CpuRegistration {
        idt_base: IDT.0.as_ptr() as u64,
        idt_limit: size_of::<Idt>() as u64 - 1,
        gdt_base: CPU_DATA.start(cpu).0 + GDT_OFFSET,
        gdt_limit: GDT_WORDS * 8 - 1,
    }
}

fn pointer(base: u64, limit: u64) -> Pointer {
    Pointer { limit: limit as u16, base }
}

/// CPU 0 builds the table; the others start later and find it built.
fn build_idt() {
    if IDT_BUILT.swap(true, Ordering::AcqRel) {
        return;
    }
    for vector in 0..VECTORS {
        build_gate(vector, stub(vector));
    }
    build_gate(SHOOTDOWN_VECTOR.into(), shootdown_stub());
    build_gate(SPURIOUS_VECTOR.into(), spurious_stub());
}

fn build_gate(vector: usize, target: u64) {
    let low = (target & 0xffff)
        | CODE_SELECTOR << 16
        | ist_of(vector) << 32
        | INTERRUPT_GATE
        | (target & 0xffff_0000) << 32;
    IDT.0[2 * vector].store(low, Ordering::Relaxed);
    IDT.0[2 * vector + 1].store(target >> 32, Ordering::Relaxed);
}

fn build_gdt_and_tss(cpu: usize) {
    let data = CPU_DATA.start(cpu).0;
    let tss = data + TSS_OFFSET;
    let low = (TSS_BYTES - 1) | (tss & 0x00ff_ffff) << 16 | TSS_TYPE | (tss & 0xff00_0000) << 32;
    let gdt = [0, CODE_SEGMENT, DATA_SEGMENT, low, tss >> 32];
    for (index, word) in (0..).zip(gdt) {
        store(data + GDT_OFFSET + 8 * index, word);
    }
    // RSP0 at byte 4, IST 1 to 7 from byte 36, the I/O map's offset at byte 102: none.
    store(tss + 4, MAIN_STACK.top(cpu).0);
    for (index, stack) in (0..).zip(IST) {
        store(tss + 36 + 8 * index, stack.top(cpu).0);
    }
    store(tss + 100, (TSS_BYTES) << 16);
}

/// Makes the exception stack of this CPU (IST 1) start at `top`: for a program that breaks it on
/// purpose.
pub(crate) fn set_exception_stack(cpu: usize, top: u64) {
    store(CPU_DATA.start(cpu).0 + TSS_OFFSET + 36, top);
}

/// Writes one word of the per-CPU data.
fn store(at: u64, value: u64) {
    // SAFETY: all callers stay within the CPU's data area, which is mapped writable and which no
    // Rust object lies in.
    unsafe { (at as *mut u64).write_volatile(value) };
}
