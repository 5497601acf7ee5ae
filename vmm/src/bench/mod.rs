//! Measurements, each as a table and as JSON. Numbers are ratios within one run: absolute times
//! belong to the machine that they were taken on.
#![forbid(unsafe_code)]

mod boot;

pub use boot::{BenchError, Boot, Size, boot};
