//! Replays a recording of allocations, some of them secret, and checks every page that it had.
//!
//! Each page gets a tag in its first word, and the tag is checked before the page is freed. The
//! only thing kept of an allocation is its handle, one word in a slot of scratch memory.
//!
//! Every CPU walks the whole recording and carries out its own operations, in their order. What a
//! slot sees keeps its order too: beside the handle the slot holds the turn of the operation that
//! comes next, and an operation waits for its turn. The oldest operation that is not done waits for
//! none, so that the replay always goes on.

use super::tags::Tagger;
use super::team::Team;
use super::{PROGRESS, ProgramError, Services, finish, settle};
use crate::alloc::{AllocError, PageAllocator, Request};
use crate::convert::ConvertError;
use crate::freetype::Migratetype;
use crate::meta::MAX_ORDER;
use crate::platform::Platform;
use crate::zone::BLOCK;
use lacuna_abi::addr::Gva;
use lacuna_abi::layout::{INPUT, SCRATCH};
use lacuna_abi::workload::{REPLAY_BYTES, ReplayAction, ReplayOp, SLOT_BYTES};

/// Operations of the recording between two points at which all CPUs meet and everything is counted.
const ROUND: u64 = 4096;

/// Replays this CPU's part of the operations in the input region; `sizes` is their number, and the
/// number of slots in scratch memory, all zero at the start. An allocation that fails for want of
/// memory is one that failed in the kernel: its free is skipped.
///
/// # Errors
/// [`ProgramError`]: a page that is not as it should be, nonsense in the recording, or a refusal of
/// the host.
pub(super) fn run<P: Platform>(
    allocator: &PageAllocator<'_, P>,
    platform: &P,
    services: &impl Services,
    team: &Team,
    sizes: (u64, u64),
) -> Result<(), ProgramError> {
    let (ops, slots) = sizes;
    let tagger = Tagger { allocator, platform, every_page: true };
    let replay = Replay { allocator, platform, team, slots, tagger };
    let cpu = platform.cpu();
    let mut done = 0;
    for number in 0..ops {
        // An operation waits for older ones only, so that all CPUs get here.
        if number != 0 && number % ROUND == 0 {
            team.barrier(platform)?;
            if cpu == 0 {
                settle(allocator, services)?;
            }
            team.barrier(platform)?;
        }
        let at = INPUT.wrapping_add(number * REPLAY_BYTES);
        let first = platform.load(at);
        let owner = usize::from(ReplayOp::cpu_of(first));
        if owner != cpu {
            if owner >= platform.cpus() {
                return Err(ProgramError::BadOperation { op: number });
            }
            continue;
        }
        let words = [first, platform.load(at.wrapping_add(8))];
        replay.step(number, &ReplayOp::from_words(&words))?;
        allocator.count_work();
        allocator.balance().map_err(|error| ProgramError::Alloc { number, error })?;
        done += 1;
        if done % PROGRESS == 0 {
            services.progress(done);
        }
    }
    services.progress(done);
    team.barrier(platform)?;
    if cpu != 0 {
        return Ok(());
    }
    for slot in 0..slots {
        replay.free(slot)?;
    }
    finish(allocator, services)
}

struct Replay<'r, 'a, P: Platform> {
    allocator: &'r PageAllocator<'a, P>,
    platform: &'r P,
    team: &'r Team,
    slots: u64,
    tagger: Tagger<'r, 'a, P>,
}

impl<P: Platform> Replay<'_, '_, P> {
    /// Waits for the operation's turn, carries it out, and passes the turn on.
    fn step(&self, number: u64, op: &ReplayOp) -> Result<(), ProgramError> {
        let bad = ProgramError::BadOperation { op: number };
        let slot = u64::from(op.slot);
        if slot >= self.slots {
            return Err(bad);
        }
        let turn = turn_address(slot);
        let mine = || self.platform.load(turn) == u64::from(op.turn);
        if self.platform.cpus() == 1 && !mine() {
            // Nobody else could make it so.
            return Err(bad);
        }
        self.team.wait_until(self.platform, mine)?;
        self.carry_out(number, slot, op.action)?;
        // An allocation that failed passes the turn too.
        self.platform.store(turn, u64::from(op.turn) + 1);
        Ok(())
    }

    fn carry_out(&self, number: u64, slot: u64, action: ReplayAction) -> Result<(), ProgramError> {
        let bad = ProgramError::BadOperation { op: number };
        let ReplayAction::Alloc { order, migratetype, zero, noblock, secret, in_place } = action
        else {
            return self.free(slot);
        };
        let migratetype = Migratetype::from_number(migratetype).ok_or(bad)?;
        if order > MAX_ORDER || self.platform.load(slot_address(slot)) != 0 {
            return Err(bad);
        }
        if in_place && (!secret || noblock || order >= BLOCK) {
            return Err(bad);
        }
        let request = Request { order, migratetype, zero, noblock };
        let handle = if in_place {
            match self.allocator.alloc_mapped(request) {
                Ok(pages) => match self.tagger.tag_in_place(pages, slot, zero)? {
                    Ok(handle) => handle,
                    // No table was left to split a pageblock with: a failed allocation.
                    Err(ConvertError::NoTable) => return Ok(()),
                    Err(error) => return Err(ProgramError::Convert { number, error }),
                },
                Err(error) => return failed(number, error),
            }
        } else if secret {
            match self.allocator.alloc_secret(request) {
                Ok(pages) => self.tagger.tag_secret(pages, slot, zero)?,
                Err(error) => return failed(number, error),
            }
        } else {
            match self.allocator.alloc_mapped(request) {
                Ok(pages) => self.tagger.tag_mapped(pages, slot, zero)?,
                Err(error) => return failed(number, error),
            }
        };
        self.platform.store(slot_address(slot), handle);
        Ok(())
    }

    /// Checks the tags of the allocation in the slot, if there is one, and frees it.
    fn free(&self, slot: u64) -> Result<(), ProgramError> {
        let handle = self.platform.load(slot_address(slot));
        if handle == 0 {
            return Ok(());
        }
        self.platform.store(slot_address(slot), 0);
        self.tagger.check_and_free(handle, slot)
    }
}

/// An allocation that failed for want of memory is skipped, anything else ends the program.
fn failed(number: u64, error: AllocError) -> Result<(), ProgramError> {
    match error {
        AllocError::NoMemory | AllocError::NoBlock | AllocError::WouldBlock => Ok(()),
        _ => Err(ProgramError::Alloc { number, error }),
    }
}

/// Where the slot keeps its handle, 0 for none.
fn slot_address(slot: u64) -> Gva {
    SCRATCH.wrapping_add(slot * SLOT_BYTES)
}

/// Where the slot keeps the turn of its next operation.
fn turn_address(slot: u64) -> Gva {
    slot_address(slot).wrapping_add(8)
}
