//! Call and report pages as the gate reads them.

use super::{Gate, GateFailure};
use crate::printable::steers;
use lacuna_abi::gate::{ARGS_WORD, COUNT_WORD, Call, LOG_BYTES, PAGE_WORDS};
use lacuna_abi::layout::call_page_offset;

impl Gate {
    /// The words of the call page that this call may use, once and by value; zero behind them.
    pub(super) fn call_page(&self, cpu: u8, call: Call) -> Result<[u64; PAGE_WORDS], GateFailure> {
        let page = call_page_offset(cpu.into());
        let words = match call {
            // A list says where it ends: copying all of the page would take longer than what most
            // lists ask for.
            Call::Ops => {
                let shared = self.memory.layout().shared.gpa;
                let end = self.memory.load(shared.wrapping_add(page + 8 * COUNT_WORD as u64))?;
                usize::try_from(end).unwrap_or(PAGE_WORDS)
            }
            Call::Drain | Call::Yield | Call::Checkpoint | Call::InputDone | Call::StartCpus => 0,
            _ => PAGE_WORDS,
        };
        Ok(self.memory.shared_page(page, words)?)
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
