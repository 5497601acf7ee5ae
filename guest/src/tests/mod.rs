//! Tests of the allocator, the mermap and the programs on the test machine.

#[macro_use]
mod assert_owned;
mod atomic;
mod convert;
mod convert_failures;
mod convert_model;
mod corpus;
#[cfg(feature = "faults")]
mod faults;
mod flip;
mod lists;
mod mermap;
mod mermap_errors;
mod model;
mod moving;
mod page_alloc;
mod programs;
mod refusals;
mod refused_writes;
mod ring;
mod secret;
mod selftests;
mod shootdown;
mod window_flush;
mod zeroing;
