//! The guest programs: what they need of their surroundings, and how they fail.

mod bench;
mod replay;
mod secrets;
pub mod staleness;
mod stress;
mod tags;
mod team;

pub use team::Team;

use crate::alloc::{AllocError, PageAllocator};
use crate::convert::ConvertError;
use crate::counters::Pages;
use crate::handle::BadHandle;
use crate::mermap::Leaks;
use crate::platform::Platform;
use crate::secret::UseError;
use crate::selftest;
use core::fmt;
use lacuna_abi::addr::Gfn;
use lacuna_abi::observe::Case;
use lacuna_abi::workload::{Bench, Program, Selftest};

/// What a program needs besides the allocator.
pub trait Services {
    /// Writes a line to the guest log.
    fn log(&self, text: fmt::Arguments<'_>);

    /// Says how much work this CPU has done, in units that the program counts.
    fn progress(&self, done: u64);

    /// The time in ticks of a clock that runs at one pace, the same for all CPUs.
    fn clock(&self) -> u64;

    /// Those of the clock's ticks that went by in gate calls of this CPU; always 0 where nobody
    /// keeps them apart.
    fn gate_clock(&self) -> u64 {
        0
    }

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
    /// No test or bench has this number, or it has no such order.
    NoSuchTest(u64),
    /// The counters of a freetype do not add up.
    Miscounted {
        /// Number of the freetype.
        freetype: usize,
        /// What was counted.
        pages: Pages,
    },
    /// Windows are still mapped at the end.
    Leaks(Leaks),
    /// Another CPU gave up, so that this one waited in vain; the other one knows why.
    Abandoned,
    /// The program `probe` found no place: it needs room for two tables in the table pool, 4 MiB of
    /// address space behind the zone in its last GiB, and for some of it a second CPU.
    NoPlace,
    /// The first access of a case of the program `probe` did not reach what was mapped just before.
    Unreached(Case),
    /// Who runs programs runs this one in another way.
    ImageOnly(Program),
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
            Self::NoSuchTest(number) => write!(f, "no test or bench has the number {number}"),
            Self::Miscounted { freetype, pages } => {
                write!(f, "the pages of freetype {freetype} do not add up: {pages:?}")
            }
            Self::Leaks(Leaks(counts)) => {
                write!(f, "windows are still mapped, by CPU: {counts:?}")
            }
            Self::Abandoned => write!(f, "another CPU gave up"),
            Self::NoPlace => write!(
                f,
                "the program probe finds no place: memory_mib may not be a multiple of 1024, or just \
                 below one, and the scenario flip needs 2 vCPUs"
            ),
            Self::Unreached(case) => write!(
                f,
                "the first access of the case {} / {} faulted though its page was mapped",
                case.change().name(),
                case.means().name()
            ),
            Self::ImageOnly(program) => {
                write!(f, "the program {} is not run by this function", program.name())
            }
        }
    }
}

/// Runs this CPU's part of `program`, whose arguments are said at [`Program`]. Every CPU of the
/// machine calls this, with interrupts on, and all of them with the same arguments and the same
/// `team`, which no program has used before. What one CPU does alone CPU 0 does, and the others
/// return after it.
///
/// # Errors
/// [`ProgramError`]. When one CPU ends so, the others end with [`ProgramError::Abandoned`] as soon
/// as they wait.
pub fn run<P: Platform>(
    program: Program,
    args: [u64; 3],
    allocator: &PageAllocator<'_, P>,
    platform: &P,
    services: &impl Services,
    team: &Team,
) -> Result<(), ProgramError> {
    let lead = platform.cpu() == 0;
    let [arg0, arg1, _] = args;
    let ended = match program {
        Program::Replay => replay::run(allocator, platform, services, team, (arg0, arg1)),
        Program::Stress => stress::run(allocator, platform, services, team, args),
        Program::Bench => match (Bench::from_number(arg0), u8::try_from(arg1)) {
            (Some(bench), Ok(order)) => {
                bench::run(allocator, platform, services, team, (bench, order, args[2]))
            }
            _ => Err(ProgramError::NoSuchTest(arg0)),
        },
        Program::Selftest => match Selftest::from_number(arg0) {
            Some(test) => {
                selftest::run(test, arg1, allocator, platform, team);
                Ok(())
            }
            None => Err(ProgramError::NoSuchTest(arg0)),
        },
        Program::Secrets if lead => secrets::run(allocator, platform, services, arg0),
        Program::Secrets | Program::Idle => Ok(()),
        Program::Touch | Program::Crash | Program::Flush | Program::Probe => {
            Err(ProgramError::ImageOnly(program))
        }
    };
    team.leave(platform, ended)
}

/// The end of every program: what is free goes back to the direct map, and no window may be left.
fn finish<P: Platform>(
    allocator: &PageAllocator<'_, P>,
    services: &impl Services,
) -> Result<(), ProgramError> {
    allocator.shrink()?;
    allocator.mermap().teardown().map_err(ProgramError::Leaks)?;
    settle(allocator, services)
}

/// A point at which nothing is under way on any CPU: every page must be somewhere, and the host may
/// check everything.
fn settle<P: Platform>(
    allocator: &PageAllocator<'_, P>,
    services: &impl Services,
) -> Result<(), ProgramError> {
    let (pages, _) = allocator.pages();
    for (freetype, pages) in pages.into_iter().enumerate() {
        if !pages.adds_up() {
            return Err(ProgramError::Miscounted { freetype, pages });
        }
    }
    services.checkpoint();
    Ok(())
}
