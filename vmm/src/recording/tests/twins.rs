//! What somebody changed in a recording is not judged as if nothing had been.

use super::*;
use crate::audit::{ControlPolicy, Profile};
use crate::recording::item::{Answer, Call, Item};
use crate::recording::replay::Recording;
use crate::report::Verdict;
use lacuna_abi::event::{Event, Flush};
use lacuna_abi::paging::Level;
use std::cell::Cell;
use std::rc::Rc;

/// Judges the recording of a clean run whose items are changed on the way.
fn edited(edit: impl FnMut(Item) -> Option<Item> + 'static) -> Report {
    let recorded = Recorded::new(&replay(), &[], Seal::Guard);
    assert_eq!(recorded.report.verdict, Verdict::Pass);
    let bytes = recorded.bytes();
    let mut recording = Recording::open(&bytes[..]).unwrap();
    recording.player.edit = Box::new(edit);
    recording.judge().unwrap()
}

/// Leaves out the `nth` call of these, with all that belongs to it.
fn without(nth: usize, is: impl Fn(&Call) -> bool + 'static) -> Report {
    let (mut seen, mut out) = (0, false);
    let found = Rc::new(Cell::new(false));
    let told = Rc::clone(&found);
    let report = edited(move |item| {
        if let Item::Call(call) = &item {
            seen += usize::from(is(call));
            out |= is(call) && seen == nth;
            told.set(told.get() || out);
        }
        let keep = !out;
        out &= !matches!(item, Item::Result(_));
        keep.then_some(item)
    });
    assert!(found.get(), "there are not {nth} such calls");
    report
}

#[test]
fn unchanged_items_pass() {
    assert_eq!(edited(Some).verdict, Verdict::Pass);
}

#[test]
fn an_event_that_was_left_out_shows() {
    let event =
        |call: &Call, is: fn(&Event) -> bool| matches!(call, Call::Event(r) if is(&r.event));
    for nth in [1, 2, 3] {
        let report = without(nth, move |call| event(call, |e| matches!(e, Event::Flush(_))));
        assert_ne!(report.verdict, Verdict::Pass, "flush {nth}");
        let report = without(nth, move |call| event(call, |e| matches!(e, Event::EntryWrite(_))));
        assert_eq!(report.verdict, Verdict::Violation, "entry write {nth}");
        let report = without(nth, move |call| event(call, |e| matches!(e, Event::Life(..))));
        assert_ne!(report.verdict, Verdict::Pass, "life {nth}");
    }
}

#[test]
fn an_operation_that_was_left_out_shows() {
    for nth in [1, 3] {
        assert_ne!(without(nth, |call| matches!(call, Call::Arrival(..))).verdict, Verdict::Pass);
        assert_ne!(without(nth, |call| matches!(call, Call::Done(..))).verdict, Verdict::Pass);
    }
}

#[test]
fn a_table_that_was_changed_shows() {
    let mut tables = 0;
    let report = edited(move |item| {
        let mut item = item;
        if let Item::Answer(Answer::Table(_, Some(words))) = &mut item {
            tables += 1;
            if tables == 40 {
                words[3] ^= 2;
            }
        }
        Some(item)
    });
    assert_ne!(report.verdict, Verdict::Pass);
}

#[test]
fn an_answer_that_was_taken_away_shows() {
    let mut gone = 0;
    let report = edited(move |item| {
        let zero = matches!(item, Item::Answer(Answer::Zero(..)));
        gone += usize::from(zero);
        (!zero || gone != 3).then_some(item)
    });
    assert_eq!(report.verdict, Verdict::Inconclusive);
    let says = |reason: &String| reason.contains("an answer that the recording does not have");
    assert!(report.inconclusive.iter().any(says), "{:?}", report.inconclusive);
}

/// A guest that has PCIDs on and flushes its direct map by INVLPG, made of one that does neither:
/// violations of `stale-direct-map` for CPUs of this profile.
fn with_pcids(profile: Profile) -> u64 {
    let recorded = Recorded::new(&replay(), &[], Seal::Guard);
    let bytes = recorded.bytes();
    let mut recording = Recording::open(&bytes[..]).unwrap();
    recording.config.profile = profile;
    recording.config.control.cr4_set |= ControlPolicy::CR4_PCIDE;
    let zone = recording.config.layout.zone;
    let count = u32::try_from(zone.len / Level::Pd.span()).unwrap();
    recording.player.edit = Box::new(move |item| {
        let Item::Call(Call::Event(mut record)) = item else { return Some(item) };
        if record.event == Event::Flush(Flush::Everything) {
            record.event = Event::Flush(Flush::Pages { va: zone.va, count, level: Level::Pd });
        }
        Some(Item::Call(Call::Event(record)))
    });
    let report = recording.judge().unwrap();
    let check = report.checks.iter().find(|check| check.rule == "stale-direct-map").unwrap();
    assert!(check.checked > 0);
    check.violations
}

#[test]
fn another_profile_makes_findings_of_the_same_recording() {
    assert_eq!(with_pcids(Profile::Intel), 0);
    assert!(with_pcids(Profile::IntelInvlpgErratum) > 0, "INVLPG spares what is global there");
}
