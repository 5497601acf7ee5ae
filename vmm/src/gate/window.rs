//! The part of a run in which vCPUs are stepped. It begins and ends at a gate call, when all vCPUs stand
//! still and what they did and what they recorded are the same.

use super::{Gate, GateFailure, Vcpus};
use crate::audit::Mediation;
use crate::config::Steps;

/// RFLAGS.IF: interrupts on.
const RFLAGS_IF: u64 = 1 << 9;

/// Which events are stepped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Window {
    wanted: Steps,
    /// The event behind which it began, and the last one in it, as far as it came.
    stepped: Option<(u64, Option<u64>)>,
}

impl Window {
    /// A window that has begun, if it is to begin with the run.
    pub(super) fn new(wanted: Steps) -> Self {
        Self { wanted, stepped: (wanted.from == 0).then_some((0, None)) }
    }

    /// Whether it begins or ends once event `last` has been judged.
    const fn changes(&self, last: u64) -> Option<Mediation> {
        match self.stepped {
            None if last >= self.wanted.from => Some(Mediation::Step),
            Some((_, None)) if last > self.wanted.to => Some(Mediation::Trace),
            _ => None,
        }
    }
}

impl Gate {
    /// Whether some part of the run is to be stepped.
    #[must_use]
    pub const fn is_to_step(&self) -> bool {
        self.window.is_some()
    }

    /// The events that were stepped: the first, and the last if the run went on.
    #[must_use]
    pub fn stepped(&self) -> Option<(u64, Option<u64>)> {
        self.window.as_ref()?.stepped
    }

    /// Begins or ends the stepped part, if it is time.
    pub(super) fn pass_border(
        &mut self,
        cpu: u8,
        vcpus: &mut dyn Vcpus,
    ) -> Result<(), GateFailure> {
        let last = self.memory.last_event_number()?;
        let Some(to) = self.window.as_ref().and_then(|window| window.changes(last)) else {
            return Ok(());
        };
        let is_settled = self.stand_still(cpu, vcpus)?;
        let seq = self.memory.last_event_number()?;
        if to == Mediation::Trace {
            self.note_settled(cpu, vcpus, seq)?;
        }
        // At the end nobody may be between what it did and its record.
        if is_settled && !(to == Mediation::Trace && self.audit.owes_reports()) {
            self.with_audit(|audit, world| audit.mediate(to, world));
            if to == Mediation::Step {
                self.audit.came(cpu, seq);
                self.note_settled(cpu, vcpus, seq)?;
            }
            vcpus.step(to == Mediation::Step);
            if let Some(window) = &mut self.window {
                window.stepped = match window.stepped {
                    None => Some((seq, None)),
                    Some((from, _)) => Some((from, Some(seq))),
                };
            }
        }
        vcpus.resume();
        Ok(())
    }

    /// CPUs that are not compared yet are from here on if their interrupts are on: a guest acts and
    /// records with interrupts off. All stand still.
    fn note_settled(
        &mut self,
        cpu: u8,
        vcpus: &mut dyn Vcpus,
        seq: u64,
    ) -> Result<(), GateFailure> {
        for other in self.audit.running().filter(|other| *other != cpu).collect::<Vec<_>>() {
            let waits = !self.audit.is_compared(other);
            if waits && vcpus.registers(other)?.rflags & RFLAGS_IF != 0 {
                self.audit.came(other, seq);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_begins_with_its_first_event_and_ends_behind_its_last() {
        let mut window = Window::new(Steps { from: 5, to: 9 });
        assert_eq!((window.changes(4), window.changes(5)), (None, Some(Mediation::Step)));
        window.stepped = Some((5, None));
        assert_eq!((window.changes(9), window.changes(10)), (None, Some(Mediation::Trace)));
        window.stepped = Some((5, Some(10)));
        assert_eq!(window.changes(11), None);
        let all = Window::new(Steps::ALL);
        assert_eq!((all.stepped, all.changes(u64::MAX)), (Some((0, None)), None));
    }
}
