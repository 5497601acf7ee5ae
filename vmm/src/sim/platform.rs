//! What the guest's code asks of a simulated CPU: [`Platform`], with what of it is recorded, and the
//! CPU as shootdowns see it.

use super::cpu;
use super::machine::SimMachine;
use super::mmu::Fault;
use super::tlb::Invalidation;
use crate::machine::sys::here_in_code;
use lacuna_abi::addr::{FrameRange, Gpa, Gva, PAGE_SIZE};
use lacuna_abi::direct::TableOp;
use lacuna_abi::event::{EntryWrite, Event, Flush, Life, TableFill};
use lacuna_abi::gate::OpKind;
use lacuna_abi::paging::{Entry, Level};
use lacuna_guest::platform::{AddressSpace, CpuSet, GateError, Platform};
use lacuna_guest::ring;
use lacuna_guest::shootdown::Interrupts;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

impl Platform for SimMachine {
    fn cpu(&self) -> usize {
        cpu::number()
    }

    fn cpus(&self) -> usize {
        self.cpus.len()
    }

    fn space(&self) -> AddressSpace {
        self.space
    }

    #[inline]
    fn interrupts_off(&self) -> bool {
        self.enter().is_some_and(|(_, cpu)| cpu.interrupts_off())
    }

    #[inline]
    fn interrupts_restore(&self, were_on: bool) {
        let Some((_, cpu)) = self.enter() else { return };
        cpu.interrupts_restore(were_on);
        if cpu.is_wanted() {
            self.attend(cpu::number());
        }
    }

    fn relax(&self) {
        if std::thread::panicking() {
            // What the lock's holder has to undo it undoes on its own thread.
            std::thread::yield_now();
            return;
        }
        let number = cpu::number();
        self.look(number, true);
        if self.cpus[number].is_wanted() {
            self.attend(number);
        }
    }

    fn read_entry(&self, at: Gpa) -> Entry {
        // Also while unwinding: destructors rely on what they read.
        Entry(self.entry_seen(at).load(Acquire))
    }

    // What is recorded here is recorded as done by its caller, of which these are parts.
    #[inline(always)]
    fn write_entries(&self, at: Gpa, write: &EntryWrite) -> Result<(), GateError> {
        if self.direct {
            return self.write_directly(here_in_code(), &[TableOp::Write { at, write: *write }]);
        }
        self.write_entries_at(here_in_code(), at, write);
        Ok(())
    }

    #[inline(always)]
    fn fill_table(&self, table: Gpa, level: Level, first: Entry) -> Result<(), GateError> {
        let fill = TableFill { table, level, first };
        if self.direct {
            return self.write_directly(here_in_code(), &[TableOp::Fill(fill)]);
        }
        self.fill_table_at(here_in_code(), fill);
        Ok(())
    }

    #[inline(always)]
    fn write_tables(&self, ops: &[TableOp]) -> Result<(), GateError> {
        if self.direct {
            return self.write_directly(here_in_code(), ops);
        }
        for op in ops {
            match op {
                TableOp::Write { at, write } => self.write_entries_at(here_in_code(), *at, write),
                TableOp::Fill(fill) => self.fill_table_at(here_in_code(), *fill),
            }
        }
        Ok(())
    }

    #[inline(always)]
    fn flush(&self, flush: Flush) {
        self.flush_at(here_in_code(), flush);
    }

    #[inline(always)]
    fn shootdown(&self, flush: Flush, cpus: CpuSet) {
        if self.enter().is_some() {
            self.shootdowns.run(&Wire(self), flush, cpus);
        }
    }

    fn gate(&self, ops: &[(OpKind, FrameRange)]) -> Result<(), GateError> {
        self.enter().map_or(Ok(()), |(number, _)| self.operations(number, ops))
    }

    #[inline(always)]
    fn life(&self, life: Life, frames: FrameRange) {
        self.life_at(here_in_code(), life, frames);
    }

    fn zero(&self, va: Gva, bytes: u64) {
        let Some((number, _)) = self.enter() else { return };
        let mut done = 0;
        // Pages that lie together are zeroed together.
        let (mut start, mut len) = (Gpa(0), 0);
        while done < bytes {
            let here = va.wrapping_add(done);
            let part = (PAGE_SIZE - here.0 % PAGE_SIZE).min(bytes - done);
            let gpa = self.reach(number, here, true);
            if start.wrapping_add(len) == gpa {
                len += part;
            } else {
                self.zero_physical(number, va, (start, len));
                (start, len) = (gpa, part);
            }
            done += part;
        }
        self.zero_physical(number, va, (start, len));
    }

    fn copy(&self, to: Gva, from: Gva, bytes: u64) {
        let Some((number, _)) = self.enter() else { return };
        for offset in (0..bytes).step_by(8) {
            let word = self.word(number, from.wrapping_add(offset), false).load(Relaxed);
            self.word(number, to.wrapping_add(offset), true).store(word, Relaxed);
        }
    }

    #[inline]
    fn load(&self, va: Gva) -> u64 {
        self.enter().map_or(0, |(number, _)| self.word(number, va, false).load(Acquire))
    }

    #[inline]
    fn store(&self, va: Gva, value: u64) {
        if let Some((number, _)) = self.enter() {
            self.word(number, va, true).store(value, Release);
        }
    }

    #[inline(always)]
    fn forge(&self, event: Event) {
        if self.enter().is_some() {
            self.record(here_in_code(), event);
        }
    }

    #[inline]
    fn planted(&self, fault: lacuna_abi::fault::Fault) -> bool {
        self.faults & fault.bit() != 0
    }

    #[inline]
    fn slips(&self, slip: lacuna_abi::fault::Slip) -> bool {
        self.faults & slip.bit() != 0
    }
}

/// The platform's calls that are recorded, with the code that made them.
impl SimMachine {
    /// Has the host write to the tables; nothing of this CPU's reaches the pool.
    fn write_directly(&self, site: u32, ops: &[TableOp]) -> Result<(), GateError> {
        let Some((number, cpu)) = self.enter() else { return Ok(()) };
        let were_on = cpu.interrupts_off();
        let call = |ops: &[TableOp]| {
            let called = self.table_ops(number, site, ops);
            let done = called.map_or_else(|error| error.index as usize, |()| ops.len());
            ops.iter().take(done).for_each(|op| self.ram.versions.count_op(op));
            called
        };
        let written = ring::write_directly(&self.ring(site), ops, call);
        cpu.interrupts_restore(were_on);
        written
    }

    fn write_entries_at(&self, site: u32, at: Gpa, write: &EntryWrite) {
        let Some((_, cpu)) = self.enter() else { return };
        let entries = self.entry_words(at, write.count);
        let store = |index: u64, entry: Entry| {
            // Below the count, which is that of the words.
            let word = &entries[index as usize];
            self.store_entry(site, at.wrapping_add(8 * index), word, entry);
            if index + 1 == u64::from(write.count) {
                self.ram.versions.count(write);
            }
        };
        self.show_sightings();
        let were_on = cpu.interrupts_off();
        ring::write_entries(&self.ring(site), write, store);
        cpu.interrupts_restore(were_on);
    }

    fn fill_table_at(&self, site: u32, fill: TableFill) {
        if self.enter().is_none() {
            return;
        }
        self.show_sightings();
        for index in 0..PAGE_SIZE / 8 {
            let at = fill.table.wrapping_add(8 * index);
            self.store_entry(site, at, self.entry_word(at), fill.entry(index));
        }
        self.record(site, Event::TableFill(fill));
    }

    fn life_at(&self, site: u32, life: Life, frames: FrameRange) {
        if self.enter().is_some() {
            self.record(site, Event::Life(life, frames));
        }
    }

    fn flush_at(&self, site: u32, flush: Flush) {
        if self.enter().is_none() {
            return;
        }
        self.record(site, Event::Flush(flush));
        let pcid = self.space.pcid;
        let what = match flush {
            Flush::Pages { va, count, level } => {
                for page in 0..u64::from(count) {
                    let va = va.wrapping_add(page * level.span());
                    let one = Flush::Pages { va, count: 1, level };
                    self.invalidate(site, one, &Invalidation::Page { va, pcid });
                }
                return;
            }
            Flush::NonGlobal => Invalidation::Pcid(pcid),
            Flush::Everything => Invalidation::Everything,
            Flush::PageOfPcid { va, pcid } => Invalidation::PageOfPcid { va, pcid },
            Flush::Pcid(pcid) => Invalidation::Pcid(pcid),
            Flush::AllPcids => Invalidation::NonGlobal,
        };
        self.invalidate(site, flush, &what);
    }
}

/// The CPU that runs, as shootdowns see it.
pub(super) struct Wire<'m>(pub(super) &'m SimMachine);

impl Interrupts for Wire<'_> {
    fn cpu(&self) -> usize {
        cpu::number()
    }

    fn interrupts_are_on(&self) -> bool {
        self.0.cpus[cpu::number()].interrupts_are_on()
    }

    fn send(&self, cpus: CpuSet) {
        if self.0.through_gate {
            self.0.interrupt_through_gate(cpus);
        } else {
            for (number, cpu) in self.0.cpus.iter().enumerate() {
                if cpus.contains(number) {
                    cpu.interrupt();
                }
            }
        }
        self.0.turns.stir();
    }

    // Parts of the code that asks for a shootdown, or serves one.
    #[inline(always)]
    fn flush(&self, flush: Flush) {
        Platform::flush(self.0, flush);
    }

    #[inline(always)]
    fn acknowledge(&self, number: u64) {
        self.0.record(here_in_code(), Event::ShootdownAck(number));
    }

    fn relax(&self) {
        Platform::relax(self.0);
    }

    fn unanswered(&self, number: u64, cpus: CpuSet) {
        self.0.report_unanswered(number, cpus);
    }
}

impl SimMachine {
    fn zero_physical(&self, number: usize, va: Gva, (start, len): (Gpa, u64)) {
        if len > 0 && !self.ram.zero(start, len) {
            self.fault(number, va, true, Fault::NoMemory(start));
        }
    }
}
