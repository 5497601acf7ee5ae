//! What can be wrong with a configuration.

use std::fmt;
use std::path::PathBuf;

/// A mistake in a configuration or on the command line, shown as
/// `FILE:LINE: [section] field: what is wrong; remedy`.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{place}: {what}; {remedy}")]
pub struct ConfigError {
    /// Where; boxed, so that results stay small.
    pub place: Box<Place>,
    /// What is wrong.
    pub what: String,
    /// What to do.
    pub remedy: String,
}

/// Where a mistake is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Place {
    /// The file as a whole, or one line of it.
    File {
        /// The file.
        file: PathBuf,
        /// The line, counted from 1.
        line: Option<usize>,
    },
    /// One field, or a whole section.
    Field {
        /// The file.
        file: PathBuf,
        /// The line, counted from 1; `None` if the section is not in the file.
        line: Option<usize>,
        /// The section.
        section: String,
        /// The field; `None` if the section itself is meant.
        field: Option<String>,
    },
    /// A flag of the command line.
    Flag(&'static str),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (file, line) = match self {
            Self::Flag(flag) => return f.write_str(flag),
            Self::File { file, line } | Self::Field { file, line, .. } => (file, line),
        };
        write!(f, "{}", file.display())?;
        if let Some(line) = line {
            write!(f, ":{line}")?;
        }
        if let Self::Field { section, field, .. } = self {
            write!(f, ": [{section}]")?;
            if let Some(field) = field {
                write!(f, " {field}")?;
            }
        }
        Ok(())
    }
}

impl ConfigError {
    pub(crate) fn new(place: Place, what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { place: Box::new(place), what: what.into(), remedy: remedy.into() }
    }

    pub(crate) fn flag(
        flag: &'static str,
        what: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self::new(Place::Flag(flag), what, remedy)
    }
}
