//! What is on a tape: calls of the audit, answers of the world, results.

use crate::audit::{CpuState, Denial, Mediation, Probe, ProbeKind, TableWords, Touched};
use lacuna_abi::addr::{FrameRange, Gfn, Gpa};
use lacuna_abi::direct::{SITE_WORD, TableOp, TableWriter, read_table_ops};
use lacuna_abi::event::{EntryWrite, Intent, Record};
use lacuna_abi::gate::{COUNT_WORD, CpuRegistration, Op, Status};
use lacuna_abi::paging::Entry;

/// A call of the audit, with its arguments.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Call {
    /// The audit is made: its boot root is walked.
    Start,
    RegisterRoot(Gpa, u16),
    UnregisterRoot(Gpa),
    StartCpu(u8),
    RegisterCpu(u8, CpuRegistration),
    Event(Record),
    Arrival(u8, Op, u64),
    Done(u8, Op, u64),
    /// CPU, site, what is asked for, number.
    Admit(u8, u32, TableOp, u64),
    Sample(u8, u64),
    Quiesce(u64),
    Mediate(Mediation),
    Came(u8, u64),
    ChooseProbes(u64, Vec<ProbeKind>),
    JudgeProbes(Vec<(Probe, Touched)>, u64),
    /// Place, frame, detail, number.
    Leak(u64, Option<Gfn>, String, u64),
    LeakSearch(u64, u64),
    Inconclusive(String),
}

/// What the world answered. Equal answers for frames in a row are one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Answer {
    Table(Gfn, Option<Box<TableWords>>),
    Entry(Gpa, Option<Entry>),
    Zero(FrameRange, Option<bool>),
    FirstNonzero(Gfn, Option<u64>),
    Denial(FrameRange, Denial),
    DeniesAll(FrameRange, bool),
    Cpu(u8, Option<CpuState>),
    Intent(u8, Option<EntryWrite>),
    /// A number that was drawn below another.
    Draw(u64, u64),
}

/// One thing on a tape.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Item {
    Call(Call),
    Answer(Answer),
    /// The call is over: what it came to.
    Result(Result<(), Status>),
}

impl Item {
    /// The bytes that a guest may have chosen, in the order in which it could have put something
    /// there: to be searched for a secret input.
    pub(super) fn guest_bytes(&self) -> Vec<u8> {
        let bytes = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect();
        match self {
            Self::Call(Call::Event(record)) => bytes(&record.to_words()),
            Self::Call(Call::Admit(_, site, op, _)) => bytes(op_words(*site, op).words()),
            Self::Call(Call::RegisterCpu(_, registration)) => bytes(&registration.to_words()),
            Self::Call(Call::RegisterRoot(root, _) | Call::UnregisterRoot(root)) => {
                bytes(&[root.0])
            }
            Self::Call(Call::Leak(_, _, text, _) | Call::Inconclusive(text)) => text.clone().into(),
            Self::Answer(Answer::Table(_, Some(words))) => bytes(&words[..]),
            Self::Answer(Answer::Entry(at, entry)) => bytes(&[at.0, entry.unwrap_or_default().0]),
            Self::Answer(Answer::Cpu(_, Some(state))) => bytes(&cpu_words(state)),
            Self::Answer(Answer::Intent(_, Some(write))) => {
                bytes(&Intent { write: *write, seq: 0 }.to_words())
            }
            _ => Vec::new(),
        }
    }
}

/// A request to write to tables as words: site, then the operation.
pub(super) struct OpWords([u64; 1 + MAX_OP_WORDS], usize);

impl OpWords {
    pub(super) fn words(&self) -> &[u64] {
        &self.0[..self.1]
    }
}

/// Most words of one operation on tables.
pub(super) const MAX_OP_WORDS: usize = 6;

/// A request as words.
pub(super) fn op_words(site: u32, op: &TableOp) -> OpWords {
    let mut words = OpWords([0; 1 + MAX_OP_WORDS], 0);
    let mut writer = TableWriter::new(
        |word, value| {
            if let Some(index) = word.checked_sub(SITE_WORD) {
                words.0[index] = value;
                words.1 = words.1.max(index + 1);
            }
        },
        site,
    );
    // One operation always fits.
    let _ = writer.push(op);
    words
}

/// The request of these words, if they are one.
pub(super) fn op_of(words: &[u64]) -> Option<(u32, TableOp)> {
    let mut page = vec![0; SITE_WORD];
    page.extend(words);
    page[COUNT_WORD] = u64::try_from(page.len()).ok()?;
    let (mut found, mut count) = (None, 0);
    let site = read_table_ops(&page, |op| {
        found = Some(op);
        count += 1;
    });
    site.ok().zip(found).filter(|_| count == 1)
}

/// A CPU's registers as words.
pub(super) const fn cpu_words(state: &CpuState) -> [u64; 8] {
    let CpuState { cr0, cr3, cr4, efer, idt_base, idt_limit, gdt_base, gdt_limit } = *state;
    [cr0, cr3, cr4, efer, idt_base, idt_limit, gdt_base, gdt_limit]
}

/// The registers of these words.
pub(super) const fn cpu_state(words: [u64; 8]) -> CpuState {
    let [cr0, cr3, cr4, efer, idt_base, idt_limit, gdt_base, gdt_limit] = words;
    CpuState { cr0, cr3, cr4, efer, idt_base, idt_limit, gdt_base, gdt_limit }
}
