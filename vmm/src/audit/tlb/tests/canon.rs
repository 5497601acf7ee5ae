//! States up to symmetry: which CPU, page and frame, table or root is which does not matter, and of
//! numbers only the order does.

use super::super::fill::{Fill, Healed};
use super::super::*;
use super::reference::{Act, Caches, Item, Pde, Pte, To};
use super::world::World;
use std::hash::{DefaultHasher, Hash, Hasher};

/// Which of the CPUs, pages, tables and roots stands for which.
pub(super) struct Order {
    pub cpus: Vec<usize>,
    pub pages: Vec<usize>,
    pub tables: Vec<usize>,
    pub roots: Vec<usize>,
}

/// The state up to symmetry, as 128 bits.
pub(super) fn digest(world: &World, orders: &[Order]) -> (u64, u64) {
    let words = orders.iter().map(|order| encode(world, order)).min().unwrap();
    let hash = |seed: u64| {
        let mut hasher = DefaultHasher::new();
        (seed, &words).hash(&mut hasher);
        hasher.finish()
    };
    (hash(1), hash(2))
}

fn place(order: &[usize], what: usize) -> u64 {
    order.iter().position(|other| *other == what).unwrap_or(order.len()) as u64
}

/// A number that says of a list what is in it, in whatever order.
fn sorted(words: &mut Vec<u64>, mut list: Vec<Vec<u64>>) {
    list.sort();
    list.dedup();
    words.push(list.len() as u64);
    words.extend(list.into_iter().flatten());
}

fn tag_word(tag: Tag) -> u64 {
    match tag {
        Tag::Global => 9,
        Tag::Pcid(pcid) => u64::from(pcid),
    }
}

fn encode(world: &World, order: &Order) -> Vec<u64> {
    let mut words = Vec::with_capacity(128);
    let tlb = &world.tlb;
    let numbers = numbers(tlb);
    let root_of = |root: Gpa| place(&order.roots, usize::try_from(root.0 / 4096).unwrap() - 1);
    for r in &order.roots {
        words.push(match world.memory.pde[*r] {
            Pde::Empty => 0,
            Pde::Large { g, w } => 1 | u64::from(g) << 1 | u64::from(w) << 2,
            Pde::Table { t, w } => 8 | u64::from(w) << 1 | place(&order.tables, t) << 4,
        });
        words.push(before(&numbers, world.pde_since[*r]));
        let grants = order.pages.iter().map(|i| world.grants[*r][*i]);
        words.extend(grants.map(|grant| before(&numbers, grant.since)));
    }
    for t in &order.tables {
        words.extend(order.pages.iter().map(|i| match world.memory.pte[*t][*i] {
            Pte::Empty => 0,
            Pte::Page { f, g, w } => {
                1 | u64::from(g) << 1 | u64::from(w) << 2 | place(&order.pages, f) << 4
            }
        }));
    }
    for cpu in &order.cpus {
        encode_reference(world, *cpu, order, &mut words);
        let state = &tlb.cpus[*cpu];
        words.push(u64::from(state.running));
        words.push(root_of(state.mode.root) << 16 | u64::from(state.mode.pcid));
        words.extend([state.cr0, state.cr4]);
        let spaces = state.spaces.iter().map(|space| {
            let flags = u64::from(space.takes_globals)
                | u64::from(space.paths) << 1
                | u64::from(space.dying) << 2;
            let mut list = vec![root_of(space.root), tag_word(space.tag), flags];
            encode_fill(&space.fill, order, &numbers, &mut list);
            list
        });
        sorted(&mut words, spaces.collect());
    }
    let mut tables: Vec<Vec<u64>> = Vec::new();
    for (table, leaves, paths) in tlb.stale.all() {
        let t = place(&order.tables, usize::try_from(table.0 - 100).unwrap());
        let mut list = vec![t];
        sorted(
            &mut list,
            leaves
                .iter()
                .flat_map(|run| run.entries())
                .map(|run| {
                    let i = place(&order.pages, usize::try_from(run.va.0 / 4096).unwrap());
                    let f = run.frames.start().0 - 0x1000;
                    let f = place(&order.pages, usize::try_from(f).unwrap());
                    vec![i, f, u64::from(run.global), before(&numbers, run.since)]
                })
                .collect(),
        );
        let paths = paths.iter().map(|path| {
            let cpu = place(&order.cpus, usize::from(path.cpu));
            let flags = u64::from(path.takes_globals) | u64::from(path.passing) << 1;
            let mut list = vec![cpu, root_of(path.root), u64::from(path.pcid), flags];
            encode_fill(&path.fill, order, &numbers, &mut list);
            list
        });
        sorted(&mut list, paths.collect());
        tables.push(list);
    }
    sorted(&mut words, tables);
    let mut duties = Vec::new();
    let everywhere = FrameRange::new(Gfn(0), 1 << 30).unwrap();
    tlb.duties.of_frames(everywhere, &tlb.epochs, &mut duties, |_| true);
    let duties = duties.iter().map(|duty| {
        let cpus = members(duty.cpus).fold(0, |set, cpu| set | 1 << place(&order.cpus, cpu.into()));
        let i = place(&order.pages, usize::try_from((duty.va.0 - 0x4020_0000) / 4096).unwrap());
        let pieces =
            (0..order.pages.len()).filter(|f| duty.frames.contains(Gfn(0x1000 + *f as u64)));
        let rest = u64::from(duty.frames.contains(Gfn(0x1000 + 511))) << 8;
        let pieces = pieces.fold(rest, |set, f| set | 1 << place(&order.pages, f));
        let level = u64::from(duty.level.number());
        let i = if duty.level == Level::Pt { i } else { 0 };
        let kind = tag_word(duty.tag) << 1 | u64::from(duty.passing);
        vec![cpus, kind, root_of(duty.root), level, i, pieces]
    });
    sorted(&mut words, duties.collect());
    words
}

fn encode_reference(world: &World, cpu: usize, order: &Order, words: &mut Vec<u64>) {
    let state = &world.cpus[cpu];
    words.push(u64::from(state.now.is_some()) | u64::from(state.was.is_some()) << 1);
    if let Some((_, act)) = &state.was {
        let mut hasher = DefaultHasher::new();
        match act {
            Act::Load { r, p, no_flush } => {
                (place(&order.roots, *r), p, no_flush).hash(&mut hasher)
            }
            Act::Invlpg(at) | Act::PageOfPcid(at, _) => {
                (act_kind(*act), at.map(|at| place(&order.pages, at))).hash(&mut hasher);
            }
            other => other.hash(&mut hasher),
        }
        words.push(hasher.finish());
    }
    let way = |pcid: u16, r: usize, flags: u64| {
        u64::from(pcid) << 8 | place(&order.roots, r) << 4 | flags
    };
    for caches in state.states() {
        let Caches { pge, pcide, pg, smep, wp, nxe, .. } = *caches;
        let flags = [pge, pcide, pg, smep, wp, nxe];
        words.push(flags.iter().fold(0, |bits, flag| bits << 1 | u64::from(*flag)));
        words.push(way(caches.pcid, caches.root, 0));
        sorted(words, caches.items.iter().map(|item| vec![item_word(item, order)]).collect());
        let ways = caches.ways.iter().map(|w| {
            let flags = u64::from(w.w) | u64::from(w.stale) << 1 | place(&order.tables, w.t) << 2;
            vec![way(w.pcid, w.r, flags)]
        });
        sorted(words, ways.collect());
        sorted(words, caches.uppers.iter().map(|(p, r)| vec![way(*p, *r, 0)]).collect());
    }
}

fn act_kind(act: Act) -> u64 {
    match act {
        Act::PageOfPcid(_, pcid) => 1 + u64::from(pcid),
        _ => 0,
    }
}

fn item_word(item: &Item, order: &Order) -> u64 {
    let (i, f) = match item.to {
        To::Page { i, f } => (place(&order.pages, i), place(&order.pages, f)),
        To::Piece(piece) => (7, place(&order.pages, piece)),
    };
    let t = item.t.map_or(7, |t| place(&order.tables, t));
    let tag = item.tag.map_or(9, u64::from);
    i | f << 4
        | t << 8
        | place(&order.roots, item.r) << 12
        | tag << 16
        | u64::from(item.w) << 24
        | u64::from(item.stale) << 25
}

/// The numbers that others are compared with.
fn numbers(tlb: &Tlb) -> Vec<u64> {
    let mut numbers = Vec::new();
    let mut add = |fill: &Fill| {
        numbers.extend(fill.until);
        for healed in &fill.healed {
            match healed {
                Healed::Pages { paths: true, by, .. } => numbers.push(*by),
                Healed::Frames(_, seq) => numbers.push(*seq),
                Healed::Pages { .. } => {}
            }
        }
    };
    tlb.cpus.iter().flat_map(|cpu| &cpu.spaces).for_each(|space| add(&space.fill));
    tlb.stale.all().flat_map(|(_, _, paths)| paths).for_each(|path| add(&path.fill));
    numbers.sort_unstable();
    numbers.dedup();
    numbers
}

/// How many of the numbers are not larger.
fn before(numbers: &[u64], number: u64) -> u64 {
    numbers.partition_point(|other| *other <= number) as u64
}

fn encode_fill(fill: &Fill, order: &Order, numbers: &[u64], words: &mut Vec<u64>) {
    words.push(fill.until.map_or(0, |until| before(numbers, until)));
    words.push(u64::from(fill.leaving));
    let healed = fill.healed.iter().map(|healed| match healed {
        Healed::Frames(frames, seq) => {
            let f = usize::try_from(frames.start().0 - 0x1000).unwrap();
            vec![1, place(&order.pages, f), 0, before(numbers, *seq)]
        }
        Healed::Pages { flush, leaves, paths, by } => {
            let i = usize::try_from((flush.va.0 - 0x4020_0000) / 4096).unwrap();
            let seq = if *paths { before(numbers, *by) } else { 0 };
            let flags = u64::from(*leaves) | u64::from(*paths) << 1 | u64::from(flush.globals) << 2;
            vec![2 | flags << 4, place(&order.pages, i), u64::from(flush.pcid), seq]
        }
    });
    sorted(words, healed.collect());
}
