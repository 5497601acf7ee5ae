//! Flips: whole pageblocks leave the direct map to become secret, and come back.

use crate::alloc::{AllocError, PageAllocator};
use crate::freetype::{Freetype, Migratetype};
use crate::meta::{Chunk, MAX_ORDER};
use crate::platform::{CpuSet, GateError, Platform, planted};
use crate::secret::UseError;
use crate::space::{self, Run};
use crate::zeroing::Purpose;
use crate::zone::BLOCK;
use lacuna_abi::addr::FrameRange;
use lacuna_abi::event::{Flush, Life};
use lacuna_abi::gate::OpKind;
use lacuna_abi::layout::direct_map;
use lacuna_abi::paging::{Entry, Level};

/// Chunks of pageblocks that come back under one shootdown.
const BATCH: usize = 16;

/// What became of pageblocks that were to be closed.
enum Closed {
    /// They are sealed.
    Sealed,
    /// The host refused to make them secret: they still are ordinary memory.
    Ordinary(GateError),
    /// They are sealed, but the host refused to open them for zeroing.
    NotZeroed(GateError),
    /// The host refused to close them again.
    LeftOpen(GateError),
}

impl<P: Platform> PageAllocator<'_, P> {
    /// Flips the pageblocks that an allocation of `order` needs to the unmapped side and takes the
    /// allocation from them.
    ///
    /// # Errors
    /// [`AllocError`]: no pageblock is wholly free, or the host refused. Then the pageblocks are
    /// where they were, or in the pool if they had become secret already; only what the host would
    /// not close is withheld from any further use.
    pub(crate) fn flip_to_unmapped(
        &self,
        order: u8,
        migratetype: Migratetype,
    ) -> Result<u32, AllocError> {
        let size = order.max(BLOCK);
        let taken = self.zone().take_mapped_blocks(&self.map, size, migratetype);
        let chunk = taken.ok_or_else(|| self.no_pageblock())?;
        let frames = self.map.frames(chunk);
        self.remove_from_direct_map(chunk);
        let refused = match self.close(frames) {
            Closed::Sealed => None,
            Closed::NotZeroed(error) => Some(error),
            Closed::Ordinary(error) => {
                self.add_to_direct_map(chunk);
                self.zone().insert(&self.map, chunk);
                return Err(AllocError::Gate(error));
            }
            Closed::LeftOpen(error) => {
                self.withhold(chunk);
                return Err(AllocError::Gate(error));
            }
        };
        self.counts.flip_to_unmapped.add(1 << (size - BLOCK));
        let mut zone = self.pool(chunk, Freetype::unmapped(migratetype));
        if let Some(error) = refused {
            return Err(AllocError::Gate(error));
        }
        // The blocks went onto the lists under the same lock, so they are still there.
        let taken = zone.take(&self.map, order, Freetype::unmapped(migratetype));
        taken.map(|taken| taken.index).ok_or(AllocError::NoMemory)
    }

    /// Brings converted pages that waited for that and wholly free unmapped pageblocks back to the
    /// direct map: what a mapped request of `order` and `migratetype` needs.
    ///
    /// # Errors
    /// As [`Self::flip_to_mapped`].
    pub(crate) fn reclaim(&self, order: u8, migratetype: Migratetype) -> Result<bool, UseError> {
        // A refusal there is no reason not to go on here.
        if self.restore_parked().unwrap_or(false) {
            return Ok(true);
        }
        self.flip_to_mapped(1, order, migratetype)
    }

    /// Brings wholly free unmapped pageblocks back to the direct map, as many as go under one
    /// shootdown.
    ///
    /// # Errors
    /// As [`Self::flip_to_mapped`].
    pub(crate) fn reclaim_batch(&self) -> Result<bool, UseError> {
        self.flip_to_mapped(BATCH, MAX_ORDER, Migratetype::Movable)
    }

    /// Brings up to `limit` chunks, of `order` if there are such, back to the direct map under one
    /// shootdown; whether there were any.
    ///
    /// # Errors
    /// The first refusal of the host; the pageblocks concerned are back in the pool.
    fn flip_to_mapped(
        &self,
        limit: usize,
        order: u8,
        migratetype: Migratetype,
    ) -> Result<bool, UseError> {
        let mut batch = [Chunk::default(); BATCH];
        let mut taken = 0;
        let mut ready = 0;
        let mut result = Ok(());
        while taken < limit {
            let Some(chunk) = self.zone().take_unmapped_blocks(&self.map, order) else { break };
            taken += 1;
            match self.scrub_unpooled(chunk) {
                Ok(()) => {
                    batch[ready] = chunk;
                    ready += 1;
                }
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        let batch = &batch[..ready];
        self.flush_windows(batch);
        let released = self.release(batch);
        let done = released.map_or_else(|(done, _)| done, |()| batch.len());
        for chunk in &batch[..done] {
            self.add_to_direct_map(*chunk);
            let blocks = self.map.blocks_of(*chunk);
            self.counts.flip_to_mapped.add(blocks.len() as u64);
            // Only of secret pages does the bitmap say something: the next owner writes freely.
            self.map.set_zero(self.map.frames(*chunk), false);
            let mut zone = self.zone();
            blocks.iter().for_each(|block| block.set_freetype(Freetype::mapped(migratetype)));
            zone.insert(&self.map, *chunk);
        }
        for chunk in &batch[done..] {
            let _zone = self.pool(*chunk, self.map.block_at(chunk.index).freetype());
        }
        released.map_err(|(_, error)| UseError::Gate(error)).and(result).map(|()| done != 0)
    }

    /// Clears the directory entries of pageblocks, then has every CPU forget them. Never under the
    /// zone lock: another CPU might be waiting for it with interrupts off.
    fn remove_from_direct_map(&self, chunk: Chunk) {
        if planted!(self.platform, FlushBeforeUnmap) {
            self.flush_direct_map();
        }
        if !planted!(self.platform, LeaveDirectMapAlias) {
            let run = self.direct_map_run(chunk);
            space::write(self.platform, run, self.platform.read_entry(run.at), Entry::EMPTY);
        }
        if !planted!(self.platform, FlushBeforeUnmap) {
            self.flush_direct_map();
        }
    }

    /// The entries are global, so that a CR3 load would not do.
    fn flush_direct_map(&self) {
        if planted!(self.platform, SkipFlipFlush) {
            return;
        }
        let reload_only = planted!(self.platform, Cr3FlipFlush);
        let flush = if reload_only { Flush::NonGlobal } else { Flush::Everything };
        self.counts.shootdowns.add(1);
        self.platform.shootdown(flush, CpuSet::first(self.platform.cpus()));
    }

    /// Writes the directory entries of pageblocks. Nothing is flushed: what is not present is not
    /// cached.
    fn add_to_direct_map(&self, chunk: Chunk) {
        let run = self.direct_map_run(chunk);
        let start = self.map.frames(chunk).start();
        let entry = Entry::new(start, Entry::DATA | Entry::GLOBAL | Entry::PAGE_SIZE);
        space::write(self.platform, run, self.platform.read_entry(run.at), entry);
    }

    /// The directory entries of pageblocks in the direct map.
    ///
    /// # Panics
    /// If one of them is split: then some of its pages are allocated, and nobody may change sides
    /// with the whole.
    fn direct_map_run(&self, chunk: Chunk) -> Run {
        let split = self.map.blocks_of(chunk).iter().any(|block| block.converted() != 0);
        assert!(!split, "{} flips, but is split", self.map.frames(chunk));
        let va = direct_map(self.map.frames(chunk).start().gpa());
        let at = space::locate(self.platform, &self.tables, va, Level::Pd)
            .unwrap_or_else(|error| panic!("no directory entry for {va}: {error:?}"));
        Run { at, va, level: Level::Pd, count: chunk.pages() >> BLOCK }
    }

    /// Seals pageblocks that left the direct map, zeroed if the pool is to be zero.
    fn close(&self, frames: FrameRange) -> Closed {
        let slip = planted!(self.platform, SkipSeal);
        if !self.config.prezero {
            let sealed = if slip { Ok(()) } else { self.platform.gate(&[(OpKind::Seal, frames)]) };
            return sealed.map_or_else(Closed::Ordinary, |()| Closed::Sealed);
        }
        match self.platform.gate(&[(OpKind::Seal, frames), (OpKind::Open, frames)]) {
            Ok(()) => {}
            Err(error) if error.index == 0 => return Closed::Ordinary(error),
            Err(error) => return Closed::NotZeroed(error),
        }
        // Without a window the pages stay unknown, and are zeroed when they are handed out.
        let _ = self.zero_open(frames, Purpose::Flip);
        let sealed = if slip { Ok(()) } else { self.platform.gate(&[(OpKind::Seal, frames)]) };
        sealed.map_or_else(Closed::LeftOpen, |()| Closed::Sealed)
    }

    /// Scrubs pageblocks that were taken off the unmapped lists.
    ///
    /// # Errors
    /// The refusal; the pageblocks are in the pool again, or withheld if they could not be closed.
    fn scrub_unpooled(&self, chunk: Chunk) -> Result<(), UseError> {
        let frames = self.map.frames(chunk);
        self.platform.life(Life::Unpooled, frames);
        if planted!(self.platform, SkipScrubOnRemap) {
            return Ok(());
        }
        let scrubbed = self.zero_unknown(frames, Purpose::Scrub);
        match scrubbed {
            Ok(()) => {}
            Err(UseError::Unsealed(_)) => self.withhold(chunk),
            Err(_) => {
                let _zone = self.pool(chunk, self.map.block_at(chunk.index).freetype());
            }
        }
        scrubbed
    }

    /// Has every CPU whose window may still be cached over the chunks flush it: one shootdown for
    /// all.
    fn flush_windows(&self, chunks: &[Chunk]) {
        if planted!(self.platform, FreeBeforeWindowFlush) {
            return;
        }
        let frames = || chunks.iter().map(|chunk| self.map.frames(*chunk));
        let cpus = frames().fold(CpuSet::NONE, |set, f| set.union(self.mermap.may_cache(f)));
        if !cpus.is_empty() {
            self.counts.shootdowns.add(1);
            self.platform.shootdown(Flush::NonGlobal, cpus);
        }
        frames().for_each(|frames| self.mermap.forget(frames));
    }

    /// Makes the chunks ordinary memory, in one gate call.
    ///
    /// # Errors
    /// How many of them became so before the host refused.
    fn release(&self, chunks: &[Chunk]) -> Result<(), (usize, GateError)> {
        let Some(first) = chunks.first() else { return Ok(()) };
        let mut ops = [(OpKind::Release, self.map.frames(*first)); BATCH];
        for (op, chunk) in ops.iter_mut().zip(chunks) {
            op.1 = self.map.frames(*chunk);
        }
        let refused = |error: GateError| ((error.index as usize).min(chunks.len()), error);
        self.platform.gate(&ops[..chunks.len()]).map_err(refused)
    }

    fn no_pageblock(&self) -> AllocError {
        let usage = self.zone().usage(&self.map);
        if usage.free_mapped + usage.fresh > 0 {
            self.counts.alloc_fail_no_block.add(1);
            AllocError::NoBlock
        } else {
            self.counts.alloc_fail.add(1);
            AllocError::NoMemory
        }
    }
}
