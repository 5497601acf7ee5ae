//! Shootdowns between threads that pretend to be CPUs: interrupts are flags that a CPU looks at
//! while it waits or works.

use crate::platform::CpuSet;
use crate::shootdown::{Interrupts, Shootdowns};
use lacuna_abi::MAX_CPUS;
use lacuna_abi::addr::Gva;
use lacuna_abi::event::Flush;
use lacuna_abi::paging::Level;
use std::cell::Cell;
use std::sync::Mutex;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::vec::Vec;

const PAGES: Flush = Flush::Pages { va: Gva(0xffff_9100_0000_7000), count: 9, level: Level::Pd };

/// What all CPUs share.
#[derive(Default)]
struct Bus {
    shootdowns: Shootdowns,
    pending: [AtomicBool; MAX_CPUS],
    sent: AtomicUsize,
    flushes: Mutex<Vec<(usize, Flush)>>,
    acknowledged: Mutex<Vec<(usize, u64)>>,
    unanswered: Mutex<Vec<(usize, CpuSet)>>,
    /// What a revoke would be: counted up before a shootdown.
    epoch: [AtomicU64; MAX_CPUS],
    /// For each CPU, what it knew of the others when it last flushed.
    seen: [[AtomicU64; MAX_CPUS]; MAX_CPUS],
}

/// One CPU.
struct Cpu<'b> {
    bus: &'b Bus,
    number: usize,
    interrupts_on: Cell<bool>,
    /// A CPU that does not look at its interrupts.
    deaf: bool,
}

impl<'b> Cpu<'b> {
    fn new(bus: &'b Bus, number: usize) -> Self {
        Self { bus, number, interrupts_on: Cell::new(true), deaf: false }
    }

    /// Takes the interrupt that is pending, if interrupts are on.
    fn poll(&self) {
        if !self.deaf
            && self.interrupts_on.get()
            && self.bus.pending[self.number].swap(false, SeqCst)
        {
            self.interrupts_on.set(false);
            self.bus.shootdowns.serve(self);
            self.interrupts_on.set(true);
        }
    }

    fn shoot(&self, flush: Flush, cpus: CpuSet) {
        self.bus.shootdowns.run(self, flush, cpus);
    }
}

impl Interrupts for Cpu<'_> {
    fn cpu(&self) -> usize {
        self.number
    }

    fn interrupts_are_on(&self) -> bool {
        self.interrupts_on.get()
    }

    fn send(&self, cpus: CpuSet) {
        self.bus.sent.fetch_add(1, SeqCst);
        for cpu in (0..MAX_CPUS).filter(|cpu| cpus.contains(*cpu)) {
            self.bus.pending[cpu].store(true, SeqCst);
        }
    }

    fn flush(&self, flush: Flush) {
        for (seen, epoch) in self.bus.seen[self.number].iter().zip(&self.bus.epoch) {
            seen.store(epoch.load(SeqCst), SeqCst);
        }
        self.bus.flushes.lock().unwrap().push((self.number, flush));
    }

    fn acknowledge(&self, number: u64) {
        self.bus.acknowledged.lock().unwrap().push((self.number, number));
    }

    fn relax(&self) {
        self.poll();
        std::thread::yield_now();
    }

    fn unanswered(&self, _number: u64, cpus: CpuSet) {
        self.bus.unanswered.lock().unwrap().push((self.number, cpus));
    }
}

/// Runs `body` as CPU 0 while the other CPUs serve interrupts.
fn with_others(bus: &Bus, cpus: usize, body: impl FnOnce(&Cpu<'_>)) {
    bus.shootdowns.bring_online(CpuSet::first(cpus));
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for number in 1..cpus {
            let done = &done;
            scope.spawn(move || {
                let cpu = Cpu::new(bus, number);
                while !done.load(SeqCst) {
                    cpu.relax();
                }
            });
        }
        body(&Cpu::new(bus, 0));
        done.store(true, SeqCst);
    });
}

#[test]
fn every_cpu_of_the_set_flushes_and_acknowledges_once() {
    let others = [Flush::Pcid(7), Flush::AllPcids, Flush::PageOfPcid { va: Gva(4096), pcid: 4095 }];
    for flush in [Flush::Everything, Flush::NonGlobal, PAGES].into_iter().chain(others) {
        let bus = Bus::default();
        with_others(&bus, 4, |cpu| cpu.shoot(flush, CpuSet(0b1011)));
        let mut flushes = bus.flushes.lock().unwrap().clone();
        flushes.sort_by_key(|(cpu, _)| *cpu);
        assert_eq!(flushes, [(0, flush), (1, flush), (3, flush)]);
        let mut acknowledged = bus.acknowledged.lock().unwrap().clone();
        acknowledged.sort_unstable();
        assert_eq!(acknowledged, [(1, 1), (3, 1)]);
    }
}

#[test]
fn a_set_without_others_sends_nothing() {
    let bus = Bus::default();
    let cpu = Cpu::new(&bus, 0);
    // CPUs that were not started are no others.
    cpu.shoot(Flush::Everything, CpuSet::first(8));
    assert_eq!(*bus.flushes.lock().unwrap(), [(0, Flush::Everything)]);
    cpu.shoot(Flush::Everything, CpuSet(0b10));
    assert_eq!((bus.flushes.lock().unwrap().len(), bus.sent.load(SeqCst)), (1, 0));
}

#[test]
fn what_was_asked_before_interrupts_reach_a_cpu_waits_for_it() {
    let bus = Bus::default();
    bus.shootdowns.bring_online(CpuSet(0b10));
    std::thread::scope(|scope| {
        let first = scope.spawn(|| Cpu::new(&bus, 0).shoot(PAGES, CpuSet(0b11)));
        while bus.sent.load(SeqCst) == 0 {
            std::thread::yield_now();
        }
        // The interrupt came to nothing.
        bus.pending[1].store(false, SeqCst);
        bus.shootdowns.serve(&Cpu::new(&bus, 1));
        first.join().unwrap();
    });
    assert!(bus.flushes.lock().unwrap().contains(&(1, PAGES)));
}

#[test]
fn all_cpus_shoot_at_each_other_and_each_returns_when_all_have_flushed() {
    const CPUS: usize = 4;
    const ROUNDS: u64 = 300;
    let bus = Bus::default();
    bus.shootdowns.bring_online(CpuSet::first(CPUS));
    let finished = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for number in 0..CPUS {
            let (bus, finished) = (&bus, &finished);
            scope.spawn(move || {
                let cpu = Cpu::new(bus, number);
                for round in 1..=ROUNDS {
                    bus.epoch[number].store(round, SeqCst);
                    cpu.shoot(Flush::Everything, CpuSet::first(CPUS));
                    for other in 0..CPUS {
                        let seen = bus.seen[other][number].load(SeqCst);
                        assert!(seen >= round, "CPU {other} flushed before round {round}");
                    }
                    cpu.poll();
                }
                finished.fetch_add(1, SeqCst);
                while finished.load(SeqCst) < CPUS {
                    cpu.relax();
                }
            });
        }
    });
    let acknowledged = bus.acknowledged.lock().unwrap();
    assert_eq!(acknowledged.len() as u64, ROUNDS * (CPUS * (CPUS - 1)) as u64);
}

#[test]
fn a_cpu_that_does_not_answer_is_named_while_it_is_missing() {
    let bus = Bus::default();
    bus.shootdowns.bring_online(CpuSet::first(3));
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let cpu = Cpu::new(&bus, 1);
            while !done.load(SeqCst) {
                cpu.relax();
            }
        });
        scope.spawn(|| {
            let deaf = Cpu { deaf: true, ..Cpu::new(&bus, 2) };
            while bus.unanswered.lock().unwrap().len() < 3 {
                deaf.relax();
            }
            let cpu = Cpu::new(&bus, 2);
            while !done.load(SeqCst) {
                cpu.relax();
            }
        });
        Cpu::new(&bus, 0).shoot(Flush::Everything, CpuSet::first(3));
        done.store(true, SeqCst);
    });
    let unanswered = bus.unanswered.lock().unwrap();
    assert!(unanswered.len() >= 3);
    assert!(unanswered.iter().skip(1).all(|named| *named == (0, CpuSet(0b100))), "{unanswered:?}");
}

/// A CPU whose first interrupt is lost on its way to the only other one.
struct Lossy {
    shootdowns: Shootdowns,
    own: Cell<usize>,
    sent: Cell<u32>,
    pending: Cell<bool>,
    turns: Cell<u32>,
}

impl Interrupts for Lossy {
    fn cpu(&self) -> usize {
        self.own.get()
    }

    fn interrupts_are_on(&self) -> bool {
        true
    }

    fn send(&self, cpus: CpuSet) {
        assert_eq!(cpus, CpuSet::only(1), "only who is missing");
        self.sent.set(self.sent.get() + 1);
        self.pending.set(self.sent.get() > 1);
    }

    fn flush(&self, _: Flush) {}

    fn acknowledge(&self, _: u64) {}

    fn relax(&self) {
        self.turns.set(self.turns.get() + 1);
        assert!(self.turns.get() < 100_000, "the interrupt was not sent again");
        if self.pending.take() {
            self.own.set(1);
            self.shootdowns.serve(self);
            self.own.set(0);
        }
    }

    fn unanswered(&self, _: u64, cpus: CpuSet) {
        assert_eq!(cpus, CpuSet::only(1));
    }
}

#[test]
fn an_interrupt_that_is_lost_is_sent_again() {
    let cpu = Lossy {
        shootdowns: Shootdowns::new(),
        own: Cell::new(0),
        sent: Cell::new(0),
        pending: Cell::new(false),
        turns: Cell::new(0),
    };
    cpu.shootdowns.bring_online(CpuSet::first(2));
    cpu.shootdowns.run(&cpu, Flush::Everything, CpuSet::first(2));
    assert_eq!(cpu.sent.get(), 2);
}

#[test]
#[should_panic(expected = "interrupts off")]
fn a_shootdown_with_interrupts_off_is_refused() {
    let bus = Bus::default();
    let cpu = Cpu::new(&bus, 0);
    cpu.interrupts_on.set(false);
    cpu.shoot(Flush::Everything, CpuSet::only(0));
}
