//! The program that touches a sealed frame on purpose: its slip is to seal a frame that its window
//! still maps. Under a seal the access never comes back; with the seal off it does.
#![allow(unsafe_code)]

use crate::machine::Machine;
use crate::{cpu, descriptors, gate};
use core::arch::asm;
use lacuna_abi::addr::{FrameRange, Gpa, Gva, PAGE_SIZE};
use lacuna_abi::event::{EntryWrite, Flush};
use lacuna_abi::gate::OpKind;
use lacuna_abi::layout::{WINDOW_LARGE_OFFSET, WINDOW_LARGE_SLOTS, window};
use lacuna_abi::paging::{Entry, Level};
use lacuna_abi::walk::locate;
use lacuna_abi::workload::Touch;
use lacuna_guest::alloc::{PageAllocator, Request};
use lacuna_guest::freetype::Migratetype;
use lacuna_guest::mermap::Protection;
use lacuna_guest::platform::Platform;

/// RET, eight times: what a fetch finds if nothing stops it.
const RETURNS: u64 = 0xc3c3_c3c3_c3c3_c3c3;

/// Touches a sealed frame as `kind` says.
pub(crate) fn run(allocator: &PageAllocator<'_, Machine>, machine: &Machine, kind: u64) {
    let Some(kind) = Touch::from_number(kind) else {
        panic!("there is no touch with the number {kind}");
    };
    let request =
        Request { order: 0, migratetype: Migratetype::Unmovable, zero: true, noblock: false };
    let pages = match allocator.alloc_secret(request) {
        Ok(pages) => pages,
        Err(error) => panic!("no secret page: {error:?}"),
    };
    let frames = pages.frames();
    operate(machine, OpKind::Open, frames);
    let mapping = match allocator.mermap().get(frames, Protection::READ_WRITE) {
        Ok(mapping) => mapping,
        Err(error) => panic!("no window: {error:?}"),
    };
    let va = mapping.va();
    machine.store(va, RETURNS);
    prepare(machine, kind, va, frames);
    operate(machine, OpKind::Seal, frames);
    touch(machine, kind, va);
    gate::log(format_args!("the {} of a secret frame was not stopped", kind.name()));
    // Only with the seal off does the program get here; what it broke stays broken.
    core::mem::forget((mapping, pages));
}

fn operate(machine: &Machine, kind: OpKind, frames: FrameRange) {
    if let Err(error) = machine.gate(&[(kind, frames)]) {
        panic!("the host refused to {kind:?} {frames}: {error:?}");
    }
}

/// Where [`Touch::PageWalk`] uses the frame as a page table: the last slot of the 2 MiB part.
fn walked() -> Gva {
    window(cpu::number())
        .wrapping_add(WINDOW_LARGE_OFFSET + (WINDOW_LARGE_SLOTS - 1) * Level::Pd.span())
}

/// What has to be broken beforehand.
fn prepare(machine: &Machine, kind: Touch, va: Gva, frames: FrameRange) {
    match kind {
        // Windows are never executable, so that a fetch takes a second slip.
        Touch::Fetch => rewrite(machine, va, Level::Pt, Entry::new(frames.start(), Entry::TEXT)),
        Touch::PageWalk => {
            rewrite(machine, walked(), Level::Pd, Entry::new(frames.start(), Entry::TABLE));
        }
        Touch::EventDelivery => {
            descriptors::set_exception_stack(cpu::number(), va.0 + PAGE_SIZE);
        }
        _ => {}
    }
}

/// Replaces the entry of `level` for `va`.
fn rewrite(machine: &Machine, va: Gva, level: Level, new: Entry) {
    let space = machine.space();
    let read = |at: Gpa| Some(machine.read_entry(at));
    let at = match locate(&read, space.root, va, level) {
        Ok(at) => at,
        Err(error) => panic!("no entry for {va}: {error:?}"),
    };
    let old = machine.read_entry(at);
    let (root, pcid) = (space.root, space.pcid);
    let write = EntryWrite { root, pcid, va, level, count: 1, old, new, grant: 0 };
    if let Err(error) = machine.write_entries(at, &write) {
        panic!("the host refused to replace the entry for {va}: {error:?}");
    }
    machine.flush(Flush::Pages { va, count: 1, level });
}

/// Not inlined, so that reports name it.
#[inline(never)]
fn touch(machine: &Machine, kind: Touch, va: Gva) {
    match kind {
        Touch::Read => {
            machine.load(va);
        }
        Touch::Write => machine.store(va, 1),
        // SAFETY: the page holds returns and is mapped executable.
        Touch::Fetch => unsafe { asm!("call {}", in(reg) va.0, clobber_abi("C")) },
        // SAFETY: the page is the program's own, and no Rust object lies in it.
        Touch::Locked => unsafe {
            asm!("lock add qword ptr [{}], {}", in(reg) va.0, in(reg) 1_u64, options(nostack));
        },
        // SAFETY: reads eight words of the program's own page.
        Touch::String => unsafe {
            asm!(
                "rep lodsq",
                inout("rcx") 8_u64 => _, inout("rsi") va.0 => _, out("rax") _,
                options(nostack, readonly),
            );
        },
        // SAFETY: the stack pointer is put back; nothing else is pushed meanwhile.
        Touch::Stack => unsafe {
            asm!(
                "mov {old}, rsp", "mov rsp, {top}", "push rax", "mov rsp, {old}",
                old = out(reg) _, top = in(reg) va.0 + PAGE_SIZE,
            );
        },
        // SAFETY: raises an exception, which ends the run one way or another.
        Touch::EventDelivery => unsafe { asm!("ud2") },
        Touch::PageWalk => {
            machine.load(walked());
        }
    }
}
