//! `bench boot`: time until the guest's allocator is ready, and memory, for guests of several
//! sizes.

use super::ratio;
use crate::config::{Config, ConfigError, Overrides};
use crate::doctor::HostError;
use crate::run::{Host, Machine, OpenError, Plan, PlanError};
use kvm_ioctls::Kvm;
use serde::Serialize;
use std::fmt::Write;
use std::ops::ControlFlow;
use std::path::Path;

/// Sizes of the guests, in MiB.
const SIZES: [u64; 3] = [64, 1024, 8192];
/// Guests of each size; the median counts.
const ROUNDS: usize = 7;

/// Why nothing could be measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The configuration of the bench itself.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The plan.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The host has no usable KVM.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The machine.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A guest did not come up.
    #[error("a guest of {0} MiB did not say that its allocator is ready: {1}")]
    NotReady(u64, String),
    /// A guest did not say what it timed.
    #[error("a guest did not say how long invalidations took: {0}")]
    NoTimes(String),
    /// A guest that was to be measured did not do what it was there for.
    #[error("{0} could not be measured: {1}")]
    NotMeasured(String, String),
    /// Memory or processor time could not be looked up.
    #[error("cannot look up memory or processor time: {0}")]
    Memory(#[from] std::io::Error),
}

/// Results for one size.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Size {
    /// Memory of the guest's allocator in MiB.
    pub memory_mib: u64,
    /// Median microseconds from the first instruction to "allocator ready".
    pub ready_us: u64,
    /// `ready_us`, as a multiple of that of the smallest guest.
    pub ready_ratio: f64,
    /// Median microseconds that the VMM needs to set the guest up.
    pub setup_us: u64,
    /// KiB of guest memory that were ever written, by guest or VMM.
    pub guest_touched_kib: u64,
    /// Resident KiB of the VMM's own memory, guest memory not counted.
    pub vmm_resident_kib: u64,
}

/// Results of the bench.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Boot {
    /// Guests of each size.
    pub rounds: usize,
    /// Results by size.
    pub sizes: Vec<Size>,
}

/// Boots guests of several sizes, one of each if it is to be `quick`.
///
/// # Errors
/// [`BenchError`].
pub fn boot(
    mut kvm: impl FnMut() -> Result<Kvm, BenchError>,
    quick: bool,
) -> Result<Boot, BenchError> {
    let count = if quick { 1 } else { ROUNDS };
    let mut sizes: Vec<Size> = Vec::new();
    for memory_mib in SIZES {
        let mut rounds = Vec::new();
        for _ in 0..count {
            rounds.push(one(kvm()?, memory_mib)?);
        }
        let median = |of: fn(&Size) -> u64| {
            let mut values: Vec<_> = rounds.iter().map(of).collect();
            values.sort_unstable();
            values[values.len() / 2]
        };
        let ready_us = median(|size| size.ready_us);
        let first = sizes.first().map_or(ready_us, |size| size.ready_us);
        sizes.push(Size {
            memory_mib,
            ready_us,
            ready_ratio: ratio(ready_us, first),
            setup_us: median(|size| size.setup_us),
            guest_touched_kib: median(|size| size.guest_touched_kib),
            vmm_resident_kib: median(|size| size.vmm_resident_kib),
        });
    }
    Ok(Boot { rounds: count, sizes })
}

fn one(kvm: Kvm, memory_mib: u64) -> Result<Size, BenchError> {
    let text = format!("[guest]\nmemory_mib = {memory_mib}\n[workload]\nprogram = \"idle\"\n");
    let config = Config::from_text(Path::new("bench-boot"), &text, &Overrides::default())?;
    let (plan, _) = Plan::new(&config)?;
    let outcome = Machine::open(Host::Kvm(kvm), plan, Vec::new())?
        .start()?
        .wait(|_| ControlFlow::Continue(()));
    outcome.with_gate(|gate| {
        let Some(ready) = gate.ready_at() else {
            return Err(BenchError::NotReady(memory_mib, format!("{:?}", outcome.end)));
        };
        let micros =
            |time: std::time::Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        Ok(Size {
            memory_mib,
            ready_us: micros(ready.saturating_duration_since(outcome.started)),
            ready_ratio: 1.0,
            setup_us: micros(outcome.opening),
            guest_touched_kib: gate.memory().touched_bytes()? >> 10,
            vmm_resident_kib: own_resident_kib()?,
        })
    })
}

/// Resident memory of this process that backs no guest, in KiB: what is anonymous or of files, not
/// shared memory.
pub(super) fn own_resident_kib() -> std::io::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().trim_end_matches(" kB").trim().parse::<u64>().ok()
    };
    let sum = field("RssAnon:").zip(field("RssFile:")).map(|(anon, file)| anon + file);
    sum.ok_or_else(|| std::io::Error::other("/proc/self/status has no RssAnon and RssFile"))
}

impl Boot {
    /// The results as a table.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut text = format!(
            "Boot to \"allocator ready\", median of {} guests of each size\n\n\
             {:>10}  {:>10}  {:>7}  {:>10}  {:>18}  {:>17}\n",
            self.rounds,
            "guest MiB",
            "ready µs",
            "ratio",
            "set up µs",
            "guest touched KiB",
            "VMM resident KiB"
        );
        for size in &self.sizes {
            // Writing to a string does not fail.
            let _ = writeln!(
                text,
                "{:>10}  {:>10}  {:>7.2}  {:>10}  {:>18}  {:>17}",
                size.memory_mib,
                size.ready_us,
                size.ready_ratio,
                size.setup_us,
                size.guest_touched_kib,
                size.vmm_resident_kib
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_of_the_smallest_guest() {
        assert!((ratio(150, 100) - 1.5).abs() < 1e-9);
        assert!((ratio(1, 0) - 1.0).abs() < 1e-9);
    }

    #[test]
    fn this_process_has_resident_memory() {
        assert!(own_resident_kib().unwrap() > 100);
    }

    #[test]
    fn a_table_names_every_size() {
        let size = Size {
            memory_mib: 64,
            ready_us: 1,
            ready_ratio: 1.0,
            setup_us: 2,
            guest_touched_kib: 3,
            vmm_resident_kib: 4,
        };
        let text = Boot { rounds: 1, sizes: vec![size] }.to_text();
        assert!(text.contains("        64  ") && text.contains("VMM resident"), "{text}");
    }
}
