//! The last big flushes of each CPU: what discharges thousands of obligations at once, without a
//! loop over them (SDM volume 3, "Operations that Invalidate TLBs and Paging-Structure Caches").

use lacuna_abi::MAX_CPUS;
use lacuna_abi::event::Flush;
use std::collections::BTreeMap;

/// A set of CPUs, one bit each.
pub(super) type CpuSet = u8;

const _: () = assert!(MAX_CPUS <= 8, "a CpuSet has a bit for each CPU");

/// The set of one CPU; empty for a number that no CPU has.
pub(super) fn only(cpu: u8) -> CpuSet {
    1_u8.checked_shl(u32::from(cpu)).unwrap_or(0)
}

/// The CPUs of a set, in order.
pub(super) fn members(set: CpuSet) -> impl Iterator<Item = u8> {
    (0..8).filter(move |cpu| set & only(*cpu) != 0)
}

/// Numbers of the last flushes of one CPU; 0 if there was none.
#[derive(Clone, Debug, Default)]
struct CpuEpochs {
    everything: u64,
    /// All but globals, of every PCID.
    all_pcids: u64,
    /// All but globals, for each PCID; there are 4096 at most.
    non_global: BTreeMap<u16, u64>,
    /// Paging-structure caches, for each PCID: INVLPG empties them whatever its address.
    structures: BTreeMap<u16, u64>,
}

/// Numbers of the last flushes of every CPU.
#[derive(Clone, Debug, Default)]
pub(super) struct Epochs {
    cpus: [CpuEpochs; MAX_CPUS],
}

impl Epochs {
    /// A flush by a CPU that runs under `pcid`. What a run of INVLPG does to translations is not
    /// an epoch but kept with the obligations.
    pub(super) fn flush(&mut self, cpu: u8, pcid: u16, flush: &Flush, seq: u64) {
        let Some(epochs) = self.cpus.get_mut(usize::from(cpu)) else { return };
        match flush {
            Flush::Everything => epochs.everything = epochs.everything.max(seq),
            Flush::NonGlobal => {
                raise(&mut epochs.non_global, pcid, seq);
                raise(&mut epochs.structures, pcid, seq);
            }
            Flush::Pages { .. } => raise(&mut epochs.structures, pcid, seq),
            Flush::Pcid(pcid) => {
                raise(&mut epochs.non_global, *pcid, seq);
                raise(&mut epochs.structures, *pcid, seq);
            }
            Flush::AllPcids => epochs.all_pcids = epochs.all_pcids.max(seq),
            // One page of one PCID is too little to count here.
            Flush::PageOfPcid { .. } => {}
        }
    }

    /// The CPUs of `cpus` that may still cache a translation revoked at `seq`: only a flush with
    /// a larger number discharges, and one that spares globals does nothing to a global one.
    pub(super) fn may_cache_leaf(
        &self,
        cpus: CpuSet,
        (pcid, global): (u16, bool),
        seq: u64,
    ) -> CpuSet {
        self.keep(cpus, |epochs| {
            seq < epochs.everything
                || (!global
                    && (seq < epochs.all_pcids
                        || epochs.non_global.get(&pcid).is_some_and(|flush| seq < *flush)))
        })
    }

    /// The CPUs of `cpus` that may still cache an entry that led to a table, revoked at `seq`.
    pub(super) fn may_cache_table(&self, cpus: CpuSet, pcid: u16, seq: u64) -> CpuSet {
        self.keep(cpus, |epochs| {
            seq < epochs.everything
                || seq < epochs.all_pcids
                || epochs.structures.get(&pcid).is_some_and(|flush| seq < *flush)
        })
    }

    fn keep(&self, cpus: CpuSet, discharged: impl Fn(&CpuEpochs) -> bool) -> CpuSet {
        members(cpus)
            .filter(|cpu| self.cpus.get(usize::from(*cpu)).is_some_and(|e| !discharged(e)))
            .fold(0, |set, cpu| set | only(cpu))
    }
}

fn raise(epochs: &mut BTreeMap<u16, u64>, pcid: u16, seq: u64) {
    let last = epochs.entry(pcid).or_default();
    *last = (*last).max(seq);
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_abi::addr::Gva;
    use lacuna_abi::paging::Level;

    fn flushed(flush: Flush) -> Epochs {
        let mut epochs = Epochs::default();
        epochs.flush(1, 7, &flush, 10);
        epochs
    }

    #[test]
    fn a_flush_discharges_smaller_numbers_on_its_own_cpu_only() {
        let epochs = flushed(Flush::Everything);
        assert_eq!(epochs.may_cache_leaf(0b11, (3, true), 9), 0b01);
        assert_eq!(epochs.may_cache_leaf(0b11, (3, true), 10), 0b11);
        assert_eq!(epochs.may_cache_table(0b11, 3, 9), 0b01);
    }

    #[test]
    fn a_root_load_spares_globals_and_other_pcids() {
        let epochs = flushed(Flush::NonGlobal);
        assert_eq!(epochs.may_cache_leaf(0b10, (7, false), 9), 0);
        assert_eq!(epochs.may_cache_leaf(0b10, (7, true), 9), 0b10);
        assert_eq!(epochs.may_cache_leaf(0b10, (8, false), 9), 0b10);
        assert_eq!(epochs.may_cache_table(0b10, 7, 9), 0);
        assert_eq!(epochs.may_cache_table(0b10, 8, 9), 0b10);
    }

    #[test]
    fn invlpg_is_an_epoch_for_paging_structures_alone() {
        let epochs = flushed(Flush::Pages { va: Gva(0), count: 1, level: Level::Pt });
        assert_eq!(epochs.may_cache_table(0b10, 7, 9), 0);
        assert_eq!(epochs.may_cache_leaf(0b10, (7, false), 9), 0b10);
    }
}
