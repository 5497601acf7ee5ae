//! The baseline: one state for each 4 KiB page and CPU, and every flush looks at all of them.

use super::super::sample::float;
use super::guest::Step;
use lacuna_abi::addr::{FrameRange, Gva, PAGE_SHIFT};
use lacuna_abi::event::{EntryWrite, Event, Flush};
use lacuna_abi::gate::OpKind;
use lacuna_abi::layout::{Layout, Place, WINDOW_STRIDE, window};
use lacuna_abi::paging::Entry;
use std::time::{Duration, Instant};

/// Time that a kind of events may take, and how many are taken before it is looked at.
const LIMIT: Duration = Duration::from_millis(500);
const CHUNK: usize = 400;

const EMPTY: u8 = 0;
const MAPPED: u8 = 1;
const GLOBAL: u8 = 2;
const STALE: u8 = 4;

/// State of every page of the direct map and of the windows, for each CPU.
pub(super) struct Naive {
    layout: Layout,
    pages: Vec<Vec<u8>>,
    /// Judgements that found something.
    pub(super) found: u64,
}

impl Naive {
    pub(super) fn new(layout: &Layout) -> Self {
        let count = |bytes: u64| usize::try_from(bytes >> PAGE_SHIFT).unwrap_or(0);
        let zone = count(layout.zone.len);
        let windows = layout.cpus * count(WINDOW_STRIDE);
        let mut pages = vec![MAPPED | GLOBAL; zone];
        pages.resize(zone + windows, EMPTY);
        Self { layout: *layout, pages: vec![pages; layout.cpus], found: 0 }
    }

    /// Nanoseconds for one of the steps, of as many as fit into [`LIMIT`].
    pub(super) fn time(&mut self, steps: &[Step]) -> f64 {
        let started = Instant::now();
        let mut taken = 0;
        for some in steps.chunks(CHUNK) {
            some.iter().for_each(|step| self.step(step));
            taken += some.len();
            if started.elapsed() > LIMIT {
                break;
            }
        }
        started.elapsed().as_secs_f64() * 1e9 / float(taken.max(1) as u64)
    }

    pub(super) fn step(&mut self, step: &Step) {
        match step {
            Step::Record(record) => match record.event {
                Event::EntryWrite(write) => self.write(&write),
                Event::Flush(flush) => self.flush(usize::from(record.cpu), &flush),
                Event::RootLoad { no_flush: false, .. } => {
                    self.flush(usize::from(record.cpu), &Flush::NonGlobal);
                }
                _ => {}
            },
            Step::Operation(_, op, ..) => self.operation(op.kind, op.frames),
        }
    }

    /// Takes a step of a guest that flushes all that it must: nothing is stale afterwards.
    pub(super) fn write_only(&mut self, step: &Step) {
        if let Step::Record(record) = step
            && let Event::EntryWrite(write) = record.event
        {
            self.write(&write);
            let Some(first) = self.index(write.va) else { return };
            let count = usize::try_from(write.span() >> PAGE_SHIFT).unwrap_or(0);
            for pages in &mut self.pages {
                pages.iter_mut().skip(first).take(count).for_each(|page| *page &= !STALE);
            }
        }
    }

    fn write(&mut self, write: &EntryWrite) {
        let Some(first) = self.index(write.va) else { return };
        let count = usize::try_from(write.span() >> PAGE_SHIFT).unwrap_or(0);
        let is_leaf = write.new.is_leaf(write.level) || !write.new.is_present();
        for pages in &mut self.pages {
            for page in pages.iter_mut().skip(first).take(count) {
                // A split maps what was mapped before.
                if is_leaf && !write.new.is_present() && *page & MAPPED != 0 {
                    *page = *page & GLOBAL | STALE;
                } else if write.new.is_present() {
                    let global = write.new.has(Entry::GLOBAL) || !is_leaf;
                    *page = *page & STALE | MAPPED | if global { GLOBAL } else { 0 };
                }
            }
        }
    }

    fn flush(&mut self, cpu: usize, flush: &Flush) {
        let range = match *flush {
            Flush::Pages { va, count, level } => {
                let Some(first) = self.index(va) else { return };
                let len = u64::from(count) * level.frames();
                first..first + usize::try_from(len).unwrap_or(0)
            }
            _ => 0..usize::MAX,
        };
        let spared = if matches!(flush, Flush::NonGlobal) { GLOBAL } else { 0 };
        let Some(pages) = self.pages.get_mut(cpu) else { return };
        let end = range.end.min(pages.len());
        for page in pages.get_mut(range.start..end).unwrap_or_default() {
            if *page & spared == 0 {
                *page &= !STALE;
            }
        }
    }

    fn operation(&mut self, kind: OpKind, frames: FrameRange) {
        let zone = self.layout.zone_frames();
        let first = usize::try_from(frames.start().0 - zone.start().0).unwrap_or(0);
        let count = usize::try_from(frames.count()).unwrap_or(0);
        for pages in &self.pages {
            let named = pages.iter().skip(first).take(count);
            let stale = named.filter(|page| **page & STALE != 0).count();
            if kind != OpKind::Release && stale > 0 {
                self.found += 1;
            }
        }
    }

    /// Where the page of an address is kept.
    fn index(&self, va: Gva) -> Option<usize> {
        let zone = self.layout.zone.len >> PAGE_SHIFT;
        let page = match self.layout.place_of(va) {
            Place::DirectMap => va.offset_from(self.layout.zone.va)? >> PAGE_SHIFT,
            Place::Window(_) => zone + (va.offset_from(window(0))? >> PAGE_SHIFT),
            Place::Pool | Place::Other => return None,
        };
        usize::try_from(page).ok()
    }
}
