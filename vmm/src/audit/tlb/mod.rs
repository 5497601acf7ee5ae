//! What CPUs may still cache of what was revoked: which CPU, which translation, granted and revoked
//! when. It knows nothing of rules.
//!
//! What a TLB holds cannot be known; what it may hold can. A present entry may be cached by any CPU
//! that can walk to it, at any time and speculatively, and stay until an invalidation that must
//! remove it (Intel SDM volume 3, "Details of TLB Use", "Caches for Paging Structures"). A
//! revoked entry is therefore a **duty** of every CPU that may have cached it before: to invalidate
//! it. Three things are kept:
//!
//! - the *spaces* of each CPU: roots, with a tag, from which it fills or once filled its caches, so
//!   that of an entry it is known who may have cached it (`cpu`, `fill`);
//! - the *duties*, found by frame and by address (`store`), discharged one by one or, by big flushes,
//!   through epochs (`epochs`);
//! - revoked *paths*: through an entry that led to a table, which paging-structure caches may still
//!   hold, a CPU goes on to cache whatever the table holds (`stale`).
//!
//! **Numbers.** Calls come in the order of the events' numbers. A revoke has its number after its
//! effect; a flush and a root load have it before. So a flush discharges what has a smaller number;
//! that a CPU runs in another address space is certain only when its next event has come, and until
//! then it may run in either.
//!
//! **Bounds.** What is kept is bounded; what exceeds a bound is reported as [`TooMany`], but for the
//! flushes of single pages, and the seals, that a CPU sees in a space that it has left: of these the
//! last 32 count, and more is then called cached than can be.
#![forbid(unsafe_code)]

mod cpu;
mod duty;
mod epochs;
mod fill;
mod profile;
mod set;
mod stale;
mod store;
#[cfg(test)]
mod tests;

pub(in crate::audit) use duty::{Duty, Tag};
pub use profile::Profile;
pub(in crate::audit) use set::{CpuSet, EVERY, cpu_list, members, only};
pub(in crate::audit) use stale::TableDuty;
pub(in crate::audit) use store::TooMany;

use cpu::{Cpu, Mode};
use duty::PageFlush;
use epochs::{Epochs, Scope};
use fill::Run;
use lacuna_abi::addr::{FrameRange, Gfn, Gpa, Gva};
use lacuna_abi::event::{ControlRegister, Flush};
use lacuna_abi::paging::Level;
use stale::{StalePath, StaleTables};
use store::Duties;

/// Bits of control registers that decide what is cached, and whose changes invalidate.
mod bits {
    pub(super) const CR0_PG: u64 = 1 << 31;
    pub(super) const CR4_PAE: u64 = 1 << 5;
    pub(super) const CR4_PGE: u64 = 1 << 7;
    pub(super) const CR4_PCIDE: u64 = 1 << 17;
    pub(super) const CR4_SMEP: u64 = 1 << 20;
    pub(super) const EFER_TCE: u64 = 1 << 15;
}

/// How the CPUs start.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::audit) struct Start {
    /// Root.
    pub root: Gpa,
    /// CR0.
    pub cr0: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
}

/// A run of leaf entries of one table that map consecutive frames.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::audit) struct Leaves {
    /// Root of the address space.
    pub root: Gpa,
    /// First address.
    pub va: Gva,
    /// Level of the entries.
    pub level: Level,
    /// The frames of all of them.
    pub frames: FrameRange,
    /// They have the Global bit.
    pub global: bool,
    /// Number of the event that granted them.
    pub since: u64,
}

impl Leaves {
    const fn run(&self) -> Run {
        let Self { va, level, frames, global, since, .. } = *self;
        Run { va, level, frames, global, since }
    }

    /// The same with addresses counted from the first that the table spans.
    fn run_from(&self, first: Gva) -> Run {
        Run { va: Gva(self.va.0.saturating_sub(first.0)), ..self.run() }
    }
}

/// An entry that leads to a table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::audit) struct Path {
    /// Root of the address space.
    pub root: Gpa,
    /// First address that the entry spans.
    pub va: Gva,
    /// Level of the entry.
    pub level: Level,
    /// The table.
    pub table: Gfn,
    /// Number of the event that granted it.
    pub since: u64,
}

/// A run of entries of a table that were written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::audit) struct Written {
    /// The table.
    pub table: Gfn,
    /// Bytes of address between what the table and what the run spans first.
    pub offset: u64,
    /// Bytes of address that the run spans.
    pub bytes: u64,
    /// The entries took away a translation or a right.
    pub revoked: bool,
    /// What they map now: frames and Global bit.
    pub new: Option<(FrameRange, bool)>,
    /// Level of the table.
    pub level: Level,
    /// Number of the grant.
    pub since: u64,
    /// Number of the event.
    pub seq: u64,
}

/// What all CPUs may cache that was revoked.
#[derive(Clone, Debug)]
pub(in crate::audit) struct Tlb {
    profile: Profile,
    cpus: Vec<Cpu>,
    epochs: Epochs,
    duties: Duties,
    stale: StaleTables,
    /// Kept to be filled again: tag, whether passing, and the CPUs of it.
    groups: Vec<(Tag, bool, CpuSet)>,
}

impl Tlb {
    /// `count` CPUs, none of which runs.
    pub(in crate::audit) fn new(count: usize, start: Start, profile: Profile) -> Self {
        let Start { root, cr0, cr4, efer } = start;
        let mode = (cr0 & bits::CR0_PG != 0, cr4 & bits::CR4_PGE != 0);
        Self {
            profile,
            cpus: vec![Cpu::new(root, (cr0, cr4, efer), mode); count],
            epochs: Epochs::default(),
            duties: Duties::default(),
            stale: StaleTables::default(),
            groups: Vec::new(),
        }
    }

    /// The CPU runs from here on; it has cached nothing yet.
    pub(in crate::audit) fn start(&mut self, cpu: u8) {
        if let Some(cpu) = self.cpus.get_mut(usize::from(cpu))
            && !cpu.running
        {
            cpu.start();
        }
    }

    /// The CPU was reset, to start again like the others: it caches nothing any more (SDM volume 3,
    /// "Operations that Invalidate TLBs and Paging-Structure Caches").
    pub(in crate::audit) fn stop(&mut self, cpu: u8, start: Start) {
        if let Some(state) = self.cpus.get_mut(usize::from(cpu)) {
            let Start { root, cr0, cr4, efer } = start;
            let mode = (cr0 & bits::CR0_PG != 0, cr4 & bits::CR4_PGE != 0);
            *state = Cpu::new(root, (cr0, cr4, efer), mode);
            self.duties.forget_cpu(cpu);
            self.stale.forget_cpu(cpu);
        }
    }

    /// Whether the CPU runs.
    pub(in crate::audit) fn is_running(&self, cpu: u8) -> bool {
        self.cpus.get(usize::from(cpu)).is_some_and(|cpu| cpu.running)
    }

    /// Whether the CPU may have this root in CR3, by its root loads.
    pub(in crate::audit) fn may_run_in(&self, cpu: u8, root: Gpa) -> bool {
        let spaces = self.cpus.get(usize::from(cpu)).into_iter().flat_map(|cpu| &cpu.spaces);
        spaces.into_iter().any(|space| space.root == root && space.fill.until.is_none())
    }

    /// Root and PCID that the CPU runs in, by its root loads; `None` if it does not run.
    pub(in crate::audit) fn space_of(&self, cpu: u8) -> Option<(Gpa, u16)> {
        let cpu = self.cpus.get(usize::from(cpu)).filter(|cpu| cpu.running)?;
        Some((cpu.mode.root, cpu.mode.pcid))
    }

    /// The PCID under which the CPU uses a root that is registered with this one.
    pub(in crate::audit) fn pcid_on(&self, cpu: u8, registered: u16) -> u16 {
        let cpu = self.cpus.get(usize::from(cpu));
        if cpu.is_some_and(|cpu| cpu.cr4 & bits::CR4_PCIDE != 0) { registered } else { 0 }
    }

    /// The CPUs that run.
    pub(in crate::audit) fn running(&self) -> CpuSet {
        self.those(|cpu| cpu.running)
    }

    /// The CPUs that may cache anything of the root's that no CR3 load spares.
    pub(in crate::audit) fn may_cache(&self, root: Gpa) -> CpuSet {
        self.those(|cpu| cpu.running && cpu.may_cache(root))
    }

    /// The CPU has its next event, `seq`: what it announced before has been carried out.
    pub(in crate::audit) fn went_on(&mut self, cpu: u8, seq: u64) -> Result<(), TooMany> {
        let Some(state) = self.cpus.get_mut(usize::from(cpu)) else { return Ok(()) };
        self.epochs.went_on(cpu, seq);
        if !state.went_on(seq) || self.stale.is_empty() {
            return Ok(());
        }
        let Self { stale, duties, epochs, .. } = self;
        let mut kept = Ok(());
        stale.went_on(cpu, seq, &mut |duty| kept = kept.and(duties.add(&duty, epochs)));
        kept
    }

    /// The CPU loads CR3. Without bit 63 that drops all but global translations of the new PCID
    /// (SDM volume 3, "Operations that Invalidate TLBs and Paging-Structure Caches"; bit 63 is
    /// `no_flush`).
    pub(in crate::audit) fn load(
        &mut self,
        cpu: u8,
        (root, pcid): (Gpa, u16),
        no_flush: bool,
        seq: u64,
    ) -> Result<(), TooMany> {
        let Some(state) = self.running_mut(cpu) else { return Ok(()) };
        let pcid = if state.cr4 & bits::CR4_PCIDE != 0 { pcid } else { 0 };
        let mode = Mode { root, pcid, ..state.mode };
        let scope = (!no_flush).then_some(Scope::Pcid(pcid));
        let entered = state.switch(mode, scope, seq);
        let flushed = scope.map_or(Ok(()), |scope| self.flush_duties(cpu, scope, seq));
        self.stale.switch(cpu, mode.paging.then_some(pcid));
        entered.map_err(|_| TooMany).and(flushed)
    }

    /// The CPU invalidates.
    pub(in crate::audit) fn flush(
        &mut self,
        cpu: u8,
        flush: &Flush,
        seq: u64,
    ) -> Result<(), TooMany> {
        let profile = self.profile;
        let Some(state) = self.running_mut(cpu) else { return Ok(()) };
        let pcid = state.mode.pcid;
        match *flush {
            Flush::NonGlobal => self.flush_scope(cpu, Scope::Pcid(pcid), seq),
            Flush::Pcid(pcid) => self.flush_scope(cpu, Scope::Pcid(pcid), seq),
            Flush::AllPcids => self.flush_scope(cpu, Scope::AllPcids, seq),
            Flush::Everything => self.flush_scope(cpu, Scope::Everything, seq),
            // INVLPG drops global translations of the page under any PCID, and all paths of its
            // own PCID, whatever the address.
            Flush::Pages { va, count, level } => {
                let spares_globals =
                    profile == Profile::IntelInvlpgErratum && state.cr4 & bits::CR4_PCIDE != 0;
                let spares_paths = profile == Profile::Amd && state.efer & bits::EFER_TCE != 0;
                let flush = PageFlush { va, count, level, pcid, globals: !spares_globals, seq };
                self.flush_pages(cpu, &flush, !spares_paths)
            }
            // INVPCID of type 0 drops what translates the address: of the paths only those.
            Flush::PageOfPcid { va, pcid } => {
                let (count, level, globals) = (1, Level::Pt, false);
                let flush = PageFlush { va, count, level, pcid, globals, seq };
                self.flush_pages(cpu, &flush, false)
            }
        }
    }

    /// The CPU changes a control register. CR0.WP and EFER.NXE change what a cached entry permits,
    /// not what is cached (SDM volume 3, "Access Rights").
    pub(in crate::audit) fn control(
        &mut self,
        cpu: u8,
        register: ControlRegister,
        (old, new): (u64, u64),
        seq: u64,
    ) -> Result<(), TooMany> {
        let Some(state) = self.running_mut(cpu) else { return Ok(()) };
        let known = match register {
            ControlRegister::Cr0 => &mut state.cr0,
            ControlRegister::Cr4 => &mut state.cr4,
            ControlRegister::Efer => &mut state.efer,
        };
        // Only a change that the record and what is known agree on invalidates anything.
        let changed = (old ^ new) & (*known ^ new);
        *known = new;
        let mode = Mode {
            paging: state.cr0 & bits::CR0_PG != 0,
            globals: state.cr4 & bits::CR4_PGE != 0,
            pcid: if state.cr4 & bits::CR4_PCIDE != 0 { state.mode.pcid } else { 0 },
            ..state.mode
        };
        let has = |bit| changed & bit != 0;
        let gone = |bit| has(bit) && new & bit == 0;
        let (everything, pcid) = match register {
            ControlRegister::Cr0 => (gone(bits::CR0_PG), false),
            ControlRegister::Cr4 => (
                has(bits::CR4_PGE) || gone(bits::CR4_PCIDE),
                has(bits::CR4_PAE) || (has(bits::CR4_SMEP) && new & bits::CR4_SMEP != 0),
            ),
            ControlRegister::Efer => (false, false),
        };
        if everything {
            let flushed = self.flush_scope(cpu, Scope::Everything, seq);
            let entered = self.running_mut(cpu).map_or(Ok(()), |cpu| cpu.flush_for(mode, seq));
            self.stale.switch(cpu, mode.paging.then_some(mode.pcid));
            return entered.map_err(|_| TooMany).and(flushed);
        }
        let was = state.mode;
        let entered = if mode == was { Ok(()) } else { state.switch(mode, None, seq) };
        if mode != was {
            self.stale.switch(cpu, mode.paging.then_some(mode.pcid));
        }
        let flushed =
            if pcid { self.flush_scope(cpu, Scope::Pcid(mode.pcid), seq) } else { Ok(()) };
        entered.map_err(|_| TooMany).and(flushed)
    }

    /// Leaf entries were revoked (SDM volume 3, "Recommended Invalidation"). Of the CPUs only those
    /// `among` are looked at.
    pub(in crate::audit) fn revoke(
        &mut self,
        leaves: &Leaves,
        among: CpuSet,
        seq: u64,
    ) -> Result<(), TooMany> {
        self.revoke_unless(leaves, among, seq, |_, _| false)
    }

    /// The duties that [`Self::revoke`] would add, without adding them.
    pub(in crate::audit) fn would_owe(
        &self,
        leaves: &Leaves,
        among: CpuSet,
        seq: u64,
    ) -> Vec<Duty> {
        let mut duties = Vec::new();
        for cpu in members(among) {
            let Some(state) = self.cpus.get(usize::from(cpu)).filter(|cpu| cpu.running) else {
                continue;
            };
            let spaces = state.spaces.iter().filter(|s| s.root == leaves.root);
            for space in spaces.filter(|space| space.takes(leaves.global)) {
                space.fill.held(&leaves.run(), space.tag, &mut |run| {
                    duties.push(duty(leaves.root, (space.tag, space.dying), &run, only(cpu), seq));
                });
            }
        }
        duties
    }

    /// An entry that led to a table was revoked, and with it what was mapped through it: `leaves`
    /// are the table's own, with the CPUs among which they are looked for. The path may be cached by
    /// itself, even where nothing is present below (the same section).
    pub(in crate::audit) fn unlink(
        &mut self,
        path: &Path,
        leaves: &[(Leaves, CpuSet)],
        seq: u64,
    ) -> Result<(), TooMany> {
        let mut kept = Ok(());
        let runs: Vec<Run> = leaves.iter().map(|(leaves, _)| leaves.run_from(path.va)).collect();
        let Self { cpus, stale, .. } = self;
        let mut covered: Vec<(u8, u16, Option<u64>)> = Vec::new();
        for (cpu, state) in (0..).zip(cpus.iter()).filter(|(_, state)| state.running) {
            for space in state.spaces.iter().filter(|space| space.root == path.root) {
                let Tag::Pcid(pcid) = space.tag else { continue };
                let held = space.paths || space.fill.until.is_none();
                if !held || !space.fill.holds_path(path.va, path.level, path.since) {
                    continue;
                }
                let Path { root, va, level, table, .. } = *path;
                let (takes_globals, passing) = (space.takes_globals, space.dying);
                let fill = space.fill.clone();
                let globals_die = state.spaces.iter().any(|other| {
                    other.root == path.root && other.tag == Tag::Global && other.dying
                });
                if !passing {
                    covered.push((cpu, pcid, fill.until));
                }
                let path = StalePath {
                    cpu,
                    root,
                    pcid,
                    level,
                    va,
                    seq,
                    takes_globals,
                    fill,
                    passing,
                    globals_die,
                };
                kept = kept.and(stale.add(table, path, &runs));
            }
        }
        // What CPUs may have cached through the path is a duty as long as the path is one.
        for (leaves, among) in leaves {
            let is_covered = |cpu: u8, space: &cpu::Space| {
                covered.iter().any(|(holder, pcid, until)| {
                    *holder == cpu
                        && !space.dying
                        && match space.tag {
                            Tag::Pcid(tag) => tag == *pcid,
                            Tag::Global => is_no_earlier(*until, space.fill.until),
                        }
                })
            };
            kept = kept.and(self.revoke_unless(leaves, *among, seq, is_covered));
        }
        kept
    }

    /// Whether anything depends on what is written into this table while CPUs may still walk to it
    /// by a revoked path.
    pub(in crate::audit) fn is_stale_table(&self, table: Gfn) -> bool {
        self.stale.has(table)
    }

    /// Whether there is any such table.
    pub(in crate::audit) fn has_stale_tables(&self) -> bool {
        !self.stale.is_empty()
    }

    /// Entries of a table were written: by revoked paths CPUs may cache them where they are no
    /// longer mapped.
    pub(in crate::audit) fn written(&mut self, written: &Written) -> Result<(), TooMany> {
        let Written { table, offset, bytes, revoked, new, level, since, seq } = *written;
        let new = new.map(|(frames, global)| Run { va: Gva(offset), level, frames, global, since });
        let Self { stale, duties, epochs, .. } = self;
        let mut kept = Ok(());
        stale.written(table, (offset, bytes), new, (revoked, seq), &mut |duty| {
            kept = kept.and(duties.add(&duty, epochs));
        });
        kept
    }

    /// A table was linked into `parent`, `offset` bytes of address after what that spans first: by a
    /// revoked path to `parent` CPUs may walk on to it. `leaves` are its own.
    pub(in crate::audit) fn linked(
        &mut self,
        parent: Gfn,
        offset: u64,
        path: &Path,
        leaves: &[Leaves],
    ) -> Result<(), TooMany> {
        let runs: Vec<Run> = leaves.iter().map(|leaves| leaves.run_from(path.va)).collect();
        self.stale.extend(parent, (offset, path.level), path.table, &runs)
    }

    /// No translation to these frames that was revoked before `seq` is left on any CPU: the second
    /// stage was closed for them and its translations dropped (SDM volume 3, "Caching Translation
    /// Information" under VMX support: INVEPT). Paths to tables are not among them.
    pub(in crate::audit) fn discharge(
        &mut self,
        frames: FrameRange,
        seq: u64,
    ) -> Result<(), TooMany> {
        self.cpus.iter_mut().for_each(|cpu| cpu.heal(frames));
        if !self.stale.is_empty() {
            self.stale.heal(frames);
        }
        self.duties.discharge(frames, seq, &self.epochs)
    }

    /// Duties for any of these frames, with the CPUs that may still cache them.
    pub(in crate::audit) fn of_frames(&self, frames: FrameRange) -> Vec<Duty> {
        let mut all = Vec::new();
        let touching = |duty: &Duty| duty.frames.intersection(frames).is_some();
        if !self.stale.is_empty() {
            self.stale.duties(touching, &mut all);
        }
        self.duties.of_frames(frames, &self.epochs, &mut all);
        all
    }

    /// Duties for any address in `first..=last`, cut to these addresses where they are of small
    /// pages, with the CPUs that may still cache them.
    pub(in crate::audit) fn at(&self, first: Gva, last: Gva) -> Vec<Duty> {
        let mut all = Vec::new();
        if !self.stale.is_empty() {
            self.stale.duties(|duty| duty.va <= last && duty.last() >= first, &mut all);
        }
        self.duties.at((first, last), &self.epochs, &mut all);
        all.iter_mut().for_each(|duty| *duty = duty.between(first, last));
        all
    }

    /// Paths to a table that CPUs may still walk though their entries were revoked.
    pub(in crate::audit) fn of_table(&self, table: Gfn) -> Vec<TableDuty> {
        if self.stale.is_empty() { Vec::new() } else { self.stale.of_table(table) }
    }

    fn running_mut(&mut self, cpu: u8) -> Option<&mut Cpu> {
        self.cpus.get_mut(usize::from(cpu)).filter(|cpu| cpu.running)
    }

    fn those(&self, wanted: impl Fn(&Cpu) -> bool) -> CpuSet {
        let wanted = (0..).zip(&self.cpus).filter(|(_, cpu)| wanted(cpu));
        wanted.fold(0, |set, (cpu, _)| set | only(cpu))
    }

    fn flush_scope(&mut self, cpu: u8, scope: Scope, seq: u64) -> Result<(), TooMany> {
        if let Some(state) = self.cpus.get_mut(usize::from(cpu)) {
            state.flush(scope, seq);
        }
        self.flush_duties(cpu, scope, seq)
    }

    fn flush_duties(&mut self, cpu: u8, scope: Scope, seq: u64) -> Result<(), TooMany> {
        let Self { stale, duties, epochs, .. } = self;
        epochs.flush(cpu, scope, seq);
        let mut kept = Ok(());
        if !stale.is_empty() {
            stale.flush(cpu, scope, seq, &mut |duty| kept = kept.and(duties.add(&duty, epochs)));
        }
        kept
    }

    fn flush_pages(&mut self, cpu: u8, flush: &PageFlush, all_paths: bool) -> Result<(), TooMany> {
        let mut kept = Ok(());
        let Self { cpus, stale, duties, epochs, .. } = self;
        if !stale.is_empty() {
            stale.flush_pages(cpu, flush, all_paths, &mut |duty| {
                kept = kept.and(duties.add(&duty, epochs));
            });
        }
        kept = kept.and(duties.invalidate(cpu, flush, epochs));
        if let Some(state) = cpus.get_mut(usize::from(cpu)) {
            state.flush_pages(flush, all_paths);
        }
        kept
    }

    /// Makes duties of leaf entries for every CPU `among` that may cache them, but for spaces that
    /// are `covered` otherwise.
    fn revoke_unless(
        &mut self,
        leaves: &Leaves,
        among: CpuSet,
        seq: u64,
        covered: impl Fn(u8, &cpu::Space) -> bool,
    ) -> Result<(), TooMany> {
        let run = leaves.run();
        let Self { cpus, duties, epochs, groups, .. } = self;
        groups.clear();
        let mut kept = Ok(());
        for cpu in members(among) {
            let Some(state) = cpus.get(usize::from(cpu)).filter(|cpu| cpu.running) else {
                continue;
            };
            for space in state.spaces.iter().filter(|space| space.root == leaves.root) {
                if !space.takes(leaves.global) || covered(cpu, space) {
                    continue;
                }
                let kind = (space.tag, space.dying);
                space.fill.held(&run, space.tag, &mut |part| {
                    if part != run {
                        let duty = duty(leaves.root, kind, &part, only(cpu), seq);
                        kept = kept.and(duties.add(&duty, epochs));
                        return;
                    }
                    // Most CPUs hold all of it under the same tag: one duty for all of them.
                    match groups.iter_mut().find(|(tag, passing, _)| (*tag, *passing) == kind) {
                        Some((_, _, cpus)) => *cpus |= only(cpu),
                        None => groups.push((kind.0, kind.1, only(cpu))),
                    }
                });
            }
        }
        for (tag, passing, cpus) in groups.iter() {
            let duty = duty(leaves.root, (*tag, *passing), &run, *cpus, seq);
            kept = kept.and(duties.add(&duty, epochs));
        }
        kept
    }
}

/// Whether what could be filled until `first` could be at least as long as what could until `second`;
/// `None` is now.
fn is_no_earlier(first: Option<u64>, second: Option<u64>) -> bool {
    first.is_none_or(|first| second.is_some_and(|second| first >= second))
}

fn duty(root: Gpa, (tag, passing): (Tag, bool), run: &Run, cpus: CpuSet, seq: u64) -> Duty {
    let Run { va, level, frames, since, .. } = *run;
    Duty { root, tag, level, va, frames, since, seq, cpus, passing }
}
