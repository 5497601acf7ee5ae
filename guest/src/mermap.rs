//! The mermap: a window of addresses for each CPU, for short-lived, CPU-local mappings of frames
//! that the direct map does not show.
//!
//! Mappings are non-global, not executable, and lie in the window of the CPU that asked. Taking a
//! mapping down flushes nothing: an address is flushed before it is used again. In the 4 KiB part
//! addresses are handed out upwards; when they are used up, one local flush serves them all: of
//! their own where few were used since the last one, otherwise of the whole window. The 2 MiB part
//! and the reserve, a few addresses each, are flushed one by one instead.
//!
//! Tasks of this guest do not migrate, and a [`Mapping`] is not `Send`, so that it is taken down on the
//! CPU that made it.

mod window;

use crate::lock::{IrqGuard, IrqLock};
use crate::meta::MemMap;
use crate::platform::{CpuSet, GateError, InterruptsOff, Platform, planted, slips};
use crate::space::{self, Run};
use core::array;
use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use core::sync::atomic::{AtomicBool, AtomicU32};
use lacuna_abi::MAX_CPUS;
use lacuna_abi::addr::{BLOCK_FRAMES, FrameRange, Gfn, Gva};
use lacuna_abi::event::Flush;
use lacuna_abi::layout::{self, Layout, Region, WINDOW_LARGE_OFFSET};
use lacuna_abi::paging::{Entry, Level};
pub use window::{PAGES, SLOTS};
use window::{Part, Window};

/// Pages of the 4 KiB part up to which an INVLPG for each replaces a CR3 load, which also drops what
/// else this CPU has cached. By three runs of `lacuna bench flush` (two-core Intel Xeon virtual
/// machine, KVM that interprets ring 0 and shadows the tables, 2026-11-26; eight loads follow each), in
/// multiples of a CR3 load: 1 INVLPG costs 1.01 to 1.05, 2 cost 1.00 to 1.07, 4 cost 1.02 to 1.11, 8
/// cost 1.10 to 1.22, 64 cost 2.06 to 2.20. The CR3 load itself varied by 7 % from run to run, so that
/// one INVLPG costs the same as far as can be told, and of two that cost the same the one is taken
/// that spares what else is cached; longer runs win nothing here. Where ring 0 runs natively they may.
pub const INVLPG_MAX: u64 = 1;

/// What a mapping may be used for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Protection {
    /// Stores are allowed.
    pub write: bool,
    /// Asks for a translation that survives a CR3 load: always refused.
    pub global: bool,
    /// Asks for instruction fetches: always refused.
    pub execute: bool,
}

impl Protection {
    /// Loads only.
    pub const READ: Self = Self { write: false, global: false, execute: false };
    /// Loads and stores.
    pub const READ_WRITE: Self = Self { write: true, ..Self::READ };

    fn entry_flags(self) -> Result<u64, MermapError> {
        if self.global {
            return Err(MermapError::Global);
        }
        if self.execute {
            return Err(MermapError::Executable);
        }
        Ok(if self.write { Entry::DATA } else { Entry::READ_ONLY })
    }
}

/// Why frames were not mapped. Nothing is left behind: no slot, no entry, no flush.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MermapError {
    /// [`Mermap::prepare`] has not succeeded yet.
    NotReady,
    /// This CPU's window has no tables.
    NoTables(usize),
    /// A global mapping was asked for.
    Global,
    /// An executable mapping was asked for.
    Executable,
    /// Not all of the frames are in the zone.
    NotInZone,
    /// All slots of this CPU are in use.
    NoSlot,
    /// There are not enough addresses above those in use; or, with no mapping in use, there never
    /// are.
    NoSpace,
    /// This CPU's reserve is in use. It serves one mapping at a time, and interrupts are off until
    /// that is gone, so only its own user can meet this.
    ReserveInUse,
    /// The host refused to write the entries, under direct paging.
    Refused(GateError),
}

/// Mappings that were not taken down, for each CPU.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Leaks(pub [usize; MAX_CPUS]);

/// The windows of all CPUs.
pub struct Mermap<'a, P: Platform> {
    platform: &'a P,
    pool: Region,
    cpus: usize,
    map: MemMap<'a>,
    ready: AtomicBool,
    windows: [IrqLock<Window>; MAX_CPUS],
    /// For each CPU, one more than the flushes of its whole window; changed by that CPU alone.
    generations: [AtomicU32; MAX_CPUS],
}

/// What the mermap counted. Each window has its own, changed under its lock.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MermapCounters {
    /// Flushes because a window's addresses were used up.
    pub flushes: u64,
    /// All flushes of addresses that are used again: those, and the ones for a single address of
    /// the 2 MiB part or the reserve.
    pub local_flushes: u64,
    /// Mappings made by [`Mermap::get`].
    pub mapped: u64,
    /// Mappings made by [`Mermap::get_reserved`].
    pub mapped_reserved: u64,
}

impl<'a, P: Platform> Mermap<'a, P> {
    /// The windows of the guest laid out so. Nothing can be mapped before [`Self::prepare`].
    pub fn new(platform: &'a P, layout: &Layout, map: MemMap<'a>) -> Self {
        Self {
            platform,
            pool: layout.pool,
            cpus: layout.cpus.min(MAX_CPUS),
            map,
            ready: AtomicBool::new(false),
            windows: array::from_fn(|_| IrqLock::new(Window::default())),
            generations: array::from_fn(|_| AtomicU32::new(1)),
        }
    }

    /// Finds the tables of every CPU's window, which exist since boot. May be called again, and by
    /// several CPUs at once: all find the same, nothing in use is touched, and readiness is
    /// published when everything is in place.
    ///
    /// # Errors
    /// [`MermapError::NoTables`] names the CPU whose window has none.
    pub fn prepare(&self) -> Result<(), MermapError> {
        for (cpu, state) in self.windows.iter().enumerate().take(self.cpus) {
            let locate = |va, level| {
                space::locate(self.platform, &self.pool, va, level)
                    .map_err(|_| MermapError::NoTables(cpu))
            };
            let table = locate(layout::window(cpu), Level::Pt)?;
            let directory =
                locate(layout::window(cpu).wrapping_add(WINDOW_LARGE_OFFSET), Level::Pd)?;
            let mut state = state.lock(self.platform);
            state.table = table;
            state.directory = directory;
        }
        self.ready.store(true, Release);
        Ok(())
    }

    /// Whether frames can be mapped.
    pub fn ready(&self) -> bool {
        self.ready.load(Acquire)
    }

    /// Maps a run of frames at consecutive addresses of this CPU's window: a whole pageblock with
    /// one 2 MiB entry, anything else page by page. Never allocates, never waits for another CPU.
    ///
    /// # Errors
    /// [`MermapError`]; a caller that cannot do without goes on to [`Self::get_reserved`].
    pub fn get(
        &self,
        frames: FrameRange,
        protection: Protection,
    ) -> Result<Mapping<'_, 'a, P>, MermapError> {
        let flags = self.admit(frames, protection)?;
        let mut cpu = self.platform.cpu();
        if planted!(self.platform, WrongCpuWindow) {
            cpu = (cpu + 1) % self.cpus;
        }
        let mut window = self.lock(cpu)?;
        let whole_block =
            frames.count() == BLOCK_FRAMES && frames.start().block_start() == frames.start();
        let (part, run) = if whole_block {
            let (slot, mut stale) = window.take_block()?;
            stale &= !slips!(self.platform, LargeWindowUnflushed);
            let run = window.large_run(cpu, slot);
            (Part::Large(slot), self.clean(&mut window, run, stale))
        } else {
            let (slot, first, stale) = window.take_pages(frames.count())?;
            self.start_over(cpu, &mut window, first, stale);
            // At most 511 pages.
            (Part::Small(slot), window.small_run(cpu, first, frames.count() as u32))
        };
        let entry = self.map_run(&mut window, part, run, frames, flags)?;
        window.counts.mapped += 1;
        Ok(Mapping { mermap: self, cpu, part, run, frames, entry, _off: None })
    }

    /// Maps one frame through this CPU's reserve, which has an address and a slot of its own and
    /// needs nothing from another CPU: it always succeeds, whatever else is mapped. Interrupts
    /// stay off until the mapping is gone.
    ///
    /// # Errors
    /// Only for what can never be mapped, before [`Self::prepare`],
    /// [`MermapError::ReserveInUse`] for a second mapping while one is held, or
    /// [`MermapError::Refused`].
    pub fn get_reserved(
        &self,
        frame: Gfn,
        protection: Protection,
        off: InterruptsOff<'a, P>,
    ) -> Result<Mapping<'_, 'a, P>, MermapError> {
        let frames = FrameRange::new(frame, 1).ok_or(MermapError::NotInZone)?;
        let mut flags = self.admit(frames, protection)?;
        if slips!(self.platform, ReserveGlobal) {
            flags |= Entry::WRITABLE | Entry::GLOBAL;
        }
        let cpu = self.platform.cpu();
        let mut window = self.lock(cpu)?;
        let stale = window.take_reserve()?;
        let run = window.small_run(cpu, PAGES, 1);
        let run = self.clean(&mut window, run, stale);
        let part = Part::Reserve;
        let entry = self.map_run(&mut window, part, run, frames, flags)?;
        window.counts.mapped_reserved += 1;
        Ok(Mapping { mermap: self, cpu, part, run, frames, entry, _off: Some(off) })
    }

    /// Ends the use of the windows: from now on nothing can be mapped until the next
    /// [`Self::prepare`].
    ///
    /// # Errors
    /// [`Leaks`] if some CPU, not only this one, still has mappings; the windows stay ready, so
    /// that these can be taken down.
    pub fn teardown(&self) -> Result<(), Leaks> {
        let was_ready = self.ready.swap(false, AcqRel);
        let mut leaks = Leaks([0; MAX_CPUS]);
        for (state, count) in self.windows.iter().zip(&mut leaks.0) {
            *count = state.lock(self.platform).live();
        }
        if leaks.0.iter().any(|count| *count != 0) {
            self.ready.store(was_ready, Release);
            return Err(leaks);
        }
        Ok(())
    }

    /// What was counted so far.
    pub fn counters(&self) -> MermapCounters {
        self.windows.iter().fold(MermapCounters::default(), |sum, window| {
            let one = window.lock(self.platform).counts;
            MermapCounters {
                flushes: sum.flushes + one.flushes,
                local_flushes: sum.local_flushes + one.local_flushes,
                mapped: sum.mapped + one.mapped,
                mapped_reserved: sum.mapped_reserved + one.mapped_reserved,
            }
        })
    }

    /// The CPUs that may still cache a window over the frames, whose every mapping is gone: those
    /// that had one since they last flushed their whole window.
    pub(crate) fn may_cache(&self, frames: FrameRange) -> CpuSet {
        let mut set = CpuSet::NONE;
        for part in frames.by_block() {
            let (block, _) = self.map.part(part);
            for (cpu, generation) in self.generations.iter().enumerate().take(self.cpus) {
                if block.window(cpu) == generation.load(Acquire) {
                    set = set.union(CpuSet::only(cpu));
                }
            }
        }
        set
    }

    /// Every CPU that may have cached a window over the frames has flushed since.
    pub(crate) fn forget(&self, frames: FrameRange) {
        for part in frames.by_block() {
            let (block, _) = self.map.part(part);
            (0..self.cpus).for_each(|cpu| block.set_window(cpu, 0));
        }
    }

    /// The window of `cpu`. That it is ready is looked at under its lock, so that none is taken
    /// into use once [`Self::teardown`] has looked at it.
    fn lock(&self, cpu: usize) -> Result<IrqGuard<'_, Window, P>, MermapError> {
        let window = self.windows.get(cpu).ok_or(MermapError::NotReady)?.lock(self.platform);
        if self.ready() { Ok(window) } else { Err(MermapError::NotReady) }
    }

    /// Refuses what is never mapped.
    fn admit(&self, frames: FrameRange, protection: Protection) -> Result<u64, MermapError> {
        let flags = protection.entry_flags()?;
        if !self.map.zone().contains_range(frames) {
            return Err(MermapError::NotInZone);
        }
        Ok(flags)
    }

    /// Flushes the address of a run of one entry if something may be cached there.
    fn clean(&self, window: &mut Window, run: Run, stale: bool) -> Run {
        if stale {
            self.platform.flush(Flush::Pages { va: run.va, count: 1, level: run.level });
            window.counts.local_flushes += 1;
        }
        run
    }

    /// Removes what this CPU may still cache of `stale` pages from page `first` of the 4 KiB part,
    /// which are about to be handed out again: them alone, or its whole window with them.
    fn start_over(&self, cpu: usize, window: &mut Window, first: u64, stale: u64) {
        if stale == 0 {
            return;
        }
        let few = stale <= INVLPG_MAX;
        // At most 511 pages.
        let Run { va, level, count, .. } = window.small_run(cpu, first, stale as u32);
        let flush = if few { Flush::Pages { va, count, level } } else { Flush::NonGlobal };
        if !planted!(self.platform, SkipWindowFlush) {
            self.platform.flush(flush);
        }
        window.counts.flushes += 1;
        window.counts.local_flushes += 1;
        if few {
            // Other addresses may still be cached: what blocks remember of this window stays true.
            return;
        }
        window.flushed();
        // After the flush, so that who still reads the old number sends one flush too many. 0 is
        // left out: in a pageblock's record it says "never".
        let generation = self.generations[cpu].load(Relaxed).wrapping_add(1).max(1);
        self.generations[cpu].store(generation, Release);
    }

    /// Writes the entries of a mapping whose place is taken: the first. A place that cannot be used is
    /// given back.
    ///
    /// # Errors
    /// [`MermapError::Refused`].
    fn map_run(
        &self,
        window: &mut Window,
        part: Part,
        run: Run,
        frames: FrameRange,
        flags: u64,
    ) -> Result<Entry, MermapError> {
        let global = if planted!(self.platform, GlobalWindow) { Entry::GLOBAL } else { 0 };
        let large = if run.level == Level::Pd { Entry::PAGE_SIZE } else { 0 };
        let entry = Entry::new(frames.start(), flags | large | global);
        match space::write(self.platform, run, Entry::EMPTY, entry) {
            Ok(()) => Ok(entry),
            Err(error) => {
                window.put(part);
                Err(MermapError::Refused(error))
            }
        }
    }

    /// Takes a mapping down. The pageblock remembers the window from now on: until here something
    /// may have been cached, whatever was flushed in the meantime.
    fn put(&self, mapping: &Mapping<'_, 'a, P>) {
        let cpu = mapping.cpu;
        let mut window = self.windows[cpu].lock(self.platform);
        let mut run = mapping.run;
        if run.count > 1 && slips!(self.platform, WindowEntryLeft) {
            run.count -= 1;
        }
        let cleared = space::write(self.platform, run, mapping.entry, Entry::EMPTY);
        space::must(cleared, "clear the entries of a window");
        let generation = self.generations[cpu].load(Relaxed);
        for part in mapping.frames.by_block() {
            self.map.part(part).0.set_window(cpu, generation);
        }
        window.put(mapping.part);
    }
}

/// Frames mapped in this CPU's window, taken down when this is dropped.
#[must_use = "the mapping is taken down when this is dropped"]
pub struct Mapping<'m, 'a, P: Platform> {
    mermap: &'m Mermap<'a, P>,
    cpu: usize,
    part: Part,
    run: Run,
    frames: FrameRange,
    entry: Entry,
    // Dropped after `put`: a mapping of the reserve keeps interrupts off until it is gone.
    _off: Option<InterruptsOff<'a, P>>,
}

impl<P: Platform> Mapping<'_, '_, P> {
    /// Address of the first frame.
    pub fn va(&self) -> Gva {
        self.run.va
    }

    /// The frames, at consecutive addresses.
    pub fn frames(&self) -> FrameRange {
        self.frames
    }
}

impl<P: Platform> Drop for Mapping<'_, '_, P> {
    fn drop(&mut self) {
        self.mermap.put(self);
    }
}
