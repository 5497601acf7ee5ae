//! Tests that run in the guest itself, on every machine: what the tests of the Linux series assert
//! and more, and one for each fault that was found in it. A test that fails panics.
//!
//! Each runs on an allocator that nobody used before. Tests that need several CPUs run on all of
//! them; in the others CPU 0 is alone.

mod mermap;
mod page_alloc;
mod regression;

use crate::alloc::{PageAllocator, Request};
use crate::freetype::Migratetype;
use crate::mermap::{Mapping, MermapError, Protection};
use crate::platform::{InterruptsOff, Platform};
use crate::programs::Team;
use crate::secret::{Access, SecretPages};
use crate::space;
use lacuna_abi::addr::{FrameRange, Gfn, Gva, PAGE_SIZE};
use lacuna_abi::gate::OpKind;
use lacuna_abi::layout::{Layout, SCRATCH, direct_map};
use lacuna_abi::paging::Level;
use lacuna_abi::walk;
use lacuna_abi::workload::Selftest;

/// What a test works with.
struct Bench<'r, 'a, P: Platform> {
    allocator: &'r PageAllocator<'a, P>,
    platform: &'r P,
    layout: &'r Layout,
    team: &'r Team,
}

/// Runs a test on this CPU, of `operations` operations if it counts such; 0 for its own number.
///
/// # Panics
/// If the test fails.
pub(crate) fn run<'a, P: Platform>(
    test: Selftest,
    operations: u64,
    allocator: &PageAllocator<'a, P>,
    platform: &P,
    team: &Team,
) {
    let bench = Bench { allocator, platform, layout: &allocator.layout, team };
    if test.cpus() > 1 {
        assert!(platform.cpus() >= test.cpus(), "{} needs {} CPUs", test.name(), test.cpus());
    } else if platform.cpu() != 0 {
        return;
    }
    match test {
        Selftest::MermapBasicAlloc => mermap::basic_alloc(&bench),
        Selftest::MermapSize => mermap::size(&bench),
        Selftest::MermapMultipleAllocs => mermap::multiple_allocs(&bench),
        Selftest::MermapTlbFlushed => mermap::tlb_flushed(&bench),
        Selftest::PageAllocAllocMapUnmap => page_alloc::alloc_map_unmap(&bench),
        Selftest::PageAllocPindexHelpers => page_alloc::pindex_helpers(),
        Selftest::PageAllocFreetypeIdx => page_alloc::freetype_idx(),
        Selftest::PageAllocStressInterleaved => page_alloc::stress_interleaved(&bench, operations),
        Selftest::Series01 => regression::series_01(&bench),
        Selftest::Series02 => regression::series_02(&bench),
        Selftest::Series03 => regression::series_03(&bench),
        Selftest::Series04 => regression::series_04(&bench),
        Selftest::Series05 => regression::series_05(&bench),
        Selftest::Series06 => regression::series_06(&bench),
        Selftest::Series07 => regression::series_07(&bench),
        Selftest::Series08 => regression::series_08(&bench),
        Selftest::Series09 => regression::series_09(&bench),
        Selftest::Series10 => regression::series_10(&bench),
        Selftest::Series11 => regression::series_11(&bench),
        Selftest::Series12 => regression::series_12(&bench),
    }
}

/// 2^`order` unmovable pages, contents undefined, may block.
const fn pages(order: u8) -> Request {
    Request { order, migratetype: Migratetype::Unmovable, zero: false, noblock: false }
}

/// As [`pages`], but zero.
const fn zero_pages(order: u8) -> Request {
    Request { zero: true, ..pages(order) }
}

/// The value, or a panic that names the error.
fn ok<T, E: core::fmt::Debug>(result: Result<T, E>) -> T {
    match result {
        Ok(value) => value,
        Err(error) => panic!("{error:?}"),
    }
}

/// What a page of a test holds: different for each page.
const fn magic(frame: Gfn) -> u64 {
    frame.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

/// Word `number` of scratch memory.
const fn scratch(number: u64) -> Gva {
    SCRATCH.wrapping_add(8 * number)
}

impl<'r, 'a, P: Platform> Bench<'r, 'a, P> {
    /// Opens secret frames for this CPU, has `body` use them, seals them.
    fn with_open<R>(&self, frames: FrameRange, body: impl FnOnce() -> R) -> R {
        ok(self.platform.gate(&[(OpKind::Open, frames)]));
        // They are written to behind the back of their owner.
        self.allocator.map.set_known(frames, false);
        let result = body();
        ok(self.platform.gate(&[(OpKind::Seal, frames)]));
        result
    }

    /// Maps open frames in this CPU's window.
    fn get(&self, frames: FrameRange) -> Result<Mapping<'r, 'a, P>, MermapError> {
        self.allocator.mermap().get(frames, Protection::READ_WRITE)
    }

    /// Maps an open frame through this CPU's reserve.
    fn get_reserved(&self, frame: Gfn) -> Result<Mapping<'r, 'a, P>, MermapError> {
        let off = InterruptsOff::new(self.allocator.platform);
        self.allocator.mermap().get_reserved(frame, Protection::READ_WRITE, off)
    }

    /// Stores a word that differs from page to page in each page of a mapping.
    fn mark(&self, mapping: &Mapping<'_, '_, P>) {
        for (page, frame) in (0..).zip(mapping.frames().iter()) {
            self.platform.store(mapping.va().wrapping_add(page * PAGE_SIZE + 8), magic(frame));
        }
    }

    /// Checks what [`Self::mark`] stored, from anywhere in the zone.
    fn check(&self, mapping: &Mapping<'_, '_, P>) {
        for (page, frame) in (0..).zip(mapping.frames().iter()) {
            let found = self.platform.load(mapping.va().wrapping_add(page * PAGE_SIZE + 8));
            assert_eq!(found, magic(frame), "the page at {frame}");
        }
    }

    /// Stores a word that differs from page to page in secret pages, 64 pages at a time.
    fn mark_secret(&self, pages: &SecretPages<'_, 'a, P>) {
        self.each_part(pages, Access::Write, |window, page, frame| {
            ok(window.store(page * PAGE_SIZE + 8, magic(frame)));
        });
    }

    /// Checks what [`Self::mark_secret`] stored.
    fn check_secret(&self, pages: &SecretPages<'_, 'a, P>) {
        self.each_part(pages, Access::Read, |window, page, frame| {
            assert_eq!(ok(window.load(page * PAGE_SIZE + 8)), magic(frame), "the page at {frame}");
        });
    }

    fn each_part(
        &self,
        pages: &SecretPages<'_, 'a, P>,
        access: Access,
        body: impl Fn(&crate::secret::SecretWindow<'_, 'a, P>, u64, Gfn),
    ) {
        let count = pages.frames().count();
        let mut first = 0;
        while first < count {
            let part = (count - first).min(64);
            let window = ok(pages.open(first, part, access));
            for (page, frame) in (0..).zip(window.frames().iter()) {
                body(&window, page, frame);
            }
            ok(window.close());
            first += part;
        }
    }

    /// Whether the direct map shows the frame.
    fn in_direct_map(&self, frame: Gfn) -> bool {
        let read = |at| self.layout.pool.contains(at).then(|| self.platform.read_entry(at));
        walk::translate(&read, self.platform.space().root, direct_map(frame.gpa())).is_ok()
    }

    /// Present entries in the window of this CPU, the 4 KiB part and the 2 MiB part.
    fn window_entries(&self) -> usize {
        use lacuna_abi::layout::{WINDOW_LARGE_OFFSET, WINDOW_LARGE_SLOTS, WINDOW_PAGES, window};
        let start = window(self.platform.cpu());
        let parts = [
            (start, Level::Pt, WINDOW_PAGES),
            (start.wrapping_add(WINDOW_LARGE_OFFSET), Level::Pd, WINDOW_LARGE_SLOTS),
        ];
        let count = |(va, level, entries): (Gva, Level, u64)| {
            let at = ok(space::locate(self.platform, &self.layout.pool, va, level));
            (0..entries)
                .filter(|index| self.platform.read_entry(at.wrapping_add(8 * index)).is_present())
                .count()
        };
        parts.map(count).iter().sum()
    }

    /// Whether interrupts are on.
    fn interrupts_are_on(&self) -> bool {
        let were_on = self.platform.interrupts_off();
        self.platform.interrupts_restore(were_on);
        were_on
    }

    /// All CPUs come here before any goes on.
    fn barrier(&self) {
        ok(self.team.barrier(self.platform));
    }
}
