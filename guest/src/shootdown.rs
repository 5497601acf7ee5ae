//! Shootdowns: a CPU has others carry out a flush, and returns when all of them have.
//!
//! Each CPU has one request, which it fills in as initiator; each target takes its own bit out of
//! the request when it has flushed. No lock is taken, so that any number of CPUs may be initiators
//! at once, and a CPU that waits for others serves theirs meanwhile: its interrupts are on.

use crate::alloc::PageAllocator;
use crate::platform::{CpuSet, Platform, planted, slips};
use crate::sync::{AtomicU8, AtomicU64};
use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use lacuna_abi::MAX_CPUS;
use lacuna_abi::addr::{FrameRange, Gva};
use lacuna_abi::event::Flush;
use lacuna_abi::paging::Level;

/// Turns of waiting between two reports that CPUs have not answered; a power of two.
const PATIENCE: u32 = 1024;

/// What shootdowns need of the CPU that runs them.
pub trait Interrupts {
    /// Number of this CPU.
    fn cpu(&self) -> usize;

    /// Whether interrupts are on.
    fn interrupts_are_on(&self) -> bool;

    /// Sends the shootdown interrupt to these CPUs, whose handler calls [`Shootdowns::serve`].
    fn send(&self, cpus: CpuSet);

    /// Records, then executes a local invalidation.
    fn flush(&self, flush: Flush);

    /// Records that this CPU has done what shootdown `number` asked of it.
    fn acknowledge(&self, number: u64);

    /// One turn of waiting for another CPU.
    fn relax(&self);

    /// Called now and then while these CPUs have not answered shootdown `number` of this CPU, before
    /// their interrupt is sent again.
    fn unanswered(&self, number: u64, cpus: CpuSet);
}

/// What one CPU asks of others.
#[derive(Debug, Default)]
struct Request {
    /// CPUs that have not answered yet. Published last, so that who finds its bit finds the rest.
    missing: AtomicU8,
    number: AtomicU64,
    flush: [AtomicU64; 2],
}

#[cfg(not(loom))]
impl Request {
    const fn none() -> Self {
        Self {
            missing: AtomicU8::new(0),
            number: AtomicU64::new(0),
            flush: [const { AtomicU64::new(0) }; 2],
        }
    }
}

/// The shootdowns of all CPUs; by default none is under way, and CPU 0 alone is online.
#[derive(Debug, Default)]
pub struct Shootdowns {
    /// CPUs that were started, or are about to be, beside CPU 0.
    online: AtomicU8,
    /// Number of the last shootdown.
    last: AtomicU64,
    requests: [Request; MAX_CPUS],
}

impl Shootdowns {
    /// The default, for a static. (The atomics of `--cfg loom` are made at run time.)
    #[cfg(not(loom))]
    #[must_use]
    pub const fn new() -> Self {
        Self {
            online: AtomicU8::new(0),
            last: AtomicU64::new(0),
            requests: [const { Request::none() }; MAX_CPUS],
        }
    }

    /// From now on these CPUs take part too. Called before they are started. Each of them calls
    /// [`Self::serve`] once, as soon as interrupts reach it: what was asked of it before that has
    /// been waiting.
    pub fn bring_online(&self, cpus: CpuSet) {
        self.online.fetch_or(cpus.0, AcqRel);
    }

    /// Has every CPU of the set that is online carry out `flush`, this one included if it is in
    /// the set, and returns when all have. A CPU that was not started caches nothing.
    ///
    /// # Panics
    /// With interrupts off: two CPUs that wait for each other could never answer, and who holds a
    /// lock might wait for its next owner.
    // Part of the code that asks, so that the sites of records name that.
    #[inline(always)]
    pub fn run(&self, on: &impl Interrupts, flush: Flush, cpus: CpuSet) {
        assert!(on.interrupts_are_on(), "a shootdown with interrupts off, or a lock held");
        let own = CpuSet::only(on.cpu());
        let online = self.online.load(Acquire) | CpuSet::only(0).0;
        let others = CpuSet(cpus.0 & online & !own.0);
        let request = &self.requests[on.cpu()];
        let number = self.last.fetch_add(1, Relaxed) + 1;
        if !others.is_empty() {
            for (word, value) in request.flush.iter().zip(encode(flush)) {
                word.store(value, Relaxed);
            }
            request.number.store(number, Relaxed);
            request.missing.store(others.0, Release);
            on.send(others);
        }
        if cpus.contains(on.cpu()) {
            on.flush(flush);
        }
        let mut turns = 0_u32;
        loop {
            let missing = CpuSet(request.missing.load(Acquire));
            if missing.is_empty() {
                break;
            }
            on.relax();
            turns = turns.wrapping_add(1);
            if turns.is_multiple_of(PATIENCE) {
                on.unanswered(number, missing);
                // An interrupt may be lost; one too many finds nothing to do.
                on.send(missing);
            }
        }
    }

    /// Does what other CPUs ask of this one: the handler of the shootdown interrupt. Interrupts
    /// are off. An interrupt that finds nothing to do was answered together with an earlier one.
    pub fn serve(&self, on: &impl Interrupts) {
        let own = CpuSet::only(on.cpu());
        for request in &self.requests {
            if request.missing.load(Acquire) & own.0 == 0 {
                continue;
            }
            let [kind, va] = &request.flush;
            on.flush(decode([kind.load(Relaxed), va.load(Relaxed)]));
            on.acknowledge(request.number.load(Relaxed));
            // The request may be filled in anew as soon as the last bit is gone.
            request.missing.fetch_and(!own.0, AcqRel);
        }
    }
}

impl<P: Platform> PageAllocator<'_, P> {
    /// Sends a flush to a set of CPUs, if there are any in it, and counts that. Part of its caller,
    /// which stories of violations then name.
    #[inline(always)]
    pub(crate) fn shootdown(&self, flush: Flush, cpus: CpuSet) {
        if !cpus.is_empty() {
            self.counts.shootdowns.add(1);
            self.platform.shootdown(flush, cpus);
        }
    }

    /// Has every CPU whose window may still be cached over the frames flush it: one shootdown for
    /// all.
    pub(crate) fn flush_windows(&self, frames: impl Iterator<Item = FrameRange>) {
        if planted!(self.platform, FreeBeforeWindowFlush) {
            return;
        }
        let mut cpus =
            frames.fold(CpuSet::NONE, |set, each| set.union(self.mermap.may_cache(each)));
        if slips!(self.platform, ReleaseFlushLocal) {
            cpus = CpuSet::only(self.platform.cpu());
        }
        self.shootdown(Flush::NonGlobal, cpus);
    }
}

const NON_GLOBAL: u64 = 0;
const EVERYTHING: u64 = 1;
const PAGES: u64 = 2;
const PAGE_OF_PCID: u64 = 3;
const PCID: u64 = 4;
const ALL_PCIDS: u64 = 5;

/// Kind, level and count in the first word, the address in the second.
fn encode(flush: Flush) -> [u64; 2] {
    match flush {
        Flush::NonGlobal => [NON_GLOBAL, 0],
        Flush::Everything => [EVERYTHING, 0],
        Flush::AllPcids => [ALL_PCIDS, 0],
        Flush::Pcid(pcid) => [PCID | u64::from(pcid) << 32, 0],
        Flush::PageOfPcid { va, pcid } => [PAGE_OF_PCID | u64::from(pcid) << 32, va.0],
        Flush::Pages { va, count, level } => {
            [PAGES | u64::from(level.number()) << 8 | u64::from(count) << 32, va.0]
        }
    }
}

/// What [`encode`] was given; anything else is the flush that leaves nothing behind.
fn decode([first, va]: [u64; 2]) -> Flush {
    let [kind, level, _, _, c0, c1, c2, c3] = first.to_le_bytes();
    let count = u32::from_le_bytes([c0, c1, c2, c3]);
    match (u64::from(kind), Level::from_number(level)) {
        (NON_GLOBAL, _) => Flush::NonGlobal,
        (PAGES, Some(level)) => Flush::Pages { va: Gva(va), count, level },
        (ALL_PCIDS, _) => Flush::AllPcids,
        (PCID, _) => Flush::Pcid(u16::from_le_bytes([c0, c1])),
        (PAGE_OF_PCID, _) => Flush::PageOfPcid { va: Gva(va), pcid: u16::from_le_bytes([c0, c1]) },
        _ => Flush::Everything,
    }
}
