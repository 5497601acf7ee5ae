//! What holds after every step, and at the end.

use super::{History, Owner};
use crate::counters::Pages;
use crate::freetype::Freetype;
use crate::testing::step::Use;
use std::vec::Vec;

impl History<'_, '_> {
    /// Compares everything but contents.
    pub(super) fn check(&self) {
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
    pub(super) fn end(mut self) {
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
