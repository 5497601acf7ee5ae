//! Direct paging: writes to page tables that the guest asks for, judged and then made.

use super::{Gate, GateFailure};
use lacuna_abi::gate::Status;

impl Gate {
    /// No guest is told that it may ask.
    pub(super) fn table_ops(&mut self, cpu: u8) -> Result<(Status, usize), GateFailure> {
        self.read_table_list(cpu)?;
        Ok((Status::BadCall, self.table_ops.len() * usize::from(self.broken_off)))
    }
}
