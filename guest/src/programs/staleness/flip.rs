//! A translation of the direct map that outlives the flip of its pageblock: what a missing flush, and
//! what a seal, make of it.

use super::relay::Target;
use super::{Attempts, OTHER, Relay};
use crate::alloc::{PageAllocator, Request};
use crate::freetype::Migratetype;
use crate::programs::{ProgramError, Services, Team};
use crate::secret::Access;
use lacuna_abi::addr::{BLOCK_ORDER, Gpa};
use lacuna_abi::layout::direct_map;
use lacuna_abi::observe::{Case, Change, Means};

/// CPU 0's part: in each round a pageblock becomes secret, is opened, and is written to through the
/// window while the other CPU reads it through the direct map, of which it has cached every pageblock.
///
/// # Errors
/// [`ProgramError`].
pub(super) fn lead<P: Attempts>(
    allocator: &PageAllocator<'_, P>,
    platform: &P,
    services: &impl Services,
    (team, relay): (&Team, &Relay),
    rounds: u64,
) -> Result<(), ProgramError> {
    if platform.cpus() <= OTHER {
        return Err(ProgramError::NoPlace);
    }
    let case = Case::new(Change::Flip, Means::None, true, true);
    let migratetype = Migratetype::Unmovable;
    let request = Request { order: BLOCK_ORDER as u8, migratetype, zero: false, noblock: false };
    for round in 0..rounds {
        let target = Target { case, va: allocator.layout.zone.va, hit: Gpa(0) };
        relay.call(platform, team, &target)?;
        let pages = allocator
            .alloc_secret(request)
            .map_err(|error| ProgramError::Alloc { number: round, error })?;
        let marker = pages.frames().start().gpa();
        let window = pages.open(0, 1, Access::Write)?;
        window.store(0, marker.0)?;
        relay.changed(platform, team, (direct_map(marker), marker))?;
        window.close()?;
        drop(pages);
        allocator.shrink()?;
        services.progress(round + 1);
    }
    Ok(())
}
