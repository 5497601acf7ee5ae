//! The table walker that host and guest share: one translation, or every leaf of a root.
//!
//! Tables may be written by a hostile guest while they are read, so the walker reads each entry
//! once, by value, and its work is bounded.

use crate::addr::{Gfn, Gpa, Gva};
use crate::paging::{ENTRIES, Entry, Level, is_canonical};

/// Where the walker reads entries from.
pub trait Tables {
    /// The entry at `at`, a multiple of 8, or `None` where no table can be.
    fn read_entry(&self, at: Gpa) -> Option<Entry>;
}

impl<F: Fn(Gpa) -> Option<Entry>> Tables for F {
    fn read_entry(&self, at: Gpa) -> Option<Entry> {
        self(at)
    }
}

/// One leaf entry with the rights that the whole path to it grants (SDM volume 3, "Access
/// Rights"): R/W and U/S are the AND over all levels, XD is the OR.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Leaf {
    /// First virtual address that the entry maps.
    pub va: Gva,
    /// Level of the table that holds the entry.
    pub level: Level,
    /// Physical address of the entry.
    pub at: Gpa,
    /// The entry.
    pub entry: Entry,
    /// Writable at every level (with CR0.WP set, for ring 0 too).
    pub writable: bool,
    /// Reachable from ring 3 at every level.
    pub user: bool,
    /// Executable at every level.
    pub executable: bool,
}

impl Leaf {
    /// First frame that the entry maps.
    #[must_use]
    pub const fn frame(&self) -> Gfn {
        self.entry.frame(self.level)
    }

    /// Number of frames that the entry maps.
    #[must_use]
    pub const fn frames(&self) -> u64 {
        self.level.frames()
    }

    /// Whether the translation survives a CR3 load.
    #[must_use]
    pub const fn global(&self) -> bool {
        self.entry.has(Entry::GLOBAL)
    }

    /// Physical address of `va`, which lies in the span of this entry.
    #[must_use]
    pub const fn gpa_of(&self, va: Gva) -> Gpa {
        Gpa(self.frame().gpa().0 + (va.0 & (self.level.span() - 1)))
    }
}

/// Why a walk found no leaf.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NoLeaf {
    /// The address is not canonical.
    NotCanonical,
    /// The entry of this level at this place is not present.
    NotPresent(Level, Gpa),
    /// The table of this level, at this place, cannot be read: no table can be there.
    Unreadable(Level, Gpa),
}

/// Rights collected on the way down.
#[derive(Clone, Copy)]
struct Rights {
    writable: bool,
    user: bool,
    executable: bool,
}

impl Rights {
    const ALL: Self = Self { writable: true, user: true, executable: true };

    const fn and(self, entry: Entry) -> Self {
        Self {
            writable: self.writable && entry.has(Entry::WRITABLE),
            user: self.user && entry.has(Entry::USER),
            executable: self.executable && !entry.has(Entry::NO_EXECUTE),
        }
    }

    const fn leaf(self, va: Gva, level: Level, at: Gpa, entry: Entry) -> Leaf {
        let Self { writable, user, executable } = self;
        Leaf { va, level, at, entry, writable, user, executable }
    }
}

/// Physical address of the entry for `va` in the table of `level` at `table`.
#[must_use]
pub const fn entry_address(table: Gpa, level: Level, va: Gva) -> Gpa {
    Gpa((table.0 & Entry::ADDRESS) + 8 * level.index(va))
}

/// Translates `va` from `root`, the physical address of a PML4 table.
///
/// # Errors
/// [`NoLeaf`] says at which level the walk ended.
pub fn translate(tables: &impl Tables, root: Gpa, va: Gva) -> Result<Leaf, NoLeaf> {
    if !is_canonical(va) {
        return Err(NoLeaf::NotCanonical);
    }
    let mut table = root;
    let mut level = Level::Pml4;
    let mut rights = Rights::ALL;
    loop {
        let at = entry_address(table, level, va);
        let entry = tables.read_entry(at).ok_or(NoLeaf::Unreadable(level, at))?;
        if !entry.is_present() {
            return Err(NoLeaf::NotPresent(level, at));
        }
        rights = rights.and(entry);
        match level.below() {
            Some(below) if !entry.is_leaf(level) => {
                table = entry.frame(level).gpa();
                level = below;
            }
            _ => return Ok(rights.leaf(va.align_down(level.span()), level, at, entry)),
        }
    }
}

/// The place of the entry of `level` for `va`: the walk from `root` down to the table of `level`.
///
/// # Errors
/// [`NoLeaf`] if the path ends above `level`, also at a larger page.
pub fn locate(tables: &impl Tables, root: Gpa, va: Gva, level: Level) -> Result<Gpa, NoLeaf> {
    if !is_canonical(va) {
        return Err(NoLeaf::NotCanonical);
    }
    let mut table = root;
    let mut here = Level::Pml4;
    while here > level {
        let at = entry_address(table, here, va);
        let entry = tables.read_entry(at).ok_or(NoLeaf::Unreadable(here, at))?;
        match here.below() {
            Some(below) if entry.is_present() && !entry.is_leaf(here) => {
                table = entry.frame(here).gpa();
                here = below;
            }
            _ => return Err(NoLeaf::NotPresent(here, at)),
        }
    }
    Ok(entry_address(table, level, va))
}

/// What a walk over a whole root meets.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Visit {
    /// A table of this level at this frame, reached through `va`.
    Table {
        /// Frame that holds the table.
        frame: Gfn,
        /// Level of the table.
        level: Level,
        /// First virtual address that the table spans.
        va: Gva,
    },
    /// An entry that maps a page.
    Leaf(Leaf),
    /// A table that cannot be read: the entry at `at` points outside the memory that may hold
    /// tables.
    Unreadable {
        /// The entry that points there; the root itself where there is none.
        at: Gpa,
        /// Where it points.
        table: Gpa,
        /// First virtual address that the table would span.
        va: Gva,
    },
}

/// The walk stopped because more tables were met than the caller allows: tables that point to
/// each other or to themselves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TooManyTables;

/// Visits every table and every leaf that `root` reaches within `[from, to]` (inclusive, both
/// canonical), in order of address; at most `budget` tables are read.
///
/// # Errors
/// [`TooManyTables`] once the budget is used up.
pub fn visit(
    tables: &impl Tables,
    root: Gpa,
    (from, to): (Gva, Gva),
    budget: usize,
    visitor: &mut impl FnMut(Visit),
) -> Result<(), TooManyTables> {
    let mut left = budget;
    let mut walk = Walk { tables, from, to, left: &mut left, visitor };
    walk.table(root, root, Level::Pml4, Gva(0), Rights::ALL)
}

/// The whole address space, for [`visit`].
pub const EVERYTHING: (Gva, Gva) = (Gva(0), Gva(u64::MAX));

struct Walk<'a, T, V> {
    tables: &'a T,
    from: Gva,
    to: Gva,
    left: &'a mut usize,
    visitor: &'a mut V,
}

impl<T: Tables, V: FnMut(Visit)> Walk<'_, T, V> {
    /// Recursion ends at level 1, so its depth is four.
    fn table(
        &mut self,
        at: Gpa,
        table: Gpa,
        level: Level,
        base: Gva,
        rights: Rights,
    ) -> Result<(), TooManyTables> {
        *self.left = self.left.checked_sub(1).ok_or(TooManyTables)?;
        let table = Gpa(table.0 & Entry::ADDRESS);
        if self.tables.read_entry(table).is_none() {
            (self.visitor)(Visit::Unreadable { at, table, va: base });
            return Ok(());
        }
        (self.visitor)(Visit::Table { frame: table.frame(), level, va: base });
        for index in 0..ENTRIES {
            let va = child_address(base, level, index);
            let last = va.wrapping_add(level.span() - 1);
            if last < self.from || va > self.to {
                continue;
            }
            let at = table.wrapping_add(8 * index);
            let Some(entry) = self.tables.read_entry(at).filter(|e| e.is_present()) else {
                continue;
            };
            let rights = rights.and(entry);
            match level.below() {
                Some(below) if !entry.is_leaf(level) => {
                    self.table(at, entry.frame(level).gpa(), below, va, rights)?;
                }
                _ => (self.visitor)(Visit::Leaf(rights.leaf(va, level, at, entry))),
            }
        }
        Ok(())
    }
}

/// First address that entry `index` spans in a table of `level` that spans from `base`; the upper
/// half of a root is sign-extended.
#[must_use]
pub const fn child_address(base: Gva, level: Level, index: u64) -> Gva {
    let va = base.0 + (index << level.span_shift());
    match level {
        Level::Pml4 if index >= ENTRIES / 2 => Gva(va | 0xffff_0000_0000_0000),
        _ => Gva(va),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::vec::Vec;

    const ROOT: Gpa = Gpa(0x1000);
    const VA: Gva = Gva(0xffff_8880_0020_3000);

    /// Tables at 0x1000 to 0x4fff, nowhere else.
    #[derive(Default)]
    struct Pool(BTreeMap<u64, u64>);

    impl Pool {
        fn set(&mut self, table: Gpa, level: Level, va: Gva, entry: Entry) -> &mut Self {
            self.0.insert(entry_address(table, level, va).0, entry.0);
            self
        }

        fn with_leaf(leaf: Entry) -> Self {
            let mut pool = Self::default();
            pool.set(ROOT, Level::Pml4, VA, Entry::new(Gfn(2), Entry::TABLE))
                .set(Gpa(0x2000), Level::Pdpt, VA, Entry::new(Gfn(3), Entry::TABLE))
                .set(Gpa(0x3000), Level::Pd, VA, Entry::new(Gfn(4), Entry::TABLE))
                .set(Gpa(0x4000), Level::Pt, VA, leaf);
            pool
        }
    }

    impl Tables for Pool {
        fn read_entry(&self, at: Gpa) -> Option<Entry> {
            (0x1000..0x5000).contains(&at.0).then(|| Entry(self.0.get(&at.0).copied().unwrap_or(0)))
        }
    }

    #[test]
    fn a_small_page_is_translated_with_the_rights_of_its_path() {
        let pool = Pool::with_leaf(Entry::new(Gfn(0x77), Entry::DATA | Entry::USER));
        let leaf = translate(&pool, ROOT, Gva(VA.0 + 0x123)).unwrap();
        assert_eq!(leaf.gpa_of(Gva(VA.0 + 0x123)), Gpa(0x77123));
        assert!(leaf.writable && !leaf.executable, "{leaf:?}");
        assert!(!leaf.user, "the tables above do not grant U/S");
    }

    #[test]
    fn a_block_is_translated_at_level_two() {
        let mut pool = Pool::with_leaf(Entry::EMPTY);
        let block = Entry::new(Gfn(0x1_0000), Entry::DATA | Entry::PAGE_SIZE | Entry::GLOBAL);
        pool.set(Gpa(0x3000), Level::Pd, VA, block);
        let leaf = translate(&pool, ROOT, VA).unwrap();
        assert_eq!((leaf.level, leaf.va), (Level::Pd, Gva(0xffff_8880_0020_0000)));
        assert_eq!(leaf.gpa_of(VA), Gpa(0x1000_3000));
        assert!(leaf.global());
    }

    #[test]
    fn a_walk_says_where_it_ended() {
        let pool = Pool::with_leaf(Entry::EMPTY);
        let at = entry_address(Gpa(0x4000), Level::Pt, VA);
        assert_eq!(translate(&pool, ROOT, VA), Err(NoLeaf::NotPresent(Level::Pt, at)));
        assert_eq!(translate(&pool, ROOT, Gva(1 << 47)), Err(NoLeaf::NotCanonical));
        assert!(matches!(
            translate(&pool, Gpa(0x9000), VA),
            Err(NoLeaf::Unreadable(Level::Pml4, _))
        ));
        assert_eq!(locate(&pool, ROOT, VA, Level::Pt), Ok(at));
    }

    #[test]
    fn a_visit_meets_every_table_and_leaf_once() {
        let pool = Pool::with_leaf(Entry::new(Gfn(0x77), Entry::DATA));
        let mut met = Vec::new();
        visit(&pool, ROOT, EVERYTHING, 10, &mut |v| met.push(v)).unwrap();
        assert_eq!(met.len(), 5);
        assert!(matches!(met[4], Visit::Leaf(leaf) if leaf.va == VA && leaf.frame() == Gfn(0x77)));
    }

    #[test]
    fn a_visit_of_a_range_meets_nothing_outside_it() {
        let pool = Pool::with_leaf(Entry::new(Gfn(0x77), Entry::DATA));
        let mut leaves = 0;
        let mut count = |v| leaves += u32::from(matches!(v, Visit::Leaf(_)));
        visit(&pool, ROOT, (Gva(VA.0 + 0x1000), Gva(u64::MAX)), 10, &mut count).unwrap();
        visit(&pool, ROOT, (Gva(0), Gva(VA.0 - 1)), 10, &mut count).unwrap();
        assert_eq!(leaves, 0);
    }

    #[test]
    fn tables_that_point_to_themselves_end_the_visit() {
        let mut pool = Pool::default();
        for index in 0..ENTRIES {
            pool.0.insert(ROOT.0 + 8 * index, Entry::new(Gfn(1), Entry::TABLE).0);
        }
        let mut met = 0_u32;
        assert_eq!(visit(&pool, ROOT, EVERYTHING, 64, &mut |_| met += 1), Err(TooManyTables));
    }

    #[test]
    fn a_table_outside_the_pool_is_reported_with_the_entry_that_points_there() {
        let mut pool = Pool::default();
        pool.set(ROOT, Level::Pml4, VA, Entry::new(Gfn(0x99), Entry::TABLE));
        let mut met = Vec::new();
        visit(&pool, ROOT, EVERYTHING, 10, &mut |v| met.push(v)).unwrap();
        let at = entry_address(ROOT, Level::Pml4, VA);
        let va = Gva(0xffff_8880_0000_0000);
        assert_eq!(met[1], Visit::Unreadable { at, table: Gpa(0x99000), va });
    }
}
