//! The shootdown mailbox: CPUs that ask others to flush and serve what they are asked, without a
//! lock. A CPU's TLB is one word, loaded from the one table entry that there is when the CPU
//! flushes; the entry is ordered by nothing but what the mailbox orders. So a CPU that flushed
//! too early, or whose answer was believed too early, keeps the old translation.

use super::check;
use crate::platform::CpuSet;
use crate::shootdown::{Interrupts, Shootdowns};
use crate::sync::checked::{Op, Slip, plant};
use core::cell::{Cell, RefCell};
use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use lacuna_abi::addr::Gva;
use lacuna_abi::event::Flush;
use lacuna_abi::paging::Level;
use loom::sync::Arc;
use loom::sync::atomic::AtomicU64;
use loom::thread;
use std::vec::Vec;

/// What all CPUs share.
struct Bus {
    shootdowns: Shootdowns,
    entries: [AtomicU64; 3],
    /// For each CPU, what its TLB holds of each entry.
    tlbs: [[AtomicU64; 3]; 3],
}

impl Bus {
    /// With these CPUs online.
    fn new(cpus: usize) -> Arc<Self> {
        let words = || core::array::from_fn(|_| AtomicU64::new(0));
        let tlbs = core::array::from_fn(|_| words());
        let bus = Self { shootdowns: Shootdowns::default(), entries: words(), tlbs };
        bus.shootdowns.bring_online(CpuSet::first(cpus));
        Arc::new(bus)
    }
}

struct Cpu {
    bus: Arc<Bus>,
    number: usize,
    flushes: RefCell<Vec<Flush>>,
    answered: Cell<u64>,
    /// Interrupts that this CPU sends start threads, which is quicker to follow than CPUs that look
    /// for interrupts all the time; but a thread also sees what was stored before it was started.
    starts: bool,
    started: RefCell<Vec<thread::JoinHandle<()>>>,
}

impl Cpu {
    fn new(bus: &Arc<Bus>, number: usize) -> Self {
        Self {
            bus: bus.clone(),
            number,
            flushes: RefCell::default(),
            answered: Cell::new(0),
            starts: false,
            started: RefCell::default(),
        }
    }

    /// Changes this CPU's entry, has all CPUs flush, and looks into their TLBs.
    fn change(&self, value: u64, flush: Flush, cpus: usize) {
        self.bus.entries[self.number].store(value, Relaxed);
        self.bus.shootdowns.run(self, flush, CpuSet::first(cpus));
        for tlb in &self.bus.tlbs[..cpus] {
            assert_eq!(tlb[self.number].load(Relaxed), value, "a stale translation is left");
        }
    }

    /// Looks for interrupts until `count` shootdowns were answered.
    fn answer(&self, count: u64) {
        while self.answered.get() < count {
            self.relax();
        }
    }
}

impl Interrupts for Cpu {
    fn cpu(&self) -> usize {
        self.number
    }

    fn interrupts_are_on(&self) -> bool {
        true
    }

    fn send(&self, cpus: CpuSet) {
        for number in (0..3).filter(|cpu| self.starts && cpus.contains(*cpu)) {
            let cpu = Cpu::new(&self.bus, number);
            let interrupt = thread::spawn(move || cpu.bus.shootdowns.serve(&cpu));
            self.started.borrow_mut().push(interrupt);
        }
    }

    fn flush(&self, flush: Flush) {
        for (cached, entry) in self.bus.tlbs[self.number].iter().zip(&self.bus.entries) {
            cached.store(entry.load(Relaxed), Relaxed);
        }
        self.flushes.borrow_mut().push(flush);
    }

    fn acknowledge(&self, _: u64) {
        self.answered.set(self.answered.get() + 1);
    }

    fn relax(&self) {
        self.bus.shootdowns.serve(self);
        thread::yield_now();
    }

    fn unanswered(&self, _: u64, _: CpuSet) {}
}

const PAGES: Flush = Flush::Pages { va: Gva(0x7000), count: 9, level: Level::Pd };

/// CPU 0 changes an entry twice, with a different flush each time, while CPU 1 serves.
fn two_in_a_row() {
    check(Some(3), || {
        let bus = Bus::new(2);
        let other = thread::spawn({
            let cpu = Cpu::new(&bus, 1);
            move || {
                cpu.answer(2);
                cpu.flushes.into_inner()
            }
        });
        let cpu = Cpu::new(&bus, 0);
        cpu.change(1, PAGES, 2);
        cpu.change(2, Flush::Everything, 2);
        assert_eq!(other.join().unwrap(), [PAGES, Flush::Everything], "what was asked");
    });
}

/// Two CPUs shoot at each other.
fn at_each_other() {
    check(Some(3), || {
        let bus = Bus::new(2);
        let other = thread::spawn({
            let cpu = Cpu::new(&bus, 1);
            move || {
                cpu.change(1, Flush::NonGlobal, 2);
                cpu.answer(1);
            }
        });
        let cpu = Cpu::new(&bus, 0);
        cpu.change(1, Flush::Everything, 2);
        cpu.answer(1);
        other.join().unwrap();
    });
}

/// CPU 0 shoots at two others at once.
fn at_two_others() {
    check(Some(3), || {
        let cpu = Cpu { starts: true, ..Cpu::new(&Bus::new(3), 0) };
        cpu.change(1, PAGES, 3);
        cpu.started.take().into_iter().for_each(|interrupt| interrupt.join().unwrap());
    });
}

#[test]
fn each_shootdown_returns_after_its_own_flushes() {
    two_in_a_row();
}

#[test]
fn cpus_that_shoot_at_each_other_both_return() {
    at_each_other();
}

#[test]
fn two_cpus_answer_one_request() {
    at_two_others();
}

#[test]
#[should_panic(expected = "a stale translation is left")]
fn twin_a_request_that_is_published_relaxed_is_served_too_early() {
    let _planted = plant(Slip::Relaxed(Op::Store, 8, Release));
    two_in_a_row();
}

#[test]
#[should_panic(expected = "a stale translation is left")]
fn twin_a_request_that_is_looked_for_relaxed_is_served_or_believed_too_early() {
    let _planted = plant(Slip::Relaxed(Op::Load, 8, Acquire));
    at_each_other();
}

#[test]
#[should_panic(expected = "a stale translation is left")]
fn twin_an_answer_that_is_given_relaxed_is_believed_too_early() {
    let _planted = plant(Slip::Relaxed(Op::And, 8, AcqRel));
    at_each_other();
}

// An answer that is lost is waited for without end.
#[test]
#[should_panic(expected = "maximum number of branches")]
fn twin_an_answer_that_is_given_in_two_steps_takes_back_another() {
    let _planted = plant(Slip::TwoSteps(Op::And, 8));
    at_two_others();
}
