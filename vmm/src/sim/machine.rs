//! The simulated machine: its CPUs, how each comes out of the guest's code, how its accesses reach
//! memory, and how the run ends. Each CPU is a thread of the host that runs the guest's own code
//! natively; what goes through [`lacuna_guest::platform::Platform`] is simulated.

use super::baton::Over;
use super::calls::here;
use super::cpu::{self, Cpu};
use super::mmu::{Fault, MmuCounters};
use super::platform::Wire;
use super::ram::Ram;
use super::random::Random;
use super::schedule::{Schedule, Turns};
use crate::events::Sightings;
use crate::gate::Gate;
use crate::machine::kvm::{CR0, CR4, EFER};
use crate::machine::state::Registers;
use crate::run::End;
use crate::stop::Stop;
use crate::ticks::Ticks;
use lacuna_abi::addr::{Gpa, Gva};
use lacuna_abi::event::Event;
use lacuna_abi::layout::Layout;
use lacuna_guest::platform::{AddressSpace, CpuSet};
use lacuna_guest::ring;
use lacuna_guest::shootdown::Shootdowns;
use std::panic::resume_unwind;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Calls of the platform between two looks at what is left to chance, as a power of two: 1 to this
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
    pub(super) shootdowns: Shootdowns,
    /// Shootdown interrupts go through the host.
    pub(super) through_gate: bool,
    /// The host writes entries: direct paging.
    pub(super) direct: bool,
    /// CPU 1 has turned its interrupts off for good (program `crash`).
    pub(super) stuck: AtomicBool,
    pub(super) space: AddressSpace,
    pub(super) faults: u64,
    /// Where it puts what it sees, if it is to see anything.
    pub(super) sightings: Option<Arc<Sightings>>,
    stop: Arc<Stop>,
    over: AtomicBool,
    end: Mutex<Option<(usize, End)>>,
    pub(super) clock: Ticks,
}

/// What a machine is made of.
pub(super) struct Parts {
    pub(super) ram: Ram,
    pub(super) gate: Arc<Mutex<Gate>>,
    pub(super) root: Gpa,
    pub(super) faults: u64,
    pub(super) through_gate: bool,
    pub(super) direct: bool,
    pub(super) seed: u64,
    pub(super) schedule: Schedule,
    pub(super) stop: Arc<Stop>,
    pub(super) sightings: Option<Arc<Sightings>>,
}

impl SimMachine {
    pub(super) fn new(parts: Parts) -> Self {
        let Parts {
            ram,
            gate,
            root,
            faults,
            through_gate,
            direct,
            seed,
            schedule,
            stop,
            sightings,
        } = parts;
        let cpus = ram.layout().cpus;
        Self {
            ram,
            gate,
            cpus: (0..cpus).map(|cpu| Cpu::new(cpu, seed)).collect(),
            turns: Turns::new(schedule, cpus, seed),
            shootdowns: Shootdowns::new(),
            through_gate,
            direct,
            stuck: AtomicBool::new(false),
            space: AddressSpace { root, pcid: 0 },
            faults,
            sightings,
            stop,
            over: AtomicBool::new(false),
            end: Mutex::new(None),
            clock: Ticks::start(),
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

    /// Every call of the platform starts here: the CPU that makes it, after whatever happened
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
    pub(super) fn attend(&self, number: usize) {
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
    pub(super) fn look(&self, number: usize, idle: bool) {
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

    /// What the guest sees of an entry: under direct paging a word of its copy of the tables.
    #[inline]
    pub(super) fn entry_seen(&self, at: Gpa) -> &AtomicU64 {
        let Layout { pool, table_copy, .. } = self.ram.layout();
        match at.offset_from(pool.gpa).filter(|offset| self.direct && *offset < pool.len) {
            Some(offset) => self.ram.word(table_copy.gpa.wrapping_add(offset)),
            None => None,
        }
        .unwrap_or_else(|| self.entry_word(at))
    }

    /// A word of the table pool.
    #[inline]
    pub(super) fn entry_word(&self, at: Gpa) -> &AtomicU64 {
        let word = self.ram.layout().pool.contains(at).then(|| self.ram.word(at)).flatten();
        word.unwrap_or_else(|| panic!("no table entry can be at {at}"))
    }

    /// Consecutive words of the table pool.
    #[inline]
    pub(super) fn entry_words(&self, at: Gpa, count: u32) -> &[AtomicU64] {
        let pool = &self.ram.layout().pool;
        let words = at.offset_from(pool.gpa);
        let words = words.and_then(|offset| self.ram.region(pool, offset, count as usize));
        words.unwrap_or_else(|| panic!("no {count} table entries can be at {at}"))
    }

    pub(super) fn record(&self, site: u32, event: Event) {
        ring::record(&self.ring(site), event);
    }

    /// Physical address of `va` for an access of this CPU, or the end of the run.
    #[inline]
    pub(super) fn reach(&self, number: usize, va: Gva, write: bool) -> Gpa {
        let mut mmu = self.cpus[number].mmu();
        let reached = mmu.access(&self.ram, self.space, va, write);
        drop(mmu);
        match reached {
            Ok(gpa) => {
                self.see_access(number, va, write);
                gpa
            }
            Err(fault) => self.fault(number, va, write, fault),
        }
    }

    #[inline]
    pub(super) fn word(&self, number: usize, va: Gva, write: bool) -> &AtomicU64 {
        assert!(va.is_aligned(8), "an access to {va}, which is not aligned");
        let gpa = self.reach(number, va, write);
        match self.ram.word(gpa) {
            Some(word) => word,
            None => self.fault(number, va, write, Fault::NoMemory(gpa)),
        }
    }
}
