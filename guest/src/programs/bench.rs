//! Costs of allocation, zeroing and flips, measured by the guest's own clock.
//!
//! Each round has the same work: [`Bench::pages`] pages are allocated, used once and freed again. The costs of
//! a round in steady state are those of a long run less those of a short one, which leaves out all
//! that happens only once; so nothing here counts but time.

use super::team::Team;
use super::{ProgramError, Services};
use crate::alloc::{PageAllocator, Request};
use crate::freetype::Migratetype;
use crate::mapped::MappedPages;
use crate::mermap::Protection;
use crate::platform::Platform;
use crate::secret::{Access, SecretPages, UseError};
use lacuna_abi::addr::{BLOCK_FRAMES, Gva, PAGE_SIZE};
use lacuna_abi::gate::OpKind;
use lacuna_abi::layout::SCRATCH;
use lacuna_abi::workload::{BENCH_CPU_WORDS, Bench};

/// Runs `rounds` rounds on this CPU, with 2^`order` pages an allocation.
///
/// # Errors
/// [`ProgramError`].
pub(super) fn run<P: Platform>(
    allocator: &PageAllocator<'_, P>,
    platform: &P,
    services: &impl Services,
    team: &Team,
    (bench, order, rounds): (Bench, u8, u64),
) -> Result<(), ProgramError> {
    let migratetype = Migratetype::Unmovable;
    let zero = bench != Bench::Mapped;
    let request = Request { order, migratetype, zero, noblock: false };
    let rig = Rig { allocator, platform, services, request, pages: bench.pages() };
    team.barrier(platform)?;
    match bench {
        Bench::Secret | Bench::SecretUnused => {
            rig.repeat(rounds, |rig| rig.secret(Rig::pooled, bench == Bench::Secret))?;
        }
        Bench::InPlace | Bench::InPlaceUnused => {
            rig.repeat(rounds, |rig| rig.secret(Rig::converted, bench == Bench::InPlace))?;
        }
        Bench::SecretDry | Bench::SecretDryUnused => {
            rig.repeat(rounds, |rig| rig.secret_dry(bench == Bench::SecretDry))?;
        }
        Bench::SecretKept => rig.repeat(rounds, Rig::secret_kept)?,
        Bench::Mapped | Bench::MappedZero => rig.repeat(rounds, Rig::mapped)?,
        Bench::ZeroWindow => rig.zero_window(rounds)?,
        Bench::ZeroDirect => rig.zero_direct(rounds)?,
        Bench::Flip => rig.repeat(rounds, Rig::flip)?,
    }
    team.barrier(platform)
}

/// Time that a part of a round took.
#[derive(Clone, Copy, Default)]
struct Ticks {
    all: u64,
    /// In gate calls.
    gate: u64,
}

impl Ticks {
    /// This part of a round and another.
    const fn and(self, other: Self) -> Self {
        Self { all: self.all.wrapping_add(other.all), gate: self.gate.wrapping_add(other.gate) }
    }
}

/// What a round is made of.
struct Rig<'r, 'a, P: Platform, S> {
    allocator: &'r PageAllocator<'a, P>,
    platform: &'r P,
    services: &'r S,
    request: Request,
    /// Pages of a round.
    pages: u64,
}

impl<'r, 'a, P: Platform, S: Services> Rig<'r, 'a, P, S> {
    fn repeat(
        &self,
        rounds: u64,
        round: impl Fn(&Self) -> Result<[Ticks; 3], ProgramError>,
    ) -> Result<(), ProgramError> {
        for number in 0..rounds {
            let [alloc, in_use, free] = round(self)?;
            let gate = [alloc.gate.wrapping_add(free.gate), in_use.gate];
            let ticks = [alloc.all, in_use.all, free.all, gate[0], gate[1]];
            self.allocator.count_ticks(ticks);
            self.allocator.count_work();
            self.services.progress(number + 1);
        }
        Ok(())
    }

    /// Allocations in a round.
    fn count(&self) -> u64 {
        (self.pages >> self.request.order).max(1)
    }

    /// Times each part of a round.
    fn timed(
        &self,
        part: impl FnOnce() -> Result<(), ProgramError>,
    ) -> Result<Ticks, ProgramError> {
        let now = || Ticks { all: self.services.clock(), gate: self.services.gate_clock() };
        let before = now();
        part()?;
        let after = now();
        Ok(Ticks {
            all: after.all.wrapping_sub(before.all),
            gate: after.gate.wrapping_sub(before.gate),
        })
    }

    fn pooled(&self, number: u64) -> Result<SecretPages<'r, 'a, P>, ProgramError> {
        let pages = self.allocator.alloc_secret(self.request);
        pages.map_err(|error| ProgramError::Alloc { number, error })
    }

    fn converted(&self, number: u64) -> Result<SecretPages<'r, 'a, P>, ProgramError> {
        let pages = self.allocator.alloc_mapped(self.request);
        let pages = pages.map_err(|error| ProgramError::Alloc { number, error })?;
        pages.into_secret().map_err(|(_, error)| ProgramError::Convert { number, error })
    }

    fn secret(
        &self,
        get: impl Fn(&Self, u64) -> Result<SecretPages<'r, 'a, P>, ProgramError>,
        write: bool,
    ) -> Result<[Ticks; 3], ProgramError> {
        let count = self.count();
        let alloc = self.timed(|| {
            for number in 0..count {
                self.keep(number, get(self, number)?.into_raw());
            }
            Ok(())
        })?;
        let first_write = self.timed(|| {
            for number in (0..count).take_while(|_| write) {
                let pages = SecretPages::from_raw(self.allocator, self.kept(number))?;
                let window =
                    pages.open(0, pages.frames().count().min(BLOCK_FRAMES), Access::Write)?;
                window.store(0, number + 1)?;
                window.close()?;
                self.keep(number, pages.into_raw());
            }
            Ok(())
        })?;
        let free = self.timed(|| {
            for number in 0..count {
                drop(SecretPages::from_raw(self.allocator, self.kept(number))?);
            }
            self.balance()
        })?;
        Ok([alloc, first_write, free])
    }

    /// Secret pages of pageblocks that leave the direct map for them and come back after them.
    fn secret_dry(&self, write: bool) -> Result<[Ticks; 3], ProgramError> {
        let [alloc, first_write, free] = self.secret(Self::pooled, write)?;
        let back = self.timed(|| Ok(self.allocator.shrink()?))?;
        Ok([alloc, first_write, free.and(back)])
    }

    fn secret_kept(&self) -> Result<[Ticks; 3], ProgramError> {
        let alloc = self.timed(|| {
            for number in 0..self.count() {
                let pages = self.allocator.alloc_secret(self.request);
                // Never freed: the next round has to find others.
                pages.map_err(|error| ProgramError::Alloc { number, error })?.into_raw();
            }
            self.balance()
        })?;
        Ok([alloc, Ticks::default(), Ticks::default()])
    }

    fn mapped(&self) -> Result<[Ticks; 3], ProgramError> {
        let count = self.count();
        let alloc = self.timed(|| {
            for number in 0..count {
                let pages = self.allocator.alloc_mapped(self.request);
                let pages = pages.map_err(|error| ProgramError::Alloc { number, error })?;
                self.keep(number, pages.into_raw());
            }
            Ok(())
        })?;
        let first_write = self.timed(|| {
            for number in 0..count {
                let pages = MappedPages::from_raw(self.allocator, self.kept(number))?;
                self.platform.store(pages.pin().va(), number + 1);
                self.keep(number, pages.into_raw());
            }
            Ok(())
        })?;
        let free = self.timed(|| {
            for number in 0..count {
                drop(MappedPages::from_raw(self.allocator, self.kept(number))?);
            }
            self.balance()
        })?;
        Ok([alloc, first_write, free])
    }

    /// Allocates secret pages and has everything that is free go back to the direct map.
    fn flip(&self) -> Result<[Ticks; 3], ProgramError> {
        let alloc = self.timed(|| {
            let pages = self.allocator.alloc_secret(self.request);
            drop(pages.map_err(|error| ProgramError::Alloc { number: 0, error })?);
            Ok(())
        })?;
        let back = self.timed(|| Ok(self.allocator.shrink()?))?;
        Ok([alloc, Ticks::default(), back])
    }

    /// Zeroes a secret pageblock through a window, again and again.
    fn zero_window(&self, rounds: u64) -> Result<(), ProgramError> {
        let block = self.allocator.alloc_secret(Request { order: 9, ..self.request });
        let block = block.map_err(|error| ProgramError::Alloc { number: 0, error })?;
        let frames = block.frames();
        let refused = |error| ProgramError::Use(UseError::Gate(error));
        self.platform.gate(&[(OpKind::Open, frames)]).map_err(refused)?;
        let zeroed = self.repeat(rounds, |rig| {
            let ticks = rig.timed(|| {
                let mapping = rig.allocator.mermap().get(frames, Protection::READ_WRITE);
                let mapping =
                    mapping.map_err(|error| ProgramError::Use(UseError::Window(error)))?;
                rig.platform.zero(mapping.va(), frames.count() * PAGE_SIZE);
                Ok(())
            })?;
            Ok([Ticks::default(), ticks, Ticks::default()])
        });
        self.platform.gate(&[(OpKind::Seal, frames)]).map_err(refused)?;
        zeroed
    }

    /// Zeroes a mapped pageblock through the direct map, again and again.
    fn zero_direct(&self, rounds: u64) -> Result<(), ProgramError> {
        let block = self.allocator.alloc_mapped(Request { order: 9, ..self.request });
        let block = block.map_err(|error| ProgramError::Alloc { number: 0, error })?;
        let pinned = block.pin();
        self.repeat(rounds, |rig| {
            let ticks = rig.timed(|| {
                rig.platform.zero(pinned.va(), pinned.frames().count() * PAGE_SIZE);
                Ok(())
            })?;
            Ok([Ticks::default(), ticks, Ticks::default()])
        })
    }

    fn balance(&self) -> Result<(), ProgramError> {
        let done = self.allocator.balance();
        done.map_err(|error| ProgramError::Alloc { number: 0, error })
    }

    fn place(&self, number: u64) -> Gva {
        let cpu = self.platform.cpu() as u64;
        SCRATCH.wrapping_add(8 * (cpu * BENCH_CPU_WORDS + number))
    }

    fn keep(&self, number: u64, handle: u64) {
        self.platform.store(self.place(number), handle);
    }

    fn kept(&self, number: u64) -> u64 {
        self.platform.load(self.place(number))
    }
}
