//! Converting in place: a few allocated pages become secret where they are, without a flip of their
//! pageblock, and come back.
//!
//! The first range of a pageblock *splits* it: its 2 MiB entry is replaced by a table of 512 small
//! ones. When the last range has come back the entry is *merged* again. The block's other pages stay
//! mapped and in use on every CPU all the while, so both changes are a single store between two
//! states that translate alike: same frames, same rights, same G. In between a CPU may use either
//! translation, or both at once, and neither faults. Going through a cleared entry, as the manual
//! recommends where frame or rights change too (Intel SDM volume 3, "Recommended Invalidation"), would
//! let other CPUs fault on pages that they may use.
//!
//! - **Out**: fill the new table, which nothing leads to yet; store the directory entry; shootdown of
//!   everything. From here on no CPU holds the large translation, so that the entries of a range can
//!   be flushed one by one. Clear them, shootdown, seal.
//! - **Back**: scrub, flush the windows, release. Write the entries as they were (nothing to flush:
//!   what was not present is not cached). If that made the table whole again, store the directory
//!   entry, shootdown of everything, and only then free the table: until then a CPU may walk
//!   through it from its paging-structure caches, and finds what the large entry says.
//!
//! A large and a small translation of one address at once is an erratum of some old processors (AMD
//! family 10h, 383; Intel's instruction TLBs for executable pages). The direct map is not
//! executable, and kernels split theirs in the same way.
//!
//! A pageblock has a lock for these changes. It is held across the shootdown of a split, so that who
//! waits for it does so with interrupts on, and never takes it with interrupts off. A block is split
//! exactly while some of its pages are converted. Those pages are allocated, so a block that is
//! wholly free, and only such a block flips, is whole again.

use crate::alloc::PageAllocator;
use crate::error::{FirstFailure, UseError};
use crate::handle::Slot;
use crate::meta::{BlockMeta, Chunk, State};
use crate::platform::{CpuSet, GateError, Platform, planted, slips};
use crate::space::{self, Run};
use crate::zeroing::Purpose;
use crate::zone::BLOCK;
use lacuna_abi::addr::{BLOCK_SIZE, FrameRange, Gpa, Gva, PAGE_SIZE};
use lacuna_abi::direct::TableOp;
use lacuna_abi::event::{Flush, Life, TableFill};
use lacuna_abi::gate::OpKind;
use lacuna_abi::layout::direct_map;
use lacuna_abi::paging::{Entry, Level};

/// Flags of an entry of the direct map: what a small one has, and a large one beside its size.
const FLAGS: u64 = Entry::DATA | Entry::GLOBAL;

/// Most pages that are flushed one by one; everything is flushed for more. Measured where KVM
/// interprets ring 0, in cycles: 3,100 for an INVLPG, 9,000 for clearing and setting CR4.PGE, after
/// which nothing needs to be refilled there. On ordinary processors a flush of everything costs every
/// CPU its whole TLB, so that the number is larger than the three which that would give.
const TARGETED: u64 = 8;

/// Why pages changed neither side nor owner.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ConvertError {
    /// The allocation fills pageblocks: such become secret by a flip.
    TooLarge,
    /// No page of the table pool is free.
    NoTable,
    /// Interrupts are off, so that other CPUs cannot be waited for.
    WouldBlock,
    /// The pages are from the pool, and go back there.
    NotConverted,
    /// The host did not close the pages after their last use: they are never handed out again.
    LeftOpen,
    /// The host refused to make the pages secret.
    Gate(GateError),
    /// The pages could not be scrubbed or released.
    Use(UseError),
}

impl<P: Platform> PageAllocator<'_, P> {
    /// Says that the pages of the table pool hold no table from number `used` on. Called once;
    /// before that, nothing can be converted.
    ///
    /// # Panics
    /// If called again.
    pub fn add_tables(&self, used: u64) {
        let page = |pages: u64| u32::try_from(pages).unwrap_or(u32::MAX);
        self.table_pages.add(page(used), page(self.layout.pool.len / PAGE_SIZE));
    }

    /// Makes allocated mapped pages secret. They keep their contents.
    ///
    /// # Errors
    /// [`ConvertError`]; the pages are as they were.
    pub(crate) fn convert(&self, slot: Slot) -> Result<(), ConvertError> {
        // Nobody moves the pages from here on; afterwards their side keeps them where they are.
        let pin = slot.pin(&self.map, self.platform);
        let chunk = pin.chunk();
        if chunk.order >= BLOCK {
            return Err(ConvertError::TooLarge);
        }
        if !self.may_wait() {
            return Err(ConvertError::WouldBlock);
        }
        // What cannot be given back now is tried again another time.
        self.restore_parked(&mut FirstFailure::default());
        let frames = self.map.frames(chunk);
        self.hide(chunk)?;
        if let Err(error) = self.platform.gate(&[(OpKind::Seal, frames)]) {
            self.show(chunk);
            return Err(ConvertError::Gate(error));
        }
        self.platform.life(Life::HandedOut, frames);
        slot.change_side(&self.map, true);
        self.counts.converted.add(1);
        self.counts.converted_pages.add(frames.count());
        Ok(())
    }

    /// Makes converted pages ordinary mapped ones again, zero.
    ///
    /// # Errors
    /// [`ConvertError`]; the pages are secret as before, and perhaps scrubbed. They are sealed,
    /// except after [`UseError::Unsealed`].
    pub(crate) fn restore_slot(&self, slot: Slot) -> Result<(), ConvertError> {
        let pin = slot.pin(&self.map, self.platform);
        self.restore(pin.chunk())?;
        slot.change_side(&self.map, false);
        Ok(())
    }

    /// As [`Self::restore_slot`], but what the record says of the allocation stays.
    ///
    /// # Errors
    /// As there.
    fn restore(&self, chunk: Chunk) -> Result<(), ConvertError> {
        let page = self.map.page(chunk.index);
        if !page.is_converted() {
            return Err(ConvertError::NotConverted);
        }
        if page.is_unsealed() {
            return Err(ConvertError::LeftOpen);
        }
        if !self.may_wait() {
            return Err(ConvertError::WouldBlock);
        }
        let frames = self.map.frames(chunk);
        if let Err(error) = self.zero_unknown(frames, Purpose::Scrub) {
            if matches!(error, UseError::Unsealed(_)) {
                page.set_unsealed();
            }
            return Err(ConvertError::Use(error));
        }
        // The pageblock goes on remembering windows: others of its pages may be in use in them.
        self.flush_windows(core::iter::once(frames));
        let released = self.platform.gate(&[(OpKind::Release, frames)]);
        released.map_err(|error| ConvertError::Use(UseError::Gate(error)))?;
        // Only of secret pages does the bitmap say something: the next owner writes freely.
        self.map.set_known(frames, false);
        self.show(chunk);
        self.counts.restored.add(1);
        Ok(())
    }

    /// Frees converted pages, which were reported as freed. Pages that cannot come back now, because
    /// interrupts are off or the host refuses, are *parked*: secret and sealed, nobody's, and tried
    /// again later. What the host would not close is withheld.
    ///
    /// # Errors
    /// Why they are not free.
    pub(crate) fn free_converted(&self, chunk: Chunk) -> Result<(), ConvertError> {
        let restored = self.restore(chunk);
        if restored.is_ok() {
            self.map.page(chunk.index).set_converted(false);
            self.retire(chunk);
            self.clear_freed(chunk);
            self.put(chunk);
        } else if self.map.page(chunk.index).is_unsealed() {
            self.withhold(chunk, true);
        } else {
            self.counts.parked.add(1);
            self.parked.push(&self.map, chunk);
        }
        restored
    }

    /// Tries once more to free pages that were parked; whether some were freed. What the host refuses
    /// is parked again.
    pub(crate) fn restore_parked(&self, failure: &mut FirstFailure) -> bool {
        let mut freed = false;
        for chunk in self.parked.take_all(&self.map) {
            self.map.page(chunk.index).set_head(State::Allocated, chunk.order);
            match self.free_converted(chunk) {
                Ok(()) => freed = true,
                Err(ConvertError::Use(error)) => failure.note(Err(error)),
                // Who may not wait leaves them where they are.
                Err(_) => {}
            }
        }
        freed
    }

    /// Whether other CPUs can be waited for: with interrupts off, two CPUs could wait for each
    /// other.
    pub(crate) fn may_wait(&self) -> bool {
        let on = self.platform.interrupts_off();
        self.platform.interrupts_restore(on);
        on
    }

    /// Takes pages out of the direct map, on every CPU.
    ///
    /// # Errors
    /// [`ConvertError::NoTable`], or [`ConvertError::Gate`] under direct paging; nothing has changed.
    fn hide(&self, chunk: Chunk) -> Result<(), ConvertError> {
        let block = self.map.block_at(chunk.index);
        let (whole, cleared) = {
            let _lock = BlockLock::take(block, self.platform);
            let whole = block.converted() == 0;
            if whole {
                self.split(chunk)?;
            }
            block.add_converted(chunk.pages());
            (whole, self.write_pages(chunk, Entry::EMPTY))
        };
        if let Err(error) = cleared {
            self.show(chunk);
            return Err(ConvertError::Gate(error));
        }
        if !(whole && planted!(self.platform, SplitWithoutFlush)) {
            let frames = self.map.frames(chunk);
            let (va, mut count) = (direct_map(frames.start().gpa()), chunk.pages());
            if !whole && count > 1 && slips!(self.platform, FlushOnePageShort) {
                count -= 1;
            }
            let one_by_one = Flush::Pages { va, count, level: Level::Pt };
            let few = frames.count() <= TARGETED;
            self.flush_all_cpus(if few { one_by_one } else { Flush::Everything });
        }
        Ok(())
    }

    /// Puts pages back into the direct map; with the last ones of their pageblock, the block is one
    /// entry again.
    ///
    /// # Panics
    /// If the host refuses to map pages that are not secret.
    fn show(&self, chunk: Chunk) {
        let block = self.map.block_at(chunk.index);
        let table = {
            let _lock = BlockLock::take(block, self.platform);
            let back = Entry::new(self.map.frames(chunk).start(), FLAGS);
            space::must(self.write_pages(chunk, back), "map released pages");
            block.remove_converted(chunk.pages());
            let last = block.converted() == 0 || slips!(self.platform, MergeOverSecret);
            last.then(|| self.merge(chunk))
        };
        // The lock is free by now. Who splits the block again meanwhile does so with another table.
        if let Some(table) = table {
            if slips!(self.platform, MergeFlushLocal) {
                self.platform.shootdown(Flush::Everything, CpuSet::only(self.platform.cpu()));
            } else if !planted!(self.platform, TableFreeStale) {
                self.flush_all_cpus(Flush::Everything);
            }
            self.free_table(table);
        }
    }

    /// Replaces the pageblock's entry by a table of small entries that say the same.
    fn split(&self, chunk: Chunk) -> Result<(), ConvertError> {
        let run = self.block_run(chunk);
        let table = self.new_table().ok_or(ConvertError::NoTable)?;
        let first = self.map.frames(chunk).start().block_start();
        let fill = TableFill { table, level: Level::Pt, first: Entry::new(first, FLAGS) };
        let linked = Entry::new(table.frame(), Entry::TABLE);
        let link = space::op(self.platform, run, self.platform.read_entry(run.at), linked);
        if let Err(error) = self.platform.write_tables(&[TableOp::Fill(fill), link]) {
            self.free_table(table);
            return Err(ConvertError::Gate(error));
        }
        self.counts.splits.add(1);
        if !planted!(self.platform, SplitWithoutFlush) {
            self.flush_all_cpus(Flush::Everything);
        }
        Ok(())
    }

    /// Replaces the pageblock's table, whose entries are all as the split made them, by one entry.
    /// Returns the table, which may still be cached.
    fn merge(&self, chunk: Chunk) -> Gpa {
        let run = self.block_run(chunk);
        let linked = self.platform.read_entry(run.at);
        let first = self.map.frames(chunk).start().block_start();
        let whole = Entry::new(first, FLAGS | Entry::PAGE_SIZE);
        let merged = space::write(self.platform, run, linked, whole);
        space::must(merged, "replace a table by the entry that says the same");
        self.counts.merges.add(1);
        linked.frame(Level::Pd).gpa()
    }

    /// Writes the small entries of pages whose pageblock is split: a run that starts with `entry`.
    ///
    /// # Errors
    /// The host refused it, and nothing was written.
    #[inline(always)]
    fn write_pages(&self, chunk: Chunk, entry: Entry) -> Result<(), GateError> {
        // The slip loses the last entry of the run.
        let count = chunk.pages() - u32::from(planted!(self.platform, PartialBlockUnmap));
        let start = self.map.frames(chunk).start().gpa();
        let run = self.run(direct_map(start), Level::Pt, count);
        if count == 0 {
            return Ok(());
        }
        space::write(self.platform, run, self.platform.read_entry(run.at), entry)
    }

    /// The directory entry of the pageblock that holds pages.
    fn block_run(&self, chunk: Chunk) -> Run {
        let start = self.map.frames(chunk).start().gpa();
        self.run(direct_map(start.align_down(BLOCK_SIZE)), Level::Pd, 1)
    }

    pub(crate) fn run(&self, va: Gva, level: Level, count: u32) -> Run {
        let at = space::locate(self.platform, &self.layout.pool, va, level)
            .unwrap_or_else(|error| panic!("no entry of {level:?} for {va}: {error:?}"));
        Run { at, va, level, count }
    }

    fn flush_all_cpus(&self, flush: Flush) {
        let left_out = usize::from(slips!(self.platform, LastCpuLeftOut));
        self.shootdown(flush, CpuSet::first(self.platform.cpus() - left_out));
    }

    /// Takes a page of the table pool.
    pub(crate) fn new_table(&self) -> Option<Gpa> {
        let page = self.table_pages.take()?;
        let table = self.layout.pool.gpa.wrapping_add(u64::from(page) * PAGE_SIZE);
        self.platform.life(Life::TableAllocated, FrameRange::single(table.frame()));
        Some(table)
    }

    /// Gives a page of the table pool back. It is reported first: another CPU may take it at once.
    pub(crate) fn free_table(&self, table: Gpa) {
        self.platform.life(Life::TableFreed, FrameRange::single(table.frame()));
        let page = (table.0 - self.layout.pool.gpa.0) / PAGE_SIZE;
        // The pool has at most 4096 pages.
        self.table_pages.give(page as u32);
    }
}

/// The tables of a pageblock are this CPU's to change while this lives.
struct BlockLock<'m>(&'m BlockMeta);

impl<'m> BlockLock<'m> {
    /// Waits for the lock with interrupts on, so that a shootdown by its holder gets through.
    fn take(block: &'m BlockMeta, platform: &impl Platform) -> Self {
        while !block.try_lock() {
            platform.relax();
        }
        Self(block)
    }
}

impl Drop for BlockLock<'_> {
    fn drop(&mut self) {
        self.0.unlock();
    }
}
