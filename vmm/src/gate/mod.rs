//! The host's side of the gate: serves calls, feeds the audit, keeps the second stage in step.
//!
//! One gate serves all vCPUs of a machine, behind a lock. Whatever a guest asks, the answer is a
//! status or a finding; only the host's own failures are errors.

mod leaks;
mod state;
#[cfg(test)]
mod tests;
mod types;
mod world;

pub use types::{GateCounters, GateFailure, GateSetup, Observer, Served, StoppedCpu};

use crate::audit::{Audit, AuditConfig, ControlPolicy};
use crate::events::{RingReader, Sequencer, Standing};
use crate::leak::LeakScanner;
use crate::machine::memory::Memory;
use crate::machine::state::Registers;
use crate::printable::steers;
use crate::second_stage::SecondStage;
use crate::stop::Stop;
use lacuna_abi::addr::{FrameRange, Gfn, Gpa, PAGE_SIZE};
use lacuna_abi::counter::Counters;
use lacuna_abi::event::{EntryWrite, Event, HostAct, Intent, Record};
use lacuna_abi::gate::{
    ARGS_WORD, COUNT_WORD, Call, CpuRegistration, ExceptionReport, LOG_BYTES, Op, OpKind,
    PAGE_WORDS, STATUS_WORD, Status, read_ops,
};
use lacuna_abi::layout::{call_page_offset, report_page_offset};
use std::sync::Arc;
use std::time::{Duration, Instant};
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

/// How often one call may name all of a guest's frames.
const MAX_PASSES: u64 = 4;

/// The gate of one machine.
pub struct Gate {
    memory: Arc<Memory>,
    stage: Box<dyn SecondStage>,
    audit: Audit,
    rings: Vec<RingReader>,
    sequencer: Sequencer,
    intents: Vec<Option<EntryWrite>>,
    cpus: Vec<Option<Registers>>,
    registered: Vec<bool>,
    scanner: Option<LeakScanner>,
    input_done: bool,
    /// The run was stopped before all events were judged.
    unjudged: bool,
    quiesce_every: u64,
    events_at_quiesce: u64,
    counters: GateCounters,
    ready_at: Option<Instant>,
    audit_time: Duration,
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
            boot_root,
            quiesce_every,
            max_findings,
            scanner,
            stop,
            observers,
        } = setup;
        let layout = *memory.layout();
        let config = AuditConfig {
            layout,
            boot_root,
            seal_closes: stage.closes(),
            control: ControlPolicy::default(),
            max_findings,
        };
        let cpus = vec![None; layout.cpus];
        let intents = vec![None; layout.cpus];
        let world = LiveWorld { memory: &memory, stage: &*stage, cpus: &cpus, intents: &intents };
        let audit = Audit::new(config, &world);
        let rings = (0..=u8::MAX).take(layout.cpus).map(|cpu| RingReader::new(&memory, cpu));
        let rings = rings.collect();
        Self {
            memory,
            stage,
            audit,
            rings,
            sequencer: Sequencer::default(),
            intents,
            cpus,
            registered: vec![false; layout.cpus],
            scanner,
            input_done: false,
            unjudged: false,
            quiesce_every,
            events_at_quiesce: 0,
            counters: GateCounters::default(),
            ready_at: None,
            audit_time: Duration::ZERO,
            stop,
            observers,
        }
    }

    /// Serves a call of `cpu`.
    ///
    /// # Errors
    /// [`GateFailure`] if the host failed; nothing that the guest passes leads there.
    pub fn serve(
        &mut self,
        call: Call,
        cpu: u8,
        vcpu: &mut dyn StoppedCpu,
    ) -> Result<Served, GateFailure> {
        self.counters.calls += 1;
        let standing = match call {
            // The ring is full in the middle of a write: its record follows.
            Call::Drain => Some(Standing::Owed),
            // The write was interrupted for good.
            Call::Exception | Call::Panic => Some(Standing::Final),
            _ => None,
        };
        self.drain(standing)?;
        let page = self.memory.shared_page(call_page_offset(cpu.into()))?;
        let mut index = 0;
        let status = match call {
            Call::Ready => self.ready(cpu, &page),
            Call::Ops => {
                let (status, failed) = self.operations(cpu, &page)?;
                index = failed;
                status
            }
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
            Call::Drain => Status::Ok,
            Call::InputDone => self.input_done()?,
            Call::Log => self.log(&page),
            Call::Checkpoint => {
                self.quiesce(cpu, vcpu, Scope::Running)?;
                Status::Ok
            }
            Call::Exit => {
                let counters = arguments::<{ Counters::WORDS }>(&page, ARGS_WORD + 1);
                let counters = Box::new(Counters::from_words(&counters));
                return Ok(Served::Exit(page[ARGS_WORD], counters));
            }
            Call::Exception => {
                let page = self.memory.shared_page(report_page_offset(cpu.into()))?;
                let words = arguments::<{ ExceptionReport::WORDS }>(&page, ARGS_WORD);
                return Ok(Served::Exception(Box::new(ExceptionReport::from_words(&words))));
            }
            Call::Panic => {
                let page = self.memory.shared_page(report_page_offset(cpu.into()))?;
                let text = text(&page).unwrap_or_default();
                return Ok(Served::Panic(self.withhold("the guest's panic message", text)));
            }
        };
        self.answer(cpu, status, index)?;
        let due = self.counters.events - self.events_at_quiesce >= self.quiesce_every;
        if due && self.intents.iter().all(Option::is_none) {
            self.quiesce(cpu, vcpu, Scope::Running)?;
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

    /// Checks everything once more, when the vCPU will not run again. After a program that came to
    /// its end (`done`) its secret input must be nowhere, secret frames included.
    ///
    /// # Errors
    /// [`GateFailure`].
    pub fn finish(
        &mut self,
        cpu: u8,
        vcpu: &mut dyn StoppedCpu,
        done: bool,
    ) -> Result<(), GateFailure> {
        self.quiesce(cpu, vcpu, if done { Scope::Done } else { Scope::Stopped })
    }

    /// Takes what the rings hold and has it judged. No vCPU runs meanwhile, so a number that is
    /// missing now is lost, unless a write under way accounts for it; `standing` says whether there
    /// can be one.
    fn drain(&mut self, standing: Option<Standing>) -> Result<(), GateFailure> {
        let mut intents: Vec<Intent> = Vec::new();
        for (cpu, ring) in self.rings.iter_mut().enumerate() {
            let drained = ring.drain(&self.memory)?;
            self.sequencer.count_lost(drained.lost.len() as u64);
            for why in drained.lost {
                self.audit.inconclusive(why);
            }
            for record in drained.records {
                if let Err(why) = self.sequencer.push(record) {
                    self.audit.inconclusive(why);
                }
            }
            let mut intent = match ring.intent(&self.memory)? {
                Ok(intent) => intent,
                Err(why) => {
                    self.audit.inconclusive(why);
                    None
                }
            };
            if standing.is_none() && intent.take().is_some() {
                let why = format!("CPU {cpu} makes a gate call in the middle of an entry write");
                self.audit.inconclusive(why);
            }
            self.intents[cpu] = intent.map(|intent| intent.write);
            intents.extend(intent);
        }
        let last = self.memory.last_event_number()?;
        let standing = standing.unwrap_or(Standing::Final);
        let (records, gaps) = self.sequencer.settle(last, intents, standing);
        for gap in gaps {
            self.audit.inconclusive(gap);
        }
        let started = Instant::now();
        for record in records {
            self.counters.events += 1;
            if self.stop.told().is_some() {
                // What follows is the end of the run; what is left is not judged.
                self.audit.inconclusive("the run was stopped while events were judged".into());
                self.unjudged = true;
                break;
            }
            self.judge(&record);
            self.tell(&record);
        }
        self.audit_time += started.elapsed();
        Ok(())
    }

    /// Has the audit judge a record. The caller takes the time, once for many.
    fn judge(&mut self, record: &Record) {
        let Self { memory, stage, cpus, intents, audit, .. } = self;
        audit.event(record, &LiveWorld { memory, stage: &**stage, cpus, intents });
    }

    /// Checks everything. No vCPU runs meanwhile.
    fn quiesce(
        &mut self,
        cpu: u8,
        vcpu: &mut dyn StoppedCpu,
        scope: Scope,
    ) -> Result<(), GateFailure> {
        vcpu.complete();
        self.drain((scope != Scope::Running).then_some(Standing::Final))?;
        if self.unjudged {
            // The tables are ahead of what the audit knows: a comparison would blame the guest.
            return Ok(());
        }
        let registers = vcpu.registers()?;
        if let Some(place) = self.cpus.get_mut(usize::from(cpu)) {
            *place = Some(registers);
        }
        let seq = self.host_record(cpu, HostAct::Quiesced, self.memory.layout().zone_frames())?;
        self.with_audit(|audit, world| audit.quiesce(seq, world));
        self.search(seq, scope == Scope::Done)?;
        self.counters.quiesces += 1;
        self.events_at_quiesce = self.counters.events;
        Ok(())
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
        self.ready_at.get_or_insert_with(Instant::now);
        Status::Ok
    }

    /// Carries out a list of operations; the status, and the index of the one that failed.
    fn operations(
        &mut self,
        cpu: u8,
        page: &[u64; PAGE_WORDS],
    ) -> Result<(Status, usize), GateFailure> {
        let mut ops: Vec<Op> = Vec::new();
        // The list is checked as a whole first: one that makes no sense has no effect.
        if read_ops(page, |op| ops.push(op)).is_err() {
            return Ok((Status::BadArguments, 0));
        }
        // A list may name each frame a few times (seal, open, seal), not a few hundred times: the
        // host's work for one call is bounded by the guest's memory.
        let frames = ops.iter().fold(0_u64, |sum, op| sum.saturating_add(op.frames.count()));
        if frames > MAX_PASSES * self.memory.layout().zone_frames().count() {
            return Ok((Status::BadArguments, 0));
        }
        for (index, op) in ops.into_iter().enumerate() {
            if self.stop.told().is_some() {
                return Ok((Status::BadState, index));
            }
            if let Err(status) = self.operation(cpu, op)? {
                return Ok((status, index));
            }
        }
        Ok((Status::Ok, 0))
    }

    fn operation(&mut self, cpu: u8, op: Op) -> Result<Result<(), Status>, GateFailure> {
        // An open takes its number before its effect, a seal and a release after theirs. On
        // arrival a seal is judged at the number of the last event.
        let opening = op.kind == OpKind::Open;
        let before = if opening { self.host_number()? } else { self.memory.last_event_number()? };
        if let Err(status) = self.with_audit(|audit, world| audit.arrival(cpu, op, before, world)) {
            if opening {
                self.told(cpu, before, HostAct::Refused, op.frames);
            }
            return Ok(Err(status));
        }
        let frames = self.audit.frames();
        let releasing = op.kind == OpKind::Release;
        self.stage.update(op.frames, &|frame: Gfn| {
            frames.may_close(frame) && !(releasing && op.frames.contains(frame))
        })?;
        let (seq, act) = match op.kind {
            OpKind::Open => {
                self.counters.opens += 1;
                (before, HostAct::Opened)
            }
            OpKind::Seal => {
                self.counters.seals += 1;
                let sealed = op.frames.iter().all(|frame| self.stage.denies(frame));
                let act = if sealed { HostAct::Sealed } else { HostAct::HeldOpen };
                (self.host_number()?, act)
            }
            OpKind::Release => {
                self.counters.releases += 1;
                (self.host_number()?, HostAct::Released)
            }
        };
        self.with_audit(|audit, world| audit.done(cpu, op, seq, world));
        self.told(cpu, seq, act, op.frames);
        Ok(Ok(()))
    }

    fn host_number(&mut self) -> Result<u64, GateFailure> {
        Ok(self.memory.next_event_number()?)
    }

    /// Takes a number for something that the host does, and records it.
    fn host_record(
        &mut self,
        cpu: u8,
        act: HostAct,
        frames: FrameRange,
    ) -> Result<u64, GateFailure> {
        let seq = self.host_number()?;
        self.told(cpu, seq, act, frames);
        Ok(seq)
    }

    /// Puts the host's own event in its place among the guest's.
    fn told(&mut self, cpu: u8, seq: u64, act: HostAct, frames: FrameRange) {
        let record = Record { seq, cpu, event: Event::Host(act, frames) };
        if let Err(why) = self.sequencer.push(record) {
            self.audit.inconclusive(why);
        }
        for record in self.sequencer.ready() {
            self.tell(&record);
        }
    }

    fn tell(&mut self, record: &Record) {
        for observer in &mut self.observers {
            observer.event(record);
        }
    }

    fn with_audit<R>(&mut self, f: impl FnOnce(&mut Audit, &LiveWorld<'_>) -> R) -> R {
        let started = Instant::now();
        let Self { memory, stage, cpus, intents, audit, .. } = self;
        let result = f(audit, &LiveWorld { memory, stage: &**stage, cpus, intents });
        self.audit_time += started.elapsed();
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

/// `N` words of a page, from `start`.
fn arguments<const N: usize>(page: &[u64; PAGE_WORDS], start: usize) -> [u64; N] {
    let mut words = [0; N];
    for (word, source) in words.iter_mut().zip(page.iter().skip(start)) {
        *word = *source;
    }
    words
}

/// The text in a page; `None` if its length makes no sense. Control characters are replaced, so
/// that a guest cannot steer a terminal.
fn text(page: &[u64; PAGE_WORDS]) -> Option<String> {
    let len = usize::try_from(page[COUNT_WORD]).ok().filter(|len| *len <= LOG_BYTES)?;
    let bytes: Vec<u8> =
        page[ARGS_WORD..].iter().flat_map(|word| word.to_le_bytes()).take(len).collect();
    let clean = |c: char| if c != '\n' && steers(c) { '\u{fffd}' } else { c };
    Some(String::from_utf8_lossy(&bytes).chars().map(clean).collect())
}

const _: () = assert!(PAGE_WORDS as u64 * 8 == PAGE_SIZE);
const _: () = assert!(ARGS_WORD + 1 + Counters::WORDS <= PAGE_WORDS);
