//! Gate calls: the guest's requests to the host.
//!
//! The guest writes the arguments into its CPU's call page and the call's number to
//! [`GATE_PORT`]; when the instruction has completed, the call page holds the result. Exceptions
//! and panics use the CPU's report page instead, because they may interrupt the preparation of a
//! call.

use crate::addr::{FrameRange, Gpa, PAGE_SIZE};
use crate::words_struct;

/// The port that gate calls are written to, with a 32-bit OUT.
pub const GATE_PORT: u16 = 0x1ac;

/// Words of a call page.
pub const PAGE_WORDS: usize = (PAGE_SIZE / 8) as usize;
/// Word of the call page that the host writes the result to.
pub const STATUS_WORD: usize = 0;
/// Word of the call page with the number of operations, or of bytes of text.
pub const COUNT_WORD: usize = 1;
/// First word of the arguments.
pub const ARGS_WORD: usize = 2;
/// Most bytes of text in one log call.
pub const LOG_BYTES: usize = (PAGE_WORDS - ARGS_WORD) * 8;

/// Vector of the interrupt that asks a CPU to look for shootdowns: what [`Call::Interrupt`] sends.
pub const SHOOTDOWN_VECTOR: u8 = 0xf0;

/// Number of a gate call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Call {
    /// This CPU is set up, and on CPU 0 the allocator is ready; arguments: [`CpuRegistration`].
    Ready = 1,
    /// A list of [`Op`]s, carried out in order; the first that fails ends the list.
    Ops = 2,
    /// Registers a root: physical address, PCID.
    RegisterRoot = 3,
    /// Takes a root off the register: physical address.
    UnregisterRoot = 4,
    /// The event ring is full: take it.
    Drain = 5,
    /// All input has been taken over: wipe the input region.
    InputDone = 6,
    /// Text for the guest log: count bytes.
    Log = 7,
    /// The program is done: its status, then [`crate::counter::Counters`].
    Exit = 8,
    /// An exception; the report page holds an [`ExceptionReport`].
    Exception = 9,
    /// A panic; the report page holds count bytes of text.
    Panic = 10,
    /// The free lists are settled: a point at which the host may check everything.
    Checkpoint = 11,
    /// Starts the other CPUs, as CPU 0 was started. Once, by CPU 0.
    StartCpus = 12,
    /// Sends [`SHOOTDOWN_VECTOR`] to other CPUs; argument: a bit for each.
    Interrupt = 13,
    /// This CPU waits for others to answer its shootdown; arguments: a bit for each CPU that is
    /// missing, number of the shootdown. Past a bound the host ends the run.
    Unanswered = 14,
    /// This CPU waits for another: the host may give its time to others. Has no result.
    Yield = 15,
    /// Writes to page tables, under direct paging: a list of [`crate::direct::TableOp`]s, carried out
    /// in order; the first that is refused ends the list.
    Tables = 16,
}

impl Call {
    /// The call with this number.
    #[must_use]
    pub const fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            1 => Self::Ready,
            2 => Self::Ops,
            3 => Self::RegisterRoot,
            4 => Self::UnregisterRoot,
            5 => Self::Drain,
            6 => Self::InputDone,
            7 => Self::Log,
            8 => Self::Exit,
            9 => Self::Exception,
            10 => Self::Panic,
            11 => Self::Checkpoint,
            12 => Self::StartCpus,
            13 => Self::Interrupt,
            14 => Self::Unanswered,
            15 => Self::Yield,
            16 => Self::Tables,
            _ => return None,
        })
    }
}

/// Result of a gate call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// No call has this number.
    BadCall = 1,
    /// The arguments cannot be read as what the call takes.
    BadArguments = 2,
    /// A range is not wholly in the zone: only the allocator's memory can be secret.
    NotInZone = 3,
    /// A frame to open or release is not secret.
    NotSecret = 4,
    /// A frame to release is still open.
    StillOpen = 5,
    /// A frame has been opened too often by this CPU without a seal.
    TooManyOpens = 6,
    /// The root cannot be registered: not in the table pool, or too many.
    BadRoot = 7,
    /// The call is not possible now.
    BadState = 8,
    /// Under direct paging: what was asked would break a rule, or asks for a frame of which one is
    /// broken.
    Refused = 9,
}

impl Status {
    /// The status with this number.
    #[must_use]
    pub const fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::Ok,
            1 => Self::BadCall,
            2 => Self::BadArguments,
            3 => Self::NotInZone,
            4 => Self::NotSecret,
            5 => Self::StillOpen,
            6 => Self::TooManyOpens,
            7 => Self::BadRoot,
            8 => Self::BadState,
            9 => Self::Refused,
            _ => return None,
        })
    }

    /// The status as the word that the host writes: the index of the operation that failed in
    /// the upper half.
    #[must_use]
    pub fn to_word(self, index: usize) -> u64 {
        u64::from(self as u32) | u64::try_from(index).unwrap_or(0) << 32
    }
}

/// What an operation does with its ranges.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum OpKind {
    /// Close the frames. A frame that was not secret becomes secret; one that this CPU has open is
    /// open once less.
    Seal = 1,
    /// Open secret frames for this CPU's window.
    Open = 2,
    /// Make sealed frames ordinary again.
    Release = 3,
}

impl OpKind {
    const fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Seal),
            2 => Some(Self::Open),
            3 => Some(Self::Release),
            _ => None,
        }
    }
}

/// Lists of operations as words: for each operation a head (kind, number of ranges), then two
/// words a range (first physical address, frames).
#[derive(Debug)]
pub struct OpWriter<S> {
    store: S,
    next: usize,
    head: usize,
    ranges: u64,
    kind: OpKind,
}

/// The call page has no room for another range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Full;

impl<S: FnMut(usize, u64)> OpWriter<S> {
    /// Starts a list whose words are stored by `store(word, value)`.
    pub fn new(mut store: S) -> Self {
        store(COUNT_WORD, 0);
        Self { store, next: ARGS_WORD, head: 0, ranges: 0, kind: OpKind::Seal }
    }

    /// Adds a range to the last operation if it is of the same kind, to a new one otherwise.
    ///
    /// # Errors
    /// [`Full`]; the list stays as it is.
    pub fn push(&mut self, kind: OpKind, range: FrameRange) -> Result<(), Full> {
        let new = self.ranges == 0 || self.kind != kind;
        if self.next + 2 + usize::from(new) > PAGE_WORDS {
            return Err(Full);
        }
        if new {
            self.head = self.next;
            self.next += 1;
            self.ranges = 0;
            self.kind = kind;
        }
        self.ranges += 1;
        (self.store)(self.head, u64::from(kind as u8) | self.ranges << 32);
        (self.store)(self.next, range.start().gpa().0);
        (self.store)(self.next + 1, range.count());
        self.next += 2;
        (self.store)(COUNT_WORD, self.next as u64);
        Ok(())
    }
}

/// One operation on one range, as the host reads it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Op {
    /// What to do.
    pub kind: OpKind,
    /// With which frames.
    pub frames: FrameRange,
}

/// Reads a list of operations from a copy of the call page, or of as much of it as the list takes,
/// whatever it holds. The words' count ends the list.
///
/// # Errors
/// The index of the first word that makes no sense.
pub fn read_ops(page: &[u64], mut each: impl FnMut(Op)) -> Result<(), usize> {
    let end = page.get(COUNT_WORD).and_then(|end| usize::try_from(*end).ok());
    let end = end.filter(|end| *end <= page.len()).ok_or(COUNT_WORD)?;
    let mut next = ARGS_WORD;
    while next < end {
        let [kind, z1, z2, z3, r0, r1, r2, r3] = page[next].to_le_bytes();
        let kind = OpKind::from_number(kind).filter(|_| [z1, z2, z3] == [0; 3]).ok_or(next)?;
        let ranges = u32::from_le_bytes([r0, r1, r2, r3]);
        if ranges == 0 || ranges as usize > (end - next - 1) / 2 {
            return Err(next);
        }
        next += 1;
        for _ in 0..ranges {
            let start = Gpa(page[next]);
            let frames = start.is_aligned(PAGE_SIZE).then(|| start.frame());
            let frames = frames.and_then(|f| FrameRange::new(f, page[next + 1])).ok_or(next)?;
            each(Op { kind, frames });
            next += 2;
        }
    }
    Ok(())
}

words_struct! {
    /// Descriptor tables and root of a CPU, as it set them up: what `control-state` compares with.
    pub struct CpuRegistration {
        /// Base of the interrupt descriptor table.
        idt_base,
        /// Limit of the interrupt descriptor table.
        idt_limit,
        /// Base of the global descriptor table.
        gdt_base,
        /// Limit of the global descriptor table.
        gdt_limit,
    }
}

words_struct! {
    /// An exception as the guest's handler found it.
    pub struct ExceptionReport {
        /// Vector.
        vector,
        /// Error code, 0 where the vector has none.
        error,
        /// CR2.
        cr2,
        /// RIP.
        rip,
        /// RSP before the exception.
        rsp,
        /// RFLAGS.
        rflags,
        /// CS.
        cs,
        /// RAX.
        rax,
        /// RBX.
        rbx,
        /// RCX.
        rcx,
        /// RDX.
        rdx,
        /// RSI.
        rsi,
        /// RDI.
        rdi,
        /// RBP.
        rbp,
        /// R8.
        r8,
        /// R9.
        r9,
        /// R10.
        r10,
        /// R11.
        r11,
        /// R12.
        r12,
        /// R13.
        r13,
        /// R14.
        r14,
        /// R15.
        r15,
    }
}

/// Name of an exception vector (SDM volume 3, "Protected-Mode Exceptions and Interrupts").
#[must_use]
pub const fn vector_name(vector: u64) -> &'static str {
    match vector {
        0 => "#DE divide error",
        1 => "#DB debug",
        2 => "NMI",
        3 => "#BP breakpoint",
        4 => "#OF overflow",
        5 => "#BR bound range exceeded",
        6 => "#UD invalid opcode",
        7 => "#NM device not available",
        8 => "#DF double fault",
        10 => "#TS invalid TSS",
        11 => "#NP segment not present",
        12 => "#SS stack fault",
        13 => "#GP general protection",
        14 => "#PF page fault",
        16 => "#MF x87 error",
        17 => "#AC alignment check",
        18 => "#MC machine check",
        19 => "#XM SIMD error",
        20 => "#VE virtualization exception",
        21 => "#CP control protection",
        _ => "unexpected vector",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Gfn;
    use proptest::prelude::*;
    use std::vec::Vec;

    fn range(start: u64, count: u64) -> FrameRange {
        FrameRange::new(Gfn(start), count).unwrap()
    }

    fn written(ops: &[(OpKind, FrameRange)]) -> [u64; PAGE_WORDS] {
        let mut page = [0; PAGE_WORDS];
        let mut writer = OpWriter::new(|word, value| page[word] = value);
        for (kind, range) in ops {
            writer.push(*kind, *range).unwrap();
        }
        page
    }

    fn read(page: &[u64; PAGE_WORDS]) -> Result<Vec<(OpKind, FrameRange)>, usize> {
        let mut ops = Vec::new();
        read_ops(page, |op| ops.push((op.kind, op.frames))).map(|()| ops)
    }

    #[test]
    fn a_list_of_operations_keeps_its_order() {
        let ops = [
            (OpKind::Seal, range(1, 512)),
            (OpKind::Seal, range(600, 1)),
            (OpKind::Open, range(1, 512)),
            (OpKind::Release, range(1, 1)),
        ];
        assert_eq!(read(&written(&ops)).unwrap(), ops);
        assert_eq!(read(&[0; PAGE_WORDS]), Ok(Vec::new()));
    }

    #[test]
    fn a_full_page_is_said_and_stays_readable() {
        let mut page = [0; PAGE_WORDS];
        let mut writer = OpWriter::new(|word, value| page[word] = value);
        let mut pushed = 0;
        while writer.push(OpKind::Seal, range(pushed, 1)).is_ok() {
            pushed += 1;
        }
        assert_eq!(read(&page).unwrap().len() as u64, pushed);
        assert!(pushed >= 250);
    }

    #[test]
    fn nonsense_is_named_by_its_word() {
        let good = written(&[(OpKind::Seal, range(1, 1))]);
        let with = |word: usize, value| {
            let mut page = good;
            page[word] = value;
            read(&page)
        };
        assert_eq!(with(COUNT_WORD, 513), Err(COUNT_WORD));
        assert_eq!(with(COUNT_WORD, u64::MAX), Err(COUNT_WORD));
        assert_eq!(with(ARGS_WORD, 9), Err(ARGS_WORD));
        assert_eq!(with(ARGS_WORD, 1), Err(ARGS_WORD));
        assert_eq!(with(ARGS_WORD, 1 | 2 << 32), Err(ARGS_WORD));
        assert_eq!(with(ARGS_WORD + 1, 12), Err(ARGS_WORD + 1));
        assert_eq!(with(ARGS_WORD + 2, 0), Err(ARGS_WORD + 1));
    }

    proptest! {
        #[test]
        fn any_page_is_read_or_refused(words in prop::collection::vec(any::<u64>(), 0..64)) {
            let mut page = [0; PAGE_WORDS];
            page[..words.len()].copy_from_slice(&words);
            if words.len() > 1 {
                page[COUNT_WORD] %= 600;
            }
            let _ = read(&page);
        }
    }
}
