//! Exit statuses.

use crate::config::ConfigError;
use crate::doctor::HostError;
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
