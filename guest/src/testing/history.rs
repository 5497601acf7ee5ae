//! Carries out random histories and compares the allocator, the machine and a plain model after
//! every step: no page is handed out twice or lost, each has the freetype, the contents and the
//! mapping that it should have, and the counters say so.

mod check;
mod requests;
mod uses;

use super::Mock;
use super::step::{Setup, Step, Turn, decode};
use crate::alloc::PageAllocator;
use crate::freetype::Migratetype;
use crate::mapped::MappedPages;
use crate::mermap::{Leaks, MermapError, Protection};
use crate::platform::{InterruptsOff, Platform};
use crate::secret::{SecretPages, UseError};
use lacuna_abi::MAX_CPUS;
use lacuna_abi::addr::FrameRange;
use std::vec::Vec;

/// Most steps that are carried out within others.
const DEPTH: usize = 6;
/// Most pages of a window that are looked at.
const LOOKS: u64 = 8;

/// Bytes that are copied to a window at once.
const COPIED: u64 = 64;

/// The owner of an allocation.
enum Owner<'r, 'a> {
    Mapped(MappedPages<'r, 'a, Mock>),
    Secret(SecretPages<'r, 'a, Mock>),
}

impl Owner<'_, '_> {
    fn frames(&self) -> FrameRange {
        match self {
            Self::Mapped(pages) => pages.frames(),
            Self::Secret(pages) => pages.frames(),
        }
    }

    fn handle(&self) -> u64 {
        match self {
            Self::Mapped(pages) => pages.handle(),
            Self::Secret(pages) => pages.handle(),
        }
    }
}

/// What the model knows of one page: the word that fills it, if it is known, and words stored since.
#[derive(Clone, Default)]
struct Page {
    fill: Option<u64>,
    words: Vec<(u64, u64)>,
}

/// An allocation, as the model has it.
struct Held<'r, 'a> {
    owner: Owner<'r, 'a>,
    order: u8,
    migratetype: Migratetype,
    pages: Vec<Page>,
    /// The host refused to close some of it.
    unsealed: bool,
    /// It became secret in place.
    converted: bool,
}

/// What is in use by a step that others are carried out within.
struct Busy {
    frames: FrameRange,
    handle: u64,
    secret: bool,
    /// The CPU with a window on it.
    window: Option<usize>,
}

/// A history under way.
pub(crate) struct History<'r, 'a> {
    mock: &'r Mock,
    allocator: &'r PageAllocator<'a, Mock>,
    held: Vec<Held<'r, 'a>>,
    busy: Vec<Busy>,
    /// Successful requests and frees, secret ones among them.
    made: [u64; 2],
    freed: [u64; 2],
    /// Converted pages that were freed and may still be parked.
    parked: u64,
    /// The next word to store.
    tag: u64,
}

/// Carries out the history that `bytes` spell.
///
/// # Panics
/// At the first difference between the allocator, the machine and the model.
pub fn run_bytes(bytes: &[u8]) {
    run_bytes_with(bytes, |_| ());
}

/// Carries out the history that `bytes` spell on a machine that was prepared.
///
/// # Panics
/// As [`run_bytes`].
pub(crate) fn run_bytes_with(bytes: &[u8], prepare: impl FnOnce(&Mock)) {
    let (setup, mut turns) = decode(bytes);
    with(setup, |history| {
        prepare(history.mock);
        history.turns(&mut turns, usize::MAX, 0);
    });
}

/// Carries out a history, then gives everything back.
///
/// # Panics
/// As [`run_bytes`].
pub(crate) fn run(setup: Setup, mut turns: impl Iterator<Item = Turn>) {
    with(setup, |history| history.turns(&mut turns, usize::MAX, 0));
}

/// Hands `body` a history that has just begun, then gives everything back.
pub(crate) fn with(setup: Setup, body: impl FnOnce(&mut History<'_, '_>)) {
    let mock = Mock::new(16, setup.cpus);
    mock.stop_recording();
    let allocator = mock.allocator_as(setup.config);
    let mut history = History {
        mock: &mock,
        allocator: &allocator,
        held: Vec::new(),
        busy: Vec::new(),
        made: [0; 2],
        freed: [0; 2],
        parked: 0,
        tag: 0,
    };
    body(&mut history);
    history.end();
}

impl<'r, 'a> History<'r, 'a> {
    /// Carries out at most `limit` steps.
    fn turns(&mut self, turns: &mut dyn Iterator<Item = Turn>, limit: usize, depth: usize) {
        for _ in 0..limit {
            let Some(turn) = turns.next() else { return };
            self.turn(turn, turns, depth);
            self.check();
        }
    }

    fn turn(&mut self, turn: Turn, turns: &mut dyn Iterator<Item = Turn>, depth: usize) {
        let cpu = usize::from(turn.cpu) % self.mock.layout.cpus;
        self.mock.on_cpu(cpu);
        match turn.step {
            Step::Alloc(request, secret) => self.alloc(request, secret),
            Step::Free(which) => {
                if let Some(held) = self.take(which) {
                    self.free(held);
                }
            }
            Step::Use(what) => {
                let Some(mut held) = self.take(what.which) else { return };
                let during = if depth < DEPTH { usize::from(what.during) } else { 0 };
                let mut within = |history: &mut Self| {
                    history.turns(turns, during, depth + 1);
                    history.mock.on_cpu(cpu);
                };
                match held.owner {
                    Owner::Mapped(_) => self.use_mapped(&mut held, what, &mut within),
                    Owner::Secret(_) => self.use_secret(&mut held, what, &mut within),
                }
                self.held.push(held);
            }
            Step::Convert(which) => {
                if let Some(held) = self.take(which) {
                    self.convert(held);
                }
            }
            Step::Renew(which) => {
                if let Some(held) = self.take(which) {
                    self.renew(held);
                }
            }
            Step::Forge(word) => self.forge(word),
            Step::Shrink if self.must_not_block() => {
                assert_eq!(self.allocator.shrink(), Err(UseError::WouldBlock));
            }
            Step::Balance => {
                let (balanced, refused) = self.watch(|| self.allocator.balance());
                assert!(balanced.is_ok() || refused, "balancing failed: {balanced:?}");
            }
            Step::Shrink => {
                let (shrunk, refused) = self.watch(|| self.allocator.shrink());
                assert!(shrunk.is_ok() || refused, "shrinking failed: {shrunk:?}");
                if shrunk.is_ok() {
                    self.parked = 0;
                }
            }
            Step::Teardown => self.teardown(),
            Step::InterruptsOff(during) if depth < DEPTH => {
                let off = InterruptsOff::new(self.mock);
                self.turns(turns, usize::from(during), depth + 1);
                self.mock.on_cpu(cpu);
                drop(off);
            }
            Step::InterruptsOff(_) => {}
            Step::Refuse(nth) => self.mock.refuse(usize::from(nth)),
        }
    }

    /// Ends the use of windows, if there are none, and begins it again.
    fn teardown(&self) {
        let mut live = [0; MAX_CPUS];
        self.busy.iter().filter_map(|busy| busy.window).for_each(|cpu| live[cpu] += 1);
        let mermap = self.allocator.mermap();
        if let Err(leaks) = mermap.teardown() {
            assert_eq!(leaks, Leaks(live), "windows that are left");
            assert!(mermap.ready());
            return;
        }
        assert_eq!(live, [0; MAX_CPUS], "windows that are left were overlooked");
        let frame = FrameRange::single(self.mock.layout.zone_frames().start());
        assert_eq!(mermap.get(frame, Protection::READ).err(), Some(MermapError::NotReady));
        assert_eq!((mermap.prepare(), mermap.ready()), (Ok(()), true));
    }

    /// Whether a shootdown by this CPU would dead-lock.
    fn must_not_block(&self) -> bool {
        self.mock.state().interrupts_off[self.mock.cpu()]
    }

    /// Does `body`; says whether the host refused something meanwhile.
    fn watch<T>(&self, body: impl FnOnce() -> T) -> (T, bool) {
        let pending = self.mock.state().refuse.is_some();
        let result = body();
        (result, pending && self.mock.state().refuse.is_none())
    }

    /// Windows of this CPU that are in use.
    fn windows(&self) -> usize {
        let cpu = self.mock.cpu();
        self.busy.iter().filter(|busy| busy.window == Some(cpu)).count()
    }

    /// Takes an allocation out of those that are held.
    fn take(&mut self, which: u8) -> Option<Held<'r, 'a>> {
        let count = self.held.len();
        (count > 0).then(|| self.held.swap_remove(usize::from(which) % count))
    }
}

impl Drop for History<'_, '_> {
    fn drop(&mut self) {
        // After a difference was found nothing more is done with the allocator.
        if std::thread::panicking() {
            self.held.drain(..).for_each(|held| core::mem::forget(held.owner));
        }
    }
}

#[cfg(test)]
mod tests;
