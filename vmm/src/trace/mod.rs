//! Recordings of a kernel's page allocator: read, checked, and turned into what the `replay`
//! program carries out.
//!
//! A recording is CSV, plain or gzipped, with the header [`HEADER`]: time in microseconds, CPU,
//! `A` (allocation) or `F` (free), number of the allocation, order, migratetype, and the flag
//! names as Linux prints them. It is read as a stream, with bounds on everything that a damaged or
//! hostile file could make large.
#![forbid(unsafe_code)]

mod error;
mod gfp;
mod lines;
mod parse;
#[cfg(test)]
mod tests;

pub use error::{Problem, TraceError};
pub use gfp::{Flags, is_gfp_name};
pub use parse::parse;

use lacuna_abi::layout::MAX_INPUT;
use lacuna_abi::workload::{REPLAY_BYTES, ReplayOp};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::num::NonZeroU8;
use std::path::Path;

/// The header line, and with it the columns in their order.
pub const HEADER: &str = "t_us,cpu,op,id,order,migratetype,gfp";
/// Most events that are taken: as many as the guest's input region can hold.
pub const MAX_EVENTS: u64 = MAX_INPUT / REPLAY_BYTES;
/// Most bytes that are read, counted after decompression.
pub const MAX_BYTES: u64 = 1 << 30;
/// Longest line in bytes.
pub const MAX_LINE: u64 = 64 << 10;

/// Which allocations of a recording become secret.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Secret {
    /// Memory of user processes: those with a flag whose name starts with `GFP_HIGHUSER`.
    #[default]
    User,
    /// All.
    All,
    /// None.
    None,
    /// Those with at least one of these flags, by exact name.
    #[serde(untagged)]
    Names(Vec<String>),
}

/// What is taken of a recording, and for which guest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Selection {
    /// Number of events, from the start; all if `None`.
    pub events: Option<u64>,
    /// Which allocations become secret.
    pub secret: Secret,
    /// Percentage of those that can be converted in place, the last ones, that are. What comes
    /// before uses the pool alone, so that the flushes which conversions need do not cover for
    /// those that windows need.
    pub in_place: u8,
    /// CPUs of the guest: CPU n of the recording becomes n modulo this.
    pub cpus: NonZeroU8,
}

/// A recording, ready for the guest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Replay {
    /// What to do, in the order of the recording.
    pub ops: Vec<ReplayOp>,
    /// Slots that the operations use: most allocations that are alive at once.
    pub slots: u32,
    /// What was found in the recording.
    pub stats: Stats,
}

/// What was found in a recording, as far as it was read.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Stats {
    /// Allocations.
    pub allocs: u64,
    /// Frees.
    pub frees: u64,
    /// Allocations that become secret.
    pub secret: u64,
    /// Secret allocations that are mapped first and converted in place.
    pub in_place: u64,
    /// Allocations that ask for zeroed memory.
    pub zero: u64,
    /// Allocations whose caller must not block.
    pub noblock: u64,
    /// Most pages in ordinary allocations at any one time.
    pub peak_mapped_pages: u64,
    /// Most pages in secret allocations at any one time.
    pub peak_secret_pages: u64,
    /// Microseconds from the first event to the last.
    pub span_us: u64,
    /// What is odd but no error, as sentences.
    pub warnings: Vec<String>,
}

/// Reads the recording in `path`.
///
/// # Errors
/// [`TraceError`], with the file's name and, where there is one, the line.
pub fn load(path: &Path, selection: &Selection) -> Result<Replay, TraceError> {
    let file = File::open(path).map_err(|error| TraceError::from(Problem::Open(error)));
    file.and_then(|file| parse(file, selection)).map_err(|error| error.in_file(path))
}
