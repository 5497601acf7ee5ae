//! Splitting a large entry and merging small ones: what may be cached afterwards, and what a table
//! held when it was linked.

use super::*;
use lacuna_abi::event::TableFill;

const WHOLE: u64 = BLOCK_ENTRY | Entry::GLOBAL;
const SMALL: u64 = Entry::DATA | Entry::GLOBAL;

/// A scene with a block that is about to be split, the place of its table and its address.
struct Split {
    scene: Scene,
    block: FrameRange,
    table: Gpa,
    va: Gva,
}

impl Split {
    fn new(cpus: usize) -> Self {
        let mut scene = Scene::new(cpus);
        let block = scene.block(1);
        let table = scene.machine.new_table();
        let va = direct_map(block.start().gpa());
        Self { scene, block, table, va }
    }

    /// Stores the fill of a table in memory.
    fn fill(&mut self) -> TableFill {
        let first = Entry::new(self.block.start(), SMALL);
        let fill = TableFill { table: self.table, level: Level::Pt, first };
        for index in 0..512 {
            self.scene.machine.tables.insert(self.table.0 + 8 * index, fill.entry(index).0);
        }
        fill
    }

    fn link(&self) -> Entry {
        Entry::new(self.table.frame(), Entry::TABLE)
    }

    /// Fills and links the table, each with its record.
    fn split(&mut self) {
        self.scene.life(Life::TableAllocated, FrameRange::single(self.table.frame()));
        let fill = self.fill();
        self.scene.record(0, Event::TableFill(fill));
        self.scene.write(0, self.va, Level::Pd, 1, self.link());
    }

    /// Replaces the table by the large entry.
    fn merge(&mut self) {
        self.scene.write(0, self.va, Level::Pd, 1, Entry::new(self.block.start(), WHOLE));
    }

    fn clear(&mut self, count: u32) {
        self.scene.write(0, self.va, Level::Pt, count, Entry::EMPTY);
    }

    fn pages(&self, count: u32) -> Flush {
        Flush::Pages { va: self.va, count, level: Level::Pt }
    }

    fn free_table(&mut self) {
        self.scene.life(Life::TableFreed, FrameRange::single(self.table.frame()));
    }
}

#[test]
fn a_range_that_is_converted_and_comes_back_is_clean() {
    let mut split = Split::new(2);
    split.split();
    split.scene.flush_all(Flush::Everything);
    split.clear(3);
    split.scene.flush_all(split.pages(3));
    let range = first(split.block, 3);
    split.scene.op(0, OpKind::Seal, range).unwrap();
    split.scene.life(Life::HandedOut, range);
    split.scene.use_window(range, 0);
    split.scene.quiesce();
    split.scene.life(Life::Freed, range);
    split.scene.flush(0, Flush::NonGlobal);
    split.scene.op(0, OpKind::Release, range).unwrap();
    let small = Entry::new(split.block.start(), SMALL);
    split.scene.write(0, split.va, Level::Pt, 3, small);
    split.merge();
    split.scene.flush_all(Flush::Everything);
    split.free_table();
    split.scene.quiesce();
    let rules = [Rule::DirectMapAlias, Rule::StaleDirectMap, Rule::StaleTable, Rule::TraceHonesty];
    split.scene.assert_clean(&rules);
}

#[test]
fn a_table_is_judged_by_what_it_held_when_it_was_linked() {
    // All records are taken when memory has moved on: the range is clear, or the block even whole.
    for merged in [false, true] {
        let mut split = Split::new(1);
        let fill = split.fill();
        let linked = split.scene.store(split.va, Level::Pd, 1, split.link());
        let cleared = split.scene.store(split.va, Level::Pt, 16, Entry::EMPTY);
        let small = Entry::new(split.block.start(), SMALL);
        let mut writes = vec![linked, cleared];
        if merged {
            writes.push(split.scene.store(split.va, Level::Pt, 16, small));
            let whole = Entry::new(split.block.start(), WHOLE);
            writes.push(split.scene.store(split.va, Level::Pd, 1, whole));
        }
        split.scene.record(0, Event::TableFill(fill));
        for write in writes {
            split.scene.record(0, Event::EntryWrite(write));
        }
        split.scene.quiesce();
        split.scene.assert_clean(&[Rule::TraceHonesty]);
        let stale = split.scene.audit.tlb.of_frames(first(split.block, 1));
        let levels: BTreeSet<_> = stale.iter().map(|duty| duty.level).collect();
        assert_eq!(levels, BTreeSet::from([Level::Pt, Level::Pd]), "both may be cached");
    }
}

#[test]
fn without_the_record_of_its_fill_a_table_that_moved_on_is_a_lie() {
    let mut split = Split::new(1);
    split.fill();
    let linked = split.scene.store(split.va, Level::Pd, 1, split.link());
    let cleared = split.scene.store(split.va, Level::Pt, 16, Entry::EMPTY);
    split.scene.record(0, Event::EntryWrite(linked));
    split.scene.record(0, Event::EntryWrite(cleared));
    assert_eq!(split.scene.found(), [(Rule::TraceHonesty, None)]);
}

#[test]
fn a_fill_that_is_not_what_the_table_holds_is_a_lie() {
    let mut split = Split::new(1);
    let fill = split.fill();
    let lie = TableFill { first: Entry::new(split.block.start(), Entry::READ_ONLY), ..fill };
    split.scene.record(0, Event::TableFill(lie));
    split.scene.write(0, split.va, Level::Pd, 1, split.link());
    split.scene.quiesce();
    split.scene.assert_found(Rule::TraceHonesty, split.block.start());
}

#[test]
fn a_fill_of_a_table_that_is_linked_is_a_lie_and_changes_nothing() {
    let mut split = Split::new(1);
    split.split();
    split.scene.flush(0, Flush::Everything);
    let first = Entry::new(split.scene.block(3).start(), SMALL);
    let fill = TableFill { table: split.table, level: Level::Pt, first };
    split.scene.record(0, Event::TableFill(fill));
    split.scene.quiesce();
    assert_eq!(split.scene.found(), [(Rule::TraceHonesty, Some(split.table.frame()))]);
    // One outside the pool is nobody's business.
    let outside = TableFill { table: split.block.start().gpa(), ..fill };
    split.scene.record(0, Event::TableFill(outside));
    assert_eq!(split.scene.found().len(), 1);
}

#[test]
fn the_large_translation_outlives_a_split_until_a_flush_that_reaches_globals() {
    let inside = |split: &Split| Flush::Pages {
        va: split.va.wrapping_add(300 * PAGE_SIZE),
        count: 1,
        level: Level::Pt,
    };
    let behind = |split: &Split| Flush::Pages {
        va: split.va.wrapping_add(BLOCK_SIZE),
        count: 1,
        level: Level::Pt,
    };
    type Cure<'c> = &'c dyn Fn(&Split) -> Flush;
    let cases: [(Cure<'_>, u64); 4] = [
        (&|_| Flush::NonGlobal, 512),
        (&behind, 512),
        (&|_| Flush::Everything, 0),
        // One INVLPG is enough for a page of any size (SDM volume 3, "Recommended Invalidation").
        (&inside, 0),
    ];
    for (cure, left) in cases {
        let mut split = Split::new(1);
        split.split();
        let flush = cure(&split);
        split.scene.flush(0, flush);
        let duties = split.scene.audit.tlb.of_frames(split.block);
        assert_eq!(duties.iter().map(|duty| duty.frames.count()).sum::<u64>(), left, "{flush:?}");
    }
}

#[test]
fn a_split_and_a_cleared_range_without_any_flush_are_stale() {
    for flush in [None, Some(Flush::NonGlobal)] {
        let mut split = Split::new(1);
        split.split();
        split.clear(4);
        flush.into_iter().for_each(|flush| split.scene.flush(0, flush));
        let range = FrameRange::new(split.block.start().wrapping_add(2), 2).unwrap();
        split.scene.op(0, OpKind::Seal, range).unwrap();
        let stale = (Rule::StaleDirectMap, Some(range.start()));
        assert!(split.scene.found().contains(&stale), "{:?}", split.scene.found());
    }
}

#[test]
fn a_flush_of_the_split_alone_leaves_the_small_entries_that_were_cleared_after_it() {
    let mut split = Split::new(2);
    split.split();
    split.scene.flush_all(Flush::Everything);
    split.clear(4);
    split.scene.flush(0, split.pages(4));
    split.scene.op(0, OpKind::Seal, first(split.block, 4)).unwrap();
    let findings = split.scene.audit.result().findings;
    assert_eq!(findings.len(), 1);
    assert_eq!((findings[0].rule, findings[0].cpu), (Rule::StaleDirectMap, Some(1)));
}

#[test]
fn small_translations_outlive_a_merge_though_its_table_may_go() {
    let mut split = Split::new(1);
    split.split();
    split.scene.flush(0, Flush::Everything);
    split.merge();
    // A root load empties the paging-structure caches, but leaves what is global.
    split.scene.flush(0, Flush::NonGlobal);
    split.free_table();
    split.scene.assert_clean(&[Rule::StaleTable]);
    split.scene.unmap_block(split.block);
    // One INVLPG is enough for the large page, not for 512 small ones.
    let large = Flush::Pages { va: split.va, count: 1, level: Level::Pd };
    split.scene.flush(0, large);
    split.scene.op(0, OpKind::Seal, split.block).unwrap();
    let second = split.block.start().wrapping_add(1);
    assert_eq!(split.scene.found(), [(Rule::StaleDirectMap, Some(second))]);
}

#[test]
fn a_whole_table_of_small_entries_is_one_duty() {
    let mut split = Split::new(1);
    split.split();
    split.scene.flush(0, Flush::Everything);
    split.clear(16);
    split.scene.flush(0, Flush::Everything);
    split.merge();
    let duties = split.scene.audit.tlb.of_frames(split.block);
    let runs: Vec<_> = duties.iter().map(|duty| duty.frames.count()).collect();
    assert_eq!(runs, [496]);
}

#[test]
fn a_table_page_that_is_used_again_while_it_may_be_cached_is_stale_whatever_is_said_of_its_life() {
    // Filled again.
    let mut split = Split::new(2);
    split.split();
    split.scene.flush_all(Flush::Everything);
    split.merge();
    split.scene.flush(0, Flush::Everything);
    let fill = split.fill();
    split.scene.record(0, Event::TableFill(fill));
    assert_eq!(split.scene.found(), [(Rule::StaleTable, Some(split.table.frame()))]);

    // Linked elsewhere.
    for flushed in [true, false] {
        let mut split = Split::new(2);
        split.split();
        split.scene.flush_all(Flush::Everything);
        split.merge();
        split.scene.flush(usize::from(!flushed).try_into().unwrap(), Flush::Everything);
        if flushed {
            split.scene.flush(1, Flush::NonGlobal);
        }
        let va = direct_map(split.scene.block(3).start().gpa());
        split.scene.write(0, va, Level::Pd, 1, split.link());
        let stale = vec![(Rule::StaleTable, Some(split.table.frame()))];
        assert_eq!(split.scene.found(), if flushed { vec![] } else { stale });
    }
}

#[test]
fn a_table_that_stays_linked_elsewhere_or_returns_to_its_place_is_not_used_again() {
    let mut split = Split::new(1);
    split.split();
    split.scene.flush(0, Flush::Everything);
    split.merge();
    split.scene.write(0, split.va, Level::Pd, 1, split.link());
    split.scene.assert_clean(&[Rule::StaleTable]);
    let other = direct_map(split.scene.block(3).start().gpa());
    split.scene.write(0, other, Level::Pd, 1, split.link());
    let whole = Entry::new(split.scene.block(3).start(), WHOLE);
    split.scene.write(0, other, Level::Pd, 1, whole);
    let third = direct_map(split.scene.block(5).start().gpa());
    split.scene.write(0, third, Level::Pd, 1, split.link());
    split.scene.assert_clean(&[Rule::StaleTable]);
}

#[test]
fn a_linked_table_is_taken_for_another_one() {
    let mut split = Split::new(1);
    split.split();
    split.scene.flush(0, Flush::Everything);
    split.scene.assert_clean(&[Rule::StaleTable]);
    split.scene.life(Life::TableAllocated, FrameRange::single(split.table.frame()));
    assert_eq!(split.scene.found(), [(Rule::StaleTable, Some(split.table.frame()))]);
}

#[test]
fn a_quiesce_in_the_middle_of_a_split_or_merge_finds_nothing() {
    for stored in [false, true] {
        let mut split = Split::new(2);
        let fill = split.fill();
        split.scene.record(1, Event::TableFill(fill));
        let before = split.scene.machine.tables.clone();
        let linked = split.scene.store(split.va, Level::Pd, 1, split.link());
        let after = split.scene.machine.tables.clone();
        split.scene.machine.tables = if stored { after.clone() } else { before };
        split.scene.machine.intents[1] = Some(linked);
        split.scene.quiesce();
        split.scene.machine.tables = after;
        split.scene.machine.intents[1] = None;
        split.scene.record(1, Event::EntryWrite(linked));
        split.scene.quiesce();
        split.scene.flush_all(Flush::Everything);

        let before = split.scene.machine.tables.clone();
        let whole = Entry::new(split.block.start(), WHOLE);
        let merged = split.scene.store(split.va, Level::Pd, 1, whole);
        let after = split.scene.machine.tables.clone();
        split.scene.machine.tables = if stored { after.clone() } else { before };
        split.scene.machine.intents[1] = Some(merged);
        split.scene.quiesce();
        split.scene.machine.tables = after;
        split.scene.machine.intents[1] = None;
        split.scene.record(1, Event::EntryWrite(merged));
        split.scene.quiesce();
        split.scene.flush_all(Flush::Everything);
        split.free_table();
        split.scene.quiesce();
        split.scene.assert_clean(&[Rule::TraceHonesty, Rule::StaleTable]);
    }
}

#[test]
fn a_split_in_memory_that_no_intent_explains_is_a_lie() {
    let mut split = Split::new(1);
    split.fill();
    split.scene.store(split.va, Level::Pd, 1, split.link());
    split.scene.quiesce();
    split.scene.assert_found(Rule::TraceHonesty, split.block.start());
}
