//! Random requests of every kind, on every CPU: allocations of all orders and flags, conversions in
//! place, frees on other CPUs, background work; all but the last with interrupts on and off. Every
//! allocation is tagged and checked.

use super::tags::Tagger;
use super::team::Team;
use super::{PROGRESS, ProgramError, Services, finish, settle};
use crate::alloc::{AllocError, PageAllocator, Request};
use crate::convert::ConvertError;
use crate::freetype::Migratetype;
use crate::meta::MAX_ORDER;
use crate::platform::{InterruptsOff, Platform};
use crate::random::Random;
use crate::zone::BLOCK;
use lacuna_abi::addr::Gva;
use lacuna_abi::layout::SCRATCH;
use lacuna_abi::workload::{STRESS_CPU_WORDS, STRESS_SLOTS};

/// Operations of a phase in which memory gets short, and of one in which it gets free again.
const PHASE: u64 = 2048;
/// Operations between two points at which all CPUs meet and everything is counted.
const ROUND: u64 = 1 << 16;

/// Carries out `ops` random operations of at most `max_order` on this CPU, in an order that `seed`
/// decides. Scratch memory is all zero at the start.
///
/// # Errors
/// [`ProgramError`]: a page that is not as it should be, counters that do not add up, or a refusal
/// of the host.
pub(super) fn run<P: Platform>(
    allocator: &PageAllocator<'_, P>,
    platform: &P,
    services: &impl Services,
    team: &Team,
    [ops, max_order, seed]: [u64; 3],
) -> Result<(), ProgramError> {
    let cpu = platform.cpu() as u64;
    let max_order = u8::try_from(max_order).unwrap_or(MAX_ORDER).min(MAX_ORDER);
    let stress = Stress {
        allocator,
        platform,
        tagger: Tagger { allocator, platform, every_page: false },
        max_order,
        cpu,
    };
    let mut random = Random(seed ^ cpu.wrapping_mul(0xa076_1d64_78bd_642f));
    for number in 0..ops {
        stress.step(number, &mut random)?;
        allocator.count_work();
        if number % PROGRESS == PROGRESS - 1 {
            services.progress(number + 1);
        }
        if number % ROUND == ROUND - 1 {
            team.barrier(platform)?;
            if cpu == 0 {
                settle(allocator, services)?;
            }
            team.barrier(platform)?;
        }
    }
    services.progress(ops);
    team.barrier(platform)?;
    if cpu != 0 {
        return Ok(());
    }
    for at in 0..platform.cpus() as u64 * STRESS_CPU_WORDS {
        stress.free_at(SCRATCH.wrapping_add(8 * at))?;
    }
    finish(allocator, services)
}

struct Stress<'r, 'a, P: Platform> {
    allocator: &'r PageAllocator<'a, P>,
    platform: &'r P,
    tagger: Tagger<'r, 'a, P>,
    max_order: u8,
    cpu: u64,
}

impl<P: Platform> Stress<'_, '_, P> {
    fn step(&self, number: u64, random: &mut Random) -> Result<(), ProgramError> {
        match random.below(512) {
            0 => return Ok(self.allocator.shrink()?),
            1..8 => {
                let done = self.allocator.balance();
                return done.map_err(|error| ProgramError::Alloc { number, error });
            }
            8..64 => {
                // What another CPU sent is freed here.
                let letter = self.letter(random.below(self.cpus()), self.cpu);
                if self.platform.load(letter) != 0 {
                    return self.free(letter, random);
                }
            }
            _ => {}
        }
        // In turn memory gets short and free again, and the sides of the direct map change places.
        let grows = (number / PHASE).is_multiple_of(2);
        let secret = if (number / (2 * PHASE)).is_multiple_of(2) { 9 } else { 1 };
        let mut slot = self.slot(random.below(STRESS_SLOTS));
        for _ in 0..4 {
            if (self.platform.load(slot) == 0) == grows {
                break;
            }
            slot = self.slot(random.below(STRESS_SLOTS));
        }
        let handle = self.platform.load(slot);
        if handle == 0 {
            return self.alloc(number, slot, random.below(10) < secret, random);
        }
        let letter = self.letter(self.cpu, random.below(self.cpus()));
        if random.below(4) == 0 && self.platform.load(letter) == 0 {
            self.platform.store(slot, 0);
            self.platform.store(letter, handle);
            return Ok(());
        }
        self.free(slot, random)
    }

    /// As [`Self::free_at`], now and then with interrupts off.
    fn free(&self, at: Gva, random: &mut Random) -> Result<(), ProgramError> {
        let _off = (random.below(8) == 0).then(|| InterruptsOff::new(self.platform));
        self.free_at(at)
    }

    fn alloc(
        &self,
        number: u64,
        slot: Gva,
        secret: bool,
        random: &mut Random,
    ) -> Result<(), ProgramError> {
        // Each order half as often as the one below it; all are met.
        let order = (random.next_word() | 1 << self.max_order).trailing_zeros() as u8;
        let migratetype = Migratetype::ALL[random.below(3) as usize];
        let zero = random.below(2) == 0;
        // Who must not wait may have interrupts on, and with interrupts off nobody has to say so.
        let context = random.below(16);
        let (noblock, atomic) = (context < 2, matches!(context, 1 | 2));
        let request = Request { order, migratetype, zero, noblock };
        if secret && !noblock && !atomic && order < BLOCK && random.below(8) == 0 {
            return self.convert(number, slot, request);
        }
        let off = atomic.then(|| InterruptsOff::new(self.platform));
        let handle = if secret {
            let pages = self.allocator.alloc_secret(request);
            pages.map(|pages| self.tagger.tag_secret(pages, 0, zero))
        } else {
            let pages = self.allocator.alloc_mapped(request);
            pages.map(|pages| self.tagger.tag_mapped(pages, 0, zero))
        };
        drop(off);
        match handle {
            Ok(handle) => {
                self.platform.store(slot, handle?);
                Ok(())
            }
            Err(AllocError::NoMemory | AllocError::NoBlock | AllocError::WouldBlock) => Ok(()),
            Err(error) => Err(ProgramError::Alloc { number, error }),
        }
    }

    /// Mapped pages that become secret where they are.
    fn convert(&self, number: u64, slot: Gva, request: Request) -> Result<(), ProgramError> {
        let pages = match self.allocator.alloc_mapped(request) {
            Ok(pages) => pages,
            Err(AllocError::NoMemory) => return Ok(()),
            Err(error) => return Err(ProgramError::Alloc { number, error }),
        };
        match self.tagger.tag_in_place(pages, 0, request.zero)? {
            Ok(handle) => {
                self.platform.store(slot, handle);
                Ok(())
            }
            Err(ConvertError::NoTable) => Ok(()),
            Err(error) => Err(ProgramError::Convert { number, error }),
        }
    }

    /// Checks and frees what the word holds, if it holds something.
    fn free_at(&self, at: Gva) -> Result<(), ProgramError> {
        let handle = self.platform.load(at);
        if handle == 0 {
            return Ok(());
        }
        self.tagger.check_and_free(handle, 0)?;
        self.platform.store(at, 0);
        Ok(())
    }

    fn cpus(&self) -> u64 {
        self.platform.cpus() as u64
    }

    /// One of this CPU's own slots.
    fn slot(&self, number: u64) -> Gva {
        SCRATCH.wrapping_add(8 * (self.cpu * STRESS_CPU_WORDS + number))
    }

    /// Where one CPU leaves an allocation for another: only the one fills it, only the other empties
    /// it.
    fn letter(&self, from: u64, to: u64) -> Gva {
        SCRATCH.wrapping_add(8 * (from * STRESS_CPU_WORDS + STRESS_SLOTS + to))
    }
}
