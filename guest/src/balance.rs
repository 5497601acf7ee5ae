//! Keeping both sides of the direct map supplied: watermarks, background work, and emptying what
//! CPUs keep to themselves.

use crate::alloc::{AllocError, PageAllocator};
use crate::error::{FirstFailure, UseError};
use crate::freetype::Migratetype;
use crate::meta::{Chunk, State};
use crate::platform::{Platform, gate_each, slips};
use crate::zeroing::{Purpose, all_but_the_last};
use crate::zone::{BLOCK_PAGES, Zone};
use core::sync::atomic::Ordering::Relaxed;
use lacuna_abi::addr::{FrameRange, Gfn};
use lacuna_abi::event::Life;
use lacuna_abi::gate::OpKind;

/// Free pages of the mapped side at which something happens.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Watermarks {
    /// What ordinary requests leave for callers that cannot wait.
    pub min: u32,
    /// Below this, secret pageblocks come back in the background.
    pub low: u32,
    /// Up to this they come back; above it, pageblocks may leave ahead of demand.
    pub high: u32,
}

impl Watermarks {
    /// Marks for a zone of `pages`, by the kernel's rule: the square root of 16 times the size in
    /// KiB is the least that is kept free, in KiB.
    #[must_use]
    pub const fn for_zone(pages: u32) -> Self {
        let kib = pages as u64 * 4;
        Self::above(((kib * 16).isqrt() / 4) as u32)
    }

    /// Marks for a least of `min` pages.
    #[must_use]
    pub const fn above(min: u32) -> Self {
        Self { min, low: min.saturating_add(min / 4), high: min.saturating_add(min / 2) }
    }
}

/// Freed chunks that are scrubbed together at most: their ranges fit one gate call.
const SCRUB_CHUNKS: usize = 224;
/// Pages to be scrubbed that a CPU collects before it scrubs them.
const SCRUB_PAGES: u32 = 512;

impl<P: Platform> PageAllocator<'_, P> {
    /// Work that allocations leave for later: fills the pool between its two marks, and brings
    /// pageblocks back while the mapped side is short. What this CPU keeps to itself goes first, so
    /// that no pageblock changes sides while pages only wait to be scrubbed. With interrupts off the
    /// work goes on being left for later; costs next to nothing where there is nothing to do.
    ///
    /// # Errors
    /// The first refusal of the host. That nothing can be done is none.
    pub fn balance(&self) -> Result<(), AllocError> {
        if !self.wake.load(Relaxed) || !self.may_wait() {
            return Ok(());
        }
        self.wake.store(false, Relaxed);
        let mut failure = FirstFailure::default();
        let (mut rising, mut tidied) = (false, false);
        loop {
            let (mapped, pool) = {
                let zone = self.zone();
                (zone.mapped_free(&self.map), zone.unmapped_free())
            };
            // What began below the low mark goes on up to the high one.
            rising = mapped < self.marks.low || rising && mapped < self.marks.high;
            let refills = self.config.flip
                && pool < self.config.pool_low
                && mapped > self.marks.high + BLOCK_PAGES;
            let progress = if !rising && !refills {
                false
            } else if !tidied {
                tidied = true;
                let cpu = self.own_lists().0;
                failure.note(self.scrub_freed(cpu));
                self.drain(cpu, 0);
                true
            } else if rising {
                self.counts.balance_reclaim.add(1);
                self.reclaim(0, Migratetype::Movable, &mut failure)
            } else {
                self.counts.balance_refill.add(1);
                match self.refill() {
                    Ok(progress) => progress,
                    Err(error) => return Err(failure.or(error)),
                }
            };
            if !progress {
                return Ok(failure.result()?);
            }
        }
    }

    /// Notes that [`Self::balance`] has something to do.
    pub(crate) fn look(&self, zone: &Zone) {
        let pool_is_low = self.config.pool_low > 0
            && zone.pool_was_used()
            && zone.unmapped_free() < self.config.pool_low;
        if pool_is_low || zone.mapped_free(&self.map) < self.marks.low {
            self.wake.store(true, Relaxed);
        }
    }

    /// Empties every CPU's lists into the zone, after scrubbing what waits for that.
    ///
    /// # Errors
    /// As [`Self::scrub_freed`].
    pub(crate) fn drain_all(&self) -> Result<(), UseError> {
        let mut failure = FirstFailure::default();
        // What is scrubbed goes onto the lists of this CPU.
        (0..self.platform.cpus()).for_each(|cpu| failure.note(self.scrub_freed(cpu)));
        (0..self.platform.cpus()).for_each(|cpu| self.drain(cpu, 0));
        self.counts.drains.add(1);
        failure.result()
    }

    /// Empties the lists of `cpu` down to `keep` pages.
    pub(crate) fn drain(&self, cpu: usize, keep: u32) {
        let lists = self.lists_of(cpu);
        lists.drain(&self.map, &mut self.zone(), keep);
    }

    /// Puts freed secret pages that are not zero on this CPU's list, and scrubs that if it is long.
    pub(crate) fn scrub_later(&self, chunk: Chunk) {
        let (cpu, full) = {
            let (cpu, lists) = self.own_lists();
            lists.push_dirty(&self.map, chunk);
            let (chunks, pages) = lists.dirty();
            (cpu, chunks as usize >= SCRUB_CHUNKS || pages >= SCRUB_PAGES)
        };
        if full {
            // Pages that could not be scrubbed are withheld or stay unknown.
            let _ = self.scrub_freed(cpu);
        }
    }

    /// Scrubs what was freed on `cpu` and puts it on the free lists: open, zero, seal, each for all
    /// of it in as few gate calls as hold it.
    ///
    /// # Errors
    /// The first failure. Pages that could not be zeroed are free and not known to be zero; what the
    /// host would not close is withheld.
    pub(crate) fn scrub_freed(&self, cpu: usize) -> Result<(), UseError> {
        let mut failure = FirstFailure::default();
        loop {
            let mut chunks = [Chunk::default(); SCRUB_CHUNKS];
            let mut count = 0;
            {
                let lists = self.lists_of(cpu);
                while count < SCRUB_CHUNKS
                    && let Some(chunk) = lists.pop_dirty(&self.map)
                {
                    chunks[count] = chunk;
                    count += 1;
                }
            }
            if count == 0 {
                return failure.result();
            }
            let chunks = &mut chunks[..count];
            chunks.sort_unstable_by_key(|chunk| chunk.index);
            failure.note(self.scrub(chunks));
        }
    }

    /// Scrubs chunks in ascending order, then frees them.
    fn scrub(&self, chunks: &[Chunk]) -> Result<(), UseError> {
        self.counts.scrubs.add(1);
        self.counts.scrubs_atomic.add((!self.may_wait()).into());
        let mut ranges = [(OpKind::Open, FrameRange::single(Gfn(0))); SCRUB_CHUNKS];
        let mut count = 0;
        for chunk in chunks {
            let frames = self.map.frames(*chunk);
            match ranges[..count].last_mut() {
                Some((_, last)) if last.end() == frames.start() => {
                    let joined = FrameRange::new(last.start(), last.count() + frames.count());
                    *last = joined.unwrap_or(*last);
                }
                _ => {
                    ranges[count].1 = frames;
                    count += 1;
                }
            }
        }
        let ops = &mut ranges[..count];
        let refused = self.platform.gate(ops).err();
        let opened = refused.map_or(count, |error| (error.index as usize).min(count));
        let mut failure = FirstFailure::default();
        failure.note(refused.map_or(Ok(()), |error| Err(UseError::Gate(error))));
        for (_, frames) in &ops[..opened] {
            let zeroed = self.zero_unknown_open(*frames, Purpose::Scrub);
            failure.note(zeroed.map_err(UseError::Window));
        }
        ops.iter_mut().for_each(|op| op.0 = OpKind::Seal);
        if slips!(self.platform, SealOneFrameShort) {
            let short = ops[..opened].iter().map(|(_, frames)| all_but_the_last(*frames));
            short.for_each(|frames| failure.note(self.seal_open(frames)));
        } else {
            gate_each(self.platform, &ops[..opened], |number, error| {
                failure.note(Err(UseError::Unsealed(error)));
                self.mark_left_open(chunks, ops[number].1);
            });
        }
        let result = failure.result();
        // One record for each range: it says as much as one for each page, and costs the guest and
        // the host less.
        let together = result.is_ok();
        if together {
            ops.iter().for_each(|(_, frames)| self.report_pooled(*frames));
        }
        let free = |chunk: &&Chunk| self.map.page(chunk.index).head(State::Withheld).is_none();
        if !together {
            let free = chunks.iter().filter(free);
            free.for_each(|chunk| self.report_pooled(self.map.frames(*chunk)));
        }
        self.put_all(chunks.iter().filter(free).copied());
        result
    }

    /// The host would not close these frames again: their chunks are withheld.
    fn mark_left_open(&self, chunks: &[Chunk], open: FrameRange) {
        for chunk in chunks {
            if open.intersection(self.map.frames(*chunk)).is_some() {
                self.withhold(*chunk, false);
            }
        }
    }

    /// Brings every wholly free secret pageblock back to the direct map, and converted pages that could
    /// not come back when they were freed.
    ///
    /// # Errors
    /// The host's first refusal; all that it did not concern came back. [`UseError::WouldBlock`] with
    /// interrupts off; nothing was done.
    pub fn shrink(&self) -> Result<(), UseError> {
        if !self.may_wait() {
            return Err(UseError::WouldBlock);
        }
        let mut failure = FirstFailure::default();
        self.restore_parked(&mut failure);
        failure.note(self.drain_all());
        while self.reclaim_batch(&mut failure) {}
        failure.result()
    }

    /// Reports pages as in the pool.
    pub(crate) fn report_pooled(&self, frames: FrameRange) {
        self.report_pooled_as(frames, self.map.is_known(frames));
    }

    /// Reports pages as in the pool, and `zero` or not.
    pub(crate) fn report_pooled_as(&self, frames: FrameRange, zero: bool) {
        self.platform.life(if zero { Life::PooledZero } else { Life::Pooled }, frames);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn watermarks_grow_with_the_root_of_the_size() {
        let marks = |mib: u32| Watermarks::for_zone(mib * 256);
        assert_eq!(marks(16), Watermarks { min: 128, low: 160, high: 192 });
        assert_eq!(marks(64).min, 256);
        assert_eq!(marks(65536).min, 8192);
    }
}
