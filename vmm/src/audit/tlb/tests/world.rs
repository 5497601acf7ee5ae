//! A world of model and reference side by side: both are told the same and must say the same.

use super::super::duty::PageFlush;
use super::super::*;
use super::reference::{Act, Caches, Kind, Memory, Pde, Pte, RefCpu, To, revokes_pde, revokes_pte};
use lacuna_abi::addr::PAGE_SIZE;
use lacuna_abi::event::{ControlRegister, Flush};
use std::collections::BTreeSet;

/// First address, and first frame of the large page.
const BASE: Gva = Gva(0x4020_0000);
const BLOCK: u64 = 0x1000;

const CR0_WP: u64 = 1 << 16;
const EFER_NXE: u64 = 1 << 11;

/// How large a world is, and how its processor behaves.
#[derive(Clone, Copy, Debug)]
pub(super) struct Size {
    pub cpus: u8,
    pub roots: usize,
    pub tables: usize,
    pub pages: usize,
    pub profile: Profile,
    /// CR4.PGE, CR4.PCIDE and EFER.TCE at the start.
    pub pge: bool,
    pub pcide: bool,
    pub tce: bool,
}

/// One step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Op {
    Pde(usize, Pde),
    Pte(usize, usize, Pte),
    Act(u8, Act),
    GoOn(u8),
    Start(u8),
    Stop(u8),
    Seal(usize),
}

/// A slip of the model, for the twins.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) enum Slip {
    #[default]
    None,
    LoadDropsGlobals,
    Bit63Ignored,
    InvlpgIgnoresPcid,
    InvlpgSparesGlobals,
    InvpcidDropsGlobals,
    InvlpgSparesPaths,
    SealDropsPaths,
    SealForgotten,
    SmallerNumberDischarges,
    GrantForgotten,
    StaleTableForgotten,
    UnlinkForgotten,
    GlobalBitIgnored,
    PgeForgotten,
    PcideForgotten,
    StopForgotten,
    RootLoadIsAtOnce,
    InvpcidIsAtOnce,
    RightsFlush,
}

/// When a root's address got its present translation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Grant {
    pub what: Option<(usize, bool)>,
    pub since: u64,
}

#[derive(Clone)]
pub(super) struct World {
    pub size: Size,
    pub slip: Slip,
    /// Instructions count as executed only when the CPU goes on.
    pub delayed: bool,
    pub memory: Memory,
    pub cpus: Vec<RefCpu>,
    pub tlb: Tlb,
    pub seq: u64,
    /// For each root: of its large entry or link, and of each address.
    pub pde_since: Vec<u64>,
    pub grants: Vec<Vec<Grant>>,
}

/// A duty taken apart: CPU, tag, root, where to.
pub(super) type Stale = (u8, Option<u16>, usize, To);

/// A path that may still be cached: CPU, PCID, root, table.
type StaleWay = (u8, u16, usize, usize);

fn root(r: usize) -> Gpa {
    Gpa(PAGE_SIZE * (1 + r as u64))
}

fn table(t: usize) -> Gfn {
    Gfn(100 + t as u64)
}

fn frame(f: usize) -> Gfn {
    Gfn(BLOCK + f as u64)
}

fn page(i: usize) -> Gva {
    BASE.wrapping_add(i as u64 * PAGE_SIZE)
}

fn address(at: Option<usize>) -> Gva {
    at.map_or(BASE.wrapping_add(Level::Pd.span()), page)
}

impl World {
    pub(super) fn new(size: Size, delayed: bool, slip: Slip) -> Self {
        let mut world = Self {
            size,
            slip,
            delayed,
            memory: Memory {
                pde: vec![Pde::Empty; size.roots],
                pte: vec![vec![Pte::Empty; size.pages]; size.tables],
            },
            cpus: vec![RefCpu::default(); usize::from(size.cpus)],
            tlb: Tlb::new(usize::from(size.cpus), Self::start(size), size.profile),
            seq: 1,
            pde_since: vec![0; size.roots],
            grants: vec![vec![Grant { what: None, since: 0 }; size.pages]; size.roots],
        };
        (0..size.cpus).for_each(|cpu| world.apply(Op::Start(cpu)));
        world
    }

    fn start(size: Size) -> Start {
        let bit = |on, bit| if on { bit } else { 0 };
        Start {
            root: root(0),
            cr0: bits::CR0_PG,
            cr4: bit(size.pge, bits::CR4_PGE) | bit(size.pcide, bits::CR4_PCIDE),
            efer: bit(size.tce, bits::EFER_TCE),
        }
    }

    fn kind(&self) -> Kind {
        Kind {
            erratum: self.size.profile == Profile::IntelInvlpgErratum,
            tce: self.size.tce && self.size.profile == Profile::Amd,
        }
    }

    /// The pieces of a large page: one for each frame that is looked at, and the rest.
    fn pieces(&self) -> usize {
        self.size.pages + 1
    }

    /// Whether a processor or guest could do this now.
    pub(super) fn allows(&self, op: Op) -> bool {
        match op {
            Op::Pde(r, new) => self.memory.pde[r] != new,
            Op::Pte(t, i, new) => self.memory.pte[t][i] != new,
            Op::Start(cpu) => self.now(cpu).is_none(),
            Op::Stop(cpu) => self.now(cpu).is_some(),
            Op::GoOn(cpu) => self.delayed && self.cpus[usize::from(cpu)].was.is_some(),
            Op::Seal(_) => true,
            Op::Act(cpu, act) => self.now(cpu).is_some_and(|now| match act {
                // Bit 63 and other PCIDs than 0 need CR4.PCIDE.
                Act::Load { p, no_flush, .. } => now.pcide || (p == 0 && !no_flush),
                Act::PageOfPcid(_, p) | Act::Pcid(p) => now.pcide || p == 0,
                // CR4.PCIDE needs CR0.PG, and PCID 0 to be set.
                Act::Pg => !now.pcide,
                Act::Pcide => now.pg && (now.pcide || now.pcid == 0),
                _ => true,
            }),
        }
    }

    fn now(&self, cpu: u8) -> Option<&Caches> {
        self.cpus[usize::from(cpu)].now.as_ref()
    }

    /// Takes a step in model and reference.
    pub(super) fn apply(&mut self, op: Op) {
        self.seq += 1;
        match op {
            Op::Pde(r, new) => self.write_pde(r, new),
            Op::Pte(t, i, new) => self.write_pte(t, i, new),
            Op::Act(cpu, act) => self.act(cpu, act),
            Op::GoOn(cpu) => {
                self.cpus[usize::from(cpu)].was = None;
                self.tlb.went_on(cpu, self.seq).unwrap();
            }
            Op::Start(cpu) => {
                let Size { pge, pcide, .. } = self.size;
                let pg = true;
                let now = Some(Caches { pge, pcide, pg, ..Caches::default() });
                self.cpus[usize::from(cpu)] = RefCpu { now, was: None };
                self.tlb.start(cpu);
            }
            Op::Stop(cpu) => {
                self.cpus[usize::from(cpu)] = RefCpu::default();
                if self.slip != Slip::StopForgotten {
                    self.tlb.stop(cpu, Self::start(self.size));
                }
            }
            Op::Seal(f) => {
                let states = self.cpus.iter_mut().flat_map(RefCpu::states_mut);
                states.for_each(|caches| caches.seal(f));
                if self.slip != Slip::SealForgotten {
                    self.tlb.discharge(FrameRange::single(frame(f)), self.seq).unwrap();
                }
                if self.slip == Slip::SealDropsPaths {
                    self.tlb.stale = StaleTables::default();
                }
            }
        }
        let (pieces, kind) = (self.pieces(), self.kind());
        for cpu in &mut self.cpus {
            cpu.settle(&self.memory, pieces, kind);
        }
    }

    fn act(&mut self, cpu: u8, act: Act) {
        let kind = self.kind();
        let control = self.now(cpu).map_or([0; 3], |now| {
            let bit = |on, bit| if on { bit } else { 0 };
            [
                bit(now.pg, bits::CR0_PG) | bit(now.wp, CR0_WP),
                bit(now.pge, bits::CR4_PGE)
                    | bit(now.pcide, bits::CR4_PCIDE)
                    | bit(now.smep, bits::CR4_SMEP),
                bit(self.size.tce, bits::EFER_TCE) | bit(now.nxe, EFER_NXE),
            ]
        });
        self.tlb.went_on(cpu, self.seq).unwrap();
        self.cpus[usize::from(cpu)].announce(act, kind);
        self.tell(cpu, act, control);
        if !self.delayed {
            self.seq += 1;
            self.cpus[usize::from(cpu)].was = None;
            self.tlb.went_on(cpu, self.seq).unwrap();
        } else if self.slip == Slip::RootLoadIsAtOnce
            || (self.slip == Slip::InvpcidIsAtOnce && matches!(act, Act::PageOfPcid(..)))
        {
            self.tlb.went_on(cpu, self.seq + 1).unwrap();
        }
    }

    /// Tells the model what a CPU does.
    fn tell(&mut self, cpu: u8, act: Act, [cr0, cr4, efer]: [u64; 3]) {
        let (slip, seq) = (self.slip, self.seq);
        let number = if slip == Slip::SmallerNumberDischarges { seq + 5 } else { seq };
        let tlb = &mut self.tlb;
        let mut change =
            |register, old: u64, bit| tlb.control(cpu, register, (old, old ^ bit), seq);
        match act {
            Act::Load { r, p, no_flush } => {
                let no_flush = no_flush && slip != Slip::Bit63Ignored;
                self.tlb.load(cpu, (root(r), p), no_flush, number).unwrap();
                if slip == Slip::LoadDropsGlobals && !no_flush {
                    self.tlb.flush(cpu, &Flush::Everything, number).unwrap();
                }
            }
            Act::Invlpg(at) => {
                let va = address(at);
                let pages = Flush::Pages { va, count: 1, level: Level::Pt };
                if slip == Slip::InvlpgSparesGlobals || slip == Slip::InvlpgSparesPaths {
                    let pcid = self.tlb.cpus[usize::from(cpu)].mode.pcid;
                    let globals = slip != Slip::InvlpgSparesGlobals;
                    let flush = PageFlush { va, count: 1, level: Level::Pt, pcid, globals, seq };
                    let all_paths = slip != Slip::InvlpgSparesPaths;
                    self.tlb.flush_pages(cpu, &flush, all_paths).unwrap();
                    return;
                }
                self.tlb.flush(cpu, &pages, number).unwrap();
                if slip == Slip::InvlpgIgnoresPcid {
                    for pcid in 0..3 {
                        self.tlb.flush(cpu, &Flush::PageOfPcid { va, pcid }, seq).unwrap();
                    }
                }
            }
            Act::PageOfPcid(at, pcid) => {
                let va = address(at);
                self.tlb.flush(cpu, &Flush::PageOfPcid { va, pcid }, seq).unwrap();
                if slip == Slip::InvpcidDropsGlobals {
                    let (count, level, globals) = (1, Level::Pt, true);
                    let flush = PageFlush { va, count, level, pcid, globals, seq };
                    self.tlb.flush_pages(cpu, &flush, false).unwrap();
                }
            }
            Act::Pcid(pcid) => self.tlb.flush(cpu, &Flush::Pcid(pcid), seq).unwrap(),
            Act::AllPcids => self.tlb.flush(cpu, &Flush::AllPcids, seq).unwrap(),
            Act::Everything => self.tlb.flush(cpu, &Flush::Everything, number).unwrap(),
            Act::Pge if slip == Slip::PgeForgotten => {}
            Act::Wp | Act::Nxe if slip == Slip::RightsFlush => {
                self.tlb.flush(cpu, &Flush::Everything, seq).unwrap();
            }
            Act::Pcide if slip == Slip::PcideForgotten => {}
            Act::Pge => change(ControlRegister::Cr4, cr4, bits::CR4_PGE).unwrap(),
            Act::Pcide => change(ControlRegister::Cr4, cr4, bits::CR4_PCIDE).unwrap(),
            Act::Smep => change(ControlRegister::Cr4, cr4, bits::CR4_SMEP).unwrap(),
            Act::Pg => change(ControlRegister::Cr0, cr0, bits::CR0_PG).unwrap(),
            // Neither is among what decides what is cached.
            Act::Wp => change(ControlRegister::Cr0, cr0, CR0_WP).unwrap(),
            Act::Nxe => change(ControlRegister::Efer, efer, EFER_NXE).unwrap(),
        }
    }

    /// What the caller of the model keeps: which address is granted since when.
    fn note_grants(&mut self, r: usize) {
        for i in 0..self.size.pages {
            let what = match self.memory.pde[r] {
                Pde::Table { t, .. } => match self.memory.pte[t][i] {
                    Pte::Page { f, g, .. } => Some((f, g)),
                    Pte::Empty => None,
                },
                _ => None,
            };
            let grant = &mut self.grants[r][i];
            if grant.what != what || what.is_none() {
                *grant = Grant { what, since: if what.is_some() { self.seq } else { 0 } };
            }
        }
    }

    fn since(&self, since: u64) -> u64 {
        if self.slip == Slip::GrantForgotten { 0 } else { since }
    }

    fn leaves(&self, r: usize, t: usize, i: usize) -> Option<Leaves> {
        let Pte::Page { f, g, .. } = self.memory.pte[t][i] else { return None };
        let global = g && self.slip != Slip::GlobalBitIgnored;
        let (root, va, frames) = (root(r), page(i), FrameRange::single(frame(f)));
        let since = self.since(self.grants[r][i].since);
        Some(Leaves { root, va, level: Level::Pt, frames, global, since })
    }

    fn write_pde(&mut self, r: usize, new: Pde) {
        let (old, seq) = (self.memory.pde[r], self.seq);
        let revoked = revokes_pde(old, new);
        if revoked {
            let states = self.cpus.iter_mut().flat_map(RefCpu::states_mut);
            states.for_each(|caches| caches.revoke(|through, _, _| through == r));
        }
        let since = self.since(self.pde_since[r]);
        match old {
            Pde::Large { g, .. } if revoked => {
                let frames = FrameRange::new(frame(0), 512).unwrap();
                let (root, va, level, global) = (root(r), BASE, Level::Pd, g);
                let leaves = Leaves { root, va, level, frames, global, since };
                self.tlb.revoke(&leaves, EVERY, seq).unwrap();
            }
            Pde::Table { t, .. } if revoked && self.slip != Slip::UnlinkForgotten => {
                let own = (0..self.size.pages).filter_map(|i| self.leaves(r, t, i));
                let own: Vec<_> = own.map(|leaves| (leaves, EVERY)).collect();
                let (root, va, level, table) = (root(r), BASE, Level::Pd, table(t));
                self.tlb.unlink(&Path { root, va, level, table, since }, &own, seq).unwrap();
            }
            _ => {}
        }
        self.memory.pde[r] = new;
        let same = match (old, new) {
            (Pde::Large { g, .. }, Pde::Large { g: now, .. }) => g == now,
            (Pde::Table { t, .. }, Pde::Table { t: now, .. }) => t == now,
            _ => false,
        };
        if !same {
            self.pde_since[r] = if new == Pde::Empty { 0 } else { seq };
        }
        self.note_grants(r);
    }

    fn write_pte(&mut self, t: usize, i: usize, new: Pte) {
        let (old, seq) = (self.memory.pte[t][i], self.seq);
        let revoked = revokes_pte(old, new);
        let linked = |pde: &Pde| matches!(pde, Pde::Table { t: to, .. } if *to == t);
        let roots: Vec<usize> =
            (0..self.size.roots).filter(|r| linked(&self.memory.pde[*r])).collect();
        if revoked {
            let at = |to| matches!(to, Some(To::Page { i: at, .. }) if at == i);
            let states = self.cpus.iter_mut().flat_map(RefCpu::states_mut);
            states.for_each(|caches| {
                caches.revoke(|_, through, to| through == Some(t) && at(to));
            });
            for r in &roots {
                let leaves = self.leaves(*r, t, i).unwrap();
                self.tlb.revoke(&leaves, EVERY, seq).unwrap();
            }
        }
        if self.tlb.is_stale_table(table(t)) && self.slip != Slip::StaleTableForgotten {
            let new = match new {
                Pte::Page { f, g, .. } => Some((FrameRange::single(frame(f)), g)),
                Pte::Empty => None,
            };
            let (table, offset, bytes) = (table(t), i as u64 * PAGE_SIZE, PAGE_SIZE);
            let (level, since) = (Level::Pt, self.since(seq));
            let written = Written { table, offset, bytes, revoked, new, level, since, seq };
            self.tlb.written(&written).unwrap();
        }
        self.memory.pte[t][i] = new;
        roots.into_iter().for_each(|r| self.note_grants(r));
    }

    /// What is stale by the reference: translations, and paths as CPU, PCID, root and table.
    pub(super) fn expected(&self) -> (BTreeSet<Stale>, BTreeSet<StaleWay>) {
        let (mut items, mut ways) = (BTreeSet::new(), BTreeSet::new());
        for (cpu, state) in (0..).zip(&self.cpus) {
            for caches in state.states() {
                let stale = caches.items.iter().filter(|item| item.stale);
                items.extend(stale.map(|item| (cpu, item.tag, item.r, item.to)));
                let stale = caches.ways.iter().filter(|way| way.stale);
                ways.extend(stale.map(|way| (cpu, way.pcid, way.r, way.t)));
            }
        }
        (items, ways)
    }

    /// The same by the model, asked by frame and by address.
    pub(super) fn found(&self) -> [BTreeSet<Stale>; 2] {
        let frames = FrameRange::new(Gfn(0), 1 << 30).unwrap();
        let last = BASE.wrapping_add(Level::Pd.span() - 1);
        [self.tlb.of_frames(frames), self.tlb.at((BASE, last), |_| true)]
            .map(|duties| duties.iter().flat_map(|duty| self.apart(duty)).collect())
    }

    fn apart(&self, duty: &Duty) -> Vec<Stale> {
        let tag = match duty.tag {
            Tag::Global => None,
            Tag::Pcid(pcid) => Some(pcid),
        };
        let r = usize::try_from(duty.root.0 / PAGE_SIZE - 1).unwrap();
        let index = |from: u64, to: u64| usize::try_from(from - to).unwrap();
        let mut to = Vec::new();
        if duty.level == Level::Pt {
            for (offset, frame) in (0..).zip(duty.frames.iter()) {
                let i = index(duty.va.0, BASE.0) / 4096 + offset;
                to.push(To::Page { i, f: index(frame.0, BLOCK) });
            }
        } else {
            let pages = self.size.pages;
            let looked_at = (0..pages).filter(|piece| duty.frames.contains(frame(*piece)));
            to.extend(looked_at.map(To::Piece));
            if duty.frames.contains(frame(511)) {
                to.push(To::Piece(pages));
            }
        }
        let each = members(duty.cpus).flat_map(|cpu| to.iter().map(move |to| (cpu, tag, r, *to)));
        each.collect()
    }

    pub(super) fn found_ways(&self) -> BTreeSet<StaleWay> {
        let mut ways = BTreeSet::new();
        for t in 0..self.size.tables {
            for duty in self.tlb.of_table(table(t)) {
                let r = usize::try_from(duty.root.0 / PAGE_SIZE - 1).unwrap();
                ways.extend(members(duty.cpus).map(|cpu| (cpu, duty.pcid, r, t)));
            }
        }
        ways
    }

    /// Compares model and reference. Nothing may be missed; if `exact`, nothing may be called stale
    /// that is not.
    pub(super) fn compare(&self, exact: bool) -> Result<(), String> {
        let (items, ways) = self.expected();
        for found in self.found() {
            let missed: Vec<_> = items.difference(&found).collect();
            let too_many: Vec<_> = found.difference(&items).collect();
            if !missed.is_empty() || (exact && !too_many.is_empty()) {
                return Err(format!("missed {missed:?}; called stale and is not {too_many:?}"));
            }
        }
        let found = self.found_ways();
        if !found.is_superset(&ways) || (exact && found != ways) {
            return Err(format!("paths: expected {ways:?}, found {found:?}"));
        }
        Ok(())
    }
}
