//! What the Lacuna VMM and its guests must agree on: address types, the guest's layout, boot
//! information, gate calls, event records, page-table entries and the table walker.
//!
//! Both sides build this crate from the same source. It has no unsafe code: everything that
//! crosses the boundary is a sequence of 64-bit words, encoded and decoded here, so that neither
//! side ever holds a reference to a structure that the other may change.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

pub mod addr;
pub mod boot;
pub mod counter;
pub mod direct;
pub mod event;
pub mod fault;
pub mod gate;
pub mod layout;
pub mod named;
pub mod observe;
pub mod paging;
pub mod walk;
pub mod words;
pub mod workload;

/// Version of everything in this crate. The VMM refuses an image built for another one.
pub const ABI_VERSION: u64 = 3;

/// Most virtual CPUs that one guest may have: per-CPU windows, rings and stacks are laid out for
/// this many.
pub const MAX_CPUS: usize = 8;
