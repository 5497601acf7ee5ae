//! Duties for page tables: entries that led to a table and that some CPU may still cache in its
//! paging-structure caches.

use super::epochs::{CpuSet, Epochs, members};
use super::finding::Revoke;
use lacuna_abi::addr::{Gfn, Gpa, Gva};
use std::collections::BTreeMap;

/// Most duties that are kept for one table: it is rarely linked at more than one place.
const MAX_PER_TABLE: usize = 64;

/// A revoked path to a table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct TableDuty {
    /// Root of the address space.
    pub root: Gpa,
    /// PCID under which the path may be cached.
    pub pcid: u16,
    /// First address that the table spans there.
    pub va: Gva,
    /// Number of the revoke.
    pub seq: u64,
    /// CPUs that may cache it.
    pub cpus: CpuSet,
}

/// The duties of every table. Only frames of the table pool are entered, which bounds them.
#[derive(Clone, Debug, Default)]
pub(super) struct TableDuties {
    by_table: BTreeMap<Gfn, Vec<TableDuty>>,
}

impl TableDuties {
    /// Adds a duty; false if it had to be dropped because the table has too many.
    pub(super) fn add(&mut self, table: Gfn, duty: TableDuty, epochs: &Epochs) -> bool {
        let duties = self.by_table.entry(table).or_default();
        duties.retain(|old| left(old, epochs) != 0);
        let same =
            |old: &&mut TableDuty| (old.root, old.pcid, old.va) == (duty.root, duty.pcid, duty.va);
        if let Some(old) = duties.iter_mut().find(same) {
            *old = TableDuty { cpus: duty.cpus | left(old, epochs), ..duty };
            return true;
        }
        let room = duties.len() < MAX_PER_TABLE;
        if room && duty.cpus != 0 {
            duties.push(duty);
        }
        room
    }

    /// Duties of a table that some CPU still has, with those CPUs.
    pub(super) fn of_table(&self, table: Gfn, epochs: &Epochs) -> Vec<TableDuty> {
        let duties = self.by_table.get(&table).into_iter().flatten();
        duties
            .map(|duty| TableDuty { cpus: left(duty, epochs), ..*duty })
            .filter(|duty| duty.cpus != 0)
            .collect()
    }
}

/// The revoke of a path that a CPU may still cache.
pub(super) fn revoke_of(duty: &TableDuty) -> Option<Revoke> {
    let cpu = members(duty.cpus).next()?;
    Some(Revoke { seq: duty.seq, cpu, va: duty.va })
}

fn left(duty: &TableDuty, epochs: &Epochs) -> CpuSet {
    epochs.may_cache_table(duty.cpus, duty.pcid, duty.seq)
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_abi::event::Flush;

    const DUTY: TableDuty = TableDuty { root: Gpa(0), pcid: 0, va: Gva(0), seq: 5, cpus: 0b10 };

    #[test]
    fn a_path_revoked_again_keeps_the_cpus_that_have_not_flushed() {
        let (mut duties, mut epochs) = (TableDuties::default(), Epochs::default());
        assert!(duties.add(Gfn(1), DUTY, &epochs));
        assert!(duties.add(Gfn(1), TableDuty { seq: 6, cpus: 0b01, ..DUTY }, &epochs));
        assert_eq!(duties.of_table(Gfn(1), &epochs)[0].cpus, 0b11);
        epochs.flush(1, 0, &Flush::NonGlobal, 7);
        assert_eq!(duties.of_table(Gfn(1), &epochs)[0].cpus, 0b01);
    }

    #[test]
    fn too_many_paths_to_one_table_are_said() {
        let (mut duties, epochs) = (TableDuties::default(), Epochs::default());
        let mut add = |n: u64| duties.add(Gfn(1), TableDuty { va: Gva(n << 21), ..DUTY }, &epochs);
        assert!((0..64).all(&mut add));
        assert!(!add(64));
    }
}
