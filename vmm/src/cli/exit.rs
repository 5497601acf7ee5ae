//! Exit statuses.

use crate::config::ConfigError;
use crate::doctor::HostError;
use crate::lab::LabError;
use crate::report::Verdict;
use crate::trace::TraceError;
use std::process::ExitCode;

/// How the process ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum ExitStatus {
    /// Everything that was to be checked holds.
    Pass = 0,
    /// A rule was violated.
    Violation = 1,
    /// The command line, the configuration or its input is wrong.
    Usage = 2,
    /// This host cannot do what was asked.
    Host = 3,
    /// The guest failed.
    GuestError = 4,
    /// Something that had to be checked could not be.
    Inconclusive = 5,
}

impl ExitStatus {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Pass,
        Self::Violation,
        Self::Usage,
        Self::Host,
        Self::GuestError,
        Self::Inconclusive,
    ];
}

impl From<ExitStatus> for ExitCode {
    fn from(status: ExitStatus) -> Self {
        Self::from(status as u8)
    }
}

impl From<Verdict> for ExitStatus {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Pass => Self::Pass,
            Verdict::Violation => Self::Violation,
            Verdict::GuestError => Self::GuestError,
            Verdict::Inconclusive => Self::Inconclusive,
        }
    }
}

impl From<&ConfigError> for ExitStatus {
    fn from(_: &ConfigError) -> Self {
        Self::Usage
    }
}

impl From<&TraceError> for ExitStatus {
    fn from(_: &TraceError) -> Self {
        Self::Usage
    }
}

impl From<&HostError> for ExitStatus {
    fn from(_: &HostError) -> Self {
        Self::Host
    }
}

impl From<&LabError> for ExitStatus {
    fn from(error: &LabError) -> Self {
        match error {
            LabError::Arguments(_) | LabError::Config(_) => Self::Usage,
            LabError::Host { .. } | LabError::Packages(_) | LabError::File { .. } => Self::Host,
            LabError::Timeout { .. } => Self::GuestError,
            LabError::Cancelled | LabError::NoResult { .. } => Self::Inconclusive,
        }
    }
}
