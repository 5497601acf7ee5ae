//! Tests of the allocator, the mermap and the programs on the test machine.

#[cfg(feature = "faults")]
mod faults;
mod flip;
mod mermap;
mod model;
mod page_alloc;
mod programs;
mod refusals;
mod ring;
mod secret;
mod shootdown;
mod zeroing;
