//! Paths to page tables that were revoked and that a CPU may still have in its paging-structure
//! caches. While it does, it may cache whatever is in such a table at the old address.

use super::duty::{Duty, PageFlush, Tag, cut};
use super::epochs::Scope;
use super::fill::{Fill, Healed, Run};
use super::runs::{between, learn, part, run_end, stored};
use super::set::{CpuSet, only};
use super::store::TooMany;
use lacuna_abi::addr::{FrameRange, Gfn, Gpa, Gva};
use lacuna_abi::paging::Level;
use std::collections::{BTreeMap, HashMap};

/// Most revoked paths that are kept, over all tables and CPUs. A question about all of memory looks
/// at every entry of their tables through each of them: what a hostile guest can make of it is this
/// times the entries of a table.
pub(super) const MAX_PATHS: usize = 1 << 12;
/// Most that are kept for one table: it is rarely linked at more than one place.
const MAX_PER_TABLE: usize = 512;

/// A revoked path to a table, for one CPU.
#[derive(Clone, Debug)]
pub(super) struct StalePath {
    pub cpu: u8,
    /// Root of the address space.
    pub root: Gpa,
    /// PCID under which the path may be cached.
    pub pcid: u16,
    /// Level of the entry that led to the table.
    pub level: Level,
    /// First address that the table spanned there.
    pub va: Gva,
    /// Number of the revoke.
    pub seq: u64,
    /// CR4.PGE was clear: entries with the Global bit have the PCID's tag.
    pub takes_globals: bool,
    pub fill: Fill,
    /// It could be cached only in what the CPU is about to lose.
    pub passing: bool,
    /// Global translations of the root are about to be lost, too.
    pub globals_die: bool,
}

impl StalePath {
    /// The tag of what is cached through it.
    pub(super) fn tag(&self, global: bool) -> Tag {
        if global && !self.takes_globals { Tag::Global } else { Tag::Pcid(self.pcid) }
    }

    /// What the CPU may have cached of a run of the table's entries, whose address is counted from
    /// the table's first.
    fn duties(&self, run: &Run, each: &mut dyn FnMut(Duty)) {
        let run = Run { va: self.va.wrapping_add(run.va.0), ..*run };
        let tag = self.tag(run.global);
        self.fill.held(&run, tag, &mut |run: Run, passing| {
            let Run { va, level, frames, since, .. } = run;
            let passing = passing || (self.passing && (tag != Tag::Global || self.globals_die));
            let (root, seq, cpus) = (self.root, self.seq.max(since), only(self.cpu));
            each(Duty { root, tag, level, va, frames, since, seq, cpus, passing });
        });
    }
}

/// A table that some CPU may still walk to.
#[derive(Clone, Debug, Default)]
struct StaleTable {
    /// What its entries map; addresses are counted from its first.
    leaves: Vec<Run>,
    paths: Vec<StalePath>,
}

/// A path to a table that CPUs may still walk, for reports.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::audit) struct TableDuty {
    /// Root of the address space.
    pub root: Gpa,
    /// PCID under which the path may be cached.
    pub pcid: u16,
    /// First address that the table spans there.
    pub va: Gva,
    /// Number of the revoke.
    pub seq: u64,
    /// CPUs that may cache it.
    pub cpus: CpuSet,
}

/// A page as a table of one level: what its entries say depends on that.
pub(super) type TableKey = (Gfn, Level);

/// All such tables, in an order that does not depend on how they came.
#[derive(Clone, Debug, Default)]
pub(super) struct StaleTables {
    tables: BTreeMap<TableKey, StaleTable>,
    paths: usize,
}

impl StaleTables {
    pub(super) fn is_empty(&self) -> bool {
        self.tables.is_empty()
    }

    pub(super) fn has(&self, table: Gfn) -> bool {
        !self.is_empty() && self.of_page(table).next().is_some()
    }

    /// The levels at which it is one.
    pub(super) fn levels(&self, table: Gfn) -> Vec<Level> {
        self.of_page(table).map(|((_, level), _)| *level).collect()
    }

    fn of_page(&self, table: Gfn) -> impl Iterator<Item = (&TableKey, &StaleTable)> {
        self.tables.range((table, Level::Pt)..=(table, Level::Pml4))
    }

    /// Adds a path to a table that holds `leaves`.
    pub(super) fn add(
        &mut self,
        table: Gfn,
        path: StalePath,
        leaves: &[Run],
    ) -> Result<(), TooMany> {
        let same = |old: &&mut StalePath| {
            (old.cpu, old.root, old.pcid, old.va, old.level, old.takes_globals)
                == (path.cpu, path.root, path.pcid, path.va, path.level, path.takes_globals)
        };
        // An entry of level 1 leads to no table.
        let Some(level) = path.level.below() else { return Ok(()) };
        let known = self.tables.entry((table, level)).or_default();
        learn(&mut known.leaves, leaves);
        if let Some(old) = known.paths.iter_mut().find(same) {
            // The older path is still cached; the newer one may be too.
            old.seq = old.seq.max(path.seq);
            old.passing &= path.passing;
            if super::is_no_earlier(path.fill.until, old.fill.until) {
                old.fill = path.fill;
            }
            return Ok(());
        }
        if self.paths >= MAX_PATHS || known.paths.len() >= MAX_PER_TABLE {
            return Err(TooMany);
        }
        known.paths.push(path);
        self.paths += 1;
        Ok(())
    }

    /// Entries of a table changed, `offset` bytes of address after its first. What CPUs may have
    /// cached of the old ones is reported if they were revoked.
    pub(super) fn written(
        &mut self,
        table: TableKey,
        (offset, bytes): (u64, u64),
        new: Option<Run>,
        (revoked, seq): (bool, u64),
        each: &mut dyn FnMut(Duty),
    ) {
        let Some(StaleTable { leaves, paths }) = self.tables.get_mut(&table) else { return };
        let end = offset + bytes;
        let touched = |run: &Run| run.va.0 < end && run_end(run) > offset;
        if !revoked && leaves.iter().any(touched) {
            return;
        }
        let mut old = std::mem::take(leaves);
        old.retain(|run| {
            if !touched(run) {
                return true;
            }
            let gone = between(run, offset, end);
            for path in paths.iter() {
                path.duties(&gone, &mut |duty| each(Duty { seq, ..duty }));
            }
            leaves.extend(cut(run.frames, gone.frames).map(|frames| part(run, frames)));
            false
        });
        leaves.append(&mut old);
        if let Some(run) = new {
            leaves.extend(stored(run));
        }
    }

    /// A table was linked by an entry of `level` into another one, which CPUs may still walk to: they
    /// may walk on to it.
    pub(super) fn extend(
        &mut self,
        parent: Gfn,
        (offset, level): (u64, Level),
        table: Gfn,
        leaves: &[Run],
    ) -> Result<(), TooMany> {
        let known = self.tables.get(&(parent, level));
        let paths: Vec<StalePath> = known.map(|known| known.paths.clone()).unwrap_or_default();
        paths.into_iter().try_for_each(|path| {
            let va = path.va.wrapping_add(offset);
            self.add(table, StalePath { va, level, ..path }, leaves)
        })
    }

    /// The CPU runs under `pcid` from now on, or with paging off.
    pub(super) fn switch(&mut self, cpu: u8, active: Option<u16>) {
        for path in self.of_cpu(cpu) {
            if active == Some(path.pcid) { path.fill.resume() } else { path.fill.end() }
        }
    }

    /// What the CPU announced has been carried out.
    pub(super) fn went_on(&mut self, cpu: u8, seq: u64, each: &mut dyn FnMut(Duty)) {
        for path in self.of_cpu(cpu) {
            path.fill.went_on(seq);
        }
        let passing = |path: &StalePath| path.cpu == cpu && path.passing;
        self.drop_paths(passing, &|path, global| global && !path.globals_die, each);
    }

    /// A big flush. What was cached through the paths that go and is not flushed itself is reported.
    pub(super) fn flush(&mut self, cpu: u8, scope: Scope, seq: u64, each: &mut dyn FnMut(Duty)) {
        let goes = |path: &StalePath| {
            path.cpu == cpu && scope.reaches(Tag::Pcid(path.pcid)) && path.seq < seq
        };
        let spared = |_: &StalePath, global| global && scope != Scope::Everything;
        self.drop_paths(goes, &spared, each);
    }

    /// A flush of pages. Paths that lead to them go, or all of the PCID.
    pub(super) fn flush_pages(
        &mut self,
        cpu: u8,
        flush: &PageFlush,
        all_paths: bool,
        each: &mut dyn FnMut(Duty),
    ) {
        let goes = |path: &StalePath| {
            path.cpu == cpu
                && path.pcid == flush.pcid
                && path.seq < flush.seq
                && (all_paths || flush.hits(path.va, path.level))
        };
        self.drop_paths(goes, &|_, _| true, each);
        // What the paths led to is stale already: that goes at once.
        let by = flush.seq;
        let healed = Healed::Pages { flush: *flush, leaves: true, paths: false, by };
        for path in self.of_cpu(cpu).filter(|path| path.fill.until.is_some()) {
            if flush.globals && flush.hits(path.va, path.level) {
                path.fill.heal(healed);
            }
        }
    }

    /// The second stage was closed for these frames: what is not filled again is gone.
    pub(super) fn heal(&mut self, frames: FrameRange, seq: u64) {
        let paths = self.tables.values_mut().flat_map(|known| &mut known.paths);
        for path in paths.filter(|path| path.fill.until.is_some()) {
            path.fill.heal(Healed::Frames(frames, seq));
        }
    }

    /// The CPU caches nothing any more.
    pub(super) fn forget_cpu(&mut self, cpu: u8) {
        self.drop_paths(|path| path.cpu == cpu, &|_, _| false, &mut |_| ());
    }

    /// What CPUs may have cached through the paths, and may cache again, of runs that are `near` when
    /// they are reached by a path: those of the duties that are `wanted`. Each run is looked at once
    /// for each path to its table, and each duty is stored once whatever there is already.
    pub(super) fn duties(
        &self,
        near: impl Fn(&StalePath, &Run) -> bool,
        wanted: impl Fn(&Duty) -> bool,
        all: &mut Vec<Duty>,
    ) {
        // Not by the quick hash: what is hashed here a guest can choose.
        let mut known: HashMap<DutyKey, usize> = HashMap::new();
        for StaleTable { leaves, paths } in self.tables.values() {
            for path in paths {
                for run in leaves.iter().filter(|run| near(path, run)) {
                    path.duties(run, &mut |duty| {
                        if !wanted(&duty) {
                            return;
                        }
                        let at = *known.entry(key_of(&duty)).or_insert(all.len());
                        match all.get_mut(at) {
                            Some(old) => old.cpus |= duty.cpus,
                            None => all.push(duty),
                        }
                    });
                }
            }
        }
    }

    /// Duties of a table.
    pub(super) fn of_table(&self, table: Gfn) -> Vec<TableDuty> {
        let mut all: Vec<TableDuty> = Vec::new();
        let paths = self.of_page(table).flat_map(|(_, known)| &known.paths);
        for StalePath { cpu, root, pcid, va, seq, .. } in paths {
            let same = |old: &&mut TableDuty| (old.root, old.pcid, old.va) == (*root, *pcid, *va);
            match all.iter_mut().find(same) {
                Some(old) => (old.cpus, old.seq) = (old.cpus | only(*cpu), old.seq.max(*seq)),
                None => {
                    let cpus = only(*cpu);
                    all.push(TableDuty { root: *root, pcid: *pcid, va: *va, seq: *seq, cpus });
                }
            }
        }
        all
    }

    /// Every table, what it holds, and its paths.
    #[cfg(test)]
    pub(super) fn all(&self) -> impl Iterator<Item = (Gfn, &[Run], &[StalePath])> {
        self.tables.iter().map(|((table, _), known)| (*table, &*known.leaves, &*known.paths))
    }

    fn of_cpu(&mut self, cpu: u8) -> impl Iterator<Item = &mut StalePath> {
        let paths = self.tables.values_mut().flat_map(|known| &mut known.paths);
        paths.filter(move |path| path.cpu == cpu)
    }

    /// Drops paths and reports what was cached through them, of entries whose Global bit is spared.
    fn drop_paths(
        &mut self,
        goes: impl Fn(&StalePath) -> bool,
        spared: &dyn Fn(&StalePath, bool) -> bool,
        each: &mut dyn FnMut(Duty),
    ) {
        if self.is_empty() {
            return;
        }
        self.paths = 0;
        self.tables.retain(|_, StaleTable { leaves, paths }| {
            paths.retain(|path| {
                if !goes(path) {
                    return true;
                }
                for run in leaves.iter() {
                    if spared(path, path.tag(run.global) == Tag::Global) {
                        path.duties(run, &mut |duty| each(Duty { passing: false, ..duty }));
                    }
                }
                false
            });
            self.paths += paths.len();
            !paths.is_empty()
        });
    }
}

/// What makes two duties the same but for their numbers and CPUs ([`Duty::is_same`]).
type DutyKey = (Gva, Gfn, u64, Tag, Level, Gpa, bool);

fn key_of(duty: &Duty) -> DutyKey {
    let Duty { root, tag, level, va, frames, passing, .. } = *duty;
    (va, frames.start(), frames.count(), tag, level, root, passing)
}
