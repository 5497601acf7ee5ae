//! Lists of operations: seal, open, release.

use super::{Gate, GateFailure, Vcpus};
use lacuna_abi::addr::Gfn;
use lacuna_abi::event::HostAct;
use lacuna_abi::gate::{Op, OpKind, Status};

/// How often one call may name all of a guest's frames.
const MAX_PASSES: u64 = 4;

impl Gate {
    /// Carries out a list of operations; the status, and the index of the one that failed.
    pub(super) fn operations(
        &mut self,
        cpu: u8,
        vcpus: &mut dyn Vcpus,
    ) -> Result<(Status, usize), GateFailure> {
        // The list is checked as a whole first: one that makes no sense has no effect.
        if !self.read_list(cpu)? {
            return Ok((Status::BadArguments, 0));
        }
        // A list may name each frame a few times (seal, open, seal), not a few hundred times: the
        // host's work for one call is bounded by the guest's memory.
        let frames = self.ops.iter().fold(0_u64, |sum, op| sum.saturating_add(op.frames.count()));
        if frames > MAX_PASSES * self.memory.layout().zone_frames().count() {
            return Ok((Status::BadArguments, 0));
        }
        for index in 0..self.ops.len() {
            let op = self.ops[index];
            if self.stop.told().is_some() {
                return Ok((Status::BadState, index));
            }
            if let Err(status) = self.operation(cpu, op, vcpus)? {
                return Ok((status, index));
            }
        }
        Ok((Status::Ok, 0))
    }

    fn operation(
        &mut self,
        cpu: u8,
        op: Op,
        vcpus: &mut dyn Vcpus,
    ) -> Result<Result<(), Status>, GateFailure> {
        // An open takes its number before its effect, a seal and a release after theirs. On
        // arrival a seal is judged at the number of the last event.
        let opening = op.kind == OpKind::Open;
        if opening && self.audit.is_direct() && self.is_behind() {
            return Ok(Err(Status::BadState));
        }
        let before = if opening { self.host_number()? } else { self.memory.last_event_number()? };
        if let Err(status) = self.with_audit(|audit, world| audit.arrival(cpu, op, before, world)) {
            if opening {
                self.told(cpu, before, HostAct::Refused, op.frames);
            }
            return Ok(Err(status));
        }
        let frames = self.audit.frames();
        let releasing = op.kind == OpKind::Release;
        // Most often all frames have the same answer.
        let all = !opening && !releasing && frames.all_may_close(op.frames);
        let none = opening || releasing;
        let may_close = |frame: Gfn| {
            if (all || none) && op.frames.contains(frame) { all } else { frames.may_close(frame) }
        };
        let alone = self.stage.needs_all_stopped(op.frames, &may_close);
        if alone {
            vcpus.stop();
        }
        self.stage.update(op.frames, &may_close)?;
        if alone {
            vcpus.resume();
        }
        let (seq, act) = match op.kind {
            OpKind::Open => {
                self.counters.opens += 1;
                (before, HostAct::Opened)
            }
            OpKind::Seal => {
                self.counters.seals += 1;
                let sealed = self.stage.denies_all(op.frames);
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
        for observer in &mut self.observers {
            observer.operation(act, op.frames);
        }
        Ok(Ok(()))
    }
}
