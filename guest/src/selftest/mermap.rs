//! The windows.

use super::{Bench, magic, ok, pages};
use crate::mermap::{MermapError, PAGES, SLOTS};
use crate::platform::Platform;
use lacuna_abi::addr::{FrameRange, Gfn, PAGE_SIZE};
use lacuna_abi::layout::window;

/// A one-page get gives a mapping, which reaches its page.
pub(super) fn basic_alloc<P: Platform>(bench: &Bench<'_, '_, P>) {
    let page = ok(bench.allocator.alloc_secret(pages(0)));
    bench.with_open(page.frames(), || {
        let mapping = ok(bench.get(page.frames()));
        bench.mark(&mapping);
        drop(mapping);
        assert_eq!(bench.window_entries(), 0);
        bench.check(&ok(bench.get(page.frames())));
    });
}

/// The window without its reserve fits and one page more does not; when it is full, the reserve
/// still serves.
pub(super) fn size<P: Platform>(bench: &Bench<'_, '_, P>) {
    let block = ok(bench.allocator.alloc_secret(pages(10)));
    let run = |first: u64, count| {
        let start = block.frames().start().wrapping_add(first);
        FrameRange::new(start, count).unwrap_or_else(|| panic!("no frames at {start}"))
    };
    bench.with_open(block.frames(), || {
        let whole = ok(bench.get(run(1, PAGES)));
        bench.mark(&whole);
        bench.check(&whole);
        drop(whole);
        // Not a whole pageblock, which would go elsewhere.
        assert_eq!(bench.get(run(1, PAGES + 1)).err(), Some(MermapError::NoSpace));

        let almost = ok(bench.get(run(1, PAGES - 1)));
        let last = ok(bench.get(run(600, 1)));
        assert_eq!(bench.get(run(601, 1)).err(), Some(MermapError::NoSpace));
        for page in 0..3 {
            let spare = ok(bench.get_reserved(run(602 + page, 1).start()));
            bench.mark(&spare);
            bench.check(&spare);
        }
        bench.check(&almost);
        bench.mark(&last);
        drop((almost, last));
        assert_eq!(bench.window_entries(), 0);
    });
}

/// All slots hold different pages, each reads its own, and all lie in this CPU's window.
pub(super) fn multiple_allocs<P: Platform>(bench: &Bench<'_, '_, P>) {
    let block = ok(bench.allocator.alloc_secret(pages(6)));
    let run = |slot: u64| {
        let start = block.frames().start().wrapping_add(10 * slot);
        FrameRange::new(start, slot + 1).unwrap_or_else(|| panic!("no frames at {start}"))
    };
    bench.with_open(block.frames(), || {
        let mappings: [_; SLOTS] = core::array::from_fn(|slot| ok(bench.get(run(slot as u64))));
        for mapping in &mappings {
            let offset = mapping.va().offset_from(window(bench.platform.cpu()));
            let end = offset.map(|start| start + mapping.frames().count() * PAGE_SIZE);
            assert!(end.is_some_and(|end| end <= PAGES * PAGE_SIZE));
            bench.mark(mapping);
        }
        assert_eq!(bench.get(run(SLOTS as u64)).err(), Some(MermapError::NoSlot));
        mappings.iter().for_each(|mapping| bench.check(mapping));
        for (index, mapping) in mappings.iter().enumerate() {
            for other in &mappings[..index] {
                let apart = mapping.va().0.abs_diff(other.va().0);
                assert!(apart >= other.frames().count() * PAGE_SIZE, "two mappings overlap");
            }
        }
    });
}

/// Nothing is flushed before an address is used again, and then once; what is read there is the new
/// page and not the one that was mapped before.
pub(super) fn tlb_flushed<P: Platform>(bench: &Bench<'_, '_, P>) {
    let first = ok(bench.allocator.alloc_secret(pages(0)));
    let other = ok(bench.allocator.alloc_secret(pages(0)));
    let frame = |pages: FrameRange| -> Gfn { pages.start() };
    for page in [&first, &other] {
        bench.with_open(page.frames(), || bench.mark(&ok(bench.get(page.frames()))));
    }
    let start = window(bench.platform.cpu());
    let flushes = || bench.allocator.mermap().counters().flushes;
    let before = flushes();
    // Up to the last address.
    bench.with_open(first.frames(), || {
        loop {
            let mapping = ok(bench.get(first.frames()));
            assert_eq!(flushes(), before, "{} was not used before", mapping.va());
            bench.check(&mapping);
            if mapping.va() == start.wrapping_add((PAGES - 1) * PAGE_SIZE) {
                break;
            }
        }
    });
    bench.with_open(other.frames(), || {
        let mapping = ok(bench.get(other.frames()));
        assert_eq!((mapping.va(), flushes()), (start, before + 1));
        let found = bench.platform.load(mapping.va().wrapping_add(8));
        assert_eq!(found, magic(frame(other.frames())));
        drop(mapping);
        drop(ok(bench.get(other.frames())));
        assert_eq!(flushes(), before + 1, "one flush serves the whole window");
    });
}
