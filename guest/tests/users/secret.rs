//! A user of secret memory.

use lacuna_guest::alloc::{AllocError, PageAllocator, Request};
use lacuna_guest::platform::Platform;
use lacuna_guest::secret::{Access, SecretPages};

/// A secret page with a word in it.
pub fn keep<'r, 'a, P: Platform>(
    allocator: &'r PageAllocator<'a, P>,
    request: Request,
) -> Result<SecretPages<'r, 'a, P>, AllocError> {
    let pages = allocator.alloc_secret(request)?;
    pages.open(0, 1, Access::Write)?.store(0, 1)?;
    Ok(pages)
}
