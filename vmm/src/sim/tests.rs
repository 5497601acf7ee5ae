//! Whole machines, with workloads of their own on the allocator's interface.

use super::*;
use crate::audit::Rule;
use crate::config::{Config, MachineKind, Mediation, Overrides, Seal};
use crate::run::{End, Host, Machine, Outcome, Plan};
use lacuna_abi::addr::{Gva, PAGE_SIZE};
use lacuna_abi::layout::{direct_map, window};
use lacuna_abi::observe::{self, Case, Change, Means};
use lacuna_abi::workload::Scenario;
use lacuna_guest::alloc::{PageAllocator, Request};
use lacuna_guest::freetype::Migratetype;
use lacuna_guest::mapped::MappedPages;
use lacuna_guest::platform::Platform;
use lacuna_guest::programs::staleness::{self, Attempts, Relay};
use lacuna_guest::programs::{ProgramError, Team};
use lacuna_guest::secret::{Access, SecretPages};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::{Arc, Mutex};

/// Runs a workload on a machine of its own.
fn run(
    workload: impl Workload + 'static,
    cpus: u8,
    memory_mib: u64,
    seal: Seal,
    (schedule, seed): (Schedule, u64),
) -> Outcome {
    let text = format!(
        "[guest]\nmemory_mib = {memory_mib}\nvcpus = {cpus}\nseed = {seed}\n\
         [workload]\nprogram = \"idle\"\n[audit]\nquiesce_every = 20000\n"
    );
    let machine = open(&text, seal, Mediation::Trace, schedule);
    let running = machine.with_workload(Arc::new(workload)).start().unwrap();
    running.wait(|_| ControlFlow::Continue(()))
}

fn open(text: &str, seal: Seal, mediation: Mediation, schedule: Schedule) -> Machine {
    let (machine, seal, mediate) = (Some(MachineKind::Sim), Some(seal), Some(mediation));
    let overrides = Overrides { machine, seal, mediate, ..Overrides::default() };
    let config = Config::from_text(Path::new("test.toml"), text, &overrides).unwrap();
    let (plan, _) = Plan::new(&config).unwrap();
    Machine::open(Host::Sim(schedule), plan, Vec::new()).unwrap()
}

fn clean(outcome: &Outcome) {
    assert!(matches!(outcome.end, End::Exit(0, _)), "{:?}", outcome.end);
    let result = outcome.with_gate(|gate| gate.result());
    assert_eq!(result.findings, []);
    assert_eq!(result.inconclusive, Vec::<String>::new());
    assert_eq!(outcome.simulation.unwrap().stale_secret_uses, 0);
}

/// Random allocations of all kinds, tagged; some are freed by another CPU.
struct Mixed {
    turns: usize,
    /// Handles that wait for any CPU to free them, each with its tag.
    given_away: Mutex<Vec<(u64, u64)>>,
}

impl Mixed {
    fn new(turns: usize) -> Self {
        Self { turns, given_away: Mutex::default() }
    }

    fn tag(handle: u64) -> u64 {
        handle.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
    }

    fn allocate<'a>(
        machine: &SimMachine,
        allocator: &PageAllocator<'a, SimMachine>,
        random: &mut Random,
    ) -> Option<u64> {
        let order = random.below(5) as u8;
        let zero = random.one_in(2);
        let migratetype = Migratetype::ALL[random.below(3) as usize];
        let request = Request { order, migratetype, zero, noblock: random.one_in(4) };
        if random.one_in(2) {
            let pages = allocator.alloc_mapped(request).ok()?;
            let last = pages.pin().va().wrapping_add((PAGE_SIZE << order) - 8);
            assert!(!zero || machine.load(last) == 0);
            machine.store(last, Self::tag(pages.handle()));
            return Some(pages.into_raw());
        }
        let pages = allocator.alloc_secret(request).ok()?;
        let window = pages.open(0, 1 << order, Access::Write).unwrap();
        let last = (PAGE_SIZE << order) - 8;
        assert!(!zero || window.load(last) == Ok(0));
        window.store(last, Self::tag(pages.handle())).unwrap();
        window.close().unwrap();
        Some(pages.into_raw())
    }

    fn free(machine: &SimMachine, allocator: &PageAllocator<'_, SimMachine>, handle: u64) {
        let tag = Self::tag(handle);
        if let Ok(pages) = MappedPages::from_raw(allocator, handle) {
            let bytes = pages.frames().count() * PAGE_SIZE;
            assert_eq!(machine.load(pages.pin().va().wrapping_add(bytes - 8)), tag);
            return;
        }
        let pages = SecretPages::from_raw(allocator, handle).unwrap();
        let count = pages.frames().count();
        let window = pages.open(0, count, Access::Read).unwrap();
        assert_eq!(window.load(count * PAGE_SIZE - 8), Ok(tag));
        window.close().unwrap();
    }
}

impl Workload for Mixed {
    fn run<'a>(
        &self,
        machine: &'a SimMachine,
        allocator: &PageAllocator<'a, SimMachine>,
        _: &Team,
    ) -> Result<(), ProgramError> {
        let mut random = Random::new(99, machine.cpu() as u64);
        let mut own = Vec::new();
        for _ in 0..self.turns {
            match random.below(5) {
                0 | 1 => own.extend(Self::allocate(machine, allocator, &mut random)),
                2 if !own.is_empty() => {
                    let handle = own.swap_remove(random.below(own.len() as u64) as usize);
                    Self::free(machine, allocator, handle);
                }
                3 => self.given_away.lock().unwrap().extend(own.pop().map(|handle| (handle, 0))),
                _ => {
                    let taken = self.given_away.lock().unwrap().pop();
                    if let Some((handle, _)) = taken {
                        Self::free(machine, allocator, handle);
                    }
                }
            }
        }
        own.into_iter().for_each(|handle| Self::free(machine, allocator, handle));
        Ok(())
    }
}

#[test]
fn mixed_allocations_on_many_cpus_are_clean() {
    for (seed, (cpus, seal)) in
        [(1, Seal::Guard), (4, Seal::Guard), (4, Seal::Off), (8, Seal::Memslot)]
            .into_iter()
            .enumerate()
    {
        clean(&run(Mixed::new(300), cpus, 32, seal, (Schedule::Seeded, seed as u64)));
    }
}

#[test]
fn mixed_allocations_on_threads_are_clean() {
    for (seed, (cpus, seal)) in
        [(2, Seal::Guard), (4, Seal::Off), (8, Seal::Memslot)].into_iter().enumerate()
    {
        let schedule = (Schedule::Threads, seed as u64);
        clean(&run(Mixed::new(400), cpus, 32, seal, schedule));
    }
}

#[test]
fn random_requests_in_mixed_contexts_on_threads_are_clean() {
    let mut happened = [0; 7];
    for (cpus, seal) in [(2, Seal::Guard), (4, Seal::Off), (8, Seal::Guard)] {
        let text = format!(
            "[guest]\nmemory_mib = 32\nvcpus = {cpus}\nfill = 0xa5\n\
             [allocator]\npool_low_kib = 4096\npool_high_kib = 8192\n\
             [workload]\nprogram = \"stress\"\noperations = 2000\n\
             [audit]\nquiesce_every = 20000\n"
        );
        let running = open(&text, seal, Mediation::Trace, Schedule::Threads).start().unwrap();
        let outcome = running.wait(|_| ControlFlow::Continue(()));
        clean(&outcome);
        let End::Exit(_, counters) = &outcome.end else { panic!("{:?}", outcome.end) };
        let counts = [
            counters.converted,
            counters.restored,
            counters.flip_to_unmapped,
            counters.flip_to_mapped,
            counters.balance_refill,
            counters.parked,
            counters.scrubs_atomic,
        ];
        happened.iter_mut().zip(counts).for_each(|(all, count)| *all += count);
    }
    // How threads run is up to the host, so that a single run may lack one of them.
    assert!(happened.iter().all(|count| *count > 0), "{happened:?}");
}

/// A page that is zero.
const PAGE: Request =
    Request { order: 0, migratetype: Migratetype::Unmovable, zero: true, noblock: false };

/// Panics with a window open.
struct Panics;

impl Workload for Panics {
    fn run<'a>(
        &self,
        machine: &'a SimMachine,
        allocator: &PageAllocator<'a, SimMachine>,
        _: &Team,
    ) -> Result<(), ProgramError> {
        if machine.cpu() == 1 {
            let pages = allocator.alloc_secret(PAGE).unwrap();
            let window = pages.open(0, 1, Access::Write).unwrap();
            assert_eq!(window.load(0), Ok(1), "not what was expected");
        }
        loop {
            machine.relax();
        }
    }
}

#[test]
fn a_panic_ends_the_run_where_it_is_and_destructors_do_nothing() {
    for schedule in [Schedule::Seeded, Schedule::Threads] {
        let outcome = run(Panics, 4, 16, Seal::Guard, (schedule, 0));
        let End::Guest(end) = &outcome.end else { panic!("{:?}", outcome.end) };
        assert_eq!((end.kind, end.place.cpu, end.place.rip), ("panic", 1, None));
        assert!(end.message.contains("not what was expected"), "{}", end.message);
        let (counters, findings) =
            outcome.with_gate(|gate| (gate.counters(), gate.result().findings));
        assert_eq!(findings, []);
        // The flip: seal, open, seal. The window: open.
        assert_eq!((counters.seals, counters.opens), (2, 2), "the window was not sealed again");
    }
}

/// Reads a secret page's place in the direct map.
struct Reads;

impl Workload for Reads {
    fn run<'a>(
        &self,
        machine: &'a SimMachine,
        allocator: &PageAllocator<'a, SimMachine>,
        _: &Team,
    ) -> Result<(), ProgramError> {
        let pages = allocator.alloc_secret(PAGE).unwrap();
        machine.load(direct_map(pages.frames().start().gpa()));
        Ok(())
    }
}

#[test]
fn a_secret_cannot_be_read_through_the_direct_map() {
    for seal in [Seal::Guard, Seal::Off] {
        let outcome = run(Reads, 1, 16, seal, (Schedule::Seeded, 3));
        let End::Guest(end) = &outcome.end else { panic!("{:?}", outcome.end) };
        assert_eq!(end.kind, "exception");
        assert!(end.message.contains("#PF"), "{}", end.message);
    }
}

/// The program `probe` on CPUs that do not carry out some invalidations.
struct Forgetful {
    keeps: Option<fn(&Invalidation) -> bool>,
    relay: Relay,
}

impl Workload for Forgetful {
    fn run<'a>(
        &self,
        machine: &'a SimMachine,
        allocator: &PageAllocator<'a, SimMachine>,
        team: &Team,
    ) -> Result<(), ProgramError> {
        machine.cpus[machine.cpu()].mmu().keeps = self.keeps;
        team.barrier(machine)?;
        staleness::run((Scenario::Table, 4), allocator, machine, machine, team, &self.relay)
    }
}

/// The cases that contradict the model on such CPUs; what is found tells of nothing else.
fn contradictions(keeps: Option<fn(&Invalidation) -> bool>) -> Vec<Case> {
    let workload = Forgetful { keeps, relay: Relay::new() };
    let outcome = run(workload, 2, 32, Seal::Off, (Schedule::Seeded, 5));
    assert!(matches!(outcome.end, End::Exit(0, _)), "{:?}", outcome.end);
    outcome.with_gate(|gate| {
        let result = gate.result();
        assert!(result.findings.iter().all(|found| found.rule == Rule::ObservedAccess));
        assert_eq!(result.inconclusive, Vec::<String>::new());
        let wrong: Vec<Case> = gate
            .observations()
            .filter(|(_, tally)| tally.contradictions > 0)
            .map(|(case, _)| case)
            .collect();
        assert_eq!(wrong.len(), result.findings.len(), "one finding for each case");
        wrong
    })
}

/// What of this is offered on a simulated CPU.
fn cases(wanted: impl Fn(&Case) -> bool) -> Vec<Case> {
    let simulated = |case: &Case| !matches!(case.change(), Change::NoExecute | Change::Flip);
    Case::all().filter(simulated).filter(wanted).collect()
}

#[test]
fn cpus_that_invalidate_as_they_must_never_contradict_the_model() {
    assert_eq!(contradictions(None), []);
}

#[test]
fn twin_cpus_that_ignore_invlpg_contradict_the_model_wherever_it_is_used() {
    let ignored = contradictions(Some(|what| matches!(what, Invalidation::Page { .. })));
    let used = |case: &Case| match case.means() {
        Means::Invlpg => !case.other(),
        means => means == Means::Ipi,
    };
    assert_eq!(ignored, cases(used));
}

#[test]
fn twin_cpus_that_ignore_cr3_loads_contradict_the_model_where_nothing_is_global() {
    let ignored = contradictions(Some(|what| matches!(what, Invalidation::Pcid(_))));
    let flushes = |case: &Case| matches!(case.means(), Means::Cr3 | Means::InvpcidContext);
    assert_eq!(ignored, cases(|case| flushes(case) && !case.global() && !case.other()));
}

/// Hands the address of CPU 0's window to another CPU, or keeps it beyond the window.
struct Leaky {
    other: bool,
    address: Mutex<Option<Gva>>,
}

impl Workload for Leaky {
    fn run<'a>(
        &self,
        machine: &'a SimMachine,
        allocator: &PageAllocator<'a, SimMachine>,
        team: &Team,
    ) -> Result<(), ProgramError> {
        if machine.cpu() == 1 {
            team.barrier(machine)?;
            let address = *self.address.lock().unwrap();
            address.map(|va| machine.load(va));
            return team.barrier(machine);
        }
        let pages = allocator.alloc_secret(PAGE).unwrap();
        let open = pages.open(0, 1, Access::Write).unwrap();
        let mut addresses = (0..512).map(|page| window(0).wrapping_add(page * PAGE_SIZE));
        let is_mapped = |va: &Gva| machine.attempt(observe::Access::Read, *va).is_some();
        let address = addresses.find(is_mapped).unwrap();
        open.store(0, 1).unwrap();
        *self.address.lock().unwrap() = Some(address).filter(|_| self.other);
        team.barrier(machine)?;
        team.barrier(machine)?;
        open.close().unwrap();
        if !self.other {
            machine.load(address);
        }
        Ok(())
    }
}

fn leaky(mediation: Mediation, other: bool) -> Vec<(Rule, Option<u8>)> {
    let text = "[guest]\nmemory_mib = 16\nvcpus = 2\nseed = 3\n[workload]\nprogram = \"idle\"\n";
    let machine = open(text, Seal::Off, mediation, Schedule::Seeded);
    let workload = Arc::new(Leaky { other, address: Mutex::default() });
    let running = machine.with_workload(workload).start().unwrap();
    let outcome = running.wait(|_| ControlFlow::Continue(()));
    assert!(matches!(outcome.end, End::Exit(0, _)), "{:?}", outcome.end);
    let result = outcome.with_gate(|gate| gate.result());
    assert_eq!(result.inconclusive, Vec::<String>::new());
    result.findings.iter().map(|found| (found.rule, found.cpu)).collect()
}

#[test]
fn what_is_used_behind_the_back_of_its_window_is_seen_when_stepped_and_only_then() {
    assert_eq!(leaky(Mediation::Step, true), [(Rule::ForeignAlias, Some(1))]);
    assert_eq!(leaky(Mediation::Step, false), [(Rule::StaleWindow, Some(0))]);
    for other in [true, false] {
        assert_eq!(leaky(Mediation::Trace, other), []);
    }
}
