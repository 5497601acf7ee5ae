//! Tests of the allocator, the mermap and the programs on the test machine.

mod convert;
mod convert_failures;
mod convert_model;
#[cfg(feature = "faults")]
mod faults;
mod flip;
mod mermap;
mod model;
mod page_alloc;
mod programs;
mod refusals;
mod secret;
mod zeroing;
