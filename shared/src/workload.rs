//! The guest programs and the form in which the host hands them their input.

use crate::addr::{BLOCK_FRAMES, PAGE_SIZE};
use crate::named_enum;

named_enum! {
    /// A program of the guest image.
    #[repr(u64)]
    pub enum Program {
        /// Boots, says that the allocator is ready, ends.
        Idle = "idle",
        /// Replays a recording of allocations on all CPUs: the input region holds [`ReplayOp`]s,
        /// `arg0` is their number, `arg1` the number of allocations that are alive at once.
        Replay = "replay",
        /// Stores `arg0` bytes of input in secret pages and reads them back.
        Secrets = "secrets",
        /// Random requests on every CPU: `arg0` operations each, of order `arg1` at most; `arg2` is the
        /// seed.
        Stress = "stress",
        /// Tests the allocator and the mermap from inside: `arg0` is the [`Selftest`], `arg1` the number
        /// of operations of one that counts such, 0 for its own.
        Selftest = "selftest",
        /// Measures: `arg0` is the [`Bench`], `arg1` the order, `arg2` the number of rounds.
        Bench = "bench",
        /// Touches a sealed frame on purpose: `arg0` is the [`Touch`].
        Touch = "touch",
        /// Fails on purpose: `arg0` is the [`Crash`].
        Crash = "crash",
        /// Times invalidations, for `lacuna bench flush`: `arg0` INVLPGs or, for 0, a CR3 load, then
        /// `arg1` loads, `arg2` times; says the least ticks as its progress.
        Flush = "flush",
        /// Looks for stale translations: `arg0` is the [`Scenario`], `arg1` the number of rounds of each
        /// case.
        Probe = "probe",
    }
}

named_enum! {
    /// Tests of the program `selftest`. Those named `regression` are one for each fault that was
    /// found in the Linux series.
    #[repr(u64)]
    pub enum Selftest {
        /// A one-page mapping.
        MermapBasicAlloc = "mermap::basic_alloc",
        /// What fits into a window, and the reserve.
        MermapSize = "mermap::size",
        /// All slots at once.
        MermapMultipleAllocs = "mermap::multiple_allocs",
        /// One flush when addresses are used again.
        MermapTlbFlushed = "mermap::tlb_flushed",
        /// Over half of memory, secret and then mapped.
        PageAllocAllocMapUnmap = "page_alloc::alloc_map_unmap",
        /// Numbers of the lists of CPUs.
        PageAllocPindexHelpers = "page_alloc::pindex_helpers",
        /// Numbers of freetypes.
        PageAllocFreetypeIdx = "page_alloc::freetype_idx",
        /// Random allocations and frees.
        PageAllocStressInterleaved = "page_alloc::stress_interleaved",
        /// The clearing of several pageblocks.
        Series01 = "regression::series_01",
        /// The count of pages on the last pageblock.
        Series02 = "regression::series_02",
        /// What a failed get leaves behind.
        Series03 = "regression::series_03",
        /// Teardown and the windows of other CPUs.
        Series04 = "regression::series_04",
        /// Readiness before the tables.
        Series05 = "regression::series_05",
        /// A reserve without a slot.
        Series06 = "regression::series_06",
        /// A descriptor in place of an address.
        Series07 = "regression::series_07",
        /// A flush in vain.
        Series08 = "regression::series_08",
        /// Flips that reclaim does not see.
        Series09 = "regression::series_09",
        /// Release before the flush of windows.
        Series10 = "regression::series_10",
        /// Freed pages and the direct map.
        Series11 = "regression::series_11",
        /// Secret memory that is not configured.
        Series12 = "regression::series_12",
    }
}

impl Selftest {
    /// CPUs that the test needs.
    #[must_use]
    pub const fn cpus(self) -> usize {
        match self {
            Self::Series04 | Self::Series10 => 2,
            _ => 1,
        }
    }
}

named_enum! {
    /// What the program `bench` does in each of its rounds, with [`Bench::pages`].
    #[repr(u64)]
    pub enum Bench {
        /// Allocates secret pages as zero, writes to each allocation, frees them.
        Secret = "secret",
        /// The same without writing.
        SecretUnused = "secret-unused",
        /// Allocates mapped pages as zero, converts each allocation in place, writes to it, frees it:
        /// for orders below 9.
        InPlace = "in-place",
        /// The same without writing.
        InPlaceUnused = "in-place-unused",
        /// Allocates secret pages as zero and keeps them, so that each round needs fresh ones: what
        /// the refill of the pool costs.
        SecretKept = "secret-kept",
        /// Allocates mapped pages, writes to each allocation, frees them.
        Mapped = "mapped",
        /// The same, as zero.
        MappedZero = "mapped-zero",
        /// Zeroes a secret pageblock through a window.
        ZeroWindow = "zero-window",
        /// Zeroes a mapped pageblock through the direct map.
        ZeroDirect = "zero-direct",
        /// Allocates secret pages, frees them, and has all pageblocks go back to the direct map.
        Flip = "flip",
        /// Allocates as many secret pages as [`BENCH_DRY_BLOCKS`] pageblocks have, as zero, writes to
        /// each allocation, frees them, and has all pageblocks go back to the direct map: every round
        /// finds the pool empty.
        SecretDry = "secret-dry",
        /// The same without writing.
        SecretDryUnused = "secret-dry-unused",
    }
}

impl Bench {
    /// Pages of a round, unless an allocation is larger.
    #[must_use]
    pub const fn pages(self) -> u64 {
        match self {
            Self::SecretDry | Self::SecretDryUnused => BENCH_DRY_BLOCKS * BLOCK_FRAMES,
            _ => BLOCK_FRAMES,
        }
    }
}

/// Pageblocks that the program `bench` uses up in a round that finds the pool empty.
pub const BENCH_DRY_BLOCKS: u64 = 4;

/// Words of scratch memory for one CPU of the program `bench`: a handle for each allocation.
pub const BENCH_CPU_WORDS: u64 = BENCH_DRY_BLOCKS * BLOCK_FRAMES;

named_enum! {
    /// What the program `probe` does.
    #[repr(u64)]
    pub enum Scenario {
        /// Every change of a table with every invalidation ([`crate::observe::Case`]).
        Table = "table",
        /// A CPU reads a pageblock through the direct map, caches that, and reads again when another
        /// has flipped the block and written to it through its window.
        Flip = "flip",
    }
}

impl Scenario {
    /// CPUs that it needs.
    #[must_use]
    pub const fn cpus(self) -> usize {
        match self {
            Self::Table => 1,
            Self::Flip => 2,
        }
    }
}

named_enum! {
    /// Ways to touch a sealed frame.
    #[repr(u64)]
    pub enum Touch {
        /// A load.
        Read = "read",
        /// A store.
        Write = "write",
        /// An instruction fetch.
        Fetch = "fetch",
        /// A locked read-modify-write.
        Locked = "locked",
        /// A string instruction that reads the frame.
        String = "string",
        /// A push onto a stack in the frame.
        Stack = "stack",
        /// An exception whose stack lies in the frame.
        EventDelivery = "event-delivery",
        /// A page walk through the frame.
        PageWalk = "page-walk",
    }
}

named_enum! {
    /// Ways to fail.
    #[repr(u64)]
    pub enum Crash {
        /// A Rust panic.
        Panic = "panic",
        /// A load from an address that is not mapped.
        PageFault = "page-fault",
        /// A load from a non-canonical address.
        GeneralProtection = "general-protection",
        /// UD2.
        InvalidOpcode = "invalid-opcode",
        /// Recursion until the guard page under the main stack.
        StackOverflow = "stack-overflow",
        /// An exception that cannot be delivered, nor the next.
        TripleFault = "triple-fault",
        /// An endless loop.
        Hang = "hang",
        /// HLT with interrupts off.
        Halt = "halt",
        /// A store to the kernel's own text.
        WriteText = "write-text",
        /// Gate calls with nonsense in them, then a normal end.
        BadCalls = "bad-calls",
        /// CPU 1 loops with interrupts off while CPU 0 waits for it to answer a shootdown.
        StuckCpu = "stuck-cpu",
        /// A Rust panic on the last CPU while the others wait.
        PanicElsewhere = "panic-elsewhere",
    }
}

impl Crash {
    /// How many vCPUs a guest must have to fail so.
    #[must_use]
    pub const fn vcpus(self) -> u8 {
        match self {
            Self::StuckCpu | Self::PanicElsewhere => 2,
            _ => 1,
        }
    }
}

/// Words of one replay operation.
pub const REPLAY_WORDS: usize = 2;
/// Bytes of one replay operation.
pub const REPLAY_BYTES: u64 = 8 * REPLAY_WORDS as u64;

/// One event of a recording, checked and renumbered by the host: `slot` is free before an
/// allocation and filled before a free.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReplayOp {
    /// CPU that carries it out: the one that the event ran on, reduced to the CPUs of this guest.
    pub cpu: u8,
    /// Where the guest keeps the allocation: less than the number of slots.
    pub slot: u32,
    /// How many operations on this slot come before: an operation waits until they are done, on
    /// whatever CPU.
    pub turn: u32,
    /// What to do.
    pub action: ReplayAction,
}

/// What a replay operation does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReplayAction {
    /// Free the allocation in the slot.
    Free,
    /// Allocate into the slot.
    Alloc {
        /// 2^order pages, 0 to 10.
        order: u8,
        /// 0 unmovable, 1 movable, 2 reclaimable.
        migratetype: u8,
        /// Zeroed.
        zero: bool,
        /// The caller must not block.
        noblock: bool,
        /// From unmapped memory.
        secret: bool,
        /// Secret pages that are mapped first and then converted in place; their order is below a
        /// pageblock's, and their caller may block.
        in_place: bool,
    },
}

const OP_ALLOC: u64 = 1 << 0;
const OP_ZERO: u64 = 1 << 1;
const OP_NOBLOCK: u64 = 1 << 2;
const OP_SECRET: u64 = 1 << 3;
const OP_IN_PLACE: u64 = 1 << 4;

impl ReplayOp {
    /// Flags, order, migratetype and CPU in the first word, slot and turn in the second.
    #[must_use]
    pub fn to_words(&self) -> [u64; REPLAY_WORDS] {
        let cpu = u64::from(self.cpu) << 24;
        let first = match self.action {
            ReplayAction::Free => cpu,
            ReplayAction::Alloc { order, migratetype, zero, noblock, secret, in_place } => {
                let flag = |set, bit| if set { bit } else { 0 };
                OP_ALLOC
                    | flag(zero, OP_ZERO)
                    | flag(noblock, OP_NOBLOCK)
                    | flag(secret, OP_SECRET)
                    | flag(in_place, OP_IN_PLACE)
                    | u64::from(order) << 8
                    | u64::from(migratetype) << 16
                    | cpu
            }
        };
        [first, u64::from(self.slot) | u64::from(self.turn) << 32]
    }

    /// The operation of these words.
    #[must_use]
    pub fn from_words(words: &[u64; REPLAY_WORDS]) -> Self {
        let [flags, order, migratetype, cpu, ..] = words[0].to_le_bytes();
        let has = |bit| u64::from(flags) & bit != 0;
        let action = if has(OP_ALLOC) {
            ReplayAction::Alloc {
                order,
                migratetype,
                zero: has(OP_ZERO),
                noblock: has(OP_NOBLOCK),
                secret: has(OP_SECRET),
                in_place: has(OP_IN_PLACE),
            }
        } else {
            ReplayAction::Free
        };
        let [s0, s1, s2, s3, t0, t1, t2, t3] = words[1].to_le_bytes();
        let slot = u32::from_le_bytes([s0, s1, s2, s3]);
        Self { cpu, slot, turn: u32::from_le_bytes([t0, t1, t2, t3]), action }
    }

    /// The CPU of the operation with this first word: enough for the others to skip it.
    #[must_use]
    pub const fn cpu_of(first: u64) -> u8 {
        first.to_le_bytes()[3]
    }
}

/// Bytes of scratch memory for one slot of a replay: the handle of its allocation, and the turn of
/// the operation that comes next.
pub const SLOT_BYTES: u64 = 16;

/// Allocations that one CPU of the program `stress` has at once.
pub const STRESS_SLOTS: u64 = 96;
/// Words of scratch memory for one CPU of it: its slots, and a letter box for each CPU.
pub const STRESS_CPU_WORDS: u64 = STRESS_SLOTS + crate::MAX_CPUS as u64;

/// Bytes of scratch memory that the program `selftest` needs for a zone of `frames` frames.
#[must_use]
pub const fn selftest_scratch(frames: u64) -> u64 {
    8 * frames
}

/// Bytes of scratch memory for one page of a stored secret: its handle and the hash of its bytes.
pub const SECRET_PAGE_BYTES: u64 = 16;

/// Scratch memory that the `secrets` program needs for `bytes` of input.
#[must_use]
pub const fn secrets_scratch(bytes: u64) -> u64 {
    bytes.div_ceil(PAGE_SIZE) * SECRET_PAGE_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn an_operation_survives_its_encoding(
            cpu: u8, slot: u32, turn: u32, alloc: bool, order in 0u8..=10, migratetype in 0u8..3,
            zero: bool, noblock: bool, secret: bool, in_place: bool,
        ) {
            let action = if alloc {
                ReplayAction::Alloc { order, migratetype, zero, noblock, secret, in_place }
            } else {
                ReplayAction::Free
            };
            let op = ReplayOp { cpu, slot, turn, action };
            prop_assert_eq!(ReplayOp::from_words(&op.to_words()), op);
            prop_assert_eq!(ReplayOp::cpu_of(op.to_words()[0]), cpu);
        }
    }
}
