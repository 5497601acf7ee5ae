//! What CPUs do to shared structures without a lock, or each under a lock of its own, in every
//! order that they can do it in: loom runs each model once for each order and each value that a
//! load may see. Run as `.ci/run` does, with `--cfg loom`.
//!
//! Each model has twins that plant a slip in the same code (`sync::checked`) and must fail, so that
//! it is known to look. loom treats SeqCst as weaker than it is and never moves a load behind a
//! later store of the same thread; this crate asks for no SeqCst, and x86 moves no load so.

mod handles;
mod lists;
mod movers;
mod parked;
mod pins;
mod ring;
mod shootdowns;
mod tables;

use crate::alloc::{AllocConfig, PageAllocator};
use crate::freetype::{Freetype, Migratetype};
use crate::meta::{BlockMeta, Chunk, MemMap, PageMeta};
use crate::platform::{AddressSpace, CpuSet, GateError, Platform};
use core::cell::Cell;
use core::sync::atomic::Ordering::Relaxed;
use lacuna_abi::addr::{FrameRange, Gpa, Gva, PAGE_SIZE};
use lacuna_abi::event::{EntryWrite, Flush, Life};
use lacuna_abi::gate::OpKind;
use lacuna_abi::layout::{Layout, Needs, direct_map};
use lacuna_abi::paging::{Entry, Level};
use loom::sync::atomic::AtomicU64;
use loom::thread;
use std::boxed::Box;
use std::vec::Vec;

loom::thread_local! {
    static CPU: Cell<usize> = Cell::new(0);
}

/// A mapped, movable page.
const MOVABLE: Freetype = Freetype::mapped(Migratetype::Movable);

/// CPUs that share the direct map of a few pages, one word each. The words are ordered by nothing
/// but what the guest orders: who may not see a store may see what was there before.
struct Machine {
    layout: Layout,
    words: Vec<AtomicU64>,
}

/// Runs `body` in every order, with at most this many preemptions where that is a number.
fn check(preemptions: Option<usize>, body: impl Fn() + Send + Sync + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = preemptions;
    model.max_branches = 20_000;
    model.check(body);
}

/// Runs `body` as another CPU.
fn spawn<T: 'static>(cpu: usize, body: impl FnOnce() -> T + 'static) -> thread::JoinHandle<T> {
    thread::spawn(move || {
        CPU.with(|own| own.set(cpu));
        body()
    })
}

/// An allocator for `pages` pages of which none is free, and its machine. They live for good:
/// threads of a model cannot borrow.
fn allocator(pages: u64) -> (&'static PageAllocator<'static, Machine>, &'static Machine) {
    let needs = Needs { image: 1, memory_mib: 16, cpus: 2, input: 0, scratch: 0 };
    let layout = Layout::new(&needs).unwrap();
    let words = (0..pages).map(|_| AtomicU64::new(0)).collect();
    let machine: &Machine = Box::leak(Box::new(Machine { layout, words }));
    let records: &[PageMeta] = Vec::leak((0..pages).map(|_| PageMeta::default()).collect());
    let blocks: &[BlockMeta] = Vec::leak(Vec::from([BlockMeta::default()]));
    blocks[0].set_freetype(MOVABLE);
    let zone = FrameRange::new(layout.zone_frames().start(), pages).unwrap();
    let map = MemMap::of_part(records, blocks, zone);
    let config = AllocConfig { min_free: Some(0), ..AllocConfig::PLAIN };
    let allocator = Box::leak(Box::new(PageAllocator::new(machine, &layout, map, config)));
    allocator.zone().enter_all(&map);
    (allocator, machine)
}

/// Puts a page on the zone's lists.
fn free(allocator: &PageAllocator<'_, Machine>, index: u32) {
    allocator.zone().insert(&allocator.map, Chunk { index, order: 0 });
}

impl Machine {
    fn word(&self, va: Gva) -> &AtomicU64 {
        let start = direct_map(self.layout.zone.gpa);
        let offset = va.offset_from(start).unwrap_or_else(|| panic!("{va} is not mapped"));
        &self.words[(offset / PAGE_SIZE) as usize]
    }
}

/// No model changes a mapping.
macro_rules! no_mapping_changes {
    () => {
        unreachable!("this model changes no mapping")
    };
}

impl Platform for Machine {
    fn cpu(&self) -> usize {
        CPU.with(Cell::get)
    }

    fn cpus(&self) -> usize {
        self.layout.cpus
    }

    fn space(&self) -> AddressSpace {
        AddressSpace { root: self.layout.pool.gpa, pcid: 0 }
    }

    // No model is about interrupts: an interrupt on one CPU is not another thread.
    fn interrupts_off(&self) -> bool {
        true
    }

    fn interrupts_restore(&self, _: bool) {}

    fn relax(&self) {
        thread::yield_now();
    }

    fn read_entry(&self, _: Gpa) -> Entry {
        no_mapping_changes!()
    }

    fn write_entries(&self, _: Gpa, _: &EntryWrite) -> Result<(), GateError> {
        no_mapping_changes!()
    }

    fn fill_table(&self, _: Gpa, _: Level, _: Entry) -> Result<(), GateError> {
        no_mapping_changes!()
    }

    fn flush(&self, _: Flush) {
        no_mapping_changes!()
    }

    fn shootdown(&self, _: Flush, _: CpuSet) {
        no_mapping_changes!()
    }

    fn gate(&self, _: &[(OpKind, FrameRange)]) -> Result<(), GateError> {
        no_mapping_changes!()
    }

    fn life(&self, _: Life, _: FrameRange) {
        no_mapping_changes!()
    }

    fn zero(&self, va: Gva, bytes: u64) {
        for offset in (0..bytes).step_by(PAGE_SIZE as usize) {
            self.store(va.wrapping_add(offset), 0);
        }
    }

    fn copy(&self, to: Gva, from: Gva, bytes: u64) {
        for offset in (0..bytes).step_by(PAGE_SIZE as usize) {
            self.store(to.wrapping_add(offset), self.load(from.wrapping_add(offset)));
        }
    }

    fn load(&self, va: Gva) -> u64 {
        self.word(va).load(Relaxed)
    }

    fn store(&self, va: Gva, value: u64) {
        self.word(va).store(value, Relaxed);
    }

    #[cfg(feature = "faults")]
    fn planted(&self, _: lacuna_abi::fault::Fault) -> bool {
        false
    }
}
