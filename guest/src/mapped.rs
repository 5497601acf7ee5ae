//! Mapped pages: an allocation that the direct map shows, owned.

use crate::alloc::PageAllocator;
#[cfg(feature = "unmapped")]
use crate::convert::ConvertError;
use crate::handle::{BadHandle, Pin, Slot};
use crate::platform::Platform;
#[cfg(feature = "unmapped")]
use crate::secret::SecretPages;
use core::mem::ManuallyDrop;
use lacuna_abi::addr::{FrameRange, Gva};
use lacuna_abi::layout::direct_map;

/// Pages of the direct map, freed when this is dropped. They may be moved while they are not
/// pinned, so that nobody keeps their address.
#[must_use = "the pages are freed when this is dropped"]
pub struct MappedPages<'r, 'a, P: Platform> {
    allocator: &'r PageAllocator<'a, P>,
    slot: Slot,
}

impl<'r, 'a, P: Platform> MappedPages<'r, 'a, P> {
    pub(crate) fn new(allocator: &'r PageAllocator<'a, P>, slot: Slot) -> Self {
        Self { allocator, slot }
    }

    /// The owner of the allocation with this handle, which is used up.
    ///
    /// # Errors
    /// [`BadHandle`] if it is no handle of mapped pages, or was used before.
    pub fn from_raw(allocator: &'r PageAllocator<'a, P>, handle: u64) -> Result<Self, BadHandle> {
        let slot = Slot::resolve(&allocator.map, allocator.platform, handle, false)?;
        Ok(Self { allocator, slot })
    }

    /// Keeps the pages where they are, to be used.
    pub fn pin(&self) -> PinnedPages<'_, 'a, P> {
        let pin = self.slot.pin(&self.allocator.map, self.allocator.platform);
        PinnedPages { allocator: self.allocator, pin }
    }

    /// The frames, where they lie now.
    pub fn frames(&self) -> FrameRange {
        self.allocator.map.frames(self.slot.chunk(&self.allocator.map))
    }

    /// The handle that [`Self::into_raw`] will give; never 0.
    pub fn handle(&self) -> u64 {
        self.slot.handle(&self.allocator.map)
    }

    /// Makes the pages secret where they are, with what they hold: they leave the direct map, and
    /// are closed in the second stage. Needs no free pageblock, but two shootdowns where the flip of
    /// a pageblock costs one for 512 pages. For orders below a pageblock's.
    ///
    /// # Errors
    /// Why not, with the pages, which are as they were.
    #[cfg(feature = "unmapped")]
    pub fn into_secret(self) -> Result<SecretPages<'r, 'a, P>, (Self, ConvertError)> {
        match self.allocator.convert(self.slot) {
            Ok(()) => {
                let Self { allocator, slot } = *ManuallyDrop::new(self);
                Ok(SecretPages::new(allocator, slot))
            }
            Err(error) => Err((self, error)),
        }
    }

    /// Gives up the owner and keeps the pages: [`Self::from_raw`] makes an owner again.
    pub fn into_raw(self) -> u64 {
        let Self { allocator, slot } = *ManuallyDrop::new(self);
        slot.give_up(&allocator.map)
    }
}

impl<P: Platform> Drop for MappedPages<'_, '_, P> {
    fn drop(&mut self) {
        self.allocator.free_mapped(self.slot.pin(&self.allocator.map, self.allocator.platform));
    }
}

/// Mapped pages that stay where they are while this lives.
#[must_use = "the pages may be moved when this is dropped"]
pub struct PinnedPages<'s, 'a, P: Platform> {
    allocator: &'s PageAllocator<'a, P>,
    pin: Pin<'a>,
}

impl<P: Platform> PinnedPages<'_, '_, P> {
    /// The frames.
    pub fn frames(&self) -> FrameRange {
        self.allocator.map.frames(self.pin.chunk())
    }

    /// Address of the first frame in the direct map.
    pub fn va(&self) -> Gva {
        direct_map(self.frames().start().gpa())
    }
}
