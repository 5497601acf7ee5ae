//! What a simulated CPU tells the host: gate calls through its call page, records through its
//! ring, and how a fault ends the run. The words are those of the guest image.

use super::baton::Over;
use super::cpu;
use super::machine::SimMachine;
use super::mmu::Fault;
use super::schedule::{FloorPlan, ended};
use crate::gate::{GateFailure, Served, Vcpus};
use crate::machine::backtrace::place;
use crate::machine::decode::SealedAccess;
use crate::run::{End, GuestEnd, Place};
use lacuna_abi::addr::{FrameRange, Gva, PAGE_SIZE};
use lacuna_abi::counter::Counters;
use lacuna_abi::direct::{TableOp, TableWriter};
use lacuna_abi::event::{RECORD_WORDS, RING_BYTES};
use lacuna_abi::gate::{
    ARGS_WORD, COUNT_WORD, Call, CpuRegistration, LOG_BYTES, OpKind, OpWriter, PAGE_WORDS,
    STATUS_WORD, Status, vector_name,
};
use lacuna_abi::layout::{SEQUENCE_OFFSET, call_page_offset, report_page_offset, ring_offset};
use lacuna_guest::platform::{CpuSet, GateError};
use lacuna_guest::programs::Services;
use lacuna_guest::ring::Ring;
use std::fmt;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

const PAGE_FAULT: u64 = 14;
const GENERAL_PROTECTION: u64 = 13;
const RECORDS: usize = (PAGE_SIZE / 8) as usize;

/// The event ring of this CPU.
pub(super) struct OwnRing<'m> {
    machine: &'m SimMachine,
    cpu: usize,
    site: u32,
    words: &'m [AtomicU64],
    sequence: &'m AtomicU64,
}

impl Ring for OwnRing<'_> {
    fn cpu(&self) -> u8 {
        // Below MAX_CPUS, 8.
        self.cpu as u8
    }

    #[inline]
    fn site(&self) -> u32 {
        self.site
    }

    #[inline]
    fn sequence(&self) -> &AtomicU64 {
        self.sequence
    }

    #[inline]
    fn control(&self, word: usize) -> &AtomicU64 {
        &self.words[word]
    }

    #[inline]
    fn record(&self, record: usize, word: usize) -> &AtomicU64 {
        &self.words[RECORDS + record * RECORD_WORDS + word]
    }

    #[inline]
    fn put(&self, record: usize, words: &[u64; RECORD_WORDS]) {
        let places = &self.words[RECORDS + record * RECORD_WORDS..][..RECORD_WORDS];
        places.iter().zip(words).for_each(|(place, word)| place.store(*word, Relaxed));
    }

    fn drain(&self) {
        let _ = self.machine.call(self.cpu, Call::Drain);
    }
}

impl SimMachine {
    /// Words of the shared region. The layout has room for all that this module asks for.
    #[inline]
    fn shared(&self, offset: u64, count: usize) -> &[AtomicU64] {
        self.ram
            .region(&self.ram.layout().shared, offset, count)
            .unwrap_or_else(|| panic!("the shared region has no {count} words at {offset:#x}"))
    }

    #[inline]
    pub(super) fn ring(&self, site: u32) -> OwnRing<'_> {
        let cpu = cpu::number();
        let words = self.shared(ring_offset(cpu), (RING_BYTES / 8) as usize);
        OwnRing { machine: self, cpu, site, words, sequence: &self.shared(SEQUENCE_OFFSET, 1)[0] }
    }

    fn call_page(&self, number: usize) -> &[AtomicU64] {
        self.shared(call_page_offset(number), PAGE_WORDS)
    }

    /// Makes `call` with the arguments that lie in the call page.
    ///
    /// # Errors
    /// What the host answered, if it was not [`Status::Ok`].
    fn call(&self, number: usize, call: Call) -> Result<(), GateError> {
        self.serve(number, call);
        let word = self.call_page(number)[STATUS_WORD].load(Relaxed);
        let [status, index] = [word as u32, (word >> 32) as u32];
        match Status::from_number(status) {
            Some(Status::Ok) => Ok(()),
            Some(status) => {
                self.cpus[number].calls.refused.fetch_add(1, Relaxed);
                Err(GateError { status, index })
            }
            None => panic!("the host answered a gate call with {word:#x}"),
        }
    }

    /// Has the gate serve a call; does not come back from one that ends the run.
    fn serve(&self, number: usize, call: Call) {
        let calls = &self.cpus[number].calls;
        calls.made.fetch_add(1, Relaxed);
        let started = self.clock.now();
        let registers = || self.registers();
        let floor = FloorPlan { cpus: &self.cpus, registers: &registers };
        // Below MAX_CPUS, 8.
        let serve = |cpus: &mut dyn Vcpus| self.lock_gate().serve(call, number as u8, cpus);
        let served = self.turns.with_gate(number, &floor, serve);
        // Only this CPU's thread writes it.
        let ticks = self.clock.now().saturating_sub(started);
        calls.ticks.store(calls.ticks.load(Relaxed) + ticks, Relaxed);
        match served {
            Err(Over) => self.halt(),
            // A call that was broken off has an answer that no guest should see.
            Ok(Ok(Served::Resume)) => self.halt_if_told(number),
            Ok(Ok(Served::Exit(status, counters))) => self.end(number, End::Exit(status, counters)),
            Ok(Ok(Served::Panic(message))) => {
                self.end(number, guest_end(number, "panic", message));
            }
            Ok(Ok(Served::Exception(report))) => {
                let message = vector_name(report.vector).to_owned();
                self.end(number, guest_end(number, "exception", message));
            }
            Ok(Ok(Served::Unanswered { missing, waited })) => {
                self.end(number, unanswered(number, missing, waited));
            }
            Ok(Err(failure)) => self.end(number, failure.into()),
        }
    }

    /// Has the host take what it has seen, in the middle of whatever this CPU does.
    pub(super) fn make_room(&self, number: usize) {
        let registers = || self.registers();
        let floor = FloorPlan { cpus: &self.cpus, registers: &registers };
        // Below MAX_CPUS, 8.
        let take = |_: &mut dyn Vcpus| self.lock_gate().take_sightings(number as u8);
        match self.turns.with_gate(number, &floor, take) {
            Err(Over) => self.halt(),
            Ok(Ok(())) => {}
            Ok(Err(failure)) => self.end(number, failure.into()),
        }
    }

    /// Has the host send the shootdown interrupt.
    pub(super) fn interrupt_through_gate(&self, cpus: CpuSet) {
        let number = cpu::number();
        self.call_page(number)[ARGS_WORD].store(cpus.0.into(), Relaxed);
        if let Err(error) = self.call(number, Call::Interrupt) {
            panic!("the host refused to interrupt CPUs {:#b}: {error:?}", cpus.0);
        }
    }

    /// Tells the host that these CPUs have not answered a shootdown of this one.
    pub(super) fn report_unanswered(&self, shootdown: u64, cpus: CpuSet) {
        let number = cpu::number();
        put(self.call_page(number), ARGS_WORD, &[cpus.0.into(), shootdown]);
        // A host that refuses this only keeps no time.
        let _ = self.call(number, Call::Unanswered);
    }

    /// Has the host start the other CPUs.
    pub(super) fn start_cpus(&self) {
        if let Err(error) = self.call(cpu::number(), Call::StartCpus) {
            panic!("the host refused to start the other CPUs: {error:?}");
        }
    }

    /// Makes the operations, in as few calls as the call page allows.
    pub(super) fn operations(
        &self,
        number: usize,
        ops: &[(OpKind, FrameRange)],
    ) -> Result<(), GateError> {
        let page = self.call_page(number);
        let mut done = 0;
        while done < ops.len() {
            let first = done;
            let mut writer = OpWriter::new(|word, value| page[word].store(value, Relaxed));
            while done < ops.len() && writer.push(ops[done].0, ops[done].1).is_ok() {
                done += 1;
            }
            self.call(number, Call::Ops)
                .map_err(|error| GateError { index: error.index + first as u32, ..error })?;
        }
        Ok(())
    }

    /// Has the host carry out operations on page tables, no more than fit in a call.
    pub(super) fn table_ops(
        &self,
        number: usize,
        site: u32,
        ops: &[TableOp],
    ) -> Result<(), GateError> {
        let page = self.call_page(number);
        let mut writer = TableWriter::new(|word, value| page[word].store(value, Relaxed), site);
        for op in ops {
            assert!(writer.push(op).is_ok(), "{} operations do not fit in a call", ops.len());
        }
        self.call(number, Call::Tables)
    }

    /// Tells the host that the allocator is ready. A simulated CPU has no descriptor tables.
    pub(super) fn ready(&self, number: usize) {
        put(self.call_page(number), ARGS_WORD, &CpuRegistration::default().to_words());
        let _ = self.call(number, Call::Ready);
    }

    /// Ends the program.
    pub(super) fn exit(&self, number: usize, status: u64, mut counters: Counters) -> ! {
        counters.gate_calls = self.sum_of_calls(|calls| &calls.made);
        counters.gate_refused = self.sum_of_calls(|calls| &calls.refused);
        let page = self.call_page(number);
        page[ARGS_WORD].store(status, Relaxed);
        put(page, ARGS_WORD + 1, &counters.to_words());
        self.serve(number, Call::Exit);
        self.halt()
    }

    /// The guest's code has panicked and is unwound: tells the host, which ends the run.
    pub(super) fn panicked(&self, number: usize, message: &str) -> ! {
        let page = self.shared(report_page_offset(number), PAGE_WORDS);
        put_text(page, message);
        self.serve(number, Call::Panic);
        self.halt()
    }

    /// An access of the guest did not take place: the end of the run.
    pub(super) fn fault(&self, number: usize, va: Gva, write: bool, fault: Fault) -> ! {
        let kind = if write { "write" } else { "read" };
        let end = match fault {
            Fault::Sealed(gpa, kind) => {
                let access = SealedAccess { gpa, kind, va: Some(va), rip: 0, instruction: None };
                End::Sealed(Box::new(access), Box::new(here(number)))
            }
            Fault::Page { present } => {
                let error = u64::from(present) | u64::from(write) << 1;
                let mut message =
                    format!("{}, error code {error:#x}, address {va}", vector_name(PAGE_FAULT));
                if let Some(what) = place(self.ram.layout(), va) {
                    message += &format!(" ({what})");
                }
                guest_end(number, "exception", message)
            }
            Fault::NotCanonical => {
                let message = format!("{}: {kind} of {va}", vector_name(GENERAL_PROTECTION));
                guest_end(number, "exception", message)
            }
            Fault::NoMemory(gpa) => {
                let message = format!("{kind} of guest-physical {gpa}, where there is no memory");
                guest_end(number, "no-memory", message)
            }
        };
        self.end(number, end)
    }

    /// Checks everything once more, when no CPU runs any longer.
    ///
    /// # Errors
    /// As [`crate::gate::Gate::finish`].
    pub(super) fn finish(&self, number: usize, done: bool) -> Result<(), GateFailure> {
        let registers = || self.registers();
        let floor = FloorPlan { cpus: &self.cpus, registers: &registers };
        self.lock_gate().finish(number as u8, &mut ended(&floor), done)
    }

    /// One of the counts of calls, of all CPUs.
    pub(super) fn sum_of_calls(&self, of: fn(&cpu::Calls) -> &AtomicU64) -> u64 {
        self.cpus.iter().map(|cpu| of(&cpu.calls).load(Relaxed)).sum()
    }
}

fn guest_end(number: usize, kind: &'static str, message: String) -> End {
    End::Guest(Box::new(GuestEnd { kind, message, place: here(number) }))
}

/// CPUs have not answered a shootdown of CPU `number`.
fn unanswered(number: usize, missing: u8, waited: Duration) -> End {
    let missing: Vec<usize> = (0..8).filter(|cpu| missing & 1 << cpu != 0).collect();
    let message = format!(
        "CPUs {missing:?} have not answered a shootdown of CPU {number} for {} s. A CPU must answer \
         within [limits] shootdown_s: it may not loop or wait with interrupts off",
        waited.as_secs()
    );
    guest_end(missing.first().copied().unwrap_or(number), "shootdown", message)
}

/// The CPU is all that is known of a place: the guest's code has no addresses of its own here.
pub(super) fn here(number: usize) -> Place {
    Place { cpu: number as u8, ..Place::default() }
}

impl Services for SimMachine {
    fn log(&self, text: fmt::Arguments<'_>) {
        let number = cpu::number();
        put_text(self.call_page(number), &text.to_string());
        let _ = self.call(number, Call::Log);
    }

    fn progress(&self, done: u64) {
        let number = cpu::number();
        self.shared(SEQUENCE_OFFSET, 1 + self.cpus.len())[1 + number].store(done, Relaxed);
    }

    fn clock(&self) -> u64 {
        self.clock.now()
    }

    fn gate_clock(&self) -> u64 {
        self.cpus[cpu::number()].calls.ticks.load(Relaxed)
    }

    fn input_done(&self) {
        if let Err(error) = self.call(cpu::number(), Call::InputDone) {
            panic!("the host refused to wipe the input: {error:?}");
        }
    }

    fn checkpoint(&self) {
        let _ = self.call(cpu::number(), Call::Checkpoint);
    }
}

fn put(page: &[AtomicU64], from: usize, words: &[u64]) {
    for (place, word) in page[from..].iter().zip(words) {
        place.store(*word, Relaxed);
    }
}

/// Writes text into a call or report page, cut off at its end.
fn put_text(page: &[AtomicU64], text: &str) {
    let bytes = &text.as_bytes()[..text.len().min(LOG_BYTES)];
    for (place, chunk) in page[ARGS_WORD..].iter().zip(bytes.chunks(8)) {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        place.store(u64::from_le_bytes(word), Relaxed);
    }
    page[COUNT_WORD].store(bytes.len() as u64, Relaxed);
}
