//! Direct paging at the gate: lists of writes are judged one by one, carried out in pool and copy, and
//! compared with what the guest reports. Whatever a guest asks for, the answer is a status.

use super::*;
use lacuna_abi::direct::{CALL_OPS, TableOp, TableWriter};
use lacuna_abi::event::{RING_INTENT_WORD, TableFill};
use lacuna_abi::gate::PAGE_WORDS;
use lacuna_abi::layout::{direct_map, window};
use lacuna_abi::paging::Entry;
use proptest::prelude::*;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

fn guest() -> Guest {
    Guest::seen_by(Mediation::Tables, true, 1)
}

impl Guest {
    /// Asks for these writes, and does not report them.
    fn ask(&mut self, ops: &[TableOp]) -> (Status, u64) {
        let mut words = Vec::new();
        let mut writer = TableWriter::new(|word, value| words.push((word, value)), 7);
        ops.iter().for_each(|op| writer.push(op).unwrap());
        words.into_iter().for_each(|(word, value)| self.put(word, value));
        let status = self.call(Call::Tables).1;
        (status, self.memory.load(self.page(STATUS_WORD)).unwrap() >> 32)
    }

    /// The same, as an honest guest does.
    fn ask_and_report(&mut self, ops: &[TableOp]) -> (Status, u64) {
        let (status, index) = self.ask(ops);
        let done = if status == Status::Ok { ops.len() } else { index as usize };
        for op in &ops[..done] {
            self.record(match op {
                TableOp::Write { write, .. } => Event::EntryWrite(*write),
                TableOp::Fill(fill) => Event::TableFill(*fill),
            });
        }
        (status, index)
    }

    fn write_of(&self, va: lacuna_abi::addr::Gva, level: Level, new: Entry) -> TableOp {
        let root = self.root;
        let at = locate(&*self.memory, root, va, level).unwrap();
        let old = Entry(self.memory.load(at).unwrap());
        let write = EntryWrite { root, pcid: 0, va, level, count: 1, old, new, grant: 0 };
        TableOp::Write { at, write }
    }

    /// A page of the pool that the first tables do not take.
    fn spare(&self, number: u64) -> Gpa {
        let pool = self.memory.layout().pool;
        pool.gpa.wrapping_add(pool.len - (1 + number) * PAGE_SIZE)
    }

    fn copy_is_the_pool(&self) -> bool {
        let Layout { pool, table_copy, .. } = *self.memory.layout();
        let words = usize::try_from(pool.len / 8).unwrap();
        let [pool, copy] =
            [pool, table_copy].map(|region| self.memory.words(region.gpa, words).unwrap());
        let load = |word: &AtomicU64| word.load(Relaxed);
        pool.iter().zip(copy).all(|(word, copy)| load(word) == load(copy))
    }

    /// The split of the zone's first pageblock by a new table.
    fn split(&self) -> [TableOp; 2] {
        let (zone, table) = (self.memory.layout().zone, self.spare(0));
        let flags = Entry::DATA | Entry::GLOBAL;
        let first = Entry::new(zone.gpa.frame(), flags);
        let fill = TableFill { table, level: Level::Pt, first };
        let link = self.write_of(zone.va, Level::Pd, Entry::new(table.frame(), Entry::TABLE));
        [TableOp::Fill(fill), link]
    }
}

#[test]
fn a_list_is_carried_out_in_the_pool_and_in_the_copy_and_each_is_judged_after_those_before() {
    let mut guest = guest();
    let [fill, link] = guest.split();
    // The first entry of the new table: there is no such place before the link is made.
    let zone = guest.memory.layout().zone;
    let table = guest.spare(0);
    let old = Entry::new(zone.gpa.frame(), Entry::DATA | Entry::GLOBAL);
    let clear = EntryWrite {
        root: guest.root,
        pcid: 0,
        va: zone.va,
        level: Level::Pt,
        count: 1,
        old,
        new: Entry::EMPTY,
        grant: 0,
    };
    let clear = TableOp::Write { at: table, write: clear };
    assert_eq!(guest.ask_and_report(&[fill, link, clear]), (Status::Ok, 0));
    let held = |at: Gpa| guest.memory.load(at).unwrap();
    let TableOp::Write { at: directory, write } = link else { panic!() };
    assert_eq!((held(directory), held(table)), (write.new.0, 0));
    assert_eq!(held(table.wrapping_add(16)), old.nth_of_run(Level::Pt, 2).0);
    assert!(guest.copy_is_the_pool());
    assert_eq!(guest.gate.counters().table_writes, 514);
    guest.call(Call::Checkpoint);
    let result = guest.gate.result();
    assert_eq!((result.findings, result.inconclusive), (vec![], vec![]));
}

#[test]
fn the_first_that_is_refused_ends_the_list_and_nothing_of_it_is_written() {
    let mut guest = guest();
    let zone = guest.memory.layout().zone;
    let page = Entry::new(zone.gpa.frame(), Entry::DATA);
    let good = guest.write_of(window(0), Level::Pt, page);
    let global = Entry(page.0 | Entry::GLOBAL);
    let bad = guest.write_of(window(0).wrapping_add(PAGE_SIZE), Level::Pt, global);
    let never = guest.write_of(window(0).wrapping_add(2 * PAGE_SIZE), Level::Pt, page);
    assert_eq!(guest.ask_and_report(&[good, bad, never]), (Status::Refused, 1));
    for (op, written) in [(good, true), (bad, false), (never, false)] {
        let TableOp::Write { at, .. } = op else { panic!() };
        assert_eq!(guest.memory.load(at).unwrap() != 0, written);
    }
    assert!(guest.copy_is_the_pool());
    assert_eq!(guest.violations(Rule::GlobalWindow), 1);
    assert_eq!(guest.gate.counters().table_refusals, 1);
    guest.call(Call::Checkpoint);
    assert_eq!(guest.gate.result().findings.len(), 1, "the rest was honest");
    assert_eq!(guest.gate.events_lost(), 0);
}

#[test]
fn what_is_written_and_not_reported_is_a_lie_and_so_is_what_is_reported_and_not_written() {
    let frame = |guest: &Guest| guest.memory.layout().zone.gpa.frame();
    let mut hides = guest();
    let op = hides.write_of(window(0), Level::Pt, Entry::new(frame(&hides), Entry::DATA));
    assert_eq!(hides.ask(&[op]).0, Status::Ok);
    hides.call(Call::Checkpoint);
    assert_eq!(hides.violations(Rule::TraceHonesty), 1);
    let mut invents = guest();
    let TableOp::Write { write, .. } = op else { panic!() };
    invents.record(Event::EntryWrite(write));
    invents.call(Call::Checkpoint);
    assert_eq!(invents.violations(Rule::TraceHonesty), 1);
    let mut honest = guest();
    assert_eq!(honest.ask_and_report(&[op]).0, Status::Ok);
    honest.call(Call::Checkpoint);
    assert_eq!(honest.violations(Rule::TraceHonesty), 0);
}

#[test]
fn a_batch_of_which_the_intent_announces_the_next_report_is_not_hidden() {
    let mut guest = Guest::seen_by(Mediation::Tables, true, 2);
    assert_eq!(guest.call(Call::StartCpus).1, Status::Ok);
    let frame = guest.memory.layout().zone.gpa.frame();
    let place = |page: u64| window(0).wrapping_add(page * PAGE_SIZE);
    let ops =
        [0, 1].map(|page| guest.write_of(place(page), Level::Pt, Entry::new(frame, Entry::DATA)));
    assert_eq!(guest.ask(&ops).0, Status::Ok);
    let writes = ops.map(|op| match op {
        TableOp::Write { write, .. } => write,
        TableOp::Fill(_) => panic!(),
    });
    // CPU 1 has everything checked while CPU 0 is about to report the first, then the second.
    let intent = |guest: &Guest, write: Option<EntryWrite>| {
        let ring = guest.memory.layout().shared.gpa.wrapping_add(ring_offset(0));
        let at = ring.wrapping_add(8 * RING_INTENT_WORD as u64);
        let words = write.map_or([0; 8], |write| Intent { write, seq: 0 }.to_words());
        guest.memory.store_words(at, &words).unwrap();
    };
    for write in writes {
        intent(&guest, Some(write));
        guest.gate.serve(Call::Checkpoint, 1, &mut guest.still).unwrap();
        assert_eq!(guest.violations(Rule::TraceHonesty), 0);
        guest.record(Event::EntryWrite(write));
    }
    intent(&guest, None);
    guest.call(Call::Checkpoint);
    assert_eq!(guest.violations(Rule::TraceHonesty), 0);
}

#[test]
fn nothing_is_written_or_opened_when_the_audit_cannot_follow() {
    let frame = |guest: &Guest| guest.memory.layout().zone.gpa.frame();
    // The counter is moved back: numbers come twice.
    let mut guest = guest();
    let entry = Entry::new(frame(&guest), Entry::DATA);
    let [first, second] = [0, 1].map(|page: u64| {
        guest.write_of(window(0).wrapping_add(page * PAGE_SIZE), Level::Pt, entry)
    });
    assert_eq!(guest.ask(&[first]).0, Status::Ok);
    guest.call(Call::Drain);
    let counter = guest.memory.layout().shared.gpa.wrapping_add(SEQUENCE_OFFSET);
    guest.memory.store(counter, 0).unwrap();
    assert_eq!(guest.ask(&[second, first]), (Status::BadState, 1));
    let page = guest.frames(5, 1);
    assert_eq!(guest.ops(&[(OpKind::Seal, page)]), Status::Ok);
    assert_eq!(guest.ops(&[(OpKind::Open, page)]), Status::BadState);
    // Or an intent claims a number that was taken and never comes: it is not waited for.
    let mut guest = Guest::seen_by(Mediation::Tables, true, 1);
    let owed = guest.memory.next_event_number().unwrap();
    let TableOp::Write { write, .. } = first else { panic!() };
    let ring = guest.memory.layout().shared.gpa.wrapping_add(ring_offset(0));
    let at = ring.wrapping_add(8 * RING_INTENT_WORD as u64);
    guest.memory.store_words(at, &Intent { write, seq: owed }.to_words()).unwrap();
    assert_eq!(guest.ask(&[first, second]).0, Status::Ok);
    let clear = guest.write_of(window(0), Level::Pt, Entry::EMPTY);
    assert_eq!(guest.ask(&[clear]).0, Status::Ok, "what was written is known");
    assert_eq!(guest.gate.events_lost(), 1);
}

#[test]
fn registers_are_looked_at_at_every_call() {
    let mut guest = guest();
    guest.call(Call::Drain);
    assert_eq!(guest.violations(Rule::ControlState), 0);
    guest.still.registers.cr0 &= !(1 << 16);
    guest.call(Call::Drain);
    // Put back before the next complete check.
    guest.still.registers.cr0 |= 1 << 16;
    guest.call(Call::Drain);
    guest.call(Call::Checkpoint);
    assert_eq!(guest.violations(Rule::ControlState), 1);
}

#[test]
fn a_guest_that_writes_its_own_tables_asks_in_vain() {
    let mut guest = Guest::new(true);
    let split = guest.split();
    assert_eq!(guest.ask(&split), (Status::BadCall, 0));
}

#[test]
fn a_full_call_page_of_writes_is_one_call() {
    let mut guest = guest();
    let frame = guest.memory.layout().zone.gpa.frame();
    let ops: Vec<_> = (0..CALL_OPS as u64)
        .map(|page| {
            let entry = Entry::new(frame.wrapping_add(page), Entry::DATA);
            guest.write_of(window(0).wrapping_add(page * PAGE_SIZE), Level::Pt, entry)
        })
        .collect();
    assert_eq!(guest.ask_and_report(&ops), (Status::Ok, 0));
    guest.call(Call::Checkpoint);
    assert_eq!(guest.gate.result().findings, []);
}

/// A word of a hostile list: often one that makes sense.
fn word(guest: &Guest, choice: u8, random: u64) -> u64 {
    let layout = *guest.memory.layout();
    let page = random % 24 * PAGE_SIZE;
    match choice % 16 {
        0 => 1 | (1 + random % 4) << 8 | (1 + random / 8 % 3) << 32,
        1 => 2 | (1 + random % 2) << 8,
        2 | 3 => layout.pool.gpa.0 + page + random / 32 % 512 * 8,
        4 => layout.pool.gpa.0 + page,
        5 => guest.root.0,
        6 => window(0).0 + random % 512 * PAGE_SIZE,
        7 => direct_map(layout.zone.gpa).0 + ((random % 8) << 21),
        8 => (layout.pool.gpa.0 + page) | Entry::TABLE,
        9 => (layout.zone.gpa.0 + page) | Entry::DATA,
        10 => layout.zone.gpa.0 | Entry::DATA | Entry::PAGE_SIZE | Entry::GLOBAL,
        11 => layout.image.gpa.0 | Entry::TEXT,
        12 | 13 => 0,
        14 => random % 600,
        _ => random,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn whatever_a_guest_writes_into_its_call_page_the_answer_is_a_status(
        calls in prop::collection::vec(
            (any::<u16>(), prop::collection::vec(any::<(u8, u64)>(), 0..40)),
            1..12,
        ),
    ) {
        let mut guest = guest();
        for (count, words) in calls {
            for (index, (choice, random)) in words.iter().enumerate() {
                guest.put(3 + index, word(&guest, *choice, *random));
            }
            let end = 3 + words.len() as u64;
            let count = if count % 8 == 0 { u64::from(count) } else { end };
            guest.put(COUNT_WORD, count);
            guest.put(2, 7);
            let (served, _) = guest.call(Call::Tables);
            prop_assert_eq!(served, Served::Resume);
            prop_assert!(guest.copy_is_the_pool());
        }
        // What was written is what the audit knows, but for reports that never came.
        guest.call(Call::Checkpoint);
        let result = guest.gate.result();
        let nobodys = |finding: &crate::audit::Finding| finding.detail.contains("did not write");
        prop_assert!(!result.findings.iter().any(nobodys), "{:#?}", result.findings);
    }

    #[test]
    fn requests_that_make_sense_word_by_word_are_answered_too(
        ops in prop::collection::vec(any::<[(u8, u64); 6]>(), 1..60),
    ) {
        let mut guest = guest();
        for op in ops.chunks(8) {
            let mut at = 3;
            for words in op {
                // A write of one entry whose place and address fit.
                let level = 1 + words[0].1 % 3;
                let place = word(&guest, 2, words[1].1);
                let entry = place % PAGE_SIZE / 8;
                let va = word(&guest, 6 + words[2].0 % 2, words[2].1);
                let shift = 12 + 9 * (level - 1);
                let va = va & !(0x1ff << shift) & !((1 << shift) - 1) | entry << shift;
                let held = guest.memory.load(Gpa(place)).unwrap();
                let new = word(&guest, words[4].0, words[4].1);
                for value in [1 | level << 8 | 1 << 32, place, guest.root.0, va, held, new] {
                    guest.put(at, value);
                    at += 1;
                }
            }
            guest.put(COUNT_WORD, at as u64);
            guest.put(2, 7);
            prop_assert_eq!(guest.call(Call::Tables).0, Served::Resume);
            prop_assert!(guest.copy_is_the_pool());
            prop_assert!(at <= PAGE_WORDS);
        }
        guest.call(Call::Checkpoint);
        let result = guest.gate.result();
        let nobodys = |finding: &crate::audit::Finding| finding.detail.contains("did not write");
        prop_assert!(!result.findings.iter().any(nobodys), "{:#?}", result.findings);
    }
}
