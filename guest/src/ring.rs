//! The guest's side of an event ring: numbers, intents, records.
//!
//! One CPU writes a ring, with interrupts off, so that a record is never interrupted by another.
//! Room is made before a number is taken: a CPU that waits for the host never owes it a number.
//! While it may owe one, its ring says so: the host lets it run on before it judges.

use crate::platform::GateError;
use crate::sync::AtomicU64;
use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use lacuna_abi::direct::{CALL_OPS, TableOp};
use lacuna_abi::event::{
    EntryWrite, Event, INTENT_WORDS, Intent, RECORD_WORDS, RING_BUSY_WORD, RING_HEAD_WORD,
    RING_INTENT_WORD, RING_RECORDS, RING_TAIL_WORD, Record,
};
use lacuna_abi::observe::Observation;
use lacuna_abi::paging::Entry;

/// Word of the intent that holds its number.
const INTENT_SEQ_WORD: usize = RING_INTENT_WORD + 1;

/// The words of one CPU's ring, which the host reads at any time.
pub trait Ring {
    /// Records that it holds; a power of two.
    const RECORDS: u64 = RING_RECORDS;

    /// Number of the CPU that writes it.
    fn cpu(&self) -> u8;

    /// The code that records, for reports ([`Record::site`]).
    fn site(&self) -> u32;

    /// The last event number that was taken, on any CPU.
    fn sequence(&self) -> &AtomicU64;

    /// A word of the control page.
    fn control(&self, word: usize) -> &AtomicU64;

    /// A word of a record, both below their limits.
    fn record(&self, record: usize, word: usize) -> &AtomicU64;

    /// Stores the words of a record, in any order: what is published later is that they are there.
    #[inline]
    fn put(&self, record: usize, words: &[u64; RECORD_WORDS]) {
        for (index, word) in words.iter().enumerate() {
            self.record(record, index).store(*word, Relaxed);
        }
    }

    /// Waits for the host to take what the ring holds.
    fn drain(&self);
}

/// Records an event that takes its number now. Interrupts are off.
pub fn record(ring: &impl Ring, event: Event) {
    reserve(ring);
    set_busy(ring, true);
    push(ring, &Record { seq: next_number(ring), cpu: ring.cpu(), site: ring.site(), event });
    set_busy(ring, false);
}

/// Has `store` write a run of entries, the first with index 0, and records it: the number of a
/// revoke is taken after its effect, that of a grant before. Interrupts are off.
pub fn write_entries(ring: &impl Ring, write: &EntryWrite, mut store: impl FnMut(u64, Entry)) {
    reserve(ring);
    set_busy(ring, true);
    let mut write = *write;
    let revokes = write.old.is_present();
    let grant = if write.new.is_present() { next_number(ring) } else { 0 };
    write.grant = if revokes { grant } else { 0 };
    let before = if revokes { 0 } else { grant };
    set_intent(ring, &Intent { write, seq: before });
    for index in 0..u64::from(write.count) {
        store(index, write.new.nth_of_run(write.level, index));
    }
    let seq = if before == 0 { next_number(ring) } else { before };
    ring.control(INTENT_SEQ_WORD).store(seq, Release);
    let event = Event::EntryWrite(write);
    push(ring, &Record { seq, cpu: ring.cpu(), site: ring.site(), event });
    ring.control(RING_INTENT_WORD).store(0, Release);
    set_busy(ring, false);
}

/// Has `call` carry out operations on tables by gate calls, with as many of them at once as fit in a call,
/// and records what was done. Numbers are taken when a call has returned: a CPU that waits for the
/// gate must not hold one. From before the call until its records are there the ring says that they are
/// owed, and its intent announces the next write that is to be recorded. Interrupts are off.
///
/// # Errors
/// [`GateError`] names the first operation that the host refused; those before it are done.
pub fn write_directly(
    ring: &impl Ring,
    ops: &[TableOp],
    call: impl Fn(&[TableOp]) -> Result<(), GateError>,
) -> Result<(), GateError> {
    let mut first = 0;
    for ops in ops.chunks(CALL_OPS) {
        make_room(ring, ops.len() as u64);
        set_busy(ring, true);
        announce_next(ring, ops);
        let called = call(ops);
        let done =
            called.map_or_else(|error| (error.index as usize).min(ops.len()), |()| ops.len());
        for (index, op) in ops.iter().enumerate().take(done) {
            announce_next(ring, &ops[index..]);
            let event = match *op {
                TableOp::Write { write, .. } => Event::EntryWrite(write),
                TableOp::Fill(fill) => Event::TableFill(fill),
            };
            let seq = next_number(ring);
            push(ring, &Record { seq, cpu: ring.cpu(), site: ring.site(), event });
        }
        ring.control(RING_INTENT_WORD).store(0, Release);
        set_busy(ring, false);
        called.map_err(|error| GateError { index: error.index + first, ..error })?;
        // Below the number of operations.
        first += ops.len() as u32;
    }
    Ok(())
}

/// Publishes the first write among these operations as the intent; it has no number yet.
fn announce_next(ring: &impl Ring, ops: &[TableOp]) {
    let write = ops.iter().find_map(|op| match op {
        TableOp::Write { write, .. } => Some(*write),
        TableOp::Fill(_) => None,
    });
    if let Some(write) = write {
        set_intent(ring, &Intent { write, seq: 0 });
    }
}

/// Waits for the host until there is room for so many records, at most as many as the ring holds: until
/// they are made none of them waits.
pub fn make_room<R: Ring>(ring: &R, records: u64) {
    let head = ring.control(RING_HEAD_WORD).load(Relaxed);
    let limit = R::RECORDS.saturating_sub(records);
    while head.wrapping_sub(ring.control(RING_TAIL_WORD).load(Acquire)) > limit {
        ring.drain();
    }
}

/// Records what `look` sees, with a number that is taken before it looks. Interrupts are off.
pub fn observe(ring: &impl Ring, look: impl FnOnce() -> Observation) {
    reserve(ring);
    set_busy(ring, true);
    let seq = next_number(ring);
    let event = Event::Observed(look());
    push(ring, &Record { seq, cpu: ring.cpu(), site: ring.site(), event });
    set_busy(ring, false);
}

/// Says whether this CPU may owe the host a number.
fn set_busy(ring: &impl Ring, busy: bool) {
    ring.control(RING_BUSY_WORD).store(busy.into(), Release);
}

/// Takes the next event number; whoever sees it taken sees what was said before.
fn next_number(ring: &impl Ring) -> u64 {
    ring.sequence().fetch_add(1, AcqRel) + 1
}

/// The state word is published last, so that the host never sees half an intent.
fn set_intent(ring: &impl Ring, intent: &Intent) {
    let words = intent.to_words();
    for (index, word) in words.iter().enumerate().skip(1).take(INTENT_WORDS - 1) {
        ring.control(RING_INTENT_WORD + index).store(*word, Relaxed);
    }
    ring.control(RING_INTENT_WORD).store(words[0], Release);
}

/// Waits until the ring has room for a record.
fn reserve<R: Ring>(ring: &R) {
    let head = ring.control(RING_HEAD_WORD).load(Relaxed);
    while head.wrapping_sub(ring.control(RING_TAIL_WORD).load(Acquire)) >= R::RECORDS {
        ring.drain();
    }
}

/// Appends a record, for which there is room.
fn push<R: Ring>(ring: &R, record: &Record) {
    let head = ring.control(RING_HEAD_WORD).load(Relaxed);
    let slot = (head % R::RECORDS) as usize;
    ring.put(slot, &record.to_words());
    ring.control(RING_HEAD_WORD).store(head.wrapping_add(1), Release);
}
