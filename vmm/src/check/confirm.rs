//! Whether the findings of a case are what its events show.

use super::case::{Case, Expected};
use super::judge::Reported;
use super::witness::Witness;
use crate::gate::Observer;
use crate::report::Report;
use lacuna_abi::event::Record;
use std::sync::{Arc, Mutex, PoisonError};

/// Most records that are kept: those of a case with a fault are few.
const MAX_RECORDS: usize = 1 << 20;

/// Keeps the events of a run.
#[derive(Clone, Debug, Default)]
pub struct Records(Arc<Mutex<Kept>>);

#[derive(Debug, Default)]
struct Kept {
    records: Vec<Record>,
    cut: bool,
}

impl Observer for Records {
    fn event(&mut self, record: &Record) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.records.len() < MAX_RECORDS {
            kept.records.push(*record);
        } else {
            kept.cut = true;
        }
    }
}

impl Records {
    /// The report, with what the events say of each finding of the rule that a planted fault must be
    /// found by.
    #[must_use]
    pub fn confirm(self, case: &Case, report: Report) -> Reported {
        let mut reported = Reported { report, unconfirmed: Vec::new(), confirmed: 0 };
        let (Some(_), Expected::Violation(expected)) = (case.fault, &case.expected) else {
            return reported;
        };
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.cut {
            let why = "there are more events than are kept: its findings cannot be confirmed";
            reported.unconfirmed.push(why.into());
            return reported;
        }
        let witness = Witness(std::mem::take(&mut kept.records));
        for violation in &reported.report.violations {
            if violation.rule != expected.rule.name() {
                continue;
            }
            match witness.confirms_violation(violation) {
                Ok(()) => reported.confirmed += 1,
                Err(why) => reported.unconfirmed.push(why),
            }
        }
        reported
    }
}
