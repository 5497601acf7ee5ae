//! The machine that the protocol runs on: tables, what CPUs may cache, second stage, contents; and
//! the rules, as they judge one step.
//!
//! What a CPU *may* cache is one set: every translation that the tables give is in it at once (a CPU
//! may fill at any time), and only what an operation must remove leaves it. So nothing is left to
//! chance, and what is not in the set no CPU holds.

use super::super::Rule;

/// CPUs, and pageblocks.
pub(super) const N: usize = 2;

/// Whether seals close frames in the second stage.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Seal {
    Closes,
    Off,
}

impl Seal {
    pub(super) const fn text(self) -> &'static str {
        match self {
            Self::Closes => "With a seal",
            Self::Off => "With the seal off",
        }
    }
}

/// What one CPU may cache.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub(super) struct Cached {
    /// The direct map's translation of each block: global.
    pub(super) direct: [bool; N],
    /// For the window of each CPU, which blocks it may still translate to: not global.
    pub(super) windows: [[bool; N]; N],
}

/// One pageblock.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Block {
    /// The direct map shows it.
    pub(super) mapped: bool,
    pub(super) secret: bool,
    /// CPUs that have it open.
    pub(super) open: [bool; N],
    pub(super) zero: bool,
    /// Handed out as zero and not opened since.
    pub(super) promised_zero: bool,
}

/// The machine's state.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Machine {
    pub(super) blocks: [Block; N],
    /// What the window of each CPU maps: block, and whether the entry is global.
    pub(super) windows: [Option<(u8, bool)>; N],
    pub(super) tlbs: [Cached; N],
}

/// A flush on one CPU.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Flush {
    /// CR4.PGE off and on.
    Everything,
    /// A CR3 load: global translations stay.
    NonGlobal,
}

/// What happens to the machine in one step.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Act {
    ClearDirect(usize),
    MapDirect(usize),
    Flush(Flush),
    Seal(usize),
    Open(usize),
    Release(usize),
    /// This block, in the window of this CPU, perhaps global.
    MapWindow {
        block: usize,
        window: usize,
        global: bool,
    },
    ClearWindow {
        window: usize,
    },
    Zero(usize),
    Write(usize),
    Pooled(usize),
    HandedOut(usize),
    /// Nothing that the machine knows of.
    Nothing,
}

impl Machine {
    /// Both blocks are mapped and dirty; nothing else is.
    pub(super) fn new() -> Self {
        let block = Block {
            mapped: true,
            secret: false,
            open: [false; N],
            zero: false,
            promised_zero: false,
        };
        let mut machine =
            Self { blocks: [block; N], windows: [None; N], tlbs: [Cached::default(); N] };
        machine.fill();
        machine
    }

    /// Whatever the tables map may be cached.
    fn fill(&mut self) {
        for tlb in &mut self.tlbs {
            for (cached, block) in tlb.direct.iter_mut().zip(&self.blocks) {
                *cached |= block.mapped;
            }
            for (cached, window) in tlb.windows.iter_mut().zip(&self.windows) {
                if let Some((block, _)) = window {
                    cached[usize::from(*block)] = true;
                }
            }
        }
    }

    /// Carries out a step of `cpu`; the rule that it breaks, if any. Judged as the host does: gate
    /// operations on arrival, before they take effect.
    pub(super) fn act(&mut self, cpu: usize, act: Act, seal: Seal) -> Option<Rule> {
        let broken = self.judge(cpu, act);
        match act {
            Act::ClearDirect(block) => self.blocks[block].mapped = false,
            Act::MapDirect(block) => self.blocks[block].mapped = true,
            Act::Flush(flush) => {
                self.tlbs[cpu].windows = [[false; N]; N];
                if flush == Flush::Everything {
                    self.tlbs[cpu].direct = [false; N];
                }
            }
            Act::Seal(block) => {
                self.blocks[block].secret = true;
                self.blocks[block].open[cpu] = false;
                if seal == Seal::Closes && self.blocks[block].open == [false; N] {
                    // Completed: no combined translation of the block is left anywhere.
                    for tlb in &mut self.tlbs {
                        tlb.direct[block] = false;
                        tlb.windows.iter_mut().for_each(|cached| cached[block] = false);
                    }
                }
            }
            Act::Open(block) => {
                self.blocks[block].open[cpu] = true;
                self.blocks[block].promised_zero = false;
            }
            Act::Release(block) => {
                self.blocks[block].secret = false;
                self.blocks[block].promised_zero = false;
            }
            Act::MapWindow { block, window, global } => {
                self.windows[window] = u8::try_from(block).ok().map(|block| (block, global));
            }
            Act::ClearWindow { window } => self.windows[window] = None,
            Act::Zero(block) => self.blocks[block].zero = true,
            Act::Write(block) => self.blocks[block].zero = false,
            Act::HandedOut(block) => self.blocks[block].promised_zero = true,
            Act::Pooled(_) | Act::Nothing => {}
        }
        self.fill();
        broken
    }

    fn judge(&self, cpu: usize, act: Act) -> Option<Rule> {
        let stale_direct = |block: usize| {
            !self.blocks[block].mapped && self.tlbs.iter().any(|tlb| tlb.direct[block])
        };
        let stale_window = |window: usize, block: usize| {
            let current = self.windows[window].is_some_and(|(b, _)| usize::from(b) == block);
            self.tlbs[window].windows[window][block] && !current
        };
        match act {
            Act::Seal(block) => {
                let shown =
                    |c: usize| self.windows[c].is_some_and(|(b, _)| usize::from(b) == block);
                // After the seal this CPU has it open no more.
                let foreign = (0..N).any(|c| shown(c) && (c == cpu || !self.blocks[block].open[c]));
                if stale_direct(block) {
                    Some(Rule::StaleDirectMap)
                } else if self.blocks[block].mapped {
                    Some(Rule::DirectMapAlias)
                } else {
                    foreign.then_some(Rule::ForeignAlias)
                }
            }
            Act::Open(block) if stale_direct(block) => Some(Rule::StaleDirectMap),
            Act::Open(block) if !self.blocks[block].secret => Some(Rule::SecondStageOpen),
            Act::Open(block) => {
                let Block { promised_zero, zero, .. } = self.blocks[block];
                (promised_zero && !zero).then_some(Rule::Residue)
            }
            Act::Release(block) => {
                if (0..N).any(|window| stale_window(window, block)) {
                    Some(Rule::StaleWindow)
                } else {
                    (!self.blocks[block].zero).then_some(Rule::Residue)
                }
            }
            Act::MapDirect(block) => self.blocks[block].secret.then_some(Rule::DirectMapAlias),
            Act::MapWindow { block, window, global } => {
                let Block { secret, open, .. } = self.blocks[block];
                if (0..N).any(|block| stale_window(window, block)) {
                    Some(Rule::StaleWindow)
                } else if secret && !open[window] {
                    Some(Rule::ForeignAlias)
                } else {
                    (secret && global).then_some(Rule::GlobalWindow)
                }
            }
            Act::Pooled(block) => {
                let Block { secret, open, .. } = self.blocks[block];
                (!secret || open != [false; N]).then_some(Rule::SecondStageOpen)
            }
            _ => None,
        }
    }

    /// A way to reach a secret block that the protocol must prevent: through the direct map while the
    /// second stage lets accesses through, or through a window that maps another block by now.
    pub(super) fn harm(&self, seal: Seal) -> Option<String> {
        for (cpu, tlb) in self.tlbs.iter().enumerate() {
            for (number, block) in self.blocks.iter().enumerate() {
                let through = seal == Seal::Off || block.open != [false; N];
                if block.secret && through && tlb.direct[number] {
                    return Some(format!(
                        "CPU {cpu} may read block {number} through the direct map"
                    ));
                }
            }
            let Some((current, _)) = self.windows[cpu] else { continue };
            let others = (0..N).filter(|block| *block != usize::from(current));
            if let Some(other) = others.into_iter().find(|block| tlb.windows[cpu][*block]) {
                return Some(format!(
                    "CPU {cpu} opens block {current} and may reach block {other} in its window"
                ));
            }
        }
        None
    }
}
