//! Why a lab could not be set up or did not come to a result.

use crate::config::ConfigError;
use std::io;
use std::path::{Path, PathBuf};

/// A lab that was not set up, or that came to no result. The message says what, and behind a
/// semicolon the remedy.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// The arguments for the `lacuna` inside are wrong.
    #[error("{0}")]
    Arguments(String),
    /// The configuration that they name is wrong.
    #[error("{0}")]
    Config(#[from] ConfigError),
    /// This host cannot do it.
    #[error("{what}; {remedy}")]
    Host {
        /// What is missing.
        what: String,
        /// What to do.
        remedy: String,
    },
    /// The packages cannot be had, while nothing is wrong with this host otherwise.
    #[error(
        "the packages for the lab cannot be had: {0}; check the network and apt's sources, or name \
         with --cache a folder in which a lab was set up"
    )]
    Packages(String),
    /// A file cannot be read or written.
    #[error("cannot {what} {}: {error}; {remedy}", path.display())]
    File {
        /// What was attempted.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What came of it.
        error: io::Error,
        /// What to do.
        remedy: &'static str,
    },
    /// Somebody cancelled it.
    #[error("cancelled")]
    Cancelled,
    /// The emulated machine ended, or said something else, before the command had ended.
    #[error("the lab ended without a result: {what}{}", tail(.last))]
    NoResult {
        /// What is known.
        what: String,
        /// The last lines of emulator and console.
        last: String,
    },
    /// The command did not end in time.
    #[error(
        "the lab was stopped after {seconds} s; give it more with --timeout SECONDS{}",
        tail(.last)
    )]
    Timeout {
        /// How long it had.
        seconds: u64,
        /// The last lines of emulator and console.
        last: String,
    },
}

impl LabError {
    pub(super) fn host(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::Host { what: what.into(), remedy: remedy.into() }
    }

    /// A file that a lab keeps or makes.
    pub(super) fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |error| {
            let remedy = match error.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    "free some space, or name another folder with --cache DIR"
                }
                _ => "check its permissions, or name another folder with --cache DIR",
            };
            Self::File { what, path, error, remedy }
        }
    }
}

fn tail(last: &str) -> String {
    if last.is_empty() { String::new() } else { format!("\nthe last lines were:\n{last}") }
}
