//! What the host did with frames, noted apart from gate and audit.

use super::oracle::{Left, forbidden};
use crate::gate::{Gate, Observer};
use lacuna_abi::addr::{FrameRange, Gfn, Gpa};
use lacuna_abi::event::HostAct;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What the host told of what it did.
#[derive(Debug, Default)]
pub(super) struct Told {
    /// Who makes the call that is served.
    pub(super) caller: u8,
    pub(super) secret: BTreeSet<Gfn>,
    /// How often a CPU has a frame open.
    pub(super) open: BTreeMap<(Gfn, u8), u64>,
}

/// Notes what the host tells of a guest that misbehaves, apart from gate and audit.
#[derive(Clone, Debug, Default)]
pub struct Notes(Arc<Mutex<Told>>);

impl Notes {
    /// What a guest of one CPU, whose run is over, left in tables and registers that a rule forbids, if
    /// anything. Roots that it registered beside its first are not looked at.
    #[must_use]
    pub fn forbidden(&self, gate: &Gate, root: Gpa) -> Option<String> {
        let registers = gate.last_registers(0).map(|registers| (0, registers));
        let (registers, told) = (registers.into_iter().collect(), &self.lock());
        forbidden(&Left { memory: gate.memory(), root, roots: None, registers, told })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Told> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Observer for Notes {
    fn operation(&mut self, act: HostAct, frames: FrameRange) {
        let mut told = self.lock();
        let caller = told.caller;
        for frame in frames.iter() {
            match act {
                HostAct::Opened => *told.open.entry((frame, caller)).or_default() += 1,
                HostAct::Sealed | HostAct::HeldOpen => {
                    if !told.secret.insert(frame)
                        && let Some(opens) = told.open.get_mut(&(frame, caller))
                    {
                        *opens = opens.saturating_sub(1);
                    }
                }
                HostAct::Released => _ = told.secret.remove(&frame),
                HostAct::Quiesced | HostAct::Refused | HostAct::WriteRefused => {}
            }
        }
    }
}
