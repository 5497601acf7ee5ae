//! Sets of CPUs.

use lacuna_abi::MAX_CPUS;

/// A set of CPUs, one bit each.
pub(in crate::audit) type CpuSet = u8;

const _: () = assert!(MAX_CPUS <= 8, "a CpuSet has a bit for each CPU");

/// All CPUs that can be.
pub(in crate::audit) const EVERY: CpuSet = CpuSet::MAX;

/// The set of one CPU; empty for a number that no CPU has.
pub(in crate::audit) fn only(cpu: u8) -> CpuSet {
    1_u8.checked_shl(u32::from(cpu)).unwrap_or(0)
}

/// The CPUs of a set, in order.
pub(in crate::audit) fn members(set: CpuSet) -> impl Iterator<Item = u8> {
    let mut left = set;
    std::iter::from_fn(move || {
        let cpu = u8::try_from(left.trailing_zeros()).ok().filter(|cpu| *cpu < 8)?;
        left &= left - 1;
        Some(cpu)
    })
}

/// The CPUs of a set, for messages.
pub(in crate::audit) fn cpu_list(cpus: CpuSet) -> String {
    let names: Vec<_> = members(cpus).map(|cpu| cpu.to_string()).collect();
    format!("{} {}", if names.len() == 1 { "CPU" } else { "CPUs" }, names.join(", "))
}
