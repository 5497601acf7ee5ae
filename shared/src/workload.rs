//! The guest programs and the form in which the host hands them their input.

use crate::addr::PAGE_SIZE;
use crate::named_enum;

named_enum! {
    /// A program of the guest image.
    #[repr(u64)]
    pub enum Program {
        /// Boots, says that the allocator is ready, ends.
        Idle = "idle",
        /// Replays a recording of allocations: the input region holds [`ReplayOp`]s, `arg0` is
        /// their number, `arg1` the number of allocations that are alive at once.
        Replay = "replay",
        /// Stores `arg0` bytes of input in secret pages and reads them back.
        Secrets = "secrets",
        /// Touches a sealed frame on purpose: `arg0` is the [`Touch`].
        Touch = "touch",
        /// Fails on purpose: `arg0` is the [`Crash`].
        Crash = "crash",
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
    /// CPU that the event ran on, already reduced to the CPUs of this guest.
    pub cpu: u8,
    /// Where the guest keeps the allocation: less than the number of slots.
    pub slot: u32,
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
    /// Flags, order, migratetype and CPU in the first word, the slot in the second.
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
        [first, u64::from(self.slot)]
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
        let [s0, s1, s2, s3, ..] = words[1].to_le_bytes();
        Self { cpu, slot: u32::from_le_bytes([s0, s1, s2, s3]), action }
    }
}

/// Bytes of scratch memory for one slot of a replay.
pub const SLOT_BYTES: u64 = 8;

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
            cpu: u8, slot: u32, alloc: bool, order in 0u8..=10, migratetype in 0u8..3,
            zero: bool, noblock: bool, secret: bool, in_place: bool,
        ) {
            let action = if alloc {
                ReplayAction::Alloc { order, migratetype, zero, noblock, secret, in_place }
            } else {
                ReplayAction::Free
            };
            let op = ReplayOp { cpu, slot, action };
            prop_assert_eq!(ReplayOp::from_words(&op.to_words()), op);
        }
    }
}
