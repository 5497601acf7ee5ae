//! The system calls of the machine that no crate wraps.
#![allow(unsafe_code)]

use lacuna_guest::meta::{BlockMeta, PageMeta};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use vm_memory::{VolatileMemory, VolatileSlice};

/// `MADV_GUARD_INSTALL`, Linux 6.13; for file-backed mappings 6.15.
const MADV_GUARD_INSTALL: i32 = 102;
/// `MADV_GUARD_REMOVE`.
const MADV_GUARD_REMOVE: i32 = 103;

/// A part of this process's address space that backs guest memory and that this process itself
/// never reads or writes through: only KVM does, and an access of KVM to a closed part fails
/// harmlessly.
#[derive(Debug)]
pub struct HostMapping {
    region: vm_memory::MmapRegion,
}

/// What may be done with closed memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Closed or opened with `madvise(2)` guards.
    Guard,
    /// Closed or opened with `mprotect(2)`.
    Protection,
}

impl HostMapping {
    /// Maps `len` bytes of `file` from its start, shared, without reserving memory.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new(file: &File, len: usize) -> io::Result<Self> {
        let offset = vm_memory::FileOffset::new(file.try_clone()?, 0);
        let region = vm_memory::MmapRegion::from_file(offset, len).map_err(io::Error::other)?;
        Ok(Self { region })
    }

    /// Address of the mapping in this process, as KVM takes it.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.region.as_ptr() as u64
    }

    /// Bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.region.size()
    }

    /// Whether the mapping has no bytes; one that was made always has.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Closes or opens `len` bytes from `offset`, both multiples of the page size.
    ///
    /// # Errors
    /// What the kernel says; `InvalidInput` for a part outside the mapping.
    pub fn set(&self, how: Access, offset: usize, len: usize, closed: bool) -> io::Result<()> {
        if offset.checked_add(len).is_none_or(|end| end > self.region.size()) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the part lies in the mapping that `self` owns; the offset was checked.
        let start = unsafe { self.region.as_ptr().add(offset) }.cast();
        // SAFETY: the part lies in the mapping that `self` owns. No reference into it exists and
        // this process never accesses it, so taking access away breaks nothing; the contents stay
        // in the file.
        let result = unsafe {
            match (how, closed) {
                (Access::Guard, true) => libc::madvise(start, len, MADV_GUARD_INSTALL),
                (Access::Guard, false) => libc::madvise(start, len, MADV_GUARD_REMOVE),
                (Access::Protection, true) => libc::mprotect(start, len, libc::PROT_NONE),
                (Access::Protection, false) => {
                    libc::mprotect(start, len, libc::PROT_READ | libc::PROT_WRITE)
                }
            }
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// A part of this process's address space that shows guest memory: to the VMM, and to simulated
/// CPUs. Guests and others access it at any time, so that no reference into it exists but to atomics.
#[derive(Debug)]
pub struct Words {
    region: vm_memory::MmapRegion,
}

impl Words {
    /// Maps `len` bytes of `file` from its start, shared, without reserving memory.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new(file: &File, len: usize) -> io::Result<Self> {
        Ok(Self { region: HostMapping::new(file, len)?.region })
    }

    /// `count` words from byte `offset`; `None` if they are not aligned or do not all lie here.
    #[inline]
    #[must_use]
    pub fn words(&self, offset: u64, count: usize) -> Option<&[AtomicU64]> {
        let start = self.place(offset, count.checked_mul(8)?)?;
        if !offset.is_multiple_of(8) {
            return None;
        }
        // SAFETY: the words lie in the mapping that `self` owns, which starts at a page; whatever
        // bits they hold are an `AtomicU64`. Nobody holds a reference of another kind into it.
        Some(unsafe { std::slice::from_raw_parts(start.cast::<AtomicU64>(), count) })
    }

    /// Address of the mapping in this process, as KVM takes it.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.region.as_ptr() as u64
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> VolatileSlice<'_> {
        self.region.as_volatile_slice()
    }

    /// Zeroes `len` bytes from `offset`; false if they do not all lie here.
    #[must_use]
    pub fn zero(&self, offset: u64, len: usize) -> bool {
        let words = len.is_multiple_of(8).then(|| self.words(offset, len / 8)).flatten();
        // Other CPUs may use the same words meanwhile; what is then left is the guest's business.
        words.map(|words| words.iter().for_each(|word| word.store(0, Relaxed))).is_some()
    }

    /// Where `len` bytes from `offset` lie.
    #[inline]
    fn place(&self, offset: u64, len: usize) -> Option<*mut u8> {
        let offset = usize::try_from(offset).ok()?;
        if offset.checked_add(len)? > self.region.size() {
            return None;
        }
        // SAFETY: the offset lies in the mapping, or at its end.
        Some(unsafe { self.region.as_ptr().add(offset) })
    }
}

/// A type of which all bits zero are a value.
///
/// # Safety
/// They must be.
pub unsafe trait Zeroed {}

// SAFETY: a number.
unsafe impl Zeroed for AtomicU64 {}
// SAFETY: a `repr(C)` structure of atomic numbers, in which zero is said to be valid.
unsafe impl Zeroed for PageMeta {}
// SAFETY: as `PageMeta`.
unsafe impl Zeroed for BlockMeta {}

/// `count` values that are all zero and take up no memory until they are written.
#[must_use]
pub fn zeroed<T: Zeroed>(count: usize) -> Box<[T]> {
    // SAFETY: the trait's promise.
    unsafe { Box::new_zeroed_slice(count).assume_init() }
}

/// An anonymous file of `len` bytes that take up no memory until they are written.
///
/// # Errors
/// What the kernel says.
pub fn memory_file(name: &std::ffi::CStr, len: u64) -> io::Result<File> {
    // SAFETY: the name is a C string; the flags are valid.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was made just now and belongs to nobody else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len)?;
    Ok(file)
}

/// The next part of `file` from `from` on that holds data: start and end. `None` if only holes
/// follow.
///
/// # Errors
/// What the kernel says.
pub fn next_data(file: &File, from: u64) -> io::Result<Option<(u64, u64)>> {
    let seek = |offset: u64, whence| {
        let offset = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: the descriptor is open; seeking touches no memory. Nobody relies on the file's
        // position: all other accesses carry an offset.
        let at = unsafe { libc::lseek(file.as_raw_fd(), offset, whence) };
        u64::try_from(at).map_err(|_| io::Error::last_os_error())
    };
    match seek(from, libc::SEEK_DATA) {
        Ok(start) => Ok(Some((start, seek(start, libc::SEEK_HOLE)?))),
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The time-stamp counter (SDM volume 3, "Time-Stamp Counter"). Earlier instructions need not be done.
#[inline]
#[must_use]
pub fn time_stamp() -> u64 {
    // SAFETY: reads a register that every x86-64 processor has and that Linux shows to processes.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// Where the code of this program that calls this lies: how far from a fixed place in it, so that the
/// answer does not depend on where the program was loaded.
#[inline(always)]
#[must_use]
pub fn here_in_code() -> u32 {
    let address: u64;
    // SAFETY: computes an address.
    unsafe {
        std::arch::asm!("lea {}, [rip]", out(reg) address, options(nostack, preserves_flags, nomem));
    }
    // A program's code is far smaller than 2 GiB.
    address.wrapping_sub(fixed_place()) as u32
}

/// Address of the fixed place of [`here_in_code`] in this process.
#[inline]
#[must_use]
pub fn fixed_place() -> u64 {
    CODE as *const () as u64
}

/// The fixed place.
const CODE: fn(&std::ffi::CStr, u64) -> io::Result<File> = memory_file;

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn data_is_found_between_holes() {
        let file = memory_file(c"test", 64 << 10).unwrap();
        assert_eq!(next_data(&file, 0).unwrap(), None);
        file.write_all_at(b"x", 0x3000).unwrap();
        assert_eq!(next_data(&file, 0).unwrap(), Some((0x3000, 0x4000)));
        assert_eq!(next_data(&file, 0x4000).unwrap(), None);
    }

    #[test]
    fn words_are_those_of_the_file_and_end_where_it_ends() {
        let file = memory_file(c"test", 8192).unwrap();
        let words = Words::new(&file, 8192).unwrap();
        words.words(4096, 2).unwrap()[1].store(7, Relaxed);
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, 4104).unwrap();
        assert_eq!(u64::from_le_bytes(bytes), 7);
        assert!(words.zero(4096, 4096));
        assert_eq!(words.words(4104, 1).unwrap()[0].load(Relaxed), 0);
        assert!(words.words(8192, 1).is_none() && words.words(8184, 1).is_some());
        assert!(words.words(4, 1).is_none() && words.words(u64::MAX - 7, 1).is_none());
        assert!(words.words(0, usize::MAX).is_none());
        assert!(!words.zero(4096, 4097));
    }

    #[test]
    fn zeroed_metadata_of_a_large_zone_takes_no_memory() {
        let resident = || {
            let text = std::fs::read_to_string("/proc/self/statm").unwrap();
            text.split(' ').nth(1).unwrap().parse::<usize>().unwrap()
        };
        let before = resident();
        let pages: Box<[PageMeta]> = zeroed(64 << 18);
        assert_eq!(format!("{:?}", pages[5]), format!("{:?}", PageMeta::default()));
        // In pages; other tests allocate and free beside this one.
        assert!(resident().saturating_sub(before) < 64 << 8);
    }

    #[test]
    fn a_part_outside_the_mapping_is_refused() {
        let file = memory_file(c"test", 8192).unwrap();
        let mapping = HostMapping::new(&file, 8192).unwrap();
        for (offset, len) in [(8192, 4096), (0, 12288), (usize::MAX, 4096)] {
            let error = mapping.set(Access::Protection, offset, len, true).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        }
        mapping.set(Access::Protection, 4096, 4096, true).unwrap();
        mapping.set(Access::Protection, 4096, 4096, false).unwrap();
    }
}
