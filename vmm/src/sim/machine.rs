//! The simulated machine as the guest's code sees it: [`Platform`] and its services on simulated
//! CPUs. Each CPU is a thread of the host that runs the guest's own code natively; what goes through
//! [`Platform`] is simulated.

use super::baton::Over;
use super::calls::here;
use super::cpu::{self, Cpu};
use super::mmu::{Fault, MmuCounters};
use super::ram::Ram;
use super::random::Random;
use super::schedule::{Schedule, Turns};
use super::tlb::Invalidation;
use crate::gate::Gate;
use crate::machine::kvm::{CR0, CR4, EFER};
use crate::machine::state::Registers;
use crate::machine::sys::here_in_code;
use crate::run::End;
use crate::stop::Stop;
use lacuna_abi::addr::{FrameRange, Gpa, Gva, PAGE_SIZE};
use lacuna_abi::event::{EntryWrite, Event, Flush, Life, TableFill};
use lacuna_abi::gate::OpKind;
use lacuna_abi::paging::{Entry, Level};
use lacuna_guest::platform::{AddressSpace, CpuSet, GateError, Platform};
use lacuna_guest::ring;
use lacuna_guest::shootdown::{Interrupts, Shootdowns};
use std::panic::resume_unwind;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Calls of [`Platform`] between two looks at what is left to chance, as a power of two: 1 to this
/// many.
const LOOK_BITS: u64 = 6;
/// Of so many looks one passes the baton on.
const SWITCH: u64 = 2;

/// What a simulated CPU's thread unwinds with when the run is over. Nobody but the thread's own
/// start sees it.
pub(super) struct Halted;

/// A simulated machine that runs, as its guest's code sees it.
pub struct SimMachine {
    pub(super) ram: Ram,
    pub(super) gate: Arc<Mutex<Gate>>,
    pub(super) cpus: Box<[Cpu]>,
    pub(super) turns: Turns,
    shootdowns: Shootdowns,
    /// Shootdown interrupts go through the host.
    through_gate: bool,
    /// CPU 1 has turned its interrupts off for good (program `crash`).
    pub(super) stuck: AtomicBool,
    pub(super) space: AddressSpace,
    faults: u64,
    stop: Arc<Stop>,
    over: AtomicBool,
    end: Mutex<Option<(usize, End)>>,
    pub(super) started: Instant,
}

/// What a machine is made of.
pub(super) struct Parts {
    pub(super) ram: Ram,
    pub(super) gate: Arc<Mutex<Gate>>,
    pub(super) root: Gpa,
    pub(super) faults: u64,
    pub(super) through_gate: bool,
    pub(super) seed: u64,
    pub(super) schedule: Schedule,
    pub(super) stop: Arc<Stop>,
}

impl SimMachine {
    pub(super) fn new(parts: Parts) -> Self {
        let Parts { ram, gate, root, faults, through_gate, seed, schedule, stop } = parts;
        let cpus = ram.layout().cpus;
        Self {
            ram,
            gate,
            cpus: (0..cpus).map(|cpu| Cpu::new(cpu, seed)).collect(),
            turns: Turns::new(schedule, cpus, seed),
            shootdowns: Shootdowns::new(),
            through_gate,
            stuck: AtomicBool::new(false),
            space: AddressSpace { root, pcid: 0 },
            faults,
            stop,
            over: AtomicBool::new(false),
            end: Mutex::new(None),
            started: Instant::now(),
        }
    }

    /// How the run ended, and on which CPU. After all CPUs have stopped.
    pub(super) fn take_end(&self) -> Option<(usize, End)> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Ends the run. The first end stays.
    pub(super) fn ends(&self, cpu: usize, end: End) {
        self.end.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert((cpu, end));
        self.over.store(true, Release);
        self.turns.end();
    }

    /// Ends the run, and this CPU's thread.
    pub(super) fn end(&self, cpu: usize, end: End) -> ! {
        self.ends(cpu, end);
        self.halt()
    }

    /// Ends this CPU's thread: the guest's code is unwound. No message is printed.
    pub(super) fn halt(&self) -> ! {
        resume_unwind(Box::new(Halted))
    }

    /// Ends the run if it was told to stop.
    pub(super) fn halt_if_told(&self, number: usize) {
        if let Some(stopped) = self.stop.told() {
            self.end(number, End::Stopped(stopped, Box::new(here(number))));
        }
    }

    /// The registers of a CPU, as far as it has any.
    pub(super) fn registers(&self) -> Registers {
        Registers { cr0: CR0, cr3: self.space.root.0, cr4: CR4, efer: EFER, ..Registers::default() }
    }

    /// What the MMUs of all CPUs counted.
    pub(super) fn mmu_counters(&self) -> MmuCounters {
        self.cpus.iter().map(|cpu| cpu.mmu().counters()).fold(MmuCounters::default(), |sum, one| {
            MmuCounters {
                walks: sum.walks + one.walks,
                speculations: sum.speculations + one.speculations,
                stale_uses: sum.stale_uses + one.stale_uses,
                stale_secret_uses: sum.stale_secret_uses + one.stale_secret_uses,
            }
        })
    }

    pub(super) fn lock_gate(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Every call of [`Platform`] starts here: the CPU that makes it, after whatever happened
    /// meanwhile. `None` while the guest's code is unwound: what its destructors ask for then is
    /// not done.
    #[inline]
    pub(super) fn enter(&self) -> Option<(usize, &Cpu)> {
        if std::thread::panicking() {
            return None;
        }
        let number = cpu::number();
        let cpu = &self.cpus[number];
        if cpu.is_due() {
            self.look(number, false);
        }
        if cpu.is_wanted() {
            self.attend(number);
        }
        Some((number, cpu))
    }

    /// Does what is asked of this CPU from outside.
    #[cold]
    fn attend(&self, number: usize) {
        let cpu = &self.cpus[number];
        if cpu.takes_kick() && self.turns.stand_by(number) == Err(Over) {
            self.halt();
        }
        if cpu.takes_interrupt() {
            // The handler: interrupts are off meanwhile.
            cpu.interrupts_off();
            self.shootdowns.serve(&Wire(self));
            cpu.interrupts_restore(true);
            self.turns.stir();
        }
    }

    /// CPU 0 makes the other CPUs take part in shootdowns, before it starts them.
    pub(super) fn bring_online(&self) {
        self.shootdowns.bring_online(CpuSet::first(self.cpus.len()));
    }

    /// Lets shootdowns reach this CPU, which takes part in them from here on.
    pub(super) fn enable_interrupts(&self, number: usize) {
        self.shootdowns.serve(&Wire(self));
        self.cpus[number].interrupts_restore(true);
    }

    /// What is left to chance, and what comes from outside: the end of the run, another CPU's
    /// turn.
    #[cold]
    fn look(&self, number: usize, idle: bool) {
        if self.over.load(Acquire) {
            self.halt();
        }
        self.halt_if_told(number);
        let cpu = &self.cpus[number];
        let (until, switch) = {
            let mut mmu = cpu.mmu();
            mmu.whim(&self.ram, self.space);
            let random: &mut Random = mmu.random();
            (random.length(LOOK_BITS), random.one_in(SWITCH))
        };
        cpu.look_again_after(until);
        if (idle || switch) && self.turns.pass(number, idle) == Err(Over) {
            self.halt();
        }
    }

    /// A word of the table pool.
    #[inline]
    fn entry_word(&self, at: Gpa) -> &AtomicU64 {
        let word = self.ram.layout().pool.contains(at).then(|| self.ram.word(at)).flatten();
        word.unwrap_or_else(|| panic!("no table entry can be at {at}"))
    }

    pub(super) fn record(&self, site: u32, event: Event) {
        ring::record(&self.ring(site), event);
    }

    /// Physical address of `va` for an access of this CPU, or the end of the run.
    #[inline]
    fn reach(&self, number: usize, va: Gva, write: bool) -> Gpa {
        let mut mmu = self.cpus[number].mmu();
        match mmu.access(&self.ram, self.space, va, write) {
            Ok(gpa) => gpa,
            Err(fault) => {
                drop(mmu);
                self.fault(number, va, write, fault)
            }
        }
    }

    #[inline]
    fn word(&self, number: usize, va: Gva, write: bool) -> &AtomicU64 {
        assert!(va.is_aligned(8), "an access to {va}, which is not aligned");
        let gpa = self.reach(number, va, write);
        match self.ram.word(gpa) {
            Some(word) => word,
            None => self.fault(number, va, write, Fault::NoMemory(gpa)),
        }
    }
}

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
        Entry(self.entry_word(at).load(Acquire))
    }

    // What is recorded here is recorded as done by its caller, of which these are parts.
    #[inline(always)]
    fn write_entries(&self, at: Gpa, write: &EntryWrite) {
        self.write_entries_at(here_in_code(), at, write);
    }

    #[inline(always)]
    fn fill_table(&self, table: Gpa, level: Level, first: Entry) {
        self.fill_table_at(here_in_code(), TableFill { table, level, first });
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
    fn write_entries_at(&self, site: u32, at: Gpa, write: &EntryWrite) {
        let Some((_, cpu)) = self.enter() else { return };
        let store = |index: u64, entry: Entry| {
            self.entry_word(at.wrapping_add(8 * index)).store(entry.0, Release);
            if index + 1 == u64::from(write.count) {
                self.ram.versions.count(write);
            }
        };
        let were_on = cpu.interrupts_off();
        ring::write_entries(&self.ring(site), write, store);
        cpu.interrupts_restore(were_on);
    }

    fn fill_table_at(&self, site: u32, fill: TableFill) {
        if self.enter().is_none() {
            return;
        }
        for index in 0..PAGE_SIZE / 8 {
            let at = fill.table.wrapping_add(8 * index);
            self.entry_word(at).store(fill.entry(index).0, Release);
        }
        self.record(site, Event::TableFill(fill));
    }

    fn life_at(&self, site: u32, life: Life, frames: FrameRange) {
        if self.enter().is_some() {
            self.record(site, Event::Life(life, frames));
        }
    }

    fn flush_at(&self, site: u32, flush: Flush) {
        let Some((_, cpu)) = self.enter() else { return };
        self.record(site, Event::Flush(flush));
        let mut mmu = cpu.mmu();
        let pcid = self.space.pcid;
        match flush {
            Flush::Pages { va, count, level } => {
                for page in 0..u64::from(count) {
                    let va = va.wrapping_add(page * level.span());
                    mmu.invalidate(&Invalidation::Page { va, pcid });
                }
            }
            Flush::NonGlobal => mmu.invalidate(&Invalidation::Pcid(pcid)),
            Flush::Everything => mmu.invalidate(&Invalidation::Everything),
            Flush::PageOfPcid { va, pcid } => {
                mmu.invalidate(&Invalidation::PageOfPcid { va, pcid });
            }
            Flush::Pcid(pcid) => mmu.invalidate(&Invalidation::Pcid(pcid)),
            Flush::AllPcids => mmu.invalidate(&Invalidation::NonGlobal),
        }
    }
}

/// The CPU that runs, as shootdowns see it.
struct Wire<'m>(&'m SimMachine);

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
