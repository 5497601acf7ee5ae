//! The host's side of the gate: serves calls, feeds the audit, keeps the second stage in step.
//!
//! One gate serves all vCPUs of a machine, one at a time; the others run on meanwhile, unless they
//! have to stand still. Whatever a guest asks, the answer is a status or a finding; only the host's
//! own failures are errors.

mod direct;
mod leaks;
mod operations;
mod order;
mod pages;
mod probes;
mod state;
#[cfg(test)]
mod tests;
mod types;
mod waits;
mod window;
mod world;

pub use probes::ProbeSummary;
pub use types::{GateCounters, GateFailure, GateSetup, Observer, Prober, Served, Vcpus};

use crate::audit::{AuditConfig, ControlPolicy, Mediation};
use crate::events::{RingReader, Sequencer, Sightings, Standing};
use crate::leak::LeakScanner;
use crate::machine::memory::Memory;
use crate::machine::state::Registers;
use crate::recording::{Judged, Setup};
use crate::second_stage::SecondStage;
use crate::stop::Stop;
use crate::ticks::Ticks;
use lacuna_abi::addr::{Gpa, PAGE_SIZE};
use lacuna_abi::counter::Counters;
use lacuna_abi::direct::TableOp;
use lacuna_abi::event::{EntryWrite, Record};
use lacuna_abi::gate::{
    ARGS_WORD, Call, CpuRegistration, ExceptionReport, Op, PAGE_WORDS, STATUS_WORD, Status,
};
use lacuna_abi::layout::{call_page_offset, report_page_offset};
use pages::{arguments, text};
use probes::Probes;
use std::sync::Arc;
use std::time::{Duration, Instant};
use waits::Waits;
use window::Window;
use world::LiveWorld;

/// At which point of a run everything is checked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Scope {
    /// The guest runs on.
    Running,
    /// The guest was stopped where it was.
    Stopped,
    /// The program came to its end.
    Done,
}

/// The gate of one machine.
pub struct Gate {
    memory: Arc<Memory>,
    stage: Box<dyn SecondStage>,
    audit: Judged,
    rings: Vec<RingReader>,
    sequencer: Sequencer,
    sightings: Arc<Sightings>,
    /// Which part of the run is stepped, if any is.
    window: Option<Window>,
    /// Room for records that are judged.
    settled: Vec<Record>,
    /// Room for the words of a list of operations, and for what they say.
    list: Vec<u64>,
    ops: Vec<Op>,
    table_ops: Vec<TableOp>,
    /// Sightings that the audit is still to be told of; and whether it never will be of some, so that
    /// what it knows of the tables is not what was written.
    waiting_sightings: usize,
    lost_sightings: bool,
    intents: Vec<Option<EntryWrite>>,
    cpus: Vec<Option<Registers>>,
    registered: Vec<bool>,
    waits: Waits,
    /// Time for which vCPUs had to stand still.
    stood_still: Duration,
    probes: Probes,
    scanner: Option<LeakScanner>,
    input_done: bool,
    quiesce_every: u64,
    events_at_quiesce: u64,
    counters: GateCounters,
    ready_at: Option<Instant>,
    /// What the time of short steps is taken by.
    clock: Ticks,
    audit_ticks: u64,
    stop: Arc<Stop>,
    observers: Vec<Box<dyn Observer>>,
}

impl Gate {
    /// The gate of a machine that is about to start.
    #[must_use]
    pub fn new(setup: GateSetup) -> Self {
        let GateSetup {
            memory,
            stage,
            mediation,
            steps,
            boot_root,
            profile,
            quiesce_every,
            max_findings,
            probes,
            seed,
            shootdown_limit,
            scanner,
            stop,
            observers,
            recorder,
        } = setup;
        let layout = *memory.layout();
        let config = AuditConfig {
            layout,
            boot_root,
            seal_closes: stage.closes(),
            control: ControlPolicy::default(),
            profile,
            max_findings,
        };
        let cpus = vec![None; layout.cpus];
        let intents = vec![None; layout.cpus];
        let world = LiveWorld {
            memory: &memory,
            stage: &*stage,
            cpus: &cpus,
            intents: &intents,
            frugal: true,
        };
        let recorder = recorder.map(|(mut recorder, needs)| {
            recorder.set_up(|origin| Setup {
                backend: stage.name().to_owned(),
                granule: stage.granule(),
                detail: stage.detail(),
                ..Setup::new(origin, &needs, &config)
            });
            recorder
        });
        let mut audit = Judged::new(config, recorder, &world);
        let window = (mediation == Mediation::Step).then(|| Window::new(steps));
        if mediation != Mediation::Trace && steps.from == 0 {
            audit.mediate(mediation, &world);
        }
        let sightings = Arc::new(Sightings::new(Arc::clone(&memory)));
        let rings = (0..=u8::MAX).take(layout.cpus).map(|cpu| RingReader::new(&memory, cpu));
        let rings = rings.collect();
        Self {
            memory,
            stage,
            audit,
            rings,
            sequencer: Sequencer::default(),
            sightings,
            window,
            settled: Vec::new(),
            list: Vec::new(),
            ops: Vec::new(),
            table_ops: Vec::new(),
            waiting_sightings: 0,
            lost_sightings: false,
            intents,
            cpus,
            registered: vec![false; layout.cpus],
            waits: Waits::new(layout.cpus, shootdown_limit),
            stood_still: Duration::ZERO,
            probes: Probes::new(probes, seed),
            scanner,
            input_done: false,
            quiesce_every,
            events_at_quiesce: 0,
            counters: GateCounters::default(),
            ready_at: None,
            clock: Ticks::start(),
            audit_ticks: 0,
            stop,
            observers,
        }
    }

    /// Serves a call of `cpu`; `vcpus` are those of the machine, which this one speaks for.
    ///
    /// # Errors
    /// [`GateFailure`] if the host failed; nothing that the guest passes leads there.
    pub fn serve(
        &mut self,
        call: Call,
        cpu: u8,
        vcpus: &mut dyn Vcpus,
    ) -> Result<Served, GateFailure> {
        self.counters.calls += 1;
        let standing = match call {
            // The ring is full in the middle of a write: its record follows. Under direct paging so
            // does that of the write that is asked for.
            Call::Drain | Call::Tables => Some(Standing::Owed),
            // The write was interrupted for good.
            Call::Exception | Call::Panic => Some(Standing::Final),
            _ => None,
        };
        let in_write = self.drain(cpu, standing)?;
        self.sample(cpu, vcpus);
        if standing.is_none() {
            self.pass_border(cpu, vcpus)?;
        }
        if matches!(call, Call::Ops | Call::Tables) {
            let (status, index) = match call {
                Call::Ops => self.operations(cpu, vcpus)?,
                _ => self.table_ops(cpu)?,
            };
            return self.served(cpu, (status, index), in_write, vcpus);
        }
        let page = self.call_page(cpu, call)?;
        let status = match call {
            Call::Ready => self.ready(cpu, &page),
            Call::RegisterRoot => {
                let pcid = u16::try_from(page[ARGS_WORD + 1]).unwrap_or(u16::MAX);
                let root = Gpa(page[ARGS_WORD]);
                self.with_audit(|audit, world| audit.register_root(root, pcid, world))
                    .err()
                    .unwrap_or(Status::Ok)
            }
            Call::UnregisterRoot => {
                self.audit.unregister_root(Gpa(page[ARGS_WORD])).err().unwrap_or(Status::Ok)
            }
            Call::Drain => {
                self.counters.ring_drains += 1;
                Status::Ok
            }
            // A list was carried out above.
            Call::Yield | Call::Ops | Call::Tables => Status::Ok,
            Call::InputDone => self.input_done()?,
            Call::Log => self.log(&page),
            Call::Checkpoint => {
                self.quiesce(cpu, vcpus, Scope::Running)?;
                Status::Ok
            }
            Call::StartCpus => self.start_cpus(cpu, vcpus),
            Call::Interrupt => match self.others(cpu, page[ARGS_WORD]) {
                Some(others) => {
                    vcpus.interrupt(others)?;
                    Status::Ok
                }
                None => Status::BadArguments,
            },
            Call::Unanswered => match self.others(cpu, page[ARGS_WORD]) {
                Some(missing) => {
                    let time = self.stood_still;
                    match self.waits.note(cpu, page[ARGS_WORD + 1], Instant::now(), time) {
                        Some(waited) => return Ok(Served::Unanswered { missing, waited }),
                        None => Status::Ok,
                    }
                }
                None => Status::BadArguments,
            },
            Call::Exit => {
                let counters = arguments::<{ Counters::WORDS }>(&page, ARGS_WORD + 1);
                let counters = Box::new(Counters::from_words(&counters));
                return Ok(Served::Exit(page[ARGS_WORD], counters));
            }
            Call::Exception => {
                let page = self.memory.shared_page(report_page_offset(cpu.into()), PAGE_WORDS)?;
                let words = arguments::<{ ExceptionReport::WORDS }>(&page, ARGS_WORD);
                return Ok(Served::Exception(Box::new(ExceptionReport::from_words(&words))));
            }
            Call::Panic => {
                let page = self.memory.shared_page(report_page_offset(cpu.into()), PAGE_WORDS)?;
                let text = text(&page).unwrap_or_default();
                return Ok(Served::Panic(self.withhold("the guest's panic message", text)));
            }
        };
        self.served(cpu, (status, 0), in_write, vcpus)
    }

    /// The CPU came out without a call: under direct paging its registers are looked at.
    ///
    /// # Errors
    /// [`GateFailure::Memory`].
    pub fn look(&mut self, cpu: u8, vcpus: &dyn Vcpus) -> Result<(), GateFailure> {
        if self.audit.is_direct() {
            // A root that it loaded has a record.
            self.drain(cpu, Some(Standing::Owed))?;
            self.sample(cpu, vcpus);
        }
        Ok(())
    }

    /// Under direct paging, `control-state` of the CPU that makes a call: ring 0 changes CR3 and WP
    /// without the host. What cannot be read is left to the complete check.
    fn sample(&mut self, cpu: u8, vcpus: &dyn Vcpus) {
        if !self.audit.is_direct() {
            return;
        }
        let (Ok(registers), Ok(seq)) = (vcpus.registers(cpu), self.memory.last_event_number())
        else {
            return;
        };
        if let Some(place) = self.cpus.get_mut(usize::from(cpu)) {
            *place = Some(registers);
        }
        self.with_audit(|audit, world| audit.sample(cpu, seq, world));
    }

    /// Answers a call, and checks everything if that is due.
    fn served(
        &mut self,
        cpu: u8,
        (status, index): (Status, usize),
        in_write: bool,
        vcpus: &mut dyn Vcpus,
    ) -> Result<Served, GateFailure> {
        self.answer(cpu, status, index)?;
        let due = self.counters.events - self.events_at_quiesce >= self.quiesce_every;
        if due && !in_write {
            self.quiesce(cpu, vcpus, Scope::Running)?;
        }
        Ok(Served::Resume)
    }

    /// Answers a call with a number that no call has.
    ///
    /// # Errors
    /// [`GateFailure::Memory`].
    pub fn refuse(&mut self, cpu: u8) -> Result<(), GateFailure> {
        self.counters.calls += 1;
        self.answer(cpu, Status::BadCall, 0)
    }

    /// Checks everything once more, when no vCPU will run again; all stand still when this returns.
    /// After a program that came to its end (`done`) its secret input must be nowhere, secret frames
    /// included.
    ///
    /// # Errors
    /// [`GateFailure`].
    pub fn finish(
        &mut self,
        cpu: u8,
        vcpus: &mut dyn Vcpus,
        done: bool,
    ) -> Result<(), GateFailure> {
        self.quiesce(cpu, vcpus, if done { Scope::Done } else { Scope::Stopped })
    }

    /// Starts the other CPUs: from here on they count as running.
    fn start_cpus(&mut self, cpu: u8, vcpus: &mut dyn Vcpus) -> Status {
        let all = self.cpus.len();
        if cpu != 0 || all < 2 || self.audit.running().count() != 1 {
            return Status::BadState;
        }
        for other in (1..all).filter_map(|other| u8::try_from(other).ok()) {
            self.audit.start_cpu(other);
        }
        vcpus.start();
        Status::Ok
    }

    /// The CPUs named in an argument, one bit each: at least one, all of them running, and not the
    /// caller.
    fn others(&self, cpu: u8, set: u64) -> Option<u8> {
        let set = u8::try_from(set).ok().filter(|set| *set != 0)?;
        let others = self.audit.running().filter(|other| *other != cpu);
        let known = others.fold(0, |known, other| known | 1 << other);
        (set & !known == 0).then_some(set)
    }

    /// Registers the CPU's descriptor tables. Once: a guest that breaks them could otherwise have
    /// the broken ones registered.
    fn ready(&mut self, cpu: u8, page: &[u64; PAGE_WORDS]) -> Status {
        let Some(registered) = self.registered.get_mut(usize::from(cpu)) else {
            return Status::BadState;
        };
        if std::mem::replace(registered, true) {
            return Status::BadState;
        }
        let args = arguments::<{ CpuRegistration::WORDS }>(page, ARGS_WORD);
        self.audit.register_cpu(cpu, CpuRegistration::from_words(&args));
        if cpu == 0 {
            self.ready_at.get_or_insert_with(Instant::now);
        }
        Status::Ok
    }

    fn with_audit<R>(&mut self, f: impl FnOnce(&mut Judged, &LiveWorld<'_>) -> R) -> R {
        let started = self.clock.now();
        let Self { memory, stage, cpus, intents, audit, .. } = self;
        let world = LiveWorld { memory, stage: &**stage, cpus, intents, frugal: false };
        let result = f(audit, &world);
        self.audit_ticks += self.clock.now().saturating_sub(started);
        result
    }

    fn answer(&mut self, cpu: u8, status: Status, index: usize) -> Result<(), GateFailure> {
        if status != Status::Ok {
            self.counters.refused += 1;
        }
        let page = self.memory.layout().shared.gpa.wrapping_add(call_page_offset(cpu.into()));
        let at = page.wrapping_add(8 * STATUS_WORD as u64);
        Ok(self.memory.store(at, status.to_word(index))?)
    }

    fn log(&mut self, page: &[u64; PAGE_WORDS]) -> Status {
        let Some(text) = text(page) else { return Status::BadArguments };
        let text = self.withhold("the guest's log", text);
        for observer in &mut self.observers {
            observer.log(&text);
        }
        Status::Ok
    }
}

const _: () = assert!(PAGE_WORDS as u64 * 8 == PAGE_SIZE);
const _: () = assert!(ARGS_WORD + 1 + Counters::WORDS <= PAGE_WORDS);
