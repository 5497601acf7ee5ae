//! The last big flushes of each CPU: what discharges thousands of duties at once, without a loop
//! over them.

use super::duty::{Duty, Tag};
use super::set::{CpuSet, members, only};
use lacuna_abi::MAX_CPUS;

/// PCIDs that exist.
const PCIDS: u16 = 1 << 12;

/// What a big flush removes on its CPU (SDM volume 3, "Operations that Invalidate TLBs and
/// Paging-Structure Caches").
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Scope {
    /// Everything under every PCID, globals too: a change of CR4.PGE, CR4.PCIDE or CR0.PG from 1 to
    /// 0, INVPCID of type 2.
    Everything,
    /// Everything under every PCID but globals: INVPCID of type 3.
    AllPcids,
    /// Everything under one PCID but globals: a CR3 load without bit 63, INVPCID of type 1, a change
    /// of CR4.PAE, CR4.SMEP from 0 to 1.
    Pcid(u16),
}

impl Scope {
    /// Whether what has this tag goes.
    pub(super) fn reaches(self, tag: Tag) -> bool {
        match (self, tag) {
            (Self::Everything, _) | (Self::AllPcids, Tag::Pcid(_)) => true,
            (Self::Pcid(flushed), Tag::Pcid(pcid)) => flushed == pcid,
            (Self::AllPcids | Self::Pcid(_), Tag::Global) => false,
        }
    }
}

/// Numbers of the last flushes of one CPU; 0 if there was none.
#[derive(Clone, Debug, Default)]
struct CpuEpochs {
    everything: u64,
    all_pcids: u64,
    /// For each PCID up to the largest that was flushed.
    pcids: Vec<u64>,
    /// Number of its last event.
    went_on: u64,
}

/// Numbers of the last flushes of every CPU.
#[derive(Clone, Debug, Default)]
pub(super) struct Epochs {
    cpus: [CpuEpochs; MAX_CPUS],
}

impl Epochs {
    /// A flush by a CPU.
    pub(super) fn flush(&mut self, cpu: u8, scope: Scope, seq: u64) {
        let Some(epochs) = self.cpus.get_mut(usize::from(cpu)) else { return };
        let last = match scope {
            Scope::Everything => &mut epochs.everything,
            Scope::AllPcids => &mut epochs.all_pcids,
            Scope::Pcid(pcid) => {
                let pcid = usize::from(pcid % PCIDS);
                if epochs.pcids.len() <= pcid {
                    epochs.pcids.resize(pcid + 1, 0);
                }
                &mut epochs.pcids[pcid]
            }
        };
        *last = (*last).max(seq);
    }

    /// The CPU has an event with this number: what it announced before has been carried out.
    #[inline]
    pub(super) fn went_on(&mut self, cpu: u8, seq: u64) {
        if let Some(epochs) = self.cpus.get_mut(usize::from(cpu)) {
            epochs.went_on = epochs.went_on.max(seq);
        }
    }

    /// The CPUs that may still cache the duty's translation: only a flush with a larger number than
    /// the revoke discharges.
    pub(super) fn left(&self, duty: &Duty) -> CpuSet {
        let Duty { cpus, tag, seq, passing, .. } = *duty;
        members(cpus)
            .filter(|cpu| {
                self.cpus.get(usize::from(*cpu)).is_some_and(|epochs| {
                    let kept = match tag {
                        Tag::Global => true,
                        Tag::Pcid(pcid) => {
                            seq >= epochs.all_pcids
                                && epochs.pcids.get(usize::from(pcid)).is_none_or(|f| seq >= *f)
                        }
                    };
                    kept && seq >= epochs.everything && !(passing && seq < epochs.went_on)
                })
            })
            .fold(0, |set, cpu| set | only(cpu))
    }
}
