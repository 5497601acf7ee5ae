//! Flips: whole pageblocks leave the direct map to become secret, and come back; many at a time
//! under one shootdown.

use crate::alloc::{AllocError, PageAllocator};
use crate::contents::OnFree;
use crate::error::{FirstFailure, UseError};
use crate::freetype::{Freetype, Migratetype};
use crate::meta::{Chunk, MAX_ORDER};
use crate::platform::{CpuSet, GateError, Platform, each, forge, gate_each, planted, slips};
use crate::space::{self, Run};
use crate::zeroing::Purpose;
use crate::zone::{BLOCK, BLOCK_PAGES};
use lacuna_abi::addr::{FrameRange, Gpa};
use lacuna_abi::direct::TableOp;
use lacuna_abi::event::{Event, Flush, Life, TableFill};
use lacuna_abi::gate::OpKind;
use lacuna_abi::layout::direct_map;
use lacuna_abi::paging::{Entry, Level};

/// Chunks of pageblocks that change sides under one shootdown.
const BATCH: usize = 16;

/// Batches of which the host refuses everything until a request is given up.
const REFUSALS: usize = 4;

/// A place for an operation.
const NO_OP: TableOp =
    TableOp::Fill(TableFill { table: Gpa(0), level: Level::Pt, first: Entry::EMPTY });

/// A bit of an entry that is software's (SDM volume 3, "Paging-Structure Entries").
const IGNORED: u64 = 1 << 9;

/// What became of pageblocks that were to be closed, or released.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fate {
    /// They are sealed.
    Sealed,
    /// They are ordinary memory: still, where the host refused to make them secret.
    Ordinary,
    /// They are where they were, in the direct map: the host refused to clear their entries.
    Mapped,
    /// They are nobody's: the host refused to close them again, or to map them again.
    Lost,
}

/// Chunks of pageblocks on their way.
#[derive(Clone, Copy)]
struct Batch {
    chunks: [Chunk; BATCH],
    len: usize,
}

impl Batch {
    const EMPTY: Self = Self { chunks: [Chunk { index: 0, order: 0 }; BATCH], len: 0 };

    fn push(&mut self, chunk: Chunk) {
        self.chunks[self.len] = chunk;
        self.len += 1;
    }

    fn is_full(&self) -> bool {
        self.len == BATCH
    }

    fn all(&self) -> &[Chunk] {
        &self.chunks[..self.len]
    }
}

impl<P: Platform> PageAllocator<'_, P> {
    /// Flips the pageblocks that an allocation of `order` needs to the unmapped side and takes the
    /// allocation from them. If the pool is to be larger and memory is plentiful, others come along
    /// under the same shootdown.
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
        let mut batch = Batch::EMPTY;
        {
            let mut zone = self.zone();
            let taken = zone.take_mapped_blocks(&self.map, size, migratetype, self.marks.min);
            let chunk = taken.ok_or(AllocError::NoBlock)?;
            batch.push(chunk);
            let rest = chunk.pages() - (1 << order) + zone.unmapped_free();
            self.gather(&mut zone, &mut batch, rest, migratetype);
        }
        let taken = self.flip(&batch, migratetype, |zone| {
            // The blocks went onto the lists under the same lock, so they are still there.
            zone.take(&self.map, order, Freetype::unmapped(migratetype), 0)
        })?;
        taken.map(|taken| taken.index).ok_or(AllocError::NoMemory)
    }

    /// Flips pageblocks until the pool holds `pool_high` pages, as far as memory is plentiful;
    /// whether there were any.
    ///
    /// # Errors
    /// As [`Self::flip_to_unmapped`].
    pub(crate) fn refill(&self) -> Result<bool, AllocError> {
        let mut batch = Batch::EMPTY;
        {
            let mut zone = self.zone();
            let have = zone.unmapped_free();
            self.gather(&mut zone, &mut batch, have, Migratetype::Unmovable);
        }
        if batch.len == 0 {
            return Ok(false);
        }
        self.flip(&batch, Migratetype::Unmovable, |_| ())?;
        Ok(true)
    }

    /// Takes single pageblocks for a pool that holds `have` pages, to bring it as near to
    /// `pool_high` as whole pageblocks come.
    fn gather(
        &self,
        zone: &mut crate::zone::Zone,
        batch: &mut Batch,
        mut have: u32,
        migratetype: Migratetype,
    ) {
        let floor = self.marks.high;
        while have + BLOCK_PAGES / 2 <= self.config.pool_high && !batch.is_full() {
            let taken = zone.take_mapped_blocks(&self.map, BLOCK, migratetype, floor);
            let Some(chunk) = taken else { return };
            batch.push(chunk);
            have += chunk.pages();
        }
    }

    /// Flips pageblocks that were taken off the mapped lists. `take` has the zone while all of them
    /// are still on its lists.
    ///
    /// # Errors
    /// The first refusal.
    fn flip<R>(
        &self,
        batch: &Batch,
        migratetype: Migratetype,
        take: impl FnOnce(&mut crate::zone::Zone) -> R,
    ) -> Result<R, AllocError> {
        let chunks = batch.all();
        let (gone, still_mapped) = self.remove_from_direct_map(chunks);
        let (mut fates, refused) = self.close(&chunks[..gone]);
        fates[gone..].fill(Fate::Mapped);
        let refused = still_mapped.or(refused);
        let freetype = Freetype::unmapped(migratetype);
        for (chunk, fate) in chunks.iter().zip(&mut fates) {
            if *fate == Fate::Ordinary {
                self.add_to_direct_map(&[*chunk], |_, _| *fate = Fate::Lost);
            }
            match fate {
                Fate::Sealed => {
                    self.counts.flip_to_unmapped.add(u64::from(chunk.pages() / BLOCK_PAGES));
                    self.report_pooled(self.map.frames(*chunk));
                }
                Fate::Ordinary | Fate::Mapped => {}
                Fate::Lost => self.withhold(*chunk, false),
            }
        }
        let mut zone = self.zone();
        for (chunk, fate) in chunks.iter().zip(fates) {
            if matches!(fate, Fate::Ordinary | Fate::Mapped) {
                zone.insert(&self.map, *chunk);
                continue;
            }
            zone.label(&self.map, *chunk, freetype);
            if fate == Fate::Sealed {
                zone.insert(&self.map, *chunk);
            }
        }
        match refused {
            None => Ok(take(&mut zone)),
            Some(error) => Err(AllocError::Gate(error)),
        }
    }

    /// Brings back to the direct map what a mapped request of `order` and `migratetype` needs:
    /// converted pages that waited for that, then wholly free unmapped pageblocks, those that have
    /// been free for longest; whether anything came back.
    pub(crate) fn reclaim(
        &self,
        order: u8,
        migratetype: Migratetype,
        failure: &mut FirstFailure,
    ) -> bool {
        if self.restore_parked(failure) {
            return true;
        }
        let wanted = self.marks.min.saturating_add(1 << order);
        let missing = wanted.saturating_sub(self.zone().mapped_free(&self.map));
        let size = order.max(BLOCK);
        let chunks = (missing >> size).max(1) as usize;
        // What was refused is at the end of the line, so that others are tried next.
        (0..REFUSALS)
            .map_while(|_| self.flip_to_mapped(chunks, order, migratetype, failure))
            .any(|back| back != 0)
    }

    /// Brings wholly free unmapped pageblocks back to the direct map, as many as go under one
    /// shootdown; whether any came.
    pub(crate) fn reclaim_batch(&self, failure: &mut FirstFailure) -> bool {
        let back = self.flip_to_mapped(BATCH, MAX_ORDER, Migratetype::Movable, failure);
        back.is_some_and(|back| back != 0)
    }

    /// Brings up to `limit` chunks, of `order` if there are such, back to the direct map under one
    /// shootdown; how many came, or `None` if there is nothing to bring back. What the host refuses
    /// is back in the pool, or withheld if it would not close it.
    fn flip_to_mapped(
        &self,
        limit: usize,
        order: u8,
        migratetype: Migratetype,
        failure: &mut FirstFailure,
    ) -> Option<usize> {
        let (mut batch, mut refused) = (Batch::EMPTY, Batch::EMPTY);
        let mut tried = 0;
        while batch.len < limit && tried < BATCH {
            let Some(chunk) = self.zone().take_unmapped_blocks(&self.map, order) else { break };
            tried += 1;
            let scrubbed = self.scrub_unpooled(chunk);
            failure.note(scrubbed);
            match scrubbed {
                Ok(()) => batch.push(chunk),
                Err(UseError::Unsealed(_)) => self.withhold(chunk, false),
                Err(_) => refused.push(chunk),
            }
        }
        if tried == 0 {
            return None;
        }
        let frames = || batch.all().iter().map(|chunk| self.map.frames(*chunk));
        self.flush_windows(frames());
        // Nobody else uses pages of these blocks.
        frames().for_each(|frames| self.mermap.forget(frames));
        if slips!(self.platform, MapBeforeRelease) {
            self.add_to_direct_map(batch.all(), |_, _| ());
        }
        let fates = self.release(batch.all(), failure);
        let mut released = Batch::EMPTY;
        for (chunk, fate) in batch.all().iter().zip(fates) {
            if fate == Fate::Sealed { refused.push(*chunk) } else { released.push(*chunk) }
        }
        let mut fates = [Fate::Ordinary; BATCH];
        self.add_to_direct_map(released.all(), |number, error| {
            failure.note(Err(UseError::Gate(error)));
            fates[number] = Fate::Lost;
        });
        let mut back = 0;
        for (chunk, fate) in released.all().iter().zip(fates) {
            if fate == Fate::Lost {
                self.withhold(*chunk, false);
                continue;
            }
            back += 1;
            self.counts.flip_to_mapped.add(u64::from(chunk.pages() / BLOCK_PAGES));
            // That they are zero was known of secret pages: the next owner writes freely.
            self.map.set_known(self.map.frames(*chunk), false);
            let mut zone = self.zone();
            zone.label(&self.map, *chunk, Freetype::mapped(migratetype));
            zone.insert(&self.map, *chunk);
        }
        for chunk in refused.all() {
            self.report_pooled(self.map.frames(*chunk));
            self.zone().insert(&self.map, *chunk);
        }
        Some(back)
    }

    /// Clears the directory entries of pageblocks, then has every CPU forget them. Never under the
    /// zone lock: another CPU might be waiting for it with interrupts off. How many of them, from the
    /// first on, are gone; and what kept the others, which are mapped as before.
    fn remove_from_direct_map(&self, chunks: &[Chunk]) -> (usize, Option<GateError>) {
        if planted!(self.platform, FlushBeforeUnmap) {
            self.flush_direct_map();
        }
        let mut ops = [NO_OP; BATCH];
        for (chunk, op) in chunks.iter().zip(&mut ops) {
            if self.config.on_free != OnFree::Leave {
                self.map.set_known(self.map.frames(*chunk), false);
            }
            let run = self.direct_map_run(*chunk);
            let old = self.platform.read_entry(run.at);
            if planted!(self.platform, ForgedTableWrite) {
                // A bit that the processor ignores: records and tables still agree.
                let write = space::entry_write(self.platform, run, old, Entry(old.0 | IGNORED));
                forge!(self.platform, Event::EntryWrite(write));
            }
            *op = space::op(self.platform, run, old, Entry::EMPTY);
        }
        let count = if planted!(self.platform, LeaveDirectMapAlias) { 0 } else { chunks.len() };
        let refused = self.platform.write_tables(&ops[..count]).err();
        let gone = refused.map_or(chunks.len(), |error| (error.index as usize).min(chunks.len()));
        if self.config.prezero && planted!(self.platform, OpenEarly) {
            // So that zeroing overlaps with the shootdown; what is refused is zeroed later.
            for chunk in &chunks[..gone] {
                let _ = self.zero_unknown(self.map.frames(*chunk), Purpose::Flip);
            }
        }
        if slips!(self.platform, FlushFirstBlock) {
            let Run { va, level, .. } = self.direct_map_run(chunks[0]);
            let first = Flush::Pages { va, count: 1, level };
            self.platform.shootdown(first, CpuSet::first(self.platform.cpus()));
        } else if !planted!(self.platform, FlushBeforeUnmap) {
            self.flush_direct_map();
        }
        (gone, refused)
    }

    /// The entries are global, so that a CR3 load would not do.
    fn flush_direct_map(&self) {
        if planted!(self.platform, SkipFlipFlush) {
            return;
        }
        let reload_only = planted!(self.platform, Cr3FlipFlush);
        let flush = if reload_only { Flush::NonGlobal } else { Flush::Everything };
        let mut cpus = if planted!(self.platform, LocalOnlyFlipFlush) {
            CpuSet::only(self.platform.cpu())
        } else {
            CpuSet::first(self.platform.cpus())
        };
        if planted!(self.platform, ForgedFlush) {
            forge!(self.platform, Event::Flush(flush));
            cpus = CpuSet(cpus.0 & !CpuSet::only(self.platform.cpu()).0);
        }
        self.shootdown(flush, cpus);
    }

    /// Writes the directory entries of pageblocks, at most [`BATCH`] chunks of them; `refused` is told
    /// which the host refused. Nothing is flushed: what is not present is not cached.
    fn add_to_direct_map(&self, chunks: &[Chunk], refused: impl FnMut(usize, GateError)) {
        let mut ops = [NO_OP; BATCH];
        for (chunk, op) in chunks.iter().zip(&mut ops) {
            let run = self.direct_map_run(*chunk);
            let start = self.map.frames(*chunk).start();
            let entry = Entry::new(start, Entry::DATA | Entry::GLOBAL | Entry::PAGE_SIZE);
            *op = space::op(self.platform, run, self.platform.read_entry(run.at), entry);
        }
        each(&ops[..chunks.len()], |ops| self.platform.write_tables(ops), refused);
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
        let at = space::locate(self.platform, &self.layout.pool, va, Level::Pd)
            .unwrap_or_else(|error| panic!("no directory entry for {va}: {error:?}"));
        Run { at, va, level: Level::Pd, count: chunk.pages() >> BLOCK }
    }

    /// Seals pageblocks that left the direct map, zeroed if the pool is to be zero: in two gate
    /// calls, however many they are.
    fn close(&self, chunks: &[Chunk]) -> ([Fate; BATCH], Option<GateError>) {
        let mut fates = [Fate::Sealed; BATCH];
        let count = chunks.len();
        let mut ops = [(OpKind::Seal, FrameRange::single(self.map.zone().start())); 2 * BATCH];
        for (index, chunk) in chunks.iter().enumerate() {
            let frames = self.map.frames(*chunk);
            ops[index].1 = frames;
            ops[count + index] = (OpKind::Open, frames);
        }
        let slip = planted!(self.platform, SkipSeal);
        if !self.config.prezero && slip {
            return (fates, None);
        }
        let steps = if self.config.prezero { 2 * count } else { count };
        let refused = self.platform.gate(&ops[..steps]).err();
        let done = refused.map_or(steps, |error| (error.index as usize).min(steps));
        fates[done.min(count)..count].fill(Fate::Ordinary);
        let opened = done.saturating_sub(count);
        for chunk in &chunks[..opened] {
            // Without a window the pages stay unknown, and are zeroed when they are handed out.
            let _ = self.zero_open(self.map.frames(*chunk), Purpose::Flip);
        }
        if slip {
            return (fates, refused);
        }
        let mut refused = refused;
        gate_each(self.platform, &ops[..opened], |number, error| {
            refused.get_or_insert(error);
            fates[number] = Fate::Lost;
        });
        (fates, refused)
    }

    /// Scrubs pageblocks that were taken off the unmapped lists.
    ///
    /// # Errors
    /// As [`Self::zero_unknown`].
    fn scrub_unpooled(&self, chunk: Chunk) -> Result<(), UseError> {
        let frames = self.map.frames(chunk);
        self.platform.life(Life::Unpooled, frames);
        if planted!(self.platform, SkipScrubOnRemap) {
            return Ok(());
        }
        self.zero_unknown(frames, Purpose::Scrub)
    }

    /// Makes the chunks ordinary memory, in one gate call unless the host refuses some, which stay
    /// sealed.
    fn release(&self, chunks: &[Chunk], failure: &mut FirstFailure) -> [Fate; BATCH] {
        let mut fates = [Fate::Ordinary; BATCH];
        let mut ops = [(OpKind::Release, FrameRange::single(self.map.zone().start())); BATCH];
        for (op, chunk) in ops.iter_mut().zip(chunks) {
            op.1 = self.map.frames(*chunk);
        }
        gate_each(self.platform, &ops[..chunks.len()], |number, error| {
            failure.note(Err(UseError::Gate(error)));
            fates[number] = Fate::Sealed;
        });
        fates
    }
}
