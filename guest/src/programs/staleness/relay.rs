//! How two CPUs take turns: one changes, the other accesses before and after.

use super::{Attempts, ROOM};
use crate::programs::{ProgramError, Team};
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use lacuna_abi::addr::{BLOCK_SIZE, Gpa, Gva, PAGE_SIZE};
use lacuna_abi::layout::Region;
use lacuna_abi::observe::{Access, Case, Change, Observation, Seen};

/// Nothing is asked of the other CPU.
const IDLE: u64 = 0;
/// It is to make the first access.
const CALLED: u64 = 1;
/// It has, and waits without leaving for the host.
const READY: u64 = 2;
/// The first access did not reach what it should.
const FAILED: u64 = 3;
/// The change has been made and invalidated.
const CHANGED: u64 = 4;
/// The second access has been made and recorded.
const SEEN: u64 = 5;
/// Nothing will be asked any more.
const OVER: u64 = 6;

/// The words by which the CPUs tell each other. Whoever sees a turn sees the rest.
#[derive(Debug, Default)]
pub struct Relay {
    turn: AtomicU64,
    case: AtomicU64,
    va: AtomicU64,
    hit: AtomicU64,
}

/// An access: where, and the frame that it reaches first.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target {
    pub(super) case: Case,
    pub(super) va: Gva,
    pub(super) hit: Gpa,
}

impl Relay {
    /// A relay in which nothing has been asked.
    #[must_use]
    pub const fn new() -> Self {
        let [turn, case, va, hit] = [const { AtomicU64::new(0) }; 4];
        Self { turn, case, va, hit }
    }

    /// Has the other CPU make the first access.
    ///
    /// # Errors
    /// [`ProgramError::Unreached`] if it faulted, [`ProgramError::Abandoned`].
    pub(super) fn call<P: Attempts>(
        &self,
        platform: &P,
        team: &Team,
        target: &Target,
    ) -> Result<(), ProgramError> {
        self.case.store(target.case.number().into(), Relaxed);
        self.put(target.va, target.hit);
        self.turn.store(CALLED, Release);
        team.wait_until(platform, || matches!(self.turn.load(Acquire), READY | FAILED))?;
        match self.turn.load(Acquire) {
            READY => Ok(()),
            _ => Err(ProgramError::Unreached(target.case)),
        }
    }

    /// Has it make the second access to `va`, and waits for that.
    ///
    /// # Errors
    /// [`ProgramError::Abandoned`].
    pub(super) fn changed<P: Attempts>(
        &self,
        platform: &P,
        team: &Team,
        (va, hit): (Gva, Gpa),
    ) -> Result<(), ProgramError> {
        self.put(va, hit);
        self.turn.store(CHANGED, Release);
        team.wait_until(platform, || self.turn.load(Acquire) == SEEN)?;
        self.turn.store(IDLE, Release);
        Ok(())
    }

    /// Nothing will be asked any more.
    pub(super) fn end(&self) {
        self.turn.store(OVER, Release);
    }

    /// The other CPU's part, until the end.
    ///
    /// # Errors
    /// [`ProgramError::Abandoned`].
    pub(super) fn follow<P: Attempts>(
        &self,
        platform: &P,
        team: &Team,
        zone: &Region,
    ) -> Result<(), ProgramError> {
        loop {
            team.wait_until(platform, || matches!(self.turn.load(Acquire), CALLED | OVER))?;
            let Some(target) = self.target().filter(|_| self.turn.load(Acquire) == CALLED) else {
                return Ok(());
            };
            platform.make_room(ROOM);
            let reached = match target.case.change() {
                Change::Flip => {
                    look_everywhere(platform, zone);
                    true
                }
                _ => target.reach(platform).is_some(),
            };
            self.turn.store(if reached { READY } else { FAILED }, Release);
            if reached {
                // Nothing but loads until then: an exit might drop what is cached.
                let spin = || platform.spin();
                team.wait_by(spin, || matches!(self.turn.load(Acquire), CHANGED | OVER))?;
                let changed = |_: &Target| self.turn.load(Acquire) == CHANGED;
                let Some(target) = self.target().filter(changed) else { return Ok(()) };
                target.observe(platform);
                self.turn.store(SEEN, Release);
            }
        }
    }

    fn put(&self, va: Gva, hit: Gpa) {
        self.va.store(va.0, Relaxed);
        self.hit.store(hit.0, Relaxed);
    }

    fn target(&self) -> Option<Target> {
        let case = u32::try_from(self.case.load(Relaxed)).ok().and_then(Case::from_number)?;
        Some(Target { case, va: Gva(self.va.load(Relaxed)), hit: Gpa(self.hit.load(Relaxed)) })
    }
}

impl Target {
    /// Makes the access; what it reached.
    pub(super) fn reach<P: Attempts>(&self, platform: &P) -> Option<Gpa> {
        let Self { case, va, hit } = *self;
        match case.change().access() {
            // Every page says in its first word where it lies.
            Access::Read => platform.attempt(Access::Read, va).map(Gpa),
            // A store must not change that.
            Access::Write => platform.attempt(Access::Write, va.wrapping_add(8)).map(|_| hit),
            Access::Fetch => {
                let va = va.wrapping_add(hit.0 % PAGE_SIZE);
                platform.attempt(Access::Fetch, va).map(|_| hit)
            }
        }
    }

    /// Makes the access and records it.
    pub(super) fn observe<P: Attempts>(&self, platform: &P) {
        let Self { case, va, .. } = *self;
        platform.observe(|| {
            let seen = self.reach(platform).map_or(Seen::Fault, Seen::Reached);
            Observation { case, va, seen }
        });
    }
}

/// Reads the first word of every pageblock through the direct map, of those that it shows.
fn look_everywhere<P: Attempts>(platform: &P, zone: &Region) {
    for offset in (0..zone.len).step_by(BLOCK_SIZE as usize) {
        let _ = platform.attempt(Access::Read, zone.va.wrapping_add(offset));
    }
}
