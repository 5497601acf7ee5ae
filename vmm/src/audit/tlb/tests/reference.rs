//! The reference: everything that any legal TLB could hold, from tables as they are in memory.
//!
//! Each CPU's caches are a set, closed under "fill at any time": whatever can be walked to is in it
//! at once, and leaves it only by an operation that must remove it. What is in it is *stale* from the
//! moment at which an entry on its way is revoked. No numbers, no epochs, no indexes.

use std::collections::BTreeSet;

/// A tag: `None` for a global translation.
pub(super) type RefTag = Option<u16>;

/// An entry that leads to a table, maps a large page over all addresses, or nothing. `w`: writable.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) enum Pde {
    Empty,
    Large { g: bool, w: bool },
    Table { t: usize, w: bool },
}

/// An entry that maps frame `f`, or nothing.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) enum Pte {
    Empty,
    Page { f: usize, g: bool, w: bool },
}

/// The tables: an entry of each root, and those of each table. The tables above are always there.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct Memory {
    pub pde: Vec<Pde>,
    pub pte: Vec<Vec<Pte>>,
}

/// What a translation leads to: a page at an address, or a piece of a large page.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) enum To {
    Page { i: usize, f: usize },
    Piece(usize),
}

/// A cached translation: through root `r` and table `t`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) struct Item {
    pub tag: RefTag,
    pub r: usize,
    pub t: Option<usize>,
    pub to: To,
    pub w: bool,
    pub stale: bool,
}

/// A cached entry that leads from root `r` to table `t`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) struct Way {
    pub pcid: u16,
    pub r: usize,
    pub t: usize,
    pub w: bool,
    pub stale: bool,
}

/// What one CPU does. An address is `None` where it lies next to the ones looked at: only the tables
/// above lead there too.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Act {
    Load { r: usize, p: u16, no_flush: bool },
    Invlpg(Option<usize>),
    PageOfPcid(Option<usize>, u16),
    Pcid(u16),
    AllPcids,
    Everything,
    Pge,
    Pcide,
    Pg,
    Smep,
    Wp,
    Nxe,
}

/// Facts of the processor.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Kind {
    /// INVLPG leaves globals while PCIDs are on.
    pub erratum: bool,
    /// INVLPG drops only the paths that lead to its address.
    pub tce: bool,
}

/// Registers and caches of one CPU.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub(super) struct Caches {
    pub root: usize,
    pub pcid: u16,
    pub pge: bool,
    pub pcide: bool,
    pub pg: bool,
    pub smep: bool,
    pub wp: bool,
    pub nxe: bool,
    pub items: BTreeSet<Item>,
    pub ways: BTreeSet<Way>,
    /// Roots whose upper tables are cached, by PCID.
    pub uppers: BTreeSet<(u16, usize)>,
}

impl Caches {
    /// Everything that can be walked to.
    pub(super) fn fill(&mut self, memory: &Memory, pieces: usize) {
        if !self.pg {
            return;
        }
        let pcid = self.pcid;
        let tag = |g: bool| if g && self.pge { None } else { Some(pcid) };
        self.uppers.insert((pcid, self.root));
        for (_, r) in self.uppers.iter().filter(|(p, _)| *p == pcid) {
            match memory.pde[*r] {
                Pde::Empty => {}
                Pde::Large { g, w } => {
                    for piece in 0..pieces {
                        let (tag, to) = (tag(g), To::Piece(piece));
                        self.items.insert(Item { tag, r: *r, t: None, to, w, stale: false });
                    }
                }
                Pde::Table { t, w } => {
                    self.ways.insert(Way { pcid, r: *r, t, w, stale: false });
                }
            }
        }
        for way in self.ways.iter().filter(|way| way.pcid == pcid) {
            for (i, pte) in memory.pte[way.t].iter().enumerate() {
                if let Pte::Page { f, g, w } = *pte {
                    let (tag, to, w) = (tag(g), To::Page { i, f }, w && way.w);
                    let Way { r, t, stale, .. } = *way;
                    self.items.insert(Item { tag, r, t: Some(t), to, w, stale });
                }
            }
        }
    }

    /// What the instruction must remove, and the registers after it.
    pub(super) fn act(&mut self, act: Act, kind: Kind) {
        match act {
            Act::Load { r, p, no_flush } => {
                self.root = r;
                self.pcid = if self.pcide { p } else { 0 };
                if !no_flush {
                    self.drop_pcid(self.pcid);
                }
            }
            Act::Invlpg(at) => {
                let pcid = self.pcid;
                let spares = kind.erratum && self.pcide;
                self.items.retain(|item| {
                    let tagged = item.tag.map_or(!spares, |tag| tag == pcid);
                    !(tagged && is_at(item.to, at))
                });
                if !kind.tce || at.is_some() {
                    self.ways.retain(|way| way.pcid != pcid);
                }
                self.uppers.retain(|(p, _)| *p != pcid);
            }
            Act::PageOfPcid(at, pcid) => {
                self.items.retain(|item| item.tag != Some(pcid) || !is_at(item.to, at));
                if at.is_some() {
                    self.ways.retain(|way| way.pcid != pcid);
                }
                self.uppers.retain(|(p, _)| *p != pcid);
            }
            Act::Pcid(pcid) => self.drop_pcid(pcid),
            Act::AllPcids => {
                self.items.retain(|item| item.tag.is_none());
                self.ways.clear();
                self.uppers.clear();
            }
            Act::Everything => self.drop_all(),
            Act::Pge => {
                self.pge = !self.pge;
                self.drop_all();
            }
            Act::Pcide => {
                self.pcide = !self.pcide;
                if !self.pcide {
                    self.pcid = 0;
                    self.drop_all();
                }
            }
            Act::Pg => {
                self.pg = !self.pg;
                if !self.pg {
                    self.drop_all();
                }
            }
            // They change what a cached translation permits, not what is cached.
            Act::Wp => self.wp = !self.wp,
            Act::Nxe => self.nxe = !self.nxe,
            Act::Smep => {
                self.smep = !self.smep;
                if self.smep {
                    self.drop_pcid(self.pcid);
                }
            }
        }
    }

    fn drop_pcid(&mut self, pcid: u16) {
        self.items.retain(|item| item.tag != Some(pcid));
        self.ways.retain(|way| way.pcid != pcid);
        self.uppers.retain(|(p, _)| *p != pcid);
    }

    fn drop_all(&mut self) {
        self.items.clear();
        self.ways.clear();
        self.uppers.clear();
    }

    /// The second stage was closed for frame `f`, which is also that piece of the large page.
    pub(super) fn seal(&mut self, f: usize) {
        self.items.retain(|item| match item.to {
            To::Page { f: mapped, .. } => mapped != f,
            To::Piece(piece) => piece != f,
        });
    }

    /// Marks what was cached through an entry that is being revoked.
    pub(super) fn revoke(&mut self, through: impl Fn(usize, Option<usize>, Option<To>) -> bool) {
        let stale = |item: Item| Item {
            stale: item.stale || through(item.r, item.t, Some(item.to)),
            ..item
        };
        self.items = std::mem::take(&mut self.items).into_iter().map(stale).collect();
        let stale = |way: Way| Way { stale: way.stale || through(way.r, Some(way.t), None), ..way };
        self.ways = std::mem::take(&mut self.ways).into_iter().map(stale).collect();
    }
}

fn is_at(to: To, at: Option<usize>) -> bool {
    match (to, at) {
        (_, None) => false,
        (To::Page { i, .. }, Some(at)) => i == at,
        (To::Piece(_), Some(_)) => true,
    }
}

/// Whether the write takes away a translation or a right that the entry gave.
pub(super) fn revokes_pde(old: Pde, new: Pde) -> bool {
    match (old, new) {
        (Pde::Empty, _) => false,
        (Pde::Large { g, w }, Pde::Large { g: now, w: still }) => g != now || (w && !still),
        (Pde::Table { t, w }, Pde::Table { t: now, w: still }) => t != now || (w && !still),
        _ => true,
    }
}

/// The same of an entry that maps a page.
pub(super) fn revokes_pte(old: Pte, new: Pte) -> bool {
    match (old, new) {
        (Pte::Empty, _) => false,
        (Pte::Page { f, g, w }, Pte::Page { f: frame, g: now, w: still }) => {
            f != frame || g != now || (w && !still)
        }
        (Pte::Page { .. }, Pte::Empty) => true,
    }
}

/// One CPU: stopped, or running. An instruction that has been announced and not yet followed by
/// another event may or may not have been executed.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub(super) struct RefCpu {
    pub now: Option<Caches>,
    /// What it is if it has not.
    pub was: Option<(Caches, Act)>,
}

impl RefCpu {
    /// Fills what can be filled; what is announced may be executed now.
    pub(super) fn settle(&mut self, memory: &Memory, pieces: usize, kind: Kind) {
        let Some(now) = &mut self.now else { return };
        if let Some((was, act)) = &mut self.was {
            was.fill(memory, pieces);
            let mut late = was.clone();
            late.act(*act, kind);
            now.items.extend(late.items);
            now.ways.extend(late.ways);
            now.uppers.extend(late.uppers);
        }
        now.fill(memory, pieces);
    }

    /// Announces an instruction. What was stale before it and is removed by it counts as removed at
    /// once; what becomes stale before it is known to be executed does not.
    pub(super) fn announce(&mut self, act: Act, kind: Kind) {
        self.was = None;
        let Some(now) = &mut self.now else { return };
        let mut was = now.clone();
        now.act(act, kind);
        was.items.retain(|item| !item.stale || now.items.contains(item));
        was.ways.retain(|way| !way.stale || now.ways.contains(way));
        self.was = Some((was, act));
    }

    /// Both states in which the CPU may be.
    pub(super) fn states(&self) -> impl Iterator<Item = &Caches> {
        self.now.iter().chain(self.was.as_ref().map(|(was, _)| was))
    }

    pub(super) fn states_mut(&mut self) -> impl Iterator<Item = &mut Caches> {
        self.now.iter_mut().chain(self.was.as_mut().map(|(was, _)| was))
    }
}
