//! Carries out random histories and compares the allocator, the machine and a plain model after
//! every step: no page is handed out twice or lost, each has the freetype, the contents and the
//! mapping that it should have, and the counters say so.

use super::Mock;
use super::step::{Setup, Step, Turn, Use, decode};
use crate::alloc::{AllocError, PageAllocator, Request};
use crate::convert::ConvertError;
use crate::counters::Pages;
use crate::freetype::{Freetype, Migratetype};
use crate::handle::BadHandle;
use crate::mapped::MappedPages;
use crate::mermap::{Leaks, MermapError, PAGES, Protection};
use crate::meta::MAX_ORDER;
use crate::platform::{InterruptsOff, Platform};
use crate::secret::{Access, SecretPages, SecretWindow, UseError};
use crate::zone::BLOCK_PAGES;
use lacuna_abi::MAX_CPUS;
use lacuna_abi::addr::{BLOCK_FRAMES, FrameRange, PAGE_SIZE};
use lacuna_abi::layout::SCRATCH;
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

    fn alloc(&mut self, request: Request, secret: bool) {
        let allocator = self.allocator;
        let (result, refused) = self.watch(|| {
            if secret {
                allocator.alloc_secret(request).map(Owner::Secret)
            } else {
                allocator.alloc_mapped(request).map(Owner::Mapped)
            }
        });
        let owner = match result {
            Ok(owner) => owner,
            Err(error) => return self.denied(request, secret, error, refused),
        };
        let frames = owner.frames();
        assert_eq!(frames.count(), 1 << request.order, "the size of {frames}");
        assert!(frames.start().0.is_multiple_of(frames.count()), "{frames} is not aligned");
        assert!(self.mock.layout.zone_frames().contains_range(frames), "{frames}");
        if request.zero {
            let state = self.mock.state();
            let zero = |frame| state.frame(frame).contents.is_zero();
            assert!(frames.iter().all(zero), "{frames} is handed out as zero and is not");
        }
        self.made[0] += 1;
        self.made[1] += u64::from(secret);
        let fill = request.zero.then_some(0);
        let pages = std::vec![Page { fill, words: Vec::new() }; 1 << request.order];
        let Request { order, migratetype, .. } = request;
        let held = Held { owner, order, migratetype, pages, unsealed: false, converted: false };
        self.held.push(held);
    }

    /// Judges a request that failed.
    fn denied(&self, request: Request, secret: bool, error: AllocError, refused: bool) {
        let Request { order, .. } = request;
        let noblock = request.noblock || self.must_not_block();
        let allowed = match error {
            AllocError::BadOrder => order > MAX_ORDER,
            AllocError::Gate(_) => refused,
            AllocError::Window(_) => self.windows() > 0,
            AllocError::WouldBlock => secret && noblock,
            AllocError::NoMemory => !(secret && noblock),
            AllocError::NoBlock => secret && !noblock,
            AllocError::Corrupted { .. } => false,
        };
        assert!(allowed, "{request:?}, secret: {secret}, failed with {error:?}");
        let short = matches!(error, AllocError::NoMemory | AllocError::NoBlock);
        if !short || noblock || refused || self.allocator.config.min_free != Some(0) {
            return;
        }
        // Who may wait is only refused when nothing is left that could serve.
        let counters = self.allocator.counters();
        let free = if secret { counters.nr_free_unmapped } else { counters.nr_free_mapped };
        assert!(order > 0 || free == 0, "{error:?} with {free} free pages");
        if order <= 9 && (!secret || self.allocator.config.flip) {
            assert_eq!(counters.nr_fresh, 0, "{error:?} with fresh memory");
            let map = &self.allocator.map;
            let zone = self.allocator.zone();
            let whole = |block: &u32| zone.is_free(map, *block);
            let found = (0..map.len()).step_by(BLOCK_PAGES as usize).find(whole);
            assert_eq!(found, None, "{error:?} with a wholly free pageblock");
        }
    }

    fn free(&mut self, held: Held<'r, 'a>) {
        let secret = matches!(held.owner, Owner::Secret(_));
        self.freed[0] += 1;
        self.freed[1] += u64::from(secret && !held.converted);
        if held.converted {
            self.parked += 1 << held.order;
        }
        let open = held.unsealed;
        drop(held.owner);
        if open {
            // It is freed while it is open, and withheld.
            let reported = self.mock.violations();
            assert!(reported.iter().all(|v| v.starts_with("second-stage-open")), "{reported:?}");
        }
    }

    /// Has an allocation change sides where it is: secret pages keep what the mapped ones held, and
    /// come back zero.
    fn convert(&mut self, held: Held<'r, 'a>) {
        let (order, was_converted, unsealed) = (held.order, held.converted, held.unsealed);
        let Held { owner, mut pages, .. } = held;
        let (result, refused) = self.watch(|| match owner {
            Owner::Mapped(owner) => match owner.into_secret() {
                Ok(owner) => (Owner::Secret(owner), Ok(true)),
                Err((owner, error)) => (Owner::Mapped(owner), Err(error)),
            },
            Owner::Secret(owner) => match owner.into_mapped() {
                Ok(owner) => (Owner::Mapped(owner), Ok(false)),
                Err((owner, error)) => (Owner::Secret(owner), Err(error)),
            },
        });
        let (owner, result) = result;
        let blocked = self.must_not_block();
        let mut held = Held { owner, order, pages: Vec::new(), ..held };
        match result {
            Ok(secret) => {
                assert!(order < 9 && !blocked, "order {order}, interrupts off: {blocked}");
                held.converted = secret;
            }
            Err(error) => {
                let allowed = match error {
                    ConvertError::TooLarge => order >= 9,
                    ConvertError::NoTable => false,
                    ConvertError::WouldBlock => blocked,
                    ConvertError::NotConverted => !was_converted,
                    ConvertError::LeftOpen => unsealed,
                    ConvertError::Gate(_) => refused,
                    ConvertError::Use(UseError::Window(_)) => self.windows() > 0,
                    ConvertError::Use(error) => {
                        held.unsealed |= matches!(error, UseError::Unsealed(_));
                        refused
                    }
                };
                assert!(allowed, "order {order}, converted: {was_converted}: {error:?}");
            }
        }
        // On the way back they are scrubbed; when that fails, some of them.
        match result {
            Ok(false) => pages.fill(Page { fill: Some(0), words: Vec::new() }),
            Err(ConvertError::Use(_)) => pages.fill(Page::default()),
            Ok(true) | Err(_) => {}
        }
        held.pages = pages;
        self.held.push(held);
    }

    /// The pages of an allocation that a step uses, as first and number.
    fn part(held: &Held<'_, '_>, what: Use) -> (u64, u64) {
        let size = 1_u64 << held.order;
        let first = u64::from(what.first) % size;
        let count = u64::from(what.count) % size;
        if count == 0 { (0, size) } else { (first, count.min(size - first)) }
    }

    fn use_mapped(
        &mut self,
        held: &mut Held<'r, 'a>,
        what: Use,
        within: &mut dyn FnMut(&mut Self),
    ) {
        let Owner::Mapped(owner) = &held.owner else { return };
        let (first, count) = Self::part(held, what);
        let pinned = owner.pin();
        let frames = pinned.frames();
        let offset = first * PAGE_SIZE;
        let count = if what.other { 1 } else { count };
        let part = FrameRange::new(frames.start().wrapping_add(first), count);
        let part = part.unwrap_or(frames);
        let mermap = self.allocator.mermap();
        let mapping = if what.other {
            let off = InterruptsOff::new(self.allocator.platform);
            Some(mermap.get_reserved(part.start(), Protection::READ_WRITE, off))
        } else {
            what.special.then(|| mermap.get(part, Protection::READ_WRITE))
        };
        if let Some(Err(error)) = &mapping {
            self.excuse(*error, part);
        }
        let mapping = mapping.and_then(Result::ok);
        let window = mapping.is_some().then(|| self.mock.cpu());
        let va = mapping.as_ref().map_or(pinned.va().wrapping_add(offset), |mapping| mapping.va());
        let mock = self.mock;
        self.look(&held.pages, first, count, |at| mock.load(va.wrapping_add(at)));
        if what.write {
            let (at, tag) = self.next_word(count);
            mock.store(va.wrapping_add(at), tag);
            set(&mut held.pages, offset + at, tag);
        }
        self.busy.push(Busy { frames, handle: owner.handle(), secret: false, window });
        within(self);
        self.busy.pop();
        assert_eq!(owner.frames(), frames, "pinned pages were moved");
        self.look(&held.pages, first, count, |at| mock.load(va.wrapping_add(at)));
    }

    fn use_secret(
        &mut self,
        held: &mut Held<'r, 'a>,
        what: Use,
        within: &mut dyn FnMut(&mut Self),
    ) {
        let Owner::Secret(owner) = &held.owner else { return };
        let (first, count) = Self::part(held, what);
        let access = if what.write { Access::Write } else { Access::Read };
        let frames = owner.frames();
        let (result, refused) = self.watch(|| owner.open(first, count, access));
        let window = match result {
            Ok(window) => window,
            Err(UseError::Window(error)) => {
                let start = frames.start().wrapping_add(first);
                return self.excuse(error, FrameRange::new(start, count).unwrap_or(frames));
            }
            Err(error) => {
                assert!(refused, "opening {count} pages failed with {error:?}");
                held.unsealed |= matches!(error, UseError::Unsealed(_));
                return;
            }
        };
        let load = |at| window.load(at).unwrap_or_else(|error| panic!("load: {error:?}"));
        self.look(&held.pages, first, count, load);
        let offset = first * PAGE_SIZE;
        if what.write {
            if what.special {
                window.zero().unwrap_or_else(|error| panic!("zero: {error:?}"));
                let zero = Page { fill: Some(0), words: Vec::new() };
                held.pages[first as usize..(first + count) as usize].fill(zero);
            }
            let (at, tag) = self.next_word(count);
            window.store(at, tag).unwrap_or_else(|error| panic!("store: {error:?}"));
            set(&mut held.pages, offset + at, tag);
            if what.other {
                self.copy(&mut held.pages, &window, first, count);
            }
        } else {
            assert_eq!(window.store(0, 0), Err(UseError::ReadOnly));
            assert_eq!(window.copy_from(SCRATCH, 0, 8), Err(UseError::ReadOnly));
        }
        assert_eq!(window.load(count * PAGE_SIZE), Err(UseError::OutOfRange));
        let cpu = Some(self.mock.cpu());
        self.busy.push(Busy { frames, handle: owner.handle(), secret: true, window: cpu });
        within(self);
        self.busy.pop();
        self.look(&held.pages, first, count, load);
        let (closed, refused) = self.watch(|| window.close());
        assert_eq!(closed.is_err(), refused, "closing a window: {closed:?}");
        held.unsealed |= refused;
    }

    /// Copies words to a window and compares them.
    fn copy(
        &mut self,
        pages: &mut [Page],
        window: &SecretWindow<'_, '_, Mock>,
        first: u64,
        count: u64,
    ) {
        let (at, tag) = self.next_word(count);
        let at = at.min(count * PAGE_SIZE - COPIED);
        for word in (0..COPIED).step_by(8) {
            self.mock.store(SCRATCH.wrapping_add(word), tag << 8 | word);
            set(pages, first * PAGE_SIZE + at + word, tag << 8 | word);
        }
        assert_eq!(window.copy_from(SCRATCH, at, COPIED), Ok(()));
        assert_eq!(window.equals(SCRATCH, at, COPIED), Ok(true));
        self.mock.store(SCRATCH.wrapping_add(COPIED - 8), 0);
        assert_eq!(window.equals(SCRATCH, at, COPIED), Ok(false));
        assert_eq!(window.equals(SCRATCH, at, COPIED - 8), Ok(true));
    }

    /// Judges frames that no window was had for.
    fn excuse(&self, error: MermapError, frames: FrameRange) {
        let block =
            frames.count() == BLOCK_FRAMES && frames.start() == frames.start().block_start();
        let never = frames.count() > PAGES && !block;
        let full = self.windows() > 0
            && matches!(
                error,
                MermapError::NoSlot | MermapError::NoSpace | MermapError::ReserveInUse
            );
        assert!(full || never && error == MermapError::NoSpace, "no window on {frames}: {error:?}");
    }

    /// The next word to store, and where in `pages` pages.
    fn next_word(&mut self, pages: u64) -> (u64, u64) {
        self.tag += 1;
        let word = self.tag.wrapping_mul(0x9e37_79b9_7f4a_7c15) % (pages * PAGE_SIZE / 8);
        (8 * word, self.tag)
    }

    /// Compares pages with the model: the first and the last words, and those that were stored.
    fn look(&self, pages: &[Page], first: u64, count: u64, load: impl Fn(u64) -> u64) {
        for (number, page) in (0..count).zip(&pages[first as usize..]) {
            let words = page.words.iter().map(|(at, _)| *at);
            let ends = if number < LOOKS { &[0, PAGE_SIZE - 8][..] } else { &[] };
            for at in words.chain(ends.iter().copied()) {
                let stored = page.words.iter().find(|(place, _)| *place == at).map(|(_, w)| *w);
                let Some(expected) = stored.or(page.fill) else { continue };
                let found = load(number * PAGE_SIZE + at);
                assert_eq!(found, expected, "what page {} holds at {at:#x}", first + number);
            }
        }
    }

    fn renew(&mut self, held: Held<'r, 'a>) {
        let on = self.allocator;
        let old = held.owner.handle();
        let owner = match held.owner {
            Owner::Mapped(owner) => {
                assert_eq!(owner.into_raw(), old);
                assert_eq!(SecretPages::from_raw(on, old).err(), Some(BadHandle(old)));
                MappedPages::from_raw(on, old).map(Owner::Mapped)
            }
            Owner::Secret(owner) => {
                assert_eq!(owner.into_raw(), old);
                assert_eq!(MappedPages::from_raw(on, old).err(), Some(BadHandle(old)));
                SecretPages::from_raw(on, old).map(Owner::Secret)
            }
        };
        let owner = owner.unwrap_or_else(|bad| panic!("a handle leads nowhere: {bad:?}"));
        self.held.push(Held { owner, ..held });
        self.forge(old);
    }

    /// All allocations have owners, so that no word is a handle: neither this one, nor what an owner
    /// would give.
    fn forge(&self, word: u64) {
        let owned = self
            .held
            .iter()
            .map(|held| held.owner.handle())
            .chain(self.busy.iter().map(|busy| busy.handle));
        for word in owned.chain([word]) {
            let mapped = MappedPages::from_raw(self.allocator, word).map(MappedPages::into_raw);
            let secret = SecretPages::from_raw(self.allocator, word).map(SecretPages::into_raw);
            assert_eq!([mapped, secret], [Err(BadHandle(word)); 2], "two owners");
        }
    }

    /// Compares everything but contents.
    fn check(&self) {
        let violations = self.mock.violations();
        assert!(violations.is_empty(), "{violations:#?}");
        let map = self.mock.map();
        let held =
            self.held.iter().map(|h| (h.owner.frames(), matches!(h.owner, Owner::Secret(_))));
        let busy = self.busy.iter().map(|busy| (busy.frames, busy.secret));
        let mut all: Vec<_> = held.chain(busy).collect();
        all.sort_unstable_by_key(|(frames, _)| frames.start());
        for pair in all.windows(2) {
            let apart = pair[0].0.end() <= pair[1].0.start();
            assert!(apart, "{} and {} overlap", pair[0].0, pair[1].0);
        }
        for (frames, secret) in &all {
            assert_eq!(self.mock.in_direct_map(*frames), !secret, "the mapping of {frames}");
        }
        for held in &self.held {
            let frames = held.owner.frames();
            let index = (frames.start().0 - map.zone().start().0) as u32;
            let secret = matches!(held.owner, Owner::Secret(_));
            let freetype = Freetype { migratetype: held.migratetype, unmapped: secret };
            assert_eq!(
                map.page(index).allocation(),
                Some((held.order, freetype)),
                "the kind of {frames}"
            );
            let unmapped = secret && !held.converted;
            let blocks = frames.by_block().map(|part| map.part(part).0);
            assert!(blocks.into_iter().all(|block| block.freetype().unmapped == unmapped));
        }
        let counters = self.allocator.counters();
        let made = [counters.alloc, counters.alloc_secret];
        let freed = [counters.free, counters.free_secret];
        assert_eq!((made, freed), (self.made, self.freed), "requests and frees, secret ones");
        let allocated: u64 = all.iter().map(|(frames, _)| frames.count()).sum();
        let kept = allocated + counters.nr_withheld;
        let parked = kept..=kept + self.parked;
        assert!(
            parked.contains(&counters.nr_allocated),
            "{} allocated pages, expected {parked:?}",
            counters.nr_allocated
        );
        assert_eq!(counters.splits - counters.merges, counters.nr_table_pages, "tables in use");
        assert_eq!(counters.nr_table_pages, self.mock.state().live_tables() as u64, "tables");
        let free = counters.nr_free_mapped + counters.nr_free_unmapped;
        let total = free + counters.nr_allocated + counters.nr_fresh;
        assert_eq!(total, map.zone().count(), "pages that are somewhere");
        let (pages, _) = self.allocator.pages();
        assert!(pages.iter().all(Pages::adds_up), "{pages:?}");
        self.allocator.zone().check(&map);
    }

    /// Gives everything back: nothing may be left.
    fn end(mut self) {
        self.mock.on_cpu(0);
        self.mock.state().refuse = None;
        while let Some(mut held) = self.take(0) {
            let what = Use {
                which: 0,
                first: 0,
                count: 1,
                write: false,
                special: false,
                other: false,
                during: 0,
            };
            match held.owner {
                Owner::Mapped(_) => self.use_mapped(&mut held, what, &mut |_| ()),
                Owner::Secret(_) => self.use_secret(&mut held, what, &mut |_| ()),
            }
            self.free(held);
        }
        let shrunk = self.allocator.shrink();
        assert!(shrunk.is_ok(), "at the end: {shrunk:?}");
        self.parked = 0;
        self.check();
        let counters = self.allocator.counters();
        assert_eq!(counters.nr_allocated, counters.nr_withheld, "allocated at the end");
        assert_eq!(self.allocator.mermap().teardown(), Ok(()));
        let frames = self.mock.layout.zone_frames();
        let state = self.mock.state();
        let hidden = frames.iter().filter(|frame| !state.frame(*frame).direct).count() as u64;
        drop(state);
        // Secret blocks stay where something in them is withheld.
        assert!(hidden == 0 || counters.nr_withheld > 0, "{hidden} frames are still unmapped");
        for cpu in 0..self.mock.layout.cpus {
            assert_eq!(self.mock.state().window_entries(cpu), 0, "CPU {cpu}'s window");
            assert!(!self.mock.state().interrupts_off[cpu], "CPU {cpu}'s interrupts");
        }
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

/// Notes a word that was stored at byte `at` of an allocation.
fn set(pages: &mut [Page], at: u64, word: u64) {
    let page = &mut pages[(at / PAGE_SIZE) as usize];
    page.words.retain(|(place, _)| *place != at % PAGE_SIZE);
    page.words.push((at % PAGE_SIZE, word));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Contents, zero_pages};

    /// What a history says of a slip that `spoil` makes after it took mapped and secret pages.
    fn spoilt(spoil: impl Fn(&mut History<'_, '_>)) {
        with(Setup::new(2, [true, false, false, false, false]), |history| {
            let alloc = |secret| Turn { cpu: 0, step: Step::Alloc(zero_pages(1), secret) };
            history.turns(&mut [alloc(false), alloc(true)].into_iter(), 2, 0);
            spoil(history);
            history.check();
        });
    }

    /// A second owner of the first allocation, as if that one had been given up.
    fn second_owner<'r, 'a>(history: &History<'r, 'a>) -> MappedPages<'r, 'a, Mock> {
        let handle = history.held[0].owner.handle();
        let slot = (handle & 0xffff_ffff) as u32 - 1;
        let record = history.allocator.map.page(slot);
        assert!(record.next_generation(record.generation()));
        MappedPages::from_raw(history.allocator, handle).unwrap()
    }

    #[test]
    fn a_history_without_a_slip_is_fine() {
        spoilt(|_| ());
    }

    #[test]
    #[should_panic(expected = "what page 1 holds at 0x0")]
    fn twin_contents_that_changed_are_seen() {
        spoilt(|history| {
            let frame = history.held[0].owner.frames().start().wrapping_add(1);
            history.mock.state().frame_mut(frame).contents = Contents::DIRTY;
            let what = Use {
                which: 0,
                first: 0,
                count: 0,
                write: false,
                special: false,
                other: false,
                during: 0,
            };
            history.turns(&mut [Turn { cpu: 1, step: Step::Use(what) }].into_iter(), 1, 0);
        });
    }

    #[test]
    #[should_panic(expected = "allocated pages")]
    fn twin_pages_that_are_lost_are_missed() {
        spoilt(|history| {
            let held = history.held.swap_remove(1);
            core::mem::forget(held.owner);
        });
    }

    #[test]
    #[should_panic(expected = "the kind of")]
    fn twin_pages_that_are_freed_under_their_owner_are_missed() {
        spoilt(|history| {
            drop(second_owner(history));
        });
    }

    #[test]
    #[should_panic(expected = "overlap")]
    fn twin_two_owners_of_the_same_pages_are_seen() {
        spoilt(|history| {
            let owner = second_owner(history);
            let Held { order, migratetype, pages, unsealed, converted, .. } = &history.held[0];
            let twin = Held {
                owner: Owner::Mapped(owner),
                order: *order,
                migratetype: *migratetype,
                pages: pages.clone(),
                unsealed: *unsealed,
                converted: *converted,
            };
            history.held.push(twin);
        });
    }

    #[test]
    #[should_panic(expected = "the mapping of")]
    fn twin_secret_pages_that_are_mapped_are_seen() {
        spoilt(|history| {
            let frames = history.held[1].owner.frames();
            frames.iter().for_each(|frame| history.mock.state().frame_mut(frame).direct = true);
        });
    }
}
