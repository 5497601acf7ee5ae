//! Cases: one run each, and what is expected of it.

use crate::audit::Rule;
use crate::config::{
    Config, ConfigError, MachineKind, Mediation, Overrides, ReportFormat, Seal, Setting, Template,
};
use lacuna_abi::fault::Fault;
use serde::{Serialize, Serializer};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// The configuration that the cases of a scenario have in common.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Base {
    pub(super) file: PathBuf,
    pub(super) text: String,
    pub(super) beside: Option<&'static str>,
}

/// One run and what is expected of it.
#[derive(Clone, Debug)]
pub struct Case {
    /// `SCENARIO/MACHINE/MEDIATION/SEAL/vcpus=N[/FIELD=VALUE…]/WHAT`, where WHAT is the fault that is
    /// planted, `clean`, or what is expected instead. It stays the same as long as the scenario does.
    pub name: String,
    /// The scenario: the name of its file without the extension.
    pub scenario: String,
    /// What runs the guest.
    pub machine: MachineKind,
    /// How the host learns of table writes.
    pub mediation: Mediation,
    /// How secret frames are closed.
    pub seal: Seal,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// The fault that is planted, if one is.
    pub fault: Option<Fault>,
    /// What is expected.
    pub expected: Expected,
    /// Rules that the run must exercise; of clean cases only.
    pub require: Vec<Rule>,
    /// Whether it runs where not all cases are asked for.
    pub quick: bool,
    /// Whether the suite may pass without it where this host cannot run it.
    pub optional: bool,
    /// Longest time that the case may take.
    pub timeout: Duration,
    pub(super) base: Arc<Base>,
    pub(super) settings: Vec<Setting>,
}

/// What a case must end with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Expected {
    /// The verdict `pass`.
    Pass,
    /// A violation of this rule.
    Violation(Violation),
    /// The verdict `guest-error`; the error contains this text.
    GuestError(Option<String>),
    /// The verdict `inconclusive`; one of the reasons contains this text.
    Inconclusive(Option<String>),
}

/// A violation that a case must find.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Violation {
    /// The rule.
    pub rule: Rule,
    /// The vCPU that a finding of the rule must name.
    pub vcpu: Option<u8>,
    /// The frame's address that a finding of the rule must name.
    pub frame: Option<u64>,
    /// What the name of one of the functions in the finding's story must contain.
    pub function: Option<String>,
}

impl Violation {
    /// Of this rule, wherever it is.
    #[must_use]
    pub const fn of(rule: Rule) -> Self {
        Self { rule, vcpu: None, frame: None, function: None }
    }
}

impl Expected {
    /// In a word: `pass`, a rule, `guest-error` or `inconclusive`.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Violation(violation) => violation.rule.name(),
            Self::GuestError(_) => "guest-error",
            Self::Inconclusive(_) => "inconclusive",
        }
    }
}

impl Serialize for Expected {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl Case {
    /// The configuration of its run.
    ///
    /// # Errors
    /// [`ConfigError`]; a suite that was loaded has only cases that have one.
    pub fn config(&self) -> Result<Config, ConfigError> {
        let overrides = Overrides {
            machine: Some(self.machine),
            mediate: Some(self.mediation),
            seal: Some(self.seal),
            inject: self.fault.iter().map(|fault| fault.name().to_owned()).collect(),
            report: Some(ReportFormat::Json),
            ..Overrides::default()
        };
        self.template().config(&self.settings, &overrides)
    }

    pub(super) fn template(&self) -> Template<'_> {
        let Base { file, text, beside } = &*self.base;
        Template { file, text, beside: *beside }
    }
}
