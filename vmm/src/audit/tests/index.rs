//! The index against a full walk of memory, whatever is linked where.

use super::super::index::{Mapping, TableAt, walk};
use super::*;
use lacuna_abi::event::TableFill;
use lacuna_abi::layout::WINDOW_LARGE_OFFSET;
use lacuna_abi::walk::EVERYTHING;
use proptest::prelude::*;

/// The one table of small entries that is linked at several places.
const SHARED_BLOCK: u64 = 5;
/// Where a root leads to itself.
const LOOP: Gva = Gva(5 << 39);

#[derive(Clone, Debug)]
enum Step {
    /// Small entries of the shared table, or of a window.
    Small { window: bool, slot: u64, count: u32, frame: u64, flags: u64 },
    /// A 2 MiB entry of the direct map or of a window: whole, of any block.
    Large { window: bool, slot: u64, block: u64, flags: u64 },
    /// A 2 MiB entry becomes the shared table.
    Share { window: bool, slot: u64 },
    /// A pageblock of the direct map is split through a fresh table, filled on record or not.
    Split { slot: u64, recorded: bool },
    /// Another root, which shares all tables below.
    Root,
    /// The last such root goes.
    Unroot,
    /// The root leads to itself, or no more.
    Loop { there: bool },
    /// Memory and records are compared.
    Quiesce,
}

fn step() -> impl Strategy<Value = Step> {
    let flags = prop_oneof![
        4 => Just(Entry::DATA),
        2 => Just(Entry::DATA | Entry::GLOBAL),
        1 => Just(Entry::READ_ONLY),
        1 => Just(Entry::TEXT),
        1 => Just(Entry::DATA | Entry::USER),
        3 => Just(0),
    ];
    let flags = flags.boxed();
    prop_oneof![
        6 => (any::<bool>(), 0..512u64, 1..9u32, 0..4096u64, flags.clone()).prop_map(
            |(window, slot, count, frame, flags)| Step::Small { window, slot, count, frame, flags }
        ),
        4 => (any::<bool>(), 0..8u64, 0..8u64, flags).prop_map(
            |(window, slot, block, flags)| Step::Large { window, slot, block, flags }
        ),
        2 => (any::<bool>(), 0..8u64).prop_map(|(window, slot)| Step::Share { window, slot }),
        2 => (0..8u64, any::<bool>()).prop_map(|(slot, recorded)| Step::Split { slot, recorded }),
        1 => Just(Step::Root),
        1 => Just(Step::Unroot),
        1 => any::<bool>().prop_map(|there| Step::Loop { there }),
        1 => Just(Step::Quiesce),
    ]
}

/// A scene, its further roots, and the table that is shared.
struct Tree {
    scene: Scene,
    roots: Vec<Gpa>,
    shared: Gpa,
}

impl Tree {
    fn new() -> Self {
        let mut scene = Scene::new(2);
        let shared = scene.machine.new_table();
        let roots = vec![scene.machine.root];
        let mut tree = Self { scene, roots, shared };
        tree.write(
            tree.large(false, SHARED_BLOCK),
            Level::Pd,
            Entry::new(shared.frame(), Entry::TABLE),
        );
        tree
    }

    fn large(&self, window_part: bool, slot: u64) -> Gva {
        if window_part {
            return window(1).wrapping_add(WINDOW_LARGE_OFFSET + slot * BLOCK_SIZE);
        }
        direct_map(self.scene.machine.layout.zone.gpa.wrapping_add(slot * BLOCK_SIZE))
    }

    fn frame(&self, number: u64) -> Gfn {
        self.scene.machine.layout.zone_frames().start().wrapping_add(number)
    }

    /// Stores an entry with its record.
    fn write(&mut self, va: Gva, level: Level, new: Entry) {
        self.scene.write(0, va, level, 1, new);
    }

    fn carry_out(&mut self, step: &Step) {
        match *step {
            Step::Small { window: in_window, slot, count, frame, flags } => {
                let first = if in_window { window(0) } else { self.large(false, SHARED_BLOCK) };
                let machine = &self.scene.machine;
                if locate(machine, machine.root, first, Level::Pt).is_err() {
                    return;
                }
                for index in 0..u64::from(count).min(512 - slot) {
                    let va = first.wrapping_add((slot + index) * PAGE_SIZE);
                    let new = Entry::new(self.frame(frame + index), flags);
                    self.write(va, Level::Pt, if flags == 0 { Entry::EMPTY } else { new });
                }
            }
            Step::Large { window, slot, block, flags } => {
                let new = Entry::new(self.frame(block * BLOCK_FRAMES), flags | Entry::PAGE_SIZE);
                let new = if flags == 0 { Entry::EMPTY } else { new };
                self.write(self.large(window, slot), Level::Pd, new);
            }
            Step::Share { window, slot } => {
                let new = Entry::new(self.shared.frame(), Entry::TABLE);
                self.write(self.large(window, slot), Level::Pd, new);
            }
            Step::Split { slot, recorded } => {
                let table = self.scene.machine.new_table();
                let first = Entry::new(self.frame(slot * BLOCK_FRAMES), Entry::DATA);
                let fill = TableFill { table, level: Level::Pt, first };
                for index in 0..512 {
                    self.scene.machine.tables.insert(table.0 + 8 * index, fill.entry(index).0);
                }
                if recorded {
                    self.scene.record(0, Event::TableFill(fill));
                }
                self.write(
                    self.large(false, slot),
                    Level::Pd,
                    Entry::new(table.frame(), Entry::TABLE),
                );
            }
            Step::Root if self.roots.len() < 4 => {
                let root = self.scene.machine.clone_root();
                self.scene.audit.register_root(root, 1, &self.scene.machine).unwrap();
                self.roots.push(root);
            }
            Step::Unroot if self.roots.len() > 1 => {
                let root = self.roots.pop().unwrap();
                self.scene.audit.unregister_root(root).unwrap();
            }
            Step::Root | Step::Unroot => {}
            Step::Loop { there } => {
                let root = Entry::new(self.roots[0].frame(), Entry::TABLE);
                self.write(LOOP, Level::Pml4, if there { root } else { Entry::EMPTY });
            }
            Step::Quiesce => self.scene.quiesce(),
        }
    }

    /// Leaves and tables of all roots by a walk of memory.
    fn walked(&self) -> (Vec<Mapping>, Vec<TableAt>) {
        let (mut leaves, mut tables) = (Vec::new(), Vec::new());
        for root in &self.roots {
            let walked = walk(&self.scene.machine, *root, 100_000);
            leaves.extend(walked.mappings());
            tables.extend(walked.tables);
        }
        (leaves, tables)
    }
}

/// Mappings in an order of their own, whenever they were granted.
fn sorted(mappings: impl Iterator<Item = Mapping>) -> Vec<String> {
    let plain = mappings.map(|mapping| format!("{:?}", Mapping { since: 0, ..mapping }));
    let mut plain: Vec<_> = plain.collect();
    plain.sort_unstable();
    plain
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn the_index_says_what_a_full_walk_says(steps in prop::collection::vec(step(), 0..24)) {
        let mut tree = Tree::new();
        for step in &steps {
            tree.carry_out(step);
        }
        let (leaves, tables) = tree.walked();
        let index = &tree.scene.audit.index;
        let known = tree.roots.iter().flat_map(|root| index.in_span(*root, EVERYTHING));
        prop_assert_eq!(sorted(known), sorted(leaves.iter().copied()));
        for block in 0..8 {
            for (first, count) in [(0, 512), (3, 1), (100, 50)] {
                let start = tree.frame(block * BLOCK_FRAMES + first);
                let frames = FrameRange::new(start, count).unwrap();
                let mapped: Vec<_> = leaves
                    .iter()
                    .copied()
                    .filter(|leaf| leaf.frames().intersection(frames).is_some())
                    .collect();
                prop_assert_eq!(sorted(index.of_frames(frames)), sorted(mapped.iter().copied()));
                let writable = mapped.iter().any(|leaf| leaf.rights.writable);
                prop_assert_eq!(index.writable(frames).is_some(), writable);
                let executable = mapped.iter().any(|leaf| leaf.rights.executable);
                prop_assert_eq!(index.executable(frames).is_some(), executable);
            }
        }
        for table in &tables {
            prop_assert!(index.is_linked_at(table.frame, table.root, table.va));
        }
        let linked: BTreeSet<_> = tables.iter().map(|table| table.frame).collect();
        let pool = tree.scene.machine.layout.pool.frames().unwrap();
        let known: BTreeSet<_> =
            pool.iter().filter(|f| index.table_at(FrameRange::single(*f)).is_some()).collect();
        prop_assert_eq!(known, linked);
        let layout = &tree.scene.machine.layout;
        let count = |wanted: &dyn Fn(&Mapping) -> bool| {
            u64::try_from(leaves.iter().filter(|leaf| wanted(leaf)).count()).unwrap()
        };
        let totals = index.totals();
        prop_assert_eq!(totals.leaves, count(&|_| true));
        let direct = |leaf: &Mapping| {
            layout.place_of(leaf.va) == lacuna_abi::layout::Place::DirectMap
        };
        prop_assert_eq!(totals.in_direct_map, count(&direct));
        let of_pool = |leaf: &Mapping| leaf.frames().intersection(pool).is_some();
        prop_assert_eq!(totals.of_pool, count(&of_pool));
        let of_guest = |leaf: &Mapping| {
            let touches = |frames: FrameRange| frames.intersection(leaf.frames()).is_some();
            layout.regions().iter().any(|(_, region)| region.frames().is_some_and(touches))
        };
        prop_assert_eq!(totals.of_guest, count(&of_guest));
        tree.scene.quiesce();
        let result = tree.scene.audit.result();
        prop_assert_eq!(result.tally(Rule::TraceHonesty).violations, 0, "{:?}", result.findings);
        // A root that leads to itself is reached at more places than are kept once it is revoked.
        let loops = steps.iter().any(|step| matches!(step, Step::Loop { .. }));
        let bound = |why: &&String| loops && why.starts_with("more revoked translations");
        let others: Vec<_> = result.inconclusive.iter().filter(|why| !bound(why)).collect();
        prop_assert_eq!(others, Vec::<&String>::new());
    }

    #[test]
    fn after_a_lie_the_index_follows_memory(
        steps in prop::collection::vec(step(), 0..12),
        entries in prop::collection::vec((any::<bool>(), 1..512u64, 0..4096u64), 1..6),
        links in prop::collection::vec((any::<bool>(), 0..8u64), 0..3),
    ) {
        let mut tree = Tree::new();
        for step in &steps {
            tree.carry_out(step);
        }
        tree.scene.quiesce();
        let before = tree.scene.audit.result().tally(Rule::TraceHonesty).violations;
        for (in_window, slot) in &links {
            let shared = Entry::new(tree.shared.frame(), Entry::TABLE);
            tree.scene.store(tree.large(*in_window, *slot), Level::Pd, 1, shared);
        }
        // At least one entry is not what it was.
        for (_, slot, frame) in &entries {
            let new = Entry::new(tree.frame(*frame), Entry::DATA);
            tree.scene.store(window(0).wrapping_add(slot * PAGE_SIZE), Level::Pt, 1, new);
        }
        let root = tree.scene.machine.root;
        let place = locate(&tree.scene.machine, root, window(0), Level::Pt).unwrap();
        *tree.scene.machine.tables.entry(place.0).or_default() ^= Entry::PRESENT;
        tree.scene.quiesce();
        let found = tree.scene.audit.result().tally(Rule::TraceHonesty).violations;
        prop_assert!(found > before);
        tree.scene.quiesce();
        let again = tree.scene.audit.result().tally(Rule::TraceHonesty).violations;
        prop_assert_eq!(again, found);
        let (leaves, _) = tree.walked();
        let index = &tree.scene.audit.index;
        let known = tree.roots.iter().flat_map(|root| index.in_span(*root, EVERYTHING));
        prop_assert_eq!(sorted(known), sorted(leaves.into_iter()));
    }
}

#[test]
fn a_store_in_a_table_that_two_roots_share_is_owed_by_the_cpus_of_both() {
    let mut scene = Scene::new(2);
    let other = scene.machine.clone_root();
    scene.audit.register_root(other, 0, &scene.machine).unwrap();
    scene.record(1, Event::RootLoad { root: other, pcid: 0, no_flush: false });
    scene.flush(1, Flush::Everything);
    let block = scene.block(1);
    scene.unmap_block(block);
    scene.flush(0, Flush::Everything);
    scene.op(0, OpKind::Seal, block).unwrap();
    let findings = scene.audit.result().findings;
    assert!(
        findings.iter().any(|f| f.rule == Rule::StaleDirectMap && f.cpu == Some(1)),
        "{findings:?}"
    );
    scene.quiesce();
    assert_eq!(scene.audit.result().tally(Rule::TraceHonesty).violations, 0);
}

#[test]
fn an_entry_of_a_table_that_is_not_linked_is_a_lie_and_judged() {
    let mut scene = Scene::new(1);
    let block = scene.block(1);
    scene.flip(block);
    let root = scene.machine.root;
    let va = direct_map(block.start().gpa());
    let new = Entry::new(block.start(), Entry::DATA);
    let write = EntryWrite {
        root,
        pcid: 0,
        va,
        level: Level::Pt,
        count: 1,
        old: Entry::EMPTY,
        new,
        grant: 0,
    };
    scene.record(0, Event::EntryWrite(write));
    scene.assert_found(Rule::TraceHonesty, block.start());
    scene.assert_found(Rule::DirectMapAlias, block.start());
    let nothing = EntryWrite { va: va.wrapping_add(PAGE_SIZE), new: Entry::EMPTY, ..write };
    let found = scene.found().len();
    scene.record(0, Event::EntryWrite(nothing));
    assert_eq!(scene.found().len(), found);
}

#[test]
fn a_translation_that_loses_nothing_is_as_old_as_it_was() {
    let mut scene = Scene::new(1);
    let frame = scene.block(1).start();
    let since = |scene: &Scene| {
        let frames = FrameRange::single(frame);
        let of_window = |m: &Mapping| m.va == window(0);
        scene.audit.index.of_frames(frames).find(of_window).map(|mapping| mapping.since)
    };
    let write = |scene: &mut Scene, flags| {
        scene.write(0, window(0), Level::Pt, 1, Entry::new(frame, flags));
        scene.seq
    };
    let granted = write(&mut scene, Entry::READ_ONLY);
    assert_eq!(since(&scene), Some(granted));
    write(&mut scene, Entry::DATA);
    assert_eq!(since(&scene), Some(granted));
    let changed = write(&mut scene, Entry::DATA | Entry::GLOBAL);
    assert_eq!(since(&scene), Some(changed));
    scene.write(0, window(0), Level::Pt, 1, Entry::EMPTY);
    let again = write(&mut scene, Entry::DATA);
    assert_eq!(since(&scene), Some(again));
    let boot = scene.audit.index.of_frames(scene.block(3)).next().map(|mapping| mapping.since);
    assert_eq!(boot, Some(0));
}

#[test]
fn a_table_whose_entry_gets_other_rights_holds_what_records_say_and_not_what_memory_holds_by_then()
{
    let mut scene = Scene::new(1);
    let frame = scene.block(1).start();
    let table = scene.machine.new_table();
    let va = window(0).wrapping_add(WINDOW_LARGE_OFFSET);
    let since = |scene: &Scene| {
        let of_window = |m: &Mapping| m.va == va;
        let frames = FrameRange::single(frame);
        scene.audit.index.of_frames(frames).find(of_window).map(|m| (m.rights.writable, m.since))
    };
    scene.write(0, va, Level::Pd, 1, Entry::new(table.frame(), Entry::TABLE));
    scene.write(0, va, Level::Pt, 1, Entry::new(frame, Entry::DATA));
    let granted = scene.seq;
    assert_eq!(since(&scene), Some((true, granted)));
    // The record of the link is taken when the store behind it has been made as well.
    let read_only = Entry::new(table.frame(), Entry::TABLE & !Entry::WRITABLE);
    let linked = scene.store(va, Level::Pd, 1, read_only);
    let cleared = scene.store(va, Level::Pt, 1, Entry::EMPTY);
    scene.record(0, Event::EntryWrite(linked));
    assert_eq!(since(&scene), Some((false, granted)));
    scene.record(0, Event::EntryWrite(cleared));
    scene.quiesce();
    scene.assert_clean(&[Rule::TraceHonesty]);
}

#[test]
fn a_table_that_two_roots_share_is_unlinked_from_both() {
    let mut scene = Scene::new(2);
    let table = scene.machine.new_table();
    let va = window(0).wrapping_add(WINDOW_LARGE_OFFSET);
    scene.write(0, va, Level::Pd, 1, Entry::new(table.frame(), Entry::TABLE));
    let other = scene.machine.clone_root();
    scene.audit.register_root(other, 0, &scene.machine).unwrap();
    scene.record(1, Event::RootLoad { root: other, pcid: 0, no_flush: false });
    scene.flush(1, Flush::Everything);
    scene.write(0, va, Level::Pd, 1, Entry::EMPTY);
    scene.flush(0, Flush::Everything);
    let paths = scene.audit.tlb.of_table(table.frame());
    assert!(paths.iter().any(|duty| duty.root == other && duty.cpus == 0b10), "{paths:?}");
    // What is written into it from now on may be cached where it was, under either root.
    assert!(scene.audit.tlb.is_stale_table(table.frame()));
    scene.flush(1, Flush::Everything);
    assert!(scene.audit.tlb.of_table(table.frame()).is_empty());
}

#[test]
fn a_link_that_changes_without_a_record_is_a_lie_though_nothing_is_mapped_by_it() {
    let mut scene = Scene::new(1);
    let empty = scene.machine.new_table();
    let va = window(0).wrapping_add(WINDOW_LARGE_OFFSET);
    scene.store(va, Level::Pd, 1, Entry::new(empty.frame(), Entry::TABLE));
    scene.quiesce();
    assert_eq!(scene.audit.result().tally(Rule::TraceHonesty).violations, 1);
    scene.quiesce();
    assert_eq!(scene.audit.result().tally(Rule::TraceHonesty).violations, 1);
}

#[test]
fn accessed_and_dirty_bits_are_nobodys_business() {
    let mut scene = Scene::new(1);
    let root = scene.machine.root;
    let va = direct_map(scene.block(2).start().gpa());
    let place = locate(&scene.machine, root, va, Level::Pd).unwrap();
    *scene.machine.tables.get_mut(&place.0).unwrap() &= !(Entry::ACCESSED | Entry::DIRTY);
    scene.quiesce();
    scene.assert_clean(&[Rule::TraceHonesty]);
}
