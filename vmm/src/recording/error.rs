//! Why a recording cannot be judged.

use std::path::{Path, PathBuf};

/// What is wrong with a recording.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Problem {
    /// There is none, or it cannot be read.
    Unreadable(String),
    /// It is something else.
    Foreign(String),
    /// Another version made it.
    Version(String),
    /// It is not as it was written.
    Damaged(String),
    /// It holds more than a recording may.
    Huge(String),
}

impl Problem {
    /// What is wrong.
    fn what(&self) -> &str {
        match self {
            Self::Unreadable(what)
            | Self::Foreign(what)
            | Self::Version(what)
            | Self::Damaged(what)
            | Self::Huge(what) => what,
        }
    }

    /// What to do about it.
    const fn remedy(&self) -> &'static str {
        match self {
            Self::Unreadable(_) | Self::Foreign(_) => {
                "name the folder that lacuna run --record --out DIR wrote"
            }
            Self::Version(_) => "judge it with the lacuna that made it, or record the run again",
            Self::Damaged(_) | Self::Huge(_) => "copy it once more, or record the run again",
        }
    }
}

/// A recording cannot be judged: where in it, what is wrong, and what to do.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{}: {}{}; {}", file.display(), self.place(), problem.what(), problem.remedy())]
pub struct ReadError {
    /// The file.
    pub file: PathBuf,
    /// Bytes in front of the place.
    pub offset: u64,
    /// What is wrong.
    pub problem: Problem,
}

impl ReadError {
    /// The same, in this file.
    #[must_use]
    pub(super) fn in_file(mut self, file: &Path) -> Self {
        self.file = file.to_owned();
        self
    }

    /// Where in the file, of one that could be opened.
    fn place(&self) -> String {
        match (&self.problem, self.offset) {
            (Problem::Unreadable(_), 0) => String::new(),
            (_, offset) => format!("at byte {offset}: "),
        }
    }

    pub(super) fn at(offset: u64, problem: Problem) -> Self {
        Self { file: PathBuf::from("the recording"), offset, problem }
    }
}
