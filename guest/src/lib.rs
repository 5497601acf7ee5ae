//! Lacuna's guest: the page allocator with its secret pages, the mermap, and the programs.
//!
//! Everything but the bare-metal half (feature `image`) is generic over
//! [`platform::Platform`] and free of unsafe code, so that the same allocator runs in the guest
//! image, in ordinary unit tests and on simulated machines.
#![no_std]

#[cfg(test)]
extern crate std;

pub mod platform;
