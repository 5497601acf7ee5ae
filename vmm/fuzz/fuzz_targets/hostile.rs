//! Any bytes as a guest's doings: the VMM does not fail, keeps what is bounded, and calls nobody clean
//! who left something forbidden.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Err(why) = lacuna::hostile::torment(bytes) {
        panic!("{why}");
    }
});
