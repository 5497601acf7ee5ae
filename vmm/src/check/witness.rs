//! Whether a finding names the right frame and CPU: worked out again, and independently of the
//! audit, from the events that the run recorded.

use crate::audit::Rule;
use crate::report::Violation;
use lacuna_abi::addr::{FrameRange, Gfn, Gpa, Gva};
use lacuna_abi::event::{EntryWrite, Event, Flush, HostAct, Life, Record, Sighting, mapped_frames};
use lacuna_abi::layout::{MERMAP, WINDOW_STRIDE, direct_map};
use lacuna_abi::paging::{Entry, Level};

/// A finding, as a report or the audit itself gives it.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The rule.
    pub rule: String,
    /// The frame.
    pub frame: Gfn,
    /// The virtual address.
    pub va: Option<Gva>,
    /// The CPU.
    pub cpu: Option<u8>,
    /// Number of the event at which it was found.
    pub seq: u64,
}

impl Seen {
    /// A violation of a report.
    ///
    /// # Errors
    /// A sentence, if it names no frame.
    pub fn of(violation: &Violation) -> Result<Self, String> {
        let frame = violation.frame.ok_or_else(|| {
            format!("the violation of {} at event {} names no frame", violation.rule, violation.seq)
        })?;
        Ok(Self {
            rule: violation.rule.clone(),
            frame: Gpa(frame.0).frame(),
            va: violation.va.map(|va| Gva(va.0)),
            cpu: violation.vcpu,
            seq: violation.seq,
        })
    }

    /// The CPU in whose window the address lies.
    fn window(&self) -> Option<u8> {
        let offset = self.va?.offset_from(MERMAP)?;
        u8::try_from(offset / WINDOW_STRIDE).ok().filter(|cpu| *cpu < 8)
    }

    fn in_direct_map(&self, frame: Gfn) -> bool {
        let offset = self.va.and_then(|va| direct_map(frame.gpa()).offset_from(va));
        offset.is_some_and(|offset| offset < Level::Pd.span())
    }
}

/// All events of a run, in order.
pub struct Witness(pub Vec<Record>);

impl Witness {
    /// Whether a violation of a report is what the events show.
    ///
    /// # Errors
    /// A sentence, if it is not.
    pub fn confirms_violation(&self, violation: &Violation) -> Result<(), String> {
        if violation.rule != Rule::TraceHonesty.name() {
            return self.confirms(&Seen::of(violation)?);
        }
        let Violation { vcpu, seq, .. } = *violation;
        if vcpu.is_some_and(|cpu| self.is_forged(cpu, seq)) {
            return Ok(());
        }
        Err(format!("the events show no lie at event {seq}"))
    }

    /// Whether the finding is what the events show.
    ///
    /// # Errors
    /// A sentence, if it is not.
    pub fn confirms(&self, seen: &Seen) -> Result<(), String> {
        let holds = match seen.rule.as_str() {
            "direct-map-alias" => {
                seen.in_direct_map(seen.frame)
                    && self.is_secret(seen)
                    && (self.is_refused(seen)
                        || self.maps(seen, direct_map(seen.frame.gpa())) != Some(false))
            }
            "foreign-alias" => {
                self.is_secret(seen)
                    && (self.is_refused(seen)
                        || seen.va.is_some_and(|va| self.maps(seen, va) == Some(true)))
                    && seen.window().is_some_and(|owner| {
                        !self.is_open(seen, owner) || self.is_used_by_another(seen, owner)
                    })
            }
            "global-window" => {
                let written = seen.va.and_then(|va| self.last_write(seen, va));
                self.is_secret(seen)
                    && seen.window().is_some_and(|owner| seen.cpu.is_none_or(|cpu| cpu == owner))
                    && (self.is_refused(seen)
                        || written.is_some_and(|(_, write)| write.new.has(Entry::GLOBAL)))
            }
            "stale-direct-map" => {
                self.became_secret(seen.frame)
                    && seen.window().is_none()
                    && self.is_cached(seen, |flush| matches!(flush, Flush::Everything))
            }
            "stale-window" => {
                seen.window().is_some_and(|owner| seen.cpu == Some(owner))
                    && self.became_secret(seen.frame)
                    && self.is_cached(seen, |flush| !matches!(flush, Flush::Pages { .. }))
            }
            "stale-table" => self.is_cached_table(seen),
            "second-stage-open" => {
                self.is_pooled(seen.frame)
                    && (!matches!(self.act(seen), Some(HostAct::Sealed | HostAct::HeldOpen))
                        || (0..8).any(|cpu| self.is_open(seen, cpu)))
            }
            "residue" => self.is_secret(seen),
            other => return Err(format!("no witness for {other}")),
        };
        if holds { Ok(()) } else { Err(format!("the events do not show {seen:?}")) }
    }

    /// Records up to the finding, the last first.
    fn before(&self, seen: &Seen) -> impl Iterator<Item = &Record> {
        let seq = seen.seq;
        self.0.iter().rev().filter(move |record| record.seq <= seq)
    }

    /// What the host had last done with the frame.
    fn act(&self, seen: &Seen) -> Option<HostAct> {
        self.before(seen).find_map(|record| host_act(record, seen.frame))
    }

    /// Whether the next that the host did is to refuse the finding's CPU a write to tables about the
    /// frame.
    fn is_refused(&self, seen: &Seen) -> bool {
        let mut after = self.0.iter().filter(|record| record.seq > seen.seq);
        let next = after.find(|record| matches!(record.event, Event::Host(..)));
        next.is_some_and(|record| {
            let about = matches!(record.event, Event::Host(HostAct::WriteRefused, frames)
                if frames.contains(seen.frame));
            about && seen.cpu == Some(record.cpu)
        })
    }

    /// Secret at the finding: the host says so before, or completes the call that it is about.
    fn is_secret(&self, seen: &Seen) -> bool {
        let secret = |act| matches!(act, HostAct::Sealed | HostAct::HeldOpen | HostAct::Opened);
        let mut after = self.0.iter().filter(|record| record.seq > seen.seq);
        self.act(seen).is_some_and(secret)
            || after.find_map(|record| host_act(record, seen.frame)).is_some_and(secret)
    }

    /// Secret at some time of the run.
    fn became_secret(&self, frame: Gfn) -> bool {
        let acts = || self.0.iter().filter_map(|record| host_act(record, frame));
        acts().any(|act| matches!(act, HostAct::Sealed | HostAct::HeldOpen | HostAct::Opened))
    }

    fn is_pooled(&self, frame: Gfn) -> bool {
        self.0.iter().any(|record| {
            matches!(record.event, Event::Life(Life::Pooled | Life::PooledZero | Life::Freed, frames)
                if frames.contains(frame))
        })
    }

    /// Whether the CPU has the frame open: more opens than seals of it. The finding may be about a
    /// seal on its arrival, which the host notes later.
    fn is_open(&self, seen: &Seen, cpu: u8) -> bool {
        let mut opens = 0;
        for record in &self.0 {
            let Some(act) = host_act(record, seen.frame) else { continue };
            let late = record.seq > seen.seq;
            match act {
                HostAct::Opened if record.cpu == cpu && !late => opens += 1,
                HostAct::Sealed | HostAct::HeldOpen if record.cpu == cpu => {
                    opens = i32::max(opens - 1, 0);
                }
                _ => {}
            }
            if late {
                break;
            }
        }
        opens > 0
    }

    /// Whether the finding is about an access by another CPU than the window's.
    fn is_used_by_another(&self, seen: &Seen, owner: u8) -> bool {
        let last = self.before(seen).next().filter(|record| record.seq == seen.seq);
        last.is_some_and(|record| {
            matches!(record.event, Event::Seen(Sighting::Access { .. }))
                && record.cpu != owner
                && seen.cpu == Some(record.cpu)
        })
    }

    fn writes(&self, seen: &Seen) -> impl Iterator<Item = (&Record, &EntryWrite)> {
        self.before(seen).filter_map(|record| match &record.event {
            Event::EntryWrite(write) => Some((record, write)),
            _ => None,
        })
    }

    fn last_write(&self, seen: &Seen, va: Gva) -> Option<(&Record, &EntryWrite)> {
        let mut writes = self.reported_after(seen).into_iter().chain(self.writes(seen));
        writes.find(|(_, write)| spans(write.va, write.span(), va))
    }

    /// The guest's own record of the write that the finding is about, where the host saw the write and the
    /// record comes behind it.
    fn reported_after(&self, seen: &Seen) -> Option<(&Record, &EntryWrite)> {
        let store = self.before(seen).next().filter(|record| record.seq == seen.seq)?;
        let Event::Seen(Sighting::Stores(stores)) = &store.event else { return None };
        let own = self.0.iter().filter(|record| record.seq > seen.seq && record.cpu == store.cpu);
        let mut writes = own.filter_map(|record| match &record.event {
            Event::EntryWrite(write) => Some((record, write)),
            _ => None,
        });
        let (record, write) = writes.next()?;
        let same = (write.old, write.new, write.count) == (stores.old, stores.new, stores.count);
        same.then_some((record, write))
    }

    /// Whether the frame is mapped at the address by the last record of it, if there is one that says
    /// so: one that links a table does not.
    fn maps(&self, seen: &Seen, va: Gva) -> Option<bool> {
        let (_, write) = self.last_write(seen, va)?;
        if write.new.is_present() && !write.new.is_leaf(write.level) {
            return None;
        }
        Some(mapped_frames(write.new, write.level, write.count).is_some())
    }

    /// Whether the finding's CPU may cache a translation that was taken away: it made no flush since
    /// that removes it.
    fn is_cached(&self, seen: &Seen, removes: impl Fn(&Flush) -> bool) -> bool {
        let Some((va, cpu)) = seen.va.zip(seen.cpu) else { return false };
        let revoke = self.writes(seen).find(|(_, write)| {
            let old = mapped_frames(write.old, write.level, write.count);
            spans(write.va, write.span(), va) && old.is_some_and(|old| old.contains(seen.frame))
        });
        let Some((revoke, _)) = revoke else { return false };
        !self.flushes(seen, cpu, revoke.seq).any(|flush| match flush {
            Flush::Pages { va: first, count, level } => {
                spans(*first, u64::from(*count) * level.span(), va)
            }
            flush => removes(flush),
        })
    }

    /// Whether the finding's CPU may walk through the table, which was unlinked: it made no flush
    /// since, of any kind that the guest makes.
    fn is_cached_table(&self, seen: &Seen) -> bool {
        let made = self.before(seen).any(|record| {
            matches!(record.event, Event::Life(Life::TableAllocated, frames)
                if frames.contains(seen.frame))
        });
        let unlink = self.writes(seen).find(|(_, write)| {
            !write.old.is_leaf(write.level) && write.old.frame(write.level) == seen.frame
        });
        let Some(((unlink, _), cpu)) = unlink.zip(seen.cpu) else { return false };
        made && self.flushes(seen, cpu, unlink.seq).next().is_none()
    }

    fn flushes(&self, seen: &Seen, cpu: u8, since: u64) -> impl Iterator<Item = &Flush> {
        self.before(seen).take_while(move |record| record.seq > since).filter_map(move |record| {
            match &record.event {
                Event::Flush(flush) if record.cpu == cpu => Some(flush),
                _ => None,
            }
        })
    }

    /// Whether the CPU reports this event, and was not seen to do it: a flush comes after its record, a
    /// store before.
    pub fn is_forged(&self, cpu: u8, seq: u64) -> bool {
        let own = |record: &&Record| record.cpu == cpu;
        let Some(at) = self.0.iter().position(|record| record.seq == seq && record.cpu == cpu)
        else {
            return false;
        };
        match self.0[at].event {
            Event::Flush(reported) => {
                let next = self.0[at + 1..].iter().find(own);
                !next.is_some_and(|next| match next.event {
                    Event::Seen(Sighting::Flush(flush)) => flush == reported,
                    Event::Seen(Sighting::Control { .. }) => reported == Flush::Everything,
                    _ => false,
                })
            }
            Event::EntryWrite(reported) => {
                let before = self.0[..at].iter().rev().find(own);
                !before.is_some_and(|before| {
                    matches!(before.event, Event::Seen(Sighting::Stores(stores))
                        if stores.new == reported.new)
                })
            }
            _ => false,
        }
    }

    /// Whether the frame is the last of a range that the host did this with.
    #[must_use]
    pub fn ends_a_range(&self, frame: Gfn, wanted: HostAct) -> bool {
        self.0.iter().any(|record| {
            matches!(record.event, Event::Host(act, frames)
                if act == wanted && frames.end() == Gfn(frame.0 + 1))
        })
    }
}

fn host_act(record: &Record, frame: Gfn) -> Option<HostAct> {
    match record.event {
        Event::Host(HostAct::Quiesced | HostAct::Refused | HostAct::WriteRefused, _) => None,
        Event::Host(act, frames) if FrameRange::contains(frames, frame) => Some(act),
        _ => None,
    }
}

fn spans(start: Gva, bytes: u64, va: Gva) -> bool {
    va.offset_from(start).is_some_and(|offset| offset < bytes)
}
