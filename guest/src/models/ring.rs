//! The event ring: a CPU writes records and intents while the host takes them. The reader here
//! loads and stores in the order of the host's own, which is in another crate and reads guest
//! memory by address: head, records, then the tail; acquire loads, release stores.

use super::check;
use crate::ring::{Ring, record, write_entries};
use crate::sync::AtomicU64;
use crate::sync::checked::{Op, Slip, plant};
use core::sync::atomic::Ordering::{Acquire, Release};
use lacuna_abi::addr::{Gfn, Gpa, Gva};
use lacuna_abi::event::{
    EntryWrite, Event, Flush, INTENT_WORDS, Intent, RECORD_WORDS, RING_HEAD_WORD, RING_INTENT_WORD,
    RING_TAIL_WORD, Record,
};
use lacuna_abi::paging::{Entry, Level};
use loom::sync::Arc;
use loom::thread;
use std::vec::Vec;

/// Records that the memory of a ring holds here.
const MEMORY: usize = 2;

/// A ring whose writer believes that it holds `N` records.
struct Small<const N: u64> {
    sequence: AtomicU64,
    control: Vec<AtomicU64>,
    records: Vec<AtomicU64>,
}

impl<const N: u64> Small<N> {
    fn new() -> Arc<Self> {
        let words = |count| (0..count).map(|_| AtomicU64::new(0)).collect();
        Arc::new(Self {
            sequence: AtomicU64::new(0),
            control: words(RING_INTENT_WORD + INTENT_WORDS),
            records: words(MEMORY * RECORD_WORDS),
        })
    }

    /// Takes what was published since `tail`.
    fn take(&self, tail: &mut u64) -> Vec<Record> {
        let head = self.control[RING_HEAD_WORD].load(Acquire);
        let mut records = Vec::new();
        while *tail != head {
            let slot = (*tail % MEMORY as u64) as usize;
            let words = core::array::from_fn(|word| self.record(slot, word).load(Acquire));
            records.push(Record::from_words(&words).expect("a whole record"));
            *tail += 1;
        }
        self.control[RING_TAIL_WORD].store(*tail, Release);
        records
    }

    fn intent(&self) -> Option<Intent> {
        let words =
            core::array::from_fn(|word| self.control[RING_INTENT_WORD + word].load(Acquire));
        Intent::from_words(&words).expect("a whole intent")
    }
}

impl<const N: u64> Ring for Small<N> {
    const RECORDS: u64 = N;

    fn cpu(&self) -> u8 {
        0
    }

    fn site(&self) -> u32 {
        0
    }

    fn sequence(&self) -> &AtomicU64 {
        &self.sequence
    }

    fn control(&self, word: usize) -> &AtomicU64 {
        &self.control[word]
    }

    fn record(&self, record: usize, word: usize) -> &AtomicU64 {
        &self.records[record % MEMORY * RECORD_WORDS + word]
    }

    fn drain(&self) {
        thread::yield_now();
    }
}

fn event(number: u64) -> Event {
    Event::Flush(Flush::Pages { va: Gva(number << 12), count: 1, level: Level::Pt })
}

/// A CPU records three events in a ring that has room for two; the host has them in order.
fn writer_against_reader<const N: u64>() {
    check(Some(3), || {
        let ring = Small::<N>::new();
        let writer = thread::spawn({
            let ring = ring.clone();
            move || (1..=3).for_each(|number| record(&*ring, event(number)))
        });
        let (mut tail, mut got) = (0, Vec::new());
        while got.len() < 3 {
            let some = ring.take(&mut tail);
            if some.is_empty() {
                thread::yield_now();
            }
            got.extend(some);
        }
        writer.join().unwrap();
        let wanted = [1, 2, 3].map(|seq| Record { seq, cpu: 0, site: 0, event: event(seq) });
        assert_eq!(got, wanted, "records");
    });
}

#[test]
fn records_come_out_whole_and_in_order_across_the_wrap() {
    writer_against_reader::<2>();
}

#[test]
#[should_panic(expected = "records")]
fn twin_a_head_that_is_published_relaxed_shows_records_too_early() {
    let _planted = plant(Slip::Relaxed(Op::Store, 64, Release));
    writer_against_reader::<2>();
}

#[test]
#[should_panic(expected = "a whole record: Torn")]
fn twin_a_writer_that_does_not_wait_for_room_overwrites_records() {
    writer_against_reader::<4>();
}

fn write(page: u64) -> EntryWrite {
    EntryWrite {
        root: Gpa(0x1000),
        pcid: 0,
        va: Gva(page << 12),
        level: Level::Pt,
        count: 2,
        old: Entry::EMPTY,
        new: Entry::new(Gfn(7), Entry::DATA),
        grant: 0,
    }
}

/// A CPU writes entries `WRITES` times while the host looks for an intent: it finds all of one, or
/// none.
fn intent_against_reader<const WRITES: u64>() {
    check(Some(2), || {
        let ring = Small::<2>::new();
        let writer = thread::spawn({
            let ring = ring.clone();
            move || (1..=WRITES).for_each(|page| write_entries(&*ring, &write(page), |_, _| {}))
        });
        if let Some(intent) = ring.intent() {
            assert_eq!(intent, Intent { write: write(intent.seq), seq: intent.seq }, "a mix");
        }
        writer.join().unwrap();
        assert_eq!(ring.intent(), None, "the record says it all");
        assert_eq!(ring.take(&mut 0).len() as u64, WRITES);
    });
}

#[test]
fn an_intent_is_seen_whole_or_not_at_all() {
    intent_against_reader::<1>();
}

#[test]
#[should_panic(expected = "a whole intent: Torn")]
fn twin_an_intent_that_is_published_relaxed_is_seen_half() {
    let _planted = plant(Slip::Relaxed(Op::Store, 64, Release));
    intent_against_reader::<1>();
}

/// Why the host believes intents only of CPUs that do not run: between the first word and the last
/// the next intent may have come.
#[test]
#[should_panic(expected = "a mix")]
fn the_intents_of_a_running_cpu_mix() {
    intent_against_reader::<2>();
}
