//! Accesses that a guest observed: what each reached must be what the tables say, or what the CPU may
//! still cache. The second is asked of the model of caching, as all rules ask it, so that a machine
//! that shows more than the model allows contradicts the model.

use super::Audit;
use super::finding::{Finding, Rule};
use super::index::Mapping;
use super::tlb::{Duty, only};
use lacuna_abi::addr::{Gfn, Gpa, Gva};
use lacuna_abi::observe::{Access, Case, Observation, Seen};
use lacuna_abi::paging::Level;

/// What was observed of one case.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CaseTally {
    /// Accesses.
    pub rounds: u64,
    /// Those that went where the tables no longer led.
    pub stale: u64,
    /// Those at whose moment the CPU may have cached a translation that leads elsewhere.
    pub allowed: u64,
    /// Those that went where neither the tables nor any translation led that may have been cached.
    pub contradictions: u64,
    /// Accesses that the machine does not offer.
    pub not_offered: u64,
}

/// What was observed, by the numbers of the cases.
#[derive(Clone, Debug)]
pub(super) struct Observations(Vec<CaseTally>);

impl Default for Observations {
    fn default() -> Self {
        Self(vec![CaseTally::default(); Case::COUNT])
    }
}

impl Observations {
    fn of(&mut self, case: Case) -> Option<&mut CaseTally> {
        self.0.get_mut(usize::try_from(case.number()).ok()?)
    }
}

impl Audit {
    /// What was observed of each case of which anything was.
    pub fn observations(&self) -> impl Iterator<Item = (Case, CaseTally)> {
        let tally = |case: Case| Some((case, *self.observations.0.get(case.number() as usize)?));
        Case::all().filter_map(tally).filter(|(_, tally)| *tally != CaseTally::default())
    }

    /// Judges one access of a CPU, which has the number of what came before it.
    pub(super) fn observed(&mut self, cpu: u8, observation: &Observation, seq: u64) {
        let Observation { case, va, seen } = *observation;
        let Some(tally) = self.observations.of(case) else { return };
        if seen == Seen::NotOffered {
            tally.not_offered += 1;
            return;
        }
        tally.rounds += 1;
        let space = self.tlb.space_of(cpu).filter(|_| self.among(va) & only(cpu) != 0);
        let Some((root, pcid)) = space else {
            // What may be cached of these addresses is not followed.
            self.ledger.not_checked(Rule::ObservedAccess, 1);
            return;
        };
        self.ledger.checked(Rule::ObservedAccess, 1);
        let page = page_of(seen);
        let fresh = self.mapping_of(root, va).and_then(|m| page_by(&m, va, case.change().access()));
        let is_used = |duty: &Duty| duty.cpus & only(cpu) != 0 && duty.tag.is_used_under(pcid);
        let owed = self.tlb.at((va, va), is_used);
        let may_lead = |page: Option<Gfn>| owed.iter().any(|duty| leads_to(duty, va, page));
        let (stale, allowed) = (page != fresh, page == fresh || may_lead(page));
        let elsewhere = owed.iter().any(|duty| !leads_to(duty, va, fresh));
        if let Some(tally) = self.observations.of(case) {
            tally.stale += u64::from(stale);
            tally.allowed += u64::from(elsewhere);
            tally.contradictions += u64::from(!allowed);
        }
        if allowed {
            return;
        }
        let (what, where_to) = (case.change().access().name(), said(page));
        let detail = format!(
            "a {what} after {} ({}) {where_to}, where the tables lead to {}; by the model of what is \
             cached, CPU {cpu} holds no translation that says so: the model is wrong, or the machine \
             keeps what it must drop",
            case.change().name(),
            case.means().name(),
            fresh.map_or_else(|| "a page fault".to_owned(), |frame| format!("the frame {frame}")),
        );
        let finding = Finding::new(Rule::ObservedAccess, seq, detail);
        let (va, root, cpu) = (Some(va), Some(root), Some(cpu));
        let finding = Finding { frame: page, va, root, cpu, ..finding };
        self.ledger.violation_about(case.number().into(), finding);
    }

    /// What the root maps at an address, by the host's copy of the tables.
    pub(super) fn mapping_of(&self, root: Gpa, va: Gva) -> Option<Mapping> {
        [Level::Pdpt, Level::Pd, Level::Pt].into_iter().find_map(|level| {
            let site = self.index.find(root, va, level)?;
            let index = level.index(va);
            self.index.leaves_at(site, (index, index + 1)).next().map(|run| run.first)
        })
    }
}

/// The frame that was reached.
const fn page_of(seen: Seen) -> Option<Gfn> {
    match seen {
        Seen::Reached(gpa) => Some(gpa.frame()),
        Seen::Fault | Seen::NotOffered => None,
    }
}

/// The frame that an access of this kind reaches through the mapping, if that allows it.
fn page_by(mapping: &Mapping, va: Gva, access: Access) -> Option<Gfn> {
    let rights = mapping.rights;
    let allowed = match access {
        Access::Read => true,
        Access::Write => rights.writable,
        Access::Fetch => rights.executable,
    };
    allowed.then(|| mapping.frame_at(va))
}

/// Whether the revoked translation, if it is still cached, may take an access to `va` to this frame.
/// What rights it granted is not kept, so that it counts as granting all.
fn leads_to(duty: &Duty, va: Gva, page: Option<Gfn>) -> bool {
    page.is_some() && duty.frame_at(va) == page
}

fn said(page: Option<Gfn>) -> String {
    page.map_or_else(|| "faulted".to_owned(), |frame| format!("reached the frame {frame}"))
}
