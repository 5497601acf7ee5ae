//! Verdicts, and which one wins where several apply.

use serde::{Deserialize, Serialize};
use std::fmt;

/// The verdict on a run.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Everything that was to be checked was checked, and holds.
    Pass,
    /// A rule was violated.
    Violation,
    /// Something could not be checked that had to be.
    Inconclusive,
    /// The guest failed.
    GuestError,
}

impl Verdict {
    /// The verdict where several may apply: violation, guest error, inconclusive, pass.
    #[must_use]
    pub const fn decide(violation: bool, guest_error: bool, inconclusive: bool) -> Self {
        if violation {
            Self::Violation
        } else if guest_error {
            Self::GuestError
        } else if inconclusive {
            Self::Inconclusive
        } else {
            Self::Pass
        }
    }

    /// The name in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Violation => "violation",
            Self::Inconclusive => "inconclusive",
            Self::GuestError => "guest-error",
        }
    }

    /// The process's exit status.
    #[must_use]
    pub const fn exit_status(self) -> u8 {
        match self {
            Self::Pass => 0,
            Self::Violation => 1,
            Self::GuestError => 4,
            Self::Inconclusive => 5,
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gravest_verdict_wins() {
        for bits in 0..8 {
            let [violation, guest_error, inconclusive] = [4, 2, 1].map(|bit| bits & bit != 0);
            let expected = match bits {
                4.. => Verdict::Violation,
                2.. => Verdict::GuestError,
                1 => Verdict::Inconclusive,
                _ => Verdict::Pass,
            };
            assert_eq!(Verdict::decide(violation, guest_error, inconclusive), expected);
        }
    }

    #[test]
    fn names_in_json_and_exit_statuses_are_the_contract() {
        for (verdict, name, status) in [
            (Verdict::Pass, "pass", 0),
            (Verdict::Violation, "violation", 1),
            (Verdict::GuestError, "guest-error", 4),
            (Verdict::Inconclusive, "inconclusive", 5),
        ] {
            assert_eq!(verdict.name(), name);
            assert_eq!(serde_json::to_string(&verdict).unwrap(), format!("\"{name}\""));
            assert_eq!(verdict.exit_status(), status);
        }
    }
}
