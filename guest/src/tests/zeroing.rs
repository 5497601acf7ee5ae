//! Zeroing: exactly the pages that were asked for, through whatever window there is.

use crate::alloc::PageAllocator;
use crate::mermap::Protection;
use crate::testing::{Mock, Seen, pages, zero_pages};
use crate::zeroing::Purpose;
use lacuna_abi::addr::{FrameRange, Gfn};
use lacuna_abi::gate::OpKind;
use std::vec::Vec;

/// The first `count` frames of the zone, secret and sealed, but not known to be zero.
fn sealed(mock: &Mock, allocator: &PageAllocator<'_, Mock>, count: u64) -> FrameRange {
    let secret = allocator.alloc_secret(pages(10)).unwrap();
    let all = secret.frames();
    secret.into_raw();
    mock.seen();
    FrameRange::new(all.start(), count).unwrap()
}

fn zeroed(mock: &Mock) -> Vec<(u64, u64)> {
    let start = mock.layout.zone_frames().start().0;
    let zero = |seen| if let Seen::Zero(frames) = seen { Some(frames) } else { None };
    let runs = mock.seen().into_iter().filter_map(zero);
    runs.map(|frames| (frames.start().0 - start, frames.count())).collect()
}

fn is_zero(mock: &Mock, index: u64) -> bool {
    let start = mock.layout.zone_frames().start().0;
    mock.state().frame(Gfn(start + index)).contents.is_zero()
}

#[test]
fn every_pageblock_gets_exactly_its_own_pages() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator_with(false);
    let all = sealed(&mock, &allocator, 1024);
    // From inside the first block to inside the second: neither the rest of the run nor a
    // wrapped-around count reaches any other page.
    let run = FrameRange::new(Gfn(all.start().0 + 500), 100).unwrap();
    allocator.zero_unknown(run, Purpose::Scrub).unwrap();
    assert_eq!(zeroed(&mock), [(500, 12), (512, 88)]);
    for index in 0..1024 {
        assert_eq!(is_zero(&mock, index), (500..600).contains(&index), "page {index}");
    }
    assert!(mock.map().is_known(run));
    assert_eq!(allocator.counters().zeroed_scrub, 100);
}

#[test]
fn two_whole_blocks_take_one_window_each() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator_with(false);
    let all = sealed(&mock, &allocator, 1024);
    allocator.zero_unknown(all, Purpose::HandOut).unwrap();
    assert_eq!(zeroed(&mock), [(0, 512), (512, 512)]);
    let counters = allocator.counters();
    assert_eq!((counters.zeroed_alloc, counters.windows, counters.windows_reserved), (1024, 2, 0));
}

#[test]
fn pages_known_to_be_zero_are_neither_opened_nor_touched() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator_with(false);
    let all = sealed(&mock, &allocator, 8);
    let known = FrameRange::new(Gfn(all.start().0 + 2), 3).unwrap();
    mock.map().set_known(known, true);
    allocator.zero_unknown(all, Purpose::Scrub).unwrap();
    let opened = |seen: &Seen| match seen {
        Seen::Gate(OpKind::Open, frames) => {
            Some((frames.start().0 - all.start().0, frames.count()))
        }
        _ => None,
    };
    let seen = mock.seen();
    assert_eq!(seen.iter().filter_map(opened).collect::<Vec<_>>(), [(0, 2), (5, 3)]);
    assert!(!is_zero(&mock, 2), "what is believed to be zero is left alone");
    assert!(is_zero(&mock, 1) && is_zero(&mock, 5));
}

#[test]
fn without_a_window_the_reserve_goes_page_by_page_with_interrupts_on_in_between() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator_with(false);
    let run = sealed(&mock, &allocator, 5);
    let other = FrameRange::new(Gfn(run.start().0 + 2048), 1).unwrap();
    let _slots: Vec<_> =
        (0..4).map(|_| allocator.mermap().get(other, Protection::READ).unwrap()).collect();
    mock.seen();
    allocator.zero_unknown(run, Purpose::Scrub).unwrap();
    assert_eq!(zeroed(&mock), [(0, 1), (1, 1), (2, 1), (3, 1), (4, 1)]);
    assert_eq!(allocator.counters().windows_reserved, 5);
    assert!(!mock.state().interrupts_off[0]);
}

#[test]
fn one_use_is_open_map_zero_unmap_seal() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator_with(false);
    let run = sealed(&mock, &allocator, 3);
    allocator.zero_unknown(run, Purpose::Scrub).unwrap();
    let steps: Vec<_> = mock.seen();
    let [open, map, zero, unmap, seal] = steps[..] else { panic!("{steps:?}") };
    assert_eq!(open, Seen::Gate(OpKind::Open, run));
    assert!(matches!(map, Seen::Write(w) if w.new.is_present() && w.count == 3));
    assert_eq!(zero, Seen::Zero(run));
    assert!(matches!(unmap, Seen::Write(w) if !w.new.is_present() && w.count == 3));
    assert_eq!(seal, Seen::Gate(OpKind::Seal, run));
}

#[test]
fn pages_handed_out_as_zero_are_zero_with_and_without_zeroing_ahead() {
    for prezero in [true, false] {
        let mock = Mock::new(16, 1);
        let allocator = mock.allocator_with(prezero);
        for order in [0, 3, 9, 10] {
            let secret = allocator.alloc_secret(zero_pages(order)).unwrap();
            let frames = secret.frames();
            assert!(frames.iter().all(|f| mock.state().frame(f).contents.is_zero()), "{order}");
        }
        let counters = allocator.counters();
        if prezero {
            assert_eq!((counters.zeroed_flip, counters.zeroed_alloc), (1536, 0));
        } else {
            // Freed pages were scrubbed, so that hand-out zeroes only what never was used.
            assert_eq!((counters.zeroed_flip, counters.zeroed_alloc), (0, 1 + 7 + 504 + 1024));
        }
    }
}
