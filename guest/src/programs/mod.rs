//! The guest programs: what they need of their surroundings, and how they fail.

pub mod replay;
pub mod secrets;

use crate::alloc::{AllocError, PageAllocator};
use crate::convert::ConvertError;
use crate::handle::BadHandle;
use crate::mermap::Leaks;
use crate::platform::Platform;
use crate::secret::UseError;
use core::fmt;
use lacuna_abi::addr::Gfn;

/// What a program needs besides the allocator.
pub trait Services {
    /// Writes a line to the guest log.
    fn log(&self, text: fmt::Arguments<'_>);

    /// Says how much work is done, in units that the program counts.
    fn progress(&self, done: u64);

    /// All input has been taken over: the host wipes the input region.
    fn input_done(&self);

    /// A point at which the host may check everything.
    fn checkpoint(&self);
}

/// Units of work between two progress reports; a power of two.
const PROGRESS: u64 = 64;

/// What a program found wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ProgramError {
    /// An operation of a recording makes no sense: an impossible order or migratetype, a slot that
    /// does not exist, or one that is filled already.
    BadOperation {
        /// Number of the operation, from 0.
        op: u64,
    },
    /// An allocation failed where the program cannot go on.
    Alloc {
        /// Number of the operation or page, from 0.
        number: u64,
        /// Why.
        error: AllocError,
    },
    /// Mapped pages could not become secret in place.
    Convert {
        /// Number of the operation or page, from 0.
        number: u64,
        /// Why.
        error: ConvertError,
    },
    /// Secret pages could not be used or given back.
    Use(UseError),
    /// A handle that the program kept does not lead back to its pages.
    Handle(BadHandle),
    /// A page that was asked for as zero is not zero.
    NotZero {
        /// The page.
        frame: Gfn,
        /// Its first word.
        found: u64,
    },
    /// A page does not hold what was stored in it.
    Tag {
        /// The page.
        frame: Gfn,
        /// The tag that was stored.
        expected: u64,
        /// The word that is there now.
        found: u64,
    },
    /// A page of stored input differs from the input.
    Differs {
        /// Number of the page of input, from 0.
        page: u64,
        /// Where it is stored.
        frame: Gfn,
    },
    /// Windows are still mapped at the end.
    Leaks(Leaks),
}

impl From<UseError> for ProgramError {
    fn from(error: UseError) -> Self {
        Self::Use(error)
    }
}

impl From<BadHandle> for ProgramError {
    fn from(error: BadHandle) -> Self {
        Self::Handle(error)
    }
}

impl fmt::Display for ProgramError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BadOperation { op } => write!(f, "operation {op} of the recording is impossible"),
            Self::Alloc { number, error } => {
                write!(f, "the allocation for operation or page {number} failed: {error:?}")
            }
            Self::Convert { number, error } => {
                write!(f, "converting the pages of operation or page {number} failed: {error:?}")
            }
            Self::Use(error) => write!(f, "secret pages could not be used: {error:?}"),
            Self::Handle(BadHandle(word)) => write!(f, "{word:#x} is no handle of an allocation"),
            Self::NotZero { frame, found } => {
                write!(f, "the page at {frame} was handed out as zero, but starts with {found:#x}")
            }
            Self::Tag { frame, expected, found } => {
                write!(f, "the page at {frame} should hold {expected:#x}, but holds {found:#x}")
            }
            Self::Differs { page, frame } => {
                write!(f, "page {page} of the input, stored at {frame}, is not what was stored")
            }
            Self::Leaks(Leaks(counts)) => {
                write!(f, "windows are still mapped, by CPU: {counts:?}")
            }
        }
    }
}

/// The end of every program: what is free goes back to the direct map, and no window may be left.
fn finish<P: Platform>(
    allocator: &PageAllocator<'_, P>,
    services: &impl Services,
) -> Result<(), ProgramError> {
    allocator.shrink()?;
    allocator.mermap().teardown().map_err(ProgramError::Leaks)?;
    services.checkpoint();
    Ok(())
}
