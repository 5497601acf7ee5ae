//! Guests of chance: whatever they ask for, memory keeps the rules, looked at without the audit's copy.

use super::*;
use lacuna_abi::layout::Place;
use lacuna_abi::walk::{EVERYTHING, Leaf, Visit, visit};
use proptest::prelude::*;

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
                Place::Window(owner) => u8::try_from(owner).ok(),
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
        let of = |leaf: &Leaf| FrameRange::new(leaf.frame(), leaf.frames()).unwrap();
        for code in leaves.iter().filter(|leaf| leaf.executable) {
            let written = |leaf: &&Leaf| leaf.writable;
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
