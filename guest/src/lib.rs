//! Lacuna's guest: the page allocator with its secret pages, the mermap, and the programs.
//!
//! Everything but the bare-metal half (feature `image`) is generic over
//! [`platform::Platform`] and free of unsafe code, so that the same allocator runs in the guest
//! image, in ordinary unit tests and on simulated machines.
#![no_std]

#[cfg(any(test, loom, feature = "testing"))]
extern crate std;

pub mod alloc;
mod balance;
mod compact;
pub mod counters;
mod flip;
pub mod freetype;
pub mod handle;
mod list;
mod lock;
pub mod mapped;
pub mod mermap;
pub mod meta;
mod pcp;
pub mod platform;
mod poison;
pub mod programs;
pub mod ring;
pub mod secret;
mod space;
mod sync;
mod zeroing;
mod zone;

#[cfg(all(test, loom))]
mod models;
#[cfg(all(any(test, feature = "testing"), not(loom)))]
pub mod testing;
#[cfg(all(test, not(loom)))]
mod tests;
