//! Lacuna's guest: the page allocator with its secret pages, the mermap, and the programs.
//!
//! Everything but the bare-metal half (feature `image`) is generic over
//! [`platform::Platform`] and free of unsafe code, so that the same allocator runs in the guest
//! image, in ordinary unit tests and on simulated machines.
//!
//! Without the feature `unmapped` there is no secret memory: what would hand it out, its owners and
//! its windows do not exist, and who uses them does not build. No request ever becomes one for
//! mapped pages in its place.
#![no_std]
#![cfg_attr(
    not(feature = "unmapped"),
    allow(dead_code, unused_imports, reason = "what serves secret memory has no user")
)]

#[cfg(any(test, loom, feature = "testing"))]
extern crate std;

pub mod alloc;
mod balance;
mod compact;
pub mod contents;
#[cfg(feature = "unmapped")]
pub mod convert;
#[cfg(not(feature = "unmapped"))]
mod convert;
pub mod counters;
pub mod error;
mod flip;
pub mod freetype;
pub mod handle;
mod list;
mod lock;
pub mod mapped;
#[cfg(feature = "unmapped")]
pub mod mermap;
#[cfg(not(feature = "unmapped"))]
mod mermap;
pub mod meta;
mod parked;
mod pcp;
pub mod platform;
#[cfg(feature = "unmapped")]
pub mod programs;
pub mod random;
pub mod ring;
#[cfg(feature = "unmapped")]
pub mod secret;
#[cfg(feature = "unmapped")]
mod selftest;
pub mod shootdown;
mod space;
mod sync;
mod tables;
mod zeroing;
mod zone;

#[cfg(all(test, loom))]
mod models;
#[cfg(all(any(test, feature = "testing"), not(loom)))]
pub mod testing;
#[cfg(all(test, not(loom)))]
mod tests;
