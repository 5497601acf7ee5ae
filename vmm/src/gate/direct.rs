//! Direct paging: writes to page tables that the guest asks for, judged and then made.

use super::{Gate, GateFailure};
use crate::events::Standing;
use lacuna_abi::addr::FrameRange;
use lacuna_abi::direct::TableOp;
use lacuna_abi::event::{EntryStores, EntryWrite, HostAct, Sighting, mapped_frames};
use lacuna_abi::gate::Status;
use lacuna_abi::paging::ENTRIES;

impl Gate {
    /// Carries out a list of writes to tables; the status, and the index of the one that was refused.
    /// The work is bounded by the size of a call page, and by what the audit looks at.
    pub(super) fn table_ops(&mut self, cpu: u8) -> Result<(Status, usize), GateFailure> {
        if !self.audit.is_direct() {
            return Ok((Status::BadCall, 0));
        }
        let Some(site) = self.read_table_list(cpu)? else { return Ok((Status::BadArguments, 0)) };
        for index in 0..self.table_ops.len() {
            // The audit has been told of all that was written before.
            if index > 0 {
                self.drain(cpu, Some(Standing::Owed))?;
            }
            if self.is_behind() {
                return Ok((Status::BadState, index));
            }
            let op = self.table_ops[index];
            if let Err(status) = self.table_op(cpu, site, &op)? {
                return Ok((status, index));
            }
        }
        Ok((Status::Ok, 0))
    }

    /// Whether the audit does not know of all that was written: then nothing can be judged that depends
    /// on the tables. Only a guest that tampers with the counter of events gets there, or a run that is
    /// told to stop.
    pub(super) const fn is_behind(&self) -> bool {
        self.lost_sightings || self.waiting_sightings > 0
    }

    fn table_op(
        &mut self,
        cpu: u8,
        site: u32,
        op: &TableOp,
    ) -> Result<Result<(), Status>, GateFailure> {
        let last = self.memory.last_event_number()?;
        let admitted = self.with_audit(|audit, world| audit.admit(cpu, (site, op), last, world));
        if let Err(status) = admitted {
            self.counters.table_refusals += 1;
            self.host_record(cpu, HostAct::WriteRefused, frames_of(op))?;
            return Ok(Err(status));
        }
        self.counters.table_writes += op.entries();
        let (memory, by) = (&self.memory, (cpu, site));
        match *op {
            TableOp::Write { at, write: EntryWrite { level, count, old, new, .. } } => {
                let stores = EntryStores { at, level, count, old, new, grant: 0 };
                let mut stored = Ok(());
                self.sightings.stores(by, stores, || {
                    let places = (0..u64::from(count)).map(|index| (index, 8 * index));
                    stored = places
                        .map(|(index, offset)| (offset, new.nth_of_run(level, index)))
                        .try_for_each(|(offset, entry)| {
                            memory.store_entry(at.wrapping_add(offset), entry)
                        });
                })?;
                stored?;
            }
            TableOp::Fill(fill) => {
                for index in 0..ENTRIES {
                    let at = fill.table.wrapping_add(8 * index);
                    memory.store_entry(at, fill.entry(index))?;
                }
                self.sightings.note(cpu, site, Sighting::Fill(fill))?;
            }
        }
        Ok(Ok(()))
    }
}

/// What a refused write was about: the frames that it would have mapped, or the table.
fn frames_of(op: &TableOp) -> FrameRange {
    let mapped = match op {
        TableOp::Write { write, .. } => mapped_frames(write.new, write.level, write.count),
        TableOp::Fill(_) => None,
    };
    mapped.unwrap_or(FrameRange::single(op.table().frame()))
}
