//! Every rule, three times: where it holds and is counted as checked, where it is broken and the
//! frame is named, and where it cannot be told and is counted as not checked.

use super::cached::merge;
use super::observed::Observed;
use super::*;
use lacuna_abi::observe::{Case as Observable, Change, Means, Observation, Seen};

/// What is known of a rule.
struct Case {
    /// A guest that keeps the rule, and gives it something to judge.
    holds: fn() -> Scene,
    /// A guest that breaks it, and the frame that the finding must name.
    broken: fn() -> (Scene, Option<Gfn>),
    /// A guest of which it cannot be told.
    untold: fn() -> Scene,
}

/// No rule is left out: there would be no arm for it.
fn case(rule: Rule) -> Case {
    let broken: fn() -> (Scene, Option<Gfn>) = match rule {
        Rule::DirectMapAlias => left_in_the_direct_map,
        Rule::ForeignAlias => left_in_the_window,
        Rule::GlobalWindow => mapped_globally,
        Rule::StaleDirectMap => not_flushed,
        Rule::StaleWindow => released_while_cached,
        Rule::StaleTable => || {
            let (scene, table) = merge(|_| ());
            (scene, Some(table))
        },
        Rule::SecondStageOpen => pooled_unsealed,
        Rule::Residue => released_dirty,
        Rule::TableAlias => table_mapped_writable,
        Rule::WriteExecute => executable_and_writable,
        Rule::UserAccess => open_to_ring_three,
        Rule::ControlState => pge_cleared,
        Rule::TraceHonesty => written_unrecorded,
        Rule::InputLeak => leaked,
        Rule::ObservedAccess => || {
            let mut it = Observed::new();
            let frame = it.frame(1);
            it.see(0, Change::Clear, Seen::Reached(frame.gpa()));
            (it.scene, Some(frame))
        },
    };
    let holds: fn() -> Scene = match rule {
        Rule::StaleTable => || merge(|scene| scene.flush_all(Flush::Everything)).0,
        Rule::InputLeak => || searched(10, 0),
        Rule::ObservedAccess => || {
            let mut it = Observed::new();
            it.see(0, Change::Clear, Seen::Fault);
            it.scene
        },
        _ => || whole_life(1, Denial::Denied),
    };
    let untold: fn() -> Scene = match rule {
        // A walk that does not end leaves entries unjudged.
        Rule::DirectMapAlias
        | Rule::ForeignAlias
        | Rule::GlobalWindow
        | Rule::TableAlias
        | Rule::WriteExecute
        | Rule::UserAccess => endless_tables,
        // A root that is still being built.
        Rule::TraceHonesty => recorded_of_an_unknown_root,
        // What is not kept can no longer be found broken.
        Rule::StaleDirectMap | Rule::StaleTable => more_than_is_kept,
        // Copies that other CPUs made speculatively.
        Rule::StaleWindow => || whole_life(2, Denial::Denied),
        Rule::SecondStageOpen => || whole_life(1, Denial::NotEnforced),
        Rule::Residue => hidden,
        Rule::ControlState => unreadable_registers,
        Rule::InputLeak => || searched(0, 2),
        // What may be cached of the image is not followed.
        Rule::ObservedAccess => || {
            let mut scene = Scene::new(1);
            let case = Observable::new(Change::Clear, Means::None, true, false);
            scene.record(0, Event::Observed(Observation { case, va: IMAGE, seen: Seen::Fault }));
            scene
        },
    };
    Case { holds, broken, untold }
}

#[test]
fn every_rule_that_holds_is_counted_and_finds_nothing() {
    for rule in Rule::ALL {
        let scene = (case(*rule).holds)();
        scene.assert_clean(&[*rule]);
        assert_eq!(scene.audit.result().tally(*rule).violations, 0, "{}", rule.name());
    }
}

#[test]
fn every_rule_that_is_broken_is_found_with_its_frame_and_counted() {
    for rule in Rule::ALL {
        let (scene, frame) = (case(*rule).broken)();
        let found = scene.found();
        assert!(found.contains(&(*rule, frame)), "{}: {frame:?} not in {found:?}", rule.name());
        let tally = scene.audit.result().tally(*rule);
        assert!(tally.violations > 0, "{}: {tally:?}", rule.name());
    }
}

#[test]
fn every_rule_that_cannot_be_told_is_counted_as_not_checked_and_finds_nothing() {
    for rule in Rule::ALL {
        let scene = (case(*rule).untold)();
        let tally = scene.audit.result().tally(*rule);
        assert!(tally.not_checked > 0, "{}: {tally:?}", rule.name());
        assert_eq!(tally.violations, 0, "{}: {:?}", rule.name(), scene.found());
    }
}

/// Twin: what is counted as not checked above is not always so.
#[test]
fn what_can_be_told_is_not_counted_as_not_checked() {
    for rule in Rule::ALL {
        let tally = (case(*rule).holds)().audit.result().tally(*rule);
        assert_eq!(tally.not_checked, 0, "{}", rule.name());
    }
}

/// A block goes to the pool, is handed out, used and freed, and comes back.
fn whole_life(cpus: usize, seal: Denial) -> Scene {
    let mut scene = Scene::with_seal(cpus, seal);
    let block = scene.block(1);
    scene.machine.dirty.extend(block.iter());
    scene.flip(block);
    scene.quiesce();
    let owned = first(block, 4);
    scene.life(Life::HandedOutZero, owned);
    scene.flush(0, Flush::NonGlobal);
    scene.use_window(owned, 0);
    scene.life(Life::Freed, owned);
    scene.life(Life::PooledZero, owned);
    scene.flip_back(block);
    scene.quiesce();
    scene
}

fn flipped() -> (Scene, FrameRange) {
    let mut scene = Scene::new(1);
    let block = scene.block(1);
    scene.flip(block);
    scene.flush(0, Flush::NonGlobal);
    (scene, block)
}

fn left_in_the_direct_map() -> (Scene, Option<Gfn>) {
    let mut scene = Scene::new(1);
    let block = scene.block(1);
    scene.op(0, OpKind::Seal, block).unwrap();
    (scene, Some(block.start()))
}

fn left_in_the_window() -> (Scene, Option<Gfn>) {
    let (mut scene, block) = flipped();
    let frame = first(block, 1);
    scene.op(0, OpKind::Open, frame).unwrap();
    scene.write(0, window(0), Level::Pt, 1, Entry::new(frame.start(), Entry::DATA));
    scene.op(0, OpKind::Seal, frame).unwrap();
    (scene, Some(frame.start()))
}

fn mapped_globally() -> (Scene, Option<Gfn>) {
    let (mut scene, block) = flipped();
    scene.op(0, OpKind::Open, block).unwrap();
    let entry = Entry::new(block.start(), Entry::DATA | Entry::GLOBAL);
    scene.write(0, window(0), Level::Pt, 1, entry);
    (scene, Some(block.start()))
}

fn not_flushed() -> (Scene, Option<Gfn>) {
    let mut scene = Scene::new(1);
    let block = scene.block(1);
    scene.unmap_block(block);
    scene.op(0, OpKind::Seal, block).unwrap();
    (scene, Some(block.start()))
}

fn released_while_cached() -> (Scene, Option<Gfn>) {
    let mut scene = Scene::with_seal(1, Denial::NotEnforced);
    let block = scene.block(1);
    scene.flip(block);
    scene.flush(0, Flush::NonGlobal);
    let used = FrameRange::single(block.start().wrapping_add(3));
    scene.use_window(used, 0);
    scene.op(0, OpKind::Release, block).unwrap();
    (scene, Some(used.start()))
}

fn pooled_unsealed() -> (Scene, Option<Gfn>) {
    let mut scene = Scene::new(1);
    let block = scene.block(1);
    scene.unmap_block(block);
    scene.flush(0, Flush::Everything);
    scene.life(Life::Pooled, block);
    (scene, Some(block.start()))
}

fn released_dirty() -> (Scene, Option<Gfn>) {
    let (mut scene, block) = flipped();
    let dirty = block.start().wrapping_add(9);
    scene.machine.dirty.insert(dirty);
    scene.flip_back(block);
    (scene, Some(dirty))
}

fn table_mapped_writable() -> (Scene, Option<Gfn>) {
    let mut scene = Scene::new(1);
    let table = scene.machine.root.frame();
    scene.write(0, window(0), Level::Pt, 1, Entry::new(table, Entry::DATA));
    (scene, Some(table))
}

fn executable_and_writable() -> (Scene, Option<Gfn>) {
    let mut scene = Scene::new(1);
    // The direct map shows it, writable.
    let frame = scene.block(3).start();
    scene.write(0, window(0), Level::Pt, 1, Entry::new(frame, Entry::TEXT));
    (scene, Some(frame))
}

fn open_to_ring_three() -> (Scene, Option<Gfn>) {
    let mut scene = Scene::new(1);
    let frame = scene.block(3).start();
    let user = Entry::new(frame, Entry::DATA | Entry::USER);
    scene.write(0, window(0), Level::Pt, 1, user);
    for level in [Level::Pml4, Level::Pdpt, Level::Pd] {
        let place = locate(&scene.machine, scene.machine.root, window(0), level).unwrap();
        *scene.machine.tables.get_mut(&place.0).unwrap() |= Entry::USER;
    }
    scene.quiesce();
    (scene, Some(frame))
}

fn pge_cleared() -> (Scene, Option<Gfn>) {
    let mut scene = Scene::new(1);
    scene.machine.cpus[0].as_mut().unwrap().cr4 &= !ControlPolicy::CR4_PGE;
    scene.quiesce();
    (scene, None)
}

fn written_unrecorded() -> (Scene, Option<Gfn>) {
    let (mut scene, block) = flipped();
    scene.store(window(0), Level::Pt, 1, Entry::new(block.start(), Entry::DATA));
    scene.quiesce();
    (scene, Some(block.start()))
}

fn leaked() -> (Scene, Option<Gfn>) {
    let mut scene = searched(10, 0);
    scene.audit.report_leak(0, Some(Gfn(5)), "16 bytes of the input".to_owned(), 3);
    (scene, Some(Gfn(5)))
}

fn searched(checked: u64, not_checked: u64) -> Scene {
    let mut scene = Scene::new(1);
    scene.audit.count_leak_search(checked, not_checked);
    scene
}

fn hidden() -> Scene {
    let (mut scene, block) = flipped();
    scene.machine.hidden.extend(block.iter());
    scene.machine.dirty.extend(block.iter());
    scene.flip_back(block);
    scene
}

fn unreadable_registers() -> Scene {
    let mut scene = Scene::new(1);
    scene.machine.cpus[0] = None;
    scene.quiesce();
    scene
}

fn recorded_of_an_unknown_root() -> Scene {
    let mut scene = Scene::new(1);
    let write = scene.store(window(0), Level::Pt, 1, Entry::EMPTY);
    let root = scene.machine.clone_root();
    scene.record(0, Event::EntryWrite(EntryWrite { root, ..write }));
    scene
}

/// The root leads back to itself, over and over.
fn endless_tables() -> Scene {
    let mut scene = Scene::new(1);
    let root = scene.machine.root;
    for index in 0..256 {
        scene.machine.tables.insert(root.0 + 8 * index, Entry::new(root.frame(), Entry::TABLE).0);
    }
    scene.quiesce();
    scene
}

/// One table, linked at more places than are followed, and taken out of all of them unflushed.
fn more_than_is_kept() -> Scene {
    let mut scene = Scene::new(1);
    let table = scene.machine.new_table();
    let zone = direct_map(scene.block(0).start().gpa());
    for entry in [Entry::new(table.frame(), Entry::TABLE), Entry::EMPTY] {
        // In two directories, where nothing is mapped.
        for slot in 100..500 {
            for start in [zone, window(0)] {
                scene.write(0, start.wrapping_add(slot * BLOCK_SIZE), Level::Pd, 1, entry);
            }
        }
    }
    scene
}
