//! Replays a recording of allocations, some of them secret, and checks every page that it had.
//!
//! Each page gets a tag in its first word, and the tag is checked before the page is freed. The
//! only thing kept of an allocation is its handle, one word in a slot of scratch memory.

use super::{PROGRESS, ProgramError, Services, finish};
use crate::alloc::{AllocError, PageAllocator, Request};
use crate::convert::ConvertError;
use crate::freetype::Migratetype;
use crate::mapped::MappedPages;
use crate::meta::MAX_ORDER;
use crate::platform::Platform;
use crate::secret::{Access, SecretPages, SecretWindow};
use crate::zone::BLOCK;
use lacuna_abi::addr::{Gfn, Gva, PAGE_SIZE};
use lacuna_abi::layout::{INPUT, SCRATCH};
use lacuna_abi::workload::{REPLAY_BYTES, ReplayAction, ReplayOp, SLOT_BYTES};

/// Replays `ops` operations from the input region, with `slots` words of scratch memory, all zero
/// at the start. An allocation that fails for want of memory is one that failed in the kernel: its
/// free is skipped.
///
/// # Errors
/// [`ProgramError`]: a page that is not as it should be, nonsense in the recording, or a refusal of
/// the host.
pub fn run<P: Platform>(
    allocator: &PageAllocator<'_, P>,
    platform: &P,
    services: &impl Services,
    ops: u64,
    slots: u64,
) -> Result<(), ProgramError> {
    let replay = Replay { allocator, platform, slots };
    for number in 0..ops {
        let at = INPUT.wrapping_add(number * REPLAY_BYTES);
        let words = [platform.load(at), platform.load(at.wrapping_add(8))];
        replay.step(number, &ReplayOp::from_words(&words))?;
        allocator.count_work();
        if number % PROGRESS == PROGRESS - 1 {
            services.progress(number + 1);
        }
    }
    services.progress(ops);
    for slot in 0..slots {
        replay.free(slot)?;
    }
    finish(allocator, services)
}

struct Replay<'r, 'a, P: Platform> {
    allocator: &'r PageAllocator<'a, P>,
    platform: &'r P,
    slots: u64,
}

impl<'r, 'a, P: Platform> Replay<'r, 'a, P> {
    fn step(&self, number: u64, op: &ReplayOp) -> Result<(), ProgramError> {
        let bad = ProgramError::BadOperation { op: number };
        let slot = u64::from(op.slot);
        if slot >= self.slots {
            return Err(bad);
        }
        let ReplayAction::Alloc { order, migratetype, zero, noblock, secret, in_place } = op.action
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
                Ok(pages) => match self.convert(number, slot, pages, zero)? {
                    Some(handle) => handle,
                    None => return Ok(()),
                },
                Err(error) => return failed(number, error),
            }
        } else if secret {
            match self.allocator.alloc_secret(request) {
                Ok(pages) => self.tag_secret(slot, pages, zero)?,
                Err(error) => return failed(number, error),
            }
        } else {
            match self.allocator.alloc_mapped(request) {
                Ok(pages) => self.tag_mapped(slot, pages, zero)?,
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
        let tags = Tags::new(slot, handle);
        // A handle says by itself which kind it is of: the other kind refuses it.
        if let Ok(pages) = MappedPages::from_raw(self.allocator, handle) {
            self.check_mapped(&pages, tags)
        } else {
            self.check_secret(&SecretPages::from_raw(self.allocator, handle)?, tags)
        }
    }

    fn tag_mapped(
        &self,
        slot: u64,
        pages: MappedPages<'r, 'a, P>,
        zero: bool,
    ) -> Result<u64, ProgramError> {
        self.write_tags(&pages, Tags::new(slot, pages.handle()), zero)?;
        Ok(pages.into_raw())
    }

    fn write_tags(
        &self,
        pages: &MappedPages<'r, 'a, P>,
        tags: Tags,
        zero: bool,
    ) -> Result<(), ProgramError> {
        let mut va = pages.va();
        for (page, frame) in (0..).zip(pages.frames().iter()) {
            if zero {
                check_zero(frame, self.platform.load(va))?;
            }
            self.platform.store(va, tags.of(page));
            va = va.wrapping_add(PAGE_SIZE);
        }
        Ok(())
    }

    /// Tags mapped pages, makes them secret in place, and checks that they kept their tags, which
    /// are then those of their new handle. `None` if no table was left to split a pageblock with.
    fn convert(
        &self,
        number: u64,
        slot: u64,
        pages: MappedPages<'r, 'a, P>,
        zero: bool,
    ) -> Result<Option<u64>, ProgramError> {
        let before = Tags::new(slot, pages.handle());
        self.write_tags(&pages, before, zero)?;
        let pages = match pages.into_secret() {
            Ok(pages) => pages,
            Err((_, ConvertError::NoTable)) => return Ok(None),
            Err((_, error)) => return Err(ProgramError::Convert { number, error }),
        };
        let tags = Tags::new(slot, pages.handle());
        each_window(&pages, Access::Write, |window, first| {
            for (index, frame) in (0..).zip(window.frames().iter()) {
                before.check(first + index, frame, window.load(index * PAGE_SIZE)?)?;
                window.store(index * PAGE_SIZE, tags.of(first + index))?;
            }
            Ok(())
        })?;
        self.allocator.count_tags(pages.frames().count());
        Ok(Some(pages.into_raw()))
    }

    fn check_mapped(&self, pages: &MappedPages<'r, 'a, P>, tags: Tags) -> Result<(), ProgramError> {
        let mut va: Gva = pages.va();
        for (page, frame) in (0..).zip(pages.frames().iter()) {
            tags.check(page, frame, self.platform.load(va))?;
            va = va.wrapping_add(PAGE_SIZE);
        }
        self.allocator.count_tags(pages.frames().count());
        Ok(())
    }

    fn tag_secret(
        &self,
        slot: u64,
        pages: SecretPages<'r, 'a, P>,
        zero: bool,
    ) -> Result<u64, ProgramError> {
        let tags = Tags::new(slot, pages.handle());
        each_window(&pages, Access::Write, |window, first| {
            for (index, frame) in (0..).zip(window.frames().iter()) {
                if zero {
                    check_zero(frame, window.load(index * PAGE_SIZE)?)?;
                }
                window.store(index * PAGE_SIZE, tags.of(first + index))?;
            }
            Ok(())
        })?;
        Ok(pages.into_raw())
    }

    fn check_secret(&self, pages: &SecretPages<'r, 'a, P>, tags: Tags) -> Result<(), ProgramError> {
        each_window(pages, Access::Read, |window, first| {
            for (index, frame) in (0..).zip(window.frames().iter()) {
                tags.check(first + index, frame, window.load(index * PAGE_SIZE)?)?;
            }
            Ok(())
        })?;
        self.allocator.count_tags(pages.frames().count());
        Ok(())
    }
}

/// Opens the pages, a pageblock at a time, and has `body` use each window; it gets the number of
/// the window's first page.
fn each_window<'a, P: Platform>(
    pages: &SecretPages<'_, 'a, P>,
    access: Access,
    mut body: impl FnMut(&SecretWindow<'_, 'a, P>, u64) -> Result<(), ProgramError>,
) -> Result<(), ProgramError> {
    let mut first = 0;
    for part in pages.frames().by_block() {
        let window = pages.open(first, part.count(), access)?;
        body(&window, first)?;
        window.close()?;
        first += part.count();
    }
    Ok(())
}

/// An allocation that failed for want of memory is skipped, anything else ends the program.
fn failed(number: u64, error: AllocError) -> Result<(), ProgramError> {
    match error {
        AllocError::NoMemory | AllocError::NoBlock | AllocError::WouldBlock => Ok(()),
        _ => Err(ProgramError::Alloc { number, error }),
    }
}

fn slot_address(slot: u64) -> Gva {
    SCRATCH.wrapping_add(slot * SLOT_BYTES)
}

fn check_zero(frame: Gfn, found: u64) -> Result<(), ProgramError> {
    if found == 0 { Ok(()) } else { Err(ProgramError::NotZero { frame, found }) }
}

/// The tags of one allocation: they differ from page to page, from slot to slot and, as handles
/// do, from one hand-out of a page to the next. None is 0.
#[derive(Clone, Copy)]
struct Tags(u64);

impl Tags {
    fn new(slot: u64, handle: u64) -> Self {
        Self(slot.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ handle.rotate_left(32))
    }

    fn of(self, page: u64) -> u64 {
        self.0.wrapping_add(page.wrapping_mul(0xd6e8_feb8_6659_fd93)) | 1
    }

    fn check(self, page: u64, frame: Gfn, found: u64) -> Result<(), ProgramError> {
        let expected = self.of(page);
        if found == expected { Ok(()) } else { Err(ProgramError::Tag { frame, expected, found }) }
    }
}
