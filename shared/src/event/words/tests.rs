//! Records and intents survive their encoding; anything else is refused.

use super::*;
use crate::addr::Gfn;
use crate::observe::Observation;
use proptest::prelude::*;

fn range() -> impl Strategy<Value = FrameRange> {
    (0..1u64 << 39, 1..1u64 << 20).prop_map(|(s, c)| FrameRange::new(Gfn(s), c).unwrap())
}

fn flush() -> impl Strategy<Value = Flush> {
    prop_oneof![
        (any::<u64>(), 1u32..=1 << 20).prop_map(|(va, count)| Flush::Pages {
            va: Gva(va),
            count,
            level: Level::Pt
        }),
        (any::<u64>(), 0u16..4096).prop_map(|(va, pcid)| Flush::PageOfPcid { va: Gva(va), pcid }),
        (0u16..4096).prop_map(Flush::Pcid),
        Just(Flush::NonGlobal),
        Just(Flush::AllPcids),
        Just(Flush::Everything),
    ]
}

fn sighting() -> impl Strategy<Value = Sighting> {
    let stores = (0..1u64 << 39, 0u64..512, 1u32..=512, any::<[u64; 3]>()).prop_map(
        |(frame, index, count, [old, new, grant])| {
            let index = index.min(512 - u64::from(count));
            Sighting::Stores(EntryStores {
                at: Gfn(frame).gpa().wrapping_add(8 * index),
                level: Level::Pd,
                count,
                old: Entry(old),
                new: Entry(new),
                grant,
            })
        },
    );
    prop_oneof![
        stores,
        (0..1u64 << 39, any::<u64>()).prop_map(|(frame, first)| {
            let (table, first) = (Gfn(frame).gpa(), Entry(first));
            Sighting::Fill(TableFill { table, level: Level::Pt, first })
        }),
        flush().prop_map(Sighting::Flush),
        (0..ControlRegister::ALL.len(), any::<[u64; 2]>()).prop_map(|(i, [old, new])| {
            Sighting::Control { register: ControlRegister::ALL[i], old, new }
        }),
        any::<bool>().prop_map(|no_flush| Sighting::RootLoad {
            root: Gpa(0x3000),
            pcid: 9,
            no_flush
        }),
        any::<(u64, bool)>().prop_map(|(va, write)| Sighting::Access { va: Gva(va), write }),
    ]
}

fn event() -> impl Strategy<Value = Event> {
    let write = (1u8..=4, 0u64..512, 1u32..=512, any::<[u64; 3]>(), 0u64..1 << 35).prop_map(
        |(level, index, count, [old, new, grant], high)| {
            let level = Level::from_number(level).unwrap();
            let index = index.min(512 - u64::from(count));
            let table = (high << 12) & !(level.span() * 512 - 1);
            Event::EntryWrite(EntryWrite {
                root: Gpa(0x7000),
                pcid: 5,
                va: Gva(table + index * level.span()),
                level,
                count,
                old: Entry(old),
                new: Entry(new),
                grant,
            })
        },
    );
    let fill = (0..1u64 << 39, 1u8..=2, any::<u64>()).prop_map(|(frame, level, first)| {
        let (table, level) = (Gfn(frame).gpa(), Level::from_number(level).unwrap());
        Event::TableFill(TableFill { table, level, first: Entry(first) })
    });
    let cases: std::vec::Vec<Case> = Case::all().collect();
    let seen = prop_oneof![
        Just(Seen::Fault),
        any::<u64>().prop_map(|gpa| Seen::Reached(Gpa(gpa))),
        Just(Seen::NotOffered)
    ];
    let observed = (proptest::sample::select(cases), any::<u64>(), seen);
    prop_oneof![
        write,
        fill,
        observed.prop_map(|(case, va, seen)| {
            Event::Observed(Observation { case, va: Gva(va), seen })
        }),
        flush().prop_map(Event::Flush),
        (0..ControlRegister::ALL.len(), any::<[u64; 2]>()).prop_map(|(i, [old, new])| {
            Event::Control { register: ControlRegister::ALL[i], old, new }
        }),
        any::<bool>().prop_map(|no_flush| Event::RootLoad { root: Gpa(0x3000), pcid: 9, no_flush }),
        (0..Life::ALL.len(), range()).prop_map(|(i, r)| Event::Life(Life::ALL[i], r)),
        any::<u64>().prop_map(Event::ShootdownAck),
        (0..HostAct::ALL.len(), range()).prop_map(|(i, r)| Event::Host(HostAct::ALL[i], r)),
        sighting().prop_map(Event::Seen),
    ]
}

proptest! {
    #[test]
    fn a_record_survives_its_encoding(
        seq in 1..u64::MAX, cpu: u8, site: u32, event in event(),
    ) {
        let record = Record { seq, cpu, site, event };
        prop_assert_eq!(Record::from_words(&record.to_words()), Ok(record));
    }

    #[test]
    fn any_words_are_decoded_or_refused(words: [u64; RECORD_WORDS]) {
        let _ = Record::from_words(&words);
    }

    #[test]
    fn any_head_with_a_right_check_is_decoded_or_refused(
        mut words: [u64; RECORD_WORDS], kind in 0u64..10, level in 0u64..6, flavour in 0u64..12,
    ) {
        words[1] = words[1] & !0xff_ffff | kind | level << 8 | flavour << 16;
        words[7] = last_word(words[0], words[1], 0);
        if let Ok(record) = Record::from_words(&words) {
            let again = Record::from_words(&record.to_words());
            prop_assert_eq!(again, Ok(record));
        }
    }
}

#[test]
fn a_half_written_record_is_torn() {
    let record = Record { seq: 9, cpu: 0, site: 5, event: Event::Flush(Flush::Everything) };
    for word in [0, 1, 7] {
        let mut words = record.to_words();
        words[word] ^= 4;
        assert_eq!(Record::from_words(&words), Err(BadRecord::Torn), "word {word}");
    }
    assert_eq!(Record::from_words(&[0; RECORD_WORDS]), Err(BadRecord::Torn));
}

#[test]
fn a_run_that_leaves_its_table_is_malformed() {
    let write = EntryWrite {
        root: Gpa(0),
        pcid: 0,
        va: Gva(511 * 4096),
        level: Level::Pt,
        count: 2,
        old: Entry::EMPTY,
        new: Entry::EMPTY,
        grant: 0,
    };
    let record = Record { seq: 1, cpu: 0, site: 0, event: Event::EntryWrite(write) };
    assert_eq!(Record::from_words(&record.to_words()), Err(BadRecord::Malformed));
}

#[test]
fn an_intent_survives_its_encoding_and_none_is_none() {
    let write = EntryWrite {
        root: Gpa(0x5000),
        pcid: 3,
        va: Gva(0x20_0000),
        level: Level::Pd,
        count: 2,
        old: Entry(1),
        new: Entry(2),
        grant: 7,
    };
    for seq in [0, 99] {
        let intent = Intent { write, seq };
        assert_eq!(Intent::from_words(&intent.to_words()), Ok(Some(intent)));
    }
    assert_eq!(Intent::from_words(&[0; INTENT_WORDS]), Ok(None));
    assert_eq!(Intent::from_words(&[5; INTENT_WORDS]), Err(BadRecord::Torn));
}
