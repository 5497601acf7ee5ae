//! Each CPU's own lists, watermarks, background work, batches.

use super::flip::steps;
use crate::alloc::{AllocConfig, AllocError, Request};
use crate::balance::Watermarks;
use crate::freetype::Migratetype;
use crate::pcp::Marks;
use crate::secret::{Access, SecretPages};
use crate::testing::{EAGER, Mock, Seen, pages, zero_pages};
use lacuna_abi::event::Life;
use lacuna_abi::gate::OpKind;
use std::vec::Vec;

/// Writes to the first page, so that the pages are not known to be zero.
fn spoil(pages: &SecretPages<'_, '_, Mock>) {
    let window = pages.open(0, 1, Access::Write).unwrap();
    window.store(0, 1).unwrap();
    window.close().unwrap();
}

#[test]
fn a_cpu_takes_from_the_zone_by_the_batch_and_gives_back_by_the_batch() {
    let mock = Mock::new(16, 2);
    let allocator = mock.allocator();
    let Marks { batch, high } = Marks::for_zone(4096);
    let cached = || allocator.pages().0.iter().map(|pages| pages.cached).sum::<u32>();
    let mut held: Vec<_> = (0..1).map(|_| allocator.alloc_mapped(pages(0)).unwrap()).collect();
    assert_eq!(cached(), batch - 1);
    held.extend((1..batch).map(|_| allocator.alloc_mapped(pages(0)).unwrap()));
    assert_eq!(cached(), 0, "the batch serves without the zone");
    held.extend((0..3 * high).map(|_| allocator.alloc_mapped(pages(0)).unwrap()));
    while held.pop().is_some() {
        assert!(cached() <= high, "{} pages", cached());
    }
    assert!(cached() > high - batch);
    allocator.drain_all().unwrap();
    assert_eq!(cached(), 0);
    assert_eq!(allocator.counters().drains, 1);
}

#[test]
fn a_page_freed_on_another_cpu_is_that_cpus() {
    let mock = Mock::new(16, 2);
    let allocator = mock.allocator();
    let page = allocator.alloc_mapped(pages(0)).unwrap();
    let frames = page.frames();
    mock.on_cpu(1);
    drop(page);
    let again = allocator.alloc_mapped(pages(0)).unwrap();
    assert_eq!(again.frames(), frames);
    mock.on_cpu(0);
    drop(again);
    assert!(allocator.pages().0.iter().all(crate::counters::Pages::adds_up));
}

#[test]
fn lists_of_other_cpus_are_emptied_before_memory_is_said_to_be_short() {
    let mock = Mock::new(16, 2);
    mock.stop_recording();
    let allocator = mock.allocator();
    mock.on_cpu(1);
    drop(allocator.alloc_mapped(pages(0)).unwrap());
    mock.on_cpu(0);
    let all: Vec<_> = (0..4096).map(|_| allocator.alloc_mapped(pages(0)).unwrap()).collect();
    assert_eq!(allocator.alloc_mapped(pages(0)).err(), Some(AllocError::NoMemory));
    drop(all);
}

#[test]
fn what_is_kept_serves_callers_that_cannot_wait_and_half_of_it_nobody() {
    let mock = Mock::new(16, 1);
    mock.stop_recording();
    let allocator = mock.allocator_as(AllocConfig::PLAIN);
    let Watermarks { min, .. } = Watermarks::for_zone(4096);
    // An order that no CPU keeps, so that each request meets the mark.
    let mut held = Vec::new();
    while let Ok(pages) = allocator.alloc_mapped(pages(4)) {
        held.push(pages);
    }
    let free = || 4096 - allocator.counters().nr_allocated as u32;
    assert!((min..min + 16).contains(&free()), "{} pages are left", free());
    let noblock = Request { noblock: true, ..pages(4) };
    while let Ok(pages) = allocator.alloc_mapped(noblock) {
        held.push(pages);
    }
    assert!((min / 2..min / 2 + 16).contains(&free()), "{} pages are left", free());
}

#[test]
fn free_secret_pages_do_not_count_towards_a_mapped_watermark() {
    let mock = Mock::new(16, 1);
    mock.stop_recording();
    let config = AllocConfig { min_free: Some(512), ..AllocConfig::PLAIN };
    let allocator = mock.allocator_as(config);
    let secret: Vec<_> = (0..7).map(|_| allocator.alloc_secret(pages(9)).unwrap()).collect();
    assert_eq!(allocator.alloc_secret(pages(0)).err(), Some(AllocError::NoMemory));
    drop(secret);
    let noblock = Request { noblock: true, ..pages(9) };
    assert_eq!(allocator.alloc_mapped(noblock).err(), Some(AllocError::NoMemory));
    let mapped = allocator.alloc_mapped(pages(9)).unwrap();
    assert!(mock.in_direct_map(mapped.frames()), "a block came back for it");
}

#[test]
fn a_burst_costs_one_shootdown_for_a_batch_of_blocks() {
    let mock = Mock::new(64, 2);
    mock.stop_recording();
    let allocator = mock.allocator_as(AllocConfig { pool_high: 8 * 512, ..EAGER });
    let burst: Vec<_> =
        (0..8 * 512).map(|_| allocator.alloc_secret(zero_pages(0)).unwrap()).collect();
    let counters = allocator.counters();
    assert_eq!((counters.flip_to_unmapped, counters.shootdowns), (8, 1));
    assert_eq!((counters.zeroed_flip, counters.zeroed_alloc), (8 * 512, 0));
    assert!(burst.iter().all(|page| !mock.in_direct_map(page.frames())));
}

#[test]
fn a_batch_flips_in_two_gate_calls() {
    let mock = Mock::new(64, 1);
    let allocator = mock.allocator_as(AllocConfig { pool_high: 4 * 512, ..EAGER });
    let _page = allocator.alloc_secret(pages(0)).unwrap();
    let seen = mock.seen();
    let steps = steps(&seen);
    let count = |step| steps.iter().filter(|s| **s == step).count();
    assert_eq!((count("remove"), count("flush everything"), count("seal")), (4, 1, 8));
    let first_open = steps.iter().position(|s| *s == "open").unwrap();
    assert!(steps[..first_open].iter().filter(|s| **s == "seal").count() == 4, "{steps:?}");
    assert_eq!(mock.state().calls, 2);
}

#[test]
fn the_pool_is_filled_between_its_marks_in_the_background() {
    let mock = Mock::new(64, 1);
    mock.stop_recording();
    let config = AllocConfig { pool_low: 512, pool_high: 4 * 512, ..EAGER };
    let allocator = mock.allocator_as(config);
    allocator.balance().unwrap();
    assert_eq!(allocator.counters().flip_to_unmapped, 0, "nobody asked for secret pages yet");
    let mut held: Vec<_> = (0..3).map(|_| allocator.alloc_secret(pages(9)).unwrap()).collect();
    allocator.balance().unwrap();
    let flips = allocator.counters().flip_to_unmapped;
    held.extend((0..2).map(|_| allocator.alloc_secret(pages(9)).unwrap()));
    assert!(allocator.counters().nr_free_unmapped < 512);
    allocator.balance().unwrap();
    let counters = allocator.counters();
    assert!(counters.flip_to_unmapped > flips && counters.balance_refill > 0, "{counters:?}");
    assert!(counters.nr_free_unmapped + 256 >= 4 * 512, "{counters:?}");
    let shootdowns = counters.shootdowns;
    allocator.balance().unwrap();
    assert_eq!(allocator.counters().shootdowns, shootdowns, "nothing is left to do");
    let noblock = Request { noblock: true, ..pages(0) };
    assert!(allocator.alloc_secret(noblock).is_ok(), "callers that cannot wait find pages");
}

#[test]
fn the_mapped_side_gets_blocks_back_in_the_background() {
    let mock = Mock::new(16, 1);
    mock.stop_recording();
    let config = AllocConfig { min_free: Some(256), ..AllocConfig::PLAIN };
    let allocator = mock.allocator_as(config);
    let secret: Vec<_> = (0..4).map(|_| allocator.alloc_secret(pages(9)).unwrap()).collect();
    drop(secret);
    let mut held = Vec::new();
    while allocator.zone().mapped_free(&mock.map()) >= allocator.marks.low {
        held.push(allocator.alloc_mapped(pages(4)).unwrap());
    }
    assert_eq!(allocator.counters().flip_to_mapped, 0);
    allocator.balance().unwrap();
    let counters = allocator.counters();
    assert!(counters.balance_reclaim > 0 && counters.flip_to_mapped > 0, "{counters:?}");
    assert!(allocator.zone().mapped_free(&mock.map()) >= allocator.marks.low);
}

#[test]
fn what_is_brought_back_in_the_background_reaches_the_high_mark() {
    let mock = Mock::new(64, 1);
    mock.stop_recording();
    let config = AllocConfig { min_free: Some(4096), ..AllocConfig::PLAIN };
    let allocator = mock.allocator_as(config);
    let secret: Vec<_> = (0..16).map(|_| allocator.alloc_secret(pages(9)).unwrap()).collect();
    drop(secret);
    let Watermarks { low, high, .. } = allocator.marks;
    let mapped = || allocator.zone().mapped_free(&mock.map());
    let mut held = Vec::new();
    while mapped() > low {
        held.push(allocator.alloc_mapped(pages(9)).unwrap());
        allocator.balance().unwrap();
    }
    assert_eq!((mapped(), allocator.counters().flip_to_mapped), (low, 0), "not below the mark yet");
    held.push(allocator.alloc_mapped(pages(4)).unwrap());
    allocator.balance().unwrap();
    assert!((high..high + 512).contains(&mapped()), "{} pages of {high}", mapped());
    let flips = allocator.counters().flip_to_mapped;
    held.push(allocator.alloc_mapped(pages(9)).unwrap());
    assert!((low..high).contains(&mapped()));
    allocator.balance().unwrap();
    assert_eq!(allocator.counters().flip_to_mapped, flips, "between the marks nothing starts");
}

#[test]
fn pages_that_wait_to_be_scrubbed_refill_the_pool_before_another_block_flips() {
    let mock = Mock::new(64, 1);
    mock.stop_recording();
    let config = AllocConfig { pool_low: 128, pool_high: 512, ..EAGER };
    let allocator = mock.allocator_as(config);
    let mut held: Vec<_> = (0..512).map(|_| allocator.alloc_secret(pages(0)).unwrap()).collect();
    held.iter().for_each(spoil);
    held.truncate(512 - 200);
    let before = allocator.counters();
    assert_eq!((before.flip_to_unmapped, before.scrubs), (1, 0));
    allocator.balance().unwrap();
    let counters = allocator.counters();
    assert_eq!((counters.flip_to_unmapped, counters.zeroed_scrub), (1, 200));
    assert_eq!((counters.nr_free_unmapped_unmovable, counters.balance_refill), (200, 0));
}

#[test]
fn the_blocks_that_were_free_for_longest_come_back_first() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let mut secret: Vec<_> = (0..8).map(|_| allocator.alloc_secret(pages(9)).unwrap()).collect();
    // Two whose buddies stay in use, so that they do not merge.
    secret.sort_by_key(|pages| pages.frames().start());
    let (late, early) = (secret.remove(6), secret.remove(2));
    let expected = early.frames();
    drop(early);
    allocator.drain_all().unwrap();
    drop(late);
    allocator.drain_all().unwrap();
    let mapped = allocator.alloc_mapped(pages(9)).unwrap();
    assert_eq!(mapped.frames(), expected);
}

#[test]
fn the_blocks_that_were_free_for_longest_come_back_first_whatever_their_migratetype() {
    for [first, second] in [[0, 1], [1, 0], [0, 2], [2, 0], [1, 2], [2, 1]] {
        let mock = Mock::new(16, 1);
        let allocator = mock.allocator();
        let secret = |number: usize| {
            let request = Request { migratetype: Migratetype::ALL[number], ..pages(9) };
            (0..4).map(|_| allocator.alloc_secret(request).unwrap()).collect::<Vec<_>>()
        };
        let (mut early, mut late) = (secret(first), secret(second));
        let [early_block, late_block] = [early.remove(0), late.remove(0)];
        let expected = early_block.frames();
        for block in [early_block, late_block] {
            drop(block);
            allocator.drain_all().unwrap();
        }
        let mapped = allocator.alloc_mapped(pages(9)).unwrap();
        assert_eq!(mapped.frames(), expected, "migratetypes {first} and {second}");
    }
}

#[test]
fn a_block_that_was_free_for_longest_comes_back_first_also_out_of_a_pair() {
    for [early, later] in [[0, 1], [1, 0]] {
        let mock = Mock::new(16, 1);
        let allocator = mock.allocator();
        let mut secret: Vec<_> =
            (0..8).map(|_| Some(allocator.alloc_secret(pages(9)).unwrap())).collect();
        secret.sort_by_key(|pages| pages.as_ref().unwrap().frames().start());
        let expected = secret[early].as_ref().unwrap().frames();
        for number in [early, 4, later] {
            secret[number] = None;
            allocator.drain_all().unwrap();
        }
        assert_eq!(allocator.alloc_mapped(pages(9)).unwrap().frames(), expected, "half {early}");
        allocator.zone().check(&mock.map());
    }
}

#[test]
fn freed_pages_are_scrubbed_together() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let secret: Vec<_> = (0..64).map(|_| allocator.alloc_secret(pages(0)).unwrap()).collect();
    secret.iter().for_each(spoil);
    mock.seen();
    let calls = mock.state().calls;
    drop(secret);
    assert_eq!(mock.state().calls, calls, "nothing yet");
    assert!(mock.seen().iter().all(|s| matches!(s, Seen::Life(Life::Freed, _))));
    allocator.drain_all().unwrap();
    assert_eq!(mock.state().calls, calls + 2, "one opens, one seals");
    let seen = mock.seen();
    let opened = seen.iter().filter(|s| matches!(s, Seen::Gate(OpKind::Open, _))).count();
    assert!(opened <= 8, "neighbours are one range: {opened}");
    let counters = allocator.counters();
    assert_eq!((counters.scrubs, counters.zeroed_scrub), (1, 64));
    assert!(mock.state().frames.iter().all(|frame| !frame.secret || frame.contents.is_zero()));
}

#[test]
fn a_long_list_of_freed_pages_is_scrubbed_at_once() {
    let mock = Mock::new(16, 1);
    mock.stop_recording();
    let allocator = mock.allocator();
    let secret: Vec<_> = (0..600).map(|_| allocator.alloc_secret(pages(0)).unwrap()).collect();
    secret.iter().for_each(spoil);
    drop(secret);
    let counters = allocator.counters();
    assert!(counters.scrubs > 0 && counters.zeroed_scrub >= 224, "{counters:?}");
}

#[test]
fn pages_that_wait_to_be_scrubbed_are_scrubbed_before_another_block_flips() {
    let mock = Mock::new(16, 1);
    mock.stop_recording();
    let allocator = mock.allocator();
    let secret: Vec<_> = (0..512).map(|_| allocator.alloc_secret(pages(0)).unwrap()).collect();
    secret.iter().take(100).for_each(spoil);
    drop(secret);
    let noblock = Request { noblock: true, ..zero_pages(0) };
    let again: Vec<_> = (0..512).map(|_| allocator.alloc_secret(noblock).unwrap()).collect();
    assert_eq!(allocator.counters().flip_to_unmapped, 1);
    assert_eq!(again.len(), 512);
}

#[test]
fn a_batch_that_the_host_refuses_in_part_loses_nothing() {
    // Three blocks: seals 0 to 2, opens 3 to 5, then seals 6 to 8.
    for (nth, unmapped, withheld) in
        [(0, 0, 0), (1, 1, 0), (2, 2, 0), (3, 3, 0), (5, 3, 0), (6, 2, 1), (7, 2, 1), (8, 2, 1)]
    {
        let mock = Mock::new(16, 1);
        let allocator = mock.allocator_as(AllocConfig { pool_high: 3 * 512, ..EAGER });
        mock.refuse(nth);
        let refused = allocator.alloc_secret(pages(0)).err();
        assert!(matches!(refused, Some(AllocError::Gate(_))), "{nth}: {refused:?}");
        let counters = allocator.counters();
        assert_eq!(counters.nr_free_unmapped, unmapped * 512, "operation {nth}");
        assert_eq!(counters.nr_withheld, withheld * 512, "operation {nth}");
        assert!(allocator.pages().0.iter().all(crate::counters::Pages::adds_up));
        allocator.zone().check(&mock.map());
        let next: Vec<_> = (0..4).map(|_| allocator.alloc_secret(zero_pages(9)).unwrap()).collect();
        let state = mock.state();
        let zero = |pages: &SecretPages<'_, '_, Mock>| {
            pages.frames().iter().all(|frame| state.frame(frame).contents.is_zero())
        };
        assert!(next.iter().all(zero), "operation {nth}");
    }
}

#[test]
fn unmapped_memory_of_every_migratetype_has_its_own_blocks() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let held: Vec<_> = Migratetype::ALL
        .map(|migratetype| allocator.alloc_secret(Request { migratetype, ..pages(0) }).unwrap())
        .into_iter()
        .collect();
    // The first block is large enough for all, but a whole block is claimed only when it is free.
    for (migratetype, pages) in Migratetype::ALL.iter().zip(&held) {
        let index = (pages.frames().start().0 - mock.layout.zone_frames().start().0) as u32;
        assert!(mock.map().block_at(index).freetype().unmapped, "{migratetype:?}");
    }
    assert!(allocator.counters().alloc_fallback >= 2);
}
