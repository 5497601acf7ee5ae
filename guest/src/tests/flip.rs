//! Flips in both directions: the order of their steps, what they cost, and what a refusal leaves.

use crate::alloc::{AllocConfig, AllocError};
use crate::freetype::Migratetype;
use crate::platform::{CpuSet, Platform};
use crate::secret::Access;
use crate::testing::{EAGER, Mock, Seen, pages, zero_pages};
use lacuna_abi::addr::{FrameRange, Gfn};
use lacuna_abi::event::{Flush, Life};
use lacuna_abi::gate::OpKind;
use lacuna_abi::layout::direct_map;
use lacuna_abi::paging::{Entry, Level};
use std::vec::Vec;

pub(super) fn frames(mock: &Mock, first: u64, count: u64) -> FrameRange {
    FrameRange::new(Gfn(mock.layout.zone_frames().start().0 + first), count).unwrap()
}

fn is_table(entry: Entry, level: Level) -> bool {
    entry.is_present() && !entry.is_leaf(level)
}

/// One word for each thing that happened, its direction included.
pub(super) fn steps(seen: &[Seen]) -> Vec<&'static str> {
    seen.iter()
        .map(|seen| match seen {
            Seen::Write(w) if is_table(w.new, w.level) => "split",
            Seen::Write(w) if is_table(w.old, w.level) => "merge",
            Seen::Fill(_) => "fill",
            Seen::Write(w) if w.va < lacuna_abi::layout::MERMAP => {
                if w.new.is_present() {
                    "add"
                } else {
                    "remove"
                }
            }
            Seen::Write(w) => {
                if w.new.is_present() {
                    "map"
                } else {
                    "unmap"
                }
            }
            Seen::Flush(_) => "local flush",
            Seen::Shootdown(Flush::Everything, _) => "flush everything",
            Seen::Shootdown(Flush::Pages { .. }, _) => "flush pages",
            Seen::Shootdown(..) => "flush windows",
            Seen::Gate(OpKind::Seal, _) => "seal",
            Seen::Gate(OpKind::Open, _) => "open",
            Seen::Gate(OpKind::Release, _) => "release",
            Seen::Life(Life::Pooled, _) => "pooled",
            Seen::Life(Life::PooledZero, _) => "pooled zero",
            Seen::Life(Life::Unpooled, _) => "unpooled",
            Seen::Life(Life::Freed, _) => "freed",
            Seen::Life(Life::TableAllocated, _) => "table",
            Seen::Life(Life::TableFreed, _) => "table freed",
            Seen::Life(..) => "handed out",
            Seen::Zero(_) => "zero",
            Seen::InputDone | Seen::Checkpoint => "program",
        })
        .collect()
}

#[test]
fn a_block_leaves_the_direct_map_in_this_order() {
    let mock = Mock::new(16, 2);
    let allocator = mock.allocator();
    let secret = allocator.alloc_secret(zero_pages(0)).unwrap();
    let seen = mock.seen();
    let expected = [
        "remove",
        "flush everything",
        "seal",
        "open",
        "map",
        "zero",
        "unmap",
        "seal",
        "pooled zero",
        "handed out",
    ];
    assert_eq!(steps(&seen), expected);
    let block = FrameRange::new(secret.frames().start().block_start(), 512).unwrap();
    assert_eq!(seen[1], Seen::Shootdown(Flush::Everything, CpuSet::first(2)));
    assert_eq!(seen[7], Seen::Gate(OpKind::Seal, block), "the whole block is closed again");
    assert_eq!(seen[9], Seen::Life(Life::HandedOutZero, secret.frames()));
    assert_eq!(allocator.counters().shootdowns, 1);
}

#[test]
fn without_zeroing_ahead_a_block_is_only_sealed() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator_with(false);
    let _secret = allocator.alloc_secret(pages(0)).unwrap();
    let expected = ["remove", "flush everything", "seal", "pooled", "handed out"];
    assert_eq!(steps(&mock.seen()), expected);
}

#[test]
fn one_flip_serves_a_whole_block_of_pages() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let secret: Vec<_> = (0..512).map(|_| allocator.alloc_secret(zero_pages(0)).unwrap()).collect();
    let counters = allocator.counters();
    assert_eq!((counters.flip_to_unmapped, counters.shootdowns), (1, 1));
    drop(secret);
    let _again: Vec<_> = (0..512).map(|_| allocator.alloc_secret(zero_pages(0)).unwrap()).collect();
    assert_eq!(allocator.counters().flip_to_unmapped, 1);
}

#[test]
fn two_blocks_leave_with_one_write_and_one_shootdown() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let secret = allocator.alloc_secret(pages(10)).unwrap();
    let seen = mock.seen();
    assert!(matches!(seen[0], Seen::Write(w) if w.count == 2));
    assert_eq!(steps(&seen).iter().filter(|s| **s == "flush everything").count(), 1);
    assert!(!mock.in_direct_map(secret.frames()));
    let counters = allocator.counters();
    assert_eq!((counters.flip_to_unmapped, counters.zeroed_flip), (2, 1024));
    let zeroed = [frames(&mock, 0, 512), frames(&mock, 512, 512)].map(Seen::Zero);
    let all: Vec<_> = seen.into_iter().filter(|s| matches!(s, Seen::Zero(_))).collect();
    assert_eq!(all, zeroed, "each block exactly once");
}

#[test]
fn blocks_come_back_in_this_order() {
    let mock = Mock::new(16, 2);
    let allocator = mock.allocator_with(false);
    let secret = allocator.alloc_secret(pages(9)).unwrap();
    let block = secret.frames();
    let window = secret.open(0, 1, Access::Write).unwrap();
    window.store(0, 0x5ec).unwrap();
    window.close().unwrap();
    drop(secret);
    mock.seen();
    allocator.shrink().unwrap();
    let seen = mock.seen();
    assert_eq!(steps(&seen), ["unpooled", "flush windows", "release", "add"]);
    assert_eq!(seen[1], Seen::Shootdown(Flush::NonGlobal, CpuSet::only(0)), "CPU 1 had no window");
    assert!(mock.in_direct_map(block));
    assert_eq!(allocator.mermap().may_cache(block), CpuSet::NONE, "flushed once is enough");
    let counters = allocator.counters();
    assert_eq!((counters.flip_to_mapped, counters.nr_free_unmapped), (1, 0));
    allocator.zone().check(&mock.map());
}

#[test]
fn pages_that_nobody_zeroed_are_scrubbed_before_their_block_is_released() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator_with(false);
    drop(allocator.alloc_secret(pages(0)).unwrap());
    mock.seen();
    allocator.shrink().unwrap();
    // The freed page is scrubbed by itself. Its window used one address, so that 511 more do not fit without a flush.
    let expected = [
        "open",
        "map",
        "zero",
        "unmap",
        "seal",
        "pooled zero",
        "unpooled",
        "open",
        "local flush",
        "map",
        "zero",
        "unmap",
        "seal",
        "flush windows",
        "release",
        "add",
    ];
    assert_eq!(steps(&mock.seen()), expected);
    // One page was scrubbed when it was freed, the others of its block now.
    assert_eq!(allocator.counters().zeroed_scrub, 512);
}

#[test]
fn what_was_known_of_a_block_is_forgotten_when_it_comes_back() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator_with(false);
    drop(allocator.alloc_secret(zero_pages(10)).unwrap());
    allocator.shrink().unwrap();
    let mapped = allocator.alloc_mapped(pages(10)).unwrap();
    mock.store(mapped.pin().va(), 1);
    drop(mapped);
    let secret = allocator.alloc_secret(zero_pages(10)).unwrap();
    assert_eq!(secret.frames(), frames(&mock, 0, 1024));
    assert!(mock.state().frame(secret.frames().start()).contents.is_zero());
}

#[test]
fn many_blocks_come_back_under_one_shootdown_and_in_one_call() {
    let mock = Mock::new(32, 1);
    let allocator = mock.allocator();
    // Every other block stays in use, so that the free ones cannot merge.
    let mut secret: Vec<_> = (0..10).map(|_| allocator.alloc_secret(pages(9)).unwrap()).collect();
    secret.sort_by_key(|pages| pages.frames().start());
    let mut even = true;
    secret.retain(|_| {
        even = !even;
        even
    });
    mock.seen();
    allocator.shrink().unwrap();
    let seen = mock.seen();
    assert_eq!(steps(&seen).iter().filter(|s| **s == "release").count(), 5);
    assert_eq!(steps(&seen).iter().filter(|s| **s == "flush windows").count(), 1);
    assert_eq!(allocator.counters().nr_free_unmapped, 0);
    assert_eq!(secret.len(), 5);
}

#[test]
fn mapped_requests_of_every_migratetype_get_blocks_back_under_pressure() {
    for migratetype in Migratetype::ALL {
        let mock = Mock::new(16, 1);
        let allocator = mock.allocator();
        let mut secret: Vec<_> =
            (0..4).map(|_| allocator.alloc_secret(pages(10)).unwrap()).collect();
        let request = crate::alloc::Request { migratetype, ..pages(10) };
        assert_eq!(allocator.alloc_mapped(request).err(), Some(AllocError::NoMemory));
        secret.pop();
        mock.seen();
        let mapped = allocator.alloc_mapped(request).unwrap();
        assert_eq!(steps(&mock.seen()), ["unpooled", "flush windows", "release", "add"]);
        assert!(mock.in_direct_map(mapped.frames()));
    }
}

#[test]
fn pressure_brings_back_no_more_than_is_needed() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let secret: Vec<_> = (0..4).map(|_| allocator.alloc_secret(pages(10)).unwrap()).collect();
    drop(secret);
    let _mapped = allocator.alloc_mapped(pages(0)).unwrap();
    let counters = allocator.counters();
    assert_eq!((counters.flip_to_mapped, counters.nr_free_unmapped), (1, 7 * 512));
}

#[test]
fn single_pages_that_are_freed_make_a_block_that_comes_back() {
    let mock = Mock::new(16, 1);
    mock.stop_recording();
    let allocator = mock.allocator();
    let zone = mock.layout.zone_frames().count();
    let secret: Vec<_> = (0..zone).map(|_| allocator.alloc_secret(pages(0)).unwrap()).collect();
    assert_eq!(allocator.alloc_secret(pages(0)).err(), Some(AllocError::NoMemory));
    drop(secret);
    assert_eq!(allocator.counters().nr_free_unmapped, zone);
    assert_eq!(allocator.alloc_mapped(pages(10)).unwrap().frames().count(), 1024);
}

#[test]
fn memory_that_is_free_only_in_part_blocks_is_said_to_have_no_block() {
    let mock = Mock::new(16, 1);
    mock.stop_recording();
    let allocator = mock.allocator();
    let zone = mock.layout.zone_frames().count();
    let all: Vec<_> = (0..zone).map(|_| allocator.alloc_mapped(pages(0)).unwrap()).collect();
    let (kept, freed): (Vec<_>, Vec<_>) =
        all.into_iter().partition(|page| page.frames().start().0 % 512 == 77);
    drop(freed);
    assert_eq!(allocator.alloc_secret(pages(0)).err(), Some(AllocError::NoBlock));
    assert_eq!(allocator.counters().alloc_fail_no_block, 1);
    drop(kept);
    assert!(allocator.alloc_secret(pages(0)).is_ok());
}

#[test]
fn without_flips_an_empty_pool_serves_nobody() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator_as(AllocConfig { flip: false, ..EAGER });
    assert_eq!(allocator.alloc_secret(pages(0)).err(), Some(AllocError::NoMemory));
    assert_eq!(mock.seen(), []);
}

#[test]
fn buddies_on_two_sides_of_the_direct_map_stay_apart() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let secret = allocator.alloc_secret(pages(9)).unwrap();
    let buddy = Gfn(secret.frames().start().0 ^ 512);
    assert!(mock.in_direct_map(FrameRange::new(buddy, 512).unwrap()));
    drop(secret);
    allocator.zone().check(&mock.map());
    let counters = allocator.counters();
    assert_eq!((counters.nr_free_unmapped, counters.nr_free_mapped), (512, 512));
    allocator.shrink().unwrap();
    assert_eq!(allocator.alloc_mapped(pages(10)).unwrap().frames(), frames(&mock, 0, 1024));
}

#[test]
fn a_direct_map_entry_comes_back_as_it_was() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let entry = || {
        let va = direct_map(mock.layout.zone.gpa);
        let state = mock.state();
        let read = |at| state.read_entry(at);
        lacuna_abi::walk::translate(&read, mock.layout.pool.gpa, va).map(|leaf| leaf.entry)
    };
    let before = entry().unwrap();
    drop(allocator.alloc_secret(pages(10)).unwrap());
    assert!(entry().is_err());
    allocator.shrink().unwrap();
    assert_eq!(entry(), Ok(before));
}
