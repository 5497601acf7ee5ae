//! The small worlds, and the twins: slips of the model that a walk must find.

use super::super::Profile;
use super::reference::{Act, Pde, Pte};
use super::small::{Small, Walk};
use super::world::{Op, Size, Slip};
use std::collections::BTreeSet;
use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

const SIZE: Size = Size {
    cpus: 2,
    roots: 1,
    tables: 1,
    pages: 2,
    profile: Profile::Intel,
    pge: true,
    pcide: false,
    tce: false,
};

const LINK: Pde = Pde::Table { t: 0, w: true };
const WHOLE: Pde = Pde::Large { g: true, w: true };

fn page(f: usize, g: bool, w: bool) -> Pte {
    Pte::Page { f, g, w }
}

/// All writes of these entries.
fn writes(size: Size, pdes: &[Pde], ptes: &[Pte]) -> Vec<Op> {
    let mut ops = Vec::new();
    for r in 0..size.roots {
        ops.extend(pdes.iter().map(|pde| Op::Pde(r, *pde)));
    }
    for t in 0..size.tables {
        for i in 0..size.pages {
            ops.extend(ptes.iter().map(|pte| Op::Pte(t, i, *pte)));
        }
    }
    ops
}

fn acts(size: Size, acts: &[Act]) -> Vec<Op> {
    (0..size.cpus).flat_map(|cpu| acts.iter().map(move |act| Op::Act(cpu, *act))).collect()
}

fn load(r: usize, p: u16, no_flush: bool) -> Act {
    Act::Load { r, p, no_flush }
}

fn seals(size: Size) -> Vec<Op> {
    (0..size.pages).map(Op::Seal).collect()
}

fn resets(size: Size) -> Vec<Op> {
    (0..size.cpus).flat_map(|cpu| [Op::Start(cpu), Op::Stop(cpu)]).collect()
}

fn small(name: &'static str, size: Size, ops: Vec<Vec<Op>>) -> Small {
    Small { name, size, delayed: false, ops: ops.concat() }
}

/// Loads of two roots under these PCIDs, with bit 63 and without.
fn loads(pairs: &[(usize, u16)]) -> Vec<Act> {
    pairs.iter().flat_map(|(r, p)| [load(*r, *p, false), load(*r, *p, true)]).collect()
}

/// The worlds. Together they have every kind of operation beside every other; a test counts that.
/// CR4.PAE is not among them: long mode cannot be without it.
fn worlds() -> Vec<Small> {
    let one = Size { pages: 1, ..SIZE };
    let kinds = [Pte::Empty, page(0, true, true), page(0, false, true), page(0, false, false)];
    let flushes = [load(0, 0, false), Act::Invlpg(Some(0)), Act::Everything];
    let next = Act::Invlpg(None);
    let two = [Pte::Empty, page(0, true, true), page(1, false, true)];
    let one_cpu = Size { cpus: 1, ..one };
    let alone = Size { pcide: true, ..one_cpu };
    let everything = |pdes: &[Pde], ptes: &[Pte], control: &[Act]| {
        vec![
            writes(alone, pdes, ptes),
            acts(alone, &[load(0, 0, false), load(0, 1, true)]),
            acts(alone, &[Act::Invlpg(Some(0)), Act::Invlpg(None), Act::Everything]),
            acts(alone, &[Act::PageOfPcid(Some(0), 1), Act::Pcid(1), Act::AllPcids]),
            acts(alone, control),
            resets(alone),
            seals(alone),
            vec![Op::GoOn(0)],
        ]
    };
    let registers = [Act::Pge, Act::Pcide, Act::Pg, Act::Smep];
    let no_effect = [Act::Wp, Act::Nxe];
    let tables = Size { tables: 2, ..one };
    let linked = |t, w| Pde::Table { t, w };
    let links = [Pde::Empty, WHOLE, LINK, linked(1, true), linked(0, false)];
    let roots = Size { roots: 2, pcide: true, cpus: 1, ..one };
    let both = Size { cpus: 2, ..roots };
    let invpcid = [
        Act::PageOfPcid(Some(0), 0),
        Act::PageOfPcid(Some(0), 1),
        Act::PageOfPcid(None, 1),
        Act::Pcid(0),
        Act::Pcid(1),
        Act::AllPcids,
    ];
    let reuse = [load(0, 0, false), load(1, 0, true), load(0, 1, true), load(1, 0, false)];
    let global = &kinds[..3];
    let control = Size { pcide: false, ..roots };
    let plain = Size { profile: Profile::Amd, tce: true, ..tables };
    let erratum = Size { profile: Profile::IntelInvlpgErratum, ..both };
    vec![
        small(
            "pages, resets, PGE",
            one,
            vec![
                writes(one, &[LINK], &kinds),
                acts(one, &flushes),
                acts(one, &[Act::AllPcids, Act::Pge, Act::Smep]),
                resets(one),
                seals(one),
            ],
        ),
        small(
            "two pages and frames",
            SIZE,
            vec![
                writes(SIZE, &[LINK], &two),
                acts(SIZE, &flushes),
                acts(SIZE, &[Act::Invlpg(Some(1))]),
                seals(SIZE),
            ],
        ),
        small(
            "split and merge",
            one,
            vec![
                writes(one, &[Pde::Empty, WHOLE, LINK], global),
                acts(one, &flushes),
                acts(one, &[next, Act::Pge]),
                seals(one),
            ],
        ),
        small(
            "tables replaced",
            Size { cpus: 1, ..tables },
            vec![
                writes(tables, &links, global),
                acts(Size { cpus: 1, ..tables }, &flushes),
                acts(Size { cpus: 1, ..tables }, &[next]),
                seals(tables),
            ],
        ),
        small(
            "roots that share a PCID",
            roots,
            vec![
                writes(roots, &[Pde::Empty, LINK], global),
                acts(roots, &reuse),
                acts(roots, &flushes[1..]),
                acts(roots, &[next, Act::Pcid(1)]),
            ],
        ),
        small(
            "roots that share a PCID, INVPCID, seals",
            roots,
            vec![
                writes(roots, &[Pde::Empty, LINK], &kinds[..2]),
                acts(roots, &reuse),
                acts(roots, &invpcid[..2]),
                seals(roots),
            ],
        ),
        small(
            "roots with a PCID each",
            roots,
            vec![
                writes(roots, &[Pde::Empty, LINK], global),
                acts(roots, &loads(&[(0, 0), (1, 1)])),
                acts(roots, &flushes[1..]),
                acts(roots, &invpcid[..2]),
                acts(roots, &invpcid[4..]),
                seals(roots),
            ],
        ),
        small(
            "roots on two CPUs",
            both,
            vec![
                writes(both, &[LINK], &[Pte::Empty, page(0, false, true)]),
                acts(both, &[load(0, 0, false), load(1, 1, true), load(0, 0, true)]),
                acts(both, &flushes[1..]),
                seals(both),
            ],
        ),
        small(
            "control registers",
            control,
            vec![
                writes(control, &[Pde::Empty, LINK], global),
                acts(control, &[load(0, 0, false), load(1, 1, true), load(1, 0, false)]),
                acts(control, &[Act::Pge, Act::Pcide, Act::Pg, Act::Smep, Act::Invlpg(Some(0))]),
            ],
        ),
        small(
            "rights of cached translations",
            one_cpu,
            vec![
                writes(one_cpu, &[Pde::Empty, WHOLE, LINK], &kinds),
                acts(one_cpu, &flushes),
                acts(one_cpu, &[Act::Wp, Act::Nxe]),
                seals(one_cpu),
            ],
        ),
        small(
            "AMD with TCE",
            Size { cpus: 1, ..plain },
            vec![
                writes(plain, &[Pde::Empty, LINK, linked(1, true)], global),
                acts(Size { cpus: 1, ..plain }, &flushes),
                acts(Size { cpus: 1, ..plain }, &[next]),
            ],
        ),
        small(
            "the INVLPG erratum",
            erratum,
            vec![
                writes(erratum, &[LINK], global),
                acts(erratum, &[load(0, 1, false), Act::Invlpg(Some(0)), Act::Everything]),
            ],
        ),
        Small {
            delayed: true,
            ..small(
                "root loads under way",
                roots,
                vec![
                    writes(roots, &[LINK], global),
                    acts(roots, &loads(&[(0, 0), (1, 1), (1, 0)])),
                    acts(roots, &[Act::Everything, Act::AllPcids, Act::Pge]),
                    vec![Op::GoOn(0)],
                ],
            )
        },
        small(
            "all flushes, one CPU",
            alone,
            everything(&[Pde::Empty, WHOLE, LINK], &kinds[1..], &registers),
        ),
        small(
            "WP and NXE, one CPU",
            alone,
            everything(&[LINK], &kinds[..2], &[&registers[..], &no_effect[..]].concat()),
        ),
        Small {
            delayed: true,
            ..small(
                "all flushes under way, one CPU",
                alone,
                everything(&[Pde::Empty, WHOLE], &kinds[2..], &registers),
            )
        },
        Small {
            delayed: true,
            ..small(
                "flushes of pages under way",
                roots,
                vec![
                    writes(roots, &[LINK, Pde::Empty], &kinds[..2]),
                    acts(roots, &[load(0, 0, false), load(1, 0, true)]),
                    acts(roots, &invpcid[..2]),
                    acts(roots, &[Act::Invlpg(Some(0)), next]),
                    seals(roots),
                    vec![Op::GoOn(0)],
                ],
            )
        },
    ]
}

fn world(name: &str) -> Small {
    worlds().into_iter().find(|world| world.name == name).unwrap()
}

/// Worlds that a debug build walks in seconds.
const QUICK: [&str; 4] =
    ["pages, resets, PGE", "two pages and frames", "AMD with TCE", "flushes of pages under way"];

/// Walks worlds, as many at a time as there are processors, and prints how large they were.
fn walk_all(wanted: impl Fn(&Small) -> bool) {
    let wanted: Vec<Small> = worlds().into_iter().filter(|world| wanted(world)).collect();
    let next = AtomicUsize::new(0);
    let walker = || {
        let mut all = Walk { states: 0, steps: 0 };
        while let Some(world) = wanted.get(next.fetch_add(1, Ordering::Relaxed)) {
            let Walk { states, steps } =
                world.walk(Slip::None).unwrap_or_else(|why| panic!("{}: {why}", world.name));
            println!("{states:>8} states, {steps:>9} steps: {}", world.name);
            all.states += states;
            all.steps += steps;
        }
        all
    };
    let walkers = thread::available_parallelism().map_or(1, NonZero::get);
    let (states, steps) = thread::scope(|scope| {
        let walkers: Vec<_> = (0..walkers).map(|_| scope.spawn(walker)).collect();
        walkers
            .into_iter()
            .map(|walker| walker.join().unwrap())
            .fold((0, 0), |(states, steps), walk| (states + walk.states, steps + walk.steps))
    });
    println!("{states:>8} states, {steps:>9} steps in all");
    assert!(states > 1000, "the worlds were not walked");
}

#[test]
fn model_and_reference_agree_in_every_state_of_the_quick_worlds() {
    walk_all(|world| QUICK.contains(&world.name));
}

/// Takes minutes without optimisation: `.ci/run` has a step for it.
#[cfg(not(debug_assertions))]
#[test]
fn model_and_reference_agree_in_every_state_of_every_world() {
    walk_all(|_| true);
}

#[test]
fn every_slip_of_the_model_is_found_by_a_walk() {
    let (pages, split) = ("pages, resets, PGE", "split and merge");
    let roots = "roots with a PCID each";
    let twins = [
        (Slip::LoadDropsGlobals, pages),
        (Slip::InvlpgSparesGlobals, pages),
        (Slip::SealForgotten, pages),
        (Slip::SmallerNumberDischarges, pages),
        (Slip::GlobalBitIgnored, pages),
        (Slip::PgeForgotten, pages),
        (Slip::StopForgotten, pages),
        (Slip::InvlpgSparesPaths, split),
        (Slip::SealDropsPaths, split),
        (Slip::StaleTableForgotten, split),
        (Slip::UnlinkForgotten, split),
        (Slip::Bit63Ignored, roots),
        (Slip::InvlpgIgnoresPcid, roots),
        (Slip::InvpcidDropsGlobals, roots),
        (Slip::GrantForgotten, roots),
        (Slip::PcideForgotten, "control registers"),
        (Slip::RootLoadIsAtOnce, "root loads under way"),
        (Slip::InvpcidIsAtOnce, "flushes of pages under way"),
        (Slip::RightsFlush, "rights of cached translations"),
    ];
    for (slip, name) in twins {
        match world(name).walk(slip) {
            Ok(walk) => panic!("{slip:?} is not found in {walk:?} of {name}"),
            Err(why) => println!("{slip:?}:\n{why}\n"),
        }
    }
}

/// What kind of operation it is, as far as the model tells operations apart.
fn kind(op: &Op) -> &'static str {
    match op {
        Op::Pde(_, Pde::Empty) => "unlink",
        Op::Pde(_, Pde::Table { .. }) => "link",
        Op::Pde(_, Pde::Large { .. }) => "large page",
        Op::Pte(_, _, Pte::Empty) => "unmap",
        Op::Pte(_, _, Pte::Page { g: true, .. }) => "map, global",
        Op::Pte(_, _, Pte::Page { w: true, .. }) => "map, not global",
        Op::Pte(..) => "map, read-only",
        Op::GoOn(_) => "next event",
        Op::Start(_) | Op::Stop(_) => "reset",
        Op::Seal(_) => "seal",
        Op::Act(_, act) => match act {
            Act::Load { no_flush: false, .. } => "root load",
            Act::Load { no_flush: true, .. } => "root load, bit 63",
            Act::Invlpg(Some(_)) => "INVLPG",
            Act::Invlpg(None) => "INVLPG next to it",
            Act::PageOfPcid(..) => "INVPCID 0",
            Act::Pcid(_) => "INVPCID 1",
            Act::AllPcids => "INVPCID 3",
            Act::Everything => "INVPCID 2",
            Act::Pge => "CR4.PGE",
            Act::Pcide => "CR4.PCIDE",
            Act::Pg => "CR0.PG",
            Act::Smep => "CR4.SMEP",
            Act::Wp => "CR0.WP",
            Act::Nxe => "EFER.NXE",
        },
    }
}

#[test]
fn every_kind_of_operation_meets_every_other_in_some_world() {
    let mut kinds = BTreeSet::new();
    let mut met = BTreeSet::new();
    for world in worlds() {
        let here: BTreeSet<_> = world.ops.iter().map(kind).collect();
        met.extend(here.iter().flat_map(|a| here.iter().map(move |b| (*a, *b))));
        kinds.extend(here);
    }
    let pairs = kinds.iter().flat_map(|a| kinds.iter().map(move |b| (*a, *b)));
    let apart: Vec<_> = pairs.filter(|pair| pair.0 < pair.1 && !met.contains(pair)).collect();
    assert!(apart.is_empty(), "{} pairs meet in no world: {apart:?}", apart.len());
}
