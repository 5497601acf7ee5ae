//! Accesses that the guest observed: through the tables, through what may still be cached, and through
//! neither.

use super::*;
use lacuna_abi::observe::{Case, Change, Means, Observation, Seen};

/// Frames that are mapped before and after.
const OLD: u64 = 3;
const NEW: u64 = 4;

/// Two CPUs, and a page of the direct map's slot behind the memory that there is.
pub(super) struct Observed {
    pub(super) scene: Scene,
    va: Gva,
}

impl Observed {
    pub(super) fn new() -> Self {
        let mut scene = Scene::new(2);
        let va = direct_map(scene.machine.layout.zone.end());
        let table = scene.machine.new_table();
        scene.write(0, va, Level::Pd, 1, Entry::new(table.frame(), Entry::TABLE));
        Self { scene, va }
    }

    pub(super) fn frame(&self, number: u64) -> Gfn {
        self.scene.block(1).start().wrapping_add(number)
    }

    /// The page maps the old frame, then this entry.
    fn change(&mut self, flags: u64, new: Entry) {
        let old = Entry::new(self.frame(OLD), flags);
        self.scene.write(0, self.va, Level::Pt, 1, old);
        self.scene.write(0, self.va, Level::Pt, 1, new);
    }

    pub(super) fn see(&mut self, cpu: u8, change: Change, seen: Seen) {
        let case = Case::new(change, Means::None, false, cpu != 0);
        let observation = Observation { case, va: self.va, seen };
        self.scene.record(cpu, Event::Observed(observation));
    }

    fn reached(&self, number: u64) -> Seen {
        Seen::Reached(self.frame(number).gpa())
    }

    /// Rounds, stale ones, those in which stale ones were allowed, contradictions: of all cases.
    fn counts(&self) -> [u64; 4] {
        self.scene.audit.observations().fold([0; 4], |[a, b, c, d], (_, tally)| {
            [a + tally.rounds, b + tally.stale, c + tally.allowed, d + tally.contradictions]
        })
    }
}

#[test]
fn what_the_tables_say_is_fresh_and_what_they_said_may_be_cached() {
    let mut it = Observed::new();
    it.change(Entry::DATA, Entry::new(it.frame(NEW), Entry::DATA));
    it.see(0, Change::Remap, it.reached(NEW));
    it.see(1, Change::Remap, it.reached(OLD));
    assert_eq!(it.counts(), [2, 1, 2, 0]);
    it.scene.assert_clean(&[Rule::ObservedAccess]);
}

#[test]
fn what_neither_says_contradicts_the_model_and_is_told() {
    let mut it = Observed::new();
    it.change(Entry::DATA, Entry::EMPTY);
    it.scene.flush(1, Flush::NonGlobal);
    it.see(1, Change::Clear, it.reached(OLD));
    assert_eq!(it.counts(), [1, 1, 0, 1]);
    it.scene.assert_found(Rule::ObservedAccess, it.frame(OLD));
    let result = it.scene.audit.result();
    let texts: Vec<&str> = result.findings[0].story.iter().map(|s| s.text.as_str()).collect();
    for (step, text) in
        ["mapped the frame", "cleared the entry", "reloaded CR3", "nothing that the CPU may cache"]
            .into_iter()
            .enumerate()
    {
        let told = &texts[texts.len() - 5 + step];
        assert!(told.contains(text), "{text:?} is not in {told:?} of {texts:#?}");
    }
    // The other CPU did not flush, and may see it.
    it.see(0, Change::Clear, it.reached(OLD));
    assert_eq!(it.counts(), [2, 2, 1, 1]);
}

#[test]
fn a_frame_that_was_never_mapped_there_contradicts_the_model_though_another_may_be_cached() {
    let mut it = Observed::new();
    it.change(Entry::DATA, Entry::EMPTY);
    it.see(0, Change::Clear, it.reached(NEW));
    assert_eq!(it.counts(), [1, 1, 1, 1]);
    it.scene.assert_found(Rule::ObservedAccess, it.frame(NEW));
}

#[test]
fn a_fault_where_the_tables_allow_the_access_contradicts_the_model() {
    let mut it = Observed::new();
    it.change(Entry::DATA, Entry::new(it.frame(NEW), Entry::DATA));
    it.see(0, Change::Remap, Seen::Fault);
    assert_eq!(it.counts(), [1, 1, 1, 1]);
}

#[test]
fn a_right_that_was_taken_away_is_used_until_it_is_invalidated() {
    let read_only = |it: &Observed| Entry::new(it.frame(OLD), Entry::READ_ONLY);
    let mut it = Observed::new();
    it.change(Entry::DATA, read_only(&it));
    it.see(0, Change::ReadOnly, it.reached(OLD));
    assert_eq!(it.counts(), [1, 1, 1, 0], "a store");
    it.scene.flush(0, Flush::Everything);
    it.see(0, Change::ReadOnly, Seen::Fault);
    assert_eq!(it.counts(), [2, 1, 1, 0]);
    it.see(0, Change::Clear, it.reached(OLD));
    assert_eq!(it.counts(), [3, 1, 1, 0], "a load is still allowed");
    it.see(0, Change::ReadOnly, it.reached(OLD));
    assert_eq!(it.counts(), [4, 2, 1, 1]);
}

#[test]
fn a_page_of_a_large_translation_is_the_one_at_its_place() {
    let mut it = Observed::new();
    it.va = it.va.wrapping_add(BLOCK_SIZE);
    let block = it.scene.block(2).start();
    let large = Entry::new(block, BLOCK_ENTRY);
    it.scene.write(0, it.va, Level::Pd, 1, large);
    it.scene.write(0, it.va, Level::Pd, 1, Entry::EMPTY);
    it.va = it.va.wrapping_add(5 * PAGE_SIZE);
    it.see(0, Change::ClearLarge, Seen::Reached(block.wrapping_add(5).gpa()));
    assert_eq!(it.counts(), [1, 1, 1, 0]);
    it.see(0, Change::ClearLarge, Seen::Reached(block.wrapping_add(6).gpa()));
    assert_eq!(it.counts(), [2, 2, 2, 1]);
}

#[test]
fn what_is_not_offered_is_counted_and_not_judged() {
    let mut it = Observed::new();
    it.see(0, Change::NoExecute, Seen::NotOffered);
    let all: Vec<_> = it.scene.audit.observations().collect();
    assert_eq!((all.len(), all[0].1.not_offered, all[0].1.rounds), (1, 1, 0));
    assert_eq!(it.scene.checked(Rule::ObservedAccess), 0);
}

#[test]
fn whatever_a_guest_says_that_it_saw_the_judgement_and_its_story_are_bounded() {
    let mut it = Observed::new();
    let places = [Gva(0), Gva(u64::MAX), Gva(1 << 63), it.va, IMAGE, POOL, window(0), window(1)];
    for round in 0..300_u64 {
        it.change(Entry::DATA, Entry::EMPTY);
        it.scene.flush(0, Flush::NonGlobal);
        for (va, change) in places.into_iter().zip(Change::ALL.iter().cycle()) {
            let case = Case::new(*change, Means::None, true, true);
            for seen in [Seen::Fault, Seen::Reached(Gpa(u64::MAX)), Seen::Reached(Gpa(round << 12))]
            {
                it.scene.record(0, Event::Observed(Observation { case, va, seen }));
            }
        }
    }
    let findings = it.scene.audit.result().findings;
    assert!(!findings.is_empty() && findings.len() <= 100);
    assert!(findings.iter().all(|found| !found.story.is_empty() && found.story.len() <= 24));
}

/// Twin: a model that takes a translation for gone that may be cached is contradicted.
#[test]
fn twin_a_model_that_forgets_too_much_is_contradicted() {
    for forgets in [false, true] {
        let mut it = Observed::new();
        it.change(Entry::DATA | Entry::GLOBAL, Entry::EMPTY);
        it.scene.flush(0, Flush::NonGlobal);
        if forgets {
            // As if a CR3 load removed what is global.
            it.scene.audit.tlb.flush(0, &Flush::Everything, it.scene.seq + 1).unwrap();
            it.scene.seq += 1;
        }
        it.see(0, Change::Clear, it.reached(OLD));
        assert_eq!(it.counts(), [1, 1, u64::from(!forgets), u64::from(forgets)]);
    }
}
