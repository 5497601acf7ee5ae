//! Lacuna's guest: the page allocator with its secret pages, the mermap, and the programs.
//!
//! Everything but the bare-metal half (feature `image`) is generic over
//! [`platform::Platform`] and free of unsafe code, so that the same allocator runs in the guest
//! image, in ordinary unit tests and on simulated machines.
#![no_std]

#[cfg(test)]
extern crate std;

pub mod alloc;
pub mod convert;
mod counters;
mod flip;
pub mod freetype;
pub mod handle;
mod lock;
pub mod mapped;
pub mod mermap;
pub mod meta;
pub mod platform;
pub mod programs;
pub mod ring;
pub mod secret;
mod space;
mod tables;
mod zeroing;
mod zone;

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
