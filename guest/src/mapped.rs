//! Mapped pages: an allocation that the direct map shows, owned.

use crate::alloc::PageAllocator;
use crate::convert::ConvertError;
use crate::handle::{self, BadHandle};
use crate::meta::Chunk;
use crate::platform::Platform;
use crate::secret::SecretPages;
use core::mem::{ManuallyDrop, forget};
use lacuna_abi::addr::{FrameRange, Gva};
use lacuna_abi::layout::direct_map;

/// Pages of the direct map, freed when this is dropped.
#[must_use = "the pages are freed when this is dropped"]
pub struct MappedPages<'r, 'a, P: Platform> {
    allocator: &'r PageAllocator<'a, P>,
    chunk: Chunk,
}

impl<'r, 'a, P: Platform> MappedPages<'r, 'a, P> {
    pub(crate) fn new(allocator: &'r PageAllocator<'a, P>, chunk: Chunk) -> Self {
        Self { allocator, chunk }
    }

    /// The owner of the allocation with this handle, which is used up.
    ///
    /// # Errors
    /// [`BadHandle`] if it is no handle of mapped pages, or was used before.
    pub fn from_raw(allocator: &'r PageAllocator<'a, P>, handle: u64) -> Result<Self, BadHandle> {
        let chunk = handle::resolve(&allocator.map, handle, false)?;
        Ok(Self { allocator, chunk })
    }

    /// The frames.
    pub fn frames(&self) -> FrameRange {
        self.allocator.map.frames(self.chunk)
    }

    /// Address of the first frame in the direct map.
    pub fn va(&self) -> Gva {
        direct_map(self.frames().start().gpa())
    }

    /// The handle that [`Self::into_raw`] will give; never 0.
    pub fn handle(&self) -> u64 {
        handle::handle(&self.allocator.map, self.chunk.index)
    }

    /// Makes the pages secret where they are, with what they hold: they leave the direct map, and
    /// are closed in the second stage. Needs no free pageblock, but two shootdowns where the flip of
    /// a pageblock costs one for 512 pages. For orders below a pageblock's.
    ///
    /// # Errors
    /// Why not, with the pages, which are as they were.
    pub fn into_secret(self) -> Result<SecretPages<'r, 'a, P>, (Self, ConvertError)> {
        match self.allocator.convert(self.chunk) {
            Ok(()) => {
                let Self { allocator, chunk } = *ManuallyDrop::new(self);
                Ok(SecretPages::new(allocator, chunk))
            }
            Err(error) => Err((self, error)),
        }
    }

    /// Gives up the owner and keeps the pages: [`Self::from_raw`] makes an owner again.
    pub fn into_raw(self) -> u64 {
        let handle = self.handle();
        forget(self);
        handle
    }
}

impl<P: Platform> Drop for MappedPages<'_, '_, P> {
    fn drop(&mut self) {
        self.allocator.free_mapped(self.chunk);
    }
}
