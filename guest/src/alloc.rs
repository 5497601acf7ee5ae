//! The page allocator: requests for mapped and for secret pages.

mod config;
mod free;

use crate::balance::Watermarks;
use crate::counters::Counts;
use crate::error::{FirstFailure, UseError};
use crate::freetype::{Freetype, Migratetype};
use crate::handle::Slot;
use crate::lock::{IrqGuard, IrqLock};
use crate::mapped::MappedPages;
use crate::mermap::{Mermap, MermapError};
use crate::meta::{Chunk, MAX_ORDER, MemMap};
use crate::parked::Parked;
use crate::pcp::{CpuLists, Held, Marks, pindex};
use crate::platform::{GateError, InterruptsOff, Platform};
#[cfg(feature = "unmapped")]
use crate::secret::SecretPages;
use crate::tables::TablePages;
use crate::zeroing::Purpose;
use crate::zone::{BLOCK, Taken, Zone};
use core::sync::atomic::AtomicBool;
use lacuna_abi::MAX_CPUS;
use lacuna_abi::addr::{Gfn, PAGE_SIZE};
use lacuna_abi::event::Life;
use lacuna_abi::layout::{Layout, direct_map};

pub use config::AllocConfig;

/// What a caller asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    /// 2^order pages, naturally aligned; 0 to 10.
    pub order: u8,
    /// How the pages may be moved.
    pub migratetype: Migratetype,
    /// The pages are to be zero.
    pub zero: bool,
    /// The caller must not wait for other CPUs. With interrupts off that goes without saying.
    pub noblock: bool,
}

/// Why no pages were handed out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AllocError {
    /// No memory is left but what is kept for callers that cannot wait; or the pool is empty and the
    /// configuration forbids flips.
    NoMemory,
    /// Memory is free, but no pageblock is wholly free, so none can be flipped; for order 10, no
    /// two that lie together.
    NoBlock,
    /// The pool is empty, and the caller must not wait for a flip, or has interrupts off.
    WouldBlock,
    /// No order above 10 exists.
    BadOrder,
    /// The host refused.
    Gate(GateError),
    /// The pages could not be zeroed: no window could be had, and the reserve is in use.
    Window(MermapError),
    /// Somebody wrote to the pages after they were freed.
    Corrupted {
        /// The page.
        frame: Gfn,
        /// The word that should not be there.
        found: u64,
    },
}

impl From<UseError> for AllocError {
    fn from(error: UseError) -> Self {
        match error {
            UseError::Gate(error) | UseError::Unsealed(error) => Self::Gate(error),
            UseError::Window(error) => Self::Window(error),
            // Of the allocator's own use of whole allocations neither can come.
            UseError::OutOfRange | UseError::ReadOnly => Self::NoMemory,
            UseError::WouldBlock => Self::WouldBlock,
        }
    }
}

/// The allocator of the zone. All CPUs share one.
pub struct PageAllocator<'a, P: Platform> {
    pub(crate) platform: &'a P,
    pub(crate) layout: Layout,
    pub(crate) map: MemMap<'a>,
    pub(crate) mermap: Mermap<'a, P>,
    pub(crate) config: AllocConfig,
    pub(crate) counts: Counts,
    pub(crate) marks: Watermarks,
    cpu_marks: Marks,
    zone: IrqLock<Zone>,
    lists: [CpuLists; MAX_CPUS],
    /// There is something for [`Self::balance`] to do.
    pub(crate) wake: AtomicBool,
    /// Pages of the table pool that hold no table.
    pub(crate) table_pages: TablePages,
    /// Converted pages that were freed and could not come back yet.
    pub(crate) parked: Parked,
}

impl<'a, P: Platform> PageAllocator<'a, P> {
    /// An allocator over memory that never was used. Touches nothing: the time that this takes
    /// does not depend on the size of the zone.
    pub fn new(platform: &'a P, layout: &Layout, map: MemMap<'a>, config: AllocConfig) -> Self {
        Self {
            platform,
            layout: *layout,
            map,
            mermap: Mermap::new(platform, layout, map),
            config,
            counts: Counts::default(),
            marks: config.min_free.map_or(Watermarks::for_zone(map.len()), Watermarks::above),
            cpu_marks: Marks::for_zone(map.len()),
            zone: IrqLock::new(Zone::default()),
            lists: core::array::from_fn(|_| CpuLists::default()),
            wake: AtomicBool::new(false),
            table_pages: TablePages::new(),
            parked: Parked::default(),
        }
    }

    /// Prepares the mermap. Secret pages can be had before, but neither zeroed nor used.
    ///
    /// # Errors
    /// As [`Mermap::prepare`].
    pub fn prepare(&self) -> Result<(), MermapError> {
        self.mermap.prepare()
    }

    /// Pages that the direct map shows. If too few are left, wholly free secret pageblocks come back
    /// from the pool, unless the caller must not block; such a caller may use half of what others
    /// must leave.
    ///
    /// # Errors
    /// [`AllocError`]; nothing was taken.
    pub fn alloc_mapped(&self, request: Request) -> Result<MappedPages<'_, 'a, P>, AllocError> {
        check_order(request)?;
        let Request { order, migratetype, zero, noblock } = request;
        let freetype = Freetype::mapped(migratetype);
        let index = match self.take(order, freetype, self.floor(noblock)) {
            Some(index) => index,
            None => self.take_mapped_slowly(request)?,
        };
        let chunk = Chunk { index, order };
        let is_zero = self.check_mapped(chunk)?;
        if zero && !is_zero {
            let frames = self.map.frames(chunk);
            self.platform.zero(direct_map(frames.start().gpa()), frames.count() * PAGE_SIZE);
            self.counts.zeroed_mapped.add(frames.count());
        }
        self.counts.alloc_mapped.add(1);
        Ok(MappedPages::new(self, Slot::hand_out(&self.map, chunk, freetype)))
    }

    /// Pages that are absent from the direct map and closed in the second stage. If the pool has
    /// none, pageblocks are flipped, unless the caller must not block.
    ///
    /// # Errors
    /// [`AllocError`]; nothing was taken.
    #[cfg(feature = "unmapped")]
    pub fn alloc_secret(&self, request: Request) -> Result<SecretPages<'_, 'a, P>, AllocError> {
        check_order(request)?;
        let Request { order, migratetype, zero, .. } = request;
        let freetype = Freetype::unmapped(migratetype);
        let index = match self.take(order, freetype, 0) {
            Some(index) => index,
            None => self.take_secret_slowly(request)?,
        };
        let chunk = Chunk { index, order };
        let frames = self.map.frames(chunk);
        if zero {
            self.make_zero(chunk)?;
        }
        let life = if zero { Life::HandedOutZero } else { Life::HandedOut };
        self.platform.life(life, frames);
        self.counts.alloc_secret.add(1);
        Ok(SecretPages::new(self, Slot::hand_out(&self.map, chunk, freetype)))
    }

    /// The windows.
    #[cfg(feature = "unmapped")]
    pub fn mermap(&self) -> &Mermap<'a, P> {
        &self.mermap
    }

    /// Counts work done by the program: trace events, or pages stored.
    pub fn count_work(&self) {
        self.counts.work.add(1);
    }

    /// Counts time that the program measured: allocating, using, freeing; then what of it went by in
    /// gate calls, for pages and for their use.
    pub(crate) fn count_ticks(&self, ticks: [u64; 5]) {
        self.counts.ticks.iter().zip(ticks).for_each(|(count, ticks)| count.add(ticks));
    }

    /// Counts tags that the program checked.
    pub fn count_tags(&self, tags: u64) {
        self.counts.tags_checked.add(tags);
    }

    /// Takes the zone lock.
    pub(crate) fn zone(&self) -> IrqGuard<'_, Zone, P> {
        self.zone.lock(self.platform)
    }

    /// This CPU's lists, and its number.
    pub(crate) fn own_lists(&self) -> (usize, Held<'_, P>) {
        let off = InterruptsOff::new(self.platform);
        let cpu = self.platform.cpu();
        (cpu, self.lists[cpu].lock(self.platform, off))
    }

    /// The lists of `cpu`.
    pub(crate) fn lists_of(&self, cpu: usize) -> Held<'_, P> {
        self.lists[cpu].lock(self.platform, InterruptsOff::new(self.platform))
    }

    /// Pages that a mapped request leaves free.
    fn floor(&self, noblock: bool) -> u32 {
        if noblock { self.marks.min / 2 } else { self.marks.min }
    }

    /// Takes pages off this CPU's lists, or off the zone's.
    fn take(&self, order: u8, freetype: Freetype, floor: u32) -> Option<u32> {
        let Some(pindex) = pindex(order, freetype) else {
            let mut zone = self.zone();
            let taken = zone.take(&self.map, order, freetype, floor);
            self.look(&zone);
            return taken.map(|taken| self.taken(taken));
        };
        let (_, lists) = self.own_lists();
        if let Some(index) = lists.pop(&self.map, pindex) {
            return Some(index);
        }
        let mut zone = self.zone();
        let first = zone.take(&self.map, order, freetype, floor)?;
        for _ in 1..self.cpu_marks.batch >> order {
            if !freetype.unmapped && zone.mapped_free(&self.map) < self.marks.high {
                break;
            }
            let Some(index) = zone.take_own(&self.map, order, freetype) else { break };
            lists.push(&self.map, Chunk { index, order }, pindex);
        }
        self.look(&zone);
        Some(self.taken(first))
    }

    fn taken(&self, taken: Taken) -> u32 {
        if taken.fallback {
            self.counts.alloc_fallback.add(1);
        }
        taken.index
    }

    /// Finds mapped pages where there are none at hand: on the lists of CPUs, then in secret
    /// pageblocks that nobody uses. What fails on the way is told only if nothing serves.
    fn take_mapped_slowly(&self, request: Request) -> Result<u32, AllocError> {
        let Request { order, migratetype, .. } = request;
        let noblock = request.noblock || !self.may_wait();
        let freetype = Freetype::mapped(migratetype);
        let floor = self.floor(noblock);
        let mut failure = FirstFailure::default();
        if noblock {
            let (_, lists) = self.own_lists();
            lists.drain(&self.map, &mut self.zone(), 0);
        } else {
            failure.note(self.drain_all());
        }
        loop {
            if let Some(taken) = self.zone().take(&self.map, order, freetype, floor) {
                return Ok(self.taken(taken));
            }
            if noblock || !self.reclaim(order, migratetype, &mut failure) {
                self.counts.alloc_fail.add(1);
                return Err(failure.or(AllocError::NoMemory));
            }
        }
    }

    /// Finds secret pages where there are none at hand: freed ones that wait to be scrubbed, then by
    /// flipping pageblocks, at last after emptying the lists of CPUs and moving what can be moved.
    /// What fails on the way is told only if nothing serves.
    fn take_secret_slowly(&self, request: Request) -> Result<u32, AllocError> {
        let Request { order, migratetype, .. } = request;
        let noblock = request.noblock || !self.may_wait();
        let freetype = Freetype::unmapped(migratetype);
        let again = || self.zone().take(&self.map, order, freetype, 0);
        // Which CPU does not matter much, should this task be on another one by now.
        let cpu = self.own_lists().0;
        let mut failure = FirstFailure::default();
        failure.note(self.scrub_freed(cpu));
        self.drain(cpu, 0);
        if let Some(taken) = again() {
            return Ok(self.taken(taken));
        }
        if noblock {
            self.counts.alloc_fail_noblock.add(1);
            return Err(failure.or(AllocError::WouldBlock));
        }
        for attempt in 0..3 {
            match attempt {
                0 => {}
                1 => {
                    failure.note(self.drain_all());
                    if let Some(taken) = again() {
                        return Ok(self.taken(taken));
                    }
                }
                _ if self.config.flip && order <= BLOCK && self.compact() => {}
                _ => break,
            }
            if self.config.flip {
                match self.flip_to_unmapped(order, migratetype) {
                    Ok(index) => return Ok(index),
                    Err(AllocError::NoBlock) => {}
                    Err(error) => return Err(failure.or(error)),
                }
            }
        }
        Err(failure.or(self.no_pageblock(order)))
    }

    /// Why there is nothing to flip.
    fn no_pageblock(&self, order: u8) -> AllocError {
        let plentiful = self.marks.min.saturating_add(1 << order.max(BLOCK));
        if self.config.flip && self.zone().mapped_free(&self.map) >= plentiful {
            self.counts.alloc_fail_no_block.add(1);
            AllocError::NoBlock
        } else {
            self.counts.alloc_fail.add(1);
            AllocError::NoMemory
        }
    }

    /// Makes secret pages zero that are about to be handed out so.
    ///
    /// # Errors
    /// [`AllocError`]; the pages are free again, or withheld.
    fn make_zero(&self, chunk: Chunk) -> Result<(), AllocError> {
        let frames = self.map.frames(chunk);
        let known = self.map.is_known(frames);
        if let Err(error) = self.zero_unknown(frames, Purpose::HandOut) {
            if matches!(error, UseError::Unsealed(_)) {
                self.withhold(chunk, false);
            } else {
                self.put(chunk);
            }
            return Err(error.into());
        }
        if known {
            self.check_zero(chunk)?;
        }
        Ok(())
    }
}

fn check_order(request: Request) -> Result<(), AllocError> {
    if request.order > MAX_ORDER { Err(AllocError::BadOrder) } else { Ok(()) }
}
