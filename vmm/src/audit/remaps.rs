//! `stale-window` where a window address gets a new translation: by its entry, or because the table
//! that holds its entry is linked.

use super::Audit;
use super::finding::Rule;
use super::index::{Run, Site, Walked, base_of};
use super::revokes::Grants;
use super::tlb::{Duty, only};
use super::writes::{leaf, stale_finding};
use lacuna_abi::addr::{Gpa, Gva, PAGE_SHIFT};
use lacuna_abi::event::EntryWrite;
use lacuna_abi::paging::Level;
use std::collections::BTreeSet;

impl Audit {
    /// `stale-window`: a window address that gets a new translation has no old one left on the
    /// window's own CPU.
    #[inline]
    pub(super) fn judge_remap(
        &mut self,
        write: &EntryWrite,
        granted: (Option<Site>, Grants),
        seq: u64,
    ) {
        let Some((owner, new)) = self.window_of(write.va).zip(leaf(write.new, write.level)) else {
            return;
        };
        self.count_remaps(write.root, owner, u64::from(write.count));
        let last = write.va.wrapping_add(write.span() - 1);
        let pcid = self.tlb.pcid_on(owner, write.pcid);
        let used = |duty: &Duty| duty.tag.is_used_under(pcid);
        let mut stale = self.tlb.at((write.va, last), used);
        if let Some(old) = leaf(write.old, write.level)
            && old.frame(write.level) != new.frame(write.level)
        {
            self.revoked_leaves(write, old, granted, |audit, leaves| {
                stale.extend(audit.tlb.would_owe(leaves, only(owner), seq));
            });
        }
        for duty in stale.iter().filter(|duty| duty.cpus & only(owner) != 0) {
            self.note_stale_window(duty, owner, seq);
        }
    }

    /// `stale-window`: the same for what the tables map in windows that were just linked, by an entry
    /// that grants since `since`. What the link itself took away is revoked by now: where the new
    /// table maps what the old one did, nothing is remapped.
    pub(super) fn judge_linked_windows(&mut self, walked: &Walked, since: u64, seq: u64) {
        let leaves: Vec<(u8, &Run)> = walked
            .leaves
            .iter()
            // What was mapped before is as old as it was.
            .filter(|run| run.first.since >= since)
            .filter_map(|run| Some((self.window_of(run.first.va)?, run)))
            .collect();
        if leaves.is_empty() {
            return;
        }
        // The written entries themselves have been judged.
        let linked: BTreeSet<(Gpa, Gva, Level)> =
            walked.tables.iter().map(|table| (table.root, table.va, table.level)).collect();
        for (owner, run) in leaves {
            let Run { first, count } = *run;
            if !linked.contains(&(first.root, base_of(first.va, first.level), first.level)) {
                continue;
            }
            self.count_remaps(first.root, owner, count);
            let last = first.va.wrapping_add(count * first.level.span() - 1);
            let pcid = self.tlb.pcid_on(owner, self.pcid_of(first.root));
            let wanted = |duty: &Duty| {
                duty.tag.is_used_under(pcid) && !(duty.seq == seq && leads_alike(duty, run))
            };
            let stale = self.tlb.at((first.va, last), wanted);
            for duty in stale.iter().filter(|duty| duty.cpus & only(owner) != 0) {
                self.note_stale_window(duty, owner, seq);
            }
        }
    }

    fn count_remaps(&mut self, root: Gpa, owner: u8, count: u64) {
        self.ledger.checked(Rule::StaleWindow, count);
        if self.tlb.may_cache(root) & !only(owner) != 0 {
            // Copies that other CPUs may have made speculatively are not followed.
            self.ledger.not_checked(Rule::StaleWindow, count);
        }
    }

    fn note_stale_window(&mut self, duty: &Duty, owner: u8, seq: u64) {
        let detail = format!(
            "the address is remapped while CPU {owner} may cache the translation revoked by event \
             {}; an INVLPG or a root load by CPU {owner} in between, or a completed seal of the \
             frame, would have discharged it",
            duty.seq
        );
        self.ledger.violation(stale_finding(Rule::StaleWindow, duty, owner, seq, detail));
    }
}

/// Whether the revoked translation led to the frames to which the leaves lead now, at the addresses
/// that both span.
fn leads_alike(duty: &Duty, run: &Run) -> bool {
    let at = duty.va.max(run.first.va);
    let frame = |start: u64, from: Gva| start.wrapping_add((at.0 - from.0) >> PAGE_SHIFT);
    frame(duty.base().0, duty.va) == frame(run.first.frame.0, run.first.va)
}
