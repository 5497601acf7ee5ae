//! What is on a tape: calls of the audit, answers of the world, results.

use crate::audit::{CpuState, Denial, Mediation, Probe, ProbeKind, TableWords, Touched};
use lacuna_abi::addr::{FrameRange, Gfn, Gpa};
use lacuna_abi::event::{EntryWrite, Intent, Record};
use lacuna_abi::gate::{CpuRegistration, Op, Status};
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
