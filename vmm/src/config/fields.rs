//! The fields of a configuration and what each takes: for messages, and for the tests that keep
//! `configs/reference.toml` complete.

use lacuna_abi::MAX_CPUS;
use lacuna_abi::layout::{MAX_MEMORY_MIB, MIN_MEMORY_MIB};
use lacuna_abi::workload::Program;
use std::ops::RangeInclusive;

/// A field.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Field {
    /// Its section.
    pub section: &'static str,
    /// Its name.
    pub name: &'static str,
    /// What it takes, after "give".
    pub takes: &'static str,
    /// The programs that it belongs to; empty if all.
    pub programs: &'static [Program],
}

pub(crate) const fn field(section: &'static str, name: &'static str, takes: &'static str) -> Field {
    Field { section, name, takes, programs: &[] }
}

const fn of(programs: &'static [Program], name: &'static str, takes: &'static str) -> Field {
    Field { section: "workload", name, takes, programs }
}

pub(super) const MEMORY_MIB: RangeInclusive<u64> = MIN_MEMORY_MIB..=MAX_MEMORY_MIB;
/// Largest memory that is filled: each byte of it is then really there.
pub(super) const MAX_FILL_MIB: u64 = 1024;
pub(super) const VCPUS: RangeInclusive<u64> = 1..=MAX_CPUS as u64;
pub(super) const IN_PLACE: RangeInclusive<u64> = 0..=100;
pub(super) const PROBES: RangeInclusive<u64> = 0..=256;
pub(super) const TIMEOUT_S: RangeInclusive<u64> = 1..=86_400;
pub(super) const SHOOTDOWN_S: RangeInclusive<u64> = 1..=86_400;
pub(super) const GUEST_LOG_KIB: RangeInclusive<u64> = 1..=1 << 20;
pub(super) const EVENTS_MIB: RangeInclusive<u64> = 1..=16 << 10;

/// All fields, in the order of `configs/reference.toml`.
pub const FIELDS: &[Field] = &[
    field("guest", "memory_mib", "an even number of MiB from 16 to 65536"),
    field("guest", "vcpus", "a number from 1 to 8"),
    field("guest", "shootdown", "\"x2apic\" or \"gate\""),
    field("guest", "image", "the path of an ELF image that follows docs/guests.md"),
    field("guest", "fill", "a byte, 0 to 255, with at most 1024 MiB of memory"),
    field("guest", "prezero", "true or false"),
    field("guest", "seed", "a number that is not negative"),
    field("allocator", "min_free_kib", "a number of KiB that is at most half of the memory"),
    field("allocator", "pool_low_kib", "a number of KiB that is not above pool_high_kib"),
    field("allocator", "pool_high_kib", "a number of KiB that is at most half of the memory"),
    field("allocator", "on_free", "\"leave\", \"zero\" or \"poison\""),
    field("allocator", "scrub", "true or false"),
    field("allocator", "check_zero", "true or false"),
    field(
        "workload",
        "program",
        "\"replay\", \"secrets\", \"idle\", \"stress\", \"selftest\", \"bench\", \"touch\", \"crash\" or \"probe\"",
    ),
    of(
        &[Program::Replay, Program::Secrets],
        "input",
        "the path of a file, relative to this one, or use --input",
    ),
    of(&[Program::Replay], "events", "a number of events, at least 1"),
    of(
        &[Program::Replay],
        "secret",
        "\"user\", \"all\", \"none\" or a list of flag names such as [\"GFP_HIGHUSER\"]",
    ),
    of(&[Program::Replay], "in_place", "a percentage from 0 to 100"),
    of(
        &[Program::Stress, Program::Selftest],
        "operations",
        "a number of operations on each CPU, at least 1",
    ),
    of(&[Program::Stress], "max_order", "an order from 0 to 10"),
    of(
        &[Program::Selftest],
        "test",
        "the name of a test in the guest: \"mermap::basic_alloc\", \"mermap::size\", \
         \"mermap::multiple_allocs\", \"mermap::tlb_flushed\", \"page_alloc::alloc_map_unmap\", \
         \"page_alloc::pindex_helpers\", \"page_alloc::freetype_idx\", \
         \"page_alloc::stress_interleaved\", or \"regression::series_01\" to \
         \"regression::series_12\"",
    ),
    of(
        &[Program::Bench],
        "bench",
        "\"secret\", \"secret-unused\", \"in-place\", \"in-place-unused\", \
         \"secret-kept\", \"mapped\", \"mapped-zero\", \"zero-window\", \"zero-direct\", \"flip\", \
         \"secret-dry\" or \"secret-dry-unused\"",
    ),
    of(&[Program::Bench], "order", "an order from 0 to 10"),
    of(&[Program::Bench, Program::Probe], "rounds", "a number of rounds, at least 1"),
    of(
        &[Program::Touch],
        "touch",
        "\"read\", \"write\", \"fetch\", \"locked\", \"string\", \"stack\", \"event-delivery\" or \
         \"page-walk\"",
    ),
    of(
        &[Program::Crash],
        "crash",
        "\"panic\", \"page-fault\", \"general-protection\", \"invalid-opcode\", \
         \"stack-overflow\", \"triple-fault\", \"hang\", \"halt\", \"write-text\", \"bad-calls\", \
         or with 2 vCPUs \"stuck-cpu\" or \"panic-elsewhere\"",
    ),
    of(&[Program::Probe], "scenario", "\"table\", or with 2 vCPUs \"flip\""),
    field("second_stage", "seal", "\"auto\", \"memslot\", \"guard\" or \"off\""),
    field("second_stage", "guard", "\"auto\", \"madvise\" or \"mprotect\""),
    field("second_stage", "vma_budget", "a number from 1 to 4294967295"),
    field("audit", "quiesce_every", "a number of events, at least 1"),
    field("audit", "probes", "a number from 0 to 256"),
    field("audit", "profile", "\"auto\", \"amd\", \"intel\" or \"intel-invlpg-erratum\""),
    field("audit", "require", "a list of rules"),
    field("audit", "expect", "a list of rules and \"sealed-access\""),
    field("limits", "timeout_s", "a number of seconds from 1 to 86400"),
    field("limits", "shootdown_s", "a number of seconds from 1 to 86400"),
    field("limits", "guest_log_kib", "a number of KiB from 1 to 1048576"),
    field("limits", "events_mib", "a number of MiB from 1 to 16384"),
];

/// The fields that a kind of file can have.
#[derive(Debug)]
pub(crate) struct Schema {
    pub(crate) fields: &'static [Field],
    /// The sections, as a list for a message.
    pub(crate) sections: &'static str,
}

impl Schema {
    /// The field of this name.
    pub(crate) fn find(&self, section: &str, name: &str) -> Option<&'static Field> {
        self.fields.iter().find(|field| field.section == section && field.name == name)
    }

    /// Names of the fields of a section, as a list for a message; empty for a section that does not
    /// exist.
    pub(crate) fn names(&self, section: &str) -> Vec<&'static str> {
        self.fields.iter().filter(|field| field.section == section).map(|f| f.name).collect()
    }
}

/// Configurations.
pub(crate) static CONFIG: Schema = Schema {
    fields: FIELDS,
    sections: "[guest], [allocator], [workload], [second_stage], [audit], [limits]",
};

/// The field of a configuration of this name.
pub(super) fn find(section: &str, name: &str) -> Option<&'static Field> {
    CONFIG.find(section, name)
}
