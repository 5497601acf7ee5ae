//! Call and report pages as the gate reads them.

use super::{Gate, GateFailure};
use crate::printable::steers;
use lacuna_abi::direct::read_table_ops;
use lacuna_abi::gate::{ARGS_WORD, COUNT_WORD, Call, LOG_BYTES, PAGE_WORDS, read_ops};
use lacuna_abi::layout::call_page_offset;
use std::sync::atomic::Ordering::Acquire;

impl Gate {
    /// The words of the call page that this call may use, once and by value; zero behind them.
    pub(super) fn call_page(&self, cpu: u8, call: Call) -> Result<[u64; PAGE_WORDS], GateFailure> {
        let page = call_page_offset(cpu.into());
        let words = match call {
            // A list is read by itself.
            Call::Ops
            | Call::Tables
            | Call::Drain
            | Call::Yield
            | Call::Checkpoint
            | Call::InputDone
            | Call::StartCpus => 0,
            _ => PAGE_WORDS,
        };
        Ok(self.memory.shared_page(page, words)?)
    }

    /// Reads the list of operations in the call page, once and by value: in place of what `self.ops`
    /// held. Whether it makes sense. Only as much of the page is copied as the list takes: most are
    /// short, and copying all of the page takes longer than what they ask for.
    pub(super) fn read_list(&mut self, cpu: u8) -> Result<bool, GateFailure> {
        self.ops.clear();
        Ok(self.copy_list(cpu)? && read_ops(&self.list, |op| self.ops.push(op)).is_ok())
    }
}

impl Gate {
    /// Reads the list of writes to tables in the call page, likewise: in place of what
    /// `self.table_ops` held. The site of the code that asks; `None` if the list makes no sense.
    pub(super) fn read_table_list(&mut self, cpu: u8) -> Result<Option<u32>, GateFailure> {
        self.table_ops.clear();
        if !self.copy_list(cpu)? {
            return Ok(None);
        }
        Ok(read_table_ops(&self.list, |op| self.table_ops.push(op)).ok())
    }

    /// Copies as much of the call page as its count says; false if the page has no such count.
    fn copy_list(&mut self, cpu: u8) -> Result<bool, GateFailure> {
        let page = self.memory.layout().shared.gpa.wrapping_add(call_page_offset(cpu.into()));
        let count = self.memory.load(page.wrapping_add(8 * COUNT_WORD as u64))?;
        let Some(end) = usize::try_from(count).ok().filter(|end| *end <= PAGE_WORDS) else {
            return Ok(false);
        };
        let words = self.memory.words(page, end.max(ARGS_WORD))?;
        self.list.clear();
        self.list.extend(words.iter().map(|word| word.load(Acquire)));
        // The guest may have changed it since.
        self.list[COUNT_WORD] = count;
        Ok(true)
    }
}

/// `N` words of a page, from `start`.
pub(super) fn arguments<const N: usize>(page: &[u64; PAGE_WORDS], start: usize) -> [u64; N] {
    let mut words = [0; N];
    for (word, source) in words.iter_mut().zip(page.iter().skip(start)) {
        *word = *source;
    }
    words
}

/// The text in a page; `None` if its length makes no sense. Control characters are replaced, so
/// that a guest cannot steer a terminal.
pub(super) fn text(page: &[u64; PAGE_WORDS]) -> Option<String> {
    let len = usize::try_from(page[COUNT_WORD]).ok().filter(|len| *len <= LOG_BYTES)?;
    let bytes: Vec<u8> =
        page[ARGS_WORD..].iter().flat_map(|word| word.to_le_bytes()).take(len).collect();
    let clean = |c: char| if c != '\n' && steers(c) { '\u{fffd}' } else { c };
    Some(String::from_utf8_lossy(&bytes).chars().map(clean).collect())
}
