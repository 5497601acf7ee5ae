//! The guest's side of a ring: room before a number, and while a number is held the ring says so.

use crate::platform::GateError;
use crate::ring::{Ring, make_room, observe, record, write_directly, write_entries};
use lacuna_abi::addr::{Gpa, Gva};
use lacuna_abi::direct::{CALL_OPS, TableOp};
use lacuna_abi::event::{
    EntryWrite, Event, Flush, INTENT_WORDS, Intent, RECORD_WORDS, RING_BUSY_WORD, RING_HEAD_WORD,
    RING_INTENT_WORD, RING_RECORDS, RING_TAIL_WORD, Record, TableFill,
};
use lacuna_abi::gate::Status;
use lacuna_abi::observe::{Case, Change, Means, Observation, Seen};
use lacuna_abi::paging::{Entry, Level};
use std::cell::{Cell, RefCell};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;
use std::vec::Vec;

const FLUSH: Event = Event::Flush(Flush::Everything);

/// A ring, and how it looked whenever a number was taken.
struct Watched {
    sequence: AtomicU64,
    control: Vec<AtomicU64>,
    records: Vec<[AtomicU64; RECORD_WORDS]>,
    busy_at_numbers: RefCell<Vec<bool>>,
    drains: Cell<u64>,
}

impl Watched {
    fn new() -> Self {
        Self {
            sequence: AtomicU64::new(0),
            control: (0..512).map(|_| AtomicU64::new(0)).collect(),
            records: (0..RING_RECORDS).map(|_| Default::default()).collect(),
            busy_at_numbers: RefCell::default(),
            drains: Cell::new(0),
        }
    }

    fn is_busy(&self) -> bool {
        self.control[RING_BUSY_WORD].load(SeqCst) != 0
    }

    fn intent(&self) -> Option<Intent> {
        let mut words = [0; INTENT_WORDS];
        for (word, place) in words.iter_mut().zip(&self.control[RING_INTENT_WORD..]) {
            *word = place.load(SeqCst);
        }
        Intent::from_words(&words).unwrap()
    }

    fn published(&self, index: usize) -> Record {
        let words = self.records[index].each_ref().map(|word| word.load(SeqCst));
        Record::from_words(&words).unwrap()
    }
}

impl Ring for Watched {
    fn cpu(&self) -> u8 {
        3
    }

    fn site(&self) -> u32 {
        9
    }

    /// Asked for only to take a number.
    fn sequence(&self) -> &AtomicU64 {
        self.busy_at_numbers.borrow_mut().push(self.is_busy());
        &self.sequence
    }

    fn control(&self, word: usize) -> &AtomicU64 {
        &self.control[word]
    }

    fn record(&self, record: usize, word: usize) -> &AtomicU64 {
        &self.records[record][word]
    }

    fn drain(&self) {
        assert!(!self.is_busy(), "the host is asked for room while a number may be held");
        self.drains.set(self.drains.get() + 1);
        self.control[RING_TAIL_WORD].store(self.control[RING_HEAD_WORD].load(SeqCst), SeqCst);
    }
}

fn write(old: Entry, new: Entry) -> EntryWrite {
    let (root, va) = (Gpa(0x1000), Gva(0x20_0000));
    EntryWrite { root, pcid: 0, va, level: Level::Pt, count: 3, old, new, grant: 0 }
}

#[test]
fn a_ring_says_while_its_cpu_may_hold_a_number() {
    let ring = Watched::new();
    record(&ring, FLUSH);
    assert!(!ring.is_busy());
    let (a, b) = (Entry(0x5000 | Entry::DATA), Entry(0x9000 | Entry::DATA));
    for (old, new, numbers) in
        [(Entry::EMPTY, a, 1), (a, b, 2), (b, Entry::EMPTY, 1), (Entry::EMPTY, Entry::EMPTY, 1)]
    {
        ring.busy_at_numbers.borrow_mut().clear();
        write_entries(&ring, &write(old, new), |_, _| assert!(ring.is_busy()));
        assert_eq!(*ring.busy_at_numbers.borrow(), std::vec![true; numbers], "{old:?} {new:?}");
        assert!(!ring.is_busy() && ring.intent().is_none());
    }
}

#[test]
fn a_write_is_announced_before_its_stores_and_recorded_with_its_numbers() {
    let (a, b) = (Entry(0x5000 | Entry::DATA), Entry(0x9000 | Entry::DATA));
    let ring = Watched::new();
    let mut stored = Vec::new();
    write_entries(&ring, &write(a, b), |index, entry| {
        let intent = ring.intent().unwrap();
        assert_eq!((intent.seq, intent.write.grant), (0, 1), "the revoke has no number yet");
        stored.push((index, entry));
    });
    let nth = |index| (index, b.nth_of_run(Level::Pt, index));
    assert_eq!(stored, [nth(0), nth(1), nth(2)]);
    let remap = EntryWrite { grant: 1, ..write(a, b) };
    assert_eq!(
        ring.published(0),
        Record { seq: 2, cpu: 3, site: 9, event: Event::EntryWrite(remap) }
    );
    write_entries(&ring, &write(Entry::EMPTY, a), |_, _| {
        assert_eq!(ring.intent().unwrap().seq, 3, "a grant takes its number before its stores");
    });
    assert_eq!(ring.published(1).seq, 3);
}

#[test]
fn a_full_ring_is_drained_before_a_number_is_taken() {
    let ring = Watched::new();
    for _ in 0..RING_RECORDS {
        record(&ring, FLUSH);
    }
    assert_eq!(ring.drains.get(), 0);
    record(&ring, FLUSH);
    assert_eq!((ring.drains.get(), ring.published(0).seq), (1, RING_RECORDS + 1));
}

#[test]
fn room_that_was_made_is_enough_and_none_is_made_in_vain() {
    let ring = Watched::new();
    make_room(&ring, 10);
    assert_eq!(ring.drains.get(), 0);
    for _ in 0..RING_RECORDS - 9 {
        record(&ring, FLUSH);
    }
    make_room(&ring, 9);
    assert_eq!(ring.drains.get(), 0, "there is just enough");
    make_room(&ring, 10);
    assert_eq!(ring.drains.get(), 1);
    (0..10).for_each(|_| record(&ring, FLUSH));
    assert_eq!(ring.drains.get(), 1, "none of the ten waits");
}

#[test]
fn what_is_observed_has_a_number_from_before_the_look() {
    let ring = Watched::new();
    let case = Case::new(Change::Remap, Means::Cr3, true, false);
    let seen = Observation { case, va: Gva(0x7000), seen: Seen::Reached(Gpa(0x1234)) };
    observe(&ring, || {
        assert!(ring.is_busy());
        assert_eq!(ring.sequence.load(SeqCst), 1);
        seen
    });
    assert!(!ring.is_busy());
    let event = Event::Observed(seen);
    assert_eq!(ring.published(0), Record { seq: 1, cpu: 3, site: 9, event });
}

#[test]
fn direct_writes_are_recorded_when_the_host_has_made_them_and_no_number_is_held_meanwhile() {
    let (a, table) = (Entry(0x5000 | Entry::DATA), Gpa(0x7000));
    let fill = TableFill { table, level: Level::Pt, first: a };
    let writes = [(Entry::EMPTY, a), (a, Entry::EMPTY)].map(|(old, new)| write(old, new));
    let op = |write| TableOp::Write { at: table, write };
    let ops = [TableOp::Fill(fill), op(writes[0]), op(writes[1])];
    for done in 0..=3_usize {
        let ring = Watched::new();
        let refusal = GateError { status: Status::Refused, index: done as u32 };
        let called = write_directly(&ring, &ops, |called| {
            assert_eq!(called, ops);
            assert!(ring.is_busy() && ring.busy_at_numbers.borrow().is_empty());
            let intent = ring.intent().unwrap();
            assert_eq!((intent.seq, intent.write), (0, writes[0]));
            if done < 3 { Err(refusal) } else { Ok(()) }
        });
        assert_eq!(called.err(), (done < 3).then_some(refusal));
        assert!(!ring.is_busy() && ring.intent().is_none());
        let events =
            [Event::TableFill(fill), Event::EntryWrite(writes[0]), Event::EntryWrite(writes[1])];
        for (index, event) in events.into_iter().enumerate().take(done) {
            let seq = index as u64 + 1;
            assert_eq!(ring.published(index), Record { seq, cpu: 3, site: 9, event });
        }
        assert_eq!(ring.busy_at_numbers.borrow().len(), done, "one number for each");
    }
}

#[test]
fn more_direct_writes_than_fit_in_a_call_take_several() {
    let ring = Watched::new();
    let write = write(Entry::EMPTY, Entry(0x5000 | Entry::DATA));
    let ops = std::vec![TableOp::Write { at: Gpa(0x7000), write }; 2 * CALL_OPS + 1];
    let calls = RefCell::new(Vec::new());
    let refuse_last = |ops: &[TableOp]| {
        calls.borrow_mut().push(ops.len());
        let refusal = GateError { status: Status::Refused, index: 0 };
        if ops.len() == 1 { Err(refusal) } else { Ok(()) }
    };
    let refused = write_directly(&ring, &ops, refuse_last).unwrap_err();
    assert_eq!(refused.index as usize, 2 * CALL_OPS);
    assert_eq!(*calls.borrow(), [CALL_OPS, CALL_OPS, 1]);
}
