//! Stores the input in secret pages, compares it, reads it back, scrubs it. Both ways to a secret
//! page are used: from the pool, and by converting a mapped one in place.
//!
//! Of the input nothing but a hash of each page is kept outside secret pages, and never more than
//! one word of it is on its way.

use super::{PROGRESS, ProgramError, Services, finish, settle};
use crate::alloc::{AllocError, PageAllocator, Request};
use crate::convert::ConvertError;
use crate::freetype::Migratetype;
use crate::mapped::MappedPages;
use crate::platform::Platform;
use crate::secret::{Access, SecretPages, SecretWindow, UseError};
use lacuna_abi::addr::{Gva, PAGE_SIZE};
use lacuna_abi::layout::{INPUT, SCRATCH};
use lacuna_abi::workload::SECRET_PAGE_BYTES;

/// What each stored page is: order 0, and zero behind the end of the input.
const REQUEST: Request =
    Request { order: 0, migratetype: Migratetype::Unmovable, zero: true, noblock: false };

/// Stores `bytes` of the input region, which is zero behind them; scratch memory holds a record for
/// each page.
///
/// # Errors
/// [`ProgramError`]: no memory, a page that is not as it was stored, or a refusal of the host.
pub(super) fn run<P: Platform>(
    allocator: &PageAllocator<'_, P>,
    platform: &P,
    services: &impl Services,
    bytes: u64,
) -> Result<(), ProgramError> {
    let secrets = Secrets { allocator, platform, bytes };
    let pages = bytes.div_ceil(PAGE_SIZE);
    for page in 0..pages {
        secrets.store(page)?;
        allocator.count_work();
        allocator.balance().map_err(|error| ProgramError::Alloc { number: page, error })?;
        if page % PROGRESS == PROGRESS - 1 {
            services.progress(page + 1);
        }
    }
    services.progress(pages);
    for page in 0..pages {
        secrets.check(page, |window, len| window.equals(input(page), 0, len))?;
    }
    services.input_done();
    settle(allocator, services)?;
    for page in 0..pages {
        let stored = platform.load(record(page).wrapping_add(8));
        secrets.check(page, |window, len| Ok(hash(window, len)? == stored))?;
    }
    settle(allocator, services)?;
    for page in 0..pages {
        drop(secrets.resolve(page)?);
    }
    finish(allocator, services)
}

struct Secrets<'r, 'a, P: Platform> {
    allocator: &'r PageAllocator<'a, P>,
    platform: &'r P,
    bytes: u64,
}

impl<'r, 'a, P: Platform> Secrets<'r, 'a, P> {
    /// An empty secret page: from the pool, or, every other one and as long as there is mapped
    /// memory, converted in place. That happens before it holds anything, so that no input ever lies
    /// in the direct map.
    fn allocate(&self, number: u64) -> Result<SecretPages<'r, 'a, P>, ProgramError> {
        if !number.is_multiple_of(2) {
            match self.allocator.alloc_mapped(REQUEST).map(MappedPages::into_secret) {
                Ok(Ok(pages)) => return Ok(pages),
                Err(AllocError::NoMemory) | Ok(Err((_, ConvertError::NoTable))) => {}
                Err(error) => return Err(ProgramError::Alloc { number, error }),
                Ok(Err((_, error))) => return Err(ProgramError::Convert { number, error }),
            }
        }
        let pages = self.allocator.alloc_secret(REQUEST);
        pages.map_err(|error| ProgramError::Alloc { number, error })
    }

    /// Stores a page of input, and its handle and hash in its record.
    fn store(&self, page: u64) -> Result<(), ProgramError> {
        let pages = self.allocate(page)?;
        let window = pages.open(0, 1, Access::Write)?;
        window.copy_from(input(page), 0, self.len(page))?;
        let hash = hash(&window, self.len(page))?;
        window.close()?;
        self.platform.store(record(page).wrapping_add(8), hash);
        self.keep(page, pages);
        Ok(())
    }

    /// Has `check` look at a stored page.
    fn check(
        &self,
        page: u64,
        check: impl FnOnce(&SecretWindow<'_, 'a, P>, u64) -> Result<bool, UseError>,
    ) -> Result<(), ProgramError> {
        let pages = self.resolve(page)?;
        let window = pages.open(0, 1, Access::Read)?;
        let same = check(&window, self.len(page))?;
        window.close()?;
        if !same {
            return Err(ProgramError::Differs { page, frame: pages.frames().start() });
        }
        self.keep(page, pages);
        Ok(())
    }

    fn resolve(&self, page: u64) -> Result<SecretPages<'r, 'a, P>, ProgramError> {
        Ok(SecretPages::from_raw(self.allocator, self.platform.load(record(page)))?)
    }

    fn keep(&self, page: u64, pages: SecretPages<'r, 'a, P>) {
        self.platform.store(record(page), pages.into_raw());
    }

    /// Bytes of input in this page, in whole words.
    fn len(&self, page: u64) -> u64 {
        (self.bytes - page * PAGE_SIZE).min(PAGE_SIZE).next_multiple_of(8)
    }
}

fn input(page: u64) -> Gva {
    INPUT.wrapping_add(page * PAGE_SIZE)
}

/// The page's record: handle, hash.
fn record(page: u64) -> Gva {
    SCRATCH.wrapping_add(page * SECRET_PAGE_BYTES)
}

/// A hash that two different pages are unlikely to share; it need not withstand an attacker.
fn hash<P: Platform>(window: &SecretWindow<'_, '_, P>, len: u64) -> Result<u64, UseError> {
    let mut hash = len;
    for offset in (0..len).step_by(8) {
        let word = window.load(offset)?;
        hash = (hash.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
    Ok(hash)
}
