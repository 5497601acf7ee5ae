//! The page allocator: requests for mapped and for secret pages.

use crate::counters::Counts;
use crate::freetype::{Freetype, Migratetype};
use crate::lock::{IrqGuard, IrqLock};
use crate::mapped::MappedPages;
use crate::mermap::{Mermap, MermapError};
use crate::meta::{Chunk, MAX_ORDER, MemMap, State};
use crate::platform::{GateError, Platform};
use crate::secret::{SecretPages, UseError};
use crate::tables::TablePages;
use crate::zeroing::Purpose;
use crate::zone::{Taken, Zone};
use core::sync::atomic::AtomicU32;
use lacuna_abi::addr::{FrameRange, PAGE_SIZE};
use lacuna_abi::counter::Counters;
use lacuna_abi::event::Life;
use lacuna_abi::layout::{Layout, Region, direct_map};

/// How the allocator behaves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AllocConfig {
    /// Pageblocks are zeroed when they flip, so that hand-out finds zero pages.
    pub prezero: bool,
    /// An empty pool is refilled by flipping pageblocks.
    pub flip: bool,
}

/// What a caller asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    /// 2^order pages, naturally aligned; 0 to 10.
    pub order: u8,
    /// How the pages may be moved.
    pub migratetype: Migratetype,
    /// The pages are to be zero.
    pub zero: bool,
    /// The caller must not wait for other CPUs: it holds a lock, or has interrupts off.
    pub noblock: bool,
}

/// Why no pages were handed out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AllocError {
    /// No memory is left; or the pool is empty and the configuration forbids flips.
    NoMemory,
    /// Memory is free, but no pageblock is wholly free, so none can be flipped; for order 10, no
    /// two that lie together.
    NoBlock,
    /// The pool is empty, and the caller must not wait for a flip.
    WouldBlock,
    /// No order above 10 exists.
    BadOrder,
    /// The host refused.
    Gate(GateError),
    /// The pages could not be zeroed: no window could be had, and the reserve is in use.
    Window(MermapError),
}

impl From<UseError> for AllocError {
    fn from(error: UseError) -> Self {
        match error {
            UseError::Gate(error) | UseError::Unsealed(error) => Self::Gate(error),
            UseError::Window(error) => Self::Window(error),
            // Of the allocator's own use of whole allocations neither can come.
            UseError::OutOfRange | UseError::ReadOnly => Self::NoMemory,
        }
    }
}

/// The allocator of the zone. All CPUs share one.
pub struct PageAllocator<'a, P: Platform> {
    pub(crate) platform: &'a P,
    /// The table pool.
    pub(crate) tables: Region,
    pub(crate) map: MemMap<'a>,
    pub(crate) mermap: Mermap<'a, P>,
    pub(crate) config: AllocConfig,
    pub(crate) counts: Counts,
    zone: IrqLock<Zone>,
    /// Pages of the table pool that hold no table.
    pub(crate) table_pages: TablePages,
    /// First of the parked allocations, as index plus one; 0 for none.
    pub(crate) parked: AtomicU32,
}

impl<'a, P: Platform> PageAllocator<'a, P> {
    /// An allocator over memory that never was used. Touches nothing: the time that this takes
    /// does not depend on the size of the zone.
    pub fn new(platform: &'a P, layout: &Layout, map: MemMap<'a>, config: AllocConfig) -> Self {
        Self {
            platform,
            tables: layout.pool,
            map,
            mermap: Mermap::new(platform, layout, map),
            config,
            counts: Counts::default(),
            zone: IrqLock::new(Zone::default()),
            table_pages: TablePages::new(),
            parked: AtomicU32::new(0),
        }
    }

    /// Prepares the mermap. Secret pages can be had before, but neither zeroed nor used.
    ///
    /// # Errors
    /// As [`Mermap::prepare`].
    pub fn prepare(&self) -> Result<(), MermapError> {
        self.mermap.prepare()
    }

    /// Pages that the direct map shows. If none are left, wholly free secret pageblocks come back
    /// from the pool, unless the caller must not block.
    ///
    /// # Errors
    /// [`AllocError`]; nothing was taken.
    pub fn alloc_mapped(&self, request: Request) -> Result<MappedPages<'_, 'a, P>, AllocError> {
        check_order(request)?;
        let freetype = Freetype::mapped(request.migratetype);
        let index = loop {
            let taken = self.zone().take(&self.map, request.order, freetype);
            if let Some(taken) = taken {
                break self.taken(taken);
            }
            if request.noblock || !self.reclaim(request.order, request.migratetype)? {
                self.counts.alloc_fail.add(1);
                return Err(AllocError::NoMemory);
            }
        };
        let chunk = Chunk { index, order: request.order };
        if request.zero {
            let frames = self.map.frames(chunk);
            self.platform.zero(direct_map(frames.start().gpa()), frames.count() * PAGE_SIZE);
            self.counts.zeroed_mapped.add(frames.count());
        }
        self.map.page(index).hand_out(request.order, freetype);
        self.counts.alloc.add(1);
        Ok(MappedPages::new(self, chunk))
    }

    /// Pages that are absent from the direct map and closed in the second stage. If the pool has
    /// none, pageblocks are flipped, unless the caller must not block.
    ///
    /// # Errors
    /// [`AllocError`]; nothing was taken.
    pub fn alloc_secret(&self, request: Request) -> Result<SecretPages<'_, 'a, P>, AllocError> {
        check_order(request)?;
        let freetype = Freetype::unmapped(request.migratetype);
        let pooled = self.zone().take(&self.map, request.order, freetype);
        let index = match pooled {
            Some(taken) => self.taken(taken),
            None if request.noblock => {
                self.counts.alloc_fail_noblock.add(1);
                return Err(AllocError::WouldBlock);
            }
            None if !self.config.flip => {
                self.counts.alloc_fail.add(1);
                return Err(AllocError::NoMemory);
            }
            None => self.flip_to_unmapped(request.order, request.migratetype)?,
        };
        let chunk = Chunk { index, order: request.order };
        let frames = self.map.frames(chunk);
        if request.zero
            && let Err(error) = self.zero_unknown(frames, Purpose::HandOut)
        {
            self.give_back(chunk, error);
            return Err(error.into());
        }
        let life = if request.zero { Life::HandedOutZero } else { Life::HandedOut };
        self.platform.life(life, frames);
        self.map.page(index).hand_out(request.order, freetype);
        self.counts.alloc.add(1);
        self.counts.alloc_secret.add(1);
        Ok(SecretPages::new(self, chunk))
    }

    /// Brings every wholly free secret pageblock back to the direct map, and converted pages that
    /// could not come back when they were freed.
    ///
    /// # Errors
    /// The host's first refusal; what it concerns stays in the pool.
    pub fn shrink(&self) -> Result<(), UseError> {
        self.restore_parked()?;
        while self.reclaim_batch()? {}
        Ok(())
    }

    /// The windows.
    pub fn mermap(&self) -> &Mermap<'a, P> {
        &self.mermap
    }

    /// Counts work done by the program: trace events, or pages stored.
    pub fn count_work(&self) {
        self.counts.work.add(1);
    }

    /// Counts tags that the program checked.
    pub fn count_tags(&self, tags: u64) {
        self.counts.tags_checked.add(tags);
    }

    /// Everything that was counted so far, and where the zone's pages are: mapped and unmapped
    /// free, allocated and fresh pages add up to the zone. Gate calls are the platform's to count.
    pub fn counters(&self) -> Counters {
        let usage = self.zone().usage(&self.map);
        let windows = self.mermap.counters();
        let counts = &self.counts;
        Counters {
            alloc: counts.alloc.get(),
            alloc_secret: counts.alloc_secret.get(),
            free: counts.free.get(),
            free_secret: counts.free_secret.get(),
            alloc_fail: counts.alloc_fail.get(),
            alloc_fail_noblock: counts.alloc_fail_noblock.get(),
            alloc_fail_no_block: counts.alloc_fail_no_block.get(),
            alloc_fallback: counts.alloc_fallback.get(),
            zeroed_mapped: counts.zeroed_mapped.get(),
            zeroed_flip: counts.zeroed_flip.get(),
            zeroed_alloc: counts.zeroed_alloc.get(),
            zeroed_scrub: counts.zeroed_scrub.get(),
            flip_to_unmapped: counts.flip_to_unmapped.get(),
            flip_to_mapped: counts.flip_to_mapped.get(),
            splits: counts.splits.get(),
            merges: counts.merges.get(),
            converted: counts.converted.get(),
            converted_pages: counts.converted_pages.get(),
            restored: counts.restored.get(),
            shootdowns: counts.shootdowns.get(),
            window_flushes: windows.flushes,
            windows: windows.mapped,
            windows_reserved: windows.mapped_reserved,
            nr_free_mapped: u64::from(usage.free_mapped),
            nr_free_unmapped: u64::from(usage.free_unmapped),
            nr_allocated: u64::from(usage.allocated),
            nr_fresh: u64::from(usage.fresh),
            nr_table_pages: u64::from(self.table_pages.taken()),
            work: counts.work.get(),
            tags_checked: counts.tags_checked.get(),
            ..Counters::default()
        }
    }

    /// Takes the zone lock.
    pub(crate) fn zone(&self) -> IrqGuard<'_, Zone, P> {
        self.zone.lock(self.platform)
    }

    /// Frees mapped pages.
    pub(crate) fn free_mapped(&self, chunk: Chunk) {
        self.zone().free(&self.map, chunk);
        self.counts.free.add(1);
    }

    /// Scrubs and frees secret pages. What cannot be scrubbed goes back as it is, sealed and not
    /// known to be zero; what the host would not close is withheld. Converted pages go back to where
    /// they came from.
    pub(crate) fn free_secret(&self, chunk: Chunk) {
        let frames = self.map.frames(chunk);
        self.counts.free.add(1);
        self.platform.life(Life::Freed, frames);
        if self.map.page(chunk.index).is_converted() {
            // Whoever drops pages cannot be told; what is not free yet is tried again.
            let _ = self.free_converted(chunk);
            return;
        }
        self.counts.free_secret.add(1);
        let unsealed = self.map.page(chunk.index).is_unsealed();
        let scrubbed = self.zero_unknown(frames, Purpose::Scrub);
        if unsealed || matches!(scrubbed, Err(UseError::Unsealed(_))) {
            self.withhold(chunk);
            return;
        }
        self.report_pooled(frames);
        self.zone().free(&self.map, chunk);
    }

    /// Puts a chunk of pageblocks on the unmapped lists, as `freetype`. The lock is still held, so
    /// that the caller can take from them first.
    pub(crate) fn pool(&self, chunk: Chunk, freetype: Freetype) -> IrqGuard<'_, Zone, P> {
        self.report_pooled(self.map.frames(chunk));
        let mut zone = self.zone();
        self.map.blocks_of(chunk).iter().for_each(|block| block.set_freetype(freetype));
        zone.insert(&self.map, chunk);
        zone
    }

    /// Nobody uses the chunk any more: it stays allocated for good.
    pub(crate) fn withhold(&self, chunk: Chunk) {
        self.map.page(chunk.index).set_head(State::Withheld, chunk.order);
    }

    /// Puts pages back that were taken from the pool but could not be made zero.
    fn give_back(&self, chunk: Chunk, error: UseError) {
        if matches!(error, UseError::Unsealed(_)) {
            self.withhold(chunk);
        } else {
            self.zone().insert(&self.map, chunk);
        }
    }

    fn report_pooled(&self, frames: FrameRange) {
        let zero = self.map.is_zero(frames);
        self.platform.life(if zero { Life::PooledZero } else { Life::Pooled }, frames);
    }

    fn taken(&self, taken: Taken) -> u32 {
        if taken.fallback {
            self.counts.alloc_fallback.add(1);
        }
        taken.index
    }
}

fn check_order(request: Request) -> Result<(), AllocError> {
    if request.order > MAX_ORDER { Err(AllocError::BadOrder) } else { Ok(()) }
}
