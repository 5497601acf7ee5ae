//! Direct paging: whatever a guest asks for, what is written keeps the rules, and what would break one
//! is refused and found.

use super::*;
use lacuna_abi::addr::Gfn;
use lacuna_abi::direct::TableOp;
use lacuna_abi::event::TableFill;
use lacuna_abi::gate::Status::Refused;

mod chance;

const SITE: u32 = 0x77;

fn scene(cpus: usize) -> Scene {
    Scene::as_seen(cpus, Denial::Denied, Mediation::Tables)
}

impl Scene {
    /// Asks for something and, if that is admitted, does it as the host does.
    fn ask(&mut self, cpu: u8, op: &TableOp) -> Result<(), Status> {
        self.audit.admit(cpu, (SITE, op), self.seq, &self.machine)?;
        let event = match *op {
            TableOp::Write { at, write } => {
                for index in 0..u64::from(write.count) {
                    let entry = write.new.nth_of_run(write.level, index);
                    self.machine.tables.insert(at.0 + 8 * index, entry.0);
                }
                let EntryWrite { level, count, old, new, .. } = write;
                let stores = EntryStores { at, level, count, old, new, grant: 0 };
                self.see(cpu, Sighting::Stores(stores));
                Event::EntryWrite(write)
            }
            TableOp::Fill(fill) => {
                for index in 0..512 {
                    self.machine.tables.insert(fill.table.0 + 8 * index, fill.entry(index).0);
                }
                self.see(cpu, Sighting::Fill(fill));
                Event::TableFill(fill)
            }
        };
        self.report(cpu, event);
        Ok(())
    }

    /// Asks for a word of a page that no root reaches.
    fn ask_for_word(&mut self, at: Gpa, new: Entry) -> Result<(), Status> {
        let old = self.machine.read_entry(at).unwrap();
        // Built for a root that is not registered.
        let (root, level, count) = (Gpa(0x1000), Level::Pt, 1);
        let va = Gva((at.0 % PAGE_SIZE / 8) << 12);
        let write = EntryWrite { root, pcid: 0, va, level, count, old, new, grant: 0 };
        self.ask(0, &TableOp::Write { at, write })
    }

    /// A copy of the boot root, asked for word by word.
    fn ask_for_root(&mut self) -> Gpa {
        let copy = self.machine.new_table();
        for index in 0..512 {
            let entry = self.machine.read_entry(self.machine.root.wrapping_add(8 * index)).unwrap();
            if entry.is_present() {
                self.ask_for_word(copy.wrapping_add(8 * index), entry).unwrap();
            }
        }
        copy
    }

    /// The write of a run of entries of the boot root, which says truly what they were.
    fn run_of(&self, va: Gva, level: Level, count: u32, new: Entry) -> TableOp {
        let root = self.machine.root;
        let at = locate(&self.machine, root, va, level).unwrap();
        let old = self.machine.read_entry(at).unwrap();
        let write = EntryWrite { root, pcid: 0, va, level, count, old, new, grant: 0 };
        TableOp::Write { at, write }
    }

    fn ask_to_write(&mut self, va: Gva, level: Level, new: Entry) -> Result<(), Status> {
        let op = self.run_of(va, level, 1, new);
        self.ask(0, &op)
    }

    fn ask_to_fill(&mut self, table: Gpa, first: Entry) -> Result<(), Status> {
        self.ask(0, &TableOp::Fill(TableFill { table, level: Level::Pt, first }))
    }

    fn seal_block(&mut self, block: FrameRange) {
        self.ask_to_write(direct_map(block.start().gpa()), Level::Pd, Entry::EMPTY).unwrap();
        self.flush_all(Flush::Everything);
        self.op(0, OpKind::Seal, block).unwrap();
    }

    #[track_caller]
    fn refused(&self, answer: Result<(), Status>, rule: Rule, frame: Gfn) {
        assert_eq!(answer, Err(Refused));
        let result = self.audit.result();
        let finding = result.findings.last().unwrap();
        assert_eq!((finding.rule, finding.frame), (rule, Some(frame)), "{finding:?}");
        let named = finding.story.iter().any(|step| step.site == Some(SITE));
        assert!(named, "the story names the code: {:?}", finding.story);
        assert!(result.tally(rule).checked > 0);
    }
}

fn window_entry(frame: Gfn) -> Entry {
    Entry::new(frame, Entry::DATA)
}

#[test]
fn a_life_of_a_block_is_admitted_and_clean() {
    let mut scene = scene(2);
    let block = scene.block(1);
    scene.seal_block(block);
    scene.op(1, OpKind::Open, block).unwrap();
    let large = Entry::new(block.start(), BLOCK_ENTRY);
    let slot = window(1);
    let run = scene.run_of(slot, Level::Pt, 512, window_entry(block.start()));
    scene.ask(1, &run).unwrap();
    let run = scene.run_of(slot, Level::Pt, 512, Entry::EMPTY);
    scene.ask(1, &run).unwrap();
    scene.op(1, OpKind::Seal, block).unwrap();
    scene.quiesce();
    scene.flush_all(Flush::Everything);
    scene.op(0, OpKind::Release, block).unwrap();
    let whole = Entry(large.0 | Entry::GLOBAL);
    scene.ask_to_write(direct_map(block.start().gpa()), Level::Pd, whole).unwrap();
    scene.quiesce();
    scene.assert_clean(&[Rule::DirectMapAlias, Rule::ForeignAlias, Rule::TraceHonesty]);
}

#[test]
fn a_block_is_split_and_merged() {
    let mut scene = scene(1);
    let (block, table) = (scene.block(1), scene.machine.new_table());
    let (va, flags) = (direct_map(block.start().gpa()), Entry::DATA | Entry::GLOBAL);
    scene.ask_to_fill(table, Entry::new(block.start(), flags)).unwrap();
    scene.ask_to_write(va, Level::Pd, Entry::new(table.frame(), Entry::TABLE)).unwrap();
    scene.flush_all(Flush::Everything);
    scene.ask_to_write(va, Level::Pt, Entry::EMPTY).unwrap();
    scene.flush_all(Flush::Everything);
    scene.op(0, OpKind::Seal, first(block, 1)).unwrap();
    // The whole block cannot come back while one of its pages is secret.
    let whole = Entry::new(block.start(), flags | Entry::PAGE_SIZE);
    let refused = scene.ask_to_write(va, Level::Pd, whole);
    scene.refused(refused, Rule::DirectMapAlias, block.start());
    scene.op(0, OpKind::Release, first(block, 1)).unwrap();
    scene.ask_to_write(va, Level::Pt, Entry::new(block.start(), flags)).unwrap();
    scene.ask_to_write(va, Level::Pd, whole).unwrap();
    // A CPU may still walk to the table.
    let refused = scene.ask_to_fill(table, Entry::EMPTY);
    scene.refused(refused, Rule::StaleTable, table.frame());
    scene.flush_all(Flush::Everything);
    scene.ask_to_fill(table, Entry::EMPTY).unwrap();
    scene.quiesce();
    assert_eq!(scene.found().len(), 2);
}

#[test]
fn a_secret_frame_is_mapped_in_the_window_of_a_cpu_that_has_it_open_and_nowhere_else() {
    let mut scene = scene(2);
    let block = scene.block(1);
    let frame = block.start();
    scene.seal_block(block);
    let direct = direct_map(frame.gpa());
    let refused =
        scene.ask_to_write(direct, Level::Pd, Entry::new(frame, BLOCK_ENTRY | Entry::GLOBAL));
    scene.refused(refused, Rule::DirectMapAlias, frame);
    let refused = scene.ask_to_write(window(0), Level::Pt, window_entry(frame));
    scene.refused(refused, Rule::ForeignAlias, frame);
    scene.op(0, OpKind::Open, first(block, 2)).unwrap();
    let refused = scene.ask_to_write(window(1), Level::Pt, window_entry(frame));
    scene.refused(refused, Rule::ForeignAlias, frame);
    // The third of a run is not open.
    let run = scene.run_of(window(0), Level::Pt, 3, window_entry(frame));
    let refused = scene.ask(0, &run);
    scene.refused(refused, Rule::ForeignAlias, frame.wrapping_add(2));
    let run = scene.run_of(window(0), Level::Pt, 2, window_entry(frame));
    scene.ask(0, &run).unwrap();
    let before = scene.found().len();
    scene.quiesce();
    assert_eq!((before, scene.found().len()), (4, 4));
}

#[test]
fn a_window_is_never_global_not_even_of_ordinary_frames() {
    let mut scene = scene(1);
    let frame = scene.block(1).start();
    let global = Entry(window_entry(frame).0 | Entry::GLOBAL);
    let refused = scene.ask_to_write(window(0), Level::Pt, global);
    scene.refused(refused, Rule::GlobalWindow, frame);
    scene.ask_to_write(window(0), Level::Pt, window_entry(frame)).unwrap();
}

#[test]
fn no_frame_of_the_pool_is_mapped_by_whatever_table() {
    let mut scene = scene(1);
    let root = scene.machine.root;
    for flags in [Entry::DATA, Entry::READ_ONLY] {
        let entry = Entry::new(root.frame(), flags);
        let refused = scene.ask_to_write(window(0), Level::Pt, entry);
        scene.refused(refused, Rule::TableAlias, root.frame());
    }
    // A table that is not linked may hold anything; it is judged when it is.
    let table = scene.machine.new_table();
    scene.ask_to_fill(table, Entry::new(root.frame(), Entry::DATA)).unwrap();
    let block = scene.block(1);
    let va = direct_map(block.start().gpa());
    let refused = scene.ask_to_write(va, Level::Pd, Entry::new(table.frame(), Entry::TABLE));
    scene.refused(refused, Rule::TableAlias, root.frame());
    // Neither is a table outside the pool, nor one that leads to itself.
    let outside = Entry::new(block.start(), Entry::TABLE);
    let refused = scene.ask_to_write(va, Level::Pd, outside);
    scene.refused(refused, Rule::TableAlias, block.start());
    let itself = Entry::new(root.frame(), Entry::TABLE);
    let answer = scene.ask_to_write(Gva(0), Level::Pml4, itself);
    assert_eq!(answer, Err(Refused));
    assert!(scene.found().iter().all(|(rule, _)| *rule == Rule::TableAlias));
}

#[test]
fn no_frame_is_writable_and_executable_and_the_text_is_never_writable() {
    let mut scene = scene(1);
    let text = scene.machine.layout.image.gpa.frame();
    let data = text.wrapping_add(1);
    let frame = scene.block(1).start();
    let code = |frame| Entry::new(frame, Entry::TEXT);
    for (entry, frame) in [
        (window_entry(text), text),
        (code(data), data),
        (code(frame), frame),
        (Entry::new(frame, Entry::PRESENT | Entry::WRITABLE), frame),
    ] {
        let refused = scene.ask_to_write(window(0), Level::Pt, entry);
        scene.refused(refused, Rule::WriteExecute, frame);
    }
    // Not even when nothing maps it executable any more.
    scene.ask_to_write(IMAGE, Level::Pt, Entry::EMPTY).unwrap();
    let refused =
        scene.ask_to_write(window(0).wrapping_add(PAGE_SIZE), Level::Pt, window_entry(text));
    scene.refused(refused, Rule::WriteExecute, text);
    // Data that is written nowhere any more may be executed: the entry itself is what is replaced.
    scene.ask_to_write(Gva(IMAGE.0 + PAGE_SIZE), Level::Pt, code(data)).unwrap();
}

#[test]
fn one_table_does_not_map_a_frame_writable_here_and_executable_there() {
    let mut scene = scene(1);
    let (table, block) = (scene.machine.new_table(), scene.block(1));
    scene.ask_to_write(direct_map(block.start().gpa()), Level::Pd, Entry::EMPTY).unwrap();
    for (index, flags) in [(0, Entry::DATA), (1, Entry::TEXT)] {
        let at = table.wrapping_add(8 * index);
        scene.ask_for_word(at, Entry::new(block.start(), flags)).unwrap();
    }
    let va = direct_map(block.start().gpa());
    let refused = scene.ask_to_write(va, Level::Pd, Entry::new(table.frame(), Entry::TABLE));
    scene.refused(refused, Rule::WriteExecute, block.start());
}

#[test]
fn nothing_is_reachable_from_ring_three() {
    let mut scene = scene(1);
    let frame = scene.block(1).start();
    let user = Entry(window_entry(frame).0 | Entry::USER);
    // The path above does not grant it.
    scene.ask_to_write(window(0), Level::Pt, user).unwrap();
    for level in [Level::Pd, Level::Pdpt] {
        let at = locate(&scene.machine, scene.machine.root, window(0), level).unwrap();
        let entry = Entry(scene.machine.read_entry(at).unwrap().0 | Entry::USER);
        scene.ask_to_write(window(0).align_down(level.span()), level, entry).unwrap();
    }
    let at = locate(&scene.machine, scene.machine.root, window(0), Level::Pml4).unwrap();
    let entry = Entry(scene.machine.read_entry(at).unwrap().0 | Entry::USER);
    let va = window(0).align_down(Level::Pml4.span());
    let refused = scene.ask_to_write(va, Level::Pml4, entry);
    scene.refused(refused, Rule::UserAccess, frame);
}

#[test]
fn a_write_that_does_not_say_what_was_there_or_where_is_refused() {
    let mut scene = scene(1);
    let frame = scene.block(1).start();
    let va = direct_map(frame.gpa());
    let good = scene.run_of(va, Level::Pd, 1, Entry::EMPTY);
    let TableOp::Write { at, write } = good else { panic!() };
    let with = |at, write| TableOp::Write { at, write };
    let lie = EntryWrite { old: Entry::EMPTY, ..write };
    let refused = scene.ask(0, &with(at, lie));
    scene.refused(refused, Rule::TraceHonesty, frame);
    // Another address, an unknown root.
    for write in [
        EntryWrite { va: va.wrapping_add(1 << 30), ..write },
        EntryWrite { root: Gpa(0x1000), ..write },
    ] {
        let refused = scene.ask(0, &with(at, write));
        scene.refused(refused, Rule::TraceHonesty, at.frame());
    }
    let outside = scene.machine.layout.zone.gpa;
    let refused = scene.ask(0, &with(outside.wrapping_add(at.0 % PAGE_SIZE), write));
    scene.refused(refused, Rule::TableAlias, outside.frame());
    // A table that no root reaches is not written for a registered root.
    let table = scene.machine.new_table();
    let lost = EntryWrite { old: Entry::EMPTY, ..write };
    let refused = scene.ask(0, &with(write.place_in(table), lost));
    scene.refused(refused, Rule::TraceHonesty, table.frame());
    // A CPU that does not run asks for nothing.
    assert_eq!(scene.ask(1, &good), Err(Status::BadState));
    scene.ask(0, &good).unwrap();
}

#[test]
fn a_linked_table_is_not_filled() {
    let mut scene = scene(1);
    let table = locate(&scene.machine, scene.machine.root, window(0), Level::Pt).unwrap();
    let refused = scene.ask_to_fill(table, Entry::EMPTY);
    scene.refused(refused, Rule::TraceHonesty, table.frame());
    let outside = scene.machine.layout.zone.gpa;
    let refused = scene.ask_to_fill(outside, Entry::EMPTY);
    scene.refused(refused, Rule::TableAlias, outside.frame());
}

#[test]
fn a_root_is_registered_only_if_what_it_maps_keeps_the_rules() {
    let mut scene = scene(1);
    let block = scene.block(1);
    let copy = scene.ask_for_root();
    scene.seal_block(block);
    scene.audit.register_root(copy, 1, &scene.machine).unwrap();
    let bad = scene.ask_for_root();
    let (pdpt, pd) = (scene.machine.new_table(), scene.machine.new_table());
    let link = |table: Gpa| Entry::new(table.frame(), Entry::TABLE);
    scene.ask_for_word(bad, link(pdpt)).unwrap();
    scene.ask_for_word(pdpt, link(pd)).unwrap();
    scene.ask_for_word(pd, Entry::new(block.start(), BLOCK_ENTRY)).unwrap();
    assert_eq!(scene.audit.register_root(bad, 2, &scene.machine), Err(Status::BadRoot));
    scene.assert_found(Rule::ForeignAlias, block.start());
    assert_eq!(scene.found().len(), 1);
    scene.quiesce();
    assert_eq!(scene.found().len(), 1, "it is not registered");
}

/// Frames that follow each other, at addresses that follow each other, in windows of two CPUs.
#[test]
fn a_run_of_leaves_ends_with_its_table() {
    for owner in [0, 1] {
        let mut scene = scene(2);
        let block = scene.block(1);
        scene.seal_block(block);
        let first = FrameRange::single(block.start());
        let next = FrameRange::single(block.start().wrapping_add(1));
        for (frames, cpu) in [(first, 0), (next, owner)] {
            scene.op(cpu, OpKind::Open, frames).unwrap();
        }
        let root = scene.ask_for_root();
        let link = |table: Gpa| Entry::new(table.frame(), Entry::TABLE);
        let [pdpt, low, high, last, start] = [(); 5].map(|()| scene.machine.new_table());
        for (table, index, entry) in [
            (root, Level::Pml4.index(window(0)), link(pdpt)),
            (pdpt, 0, link(low)),
            (pdpt, 1, link(high)),
            (low, 511, link(last)),
            (high, 0, link(start)),
            (last, 511, window_entry(first.start())),
            (start, 0, window_entry(next.start())),
        ] {
            scene.ask_for_word(table.wrapping_add(8 * index), entry).unwrap();
        }
        let answer = scene.audit.register_root(root, 1, &scene.machine);
        if owner == 1 {
            assert_eq!(answer, Ok(()), "each frame is open on the CPU of its window");
        } else {
            assert_eq!(answer, Err(Status::BadRoot));
            scene.assert_found(Rule::ForeignAlias, next.start());
        }
    }
}

#[test]
fn an_open_of_a_frame_that_something_maps_or_may_map_is_refused() {
    // The entry is there.
    let mut scene = scene(1);
    let block = scene.block(1);
    scene.op(0, OpKind::Seal, block).unwrap();
    assert_eq!(scene.op(0, OpKind::Open, block), Err(Refused));
    scene.assert_found(Rule::DirectMapAlias, block.start());
    // It is gone and not flushed, and no seal makes up for that.
    let mut scene = Scene::as_seen(1, Denial::NotEnforced, Mediation::Tables);
    scene.ask_to_write(direct_map(block.start().gpa()), Level::Pd, Entry::EMPTY).unwrap();
    scene.op(0, OpKind::Seal, block).unwrap();
    assert_eq!(scene.op(0, OpKind::Open, block), Err(Refused));
    scene.assert_found(Rule::StaleDirectMap, block.start());
    scene.flush_all(Flush::Everything);
    scene.op(0, OpKind::Open, block).unwrap();
    // Under `trace` a finding changes nothing.
    let mut scene = Scene::new(1);
    scene.op(0, OpKind::Seal, block).unwrap();
    scene.op(0, OpKind::Open, block).unwrap();
    scene.assert_found(Rule::DirectMapAlias, block.start());
}

#[test]
fn a_change_of_the_pool_that_nobody_asked_for_is_found_whatever_is_announced() {
    let mut scene = scene(1);
    let block = scene.block(1);
    let va = direct_map(block.start().gpa());
    let op = scene.run_of(va, Level::Pd, 1, Entry::EMPTY);
    let TableOp::Write { at, write } = op else { panic!() };
    scene.machine.intents[0] = Some(write);
    // Bits that a walk sets are nobody's.
    let held = scene.machine.read_entry(at).unwrap();
    scene.machine.tables.insert(at.0, held.0 ^ Entry::DIRTY);
    scene.quiesce();
    scene.assert_clean(&[]);
    scene.machine.tables.insert(at.0, held.0 | 1 << 9);
    scene.quiesce();
    scene.assert_found(Rule::TraceHonesty, at.frame());
}

#[test]
fn registers_are_judged_whenever_a_cpu_comes_out() {
    let mut scene = scene(1);
    let state = scene.machine.cpus[0].unwrap();
    scene.audit.sample(0, 1, &scene.machine);
    assert_eq!(scene.checked(Rule::ControlState), 2);
    scene.assert_clean(&[]);
    for (wrong, name) in [
        (CpuState { cr0: state.cr0 & !ControlPolicy::CR0_WP, ..state }, "CR0"),
        (CpuState { cr3: 0x5000, ..state }, "CR3"),
    ] {
        scene.machine.cpus[0] = Some(wrong);
        scene.audit.sample(0, 2, &scene.machine);
        scene.audit.sample(0, 3, &scene.machine);
        let result = scene.audit.result();
        assert!(result.findings.last().unwrap().detail.starts_with(name));
    }
    assert_eq!(scene.found().len(), 2, "each is found once");
    let checked = scene.checked(Rule::ControlState);
    scene.machine.cpus[0] = None;
    scene.audit.sample(0, 4, &scene.machine);
    assert_eq!(scene.checked(Rule::ControlState), checked);
}
