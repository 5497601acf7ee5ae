//! Direct paging: whatever a guest asks for, what is written keeps the rules, and what would break one
//! is refused and found.

use super::*;
use lacuna_abi::addr::Gfn;
use lacuna_abi::direct::TableOp;
use lacuna_abi::event::TableFill;
use lacuna_abi::gate::Status::Refused;
use lacuna_abi::walk::{EVERYTHING, Visit, visit};
use proptest::prelude::*;

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

/// What a guest may ask for, by numbers.
#[derive(Clone, Copy, Debug)]
enum Act {
    /// Place, frame, flags; whether the old value is said truly.
    Write(u8, u8, u16, bool),
    /// Place, table.
    Link(u8, u8),
    /// Table, frame, flags.
    Fill(u8, u8, u16),
    Root(u8),
    Seal(u8),
    Open(u8, bool),
    Release(u8),
    Flush(bool),
}

fn act() -> impl Strategy<Value = Act> {
    let byte = any::<u8>;
    prop_oneof![
        4 => (byte(), byte(), any::<u16>(), prop::bool::weighted(0.9))
            .prop_map(|(place, frame, flags, truly)| Act::Write(place, frame, flags, truly)),
        3 => (byte(), byte()).prop_map(|(place, table)| Act::Link(place, table)),
        2 => (byte(), byte(), any::<u16>()).prop_map(|(t, f, flags)| Act::Fill(t, f, flags)),
        1 => byte().prop_map(Act::Root),
        1 => byte().prop_map(Act::Seal),
        2 => (byte(), any::<bool>()).prop_map(|(frame, cpu)| Act::Open(frame, cpu)),
        1 => byte().prop_map(Act::Release),
        2 => any::<bool>().prop_map(Act::Flush),
    ]
}

/// Pages of the pool that the random guest uses: those of the first tables and some more.
const PAGES: u64 = 24;

fn entry_of(scene: &Scene, frame: u8, flags: u16) -> Entry {
    let layout = &scene.machine.layout;
    let offset = u64::from(frame % 8);
    let start = match frame / 8 % 6 {
        0 => layout.image.gpa.frame(),
        1 => layout.pool.gpa.frame(),
        2 | 3 => scene.block(1).start(),
        4 => scene.block(2).start(),
        _ => layout.shared.gpa.frame(),
    };
    let bit = |bit: u32, of: u64| if flags >> bit & 1 == 1 { of } else { 0 };
    let present = if flags % 16 == 15 { 0 } else { Entry::PRESENT };
    let user = if flags >> 8 & 7 == 7 { Entry::USER } else { 0 };
    let rights = bit(5, Entry::WRITABLE) | bit(6, Entry::NO_EXECUTE) | bit(7, Entry::GLOBAL);
    Entry::new(start.wrapping_add(offset), present | user | rights | bit(11, Entry::PAGE_SIZE))
}

/// A place of an entry in one of the tables, by root and address where it is linked.
fn place_of(scene: &Scene, place: u8) -> (Gva, Level) {
    let zone = direct_map(scene.block(1).start().gpa());
    let offset = u64::from(place >> 4);
    match place % 8 {
        0 => (window(0).wrapping_add(offset * PAGE_SIZE), Level::Pt),
        1 => (window(1).wrapping_add(offset * PAGE_SIZE), Level::Pt),
        2 | 3 => (zone.wrapping_add((offset % 3) * BLOCK_SIZE), Level::Pd),
        4 => (zone.wrapping_add(offset * PAGE_SIZE), Level::Pt),
        5 => (IMAGE.wrapping_add((offset % 4) * PAGE_SIZE), Level::Pt),
        6 => (Gva(offset << 39), Level::Pml4),
        _ => (window(0).align_down(1 << 30).wrapping_add(offset << 30), Level::Pdpt),
    }
}

impl Scene {
    fn page_of(&self, table: u8) -> Gpa {
        self.machine.root.wrapping_add(u64::from(table) % PAGES * PAGE_SIZE)
    }

    fn write_at(&mut self, place: u8, new: Entry, truly: bool) {
        let (va, level) = place_of(self, place);
        let root = self.machine.root;
        let Ok(at) = locate(&self.machine, root, va, level) else { return };
        let held = self.machine.read_entry(at).unwrap();
        let old = if truly { held } else { Entry(held.0 ^ Entry::PRESENT) };
        let write = EntryWrite { root, pcid: 0, va, level, count: 1, old, new, grant: 0 };
        let _ = self.ask(0, &TableOp::Write { at, write });
    }

    fn act(&mut self, act: Act) {
        let frames = |scene: &Self, frame: u8| {
            let start = scene.block(1 + u64::from(frame >> 7)).start();
            FrameRange::new(start.wrapping_add(u64::from(frame % 8)), 1 + u64::from(frame >> 6 & 1))
                .unwrap()
        };
        match act {
            Act::Write(place, frame, flags, truly) => {
                let new = entry_of(self, frame, flags);
                self.write_at(place, new, truly);
            }
            Act::Link(place, table) => {
                let new = Entry::new(self.page_of(table).frame(), Entry::TABLE);
                self.write_at(place, new, true);
            }
            Act::Fill(table, frame, flags) => {
                let (table, first) = (self.page_of(table), entry_of(self, frame, flags));
                let level = if flags >> 12 & 1 == 1 { Level::Pd } else { Level::Pt };
                let _ = self.ask(0, &TableOp::Fill(TableFill { table, level, first }));
            }
            Act::Root(table) => {
                let root = self.page_of(table);
                let _ = self.audit.register_root(root, 0, &self.machine);
            }
            Act::Seal(frame) => {
                // An honest one: its entries are gone and flushed before.
                let frames = frames(self, frame);
                let mapped = self.audit.index.of_frames(frames).next().is_some();
                if !mapped {
                    let _ = self.op(0, OpKind::Seal, frames);
                }
            }
            Act::Open(frame, cpu) => {
                let _ = self.op(u8::from(cpu), OpKind::Open, frames(self, frame));
            }
            Act::Release(frame) => {
                let _ = self.op(0, OpKind::Release, frames(self, frame));
            }
            Act::Flush(all) => {
                self.flush_all(if all { Flush::Everything } else { Flush::NonGlobal });
            }
        }
    }

    /// The rules about mappings, of every leaf that memory holds, looked at without the audit's copy.
    fn look_at_memory(&self) {
        let layout = &self.machine.layout;
        let mut leaves = Vec::new();
        for (root, _) in &self.audit.roots {
            let ended = visit(&self.machine, *root, EVERYTHING, 1 << 12, &mut |met| match met {
                Visit::Leaf(leaf) => leaves.push(leaf),
                Visit::Table { .. } => {}
                Visit::Unreadable { at, .. } => panic!("{at} leads out of the pool"),
            });
            assert!(ended.is_ok(), "the tables of {root} have no end");
        }
        let frames = self.audit.frames();
        for leaf in &leaves {
            let mapped = FrameRange::new(leaf.frame(), leaf.frames()).unwrap();
            let pool = layout.pool.frames().unwrap();
            assert!(pool.intersection(mapped).is_none(), "a table is mapped: {leaf:?}");
            let place = layout.place_of(leaf.va);
            let owner = match place {
                lacuna_abi::layout::Place::Window(owner) => u8::try_from(owner).ok(),
                _ => None,
            };
            assert!(owner.is_none() || !leaf.global(), "a window is global: {leaf:?}");
            let zone = layout.zone_frames();
            for frame in mapped.intersection(zone).into_iter().flat_map(FrameRange::iter) {
                let open = owner.is_some_and(|owner| frames.open_count(frame, owner) > 0);
                assert!(!frames.is_secret(frame) || open, "{frame} is secret: {leaf:?}");
            }
            assert!(!leaf.user, "ring 3 reaches {leaf:?}");
            assert!(!(leaf.writable && leaf.executable), "{leaf:?}");
            let text = FrameRange::single(layout.image.gpa.frame());
            assert!(!leaf.writable || text.intersection(mapped).is_none(), "text: {leaf:?}");
        }
        let of =
            |leaf: &lacuna_abi::walk::Leaf| FrameRange::new(leaf.frame(), leaf.frames()).unwrap();
        for code in leaves.iter().filter(|leaf| leaf.executable) {
            let written = |leaf: &&lacuna_abi::walk::Leaf| leaf.writable;
            for data in leaves.iter().filter(written) {
                assert!(of(code).intersection(of(data)).is_none(), "{code:?}, {data:?}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn whatever_is_asked_for_memory_keeps_the_rules(acts in prop::collection::vec(act(), 1..60)) {
        let mut scene = scene(2);
        for act in acts {
            scene.act(act);
            scene.look_at_memory();
        }
        let found = |scene: &Scene| {
            let result = scene.audit.result();
            let of = |rule: &Rule| result.tally(*rule).violations;
            [Rule::TraceHonesty, Rule::DirectMapAlias, Rule::ForeignAlias, Rule::GlobalWindow]
                .map(|rule| of(&rule))
        };
        let before = found(&scene);
        scene.quiesce();
        prop_assert_eq!(found(&scene), before, "the copy is what memory holds");
    }
}
