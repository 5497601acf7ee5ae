//! Recordings: everything that the audit was told during a run and what it asked for, so that it can
//! judge the run again where there is no machine.
//!
//! A recording is a tape. Each call of an [`Audit`](crate::audit::Audit) is on it with its
//! arguments, then every answer that its [`World`](crate::audit::World) gave meanwhile, then what the
//! call came to. The reader makes the same calls of an audit of its own and answers from the tape.
//! Contents of frames are never asked for, only whether they are zero; so none are on it.
//!
//! | file | holds |
//! | --- | --- |
//! | `item` | what is on a tape |
//! | `codec` | items as bytes, each as the difference to what came before |
//! | `varint` | numbers as bytes |
//! | `chunks` | the file: head, checksummed and compressed chunks |
//! | `setup` | what is said once, at the start and at the end |
//! | `recorder` | makes a tape while a run is judged |
//! | `judged` | an audit whose calls may be recorded |
//! | `tape` | the world of a recorded run |
//! | `replay` | judges a recording |
#![forbid(unsafe_code)]

mod chunks;
mod codec;
mod error;
mod item;
mod judged;
mod recorder;
mod replay;
mod setup;
mod tape;
#[cfg(test)]
mod tests;
mod varint;

pub use error::{Problem, ReadError};
pub use judged::Judged;
pub use recorder::{Kept, Recorder};
pub use replay::{holds, judge, judge_bytes, judge_file};
pub use setup::{Origin, Setup};

/// Name of a recording in the folder of `--out`.
pub const FILE: &str = "recording.bin";
/// First eight bytes of a recording.
pub const MAGIC: [u8; 8] = *b"LACUNARC";
/// Version of the format: of the file, and of what the items on it mean.
pub const FORMAT: u64 = 2;
