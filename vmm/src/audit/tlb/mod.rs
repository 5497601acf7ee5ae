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
//!   that of an entry it is known who may have cached it (`cpu`, `fill`, `flush`);
//! - the *duties* (`revoke`), found by frame and by address (`store`, `spots`), discharged one by one or, by big flushes,
//!   through epochs (`epochs`);
//! - revoked *paths*: through an entry that led to a table, which paging-structure caches may still
//!   hold, a CPU goes on to cache whatever the table holds (`stale`, `runs`).
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
mod flush;
mod profile;
mod revoke;
mod runs;
mod set;
mod spots;
mod stale;
mod store;
#[cfg(test)]
mod tests;

pub(in crate::audit) use duty::{Duty, Tag};
pub use profile::Profile;
pub(in crate::audit) use set::{CpuSet, EVERY, cpu_list, members, only};
pub(in crate::audit) use stale::TableDuty;
pub(in crate::audit) use store::TooMany;

use cpu::Cpu;
use epochs::Epochs;
use fill::Run;
use lacuna_abi::addr::{FrameRange, Gfn, Gpa, Gva};
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
    #[inline]
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
    #[inline]
    pub(in crate::audit) fn may_cache(&self, root: Gpa) -> CpuSet {
        self.those(|cpu| cpu.running && cpu.may_cache(root))
    }

    /// Root and PCID of a CPU.
    pub(in crate::audit) fn space(&self, cpu: u8) -> Option<(Gpa, u16)> {
        self.cpus.get(usize::from(cpu)).map(|cpu| (cpu.mode.root, cpu.mode.pcid))
    }

    /// The CPU has its next event, `seq`: what it announced before has been carried out.
    #[inline]
    pub(in crate::audit) fn went_on(&mut self, cpu: u8, seq: u64) -> Result<(), TooMany> {
        let Some(state) = self.cpus.get_mut(usize::from(cpu)) else { return Ok(()) };
        self.epochs.went_on(cpu, seq);
        if !state.has_announced() || !state.went_on(seq) || self.stale.is_empty() {
            return Ok(());
        }
        self.stale_went_on(cpu, seq)
    }

    fn stale_went_on(&mut self, cpu: u8, seq: u64) -> Result<(), TooMany> {
        let Self { stale, duties, epochs, .. } = self;
        let mut kept = Ok(());
        stale.went_on(cpu, seq, &mut |duty| kept = kept.and(duties.add(&duty, epochs)));
        kept
    }

    /// Whether anything depends on what is written into this table while CPUs may still walk to it
    /// by a revoked path.
    pub(in crate::audit) fn is_stale_table(&self, table: Gfn) -> bool {
        self.stale.has(table)
    }

    /// The levels of the tables that it is by those paths.
    pub(in crate::audit) fn stale_levels(&self, table: Gfn) -> Vec<Level> {
        self.stale.levels(table)
    }

    /// Whether there is any such table.
    pub(in crate::audit) fn has_stale_tables(&self) -> bool {
        !self.stale.is_empty()
    }

    /// No translation to these frames that was revoked before `seq` is left on any CPU: the second
    /// stage was closed for them and its translations dropped (SDM volume 3, "Caching Translation
    /// Information" under VMX support: INVEPT). Paths to tables are not among them.
    pub(in crate::audit) fn discharge(
        &mut self,
        frames: FrameRange,
        seq: u64,
    ) -> Result<(), TooMany> {
        self.cpus.iter_mut().for_each(|cpu| cpu.heal(frames, seq));
        if !self.stale.is_empty() {
            self.stale.heal(frames, seq);
        }
        self.duties.discharge(frames, seq, &self.epochs)
    }

    /// Duties for any of these frames, with the CPUs that may still cache them.
    pub(in crate::audit) fn of_frames(&self, frames: FrameRange) -> Vec<Duty> {
        self.some_of_frames(frames, |_| true)
    }

    /// Those of them that are `wanted`.
    #[inline]
    pub(in crate::audit) fn some_of_frames(
        &self,
        frames: FrameRange,
        wanted: impl Fn(&Duty) -> bool,
    ) -> Vec<Duty> {
        let mut all = Vec::new();
        let touching = |duty: &Duty| duty.frames.intersection(frames).is_some() && wanted(duty);
        if !self.stale.is_empty() {
            let near = |_: &StalePath, run: &Run| run.frames.intersection(frames).is_some();
            self.stale.duties(near, touching, &mut all);
        }
        self.duties.of_frames(frames, &self.epochs, &mut all, touching);
        in_order(&mut all);
        all
    }

    /// Those of the duties for any address in `first..=last` that are `wanted`, cut to these
    /// addresses where they are of small pages, with the CPUs that may still cache them.
    #[inline]
    pub(in crate::audit) fn at(
        &self,
        (first, last): (Gva, Gva),
        wanted: impl Fn(&Duty) -> bool,
    ) -> Vec<Duty> {
        let mut all = Vec::new();
        let touching = |duty: &Duty| duty.va <= last && duty.last() >= first && wanted(duty);
        if !self.stale.is_empty() {
            let near = |path: &StalePath, run: &Run| {
                let start = path.va.0.wrapping_add(run.va.0);
                let bytes = runs::run_end(run) - run.va.0;
                start <= last.0 && start.wrapping_add(bytes - 1) >= first.0
            };
            self.stale.duties(near, touching, &mut all);
        }
        self.duties.at((first, last), &self.epochs, &mut all, touching);
        all.iter_mut().for_each(|duty| *duty = duty.between(first, last));
        in_order(&mut all);
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
}

/// Puts duties in an order that does not depend on where they are stored: the oldest revoke first.
#[inline]
fn in_order(all: &mut [Duty]) {
    if all.len() > 1 {
        all.sort_unstable_by_key(Duty::order);
    }
}

/// Whether what could be filled until `first` could be at least as long as what could until `second`;
/// `None` is now.
fn is_no_earlier(first: Option<u64>, second: Option<u64>) -> bool {
    first.is_none_or(|first| second.is_some_and(|second| first >= second))
}
