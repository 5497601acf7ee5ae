//! The platform on bare metal: real tables, real invalidations, gate calls.

use crate::interrupts::{self, SHOOTDOWNS, Wire};
use crate::{cpu, gate, memory, ring, shared};
use core::fmt;
use core::sync::atomic::Ordering::Relaxed;
use lacuna_abi::addr::{FrameRange, Gpa, Gva};
use lacuna_abi::boot::{BootInfo, FEATURE_DIRECT_PAGING, FEATURE_GATE_SHOOTDOWN};
use lacuna_abi::counter::Counters;
use lacuna_abi::direct::TableOp;
use lacuna_abi::event::{EntryWrite, Event, Flush, Life, TableFill};
use lacuna_abi::gate::{Call, OpKind};
use lacuna_abi::layout::{POOL, Region, TABLE_COPY};
use lacuna_abi::paging::{Entry, Level};
use lacuna_guest::platform::{AddressSpace, CpuSet, GateError, Platform};
use lacuna_guest::programs::Services;

/// The machine that the image runs on.
pub(crate) struct Machine {
    cpus: usize,
    pool: Region,
    /// The host writes entries.
    direct: bool,
    wire: Wire,
    #[cfg(feature = "faults")]
    faults: u64,
}

impl Machine {
    /// The machine that `info` describes.
    pub(crate) fn new(info: &BootInfo) -> Self {
        let layout = info.layout();
        Self {
            cpus: layout.cpus,
            pool: layout.pool,
            direct: info.features & FEATURE_DIRECT_PAGING != 0,
            wire: Wire { through_gate: info.features & FEATURE_GATE_SHOOTDOWN != 0 },
            #[cfg(feature = "faults")]
            faults: info.faults,
        }
    }

    /// Adds what the machine counts to the allocator's counters.
    pub(crate) fn add_counters(&self, counters: &mut Counters) {
        gate::add_counters(counters);
    }
}

impl Platform for Machine {
    fn cpu(&self) -> usize {
        cpu::number()
    }

    fn cpus(&self) -> usize {
        self.cpus
    }

    fn space(&self) -> AddressSpace {
        AddressSpace { root: Gpa(cpu::root() & Entry::ADDRESS), pcid: 0 }
    }

    fn interrupts_off(&self) -> bool {
        cpu::interrupts_off()
    }

    fn interrupts_restore(&self, were_on: bool) {
        if were_on {
            cpu::interrupts_on();
        }
    }

    fn relax(&self) {
        interrupts::relax();
    }

    fn read_entry(&self, at: Gpa) -> Entry {
        let view = if self.direct { TABLE_COPY } else { POOL };
        memory::read_entry(&Region { va: view, ..self.pool }, at)
    }

    // Parts of their callers, which the sites of records then name.
    #[inline(always)]
    fn write_entries(&self, at: Gpa, write: &EntryWrite) -> Result<(), GateError> {
        let site = cpu::here();
        if self.direct {
            return ring::write_directly(site, &[TableOp::Write { at, write: *write }]);
        }
        ring::write_entries(site, &self.pool, at, write);
        Ok(())
    }

    #[inline(always)]
    fn fill_table(&self, table: Gpa, level: Level, first: Entry) -> Result<(), GateError> {
        let (site, fill) = (cpu::here(), TableFill { table, level, first });
        if self.direct {
            return ring::write_directly(site, &[TableOp::Fill(fill)]);
        }
        ring::fill_table(site, &self.pool, &fill);
        Ok(())
    }

    #[inline(always)]
    fn write_tables(&self, ops: &[TableOp]) -> Result<(), GateError> {
        let site = cpu::here();
        if self.direct {
            return ring::write_directly(site, ops);
        }
        for op in ops {
            match op {
                TableOp::Write { at, write } => ring::write_entries(site, &self.pool, *at, write),
                TableOp::Fill(fill) => ring::fill_table(site, &self.pool, fill),
            }
        }
        Ok(())
    }

    #[inline(always)]
    fn flush(&self, flush: Flush) {
        ring::flush(cpu::here(), flush);
    }

    #[inline(always)]
    fn shootdown(&self, flush: Flush, cpus: CpuSet) {
        SHOOTDOWNS.run(&self.wire, flush, cpus);
    }

    fn gate(&self, ops: &[(OpKind, FrameRange)]) -> Result<(), GateError> {
        gate::operations(ops)
    }

    #[inline(always)]
    fn life(&self, life: Life, frames: FrameRange) {
        ring::record(cpu::here(), Event::Life(life, frames));
    }

    fn zero(&self, va: Gva, bytes: u64) {
        memory::zero(va, bytes);
    }

    fn copy(&self, to: Gva, from: Gva, bytes: u64) {
        memory::copy(to, from, bytes);
    }

    fn load(&self, va: Gva) -> u64 {
        memory::load(va)
    }

    fn store(&self, va: Gva, value: u64) {
        memory::store(va, value);
    }

    #[cfg(feature = "faults")]
    #[inline(always)]
    fn forge(&self, event: Event) {
        ring::record(cpu::here(), event);
    }

    // Functions of their own, so that tests see by their names whether an image asks.
    #[cfg(feature = "faults")]
    #[inline(never)]
    fn planted(&self, fault: lacuna_abi::fault::Fault) -> bool {
        self.faults & fault.bit() != 0
    }

    #[cfg(feature = "faults")]
    #[inline(never)]
    fn slips(&self, slip: lacuna_abi::fault::Slip) -> bool {
        self.faults & slip.bit() != 0
    }
}

impl Services for Machine {
    fn log(&self, text: fmt::Arguments<'_>) {
        gate::log(text);
    }

    fn progress(&self, done: u64) {
        shared::sequence()[1 + cpu::number()].store(done, Relaxed);
    }

    fn clock(&self) -> u64 {
        cpu::timestamp()
    }

    fn input_done(&self) {
        if let Err(error) = gate::call(Call::InputDone) {
            panic!("the host refused to wipe the input: {error:?}");
        }
    }

    fn checkpoint(&self) {
        crate::checkpoint();
    }
}
