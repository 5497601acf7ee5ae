//! Paging-structure caches: what a simulated CPU remembers of the entries above a leaf (SDM volume
//! 3, "Paging-Structure Caches").
//!
//! A walk may start at any table that a cached path leads to, and the table may be none any more:
//! that is why a page table is freed only after a flush.

use super::random::Random;
use super::tlb::Invalidation;
use lacuna_abi::addr::{Gpa, Gva};
use lacuna_abi::paging::Level;

/// Paths of one level that a CPU has room for.
const PLACES: usize = 32;

/// A cached entry that points to a table, with what the entries above it grant.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Path {
    /// First address that the entry spans.
    pub va: Gva,
    /// Level of the table that it points to.
    pub below: Level,
    /// That table.
    pub table: Gpa,
    /// Process-context identifier.
    pub pcid: u16,
    /// Every entry on the path allows stores.
    pub writable: bool,
    /// State of the tables that it was made under ([`super::versions::Versions::links`]).
    pub links: u64,
}

impl Path {
    /// Bytes that the entry spans: those of a whole table below it.
    const fn span(&self) -> u64 {
        self.below.span() << 9
    }

    const fn leads_to(&self, va: Gva) -> bool {
        va.align_down(self.span()).0 == self.va.0
    }

    /// Whether `what` must drop it: INVLPG drops every path of the current PCID, wherever it
    /// leads; what spares global translations spares no path.
    const fn is_removed_by(&self, what: &Invalidation) -> bool {
        match *what {
            Invalidation::Page { pcid, .. } | Invalidation::Pcid(pcid) => self.pcid == pcid,
            Invalidation::PageOfPcid { va, pcid } => self.pcid == pcid && self.leads_to(va),
            Invalidation::NonGlobal | Invalidation::Everything => true,
        }
    }
}

/// The paths that one CPU caches: those to page tables, to directories, and to tables of
/// directories.
#[derive(Clone, Debug, Default)]
pub struct Paths {
    levels: [[Option<Path>; PLACES]; 3],
}

impl Paths {
    /// The path that leads farthest down to `va`.
    pub fn lookup(&self, va: Gva, pcid: u16) -> Option<&Path> {
        [Level::Pt, Level::Pd, Level::Pdpt].into_iter().find_map(|below| {
            let path = self.levels[row(below)][place(va, below)].as_ref();
            path.filter(|path| path.leads_to(va) && path.pcid == pcid)
        })
    }

    /// Caches a path, unless another has its place and keeps it by chance.
    pub fn insert(&mut self, new: Path, random: &mut Random) {
        let place = &mut self.levels[row(new.below)][place(new.va, new.below)];
        let other = place.is_some_and(|old| (old.va, old.pcid) != (new.va, new.pcid));
        if !other || random.one_in(2) {
            *place = Some(new);
        }
    }

    /// Drops one path, or none, by chance.
    pub fn vanish(&mut self, random: &mut Random) {
        let level = &mut self.levels[random.below(3) as usize];
        level[random.below(PLACES as u64) as usize] = None;
    }

    /// Drops what must go, and nothing else.
    pub fn invalidate(&mut self, what: &Invalidation) {
        for path in self.levels.iter_mut().flatten() {
            if path.is_some_and(|path| path.is_removed_by(what)) {
                *path = None;
            }
        }
    }
}

/// Row of the paths to tables of this level; paths to a root there are none.
const fn row(below: Level) -> usize {
    match below {
        Level::Pt => 0,
        Level::Pd => 1,
        Level::Pdpt | Level::Pml4 => 2,
    }
}

const fn place(va: Gva, below: Level) -> usize {
    let entry = va.0 >> (below.span_shift() + 9);
    ((entry ^ (entry >> 9)) % PLACES as u64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    const VA: Gva = Gva(0xffff_9100_0040_3000);
    const PATH: Path = Path {
        va: Gva(0xffff_9100_0040_0000),
        below: Level::Pt,
        table: Gpa(0x7000),
        pcid: 1,
        writable: true,
        links: 1,
    };

    fn survives(path: Path, what: Invalidation) -> bool {
        let mut paths = Paths::default();
        paths.insert(path, &mut Random::new(0, 0));
        paths.invalidate(&what);
        paths.lookup(path.va, path.pcid).is_some()
    }

    #[test]
    fn every_invalidation_removes_what_it_must_and_no_more() {
        let elsewhere = Path { va: Gva(0xffff_c000_0000_0000), ..PATH };
        let other = Path { pcid: 2, ..PATH };
        let page = Invalidation::Page { va: VA, pcid: 1 };
        let of_pcid = Invalidation::PageOfPcid { va: VA, pcid: 1 };
        for (what, [here, there, another]) in [
            (page, [true, true, false]),
            (of_pcid, [true, false, false]),
            (Invalidation::Pcid(1), [true, true, false]),
            (Invalidation::NonGlobal, [true, true, true]),
            (Invalidation::Everything, [true, true, true]),
        ] {
            assert_eq!(!survives(PATH, what), here, "a path to the page, {what:?}");
            assert_eq!(!survives(elsewhere, what), there, "a path elsewhere, {what:?}");
            assert_eq!(!survives(other, what), another, "another PCID's path, {what:?}");
        }
    }

    #[test]
    fn the_longest_path_is_taken() {
        let mut paths = Paths::default();
        let mut random = Random::new(0, 0);
        let upper = Path { va: Gva(0xffff_9100_0000_0000), below: Level::Pd, ..PATH };
        paths.insert(upper, &mut random);
        assert_eq!(paths.lookup(VA, 1), Some(&upper));
        paths.insert(PATH, &mut random);
        assert_eq!(paths.lookup(VA, 1), Some(&PATH));
        assert_eq!(paths.lookup(VA, 2), None);
        assert_eq!(paths.lookup(Gva(0xffff_9100_0060_0000), 1), Some(&upper));
    }
}
