//! A user of mapped memory.

use lacuna_guest::alloc::{AllocError, PageAllocator, Request};
use lacuna_guest::mapped::MappedPages;
use lacuna_guest::platform::Platform;

/// A mapped page.
pub fn keep<'r, 'a, P: Platform>(
    allocator: &'r PageAllocator<'a, P>,
    request: Request,
) -> Result<MappedPages<'r, 'a, P>, AllocError> {
    allocator.alloc_mapped(request)
}
