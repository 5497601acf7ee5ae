//! The tables of the address space, as far as this crate writes to them: runs of leaf entries.

use crate::platform::{AddressSpace, GateError, Platform};
use lacuna_abi::addr::{Gpa, Gva};
use lacuna_abi::direct::TableOp;
use lacuna_abi::event::EntryWrite;
use lacuna_abi::layout::Region;
use lacuna_abi::paging::{Entry, Level};
use lacuna_abi::walk::{self, NoLeaf};

/// Consecutive entries of one table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    /// Place of the first entry.
    pub(crate) at: Gpa,
    /// First address that the first entry spans.
    pub(crate) va: Gva,
    pub(crate) level: Level,
    pub(crate) count: u32,
}

/// Place of the entry of `level` for `va`: the walk from this CPU's root through the table pool.
///
/// # Errors
/// [`NoLeaf`] if the path ends above `level`.
pub(crate) fn locate<P: Platform>(
    platform: &P,
    pool: &Region,
    va: Gva,
    level: Level,
) -> Result<Gpa, NoLeaf> {
    let read = |at| pool.contains(at).then(|| platform.read_entry(at));
    walk::locate(&read, platform.space().root, va, level)
}

/// The write of a run of entries from `old` to `new`, counted on as `Entry::nth_of_run` does.
#[inline(always)]
pub(crate) fn entry_write<P: Platform>(
    platform: &P,
    run: Run,
    old: Entry,
    new: Entry,
) -> EntryWrite {
    let AddressSpace { root, pcid } = platform.space();
    let Run { va, level, count, .. } = run;
    EntryWrite { root, pcid, va, level, count, old, new, grant: 0 }
}

/// Writes a run of entries: from `old` to `new`, counted on as `Entry::nth_of_run` does.
/// Part of its caller, whose name a report of the write then bears.
///
/// # Errors
/// The host refused it, and nothing was written.
#[inline(always)]
pub(crate) fn write<P: Platform>(
    platform: &P,
    run: Run,
    old: Entry,
    new: Entry,
) -> Result<(), GateError> {
    platform.write_entries(run.at, &entry_write(platform, run, old, new))
}

/// The same as an operation, one of several.
pub(crate) fn op<P: Platform>(platform: &P, run: Run, old: Entry, new: Entry) -> TableOp {
    TableOp::Write { at: run.at, write: entry_write(platform, run, old, new) }
}

/// A write that can only be refused if this guest's own records of its tables are wrong: to go on
/// with them is not safe.
///
/// # Panics
/// If it was.
#[track_caller]
pub(crate) fn must(written: Result<(), GateError>, what: &str) {
    if let Err(error) = written {
        panic!("the host refused to {what}: {error:?}");
    }
}
