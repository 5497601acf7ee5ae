//! Gate operations: judged when they arrive, before anything takes effect, and completed when the
//! second stage has been changed.

use super::finding::{Finding, Rule};
use super::frames::runs;
use super::life::count_of;
use super::mappings::{Sight, judge_alias};
use super::story::Moment;
use super::tlb::{Duty, cpu_list, members, only};
use super::writes::stale_finding;
use super::{Audit, Denial, Ledger, World};
use lacuna_abi::addr::{FrameRange, Gfn};
use lacuna_abi::event::{Event, HostAct, Record};
use lacuna_abi::gate::{Op, OpKind, Status};
use lacuna_abi::layout::Place;

impl Audit {
    /// Judges an operation on its arrival and updates the state of its frames: after a seal they
    /// are secret and open once less on this CPU, after an open once more. (A frame counts as
    /// secret from here and not only from the return of the call: nothing of the guest's is looked
    /// at in between, and [`Frames::may_close`](super::Frames::may_close) must know.) A release
    /// takes effect in [`Self::done`].
    ///
    /// # Errors
    /// The status with which the call must be refused; then nothing has changed:
    /// [`Status::NotInZone`], [`Status::NotSecret`], [`Status::StillOpen`],
    /// [`Status::TooManyOpens`]; [`Status::BadState`] for a CPU that does not run. Under direct paging
    /// [`Status::Refused`] for an open of frames that are mapped where they must not be, or of which a
    /// translation of the direct map may be cached.
    pub fn arrival(&mut self, cpu: u8, op: Op, seq: u64, world: &impl World) -> Result<(), Status> {
        let result = self.judge_arrival(cpu, op, seq, world);
        self.tell(&Moment::Call(cpu, op), world);
        result
    }

    fn judge_arrival(
        &mut self,
        cpu: u8,
        op: Op,
        seq: u64,
        world: &impl World,
    ) -> Result<(), Status> {
        if !self.tlb.is_running(cpu) {
            return Err(Status::BadState);
        }
        // It is at the gate: whatever it announced, it has done.
        let kept = self.tlb.went_on(cpu, seq.saturating_add(1));
        self.note_dropped(kept);
        let zone = self.frames.zone();
        let mut well = true;
        if op.kind != OpKind::Release
            && let Some(named) = op.frames.intersection(zone)
        {
            well = self.judge_stale_direct_map(named, seq);
        }
        if !zone.contains_range(op.frames) {
            return Err(Status::NotInZone);
        }
        match op.kind {
            OpKind::Seal => {
                self.frames.seal(op.frames, cpu);
                self.snapshot(op.frames, op.frames.count(), cpu, seq);
                Ok(())
            }
            OpKind::Open => {
                let secret = self.frames.secret_in(op.frames);
                well &= self.snapshot(op.frames, secret, cpu, seq);
                if self.is_direct() && !well && secret == op.frames.count() {
                    return Err(Status::Refused);
                }
                self.open(cpu, (op.frames, secret), seq, world)
            }
            OpKind::Release => {
                let secret = self.frames.secret_in(op.frames);
                self.snapshot(op.frames, secret, cpu, seq);
                self.release(cpu, (op.frames, secret), seq, world)
            }
        }
    }

    /// Completes an operation that was accepted, once the second stage has been changed and its
    /// translations are gone: a seal that is now enforced discharges what was revoked before
    /// `seq`, a release ends secrecy.
    pub fn done(&mut self, cpu: u8, op: Op, seq: u64, world: &impl World) {
        let named = op.frames.intersection(self.frames.zone());
        let Some(frames) = named.filter(|_| self.tlb.is_running(cpu)) else { return };
        let act = match op.kind {
            OpKind::Seal => {
                let closes = self.config.seal_closes;
                let mut all = closes;
                for part in frames.by_block().filter(|_| closes) {
                    all &= self.complete(part, seq, world);
                }
                if all || self.frames.all_complete(frames) {
                    HostAct::Sealed
                } else {
                    HostAct::HeldOpen
                }
            }
            OpKind::Open => HostAct::Opened,
            OpKind::Release => {
                self.frames.release(frames);
                HostAct::Released
            }
        };
        self.history.push(&Record { seq, cpu, site: 0, event: Event::Host(act, frames) });
    }

    /// `stale-direct-map`: judged before the state of the frames is looked at. Whether all is well.
    fn judge_stale_direct_map(&mut self, named: FrameRange, seq: u64) -> bool {
        let mut well = true;
        self.ledger.checked(Rule::StaleDirectMap, named.count());
        let layout = &self.config.layout;
        let direct = |duty: &Duty| layout.place_of(duty.va) == Place::DirectMap;
        for duty in self.tlb.some_of_frames(named, direct) {
            let Some(stale) = duty.frames.intersection(named) else { continue };
            let kind = if duty.is_global() { "global translation" } else { "translation" };
            let cure = if duty.is_global() {
                "an INVLPG of the address or a PGE change"
            } else {
                "an INVLPG of the address, a root load or a PGE change"
            };
            let detail = format!(
                "{} may still cache the direct map's {kind} of {} frames that event {} revoked; \
                 {cure} there, with a larger number, would have discharged it",
                cpu_list(duty.cpus),
                stale.count(),
                duty.seq
            );
            if let Some(cpu) = members(duty.cpus).next() {
                let finding = stale_finding(Rule::StaleDirectMap, &duty, cpu, seq, detail);
                self.ledger.violation(Finding { frame: Some(stale.start()), ..finding });
                well = false;
            }
        }
        well
    }

    /// The alias rules for the frames named, `secret` of which are secret, through the index. Whether all
    /// is well.
    #[inline]
    fn snapshot(&mut self, named: FrameRange, secret: u64, cpu: u8, seq: u64) -> bool {
        self.ledger.checked(Rule::DirectMapAlias, secret);
        self.ledger.checked(Rule::ForeignAlias, secret);
        if self.index.maps_nothing_of(named) {
            return true;
        }
        let layout = &self.config.layout;
        let mut well = true;
        for mapping in self.index.of_frames(named) {
            let at = Sight { mapping: &mapping, cpu: Some(cpu), seq };
            well &= judge_alias(&mut self.ledger, &self.frames, layout, &at);
        }
        well
    }

    fn open(
        &mut self,
        cpu: u8,
        (named, secret): (FrameRange, u64),
        seq: u64,
        world: &impl World,
    ) -> Result<(), Status> {
        self.count_second_stage(named.count());
        if secret < named.count() {
            self.refuse_open(cpu, named, seq);
            return Err(Status::NotSecret);
        }
        let frames = &self.frames;
        if !frames.has_room(named, cpu) {
            return Err(Status::TooManyOpens);
        }
        if frames.some_due_for_first_open(named) {
            let what =
                "handed out as zero and is not zero when first opened; it must be zeroed before";
            let by = (Some(cpu), seq);
            if frames.all_due_for_first_open(named) {
                judge_zero(&mut self.ledger, std::iter::once(named), what, by, world);
            } else {
                let due = runs(frames.due_for_first_open(named));
                judge_zero(&mut self.ledger, due, what, by, world);
            }
        }
        self.frames.open(named, cpu);
        Ok(())
    }

    /// `second-stage-open`: what is opened is secret.
    fn refuse_open(&mut self, cpu: u8, named: FrameRange, seq: u64) {
        for run in runs(named.iter().filter(|frame| !self.frames.is_secret(*frame))) {
            let detail = format!("{} opened without being secret; seal first", count_of(run));
            let finding = Finding::new(Rule::SecondStageOpen, seq, detail);
            let frame = Some(run.start());
            self.ledger.violation(Finding { frame, cpu: Some(cpu), ..finding });
        }
    }

    fn release(
        &mut self,
        cpu: u8,
        (named, secret): (FrameRange, u64),
        seq: u64,
        world: &impl World,
    ) -> Result<(), Status> {
        if secret < named.count() {
            return Err(Status::NotSecret);
        }
        if !self.frames.all_may_close(named) {
            return Err(Status::StillOpen);
        }
        self.judge_stale_window(named, seq);
        let what = "released and is not zero; it must be scrubbed before";
        let named = std::iter::once(named);
        judge_zero(&mut self.ledger, named, what, (Some(cpu), seq), world);
        Ok(())
    }

    /// `stale-window`: what leaves the secret side is cached by no window's own CPU.
    fn judge_stale_window(&mut self, named: FrameRange, seq: u64) {
        self.ledger.checked(Rule::StaleWindow, named.count());
        if self.running().count() > 1 {
            // Copies that other CPUs may have made speculatively are not followed.
            self.ledger.not_checked(Rule::StaleWindow, named.count());
        }
        for duty in self.tlb.of_frames(named) {
            let owner = self.window_of(duty.va).filter(|owner| duty.cpus & only(*owner) != 0);
            let Some((owner, stale)) = owner.zip(duty.frames.intersection(named)) else { continue };
            let detail = format!(
                "released while CPU {owner} may cache the window translation revoked by event {}; \
                 an INVLPG or a root load by CPU {owner} in between, or a completed seal, would \
                 have discharged it",
                duty.seq
            );
            let finding = stale_finding(Rule::StaleWindow, &duty, owner, seq, detail);
            self.ledger.violation(Finding { frame: Some(stale.start()), ..finding });
        }
    }

    /// Completes the seals of a part of a pageblock as far as the second stage enforces them: whether
    /// all of them. With a granule of a block, others of the block that were held open may complete
    /// with them.
    fn complete(&mut self, part: FrameRange, seq: u64, world: &impl World) -> bool {
        let enforced = |audit: &Self, frame: &Gfn| {
            audit.frames.may_close(*frame) && world.denial(*frame) == Denial::Denied
        };
        let all = self.frames.all_may_close(part) && world.denies_all(part);
        if all {
            self.complete_run(part, seq);
        } else {
            let some: Vec<_> = runs(part.iter().filter(|frame| enforced(self, frame))).collect();
            if some.is_empty() {
                return false;
            }
            some.into_iter().for_each(|run| self.complete_run(run, seq));
        }
        if self.frames.some_held(part.start()) {
            let beside = self.frames.held_beside(part).filter(|frame| enforced(self, frame));
            let beside: Vec<_> = runs(beside).collect();
            beside.into_iter().for_each(|run| self.complete_run(run, seq));
        }
        all
    }

    fn complete_run(&mut self, run: FrameRange, seq: u64) {
        self.frames.complete(run);
        let kept = self.tlb.discharge(run, seq);
        self.note_dropped(kept);
    }
}

/// `residue`: these frames are zero. A frame that the host cannot see is not checked.
pub(super) fn judge_zero(
    ledger: &mut Ledger,
    frames: impl Iterator<Item = FrameRange>,
    what: &str,
    (cpu, seq): (Option<u8>, u64),
    world: &impl World,
) {
    let (mut checked, mut hidden) = (0, 0);
    // Nearly always all of them are.
    let doubtful = frames.filter(|run| {
        let zero = world.contents_are_zero(*run);
        checked += if zero { run.count() } else { 0 };
        !zero
    });
    let doubtful: Vec<FrameRange> = doubtful.collect();
    let frames = doubtful.into_iter().flat_map(FrameRange::iter);
    let dirty = frames.filter(|frame| match world.content_is_zero(*frame) {
        Some(zero) => {
            checked += 1;
            !zero
        }
        None => {
            hidden += 1;
            false
        }
    });
    for run in runs(dirty) {
        let detail = format!("{} {what}", count_of(run));
        let finding = Finding::new(Rule::Residue, seq, detail);
        ledger.violation(Finding { frame: Some(run.start()), cpu, ..finding });
    }
    ledger.checked(Rule::Residue, checked);
    ledger.not_checked(Rule::Residue, hidden);
}
