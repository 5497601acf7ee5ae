//! The program `probe`: looks for translations that a CPU still uses after the tables have changed.
//!
//! Every round accesses an address, changes what is mapped there, invalidates, and accesses it again
//! *without leaving for the host in between*: on many machines that alone drops what is cached. What
//! the second access reached is recorded; what it should have reached, and what it may have reached,
//! the host judges. All frames are ordinary mapped ones, but for those of [`Scenario::Flip`].

mod flip;
mod relay;
mod table;

pub use relay::Relay;

use super::{ProgramError, Services, Team, finish};
use crate::alloc::PageAllocator;
use crate::platform::Platform;
use lacuna_abi::addr::{Gpa, Gva};
use lacuna_abi::observe::{Access, Means, Observation};
use lacuna_abi::workload::Scenario;

/// Records that one CPU makes in a round, at most.
const ROOM: u64 = 24;

/// The CPU that accesses what CPU 0 changes.
const OTHER: usize = 1;

/// What the program needs of its machine beside [`Platform`].
pub trait Attempts: Platform {
    /// Whether this CPU can invalidate so.
    fn offers(&self, means: Means) -> bool;

    /// A function that does nothing, in a frame that no one can write to and that may be mapped a
    /// second time; `None` where no code of the guest's own is fetched through its tables.
    fn code(&self) -> Option<Gpa>;

    /// Waits until this CPU can make so many records without leaving for the host.
    fn make_room(&self, records: u64);

    /// One turn of waiting for a word of memory, without leaving for the host.
    fn spin(&self);

    /// Accesses `va`: the word that was read, 0 for other accesses; `None` if it faulted.
    fn attempt(&self, access: Access, va: Gva) -> Option<u64>;

    /// Records what `look` sees, with a number from before it looks.
    fn observe(&self, look: impl FnOnce() -> Observation);

    /// What must be before the first access so that this CPU can invalidate so.
    fn prepare(&self, means: Means);

    /// Invalidates on this CPU, and records that; never by [`Means::Ipi`].
    fn invalidate(&self, means: Means, va: Gva);

    /// Undoes [`Self::prepare`].
    fn restore(&self, means: Means);
}

/// This CPU's part.
///
/// # Errors
/// [`ProgramError`].
pub fn run<P: Attempts>(
    (scenario, rounds): (Scenario, u64),
    allocator: &PageAllocator<'_, P>,
    platform: &P,
    services: &impl Services,
    team: &Team,
    relay: &Relay,
) -> Result<(), ProgramError> {
    let ended = match platform.cpu() {
        0 => {
            let led = match scenario {
                Scenario::Table => {
                    table::lead(allocator, platform, services, (team, relay), rounds)
                }
                Scenario::Flip => flip::lead(allocator, platform, services, (team, relay), rounds),
            };
            relay.end();
            led.and_then(|()| finish(allocator, services))
        }
        OTHER => relay.follow(platform, team, &allocator.layout.zone),
        _ => Ok(()),
    };
    team.leave(platform, ended)
}
