//! A page that is linked at two levels at once: one store changes what it maps at both.

use super::*;

/// Where the page is a directory and where it is a page table, in the direct map behind all memory.
const AS_DIRECTORY: Gva = direct_map(Gpa(1 << 30));
const AS_TABLE: Gva = direct_map(Gpa(2 << 30));

/// A page whose first entry maps all of block 1 as a directory's, and its first frame as a table's.
/// The blocks 1 to 3 are mapped nowhere else.
fn linked_twice() -> (Scene, Gpa) {
    let mut scene = Scene::new(1);
    for number in 1..=3 {
        let block = scene.block(number);
        scene.unmap_block(block);
    }
    scene.flush_all(Flush::Everything);
    let (page, above) = (scene.machine.new_table(), scene.machine.new_table());
    let first = Entry::new(scene.block(1).start(), BLOCK_ENTRY);
    scene.machine.tables.insert(page.0, first.0);
    let link = Entry::new(page.frame(), Entry::TABLE);
    scene.machine.tables.insert(above.0, link.0);
    scene.write(0, AS_DIRECTORY, Level::Pdpt, 1, link);
    scene.write(0, AS_TABLE, Level::Pdpt, 1, Entry::new(above.frame(), Entry::TABLE));
    scene.assert_clean(&[]);
    (scene, page)
}

fn page_flush(va: Gva, level: Level) -> Flush {
    Flush::Pages { va, count: 1, level }
}

#[test]
fn what_a_store_revokes_at_the_other_level_is_owed_there() {
    for (va, level) in [(AS_DIRECTORY, Level::Pd), (AS_TABLE, Level::Pt)] {
        for flush in [page_flush(va, level), Flush::Everything] {
            let (mut scene, _) = linked_twice();
            let block = scene.block(1);
            scene.write(0, va, level, 1, Entry::EMPTY);
            scene.flush(0, flush);
            scene.op(0, OpKind::Seal, block).unwrap();
            let stale = (Rule::StaleDirectMap, Some(block.start()));
            let clean = flush == Flush::Everything;
            assert_eq!(scene.found(), if clean { vec![] } else { vec![stale] }, "{level:?}");
        }
    }
}

#[test]
fn an_entry_that_came_and_went_is_owed_as_what_it_was_at_the_other_level() {
    for flush in [page_flush(AS_TABLE, Level::Pt), Flush::Everything] {
        let (mut scene, page) = linked_twice();
        // A small page of the table's, and all of block 2 in the directory.
        let (one, two) = (scene.block(1), scene.block(2));
        scene.write(
            0,
            AS_TABLE.wrapping_add(PAGE_SIZE),
            Level::Pt,
            1,
            Entry::new(two.start(), BLOCK_ENTRY),
        );
        assert!(scene.machine.read_entry(page.wrapping_add(8)).unwrap().is_present());
        scene.write(0, AS_TABLE.wrapping_add(PAGE_SIZE), Level::Pt, 1, Entry::EMPTY);
        scene.flush(0, Flush::Pages { va: AS_TABLE, count: 2, level: Level::Pt });
        if flush == Flush::Everything {
            scene.flush(0, flush);
        }
        scene.op(0, OpKind::Seal, FrameRange::single(two.start().wrapping_add(7))).unwrap();
        let stale = (Rule::StaleDirectMap, Some(two.start().wrapping_add(7)));
        let clean = flush == Flush::Everything;
        assert_eq!(scene.found(), if clean { vec![] } else { vec![stale] });
        assert!(scene.audit.frames().sealed().all(|frame| !one.contains(frame)));
    }
}

#[test]
fn a_false_before_hides_nothing_at_the_other_level() {
    let (mut scene, _) = linked_twice();
    let block = scene.block(1);
    let write = scene.store(AS_TABLE, Level::Pt, 1, Entry::EMPTY);
    scene.record(0, Event::EntryWrite(EntryWrite { old: Entry::EMPTY, ..write }));
    scene.flush(0, page_flush(AS_TABLE, Level::Pt));
    scene.op(0, OpKind::Seal, block).unwrap();
    scene.assert_found(Rule::TraceHonesty, block.start());
    scene.assert_found(Rule::StaleDirectMap, block.start());
}

#[test]
fn a_before_that_is_false_at_the_other_level_only_is_a_lie() {
    for bit in [Entry::PAGE_SIZE, 1 << 6] {
        let (mut scene, _) = linked_twice();
        let block = scene.block(1);
        let write = scene.store(AS_TABLE, Level::Pt, 1, Entry::EMPTY);
        let old = Entry(write.old.0 ^ bit);
        scene.record(0, Event::EntryWrite(EntryWrite { old, ..write }));
        // Of a small page the bit selects a memory type; the dirty bit says nothing anywhere.
        let lie = (Rule::TraceHonesty, Some(block.start()));
        let expected = if bit == Entry::PAGE_SIZE { vec![lie] } else { vec![] };
        assert_eq!(scene.found(), expected);
    }
}

#[test]
fn what_a_new_entry_maps_at_the_other_level_is_judged() {
    for secret in [true, false] {
        let (mut scene, _) = linked_twice();
        let block = scene.block(2);
        let inside = FrameRange::new(block.start().wrapping_add(8), 4).unwrap();
        if secret {
            scene.op(0, OpKind::Seal, inside).unwrap();
        }
        // The small page is ordinary; the large one holds secret frames.
        let new = Entry::new(block.start(), BLOCK_ENTRY);
        scene.write(0, AS_TABLE.wrapping_add(PAGE_SIZE), Level::Pt, 1, new);
        let alias = (Rule::DirectMapAlias, Some(inside.start()));
        assert_eq!(scene.found(), if secret { vec![alias] } else { vec![] });
    }
}

#[test]
fn what_is_written_while_the_page_may_be_cached_at_the_other_level_is_owed_there() {
    for flushed in [true, false] {
        let (mut scene, _) = linked_twice();
        let block = scene.block(3);
        // The directory is unlinked; its page goes on as a table.
        scene.write(0, AS_DIRECTORY, Level::Pdpt, 1, Entry::EMPTY);
        if flushed {
            scene.flush(0, Flush::Everything);
        }
        let va = AS_TABLE.wrapping_add(2 * PAGE_SIZE);
        scene.write(0, va, Level::Pt, 1, Entry::new(block.start(), BLOCK_ENTRY));
        scene.write(0, va, Level::Pt, 1, Entry::EMPTY);
        scene.flush(0, page_flush(va, Level::Pt));
        scene.op(0, OpKind::Seal, block).unwrap();
        let stale = (Rule::StaleDirectMap, Some(block.start()));
        assert_eq!(scene.found(), if flushed { vec![] } else { vec![stale] });
        assert_eq!(scene.audit.result().inconclusive, [""; 0]);
    }
}

#[test]
fn a_link_that_a_cached_path_to_the_other_level_reaches_is_not_passed() {
    for flushed in [true, false] {
        let (mut scene, _) = linked_twice();
        scene.write(0, AS_DIRECTORY, Level::Pdpt, 1, Entry::EMPTY);
        if flushed {
            scene.flush(0, Flush::Everything);
        }
        // A small page of the table's own place, and a table where the page was a directory.
        let data = Entry::new(scene.block(4).start(), Entry::DATA);
        scene.write(0, AS_TABLE.wrapping_add(PAGE_SIZE), Level::Pt, 1, data);
        let result = scene.audit.result();
        assert_eq!(result.inconclusive.is_empty(), flushed, "{result:?}");
    }
}
