//! Events in their order, while other vCPUs run on: taken from the rings, waited for where a number
//! is owed, judged; and the point at which all vCPUs stand still and everything is checked.

use super::world::LiveWorld;
use super::{Gate, GateFailure, Scope, Vcpus};
use crate::audit::Mediation;
use crate::events::Standing;
use lacuna_abi::addr::FrameRange;
use lacuna_abi::event::{Event, HostAct, Intent, Record};
use std::mem;
use std::time::{Duration, Instant};

/// Longest wait for a number that a running CPU has taken and not recorded. An honest one needs
/// microseconds, or as long as its host thread is off the processor.
const OWED: Duration = Duration::from_secs(2);
/// The same once the run has been told to stop.
const OWED_AT_STOP: Duration = Duration::from_millis(100);
/// Time between two looks at the rings while a number is owed.
const LOOK_AGAIN: Duration = Duration::from_micros(30);
/// Numbers that a CPU may hold at once: those of a grant and of a revoke.
const HELD: u64 = 2;
/// Longest that events are judged once the run has been told to stop.
const JUDGE_AT_STOP: Duration = Duration::from_millis(200);

/// An intent that stands, and what it says of its numbers.
type Standings = Vec<(Intent, Standing)>;

impl Gate {
    /// Takes what the rings hold and has it judged, up to the last number that was given out before
    /// this call: everything that the caller knew of. Other vCPUs run on. One that holds such a
    /// number and has not recorded it is waited for, because its record belongs before what the
    /// caller asks; what is given out meanwhile waits for the next time.
    ///
    /// `standing` says whether `caller` may be in the middle of an entry write; the result, whether
    /// it is.
    pub(super) fn drain(
        &mut self,
        caller: u8,
        standing: Option<Standing>,
    ) -> Result<bool, GateFailure> {
        let last = self.memory.last_event_number()?;
        let mut waits_since = None;
        loop {
            // Looked at before the rings: who is not busy now has published all that it took.
            let busy = self.busy(caller)?;
            self.collect()?;
            let missing = self.sequencer.missing(last);
            let may_come = missing != 0 && missing <= HELD * u64::from(busy.count_ones());
            if !may_come || self.stop.told().is_some() {
                break;
            }
            if waits_since.get_or_insert_with(Instant::now).elapsed() > OWED {
                break;
            }
            std::thread::sleep(LOOK_AGAIN);
        }
        let mut intents = Standings::new();
        let mut in_write = false;
        if let Some(intent) = self.intent(caller)? {
            match standing {
                // Under direct paging no number belongs to an intent, and none is waited for.
                Some(_) if self.audit.is_direct() => in_write = true,
                Some(standing) => intents.push((intent, standing)),
                None => {
                    let why =
                        format!("CPU {caller} makes a gate call in the middle of an entry write");
                    self.audit.inconclusive(why);
                }
            }
        }
        let complete = self.sequencer.missing(last) == 0;
        let judged = self.judge(last, &intents)?;
        if self.audit.mediation() != Mediation::Trace && standing.is_none() && complete && judged {
            self.audit.came(caller, last);
        }
        Ok(in_write || !intents.is_empty())
    }

    /// Has all events judged that there are, so that what was seen takes up no more room; `caller` may
    /// be in the middle of anything.
    ///
    /// # Errors
    /// [`GateFailure::Memory`].
    pub fn take_sightings(&mut self, caller: u8) -> Result<(), GateFailure> {
        self.drain(caller, Some(Standing::Owed)).map(|_in_write| ())
    }

    /// Checks everything. All vCPUs stand still meanwhile, and are left so unless the guest runs on.
    pub(super) fn quiesce(
        &mut self,
        cpu: u8,
        vcpus: &mut dyn Vcpus,
        scope: Scope,
    ) -> Result<(), GateFailure> {
        let started = Instant::now();
        self.stop_between_records(cpu, vcpus)?;
        let standing = if scope == Scope::Running { Standing::Owed } else { Standing::Final };
        let mut intents = Standings::new();
        for other in 0..self.rings.len() {
            let number = u8::try_from(other).unwrap_or(u8::MAX);
            let intent = self.intent(number)?;
            self.intents[other] = intent.map(|intent| intent.write);
            intents.extend(intent.map(|intent| (intent, standing)));
        }
        self.collect()?;
        let last = self.memory.last_event_number()?;
        let judged = self.judge(last, &intents)?;
        for other in self.audit.running().collect::<Vec<_>>() {
            // Of one that was reset, those that it last had stay; where there are none, nothing can be
            // said of its registers.
            if !vcpus.was_reset(other) {
                self.cpus[usize::from(other)] = Some(vcpus.registers(other)?);
            }
        }
        let seq = self.host_record(cpu, HostAct::Quiesced, self.memory.layout().zone_frames())?;
        if judged && self.sequencer.missing(last) == 0 {
            self.with_audit(|audit, world| {
                audit.quiesce(seq, &LiveWorld { frugal: true, ..*world });
            });
        } else {
            // Tables could not be told from records that are still to come.
            self.audit.inconclusive("a complete check found events that were still owed".into());
        }
        // After everything that could look for stale translations: this may remove some.
        self.probe(seq)?;
        self.search(seq, scope == Scope::Done)?;
        self.counters.quiesces += 1;
        self.events_at_quiesce = self.counters.events;
        if scope == Scope::Running {
            vcpus.resume();
        } else {
            // Nothing comes after this.
            self.judge(seq, &intents)?;
        }
        self.stood_still += started.elapsed();
        Ok(())
    }

    /// Has all vCPUs stand still and all events judged; false if some are missing or under way.
    pub(super) fn stand_still(
        &mut self,
        cpu: u8,
        vcpus: &mut dyn Vcpus,
    ) -> Result<bool, GateFailure> {
        self.stop_between_records(cpu, vcpus)?;
        for other in 0..self.rings.len() {
            let number = u8::try_from(other).unwrap_or(u8::MAX);
            if self.intent(number)?.is_some() {
                return Ok(false);
            }
        }
        self.collect()?;
        let last = self.memory.last_event_number()?;
        let complete = self.sequencer.missing(last) == 0;
        Ok(complete && self.judge(last, &[])?)
    }

    /// Has all vCPUs stand still, none of them between taking a number and recording it: one that
    /// is goes on alone until it has recorded. One that never does is left where it is; what it
    /// owes is then missing.
    fn stop_between_records(&mut self, cpu: u8, vcpus: &mut dyn Vcpus) -> Result<(), GateFailure> {
        vcpus.stop();
        let limit = if self.stop.told().is_some() { OWED_AT_STOP } else { OWED };
        let deadline = Instant::now() + limit;
        loop {
            let owing = self.busy(cpu)? & vcpus.runnable();
            if owing == 0 || Instant::now() >= deadline {
                return Ok(());
            }
            let mut recorded = || !matches!(self.busy(cpu), Ok(busy) if busy & owing == owing);
            vcpus.let_on(owing, &mut recorded, deadline);
        }
    }

    /// The CPUs but `caller` whose rings say that they may hold a number, one bit each.
    fn busy(&self, caller: u8) -> Result<u8, GateFailure> {
        let mut busy = 0;
        if self.rings.len() == 1 {
            return Ok(busy);
        }
        for cpu in self.audit.running().filter(|cpu| *cpu != caller) {
            if let Some(ring) = self.rings.get(usize::from(cpu))
                && ring.is_busy(&self.memory)?
            {
                busy |= 1_u8.checked_shl(cpu.into()).unwrap_or(0);
            }
        }
        Ok(busy)
    }

    /// Takes what the rings hold.
    fn collect(&mut self) -> Result<(), GateFailure> {
        for ring in &mut self.rings {
            let drained = ring.drain(&self.memory)?;
            let given = self.memory.last_event_number()?;
            self.sequencer.count_lost(drained.lost.len() as u64);
            for why in drained.lost.drain(..) {
                self.audit.inconclusive(why);
            }
            for record in drained.records.drain(..) {
                if let Err(why) = self.sequencer.push(record, given) {
                    self.audit.inconclusive(why);
                }
            }
        }
        let given = self.memory.last_event_number()?;
        for record in self.sightings.take() {
            match self.sequencer.push(record, given) {
                Ok(()) => self.waiting_sightings += 1,
                // The guest has set the counter to where it was, or to where no run gets.
                Err(why) => {
                    self.lost_sightings = true;
                    self.audit.inconclusive(why);
                }
            }
        }
        Ok(())
    }

    /// The entry write that a CPU has under way; one that makes no sense is noted.
    fn intent(&mut self, cpu: u8) -> Result<Option<Intent>, GateFailure> {
        let Some(ring) = self.rings.get(usize::from(cpu)) else { return Ok(None) };
        Ok(ring.intent(&self.memory)?.unwrap_or_else(|why| {
            self.audit.inconclusive(why);
            None
        }))
    }

    /// Has the events up to `last` judged. What is missing is lost, unless an intent accounts for
    /// it. False if this was broken off.
    fn judge(&mut self, last: u64, intents: &[(Intent, Standing)]) -> Result<bool, GateFailure> {
        // Kept for its room.
        let mut records = mem::take(&mut self.settled);
        for gap in self.sequencer.settle(last, intents, &mut records) {
            self.audit.inconclusive(gap);
        }
        let judged = self.judge_all(&records);
        self.settled = records;
        Ok(judged)
    }

    /// Has records judged, in order. False if this was broken off.
    fn judge_all(&mut self, records: &[Record]) -> bool {
        if records.is_empty() {
            return true;
        }
        let started = self.clock.now();
        let mut stopping: Option<Instant> = None;
        for record in records {
            if self.stop.told().is_some()
                && stopping.get_or_insert_with(Instant::now).elapsed() > JUDGE_AT_STOP
            {
                // What follows is the end of the run; what is left is not judged.
                self.audit.inconclusive("the run was stopped while events were judged".into());
                self.lost_sightings = true;
                return false;
            }
            self.counters.events +=
                u64::from(!matches!(record.event, Event::Host(..) | Event::Seen(_)));
            if matches!(record.event, Event::Seen(_)) {
                self.waiting_sightings = self.waiting_sightings.saturating_sub(1);
            }
            self.event(record);
            for observer in &mut self.observers {
                observer.event(record);
            }
        }
        self.audit_ticks += self.clock.now().saturating_sub(started);
        true
    }

    /// Has the audit judge a record. The caller takes the time, once for many.
    fn event(&mut self, record: &Record) {
        let Self { memory, stage, cpus, intents, audit, .. } = self;
        let world = LiveWorld { memory, stage: &**stage, cpus, intents, frugal: false };
        audit.event(record, &world);
    }

    /// Takes a number for something that the host does, and records it.
    pub(super) fn host_record(
        &mut self,
        cpu: u8,
        act: HostAct,
        frames: FrameRange,
    ) -> Result<u64, GateFailure> {
        let seq = self.host_number()?;
        self.told(cpu, seq, act, frames);
        Ok(seq)
    }

    pub(super) fn host_number(&mut self) -> Result<u64, GateFailure> {
        Ok(self.memory.next_event_number()?)
    }

    /// Puts the host's own event in its place among the guest's.
    pub(super) fn told(&mut self, cpu: u8, seq: u64, act: HostAct, frames: FrameRange) {
        let record = Record { seq, cpu, site: 0, event: Event::Host(act, frames) };
        if let Err(why) = self.sequencer.push(record, seq) {
            self.audit.inconclusive(why);
        }
    }
}
