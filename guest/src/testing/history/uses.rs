//! Steps that use the pages of an allocation, and what the model says that they find.

use super::{Busy, COPIED, Held, History, LOOKS, Owner, Page};
use crate::mermap::{MermapError, PAGES, Protection};
use crate::platform::{InterruptsOff, Platform};
use crate::secret::{Access, SecretWindow, UseError};
use crate::testing::Mock;
use crate::testing::step::Use;
use lacuna_abi::addr::{BLOCK_FRAMES, FrameRange, PAGE_SIZE};
use lacuna_abi::layout::SCRATCH;
use std::vec::Vec;

impl<'r, 'a> History<'r, 'a> {
    /// The pages of an allocation that a step uses, as first and number.
    pub(super) fn part(held: &Held<'_, '_>, what: Use) -> (u64, u64) {
        let size = 1_u64 << held.order;
        let first = u64::from(what.first) % size;
        let count = u64::from(what.count) % size;
        if count == 0 { (0, size) } else { (first, count.min(size - first)) }
    }

    pub(super) fn use_mapped(
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

    pub(super) fn use_secret(
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
    pub(super) fn copy(
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
    pub(super) fn excuse(&self, error: MermapError, frames: FrameRange) {
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
    pub(super) fn next_word(&mut self, pages: u64) -> (u64, u64) {
        self.tag += 1;
        let word = self.tag.wrapping_mul(0x9e37_79b9_7f4a_7c15) % (pages * PAGE_SIZE / 8);
        (8 * word, self.tag)
    }

    /// Compares pages with the model: the first and the last words, and those that were stored.
    pub(super) fn look(&self, pages: &[Page], first: u64, count: u64, load: impl Fn(u64) -> u64) {
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
}

/// Notes a word that was stored at byte `at` of an allocation.
pub(super) fn set(pages: &mut [Page], at: u64, word: u64) {
    let page = &mut pages[(at / PAGE_SIZE) as usize];
    page.words.retain(|(place, _)| *place != at % PAGE_SIZE);
    page.words.push((at % PAGE_SIZE, word));
}
