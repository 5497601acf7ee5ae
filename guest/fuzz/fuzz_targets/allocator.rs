//! Random histories of the allocator's public operations on the test machine, compared with a
//! plain model after every step.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| lacuna_guest::testing::run_bytes(bytes));
