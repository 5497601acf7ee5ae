//! The first instructions of a CPU, and the stubs that exceptions and interrupts enter through.
#![allow(unsafe_code)]

use core::arch::global_asm;
use lacuna_abi::ABI_VERSION;
use lacuna_abi::layout::CPU_DATA;

/// The version that this image was built for, where the VMM looks before it starts it.
#[unsafe(link_section = ".lacuna.abi")]
#[used]
static ABI: u64 = ABI_VERSION;

/// Exceptions that have a stub: vectors 0 to 31.
pub(crate) const VECTORS: usize = 32;
/// Bytes from one stub to the next.
const STUB_BYTES: u64 = 16;

/// Where the VMM starts a CPU: RDI holds its number, RSP the top of its main stack.
#[unsafe(no_mangle)]
extern "C" fn lacuna_start(cpu: usize) -> ! {
    // SAFETY: the CPU's own data area is mapped writable and nothing else refers to its first
    // word, which `cpu::number` reads.
    unsafe { (CPU_DATA.start(cpu).0 as *mut usize).write_volatile(cpu) };
    crate::main(cpu)
}

/// One stub a vector; those without an error code push a zero in its place.
macro_rules! stubs {
    ($($vector:literal $code:ident)*) => {
        concat!($(".balign 16\n", stubs!(@$code), "push ", $vector, "\njmp exception_common\n"),*)
    };
    (@none) => { "push 0\n" };
    (@code) => { "" };
}

// The frame that `exception` gets is `report::Frame`. Interrupt gates turn interrupts off.
global_asm!(
    ".balign 16",
    ".type exception_stubs, @function",
    "exception_stubs:",
    stubs! {
        0 none 1 none 2 none 3 none 4 none 5 none 6 none 7 none 8 code 9 none 10 code 11 code
        12 code 13 code 14 code 15 none 16 none 17 code 18 none 19 none 20 none 21 code 22 none
        23 none 24 none 25 none 26 none 27 none 28 none 29 code 30 code 31 none
    },
    ".size exception_stubs, . - exception_stubs",
    ".type exception_common, @function",
    "exception_common:",
    "push r15",
    "push r14",
    "push r13",
    "push r12",
    "push r11",
    "push r10",
    "push r9",
    "push r8",
    "push rbp",
    "push rdi",
    "push rsi",
    "push rdx",
    "push rcx",
    "push rbx",
    "push rax",
    "cld",
    "mov rdi, rsp",
    "mov rsi, cr2",
    "mov rbx, rsp",
    "and rsp, -16",
    "call {handler}",
    "mov rsp, rbx",
    "pop rax",
    "pop rbx",
    "pop rcx",
    "pop rdx",
    "pop rsi",
    "pop rdi",
    "pop rbp",
    "pop r8",
    "pop r9",
    "pop r10",
    "pop r11",
    "pop r12",
    "pop r13",
    "pop r14",
    "pop r15",
    // The vector and the error code.
    "add rsp, 16",
    "iretq",
    ".size exception_common, . - exception_common",
    handler = sym crate::report::exception,
);

// The interrupt's own code may change what a C function may. RSP is a multiple of 16 at the call:
// the processor aligns it before it pushes five words, and nine follow.
global_asm!(
    ".balign 16",
    ".type shootdown_stub, @function",
    "shootdown_stub:",
    "push rax",
    "push rcx",
    "push rdx",
    "push rsi",
    "push rdi",
    "push r8",
    "push r9",
    "push r10",
    "push r11",
    "cld",
    "call {handler}",
    "pop r11",
    "pop r10",
    "pop r9",
    "pop r8",
    "pop rdi",
    "pop rsi",
    "pop rdx",
    "pop rcx",
    "pop rax",
    "iretq",
    ".size shootdown_stub, . - shootdown_stub",
    ".type spurious_stub, @function",
    "spurious_stub:",
    "iretq",
    ".size spurious_stub, . - spurious_stub",
    handler = sym crate::interrupts::shootdown_interrupt,
);

unsafe extern "C" {
    #[link_name = "exception_stubs"]
    safe static EXCEPTION_STUBS: u8;
    #[link_name = "shootdown_stub"]
    safe static SHOOTDOWN_STUB: u8;
    #[link_name = "spurious_stub"]
    safe static SPURIOUS_STUB: u8;
}

/// Address of the stub of the shootdown interrupt.
pub(crate) fn shootdown_stub() -> u64 {
    &raw const SHOOTDOWN_STUB as u64
}

/// Address of the stub of interrupts that turn out to be none: they get no end of interrupt.
pub(crate) fn spurious_stub() -> u64 {
    &raw const SPURIOUS_STUB as u64
}

/// Address of the stub of the exception `vector`.
pub(crate) fn stub(vector: usize) -> u64 {
    &raw const EXCEPTION_STUBS as u64 + STUB_BYTES * vector as u64
}
