//! What holds for any sequence of events: the index, the obligations, determinism, no panic.

use super::super::tlb::{Duty, Tag, only};
use super::*;
use lacuna_abi::gate::OpKind;
use proptest::prelude::*;

const PAGES: u64 = 24;

/// One step of a guest that maps and unmaps direct-map and window entries.
#[derive(Clone, Debug)]
enum Step {
    Map { cpu: u8, slot: u64, count: u32, frame: u64, flags: u64 },
    Clear { cpu: u8, slot: u64, count: u32 },
    Split { block: u64, whole: bool },
    Flush { cpu: u8, flush: Flush },
}

fn flush() -> impl Strategy<Value = Flush> {
    prop_oneof![
        Just(Flush::NonGlobal),
        Just(Flush::Everything),
        (0..PAGES, 1u32..6).prop_map(|(slot, count)| Flush::Pages {
            va: small(slot),
            count,
            level: Level::Pt
        }),
        (0..4u64, 1u32..3, 0..PAGES).prop_map(|(block, count, slot)| Flush::Pages {
            va: direct_map(Gpa(0x1_0000_0000 + block * BLOCK_SIZE + slot * PAGE_SIZE)),
            count,
            level: Level::Pd
        }),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let flags =
        prop_oneof![Just(Entry::DATA), Just(Entry::DATA | Entry::GLOBAL), Just(Entry::READ_ONLY)];
    prop_oneof![
        3 => (0..2u8, 0..PAGES, 1u32..6, 0..PAGES, flags).prop_map(
            |(cpu, slot, count, frame, flags)| Step::Map { cpu, slot, count, frame, flags }
        ),
        3 => (0..2u8, 0..PAGES, 1u32..6)
            .prop_map(|(cpu, slot, count)| Step::Clear { cpu, slot, count }),
        1 => (0..4u64, any::<bool>()).prop_map(|(block, whole)| Step::Split { block, whole }),
        2 => (0..2u8, flush()).prop_map(|(cpu, flush)| Step::Flush { cpu, flush }),
    ]
}

/// A small entry of the direct map: block 5 is split for this.
fn small(slot: u64) -> Gva {
    direct_map(Gpa(0x1_0000_0000 + 5 * BLOCK_SIZE + slot * PAGE_SIZE))
}

/// Runs of entries whose old values do not follow each other are recorded one by one.
fn write_each(scene: &mut Scene, cpu: u8, va: Gva, count: u32, new: Entry) {
    for index in 0..u64::from(count) {
        let va = va.wrapping_add(index * PAGE_SIZE);
        scene.write(cpu, va, Level::Pt, 1, new.nth_of_run(Level::Pt, index));
    }
}

fn prepared(cpus: usize) -> Scene {
    let mut scene = Scene::new(cpus);
    let table = scene.machine.new_table();
    scene.write(0, small(0), Level::Pd, 1, Entry::new(table.frame(), Entry::TABLE));
    scene.flush_all(Flush::Everything);
    scene
}

fn carry_out(scene: &mut Scene, step: &Step, cpus: u8) {
    let zone = scene.machine.layout.zone_frames().start();
    match *step {
        Step::Map { cpu, slot, count, frame, flags } => {
            let new = Entry::new(zone.wrapping_add(frame), flags);
            write_each(scene, cpu % cpus, small(slot), count, new);
        }
        Step::Clear { cpu, slot, count } => {
            write_each(scene, cpu % cpus, small(slot), count, Entry::EMPTY);
        }
        Step::Split { block, whole } => {
            let frames = scene.block(block);
            let va = direct_map(frames.start().gpa());
            let new = if whole {
                Entry::new(frames.start(), BLOCK_ENTRY | Entry::GLOBAL)
            } else {
                // The one table of small entries, shared: what it maps shows up here too.
                let place = locate(&scene.machine, scene.machine.root, small(0), Level::Pd);
                scene.machine.read_entry(place.unwrap()).unwrap()
            };
            scene.write(0, va, Level::Pd, 1, new);
        }
        Step::Flush { cpu, flush } => scene.flush(cpu % cpus, flush),
    }
}

/// The same as the obligations, obviously right: one entry for each page and CPU, and every flush
/// looks at all of them.
#[derive(Default)]
struct Reference {
    stale: BTreeMap<(u8, Gva, Gfn, bool), u64>,
}

impl Reference {
    fn revoke(&mut self, cpus: u8, va: Gva, old: Entry, new: Entry, seq: u64) {
        let lost = |bit| old.has(bit) && !new.has(bit);
        let gone = !new.is_present()
            || new.frame(Level::Pt) != old.frame(Level::Pt)
            || lost(Entry::WRITABLE)
            || old.has(Entry::GLOBAL) != new.has(Entry::GLOBAL);
        if old.is_present() && gone {
            for cpu in 0..cpus {
                let key = (cpu, va, old.frame(Level::Pt), old.has(Entry::GLOBAL));
                self.stale.insert(key, seq);
            }
        }
    }

    fn flush(&mut self, by: u8, flush: Flush) {
        let named: BTreeSet<u64> = match flush {
            Flush::Pages { va, count, level } => {
                (0..u64::from(count)).map(|i| (va.0 + i * level.span()) >> 12).collect()
            }
            _ => BTreeSet::new(),
        };
        self.stale.retain(|(cpu, va, _, global), _| {
            *cpu != by
                || match flush {
                    Flush::Everything => false,
                    Flush::NonGlobal | Flush::Pcid(_) | Flush::AllPcids => *global,
                    Flush::PageOfPcid { .. } => true,
                    Flush::Pages { .. } => !named.contains(&(va.0 >> 12)),
                }
        });
    }

    fn discharge(&mut self, frames: FrameRange) {
        self.stale.retain(|(_, _, frame, _), _| !frames.contains(*frame));
    }
}

/// The obligations taken apart into pages and CPUs.
fn taken_apart(scene: &Scene, cpus: u8) -> BTreeSet<(u8, Gva, Gfn, bool)> {
    let everything = FrameRange::new(Gfn(0), 1 << 40).unwrap();
    let duties = scene.audit.tlb.of_frames(everything);
    let mut pages = BTreeSet::new();
    for Duty { va, frames, tag, cpus: left, .. } in duties {
        let global = tag == Tag::Global;
        for (index, frame) in (0..).zip(frames.iter()) {
            for cpu in (0..cpus).filter(|cpu| left & only(*cpu) != 0) {
                pages.insert((cpu, va.wrapping_add(index * PAGE_SIZE), frame, global));
            }
        }
    }
    pages
}

/// A record with arbitrary but well-formed words, or anything at all in its fields.
fn hostile() -> impl Strategy<Value = Record> {
    let place = prop_oneof![
        any::<u64>(),
        (0..1u64 << 20).prop_map(|p| lacuna_abi::layout::MERMAP.0 + (p << 12)),
        (0..1u64 << 24).prop_map(|p| lacuna_abi::layout::DIRECT_MAP.0 + (p << 12)),
    ];
    let entry = prop_oneof![
        any::<u64>(),
        Just(0),
        (0..1u64 << 21, any::<u16>())
            .prop_map(|(frame, flags)| frame << 12 | u64::from(flags & 0xfff) | Entry::PRESENT),
    ];
    let frames = (0..1u64 << 22, 1..1u64 << 14)
        .prop_map(|(start, count)| FrameRange::new(Gfn(start), count).unwrap());
    let write = (place.clone(), 1u8..5, 0u32..600, entry.clone(), entry, any::<bool>()).prop_map(
        |(va, level, count, old, new, aligned)| {
            let level = Level::from_number(level).unwrap();
            let va = if aligned { Gva(va).align_down(level.span()) } else { Gva(va) };
            let root = Machine::new(1).root;
            let (old, new) = (Entry(old), Entry(new));
            Event::EntryWrite(EntryWrite { root, pcid: 0, va, level, count, old, new, grant: 0 })
        },
    );
    let lives =
        [Life::Pooled, Life::PooledZero, Life::HandedOutZero, Life::Freed, Life::TableFreed];
    let event = prop_oneof![
        4 => write,
        1 => (place, any::<u32>(), 1u8..5).prop_map(|(va, count, level)| {
            let level = Level::from_number(level).unwrap();
            Event::Flush(Flush::Pages { va: Gva(va), count, level })
        }),
        1 => (0..lives.len(), frames).prop_map(move |(life, f)| Event::Life(lives[life], f)),
        1 => (any::<u64>(), any::<u16>(), any::<bool>()).prop_map(|(root, pcid, no_flush)| {
            Event::RootLoad { root: Gpa(root), pcid, no_flush }
        }),
    ];
    (any::<u64>(), 0u8..4, event).prop_map(|(seq, cpu, event)| Record { seq, cpu, site: 0, event })
}

fn op() -> impl Strategy<Value = Op> {
    let kinds = [OpKind::Seal, OpKind::Open, OpKind::Release];
    let start = prop_oneof![0..1u64 << 40, (1u64 << 20)..(1 << 20) + 4096];
    let count = prop_oneof![1..1u64 << 40, 1..600u64];
    (0..3usize, start, count).prop_filter_map("exists", move |(kind, start, count)| {
        Some(Op { kind: kinds[kind], frames: FrameRange::new(Gfn(start), count)? })
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    #[test]
    fn the_index_follows_tables_that_are_linked_and_unlinked(
        links in prop::collection::vec((0..4u64, any::<bool>()), 0..20),
    ) {
        let mut scene = prepared(1);
        write_each(&mut scene, 0, small(0), 5, Entry::new(Gfn(0x10_0000), Entry::DATA));
        for (block, whole) in links {
            carry_out(&mut scene, &Step::Split { block, whole }, 1);
        }
        scene.quiesce();
        prop_assert_eq!(scene.audit.result().tally(Rule::TraceHonesty).violations, 0);
    }

    #[test]
    fn obligations_agree_with_the_slow_reference(
        cpus in 1u8..3,
        steps in prop::collection::vec((step(), prop::option::of((0..PAGES, 1..9u64))), 0..60),
    ) {
        let mut scene = prepared(usize::from(cpus));
        let mut reference = Reference::default();
        for (step, sealed) in steps {
            match step {
                Step::Map { .. } | Step::Clear { .. } => {
                    let entry = |scene: &Scene, slot: u64| {
                        let place = locate(&scene.machine, scene.machine.root, small(slot), Level::Pt);
                        scene.machine.read_entry(place.unwrap()).unwrap()
                    };
                    let before: Vec<_> = (0..PAGES + 8).map(|s| entry(&scene, s)).collect();
                    carry_out(&mut scene, &step, cpus);
                    for (slot, old) in (0..).zip(before) {
                        let new = entry(&scene, slot);
                        reference.revoke(cpus, small(slot), old, new, scene.seq);
                    }
                }
                Step::Flush { cpu, flush } => {
                    carry_out(&mut scene, &step, cpus);
                    reference.flush(cpu % cpus, flush);
                }
                Step::Split { .. } => {}
            }
            if let Some((frame, count)) = sealed {
                let start = scene.machine.layout.zone_frames().start().wrapping_add(frame);
                let frames = FrameRange::new(start, count).unwrap();
                scene.audit.tlb.discharge(frames, u64::MAX).unwrap();
                reference.discharge(frames);
            }
            let expected: BTreeSet<_> = reference.stale.keys().copied().collect();
            prop_assert_eq!(taken_apart(&scene, cpus), expected);
        }
    }

    #[test]
    fn the_same_events_give_the_same_findings(
        steps in prop::collection::vec(step(), 0..40), sealed in 0..6u64,
    ) {
        let run = || {
            let mut scene = prepared(2);
            steps.iter().for_each(|step| carry_out(&mut scene, step, 2));
            let block = scene.block(sealed);
            scene.op(0, OpKind::Seal, block).unwrap();
            scene.op(1, OpKind::Open, first(block, 7)).unwrap();
            scene.quiesce();
            scene.audit.result()
        };
        prop_assert_eq!(run(), run());
    }

    #[test]
    fn no_record_and_no_operation_makes_the_audit_panic(
        records in prop::collection::vec((hostile(), op(), 0u8..3), 0..40),
    ) {
        let mut scene = Scene::new(2);
        for (record, op, cpu) in records {
            scene.audit.event(&record, &scene.machine);
            if scene.audit.arrival(cpu, op, record.seq, &scene.machine).is_ok() {
                scene.audit.done(cpu, op, record.seq, &scene.machine);
            }
        }
        scene.quiesce();
        prop_assert!(scene.audit.result().findings.len() <= 100);
    }
}
