//! The record of a pageblock.

use crate::freetype::Freetype;
use crate::sync::{AtomicU32, AtomicU64};
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use lacuna_abi::MAX_CPUS;
use lacuna_abi::addr::BLOCK_FRAMES;
use lacuna_abi::layout::BLOCK_META_BYTES;

const ZERO_WORDS: usize = BLOCK_FRAMES as usize / 64;

/// Metadata of one pageblock.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub struct BlockMeta {
    /// One bit a page: its contents are known. On the unmapped side they are zero, on the mapped
    /// side the page is free and holds the poison. Pages of one block may belong to several CPUs, so
    /// that these words are changed by read-modify-write.
    known: [AtomicU64; ZERO_WORDS],
    /// For each CPU, the generation of its window when it last lay over this block; 0 for never.
    windows: [AtomicU32; MAX_CPUS],
    freetype: AtomicU32,
    /// Pages in allocations.
    allocated: AtomicU32,
    /// Pages that were converted in place. While there are any, the block is mapped by a table of
    /// small entries; without, by one entry. Changed by whoever holds the lock.
    converted: AtomicU32,
    /// Not 0 while a CPU changes how the block is mapped.
    lock: AtomicU32,
    /// When the block became wholly free, by the clock of the zone: of two blocks that are free, the
    /// one with the lower number has been so for longer. Changed under the zone lock.
    free_since: AtomicU64,
}

const _: () = assert!(cfg!(loom) || size_of::<BlockMeta>() as u64 == BLOCK_META_BYTES);

impl BlockMeta {
    /// The freetype of the block's pages.
    pub(crate) fn freetype(&self) -> Freetype {
        let index = self.freetype.load(Relaxed) as usize;
        Freetype::from_index(index).unwrap_or_else(|| panic!("no pageblock has freetype {index}"))
    }

    pub(crate) fn set_freetype(&self, freetype: Freetype) {
        self.freetype.store(freetype.index() as u32, Relaxed);
    }

    /// Pages of the block in allocations.
    pub(crate) fn allocated(&self) -> u32 {
        self.allocated.load(Relaxed)
    }

    /// Counts pages that were handed out, or given back.
    pub(crate) fn count_allocated(&self, pages: u32, handed_out: bool) {
        if handed_out {
            self.allocated.fetch_add(pages, Relaxed);
        } else {
            self.allocated.fetch_sub(pages, Relaxed);
        }
    }

    /// Says that the contents of the pages from `first` are known, or not any more.
    pub(crate) fn set_known(&self, first: u64, count: u64, known: bool) {
        let mut next = first;
        let end = first + count;
        while next < end {
            let stop = end.min((next | 63) + 1);
            let mask = (u64::MAX >> (64 - (stop - next))) << (next % 64);
            let word = &self.known[(next / 64) as usize];
            if known {
                word.fetch_or(mask, Relaxed);
            } else {
                word.fetch_and(!mask, Relaxed);
            }
            next = stop;
        }
    }

    /// The first run of pages in `from..end` whose contents are not known, as first and end.
    pub(crate) fn unknown_run(&self, from: u64, end: u64) -> Option<(u64, u64)> {
        let first = self.next_page(from, end, false)?;
        Some((first, self.next_page(first, end, true).unwrap_or(end)))
    }

    /// The first page in `from..end` whose bit is `known`, a word at a time.
    fn next_page(&self, from: u64, end: u64, known: bool) -> Option<u64> {
        let mut next = from;
        while next < end {
            let word = self.known[(next / 64) as usize].load(Relaxed);
            let wanted = if known { word } else { !word } & (u64::MAX << (next % 64));
            if wanted != 0 {
                let page = (next & !63) + u64::from(wanted.trailing_zeros());
                return (page < end).then_some(page);
            }
            next = (next | 63) + 1;
        }
        None
    }

    /// Pages of the block that were converted in place.
    pub(crate) fn converted(&self) -> u32 {
        self.converted.load(Relaxed)
    }

    pub(crate) fn add_converted(&self, pages: u32) {
        self.converted.store(self.converted() + pages, Relaxed);
    }

    pub(crate) fn remove_converted(&self, pages: u32) {
        self.converted.store(self.converted() - pages, Relaxed);
    }

    /// Takes the lock on how the block is mapped, if it is free.
    pub(crate) fn try_lock(&self) -> bool {
        self.lock.compare_exchange(0, 1, Acquire, Relaxed).is_ok()
    }

    pub(crate) fn unlock(&self) {
        self.lock.store(0, Release);
    }

    /// When the block last became wholly free.
    pub(crate) fn free_since(&self) -> u64 {
        self.free_since.load(Relaxed)
    }

    pub(crate) fn set_free_since(&self, time: u64) {
        self.free_since.store(time, Relaxed);
    }

    /// A window of `cpu`, in this generation, lies over the block.
    pub(crate) fn set_window(&self, cpu: usize, generation: u32) {
        self.windows[cpu].store(generation, Relaxed);
    }

    /// Generation of `cpu`'s window when it last lay over the block; 0 for never.
    pub(crate) fn window(&self, cpu: usize) -> u32 {
        self.windows[cpu].load(Relaxed)
    }
}
