//! Any bytes as a recording, or as the tape of one whose checksums are right.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = lacuna::recording::judge_bytes(bytes);
});
