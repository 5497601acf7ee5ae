//! The event ring of this CPU: numbers, intents, records.

use crate::shared::Ring;
use crate::{cpu, gate, memory, shared};
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use lacuna_abi::addr::Gpa;
use lacuna_abi::event::{
    EntryWrite, Event, Flush, INTENT_WORDS, Intent, RING_HEAD_WORD, RING_INTENT_WORD, RING_RECORDS,
    RING_TAIL_WORD, Record,
};
use lacuna_abi::gate::Call;
use lacuna_abi::layout::Region;
use lacuna_abi::paging::Level;

/// Word of the intent that holds its number.
const INTENT_SEQ_WORD: usize = RING_INTENT_WORD + 1;

/// Takes the next event number.
fn next_number() -> u64 {
    shared::sequence()[0].fetch_add(1, Relaxed) + 1
}

/// Records an event that takes its number now.
pub(crate) fn record(event: Event) {
    let cpu = cpu::number();
    push(shared::ring(cpu), &Record { seq: next_number(), cpu: cpu as u8, event });
}

/// Writes a run of entries and records it: the number of a revoke is taken after its effect, that
/// of a grant before.
pub(crate) fn write_entries(pool: &Region, at: Gpa, write: &EntryWrite) {
    let cpu = cpu::number();
    let ring = shared::ring(cpu);
    let mut write = *write;
    let revokes = write.old.is_present();
    let grant = if write.new.is_present() { next_number() } else { 0 };
    write.grant = if revokes { grant } else { 0 };
    let before = if revokes { 0 } else { grant };
    set_intent(ring, &Intent { write, seq: before });
    for index in 0..u64::from(write.count) {
        let entry = write.new.nth_of_run(write.level, index);
        memory::write_entry(pool.gpa, pool.len, at.wrapping_add(8 * index), entry);
    }
    let seq = if before == 0 { next_number() } else { before };
    ring.control[INTENT_SEQ_WORD].store(seq, Release);
    push(ring, &Record { seq, cpu: cpu as u8, event: Event::EntryWrite(write) });
    ring.control[RING_INTENT_WORD].store(0, Release);
}

/// Records a flush, then executes it.
pub(crate) fn flush(flush: Flush) {
    record(Event::Flush(flush));
    match flush {
        Flush::Pages { va, count, level } => {
            let stride = if level == Level::Pt { Level::Pt.span() } else { Level::Pd.span() };
            for index in 0..u64::from(count) {
                cpu::invalidate_page(va.wrapping_add(index * stride));
            }
        }
        Flush::NonGlobal => cpu::flush_non_global(),
        Flush::Everything => cpu::flush_everything(),
    }
}

/// The state word is published last, so that the host never sees half an intent.
fn set_intent(ring: &Ring, intent: &Intent) {
    let words = intent.to_words();
    for (index, word) in words.iter().enumerate().skip(1).take(INTENT_WORDS - 1) {
        ring.control[RING_INTENT_WORD + index].store(*word, Relaxed);
    }
    ring.control[RING_INTENT_WORD].store(words[0], Release);
}

/// Appends a record; a full ring waits for the host.
fn push(ring: &Ring, record: &Record) {
    let head = ring.control[RING_HEAD_WORD].load(Relaxed);
    while head.wrapping_sub(ring.control[RING_TAIL_WORD].load(Acquire)) >= RING_RECORDS {
        let _ = gate::call(Call::Drain);
    }
    let slot = &ring.records[(head % RING_RECORDS) as usize];
    for (place, word) in slot.iter().zip(record.to_words()) {
        place.store(word, Relaxed);
    }
    ring.control[RING_HEAD_WORD].store(head.wrapping_add(1), Release);
}
