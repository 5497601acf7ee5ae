//! Gate calls from this CPU.

use crate::cpu;
use crate::shared::{WordPage, call_page};
use core::fmt::{self, Write};
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;
use lacuna_abi::addr::FrameRange;
use lacuna_abi::counter::Counters;
use lacuna_abi::direct::{TableOp, TableWriter};
use lacuna_abi::gate::{
    ARGS_WORD, COUNT_WORD, Call, CpuRegistration, LOG_BYTES, OpKind, OpWriter, STATUS_WORD, Status,
};
use lacuna_guest::platform::GateError;

/// Gate calls made, and those that the host refused.
static CALLS: AtomicU64 = AtomicU64::new(0);
static REFUSED: AtomicU64 = AtomicU64::new(0);

/// Makes `call` with the arguments that lie in the call page. Interrupts are off until the answer
/// is read: a handler whose ring is full makes a call too, and would overwrite it.
///
/// # Errors
/// What the host answered, if it was not [`Status::Ok`].
pub(crate) fn call(call: Call) -> Result<(), GateError> {
    CALLS.fetch_add(1, Relaxed);
    let were_on = cpu::interrupts_off();
    cpu::gate_call(call);
    let word = call_page(cpu::number())[STATUS_WORD].load(Relaxed);
    if were_on {
        cpu::interrupts_on();
    }
    let [status, index] = [word as u32, (word >> 32) as u32];
    match Status::from_number(status) {
        Some(Status::Ok) => Ok(()),
        Some(status) => {
            REFUSED.fetch_add(1, Relaxed);
            Err(GateError { status, index })
        }
        None => panic!("the host answered a gate call with {word:#x}"),
    }
}

/// Makes the operations, in as few calls as the call page allows.
///
/// # Errors
/// The first operation that the host refused.
pub(crate) fn operations(ops: &[(OpKind, FrameRange)]) -> Result<(), GateError> {
    let page = call_page(cpu::number());
    let mut done = 0;
    while done < ops.len() {
        let mut writer = OpWriter::new(|word, value| page[word].store(value, Relaxed));
        let first = done;
        while done < ops.len() && writer.push(ops[done].0, ops[done].1).is_ok() {
            done += 1;
        }
        call(Call::Ops)
            .map_err(|error| GateError { index: error.index + first as u32, ..error })?;
    }
    Ok(())
}

/// Has the host carry out operations on page tables, no more than fit in a call, for the code at
/// `site`. Interrupts are off.
///
/// # Errors
/// The first operation that the host refused.
pub(crate) fn tables(site: u32, ops: &[TableOp]) -> Result<(), GateError> {
    let page = call_page(cpu::number());
    let mut writer = TableWriter::new(|word, value| page[word].store(value, Relaxed), site);
    for op in ops {
        assert!(writer.push(op).is_ok(), "{} operations do not fit in a call", ops.len());
    }
    call(Call::Tables)
}

/// Tells the host that the allocator is ready.
pub(crate) fn ready(registration: &CpuRegistration) {
    put(call_page(cpu::number()), ARGS_WORD, &registration.to_words());
    let _ = call(Call::Ready);
}

/// Ends the program.
pub(crate) fn exit(status: u64, counters: &Counters) {
    let page = call_page(cpu::number());
    page[ARGS_WORD].store(status, Relaxed);
    put(page, ARGS_WORD + 1, &counters.to_words());
    cpu::gate_call(Call::Exit);
}

/// Adds this module's counters.
pub(crate) fn add_counters(counters: &mut Counters) {
    counters.gate_calls = CALLS.load(Relaxed);
    counters.gate_refused = REFUSED.load(Relaxed);
}

/// Writes a line to the guest log.
pub(crate) fn log(text: fmt::Arguments<'_>) {
    let page = call_page(cpu::number());
    let mut out = PageText::new(page, LOG_BYTES);
    // What does not fit in a page is cut off; the writer never fails.
    let _ = out.write_fmt(text);
    out.finish();
    let _ = call(Call::Log);
}

fn put(page: &WordPage, from: usize, words: &[u64]) {
    for (place, word) in page[from..].iter().zip(words) {
        place.store(*word, Relaxed);
    }
}

/// Text written into a call or report page, eight bytes a word, cut off at its end.
pub(crate) struct PageText<'a> {
    page: &'a WordPage,
    limit: usize,
    len: usize,
    word: u64,
}

impl<'a> PageText<'a> {
    /// Starts at the arguments of `page`, for at most `limit` bytes.
    pub(crate) fn new(page: &'a WordPage, limit: usize) -> Self {
        Self { page, limit, len: 0, word: 0 }
    }

    /// Stores what is left and the length.
    pub(crate) fn finish(self) {
        if !self.len.is_multiple_of(8) {
            self.page[ARGS_WORD + self.len / 8].store(self.word, Relaxed);
        }
        self.page[COUNT_WORD].store(self.len as u64, Relaxed);
    }
}

impl Write for PageText<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if self.len == self.limit {
                break;
            }
            self.word |= u64::from(byte) << (8 * (self.len % 8));
            self.len += 1;
            if self.len.is_multiple_of(8) {
                self.page[ARGS_WORD + self.len / 8 - 1].store(self.word, Relaxed);
                self.word = 0;
            }
        }
        Ok(())
    }
}
