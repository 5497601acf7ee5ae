//! Random histories of the allocator's public operations: what a step is, and how bytes spell it.
//!
//! Steps come from proptest or from a fuzzer's bytes; [`super::history`] carries them out. Every
//! sequence of bytes spells a history, and numbers mean what is there: the allocation with number
//! `n` is the one of those that are held, counted around.

use crate::alloc::{AllocConfig, Request};
use crate::contents::OnFree;
use crate::freetype::Migratetype;

/// The machine that a history runs on, and how its allocator behaves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Setup {
    pub(crate) cpus: usize,
    pub(crate) config: AllocConfig,
}

impl Setup {
    /// The setup with these properties: zeroing ahead, poison, looks at zero pages, a pool that is
    /// filled ahead, watermarks.
    pub(crate) fn new(cpus: usize, [prezero, poison, check_zero, pool, marks]: [bool; 5]) -> Self {
        let pool_pages = if pool { 512 } else { 0 };
        let min_free = if marks { None } else { Some(0) };
        let config = AllocConfig {
            prezero,
            flip: true,
            on_free: if poison { OnFree::Poison } else { OnFree::Leave },
            scrub: true,
            check_zero,
            min_free,
            pool_low: pool_pages,
            pool_high: 2 * pool_pages,
        };
        Self { cpus, config }
    }

    /// The same with these properties: no block flips, freed secret pages are not scrubbed, freed
    /// mapped pages are zeroed.
    pub(crate) fn with(self, [no_flip, no_scrub, zero]: [bool; 3]) -> Self {
        let AllocConfig { on_free, .. } = self.config;
        let config = AllocConfig {
            flip: !no_flip,
            scrub: !no_scrub,
            on_free: if zero { OnFree::Zero } else { on_free },
            ..self.config
        };
        Self { config, ..self }
    }
}

/// What is done with the pages of an allocation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Use {
    /// Which allocation.
    pub(crate) which: u8,
    /// First page and number of pages, counted around the allocation; 0 pages for the whole.
    pub(crate) first: u16,
    pub(crate) count: u16,
    /// A word is stored; otherwise the pages are only looked at.
    pub(crate) write: bool,
    /// Secret pages: all of the window is zeroed. Mapped ones: they are reached through a window,
    /// not through the direct map.
    pub(crate) special: bool,
    /// Mapped pages: one of them is reached through the reserve. Secret ones: several words at once
    /// are copied to the window, and compared with it.
    pub(crate) other: bool,
    /// Steps that are carried out meanwhile.
    pub(crate) during: u8,
}

/// One step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Step {
    /// Asks for pages.
    Alloc(Request, bool),
    /// Gives an allocation back.
    Free(u8),
    /// Opens or pins an allocation.
    Use(Use),
    /// An allocation changes sides where it is.
    Convert(u8),
    /// Gives up an owner and makes it again from its handle.
    Renew(u8),
    /// Tries a word as a handle.
    Forge(u64),
    /// Does what allocations left for later.
    Balance,
    /// Brings free secret pageblocks back.
    Shrink,
    /// Ends the use of windows, and begins it again.
    Teardown,
    /// Interrupts are off on this CPU during the next steps.
    InterruptsOff(u8),
    /// The host refuses an operation, this many from now.
    Refuse(u8),
}

/// A step and the CPU that it runs on, counted around.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Turn {
    pub(crate) cpu: u8,
    pub(crate) step: Step,
}

/// Largest order that is asked for: one more than there is.
pub(crate) const ORDERS: u8 = 12;

/// The setup and the steps that `bytes` spell.
pub(crate) fn decode(bytes: &[u8]) -> (Setup, impl Iterator<Item = Turn>) {
    let mut bytes = bytes.iter().copied();
    let first = bytes.next().unwrap_or(0);
    let flag = |bit: u8| first >> bit & 1 != 0;
    let setup = Setup::new(1 + usize::from(first >> 6), core::array::from_fn(|i| flag(i as u8)));
    let more = if flag(5) { bytes.next().unwrap_or(0) } else { 0 };
    // Without flips little happens, so that they are rarely off.
    let setup = setup.with([more & 3 == 3, more & 4 != 0, more & 8 != 0]);
    (setup, core::iter::from_fn(move || turn(&mut bytes)))
}

fn turn(bytes: &mut impl Iterator<Item = u8>) -> Option<Turn> {
    let first = bytes.next()?;
    let mut next = || bytes.next().unwrap_or(0);
    let step = match first & 15 {
        0..=4 => {
            let word = next();
            let request = Request {
                // Small orders are more frequent than large ones.
                order: if word & 16 == 0 { word & 3 } else { (word & 15) % ORDERS },
                migratetype: Migratetype::ALL[usize::from(word >> 5) % 3],
                zero: first & 1 != 0,
                noblock: word & 16 == 0 && word & 12 == 12,
            };
            Step::Alloc(request, first & 15 < 3)
        }
        5..=7 => Step::Free(next()),
        8..=10 => {
            let (which, first_page, count, rest) = (next(), next(), next(), next());
            Step::Use(Use {
                which,
                first: u16::from(first_page) * 3,
                count: u16::from(count) * 3,
                write: rest & 1 != 0,
                special: rest & 2 != 0,
                other: rest & 4 != 0,
                during: rest >> 5,
            })
        }
        11 => {
            let word = next();
            if word & 3 == 0 { Step::Renew(word >> 2) } else { Step::Convert(word >> 2) }
        }
        12 => Step::Forge(u64::from_le_bytes(core::array::from_fn(|_| next()))),
        13 => match next() {
            224.. => Step::Teardown,
            word => [Step::Balance, Step::Shrink][usize::from(word & 1)],
        },
        14 => Step::InterruptsOff(next() >> 5),
        _ => Step::Refuse(next() >> 4),
    };
    Some(Turn { cpu: first >> 4 & 3, step })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;
    use std::vec::Vec;

    #[test]
    fn every_way_to_set_up_is_spelt() {
        let setups: Vec<_> = (0..=u8::MAX)
            .flat_map(|first| (0..16).map(move |more| decode(&[first, more]).0))
            .collect();
        let some = |of: fn(&AllocConfig) -> bool| setups.iter().any(|setup| of(&setup.config));
        assert!(some(|config| !config.flip) && some(|config| !config.scrub));
        for on_free in [OnFree::Leave, OnFree::Poison, OnFree::Zero] {
            assert!(setups.iter().any(|setup| setup.config.on_free == on_free), "{on_free:?}");
        }
        // Where the bit that tells of a second byte is clear, that byte is a step.
        assert_eq!(decode(&[0, 13, 1]).1.collect::<Vec<_>>()[0].step, Step::Shrink);
        assert_eq!(decode(&[32, 0, 13, 1]).1.collect::<Vec<_>>()[0].step, Step::Shrink);
    }

    #[test]
    fn bytes_spell_every_kind_of_step_and_every_order() {
        let mut random = Random(1);
        let bytes: Vec<u8> = (0..20_000).map(|_| random.below(256) as u8).collect();
        let (_, turns) = decode(&bytes);
        let mut kinds = std::collections::HashSet::new();
        let mut orders = std::collections::HashSet::new();
        for turn in turns {
            kinds.insert(core::mem::discriminant(&turn.step));
            if let Step::Alloc(request, secret) = turn.step {
                orders.insert((request.order, request.migratetype as u8, request.zero, secret));
            }
        }
        assert_eq!(kinds.len(), 11);
        assert_eq!(orders.len(), usize::from(ORDERS) * 3 * 2 * 2);
        assert_eq!(decode(&[]).1.count(), 0);
    }
}
