//! What writes take away: leaves and paths that CPUs may go on caching.

use super::cpu::Space;
use super::duty::{Duty, Tag};
use super::fill::{Gone, Run};
use super::set::{CpuSet, members, only};
use super::stale::StalePath;
use super::store::TooMany;
use super::{Leaves, Path, Tlb, Written, is_no_earlier};
use lacuna_abi::addr::{Gfn, Gpa, Gva};

impl Tlb {
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
                space.fill.held(&leaves.run(), space.tag, &mut |run, passing| {
                    let kind = (space.tag, space.dying || passing);
                    duties.push(duty(leaves.root, kind, &run, only(cpu), seq));
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
                let gone = match space.fill.path_gone(path.va, path.level, path.since) {
                    // All paths of the PCID went.
                    _ if !space.paths && space.fill.until.is_some() => Gone::Certainly,
                    Gone::No if !space.paths => Gone::WithTheNextEvent,
                    gone => gone,
                };
                if gone == Gone::Certainly {
                    continue;
                }
                let Path { root, va, level, table, .. } = *path;
                let takes_globals = space.takes_globals;
                let passing = space.dying || gone == Gone::WithTheNextEvent;
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
            let is_covered = |cpu: u8, space: &Space| {
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

    /// Entries of a table were written: by revoked paths CPUs may cache them where they are no
    /// longer mapped.
    pub(in crate::audit) fn written(&mut self, written: &Written) -> Result<(), TooMany> {
        let Written { table, offset, bytes, revoked, new, level, since, seq } = *written;
        let new = new.map(|(frames, global)| Run { va: Gva(offset), level, frames, global, since });
        let Self { stale, duties, epochs, .. } = self;
        let mut kept = Ok(());
        stale.written((table, level), (offset, bytes), new, (revoked, seq), &mut |duty| {
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

    /// Makes duties of leaf entries for every CPU `among` that may cache them, but for spaces that
    /// are `covered` otherwise.
    #[inline]
    fn revoke_unless(
        &mut self,
        leaves: &Leaves,
        among: CpuSet,
        seq: u64,
        covered: impl Fn(u8, &Space) -> bool,
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
                if space.fill.is_whole() {
                    group(groups, kind, only(cpu));
                    continue;
                }
                space.fill.held(&run, space.tag, &mut |part, passing| {
                    let kind = (kind.0, kind.1 || passing);
                    if part != run {
                        let duty = duty(leaves.root, kind, &part, only(cpu), seq);
                        kept = kept.and(duties.add(&duty, epochs));
                        return;
                    }
                    // Most CPUs hold all of it under the same tag: one duty for all of them.
                    group(groups, kind, only(cpu));
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

/// Adds CPUs to those with the same tag.
#[inline]
fn group(groups: &mut Vec<(Tag, bool, CpuSet)>, (tag, passing): (Tag, bool), more: CpuSet) {
    match groups.iter_mut().find(|(t, p, _)| (*t, *p) == (tag, passing)) {
        Some((_, _, cpus)) => *cpus |= more,
        None => groups.push((tag, passing, more)),
    }
}

fn duty(root: Gpa, (tag, passing): (Tag, bool), run: &Run, cpus: CpuSet, seq: u64) -> Duty {
    let Run { va, level, frames, since, .. } = *run;
    Duty { root, tag, level, va, frames, since, seq, cpus, passing }
}
