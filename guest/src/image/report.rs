//! What ends a guest early: exceptions and panics, reported to the host.

use crate::attempt;
use crate::cpu;
use crate::gate::PageText;
use crate::shared::report_page;
use core::fmt::{self, Write};
use core::sync::atomic::Ordering::Relaxed;
use lacuna_abi::gate::{ARGS_WORD, Call, ExceptionReport, LOG_BYTES};

/// Vector of page faults.
const PAGE_FAULT: u64 = 14;

/// What the stubs in `entry` push, from the lowest address up.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Frame {
    rax: u64,
    rbx: u64,
    rcx: u64,
    rdx: u64,
    rsi: u64,
    rdi: u64,
    rbp: u64,
    r8: u64,
    r9: u64,
    r10: u64,
    r11: u64,
    r12: u64,
    r13: u64,
    r14: u64,
    r15: u64,
    vector: u64,
    error: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

/// Every exception ends the guest, but for page faults that the program `probe` counts on: its handler
/// tells the host all that it found. Nothing is allocated, and no lock is taken.
pub(crate) extern "C" fn exception(frame: &mut Frame, cr2: u64) {
    if frame.vector == PAGE_FAULT
        && let Some((rip, rsp)) = attempt::resume(frame.rip, frame.rsp, cr2)
    {
        (frame.rip, frame.rsp) = (rip, rsp);
        return;
    }
    let report = ExceptionReport {
        vector: frame.vector,
        error: frame.error,
        cr2,
        rip: frame.rip,
        rsp: frame.rsp,
        rflags: frame.rflags,
        cs: frame.cs,
        rax: frame.rax,
        rbx: frame.rbx,
        rcx: frame.rcx,
        rdx: frame.rdx,
        rsi: frame.rsi,
        rdi: frame.rdi,
        rbp: frame.rbp,
        r8: frame.r8,
        r9: frame.r9,
        r10: frame.r10,
        r11: frame.r11,
        r12: frame.r12,
        r13: frame.r13,
        r14: frame.r14,
        r15: frame.r15,
    };
    let page = report_page(cpu::number());
    for (place, word) in page[ARGS_WORD..].iter().zip(report.to_words()) {
        place.store(word, Relaxed);
    }
    cpu::gate_call(Call::Exception);
    cpu::stop()
}

/// Reports a panic's message.
pub(crate) fn panic(message: fmt::Arguments<'_>) {
    let mut out = PageText::new(report_page(cpu::number()), LOG_BYTES);
    // What does not fit is cut off; the writer never fails.
    let _ = out.write_fmt(message);
    out.finish();
    cpu::gate_call(Call::Panic);
}
