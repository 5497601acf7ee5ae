//! Accesses through windows, which the host sees where it steps a guest: what a window shows is used by
//! its own CPU alone, and while an entry leads there.
//!
//! Rules about mappings ask who *may* reach a frame. Two slips leave no mapping to find: an address that is
//! handed to another CPU, which then caches what its owner's flushes do not reach; and an address that is
//! used after its entry was cleared, through what is left in the TLB.

use super::Audit;
use super::finding::{Finding, Revoke, Rule};
use super::tlb::{Duty, only};
use lacuna_abi::addr::{Gfn, Gpa, Gva};
use lacuna_abi::event::Record;
use lacuna_abi::layout::Place;

impl Audit {
    /// Accesses through windows that were seen.
    #[must_use]
    pub const fn uses(&self) -> u64 {
        self.uses
    }

    /// A CPU read or wrote a page of a window, and went on.
    pub(super) fn used(&mut self, record: &Record, va: Gva, write: bool) {
        let Record { seq, cpu, .. } = *record;
        let Place::Window(owner) = self.config.layout.place_of(va) else {
            self.ledger.inconclusive(format!("the access seen as event {seq} is in no window"));
            return;
        };
        self.uses += 1;
        let Some((root, pcid)) = self.tlb.space_of(cpu) else {
            self.ledger.not_checked(Rule::ForeignAlias, 1);
            return;
        };
        let frame = self.mapping_of(root, va).map(|mapping| mapping.frame_at(va));
        let (verb, own) = (if write { "wrote" } else { "read" }, owner == usize::from(cpu));
        let about = Use { seq, cpu, va, root };
        let Some(frame) = frame else {
            if !own {
                // What it may cache of another CPU's window is not followed.
                self.ledger.not_checked(Rule::StaleWindow, 1);
                return;
            }
            let is_used = |duty: &Duty| duty.cpus & only(cpu) != 0 && duty.tag.is_used_under(pcid);
            let left = self.tlb.at((va, va), is_used);
            let left = left.into_iter().find_map(|duty| Some((duty.frame_at(va)?, duty)));
            self.nothing_leads_there(&about, verb, left);
            return;
        };
        self.ledger.checked(Rule::ForeignAlias, 1);
        if own || !self.frames.is_secret(frame) {
            return;
        }
        let detail = format!(
            "CPU {cpu} {verb} a secret frame through the window of CPU {owner}; a window is for its own \
             CPU alone: what another one caches of it nobody flushes"
        );
        self.ledger.violation(about.finding(Rule::ForeignAlias, Some(frame), detail));
    }

    /// The CPU went on where the tables lead nowhere.
    fn nothing_leads_there(&mut self, about: &Use, verb: &str, left: Option<(Gfn, Duty)>) {
        let Use { cpu, .. } = *about;
        self.ledger.checked(Rule::StaleWindow, 1);
        let Some((frame, duty)) = left else {
            self.ledger.checked(Rule::ObservedAccess, 1);
            let detail = format!(
                "CPU {cpu} {verb} through a window where no entry leads anywhere, and by the model of \
                 what is cached it holds no translation either: the model is wrong, or the machine \
                 keeps what it must drop"
            );
            self.ledger.violation(about.finding(Rule::ObservedAccess, None, detail));
            return;
        };
        let detail = format!(
            "CPU {cpu} {verb} through a window whose entry was cleared, by the translation that is left \
             of it; an address must not be used after its entry was cleared"
        );
        let finding = about.finding(Rule::StaleWindow, Some(frame), detail);
        let revoked = Some(Revoke { seq: duty.seq, cpu, va: duty.va });
        self.ledger.violation(Finding { revoked, ..finding });
    }
}

/// An access.
struct Use {
    seq: u64,
    cpu: u8,
    va: Gva,
    root: Gpa,
}

impl Use {
    fn finding(&self, rule: Rule, frame: Option<Gfn>, detail: String) -> Finding {
        let Self { seq, cpu, va, root } = *self;
        let (va, cpu, root) = (Some(va), Some(cpu), Some(root));
        Finding { frame, va, cpu, root, ..Finding::new(rule, seq, detail) }
    }
}
