//! What can be wrong with a recording.

use super::{HEADER, MAX_BYTES, MAX_EVENTS, MAX_LINE};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// Most characters of a file that a message repeats.
const SHOWN: usize = 60;

/// A recording that cannot be used: where, and why. Shown as `FILE:LINE: what is wrong; remedy`.
#[derive(Debug, thiserror::Error)]
pub struct TraceError {
    /// The file, if the recording came from one.
    pub file: Option<PathBuf>,
    /// The line, counted from 1, if one is to blame.
    pub line: Option<u64>,
    /// What is wrong.
    #[source]
    pub problem: Problem,
}

/// What is wrong with a recording.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// The file cannot be opened.
    #[error("cannot open the trace: {0}; check the path")]
    Open(io::Error),
    /// Reading failed.
    #[error("cannot read the trace: {0}; check the file")]
    Read(io::Error),
    /// The compressed data is incomplete or wrong.
    #[error("the compressed data is cut off or damaged ({0}); copy or record the trace again")]
    Damaged(io::Error),
    /// The file is too large.
    #[error("the trace is longer than {} MiB; limit it with [workload] events", MAX_BYTES >> 20)]
    TooLong,
    /// A line is too long.
    #[error("the line is longer than {} KiB; this is no trace of the allocator", MAX_LINE >> 10)]
    LineTooLong,
    /// There are too many events.
    #[error("the trace has more than {MAX_EVENTS} events; limit it with [workload] events")]
    TooManyEvents,
    /// There is no event.
    #[error("the trace holds no event; record one, see configs/data/README.md")]
    NoEvents,
    /// The header is not the right one.
    #[error("the header is \"{0}\"; it must be \"{HEADER}\"")]
    Header(String),
    /// A line has too few or too many columns.
    #[error("the line has {0} columns; it must have 7: {HEADER}")]
    Columns(usize),
    /// A field is not text.
    #[error("{0} is not UTF-8 text; is the file a trace?")]
    NotText(&'static str),
    /// A field holds something else than it must.
    #[error("{column} is \"{value}\"; it must be {takes}")]
    Value {
        /// The column.
        column: &'static str,
        /// What it holds.
        value: String,
        /// What it must hold.
        takes: &'static str,
    },
    /// An allocation takes a number that another one has.
    #[error("allocation {id} is alive since line {since}; free it first, or take another id")]
    Alive {
        /// Number of the allocation.
        id: u64,
        /// Line at which it was allocated.
        since: u64,
    },
    /// Something is freed that is not alive.
    #[error("no allocation {0} is alive here; leave out frees of older allocations")]
    NotAlive(u64),
    /// Time goes backwards.
    #[error("t_us is {now} after {before}; sort the events by time")]
    Backwards {
        /// Time of this event.
        now: u64,
        /// Time of the one before it.
        before: u64,
    },
}

impl Problem {
    pub(super) fn value(column: &'static str, value: &str, takes: &'static str) -> Self {
        Self::Value { column, value: shown(value), takes }
    }

    pub(super) fn header(found: &[u8]) -> Self {
        Self::Header(shown(&String::from_utf8_lossy(found)))
    }

    pub(super) const fn at(self, line: u64) -> TraceError {
        TraceError { file: None, line: Some(line), problem: self }
    }
}

impl From<Problem> for TraceError {
    fn from(problem: Problem) -> Self {
        Self { file: None, line: None, problem }
    }
}

impl TraceError {
    pub(super) fn in_file(self, path: &Path) -> Self {
        Self { file: Some(path.to_owned()), ..self }
    }
}

impl fmt::Display for TraceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.file, self.line) {
            (Some(file), Some(line)) => write!(f, "{}:{line}: {}", file.display(), self.problem),
            (Some(file), None) => write!(f, "{}: {}", file.display(), self.problem),
            (None, Some(line)) => write!(f, "line {line}: {}", self.problem),
            (None, None) => self.problem.fmt(f),
        }
    }
}

/// The start of a text, without control characters: fit for a message.
fn shown(text: &str) -> String {
    let mut start: String = text.chars().take(SHOWN).flat_map(char::escape_debug).collect();
    if text.chars().nth(SHOWN).is_some() {
        start.push('…');
    }
    start
}
