//! What CPUs report, against what they were seen to do.

use super::*;

const PAGES: Flush = Flush::Pages { va: IMAGE, count: 3, level: Level::Pt };

fn stepped(cpus: usize) -> Scene {
    let mut scene = Scene::new(cpus);
    scene.audit.mediate(Mediation::Step, &scene.machine);
    scene
}

impl Scene {
    /// CPU 0 makes a gate call.
    fn came(&mut self) {
        self.audit.came(0, self.seq);
    }

    #[track_caller]
    fn assert_dishonest(&self, what: &str) {
        let result = self.audit.result();
        let found: Vec<_> =
            result.findings.iter().map(|f| (f.rule, f.cpu, f.detail.clone())).collect();
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!((found[0].0, found[0].1), (Rule::TraceHonesty, Some(0)));
        assert!(found[0].2.contains(what), "{found:?}");
        assert!(!result.findings[0].story.is_empty());
    }

    /// A run of four stores of CPU 0 in its window.
    fn stored(&mut self) -> EntryWrite {
        let frames = self.block(1);
        self.store(window(0), Level::Pt, 4, Entry::new(frames.start(), Entry::DATA))
    }
}

#[test]
fn every_flush_is_what_was_seen_of_it() {
    let mut scene = stepped(1);
    scene.report(0, Event::Flush(PAGES));
    for page in 0..3 {
        let (va, level) = (IMAGE.wrapping_add(page * PAGE_SIZE), Level::Pt);
        scene.see(0, Sighting::Flush(Flush::Pages { va, count: 1, level }));
    }
    let (root, pcid, no_flush) = (scene.machine.root, 0, false);
    scene.report(0, Event::Flush(Flush::NonGlobal));
    scene.see(0, Sighting::RootLoad { root, pcid, no_flush });
    scene.report(0, Event::Flush(Flush::Everything));
    let cr4 = ControlPolicy::default().cr4_set;
    let register = lacuna_abi::event::ControlRegister::Cr4;
    let without = cr4 & !ControlPolicy::CR4_PGE;
    scene.see(0, Sighting::Control { register, old: cr4, new: without });
    scene.see(0, Sighting::Control { register, old: without, new: cr4 });
    scene.came();
    scene.assert_clean(&[]);
    assert_eq!(scene.checked(Rule::TraceHonesty), 6);
}

#[test]
fn a_flush_that_was_not_done_is_found_at_the_next_call() {
    let mut scene = stepped(1);
    scene.report(0, Event::Flush(PAGES));
    assert!(scene.audit.owes_reports());
    scene.assert_clean(&[]);
    scene.came();
    scene.assert_dishonest("reported executed INVLPG");
    scene.came();
    scene.assert_dishonest("reported executed INVLPG");
}

#[test]
fn a_flush_that_was_not_done_discharges_nothing() {
    for (done, stale) in [(true, false), (false, true)] {
        let mut scene = stepped(1);
        let block = scene.block(1);
        scene.unmap_block(block);
        scene.report(0, Event::Flush(Flush::Everything));
        if done {
            scene.see(0, Sighting::Flush(Flush::Everything));
        }
        scene.op(0, OpKind::Seal, block).unwrap();
        let is_stale = scene.found().contains(&(Rule::StaleDirectMap, Some(block.start())));
        assert_eq!(is_stale, stale);
    }
}

#[test]
fn another_flush_than_reported_is_found() {
    let mut scene = stepped(1);
    scene.report(0, Event::Flush(Flush::Everything));
    scene.see(0, Sighting::Flush(Flush::NonGlobal));
    scene.assert_dishonest("seen to have loaded CR3");
}

#[test]
fn a_hidden_store_is_found_and_judged() {
    let mut scene = stepped(1);
    let write = scene.stored();
    scene.see_write(0, &write);
    scene.assert_clean(&[]);
    scene.came();
    scene.assert_dishonest("reported nothing more");
}

#[test]
fn a_store_that_was_not_made_is_found() {
    let mut scene = stepped(1);
    let root = scene.machine.root;
    let (old, new) = (Entry::EMPTY, Entry::new(scene.block(1).start(), Entry::DATA));
    let (va, level) = (window(0), Level::Pt);
    let write = EntryWrite { root, pcid: 0, va, level, count: 1, old, new, grant: 0 };
    scene.report(0, Event::EntryWrite(write));
    scene.came();
    scene.assert_dishonest("done nothing more");
    scene.quiesce();
    scene.assert_dishonest("done nothing more");
}

#[test]
fn a_store_elsewhere_or_of_something_else_is_found() {
    let shift = |write: &EntryWrite| EntryWrite { va: write.va.wrapping_add(PAGE_SIZE), ..*write };
    let other = |write: &EntryWrite| EntryWrite { new: Entry(write.new.0 ^ 1 << 12), ..*write };
    let before = |write: &EntryWrite| EntryWrite { old: Entry(7), ..*write };
    let shorter = |write: &EntryWrite| EntryWrite { count: 3, ..*write };
    let lies: [&dyn Fn(&EntryWrite) -> EntryWrite; 4] = [&shift, &other, &before, &shorter];
    for lie in lies {
        let mut scene = stepped(1);
        let write = scene.stored();
        scene.see_write(0, &write);
        scene.report(0, Event::EntryWrite(lie(&write)));
        scene.came();
        scene.assert_dishonest("stored");
    }
    let mut scene = stepped(1);
    let write = scene.stored();
    // The processor sets these whenever it likes.
    let dirty = Entry(write.new.0 ^ 1 << 6);
    scene.see_write(0, &write);
    scene.report(0, Event::EntryWrite(EntryWrite { new: dirty, ..write }));
    scene.came();
    scene.assert_clean(&[Rule::TraceHonesty]);
}

#[test]
fn what_one_cpu_reports_is_no_account_of_another() {
    let mut scene = stepped(2);
    let write = scene.stored();
    scene.see_write(0, &write);
    scene.report(1, Event::EntryWrite(write));
    scene.came();
    scene.assert_dishonest("reported nothing more");
}

#[test]
fn under_tables_flushes_are_believed_and_stores_are_not() {
    let mut scene = Scene::new(1);
    scene.audit.mediate(Mediation::Tables, &scene.machine);
    let block = scene.block(1);
    scene.unmap_block(block);
    scene.report(0, Event::Flush(Flush::Everything));
    scene.came();
    scene.op(0, OpKind::Seal, block).unwrap();
    scene.assert_clean(&[Rule::StaleDirectMap]);
    let write = scene.stored();
    scene.see_write(0, &write);
    scene.came();
    assert!(scene.found().contains(&(Rule::TraceHonesty, Some(block.start()))));
}

#[test]
fn stores_that_an_intent_announces_wait_for_their_record() {
    for (announced, clean) in [(true, true), (false, false)] {
        let mut scene = stepped(2);
        let write = scene.stored();
        scene.machine.intents[0] = announced.then_some(write);
        scene.see_write(0, &EntryWrite { count: 2, ..write });
        scene.quiesce();
        assert_eq!(scene.audit.result().findings.is_empty(), clean);
    }
}

#[test]
fn a_cpu_that_was_under_way_is_compared_from_its_next_call_on() {
    let mut scene = Scene::new(1);
    scene.flush(0, Flush::Everything);
    scene.audit.mediate(Mediation::Step, &scene.machine);
    // Announced before, and done now.
    scene.see(0, Sighting::Flush(Flush::Everything));
    scene.came();
    scene.assert_clean(&[]);
    scene.flush(0, Flush::Everything);
    scene.came();
    scene.assert_clean(&[Rule::TraceHonesty]);
    let tally = scene.audit.result().tally(Rule::TraceHonesty);
    assert_eq!((tally.checked, tally.not_checked), (2, 2));
    scene.report(0, Event::Flush(Flush::Everything));
    scene.came();
    scene.assert_dishonest("reported changed cr4");
}

#[test]
fn what_waits_is_bounded() {
    let mut scene = stepped(1);
    for _ in 0..5000 {
        scene.report(0, Event::Flush(PAGES));
    }
    scene.assert_dishonest("reported executed INVLPG");
    assert!(!scene.audit.owes_reports());
    let tally = scene.audit.result().tally(Rule::TraceHonesty);
    assert!(tally.not_checked >= 5000, "{tally:?}");
}

#[test]
fn a_table_holds_what_was_seen_while_nothing_led_to_it() {
    let mut scene = stepped(1);
    let block = scene.block(2);
    let table = scene.machine.new_table();
    let first = Entry::new(block.start(), Entry::DATA | Entry::GLOBAL);
    for index in 0..512 {
        let new = first.nth_of_run(Level::Pt, index);
        let at = table.wrapping_add(8 * index);
        scene.machine.tables.insert(at.0, new.0);
        let stores =
            EntryStores { at, level: Level::Pt, count: 1, old: Entry::EMPTY, new, grant: 0 };
        scene.see(0, Sighting::Stores(stores));
    }
    scene.report(0, Event::TableFill(TableFill { table, level: Level::Pt, first }));
    let va = direct_map(block.start().gpa());
    let large = Entry::new(block.start(), BLOCK_ENTRY | Entry::GLOBAL);
    let link = Entry::new(table.frame(), Entry::TABLE);
    scene.write(0, va, Level::Pd, 1, link);
    scene.flush(0, Flush::Everything);
    // One entry goes before the link is judged in memory, which must not matter.
    scene.write(0, va, Level::Pt, 1, Entry::EMPTY);
    scene.flush(0, Flush::Everything);
    scene.quiesce();
    scene.write(0, va, Level::Pt, 1, first);
    scene.write(0, va, Level::Pd, 1, large);
    scene.flush(0, Flush::Everything);
    // Linked again: it holds what it held.
    scene.write(0, va, Level::Pd, 1, link);
    scene.flush(0, Flush::Everything);
    scene.came();
    scene.quiesce();
    scene.assert_clean(&[Rule::TraceHonesty]);
    assert_eq!(scene.audit.result().inconclusive, [""; 0]);
}
