//! The program that touches a sealed frame on purpose, as far as a simulated CPU can. Its slip is
//! that of the guest image: it seals a frame that its window still maps.

use super::cpu;
use super::machine::SimMachine;
use lacuna_abi::addr::{FrameRange, Gva};
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
use lacuna_guest::programs::Services;

/// What the frame holds, so that a walk through it finds no entry.
const CONTENTS: u64 = 2;

/// Whether a simulated CPU can touch a frame this way: it executes no instructions.
pub(super) const fn can_touch(kind: Touch) -> bool {
    matches!(kind, Touch::Read | Touch::Write | Touch::PageWalk)
}

/// Touches a sealed frame as `kind` says. Under a seal this does not come back.
pub(super) fn run(allocator: &PageAllocator<'_, SimMachine>, machine: &SimMachine, kind: Touch) {
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
    machine.store(va, CONTENTS);
    let walked = window(cpu::number())
        .wrapping_add(WINDOW_LARGE_OFFSET + (WINDOW_LARGE_SLOTS - 1) * Level::Pd.span());
    if kind == Touch::PageWalk {
        link(machine, walked, frames);
    }
    operate(machine, OpKind::Seal, frames);
    match kind {
        Touch::Read => _ = machine.load(va),
        Touch::Write => machine.store(va, 1),
        Touch::PageWalk => _ = machine.load(walked),
        other => panic!("a simulated CPU cannot touch a frame by {}", other.name()),
    }
    machine.log(format_args!("the {} of a secret frame was not stopped", kind.name()));
    // Only with the seal off does the program get here; what it broke stays broken.
    std::mem::forget((mapping, pages));
}

fn operate(machine: &SimMachine, kind: OpKind, frames: FrameRange) {
    if let Err(error) = machine.gate(&[(kind, frames)]) {
        panic!("the host refused to {kind:?} {frames}: {error:?}");
    }
}

/// Uses the frame as a page table for `va`.
fn link(machine: &SimMachine, va: Gva, frames: FrameRange) {
    let space = machine.space();
    let read = |at| Some(machine.read_entry(at));
    let at = locate(&read, space.root, va, Level::Pd)
        .unwrap_or_else(|error| panic!("no entry for {va}: {error:?}"));
    let (root, pcid, level) = (space.root, space.pcid, Level::Pd);
    let old = machine.read_entry(at);
    let new = Entry::new(frames.start(), Entry::TABLE);
    let write = EntryWrite { root, pcid, va, level, count: 1, old, new, grant: 0 };
    if let Err(error) = machine.write_entries(at, &write) {
        panic!("the host refused to replace the entry for {va}: {error:?}");
    }
    machine.flush(Flush::Pages { va, count: 1, level });
}
