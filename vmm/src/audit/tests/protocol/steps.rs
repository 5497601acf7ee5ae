//! What CPUs do: the steps of a block's life, and the slips that leave one out.

use super::super::Rule;
use super::machine::{Act, Flush, N, Seal};

/// What a CPU does with a block.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Task {
    /// Takes it out of the direct map, into the pool.
    Flip,
    /// Uses it once, after it was handed out.
    Use,
    /// Frees it, into the pool.
    Free,
    /// Gives it back to the mapped side.
    Back,
}

/// One step of a CPU.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Step {
    /// Begins a task with a block; what is in the pool is handed out.
    Begin(Task, usize),
    Do(Act),
    /// Asks the other CPU for a flush.
    Send(Flush),
    /// Goes on when the other CPU has answered.
    Await,
    /// Flushes its own window, if an address of it was used since it last did.
    Refresh,
    /// Takes the interrupt: flushes and answers.
    Interrupt(Flush),
}

/// What is left out, or done wrongly.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Slip {
    Nothing,
    ClearDirect,
    Send,
    LocalFlush,
    Await,
    FlushTooWeak,
    FlushFirst,
    FirstSeal,
    OpenEarly,
    Open,
    Refresh,
    GlobalWindow,
    OtherWindow,
    Zero,
    ClearWindow,
    LastSeal,
    Scrub,
    BackFlush,
    Release,
}

impl Slip {
    pub(super) const ALL: [Self; 19] = [
        Self::Nothing,
        Self::ClearDirect,
        Self::Send,
        Self::LocalFlush,
        Self::Await,
        Self::FlushTooWeak,
        Self::FlushFirst,
        Self::FirstSeal,
        Self::OpenEarly,
        Self::Open,
        Self::Refresh,
        Self::GlobalWindow,
        Self::OtherWindow,
        Self::Zero,
        Self::ClearWindow,
        Self::LastSeal,
        Self::Scrub,
        Self::BackFlush,
        Self::Release,
    ];

    /// The rule that must be broken.
    pub(super) const fn breaks(self, seal: Seal) -> Option<Rule> {
        match (self, seal) {
            (Self::Nothing, _) => None,
            // A completed seal has dropped what the window may still have been cached for.
            (Self::Refresh | Self::BackFlush, Seal::Closes) => None,
            (Self::Refresh | Self::BackFlush, Seal::Off) => Some(Rule::StaleWindow),
            (Self::ClearDirect | Self::Release, _) => Some(Rule::DirectMapAlias),
            (
                Self::Send
                | Self::LocalFlush
                | Self::Await
                | Self::FlushTooWeak
                | Self::FlushFirst
                | Self::OpenEarly,
                _,
            ) => Some(Rule::StaleDirectMap),
            (Self::FirstSeal | Self::LastSeal, _) => Some(Rule::SecondStageOpen),
            (Self::Open | Self::OtherWindow | Self::ClearWindow, _) => Some(Rule::ForeignAlias),
            (Self::GlobalWindow, _) => Some(Rule::GlobalWindow),
            (Self::Zero | Self::Scrub, _) => Some(Rule::Residue),
        }
    }

    pub(super) const fn text(self) -> &'static str {
        match self {
            Self::Nothing => "Nothing left out",
            Self::ClearDirect => "The direct-map entry is not cleared",
            Self::Send => "The other CPU is not asked to flush",
            Self::LocalFlush => "The flipping CPU does not flush itself",
            Self::Await => "The flipping CPU does not wait for the answer",
            Self::FlushTooWeak => "A CR3 load where global translations must go",
            Self::FlushFirst => "The flush comes before the entry is cleared",
            Self::FirstSeal => "The block is not sealed when it has left the direct map",
            Self::OpenEarly => "The block is opened before it is flushed and sealed",
            Self::Open => "A window is mapped without an open",
            Self::Refresh => "A window address is used again without a flush",
            Self::GlobalWindow => "The window entry is global",
            Self::OtherWindow => "The window of the other CPU is used",
            Self::Zero => "The block enters the pool without being zeroed",
            Self::ClearWindow => "The window entry is not cleared",
            Self::LastSeal => "The block is not sealed after it was zeroed",
            Self::Scrub => "A freed block is not scrubbed",
            Self::BackFlush => "Windows are not flushed before the release",
            Self::Release => "The block is mapped again without a release",
        }
    }
}

/// The steps of a task of `cpu` with `block`, as the slip has them.
pub(super) fn script(task: Task, block: usize, cpu: usize, slip: Slip) -> Vec<Step> {
    let window = if slip == Slip::OtherWindow { N - 1 - cpu } else { cpu };
    let map = Act::MapWindow { block, window, global: slip == Slip::GlobalWindow };
    let open = |what: Option<Act>, last_seal: bool| {
        let mut steps = Vec::new();
        if slip != Slip::Open {
            steps.push(Step::Do(Act::Open(block)));
        }
        if slip != Slip::Refresh {
            steps.push(Step::Refresh);
        }
        steps.push(Step::Do(map));
        steps.extend(what.map(Step::Do));
        if slip != Slip::ClearWindow {
            steps.push(Step::Do(Act::ClearWindow { window }));
        }
        if last_seal {
            steps.push(Step::Do(Act::Seal(block)));
        }
        steps
    };
    let shootdown = |flush| {
        let mut steps = vec![Step::Send(flush), Step::Do(Act::Flush(flush)), Step::Await];
        steps.retain(|step| match step {
            Step::Send(_) => slip != Slip::Send,
            Step::Do(_) => slip != Slip::LocalFlush,
            _ => slip != Slip::Await && slip != Slip::Send,
        });
        steps
    };
    let pooled = [Step::Do(Act::Pooled(block))];
    match task {
        Task::Flip => {
            let clear = (slip != Slip::ClearDirect).then_some(Step::Do(Act::ClearDirect(block)));
            let weak = slip == Slip::FlushTooWeak;
            let flush = shootdown(if weak { Flush::NonGlobal } else { Flush::Everything });
            let seal = (slip != Slip::FirstSeal).then_some(Step::Do(Act::Seal(block)));
            let zero =
                open((slip != Slip::Zero).then_some(Act::Zero(block)), slip != Slip::LastSeal);
            match slip {
                Slip::FlushFirst => {
                    flush.into_iter().chain(clear).chain(seal).chain(zero).chain(pooled).collect()
                }
                Slip::OpenEarly => {
                    clear.into_iter().chain(zero).chain(flush).chain(seal).chain(pooled).collect()
                }
                _ => clear.into_iter().chain(flush).chain(seal).chain(zero).chain(pooled).collect(),
            }
        }
        Task::Use => open(Some(Act::Write(block)), true),
        Task::Free => {
            let scrub = (slip != Slip::Scrub).then_some(Act::Zero(block));
            open(scrub, true).into_iter().chain(pooled).collect()
        }
        Task::Back => {
            let mut steps = Vec::new();
            if slip != Slip::BackFlush {
                steps.extend(shootdown(Flush::NonGlobal));
            }
            if slip != Slip::Release {
                steps.push(Step::Do(Act::Release(block)));
            }
            steps.push(Step::Do(Act::MapDirect(block)));
            steps
        }
    }
}
