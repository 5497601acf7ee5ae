//! The simulated machine as the guest's code sees it: [`Platform`] and [`Services`] on simulated
//! CPUs. Each CPU is a thread of the host that runs the guest's own code natively; what goes through
//! [`Platform`] is simulated.

use super::baton::{Baton, Over};
use super::calls::here;
use super::cpu::{self, Cpu, Request};
use super::mmu::{Fault, MmuCounters};
use super::ram::Ram;
use super::random::Random;
use super::tlb::Invalidation;
use crate::gate::Gate;
use crate::machine::kvm::{CR0, CR4, EFER};
use crate::machine::state::Registers;
use crate::run::End;
use crate::stop::Stop;
use lacuna_abi::addr::{FrameRange, Gpa, Gva, PAGE_SIZE};
use lacuna_abi::event::{EntryWrite, Event, Flush, Life};
use lacuna_abi::gate::OpKind;
use lacuna_abi::paging::Entry;
use lacuna_guest::platform::{AddressSpace, CpuSet, GateError, Platform};
use lacuna_guest::ring;
use std::panic::resume_unwind;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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
    pub(super) baton: Baton,
    space: AddressSpace,
    faults: u64,
    stop: Arc<Stop>,
    over: AtomicBool,
    end: Mutex<Option<(usize, End)>>,
    shootdowns: AtomicU64,
}

/// What a machine is made of.
pub(super) struct Parts {
    pub(super) ram: Ram,
    pub(super) gate: Arc<Mutex<Gate>>,
    pub(super) root: Gpa,
    pub(super) faults: u64,
    pub(super) seed: u64,
    pub(super) stop: Arc<Stop>,
}

impl SimMachine {
    pub(super) fn new(parts: Parts) -> Self {
        let Parts { ram, gate, root, faults, seed, stop } = parts;
        let cpus = ram.layout().cpus;
        Self {
            ram,
            gate,
            cpus: (0..cpus).map(|cpu| Cpu::new(cpu, seed)).collect(),
            baton: Baton::new(cpus, seed),
            space: AddressSpace { root, pcid: 0 },
            faults,
            stop,
            over: AtomicBool::new(false),
            end: Mutex::new(None),
            shootdowns: AtomicU64::new(0),
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
        self.baton.end();
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
    fn enter(&self) -> Option<(usize, &Cpu)> {
        if std::thread::panicking() {
            return None;
        }
        let number = cpu::number();
        let cpu = &self.cpus[number];
        if cpu.is_due() {
            self.look(number, false);
        }
        if cpu.takes_interrupt() {
            self.interrupt(cpu);
        }
        Some((number, cpu))
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
        if (idle || switch) && self.baton.pass(number, idle) == Err(Over) {
            self.halt();
        }
    }

    /// The handler of the one interrupt that there is: carries out what shootdowns ask for.
    fn interrupt(&self, cpu: &Cpu) {
        let were_on = cpu.interrupts_off();
        for Request { flush, number, from } in cpu.take_requests() {
            self.flush(flush);
            self.record(Event::ShootdownAck(number));
            self.cpus[from].acknowledged();
            self.baton.nudge(from);
        }
        cpu.interrupts_restore(were_on);
    }

    fn record(&self, event: Event) {
        ring::record(&self.ring(), event);
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
        if cpu.takes_interrupt() {
            self.interrupt(cpu);
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
        let cpu = &self.cpus[number];
        if cpu.takes_interrupt() {
            self.interrupt(cpu);
        }
    }

    fn read_entry(&self, at: Gpa) -> Entry {
        // Also while unwinding: destructors rely on what they read.
        let pool = &self.ram.layout().pool;
        let word = pool.contains(at).then(|| self.ram.word(at)).flatten();
        Entry(word.unwrap_or_else(|| panic!("no table entry can be at {at}")).load(Acquire))
    }

    fn write_entries(&self, at: Gpa, write: &EntryWrite) {
        let Some((_, cpu)) = self.enter() else { return };
        let pool = &self.ram.layout().pool;
        let store = |index: u64, entry: Entry| {
            let at = at.wrapping_add(8 * index);
            let word = pool.contains(at).then(|| self.ram.word(at)).flatten();
            word.unwrap_or_else(|| panic!("no table entry can be at {at}")).store(entry.0, Release);
            if index + 1 == u64::from(write.count) {
                self.ram.versions.count(write);
            }
        };
        let were_on = cpu.interrupts_off();
        ring::write_entries(&self.ring(), write, store);
        cpu.interrupts_restore(were_on);
    }

    fn flush(&self, flush: Flush) {
        let Some((_, cpu)) = self.enter() else { return };
        self.record(Event::Flush(flush));
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
        }
    }

    fn shootdown(&self, flush: Flush, cpus: CpuSet) {
        let Some((number, cpu)) = self.enter() else { return };
        assert!(cpu.interrupts_are_on(), "a shootdown with interrupts off, or a lock held");
        let others = (0..self.cpus.len()).filter(|other| *other != number && cpus.contains(*other));
        let shootdown = self.shootdowns.fetch_add(1, AcqRel) + 1;
        cpu.await_acknowledgements(others.clone().count());
        for other in others {
            self.cpus[other].ask(Request { flush, number: shootdown, from: number });
            self.baton.nudge(other);
        }
        if cpus.contains(number) {
            self.flush(flush);
        }
        while cpu.is_unanswered() {
            self.relax();
        }
    }

    fn gate(&self, ops: &[(OpKind, FrameRange)]) -> Result<(), GateError> {
        self.enter().map_or(Ok(()), |(number, _)| self.operations(number, ops))
    }

    #[inline]
    fn life(&self, life: Life, frames: FrameRange) {
        if self.enter().is_some() {
            self.record(Event::Life(life, frames));
        }
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
}

impl SimMachine {
    fn zero_physical(&self, number: usize, va: Gva, (start, len): (Gpa, u64)) {
        if len > 0 && !self.ram.zero(start, len) {
            self.fault(number, va, true, Fault::NoMemory(start));
        }
    }
}
