//! From what was found and what was expected to a verdict.

use super::{GuestError, Report, SEALED_ACCESS, Verdict};
use crate::audit::Rule;
use crate::config;

impl Report {
    /// Compares the report with what the configuration expects and requires, adds the reasons why
    /// it is inconclusive, and sets the verdict.
    ///
    /// - A violation of a rule that is not expected makes the run a violation.
    /// - An access to a sealed frame that is not expected is a guest error, unless the guest
    ///   failed in another way.
    /// - An expected thing that did not happen, a required rule that was never exercised, and
    ///   events that were lost make it inconclusive.
    pub fn judge(&mut self, audit: &config::Audit) {
        let expect = &audit.expect;
        let expected = |rule: &str| expect.rules.iter().any(|expected| expected.name() == rule);
        for violation in &mut self.violations {
            violation.expected = expected(&violation.rule);
        }
        for access in &mut self.sealed_accesses {
            access.expected = expect.sealed_access;
        }
        // The counts are exact; the list of violations is not.
        let violated = self.checks.iter().any(|c| c.violations > 0 && !expected(&c.rule))
            || self.violations.iter().any(|violation| !violation.expected);
        if !expect.sealed_access && self.guest_error.is_none() {
            self.guest_error = self.unexpected_access();
        }
        for reason in self.missing(audit) {
            if !self.inconclusive.contains(&reason) {
                self.inconclusive.push(reason);
            }
        }
        let inconclusive = !self.inconclusive.is_empty();
        self.verdict = Verdict::decide(violated, self.guest_error.is_some(), inconclusive);
    }

    fn unexpected_access(&self) -> Option<GuestError> {
        let access = self.sealed_accesses.first()?;
        let at = access.gpa.map_or_else(|| "an unknown address".to_owned(), |gpa| gpa.to_string());
        Some(GuestError {
            kind: SEALED_ACCESS.to_owned(),
            message: format!("the guest touched the sealed frame at {at} ({})", access.kind),
            vcpu: Some(access.vcpu),
            rip: access.rip,
            symbol: access.symbol.clone(),
            backtrace: Vec::new(),
        })
    }

    /// Why the run cannot pass: what should have happened and did not.
    fn missing(&self, audit: &config::Audit) -> Vec<String> {
        let count = |rule: Rule, of: fn(&super::Check) -> u64| {
            self.checks.iter().filter(|check| check.rule == rule.name()).map(of).sum::<u64>()
        };
        let mut reasons = Vec::new();
        for rule in &audit.require {
            if count(*rule, |check| check.checked) == 0 {
                reasons.push(format!("the rule {} is required and was never checked", rule.name()));
            }
        }
        for rule in &audit.expect.rules {
            if count(*rule, |check| check.violations) == 0 {
                reasons
                    .push(format!("a violation of {} was expected, none was found", rule.name()));
            }
        }
        if audit.expect.sealed_access && self.sealed_accesses.is_empty() {
            reasons.push("an access to a sealed frame was expected, none happened".to_owned());
        }
        if let Some(lost) = self.counters.get("events_lost").filter(|lost| **lost > 0) {
            reasons.push(format!("{lost} events were lost"));
        }
        reasons
    }
}
