//! What the test machine's host knows of tables: which exist, where they are linked, through which
//! of them a CPU may still walk; and frames that every CPU must be able to reach all the time.

use super::judge::{Seen, Stale, State};
use lacuna_abi::addr::{FrameRange, Gfn, Gpa, Gva, PAGE_SIZE};
use lacuna_abi::event::{EntryWrite, Life, TableFill, mapped_frames};
use lacuna_abi::layout::{Place, direct_map};
use lacuna_abi::paging::{ENTRIES, Entry, Level};
use lacuna_abi::walk;
use std::collections::{HashMap, HashSet};
use std::vec::Vec;

/// A path to a table that a CPU may still have in its paging-structure caches.
struct StalePath {
    cpu: usize,
    table: Gpa,
    va: Gva,
}

/// The tables that the guest made.
#[derive(Default)]
pub(super) struct TableState {
    /// Pages that were reported as tables.
    pub(super) live: HashSet<Gpa>,
    /// Where each is linked.
    links: HashMap<Gpa, Gva>,
    stale: Vec<StalePath>,
    watched: Vec<Gfn>,
}

impl TableState {
    /// Any flush empties the paging-structure caches of its CPU (SDM volume 3, "Operations that
    /// Invalidate TLBs and Paging-Structure Caches").
    pub(super) fn forget(&mut self, cpu: usize) {
        self.stale.retain(|path| path.cpu != cpu);
    }

    fn is_cached(&self, table: Gpa) -> bool {
        self.stale.iter().any(|path| path.table == table)
    }
}

fn is_table(entry: Entry, level: Level) -> bool {
    entry.is_present() && !entry.is_leaf(level)
}

impl State {
    pub(crate) fn fill_table(&mut self, fill: &TableFill) {
        assert!(fill.is_well_formed(), "{fill:?}");
        let table = fill.table;
        self.see(Seen::Fill(table.frame()));
        if !self.made.live.contains(&table) || self.made.links.contains_key(&table) {
            self.violation("stale-table: filled in use", FrameRange::single(table.frame()));
        }
        if self.made.is_cached(table) {
            self.violation("stale-table: filled while cached", FrameRange::single(table.frame()));
        }
        for index in 0..ENTRIES {
            self.tables.insert(table.0 + 8 * index, fill.entry(index));
        }
        self.check_watched();
    }

    /// The tables that a write links or unlinks, and the leaves in them.
    pub(super) fn relink(&mut self, write: &EntryWrite) {
        for index in 0..u64::from(write.count) {
            let (old, new) = (write.old, write.new);
            let va = write.va.wrapping_add(index * write.level.span());
            if is_table(old, write.level) {
                self.unlink(old.nth_of_run(write.level, index).frame(write.level).gpa(), va);
            }
            if is_table(new, write.level) {
                self.link(new.nth_of_run(write.level, index).frame(write.level).gpa(), va);
            }
        }
        // What the new leaves show comes after what the old table no longer shows.
        if write.new.is_present() && write.new.is_leaf(write.level) {
            let direct = self.layout.place_of(write.va) == Place::DirectMap;
            let frames = mapped_frames(write.new, write.level, write.count).filter(|_| direct);
            frames
                .into_iter()
                .flat_map(FrameRange::iter)
                .for_each(|f| self.frame_mut(f).direct = true);
        }
    }

    fn link(&mut self, table: Gpa, va: Gva) {
        let frame = FrameRange::single(table.frame());
        if !self.made.live.contains(&table) || self.made.links.insert(table, va).is_some() {
            self.violation("stale-table: linked twice, or no table", frame);
        }
        for leaf in self.leaves(table) {
            if self.frame(leaf).secret {
                self.violation("direct-map-alias", FrameRange::single(leaf));
            }
            self.frame_mut(leaf).direct = true;
        }
    }

    fn unlink(&mut self, table: Gpa, va: Gva) {
        assert_eq!(self.made.links.remove(&table), Some(va), "{table} was not linked at {va}");
        let leaves = self.leaves(table);
        let base = va.0 & !(Level::Pd.span() - 1);
        for frame in &leaves {
            self.frame_mut(*frame).direct = false;
            let offset = (frame.0 * PAGE_SIZE) & (Level::Pd.span() - 1);
            for cpu in 0..self.layout.cpus {
                self.stale.push(Stale {
                    cpu,
                    va: Gva(base + offset),
                    bytes: PAGE_SIZE,
                    global: true,
                    frames: FrameRange::single(*frame),
                    window: false,
                });
            }
        }
        let cpus = 0..self.layout.cpus;
        self.made.stale.extend(cpus.map(|cpu| StalePath { cpu, table, va }));
    }

    /// Frames that the entries of a page table map, which the direct map has at their own places.
    fn leaves(&self, table: Gpa) -> Vec<Gfn> {
        let entries = (0..ENTRIES).map(|index| (index, self.tables[&(table.0 + 8 * index)]));
        entries
            .filter(|(_, entry)| entry.is_present())
            .map(|(index, entry)| {
                let frame = entry.frame(Level::Pt);
                assert_eq!(frame.0 % ENTRIES, index, "an entry of the direct map is misplaced");
                frame
            })
            .collect()
    }

    pub(super) fn table_life(&mut self, life: Life, frames: FrameRange) {
        assert_eq!(frames.count(), 1);
        let table = frames.start().gpa();
        assert!(self.layout.pool.contains(table), "{table} is not in the pool");
        if self.made.links.contains_key(&table) {
            self.violation("stale-table: linked", frames);
        }
        if self.made.is_cached(table) {
            self.violation("stale-table: cached", frames);
        }
        let known = match life {
            Life::TableAllocated => {
                assert!(table >= self.free_tables, "{table} holds a table since boot");
                !self.made.live.insert(table)
            }
            _ => self.made.live.remove(&table),
        };
        if known != (life == Life::TableFreed) {
            self.violation("stale-table: allocated or freed twice", frames);
        }
    }

    /// From now on every CPU must reach these frames through the direct map, whatever it caches.
    pub(crate) fn watch(&mut self, frames: FrameRange) {
        self.made.watched.extend(frames.iter());
        self.check_watched();
    }

    /// Pages that hold tables which the guest made.
    pub(crate) fn live_tables(&self) -> usize {
        self.made.live.len()
    }

    /// The same through the tables as they are, through translations of them that may be cached,
    /// and through tables that may be: in each case the frame itself, writable.
    pub(super) fn check_watched(&self) {
        let read = |at| self.read_entry(at);
        for frame in &self.made.watched {
            let va = direct_map(frame.gpa());
            let leaf = walk::translate(&read, self.layout.pool.gpa, va);
            let leaf = leaf.unwrap_or_else(|error| panic!("{frame} is not mapped: {error:?}"));
            assert!(leaf.writable && leaf.gpa_of(va) == frame.gpa(), "{frame}: {leaf:?}");
            for stale in self.stale.iter().filter(|s| s.va <= va && va.0 < s.va.0 + s.bytes) {
                let cached = stale.frames.start().0 + (va.0 - stale.va.0) / PAGE_SIZE;
                assert_eq!(cached, frame.0, "CPU {} may reach another frame", stale.cpu);
            }
            for path in self.made.stale.iter().filter(|p| va.align_down(Level::Pd.span()) == p.va) {
                let entry = self.tables[&(path.table.0 + 8 * Level::Pt.index(va))];
                let same = entry.has(Entry::DATA | Entry::GLOBAL);
                assert!(same && entry.frame(Level::Pt) == *frame, "CPU {} faults", path.cpu);
            }
        }
    }
}
