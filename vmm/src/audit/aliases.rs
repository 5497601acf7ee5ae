//! From a frame to the tables that map it.
//!
//! The direct map needs no list: which of its entries maps a frame is arithmetic, as long as it maps
//! what its place says. Tables that map a frame anywhere else are counted for each pageblock of
//! frames: how many of their entries map some of it.

use super::tables::TableId;
use lacuna_abi::addr::{BLOCK_ORDER, FrameRange, Gfn, Gva, PAGE_SHIFT};
use lacuna_abi::layout::{DIRECT_MAP, Layout};
use lacuna_abi::paging::{ENTRIES, Level};
use std::collections::BTreeMap;

/// log2 of the frames that an entry of level 3 maps.
const WIDE_ORDER: u32 = 2 * BLOCK_ORDER;

/// A table some of whose entries map frames of a pageblock, or of 1 GiB.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Link {
    table: TableId,
    entries: u32,
}

/// A table and which of its entries may map what was asked for: from, to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Found {
    pub table: TableId,
    pub entries: (u64, u64),
}

/// From a frame to the tables that map it.
#[derive(Clone, Debug)]
pub(super) struct Aliases {
    zone: FrameRange,
    /// The direct map's page table of each pageblock of the zone, and its page directory of each
    /// GiB. Their entries are not listed where they map what their place says.
    small_homes: Vec<Option<TableId>>,
    large_homes: Vec<Option<TableId>>,
    /// Tables by pageblock: below the zone's end, and above.
    near: Vec<Vec<Link>>,
    far: BTreeMap<u64, Vec<Link>>,
    /// Tables of level 3 by GiB.
    wide: BTreeMap<u64, Vec<Link>>,
}

impl Aliases {
    pub(super) fn new(layout: &Layout) -> Self {
        let zone = layout.zone_frames();
        let parts =
            |frames: u64, order: u32| usize::try_from(frames.div_ceil(1 << order)).unwrap_or(0);
        Self {
            zone,
            small_homes: vec![None; parts(zone.count(), BLOCK_ORDER)],
            large_homes: vec![None; parts(zone.count(), WIDE_ORDER)],
            near: vec![Vec::new(); parts(zone.end().0, BLOCK_ORDER)],
            far: BTreeMap::new(),
            wide: BTreeMap::new(),
        }
    }

    /// Makes the table that of the direct map for what it spans from `va`, if it lies there and no
    /// other one is.
    pub(super) fn settle(&mut self, table: TableId, va: Gva) {
        let frame = va.offset_from(DIRECT_MAP).map(|offset| Gfn(offset >> PAGE_SHIFT));
        if let Some(home) = frame.and_then(|frame| self.home_slot(frame, table.level())) {
            home.get_or_insert(table);
        }
    }

    /// First frame of what the table maps if it is the direct map's.
    #[inline]
    fn home_of(&self, table: TableId, frame: Gfn) -> Option<Gfn> {
        let offset = frame.0.checked_sub(self.zone.start().0)?;
        let (homes, order) = match table.level() {
            Level::Pt => (&self.small_homes, BLOCK_ORDER),
            Level::Pd => (&self.large_homes, WIDE_ORDER),
            Level::Pdpt | Level::Pml4 => return None,
        };
        let part = offset >> order;
        let home = homes.get(usize::try_from(part).ok()?)?;
        (*home == Some(table)).then(|| Gfn(self.zone.start().0 + (part << order)))
    }

    fn home_slot(&mut self, frame: Gfn, level: Level) -> Option<&mut Option<TableId>> {
        let offset = frame.0.checked_sub(self.zone.start().0)?;
        let (homes, order) = match level {
            Level::Pt => (&mut self.small_homes, BLOCK_ORDER),
            Level::Pd => (&mut self.large_homes, WIDE_ORDER),
            Level::Pdpt | Level::Pml4 => return None,
        };
        homes.get_mut(usize::try_from(offset >> order).ok()?)
    }

    /// The table is none any more; its entries were taken out.
    pub(super) fn leave(&mut self, table: TableId, va: Gva) {
        let frame = va.offset_from(DIRECT_MAP).map(|offset| Gfn(offset >> PAGE_SHIFT));
        if let Some(home) = frame.and_then(|frame| self.home_slot(frame, table.level()))
            && *home == Some(table)
        {
            *home = None;
        }
    }

    /// Entries of the table from `index` on map `count` pages of its level from `frame` on.
    pub(super) fn add(&mut self, table: TableId, index: u64, frame: Gfn, count: u64) {
        self.change(table, index, (frame, count), true);
    }

    /// They do not any more.
    pub(super) fn remove(&mut self, table: TableId, index: u64, frame: Gfn, count: u64) {
        self.change(table, index, (frame, count), false);
    }

    #[inline]
    fn change(&mut self, table: TableId, index: u64, (frame, count): (Gfn, u64), add: bool) {
        let level = table.level();
        let home = self.home_of(table, frame);
        if home.is_some_and(|home| home.0 + index * level.frames() == frame.0) {
            return;
        }
        // Most runs are of one entry.
        if count == 1
            && level <= Level::Pd
            && let Ok(block) = usize::try_from(frame.0 >> BLOCK_ORDER)
            && let Some(links) = self.near.get_mut(block)
        {
            adjust(links, table, 1, add);
            return;
        }
        self.change_many(table, (frame, count), add);
    }

    fn change_many(&mut self, table: TableId, (frame, count): (Gfn, u64), add: bool) {
        let level = table.level();
        if level > Level::Pd {
            for page in 0..count {
                let part = (frame.0 >> WIDE_ORDER) + page;
                let links = self.wide.entry(part).or_default();
                adjust(links, table, 1, add);
                if links.is_empty() {
                    self.wide.remove(&part);
                }
            }
            return;
        }
        let Some(frames) = FrameRange::new(frame, count * level.frames()) else { return };
        for part in frames.by_block() {
            let block = part.start().0 >> BLOCK_ORDER;
            let entries = if level == Level::Pt { part.count() } else { 1 };
            let entries = u32::try_from(entries).unwrap_or(u32::MAX);
            let near = usize::try_from(block).ok().and_then(|block| self.near.get_mut(block));
            if let Some(links) = near {
                adjust(links, table, entries, add);
                continue;
            }
            let links = self.far.entry(block).or_default();
            adjust(links, table, entries, add);
            if links.is_empty() {
                self.far.remove(&block);
            }
        }
    }

    /// The direct map's directory with its entry for a pageblock, and its page table if there is one,
    /// where nothing else can map anything of the pageblock; `None` if something may.
    pub(super) fn only_homes(&self, part: FrameRange) -> Option<((TableId, u64), Option<TableId>)> {
        let offset = part.start().0.checked_sub(self.zone.start().0)?;
        let slot = |order: u32| usize::try_from(offset >> order).ok();
        let listed = usize::try_from(part.start().0 >> BLOCK_ORDER).ok();
        let listed = listed.and_then(|block| self.near.get(block));
        let small = self.small_homes.get(slot(BLOCK_ORDER)?)?;
        if !self.wide.is_empty() || !listed?.is_empty() {
            return None;
        }
        let large = self.large_homes.get(slot(WIDE_ORDER)?).copied().flatten()?;
        Some(((large, part.start().0 >> BLOCK_ORDER & (ENTRIES - 1)), *small))
    }

    /// Tables of level 1 and 2 that may map some of these frames, which lie in one pageblock.
    pub(super) fn of_block(&self, part: FrameRange) -> impl Iterator<Item = Found> {
        let start = part.start().0;
        let block = start >> BLOCK_ORDER;
        let offset = start.checked_sub(self.zone.start().0);
        let home = |homes: &[Option<TableId>], order: u32| {
            let slot = usize::try_from(offset? >> order).ok()?;
            homes.get(slot).copied().flatten()
        };
        let small = home(&self.small_homes, BLOCK_ORDER).map(|table| {
            let first = start & (ENTRIES - 1);
            Found { table, entries: (first, first + part.count()) }
        });
        let large = home(&self.large_homes, WIDE_ORDER).map(|table| {
            let index = block & (ENTRIES - 1);
            Found { table, entries: (index, index + 1) }
        });
        let near = usize::try_from(block).ok().and_then(|block| self.near.get(block));
        let links = near.or_else(|| self.far.get(&block));
        let listed = links.into_iter().flatten();
        // An entry at home is not listed: of a table that is both, all entries are looked at.
        let homes = [large, small].map(move |home| {
            home.filter(|home| links.is_none_or(|l| l.iter().all(|l| l.table != home.table)))
        });
        homes
            .into_iter()
            .flatten()
            .chain(listed.map(|link| Found { table: link.table, entries: (0, ENTRIES) }))
    }

    /// Tables of level 3 that may map some of these frames.
    pub(super) fn wide(&self, frames: FrameRange) -> impl Iterator<Item = TableId> {
        let (first, last) = (frames.start().0 >> WIDE_ORDER, (frames.end().0 - 1) >> WIDE_ORDER);
        let mut tables: Vec<TableId> = Vec::new();
        if !self.wide.is_empty() {
            let links = self.wide.range(first..=last).flat_map(|(_, links)| links);
            tables.extend(links.map(|link| link.table));
            tables.sort_unstable();
            tables.dedup();
        }
        tables.into_iter()
    }
}

/// Counts entries of a table in or out.
fn adjust(links: &mut Vec<Link>, table: TableId, entries: u32, add: bool) {
    match links.iter().position(|link| link.table == table) {
        Some(at) if add => links[at].entries += entries,
        Some(at) => {
            links[at].entries = links[at].entries.saturating_sub(entries);
            if links[at].entries == 0 {
                links.remove(at);
            }
        }
        None if add => links.push(Link { table, entries }),
        None => {}
    }
}
