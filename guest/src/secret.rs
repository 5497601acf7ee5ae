//! Secret pages: an allocation that nothing shows but the windows opened on it.

use crate::alloc::PageAllocator;
use crate::convert::ConvertError;
pub use crate::error::UseError;
use crate::handle::{BadHandle, Pin, Slot};
use crate::mapped::MappedPages;
use crate::mermap::{Mapping, MermapError, Protection};
use crate::platform::{InterruptsOff, Platform};
use core::mem::ManuallyDrop;
use lacuna_abi::addr::{FrameRange, Gfn, Gva, PAGE_SIZE};
use lacuna_abi::gate::OpKind;

/// What a window is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Loads.
    Read,
    /// Loads and stores. The pages are not known to be zero any more.
    Write,
}

/// Secret pages, scrubbed and freed when this is dropped. Their bytes are reachable only through
/// a [`SecretWindow`].
#[must_use = "the pages are scrubbed and freed when this is dropped"]
pub struct SecretPages<'r, 'a, P: Platform> {
    allocator: &'r PageAllocator<'a, P>,
    slot: Slot,
}

impl<'r, 'a, P: Platform> SecretPages<'r, 'a, P> {
    pub(crate) fn new(allocator: &'r PageAllocator<'a, P>, slot: Slot) -> Self {
        Self { allocator, slot }
    }

    /// The owner of the allocation with this handle, which is used up.
    ///
    /// # Errors
    /// [`BadHandle`] if it is no handle of secret pages, or was used before.
    pub fn from_raw(allocator: &'r PageAllocator<'a, P>, handle: u64) -> Result<Self, BadHandle> {
        let slot = Slot::resolve(&allocator.map, allocator.platform, handle, true)?;
        Ok(Self { allocator, slot })
    }

    /// The frames, where they lie now.
    pub fn frames(&self) -> FrameRange {
        self.allocator.map.frames(self.slot.chunk(&self.allocator.map))
    }

    /// The handle that [`Self::into_raw`] will give; never 0.
    pub fn handle(&self) -> u64 {
        self.slot.handle(&self.allocator.map)
    }

    /// Maps converted pages again, zero: the way back of [`MappedPages::into_secret`]. Pages from the
    /// pool go back there when they are dropped.
    ///
    /// # Errors
    /// Why not, with the pages, which are secret, and perhaps scrubbed.
    pub fn into_mapped(self) -> Result<MappedPages<'r, 'a, P>, (Self, ConvertError)> {
        match self.allocator.restore_slot(self.slot) {
            Ok(()) => {
                let Self { allocator, slot } = *ManuallyDrop::new(self);
                Ok(MappedPages::new(allocator, slot))
            }
            Err(error) => Err((self, error)),
        }
    }

    /// Gives up the owner and keeps the pages: [`Self::from_raw`] makes an owner again.
    pub fn into_raw(self) -> u64 {
        let Self { allocator, slot } = *ManuallyDrop::new(self);
        slot.give_up(&allocator.map)
    }

    /// Opens `count` pages from page `first` of the allocation in a window of this CPU. A single
    /// page falls back to the reserve, with interrupts off while the window lives.
    ///
    /// # Errors
    /// [`UseError`]; the pages are sealed, except after [`UseError::Unsealed`].
    pub fn open(
        &self,
        first: u64,
        count: u64,
        access: Access,
    ) -> Result<SecretWindow<'_, 'a, P>, UseError> {
        let allocator = self.allocator;
        let pin = self.slot.pin(&allocator.map, allocator.platform);
        let all = allocator.map.frames(pin.chunk());
        let frames = FrameRange::new(Gfn(all.start().0.saturating_add(first)), count)
            .filter(|frames| all.contains_range(*frames))
            .ok_or(UseError::OutOfRange)?;
        allocator.platform.gate(&[(OpKind::Open, frames)]).map_err(UseError::Gate)?;
        // From here on dropping the window seals the frames, whether they could be mapped or not.
        let mut window =
            SecretWindow { allocator, pin, frames, access, mapping: None, sealed: false };
        if access == Access::Write {
            allocator.map.set_known(frames, false);
        }
        match window.map() {
            Ok(mapping) => {
                window.mapping = Some(mapping);
                Ok(window)
            }
            Err(error) => {
                window.close()?;
                Err(UseError::Window(error))
            }
        }
    }
}

impl<P: Platform> Drop for SecretPages<'_, '_, P> {
    fn drop(&mut self) {
        self.allocator.free_secret(self.slot.pin(&self.allocator.map, self.allocator.platform));
    }
}

/// Secret pages open in a window of this CPU, sealed again when this is dropped.
#[must_use = "the pages are sealed again when this is dropped"]
pub struct SecretWindow<'s, 'a, P: Platform> {
    allocator: &'s PageAllocator<'a, P>,
    pin: Pin<'a>,
    frames: FrameRange,
    access: Access,
    mapping: Option<Mapping<'s, 'a, P>>,
    sealed: bool,
}

impl<'s, 'a, P: Platform> SecretWindow<'s, 'a, P> {
    /// The frames that are open.
    pub fn frames(&self) -> FrameRange {
        self.frames
    }

    /// The word at byte `offset`.
    ///
    /// # Errors
    /// [`UseError::OutOfRange`].
    pub fn load(&self, offset: u64) -> Result<u64, UseError> {
        Ok(self.allocator.platform.load(self.place(offset, 8)?))
    }

    /// Stores a word at byte `offset`.
    ///
    /// # Errors
    /// [`UseError::OutOfRange`] or [`UseError::ReadOnly`].
    pub fn store(&self, offset: u64, value: u64) -> Result<(), UseError> {
        self.allocator.platform.store(self.writable(offset, 8)?, value);
        Ok(())
    }

    /// Copies `bytes` from `from`, which lies outside this window, to byte `offset`.
    ///
    /// # Errors
    /// [`UseError::OutOfRange`] or [`UseError::ReadOnly`].
    pub fn copy_from(&self, from: Gva, offset: u64, bytes: u64) -> Result<(), UseError> {
        self.allocator.platform.copy(self.writable(offset, bytes)?, from, bytes);
        Ok(())
    }

    /// Whether the `bytes` at `va` and at byte `offset` are equal: compared word by word, so that
    /// no more than that leaves the window.
    ///
    /// # Errors
    /// [`UseError::OutOfRange`].
    pub fn equals(&self, va: Gva, offset: u64, bytes: u64) -> Result<bool, UseError> {
        let start = self.place(offset, bytes)?;
        let platform = self.allocator.platform;
        let mut words = (0..bytes).step_by(8);
        Ok(words
            .all(|at| platform.load(start.wrapping_add(at)) == platform.load(va.wrapping_add(at))))
    }

    /// Zeroes the whole window.
    ///
    /// # Errors
    /// [`UseError::ReadOnly`].
    pub fn zero(&self) -> Result<(), UseError> {
        let bytes = self.frames.count() * PAGE_SIZE;
        self.allocator.platform.zero(self.writable(0, bytes)?, bytes);
        Ok(())
    }

    /// Seals the pages now.
    ///
    /// # Errors
    /// [`UseError::Unsealed`], which dropping the window cannot say.
    pub fn close(mut self) -> Result<(), UseError> {
        self.seal()
    }

    fn map(&self) -> Result<Mapping<'s, 'a, P>, MermapError> {
        let protection = match self.access {
            Access::Read => Protection::READ,
            Access::Write => Protection::READ_WRITE,
        };
        let mermap = &self.allocator.mermap;
        match mermap.get(self.frames, protection) {
            Err(MermapError::NoSlot | MermapError::NoSpace) if self.frames.count() == 1 => {
                let off = InterruptsOff::new(self.allocator.platform);
                mermap.get_reserved(self.frames.start(), protection, off)
            }
            mapping => mapping,
        }
    }

    /// Takes the mapping down, then seals. An allocation that stays open is not handed out again.
    fn seal(&mut self) -> Result<(), UseError> {
        self.mapping = None;
        self.sealed = true;
        let sealed = self.allocator.seal_open(self.frames);
        if sealed.is_err() {
            self.pin.page().set_unsealed();
        }
        sealed
    }

    fn place(&self, offset: u64, bytes: u64) -> Result<Gva, UseError> {
        let size = self.frames.count() * PAGE_SIZE;
        let fits = (offset | bytes).is_multiple_of(8) && offset <= size && bytes <= size - offset;
        let mapping = self.mapping.as_ref().filter(|_| fits).ok_or(UseError::OutOfRange)?;
        Ok(mapping.va().wrapping_add(offset))
    }

    fn writable(&self, offset: u64, bytes: u64) -> Result<Gva, UseError> {
        match self.access {
            Access::Read => Err(UseError::ReadOnly),
            Access::Write => self.place(offset, bytes),
        }
    }
}

impl<P: Platform> Drop for SecretWindow<'_, '_, P> {
    fn drop(&mut self) {
        if !self.sealed {
            // The refusal is remembered with the allocation.
            let _ = self.seal();
        }
    }
}
