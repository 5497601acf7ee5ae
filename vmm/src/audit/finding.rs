//! The rules, what a broken rule looks like, and the ledger that counts judgements.

use lacuna_abi::addr::{Gfn, Gpa, Gva};
use lacuna_abi::named_enum;
use std::collections::HashSet;

named_enum! {
    /// A rule that the host checks, in the order in which reports list them.
    #[derive(PartialOrd, Ord, Hash)]
    pub enum Rule {
        /// No secret frame is present in the direct map.
        DirectMapAlias = "direct-map-alias",
        /// A secret frame is mapped nowhere but in the windows of CPUs that have it open.
        ForeignAlias = "foreign-alias",
        /// No mapping of a secret frame is global.
        GlobalWindow = "global-window",
        /// When frames are sealed or opened, no CPU may still cache a revoked direct-map translation.
        StaleDirectMap = "stale-direct-map",
        /// A window address is not remapped, and a frame not released, while the window's own CPU may
        /// cache an older translation.
        StaleWindow = "stale-window",
        /// A table page is not freed or reused while a CPU may cache entries that lead through it.
        StaleTable = "stale-table",
        /// Every secret frame that is not open is denied by the second stage.
        SecondStageOpen = "second-stage-open",
        /// What is said to be zero is zero.
        Residue = "residue",
        /// Page tables are writable by the pool's own mapping only, and lie in the pool.
        TableAlias = "table-alias",
        /// No frame is both writable somewhere and executable somewhere.
        WriteExecute = "write-execute",
        /// No kernel or secret frame is reachable from ring 3.
        UserAccess = "user-access",
        /// Control registers, descriptor tables and roots are as agreed.
        ControlState = "control-state",
        /// What the guest reported is what it did.
        TraceHonesty = "trace-honesty",
        /// Bytes of a secret input are found in secret frames only.
        InputLeak = "input-leak",
        /// What an access reached that the guest observed is what the tables say, or what the CPU may
        /// still cache.
        ObservedAccess = "observed-access",
    }
}

/// Number of rules.
const RULES: usize = Rule::ALL.len();
/// Most distinct violations that are remembered, so that one found again is not counted again.
const MAX_SEEN: usize = 1 << 16;
/// Most reasons that are kept for a run being inconclusive.
const MAX_REASONS: usize = 64;

/// One violation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finding {
    /// The rule that does not hold.
    pub rule: Rule,
    /// The frame concerned, or the first of several.
    pub frame: Option<Gfn>,
    /// The virtual address concerned, or the first of several.
    pub va: Option<Gva>,
    /// The CPU on which it shows.
    pub cpu: Option<u8>,
    /// The root of the address space.
    pub root: Option<Gpa>,
    /// Number of the event at which it was found.
    pub seq: u64,
    /// What is wrong, and what would have been right.
    pub detail: String,
    /// The revoke of the translation that may still be cached, for the rules about that.
    pub revoked: Option<Revoke>,
    /// How it came to that, in order; filled in when the event or call that led to it has been
    /// judged.
    pub story: Vec<Step>,
}

impl Finding {
    /// A violation of `rule`, found at event `seq`; the other fields are filled in by the caller.
    pub(super) const fn new(rule: Rule, seq: u64, detail: String) -> Self {
        let (frame, va, cpu, root, revoked) = (None, None, None, None, None);
        Self { rule, frame, va, cpu, root, seq, detail, revoked, story: Vec::new() }
    }
}

/// A translation that was revoked and may still be cached.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Revoke {
    /// Number of the revoke.
    pub seq: u64,
    /// A CPU that may cache it.
    pub cpu: u8,
    /// Address that it translated, or the first that the table spanned.
    pub va: Gva,
}

/// One step of the story of a finding.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Step {
    /// Number of the event; `None` for what has none or is not an event.
    pub seq: Option<u64>,
    /// The CPU.
    pub cpu: Option<u8>,
    /// What kind of step it is.
    pub what: What,
    /// The guest's code that recorded it ([`Record::site`](lacuna_abi::event::Record::site)).
    pub site: Option<u32>,
    /// What happened, as a sentence without its subject.
    pub text: String,
}

named_enum! {
    /// Kinds of steps in a story.
    pub enum What {
        /// A translation or a mapping was made.
        Made = "made",
        /// It was revoked.
        Revoked = "revoked",
        /// A flush that did not remove it.
        Flush = "flush",
        /// A CPU said that it had done what a shootdown asked.
        Acknowledged = "acknowledged",
        /// The frame was sealed.
        Sealed = "sealed",
        /// The frame was opened.
        Opened = "opened",
        /// The frame was released.
        Released = "released",
        /// A step in the life of the frame, or of the table, as the guest reported it.
        Life = "life",
        /// What the guest's records say of the entry or register.
        Recorded = "recorded",
        /// Steps that are left out.
        LeftOut = "left-out",
        /// The moment at which it mattered.
        Mattered = "mattered",
        /// What would have been right.
        Right = "right",
    }
}

/// How often a rule was judged.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Tally {
    /// Judgements made, of one frame, mapping, entry or register each.
    pub checked: u64,
    /// Judgements that were due but could not be made.
    pub not_checked: u64,
    /// Distinct violations.
    pub violations: u64,
}

/// What the audit has to say.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AuditResult {
    /// Every rule with its counts, in the order of [`Rule::ALL`].
    pub tallies: Vec<(Rule, Tally)>,
    /// The violations, in the order in which they were found; at most
    /// [`AuditConfig::max_findings`](super::AuditConfig::max_findings).
    pub findings: Vec<Finding>,
    /// Why the run cannot be called passed even without a violation.
    pub inconclusive: Vec<String>,
}

impl AuditResult {
    /// The counts of one rule.
    #[must_use]
    pub fn tally(&self, rule: Rule) -> Tally {
        self.tallies.iter().find(|(r, _)| *r == rule).map_or_else(Tally::default, |(_, t)| *t)
    }
}

/// What makes two violations the same: rule, frame, address, root, and the topic where a rule
/// has several at one place.
type Key = (Rule, Option<Gfn>, Option<Gva>, Option<Gpa>, u64);

/// Counts and violations so far. Its memory is bounded whatever the guest does.
#[derive(Clone, Debug)]
pub(super) struct Ledger {
    tallies: [Tally; RULES],
    findings: Vec<Finding>,
    seen: HashSet<Key>,
    reasons: Vec<String>,
    max_findings: usize,
    /// Findings that have their story.
    told: usize,
}

impl Ledger {
    pub(super) fn new(max_findings: usize) -> Self {
        Self {
            tallies: [Tally::default(); RULES],
            findings: Vec::new(),
            seen: HashSet::new(),
            reasons: Vec::new(),
            max_findings,
            told: 0,
        }
    }

    /// Whether findings lack their story.
    pub(super) const fn owes_stories(&self) -> bool {
        self.told < self.findings.len()
    }

    /// Gives every finding that lacks its story the one that `tell` makes of it; `tell` also sees
    /// all findings.
    pub(super) fn tell(&mut self, tell: impl Fn(&Finding, &[Finding]) -> Vec<Step>) {
        while self.told < self.findings.len() {
            // A finding may bring its own.
            if self.findings[self.told].story.is_empty() {
                let story = tell(&self.findings[self.told], &self.findings);
                self.findings[self.told].story = story;
            }
            self.told += 1;
        }
    }

    pub(super) const fn checked(&mut self, rule: Rule, count: u64) {
        // A recording may claim any count.
        let tally = &mut self.tallies[rule as usize];
        tally.checked = tally.checked.saturating_add(count);
    }

    pub(super) const fn not_checked(&mut self, rule: Rule, count: u64) {
        let tally = &mut self.tallies[rule as usize];
        tally.not_checked = tally.not_checked.saturating_add(count);
    }

    pub(super) fn violation(&mut self, finding: Finding) {
        self.violation_about(0, finding);
    }

    /// Records a violation unless it was recorded before. Past [`MAX_SEEN`] distinct ones each
    /// occurrence counts.
    pub(super) fn violation_about(&mut self, topic: u64, finding: Finding) {
        let key = (finding.rule, finding.frame, finding.va, finding.root, topic);
        if self.seen.contains(&key) {
            return;
        }
        if self.seen.len() < MAX_SEEN {
            self.seen.insert(key);
        }
        self.tallies[finding.rule as usize].violations += 1;
        if self.findings.len() < self.max_findings {
            self.findings.push(finding);
        }
    }

    pub(super) fn inconclusive(&mut self, reason: String) {
        if self.reasons.len() >= MAX_REASONS || self.reasons.contains(&reason) {
            return;
        }
        let last = self.reasons.len() + 1 == MAX_REASONS;
        self.reasons.push(if last { "further reasons were left out".to_owned() } else { reason });
    }

    pub(super) fn result(&self) -> AuditResult {
        AuditResult {
            tallies: Rule::ALL.iter().copied().zip(self.tallies).collect(),
            findings: self.findings.clone(),
            inconclusive: self.reasons.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(frame: u64) -> Finding {
        let frame = Some(Gfn(frame));
        Finding { frame, ..Finding::new(Rule::Residue, 1, "not zero".to_owned()) }
    }

    #[test]
    fn tallies_lie_where_their_rule_says() {
        for (index, rule) in Rule::ALL.iter().enumerate() {
            assert_eq!(*rule as usize, index);
            assert_eq!(Rule::from_name(rule.name()), Some(*rule));
        }
    }

    #[test]
    fn a_violation_found_again_is_counted_once_and_another_is_not_lost() {
        let mut ledger = Ledger::new(1);
        ledger.violation(finding(1));
        ledger.violation(Finding { seq: 9, ..finding(1) });
        ledger.violation(finding(2));
        let result = ledger.result();
        assert_eq!(result.tally(Rule::Residue).violations, 2);
        assert_eq!(result.findings, [finding(1)]);
    }

    #[test]
    fn reasons_are_kept_once_and_bounded() {
        let mut ledger = Ledger::new(1);
        for number in 0..1000 {
            ledger.inconclusive(format!("reason {}", number / 2));
        }
        let reasons = ledger.result().inconclusive;
        assert_eq!(reasons.len(), MAX_REASONS);
        assert_eq!(reasons[1], "reason 1");
        assert_eq!(reasons[MAX_REASONS - 1], "further reasons were left out");
    }
}
