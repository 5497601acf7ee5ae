//! Tags: every page that a program has holds a word of its own, which is checked before the page is
//! freed. Whoever frees an allocation needs only its handle to know its tags.

use super::ProgramError;
use crate::alloc::PageAllocator;
use crate::convert::ConvertError;
use crate::mapped::MappedPages;
use crate::platform::Platform;
use crate::secret::{Access, SecretPages, SecretWindow};
use lacuna_abi::addr::{Gfn, PAGE_SIZE};

/// Tags the pages of allocations and checks them.
#[derive(Clone, Copy)]
pub(super) struct Tagger<'r, 'a, P: Platform> {
    pub(super) allocator: &'r PageAllocator<'a, P>,
    pub(super) platform: &'r P,
    /// All pages are tagged; otherwise the first, the last and one between them.
    pub(super) every_page: bool,
}

impl<'r, 'a, P: Platform> Tagger<'r, 'a, P> {
    /// Tags mapped pages, which are zero if `zero` says so, and gives up their owner for a handle.
    pub(super) fn tag_mapped(
        &self,
        pages: MappedPages<'r, 'a, P>,
        salt: u64,
        zero: bool,
    ) -> Result<u64, ProgramError> {
        self.write_mapped(&pages, Tags::new(salt, pages.handle()), zero)?;
        Ok(pages.into_raw())
    }

    fn write_mapped(
        &self,
        pages: &MappedPages<'r, 'a, P>,
        tags: Tags,
        zero: bool,
    ) -> Result<(), ProgramError> {
        let pages = pages.pin();
        for page in self.pages(pages.frames().count(), tags) {
            let va = pages.va().wrapping_add(page * PAGE_SIZE);
            if zero {
                check_zero(pages.frames().start().wrapping_add(page), self.platform.load(va))?;
            }
            self.platform.store(va, tags.of(page));
        }
        Ok(())
    }

    /// Tags mapped pages, makes them secret in place, and checks that they kept their tags; then
    /// gives up their owner for a handle, and tags them anew as that says.
    pub(super) fn tag_in_place(
        &self,
        pages: MappedPages<'r, 'a, P>,
        salt: u64,
        zero: bool,
    ) -> Result<Result<u64, ConvertError>, ProgramError> {
        let before = Tags::new(salt, pages.handle());
        self.write_mapped(&pages, before, zero)?;
        let pages = match pages.into_secret() {
            Ok(pages) => pages,
            Err((_, error)) => return Ok(Err(error)),
        };
        let tags = Tags::new(salt, pages.handle());
        self.each_secret(&pages, Access::Read, before, |window, offset, page, frame| {
            before.check(page, frame, window.load(offset)?)
        })?;
        self.each_secret(&pages, Access::Write, tags, |window, offset, page, _| {
            Ok(window.store(offset, tags.of(page))?)
        })?;
        self.allocator.count_tags(pages.frames().count());
        Ok(Ok(pages.into_raw()))
    }

    /// Tags secret pages, which are zero if `zero` says so, and gives up their owner for a handle.
    pub(super) fn tag_secret(
        &self,
        pages: SecretPages<'r, 'a, P>,
        salt: u64,
        zero: bool,
    ) -> Result<u64, ProgramError> {
        let tags = Tags::new(salt, pages.handle());
        self.each_secret(&pages, Access::Write, tags, |window, offset, page, frame| {
            if zero {
                check_zero(frame, window.load(offset)?)?;
            }
            window.store(offset, tags.of(page))?;
            Ok(())
        })?;
        Ok(pages.into_raw())
    }

    /// Checks the tags of an allocation and frees it.
    pub(super) fn check_and_free(&self, handle: u64, salt: u64) -> Result<(), ProgramError> {
        let tags = Tags::new(salt, handle);
        // A handle says by itself which kind it is of: the other kind refuses it.
        let count = if let Ok(pages) = MappedPages::from_raw(self.allocator, handle) {
            let pages = pages.pin();
            for page in self.pages(pages.frames().count(), tags) {
                let frame = pages.frames().start().wrapping_add(page);
                let va = pages.va().wrapping_add(page * PAGE_SIZE);
                tags.check(page, frame, self.platform.load(va))?;
            }
            pages.frames().count()
        } else {
            let pages = SecretPages::from_raw(self.allocator, handle)?;
            self.each_secret(&pages, Access::Read, tags, |window, offset, page, frame| {
                tags.check(page, frame, window.load(offset)?)
            })?;
            pages.frames().count()
        };
        self.allocator.count_tags(if self.every_page { count } else { count.min(3) });
        Ok(())
    }

    /// The pages of an allocation of `count` that are tagged, in ascending order.
    fn pages(&self, count: u64, tags: Tags) -> impl Iterator<Item = u64> + use<P> {
        let every = self.every_page;
        let middle = if count > 2 { 1 + tags.0 % (count - 2) } else { 0 };
        let few = count.min(3);
        (0..if every { count } else { few }).map(move |number| match number {
            _ if every => number,
            0 => 0,
            1 if few == 3 => middle,
            _ => count - 1,
        })
    }

    /// Has `body` use each tagged page: a pageblock in one window if all are tagged, otherwise each
    /// page in one of its own. It gets the window, the byte in it, the page's number, its frame.
    fn each_secret(
        &self,
        pages: &SecretPages<'_, 'a, P>,
        access: Access,
        tags: Tags,
        mut body: impl FnMut(&SecretWindow<'_, 'a, P>, u64, u64, Gfn) -> Result<(), ProgramError>,
    ) -> Result<(), ProgramError> {
        let frames = pages.frames();
        if !self.every_page {
            for page in self.pages(frames.count(), tags) {
                let window = pages.open(page, 1, access)?;
                body(&window, 0, page, window.frames().start())?;
                window.close()?;
            }
            return Ok(());
        }
        let mut first = 0;
        for part in frames.by_block() {
            let window = pages.open(first, part.count(), access)?;
            for (index, frame) in (0..).zip(window.frames().iter()) {
                body(&window, index * PAGE_SIZE, first + index, frame)?;
            }
            window.close()?;
            first += part.count();
        }
        Ok(())
    }
}

fn check_zero(frame: Gfn, found: u64) -> Result<(), ProgramError> {
    if found == 0 { Ok(()) } else { Err(ProgramError::NotZero { frame, found }) }
}

/// The tags of one allocation: they differ from page to page, with the salt and, as handles do, from
/// one hand-out of a page to the next. None is 0.
#[derive(Clone, Copy)]
struct Tags(u64);

impl Tags {
    fn new(salt: u64, handle: u64) -> Self {
        Self(salt.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ handle.rotate_left(32))
    }

    fn of(self, page: u64) -> u64 {
        self.0.wrapping_add(page.wrapping_mul(0xd6e8_feb8_6659_fd93)) | 1
    }

    fn check(self, page: u64, frame: Gfn, found: u64) -> Result<(), ProgramError> {
        let expected = self.of(page);
        if found == expected { Ok(()) } else { Err(ProgramError::Tag { frame, expected, found }) }
    }
}
