//! Converting in place: the order of its steps, what the pages hold, and what the rest of their
//! pageblock sees of it.

use super::flip::{frames, steps};
use crate::convert::ConvertError;
use crate::handle::BadHandle;
use crate::mapped::MappedPages;
use crate::platform::{CpuSet, Platform};
use crate::secret::{Access, SecretPages};
use crate::space;
use crate::testing::{Mock, Seen, pages, zero_pages};
use lacuna_abi::addr::{FrameRange, PAGE_SIZE};
use lacuna_abi::event::{EntryWrite, Flush};
use lacuna_abi::layout::direct_map;
use lacuna_abi::paging::{Entry, Level};
use std::vec::Vec;

pub(super) fn secret<'r, 'a>(pages: MappedPages<'r, 'a, Mock>) -> SecretPages<'r, 'a, Mock> {
    pages.into_secret().unwrap_or_else(|(pages, error)| panic!("{}: {error:?}", pages.frames()))
}

/// The directory entry of the first pageblock.
fn directory_entry(mock: &Mock) -> Entry {
    let va = direct_map(mock.layout.zone.gpa);
    let at = space::locate(mock, &mock.layout.pool, va, Level::Pd).unwrap();
    mock.read_entry(at)
}

#[test]
fn pages_leave_the_direct_map_in_this_order() {
    let mock = Mock::new(16, 2);
    let allocator = mock.allocator();
    let (first, second) = (allocator.alloc_mapped(pages(2)), allocator.alloc_mapped(pages(0)));
    let _first = secret(first.unwrap());
    let seen = mock.seen();
    let out = ["remove", "flush pages", "seal", "handed out"];
    assert_eq!(steps(&seen)[..4], ["table", "fill", "split", "flush everything"]);
    assert_eq!(steps(&seen)[4..], out);
    let all = CpuSet::first(2);
    assert_eq!(seen[3], Seen::Shootdown(Flush::Everything, all));
    let va = direct_map(mock.layout.zone.gpa);
    assert_eq!(seen[5], Seen::Shootdown(Flush::Pages { va, count: 4, level: Level::Pt }, all));
    let _second = secret(second.unwrap());
    assert_eq!(steps(&mock.seen()), out, "the block is split already");
    let counters = allocator.counters();
    assert_eq!((counters.splits, counters.converted, counters.converted_pages), (1, 2, 5));
    assert_eq!((counters.shootdowns, counters.nr_table_pages), (3, 1));
}

#[test]
fn pages_come_back_in_this_order() {
    let mock = Mock::new(16, 2);
    let allocator = mock.allocator();
    let [first, second] = [2, 0].map(|order| allocator.alloc_mapped(pages(order)).unwrap());
    let (first, second) = (secret(first), secret(second));
    mock.seen();
    drop(first);
    let back = ["freed", "open", "map", "zero", "unmap", "seal", "flush windows", "release", "add"];
    let seen = mock.seen();
    assert_eq!(steps(&seen), back);
    assert_eq!(seen[6], Seen::Shootdown(Flush::NonGlobal, CpuSet::only(0)), "CPU 1 had no window");
    drop(second);
    let seen = steps(&mock.seen());
    assert_eq!(seen[..9], back);
    assert_eq!(seen[9..], ["merge", "flush everything", "table freed"]);
    let counters = allocator.counters();
    assert_eq!((counters.merges, counters.restored, counters.nr_table_pages), (1, 2, 0));
    assert_eq!((counters.alloc, counters.free, counters.nr_allocated), (2, 2, 0));
}

#[test]
fn many_pages_are_flushed_with_everything() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let _secret = secret(allocator.alloc_mapped(pages(5)).unwrap());
    let flushes = steps(&mock.seen()).into_iter().filter(|step| step.starts_with("flush"));
    assert_eq!(flushes.collect::<Vec<_>>(), ["flush everything", "flush everything"]);
}

#[test]
fn pages_of_every_order_keep_what_they_hold_on_the_way_out_and_are_zero_on_the_way_back() {
    for order in 0..9 {
        let mock = Mock::new(16, 2);
        let allocator = mock.allocator();
        let before = directory_entry(&mock);
        let mapped = allocator.alloc_mapped(pages(order)).unwrap();
        let (all, va) = (mapped.frames(), mapped.pin().va());
        let places = || (0..all.count()).map(|page| page * PAGE_SIZE + 8 * page);
        places().for_each(|at| mock.store(va.wrapping_add(at), at + 1));
        let secret = secret(mapped);
        assert_eq!(secret.frames(), all);
        assert!(!mock.in_direct_map(all));
        let window = secret.open(0, all.count(), Access::Read).unwrap();
        assert!(places().all(|at| window.load(at) == Ok(at + 1)), "order {order}");
        window.close().unwrap();
        let mapped = secret.into_mapped().unwrap_or_else(|(_, error)| panic!("{error:?}"));
        assert_eq!((mapped.frames(), mapped.pin().va()), (all, va));
        assert!(places().all(|at| mock.load(va.wrapping_add(at)) == 0));
        assert_eq!(directory_entry(&mock), before, "the entry is as it was");
        drop(mapped);
        assert_eq!(allocator.counters().nr_allocated, 0);
        allocator.zone().check(&mock.map());
    }
}

#[test]
fn the_rest_of_the_pageblock_is_mapped_on_every_cpu_at_every_step() {
    let mock = Mock::new(16, 2);
    let allocator = mock.allocator();
    let held: Vec<_> = (0..3).map(|_| allocator.alloc_mapped(pages(3)).unwrap()).collect();
    mock.state().watch(frames(&mock, 24, 512 - 24));
    let mut secrets: Vec<_> = held.into_iter().map(secret).collect();
    drop(secrets.remove(1));
    allocator.drain_all().unwrap();
    let next = allocator.alloc_mapped(pages(0)).unwrap();
    assert_eq!(next.frames(), frames(&mock, 8, 1), "of what just came back");
    mock.state().watch(frames(&mock, 9, 7));
    let again = secret(next);
    drop(secrets);
    mock.on_cpu(1);
    drop(again);
    assert_eq!(allocator.counters().merges, 1);
}

#[test]
#[should_panic(expected = "is not mapped")]
fn the_test_machine_notices_a_page_that_is_gone_in_between() {
    let mock = Mock::new(16, 1);
    mock.state().watch(frames(&mock, 0, 512));
    let va = direct_map(mock.layout.zone.gpa);
    let at = space::locate(&mock, &mock.layout.pool, va, Level::Pd).unwrap();
    let (root, old) = (mock.space().root, mock.read_entry(at));
    // What the manual recommends where frame or rights change: clear, flush, write.
    let new = Entry::EMPTY;
    let clear = EntryWrite { root, pcid: 0, va, level: Level::Pd, count: 1, old, new, grant: 0 };
    mock.write_entries(at, &clear).unwrap();
}

#[test]
fn a_pageblock_is_split_once_and_merged_when_its_last_range_is_back() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let held: Vec<_> = (0..5).map(|order| allocator.alloc_mapped(pages(order)).unwrap()).collect();
    let mut secrets: Vec<_> = held.into_iter().map(secret).collect();
    assert_eq!(mock.state().live_tables(), 1);
    for left in [4, 3, 2, 1] {
        drop(secrets.remove(left / 2));
        assert_eq!(allocator.counters().merges, 0);
        assert!(!directory_entry(&mock).is_leaf(Level::Pd));
    }
    drop(secrets);
    let counters = allocator.counters();
    assert_eq!((counters.splits, counters.merges, mock.state().live_tables()), (1, 1, 0));
    assert!(directory_entry(&mock).is_leaf(Level::Pd));
}

#[test]
fn two_pageblocks_have_a_table_each() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let held = [8, 8, 8].map(|order| secret(allocator.alloc_mapped(pages(order)).unwrap()));
    let block = |pages: &SecretPages<'_, '_, Mock>| pages.frames().start().block_start();
    let blocks: std::collections::BTreeSet<_> = held.iter().map(block).collect();
    assert_eq!((blocks.len(), mock.state().live_tables()), (2, 2));
    drop(held);
    assert_eq!((allocator.counters().merges, mock.state().live_tables()), (2, 0));
}

#[test]
fn a_pageblock_can_flip_as_soon_as_its_pages_are_back() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let mapped = allocator.alloc_mapped(pages(0)).unwrap();
    let block = FrameRange::new(mapped.frames().start().block_start(), 512).unwrap();
    drop(secret(mapped));
    let all: Vec<_> = (0..8).map(|_| allocator.alloc_secret(pages(9)).unwrap()).collect();
    assert!(all.iter().any(|pages| pages.frames() == block));
    assert_eq!(allocator.counters().flip_to_unmapped, 8);
}

#[test]
#[should_panic(expected = "flips, but is split")]
fn a_pageblock_that_would_flip_while_it_is_split_is_noticed() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let mapped = allocator.alloc_mapped(pages(3)).unwrap();
    let handle = secret(mapped).into_raw();
    // As if the pages had been freed without coming back.
    let index = (handle & 0xffff_ffff) as u32 - 1;
    let chunk = crate::meta::Chunk { index, order: 3 };
    allocator.retire(chunk);
    allocator.put(chunk);
    allocator.drain_all().unwrap();
    let _all: Vec<_> = (0..8).map(|_| allocator.alloc_secret(pages(9))).collect();
}

#[test]
fn a_window_on_another_range_is_still_flushed_before_that_is_released() {
    let mock = Mock::new(16, 2);
    let allocator = mock.allocator();
    let [first, second] = [0, 0].map(|order| secret(allocator.alloc_mapped(pages(order)).unwrap()));
    mock.on_cpu(1);
    second.open(0, 1, Access::Write).unwrap().close().unwrap();
    mock.on_cpu(0);
    drop(first);
    mock.seen();
    drop(second);
    let flushed = mock
        .seen()
        .iter()
        .any(|seen| matches!(seen, Seen::Shootdown(Flush::NonGlobal, cpus) if cpus.contains(1)));
    assert!(flushed, "CPU 1 may have cached its window");
}

#[test]
fn handles_lead_to_the_side_on_which_the_pages_are() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let mapped = allocator.alloc_mapped(zero_pages(1)).unwrap();
    let before = mapped.handle();
    let handle = secret(mapped).into_raw();
    assert_eq!(MappedPages::from_raw(&allocator, before).err(), Some(BadHandle(before)));
    assert_eq!(MappedPages::from_raw(&allocator, handle).err(), Some(BadHandle(handle)));
    let pages = SecretPages::from_raw(&allocator, handle).unwrap();
    let secret = pages.handle();
    let Ok(mapped) = pages.into_mapped() else { panic!("nothing stands in the way") };
    assert_eq!(SecretPages::from_raw(&allocator, secret).err(), Some(BadHandle(secret)));
    let handle = mapped.into_raw();
    drop(MappedPages::from_raw(&allocator, handle).unwrap());
    assert_eq!(allocator.counters().nr_allocated, 0);
}

#[test]
fn whole_pageblocks_are_refused_and_so_are_pages_from_the_pool() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    for order in [9, 10] {
        let mapped = allocator.alloc_mapped(pages(order)).unwrap();
        let frames = mapped.frames();
        let Err((mapped, error)) = mapped.into_secret() else { panic!("order {order}") };
        assert_eq!((mapped.frames(), error), (frames, ConvertError::TooLarge));
        assert!(mock.in_direct_map(frames));
    }
    let pool = allocator.alloc_secret(pages(0)).unwrap();
    let Err((pool, error)) = pool.into_mapped() else { panic!("it is not converted") };
    assert_eq!(error, ConvertError::NotConverted);
    assert!(!mock.in_direct_map(pool.frames()));
}
