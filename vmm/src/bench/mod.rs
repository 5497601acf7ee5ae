//! Measurements, each as a table and as JSON. Numbers are ratios within one run: absolute times
//! belong to the machine that they were taken on.
#![forbid(unsafe_code)]

mod boot;
mod flush;

pub use boot::{BenchError, Boot, Size, boot};
pub use flush::{Flush, Run, flush};

/// `value` as a multiple of `base`, to two places.
fn ratio(value: u64, base: u64) -> f64 {
    let float = |n: u64| f64::from(u32::try_from(n).unwrap_or(u32::MAX));
    (float(value) / float(base.max(1)) * 100.0).round() / 100.0
}
