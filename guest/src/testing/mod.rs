//! A machine in an ordinary process for the tests: software page tables, memory by frame, a host
//! that keeps its own record of what is secret and open, and a strict judge.
//!
//! An access that real hardware would refuse panics. What a host would report as a violation is
//! collected; a machine that is dropped with violations that no test asked for panics.

#![cfg_attr(not(test), allow(dead_code, reason = "histories need a part of what the tests do"))]

pub(crate) mod history;
mod judge;
mod memory;
pub(crate) mod step;
mod tables;

pub use history::run_bytes;
pub(crate) use judge::Seen;
#[cfg(test)]
pub(crate) use memory::Contents;

use crate::alloc::{AllocConfig, PageAllocator, Request};
use crate::freetype::Migratetype;
use crate::meta::{BlockMeta, MemMap, PageMeta};
use crate::platform::{AddressSpace, CpuSet, GateError, Platform};
use crate::programs::Services;
#[cfg(test)]
pub(crate) use crate::random::Random;
use judge::State;
use lacuna_abi::addr::{FrameRange, Gpa, Gva, PAGE_SIZE};
use lacuna_abi::event::{EntryWrite, Flush, Life, TableFill};
use lacuna_abi::gate::{OpKind, Status};
use lacuna_abi::layout::{Layout, Needs};
use lacuna_abi::paging::{Entry, Level};
use std::cell::Cell;
use std::string::String;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::vec::Vec;

std::thread_local! {
    static CPU: Cell<usize> = const { Cell::new(0) };
}

/// Nothing is kept for callers that cannot wait.
pub(crate) const EAGER: AllocConfig = AllocConfig { min_free: Some(0), ..AllocConfig::PLAIN };

/// The machine and the metadata of its zone.
pub(crate) struct Mock {
    pub(crate) layout: Layout,
    state: Mutex<State>,
    pages: Vec<PageMeta>,
    blocks: Vec<BlockMeta>,
}

impl Mock {
    /// A machine with this zone and CPUs, its memory dirty.
    pub(crate) fn new(memory_mib: u64, cpus: usize) -> Self {
        let needs = Needs { image: 1, memory_mib, cpus, input: 32 << 20, scratch: 1 << 20 };
        let layout = Layout::new(&needs).unwrap();
        let pages = (0..layout.zone_frames().count()).map(|_| PageMeta::default()).collect();
        let blocks = (0..layout.zone_blocks()).map(|_| BlockMeta::default()).collect();
        CPU.set(0);
        Self { layout, state: Mutex::new(State::new(layout)), pages, blocks }
    }

    pub(crate) fn map(&self) -> MemMap<'_> {
        MemMap::new(&self.pages, &self.blocks, &self.layout)
    }

    /// A prepared allocator: pool zeroed ahead, flips allowed.
    pub(crate) fn allocator(&self) -> PageAllocator<'_, Self> {
        self.allocator_with(true)
    }

    /// A prepared allocator that hands out the last page, and zeroes ahead or does not.
    pub(crate) fn allocator_with(&self, prezero: bool) -> PageAllocator<'_, Self> {
        self.allocator_as(AllocConfig { prezero, ..EAGER })
    }

    /// A prepared allocator.
    pub(crate) fn allocator_as(&self, config: AllocConfig) -> PageAllocator<'_, Self> {
        let allocator = PageAllocator::new(self, &self.layout, self.map(), config);
        let free = self.state().free_tables;
        allocator.add_tables((free.0 - self.layout.pool.gpa.0) / PAGE_SIZE);
        allocator.prepare().unwrap();
        allocator
    }

    /// This thread goes on as another CPU.
    pub(crate) fn on_cpu(&self, cpu: usize) {
        assert!(cpu < self.layout.cpus);
        CPU.set(cpu);
    }

    /// Runs `body` on every CPU of the machine, each a thread; what each ended with.
    pub(crate) fn on_all_cpus<R: Send>(&self, body: impl Fn() -> R + Sync) -> Vec<R> {
        std::thread::scope(|scope| {
            let run = |cpu| {
                self.on_cpu(cpu);
                body()
            };
            let threads: Vec<_> =
                (0..self.layout.cpus).map(|cpu| scope.spawn(move || run(cpu))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    /// The `nth` operation from now on, counted from 0, is refused.
    pub(crate) fn refuse(&self, nth: usize) {
        self.state().refuse = Some((nth, Status::BadState));
    }

    /// The `nth` write to tables from now on, counted from 0, is refused.
    pub(crate) fn refuse_write(&self, nth: usize) {
        self.state().refuse_write = Some(nth);
    }

    /// Everything that happened since the last call.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        std::mem::take(&mut self.state().seen)
    }

    /// Nothing is recorded any more, for long tests.
    pub(crate) fn stop_recording(&self) {
        self.state().recording = false;
    }

    /// The violations so far, which are forgiven.
    pub(crate) fn violations(&self) -> Vec<String> {
        std::mem::take(&mut self.state().violations)
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the direct map shows every one of the frames, or none of them.
    pub(crate) fn in_direct_map(&self, frames: FrameRange) -> bool {
        let state = self.state();
        let shown = frames.iter().filter(|frame| state.frame(*frame).direct).count();
        assert!(shown == 0 || shown as u64 == frames.count(), "{frames} is partly mapped");
        shown != 0
    }

    #[cfg(feature = "faults")]
    pub(crate) fn plant(&self, fault: lacuna_abi::fault::Fault) {
        self.state().faults = fault.bit();
    }
}

impl Drop for Mock {
    fn drop(&mut self) {
        let violations = self.violations();
        if !std::thread::panicking() {
            assert!(violations.is_empty(), "{violations:#?}");
        }
    }
}

impl Platform for Mock {
    fn cpu(&self) -> usize {
        CPU.get()
    }

    fn cpus(&self) -> usize {
        self.layout.cpus
    }

    fn space(&self) -> AddressSpace {
        AddressSpace { root: self.layout.pool.gpa, pcid: 0 }
    }

    fn interrupts_off(&self) -> bool {
        !std::mem::replace(&mut self.state().interrupts_off[CPU.get()], true)
    }

    fn interrupts_restore(&self, were_on: bool) {
        if were_on {
            self.state().interrupts_off[CPU.get()] = false;
        }
    }

    fn relax(&self) {
        std::thread::yield_now();
    }

    fn read_entry(&self, at: Gpa) -> Entry {
        self.state().read_entry(at).unwrap_or_else(|| panic!("no table at {at}"))
    }

    fn write_entries(&self, at: Gpa, write: &EntryWrite) -> Result<(), GateError> {
        let mut state = self.state();
        state.admit_write()?;
        state.write_entries(CPU.get(), at, write);
        Ok(())
    }

    fn fill_table(&self, table: Gpa, level: Level, first: Entry) -> Result<(), GateError> {
        let mut state = self.state();
        state.admit_write()?;
        state.fill_table(&TableFill { table, level, first });
        Ok(())
    }

    fn flush(&self, flush: Flush) {
        let mut state = self.state();
        state.see(Seen::Flush(flush));
        state.forget(CPU.get(), flush);
    }

    fn shootdown(&self, flush: Flush, cpus: CpuSet) {
        let mut state = self.state();
        assert!(
            !state.interrupts_off[CPU.get()],
            "a shootdown with interrupts off, or a lock held"
        );
        state.see(Seen::Shootdown(flush, cpus));
        for cpu in (0..self.layout.cpus).filter(|cpu| cpus.contains(*cpu)) {
            state.forget(cpu, flush);
        }
    }

    fn gate(&self, ops: &[(OpKind, FrameRange)]) -> Result<(), GateError> {
        let mut state = self.state();
        state.calls += 1;
        for (index, (kind, frames)) in ops.iter().enumerate() {
            state
                .operation(CPU.get(), *kind, *frames)
                .map_err(|status| GateError { status, index: index as u32 })?;
        }
        Ok(())
    }

    fn life(&self, life: Life, frames: FrameRange) {
        self.state().life(life, frames);
    }

    fn zero(&self, va: Gva, bytes: u64) {
        self.state().zero(CPU.get(), va, bytes);
    }

    fn fill(&self, va: Gva, bytes: u64, value: u64) {
        self.state().fill(CPU.get(), va, bytes, value);
    }

    fn copy(&self, to: Gva, from: Gva, bytes: u64) {
        let mut state = self.state();
        for offset in (0..bytes).step_by(8) {
            let word = state.load(CPU.get(), from.wrapping_add(offset));
            state.store(CPU.get(), to.wrapping_add(offset), word);
        }
    }

    fn load(&self, va: Gva) -> u64 {
        self.state().load(CPU.get(), va)
    }

    fn store(&self, va: Gva, value: u64) {
        self.state().store(CPU.get(), va, value);
    }

    #[cfg(feature = "faults")]
    fn planted(&self, fault: lacuna_abi::fault::Fault) -> bool {
        self.state().planted(fault)
    }
}

impl Services for Mock {
    fn log(&self, _: core::fmt::Arguments<'_>) {}

    fn progress(&self, done: u64) {
        self.state().progress = done;
    }

    fn clock(&self) -> u64 {
        // Each look is later than the one before.
        let mut state = self.state();
        state.clock += 1;
        state.clock
    }

    fn input_done(&self) {
        let mut state = self.state();
        state.see(Seen::InputDone);
        state.input.clear();
    }

    fn checkpoint(&self) {
        self.state().see(Seen::Checkpoint);
    }
}

/// 2^`order` unmovable pages, contents undefined, may block.
pub(crate) const fn pages(order: u8) -> Request {
    Request { order, migratetype: Migratetype::Unmovable, zero: false, noblock: false }
}

/// As [`pages`], but zero.
pub(crate) const fn zero_pages(order: u8) -> Request {
    Request { zero: true, ..pages(order) }
}
