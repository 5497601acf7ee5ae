//! Measurements, each as a table and as JSON. Numbers are ratios within one run: absolute times
//! belong to the machine that they were taken on.
#![forbid(unsafe_code)]

mod alloc;
mod audit;
mod boot;
mod flip;
mod flush;
mod guest;
mod line;
mod mediate;
mod sample;
mod speed;
mod table;
mod zero;

pub use alloc::{Alloc, Refill, Replay, alloc};
pub use audit::{AuditCost, Check, Events, Footprint, Opens, audit};
pub use boot::{BenchError, Boot, Size, boot};
pub use flip::{Batch, Flip, flip};
pub use flush::{Flush, Run, flush};
pub use guest::{Lab, Policy};
pub use line::{Line, Ratios};
pub use mediate::{Job, Mediate, Way, mediate};
pub use sample::Counts;
pub use speed::Speed;
pub use table::{Beside, Goal};
use table::{columns, times};
pub use zero::{Zero, zero};

/// `value` as a multiple of `base`, to two places.
fn ratio(value: u64, base: u64) -> f64 {
    let float = |n: u64| f64::from(u32::try_from(n).unwrap_or(u32::MAX));
    (float(value) / float(base.max(1)) * 100.0).round() / 100.0
}
