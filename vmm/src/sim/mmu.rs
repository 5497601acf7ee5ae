//! The MMU of one simulated CPU: translates through its caches, walks the tables in guest memory,
//! and asks the second stage.
//!
//! It is deliberately lazy. What it has cached it uses, whatever the tables say by now, until an
//! invalidation takes it or it happens to go; and it caches, at random, what nobody asked for.

use super::paths::{Path, Paths};
use super::ram::Ram;
use super::random::Random;
use super::tlb::{Invalidation, Tlb, Translation};
use crate::machine::exit::AccessKind;
use lacuna_abi::addr::{Gpa, Gva, PAGE_SIZE};
use lacuna_abi::layout::{
    Place, WINDOW_LARGE_OFFSET, WINDOW_LARGE_SLOTS, WINDOW_PAGES, direct_map, window,
};
use lacuna_abi::paging::{Entry, Level, is_canonical};
use lacuna_abi::walk::{entry_address, translate};
use lacuna_guest::platform::AddressSpace;
use std::sync::atomic::Ordering::Acquire;

/// Of so many translations of a large page one is cached as a part of it.
const PARTS: u64 = 8;

/// Why an access did not take place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// The address is not canonical.
    NotCanonical,
    /// The guest's tables do not allow it.
    Page {
        /// They map the address, but not for this.
        present: bool,
    },
    /// The second stage denies the frame at this address.
    Sealed(Gpa, AccessKind),
    /// There is no memory at this address.
    NoMemory(Gpa),
}

/// What an MMU counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MmuCounters {
    /// Walks of the tables.
    pub walks: u64,
    /// Accesses at random, of which nothing is left but what they cached.
    pub speculations: u64,
    /// Accesses through a translation that the tables do not give any more.
    pub stale_uses: u64,
    /// Those of them that reached a secret frame and must not happen: all through the direct map,
    /// and through a window all but speculative ones, which its owner may make until it flushes.
    pub stale_secret_uses: u64,
}

/// Where an access goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Reached {
    gpa: Gpa,
    stale: bool,
}

/// The MMU of one CPU.
#[derive(Clone, Debug)]
pub struct Mmu {
    cpu: usize,
    tlb: Tlb,
    paths: Paths,
    random: Random,
    counters: MmuCounters,
    /// What this MMU does not carry out though it must.
    #[cfg(test)]
    pub(super) keeps: Option<fn(&Invalidation) -> bool>,
}

impl Mmu {
    /// An MMU that has cached nothing. What it leaves to chance follows from `seed`.
    #[must_use]
    pub fn new(cpu: usize, seed: u64) -> Self {
        let random = Random::new(seed, 1 + cpu as u64);
        let (tlb, paths) = (Tlb::default(), Paths::default());
        Self {
            cpu,
            tlb,
            paths,
            random,
            counters: MmuCounters::default(),
            #[cfg(test)]
            keeps: None,
        }
    }

    /// What was counted.
    #[must_use]
    pub const fn counters(&self) -> MmuCounters {
        self.counters
    }

    /// Where this CPU's numbers come from.
    pub(super) const fn random(&mut self) -> &mut Random {
        &mut self.random
    }

    /// Physical address of `va` for a load or store.
    ///
    /// # Errors
    /// [`Fault`].
    #[inline]
    pub fn access(
        &mut self,
        ram: &Ram,
        space: AddressSpace,
        va: Gva,
        write: bool,
    ) -> Result<Gpa, Fault> {
        let Reached { gpa, stale } = self.reach(ram, space, va, write)?;
        if stale {
            self.counters.stale_uses += 1;
            self.counters.stale_secret_uses += u64::from(ram.frames.is_secret(gpa.frame()));
        }
        Ok(gpa)
    }

    /// Carries out an invalidation: drops what must go.
    pub fn invalidate(&mut self, what: &Invalidation) {
        #[cfg(test)]
        if self.keeps.is_some_and(|keeps| keeps(what)) {
            return;
        }
        self.tlb.invalidate(what);
        self.paths.invalidate(what);
    }

    /// Does at random what the architecture allows at any time: drops a translation, or uses an
    /// address that nobody asked for.
    pub fn whim(&mut self, ram: &Ram, space: AddressSpace) {
        match self.random.below(4) {
            0 => self.tlb.vanish(&mut self.random),
            1 => self.paths.vanish(&mut self.random),
            _ => {
                let va = self.somewhere(ram);
                self.speculate(ram, space, va);
            }
        }
    }

    /// Uses `va` as a CPU does that guesses wrong: nothing comes of it but cached translations.
    pub fn speculate(&mut self, ram: &Ram, space: AddressSpace, va: Gva) {
        self.counters.speculations += 1;
        let Ok(Reached { gpa, stale: true }) = self.reach(ram, space, va, false) else { return };
        self.counters.stale_uses += 1;
        let direct = ram.layout().place_of(va) == Place::DirectMap;
        let leaked = direct && ram.frames.is_secret(gpa.frame());
        self.counters.stale_secret_uses += u64::from(leaked);
    }

    /// An address in the direct map, in this CPU's window or in another's, often where an entry was
    /// written just now.
    fn somewhere(&mut self, ram: &Ram) -> Gva {
        let layout = ram.layout();
        let any = self.random.below(layout.cpus as u64) as usize;
        match self.random.below(6) {
            0 | 1 => ram.versions.recent(&mut self.random),
            2 | 3 => direct_map(layout.zone.gpa).wrapping_add(self.random.below(layout.zone.len)),
            4 => {
                let cpu = if self.random.one_in(2) { self.cpu } else { any };
                window(cpu).wrapping_add(self.random.below(WINDOW_PAGES) * PAGE_SIZE)
            }
            _ => {
                let bytes = WINDOW_LARGE_SLOTS * Level::Pd.span();
                window(any).wrapping_add(WINDOW_LARGE_OFFSET + self.random.below(bytes))
            }
        }
    }

    #[inline]
    fn reach(
        &mut self,
        ram: &Ram,
        space: AddressSpace,
        va: Gva,
        write: bool,
    ) -> Result<Reached, Fault> {
        if let Some(cached) = self.tlb.lookup(va, space.pcid, &mut self.random) {
            let gpa = cached.gpa(va);
            // One whose frame was closed since is not there any more.
            if ram.frames.keeps(gpa.frame(), cached.stamp) {
                if write && !cached.writable {
                    return self.reach_again(ram, space, va);
                }
                let version = ram.versions.at(va);
                if cached.version == version {
                    return Ok(Reached { gpa, stale: false });
                }
                let same = is_current(ram, space, va, gpa, write);
                if same {
                    cached.version = version;
                }
                return Ok(Reached { gpa, stale: !same });
            }
            if cached.size == Level::Pt {
                self.tlb.forget(va, Level::Pt);
            }
        }
        self.walk(ram, space, va, write)
    }

    /// A store through a translation that is cached as read-only faults, or the tables are looked
    /// at first: a CPU may do either (SDM volume 3, "Optional Invalidation").
    fn reach_again(&mut self, ram: &Ram, space: AddressSpace, va: Gva) -> Result<Reached, Fault> {
        if self.random.one_in(2) {
            return Err(Fault::Page { present: true });
        }
        self.tlb.forget(va, Level::Pt);
        self.tlb.forget(va, Level::Pd);
        self.walk(ram, space, va, true)
    }

    fn walk(
        &mut self,
        ram: &Ram,
        space: AddressSpace,
        va: Gva,
        write: bool,
    ) -> Result<Reached, Fault> {
        if !is_canonical(va) {
            return Err(Fault::NotCanonical);
        }
        self.counters.walks += 1;
        // Before the tables are read: what changes meanwhile counts as later.
        let (stamp, version) = (ram.frames.stamp(), ram.versions.at(va));
        let start = self.paths.lookup(va, space.pcid).copied();
        let old_path = start.is_some_and(|path| path.links != ram.versions.links());
        let (mut table, mut level, mut writable) =
            start.map_or((space.root, Level::Pml4, true), |p| (p.table, p.below, p.writable));
        let links = start.map_or_else(|| ram.versions.links(), |path| path.links);
        let entry = loop {
            let at = entry_address(table, level, va);
            if ram.frames.is_closed(at.frame()) {
                return Err(Fault::Sealed(at, AccessKind::PageWalk));
            }
            let word = ram.word(at).ok_or(Fault::NoMemory(at))?;
            let entry = Entry(word.load(Acquire));
            if !entry.is_present() {
                return Err(Fault::Page { present: false });
            }
            writable &= entry.has(Entry::WRITABLE);
            let Some(below) = level.below().filter(|_| !entry.is_leaf(level)) else { break entry };
            table = entry.frame(level).gpa();
            let va = va.align_down(level.span());
            let path = Path { va, below, table, pcid: space.pcid, writable, links };
            self.paths.insert(path, &mut self.random);
            level = below;
        };
        let large = level > Level::Pt && !self.random.one_in(PARTS);
        let size = if large { Level::Pd } else { Level::Pt };
        let first = va.align_down(size.span());
        let offset = (first.0 & (level.span() - 1)) / PAGE_SIZE;
        let frame = entry.frame(level).wrapping_add(offset);
        let mut found = Translation {
            va: first,
            frame,
            stamp,
            version,
            pcid: space.pcid,
            size,
            leaf: level,
            global: entry.has(Entry::GLOBAL),
            writable,
        };
        let gpa = found.gpa(va);
        if ram.frames.is_closed(gpa.frame()) {
            let kind = if write { AccessKind::Write } else { AccessKind::Read };
            // Nothing is cached: a combined translation takes both stages.
            return match write && !writable {
                true => Err(Fault::Page { present: true }),
                false => Err(Fault::Sealed(gpa, kind)),
            };
        }
        let stale = old_path && !is_current(ram, space, va, gpa, write);
        if stale {
            // Each use is compared again.
            found.version = 0;
        }
        self.tlb.insert(found, &mut self.random);
        if write && !writable {
            return Err(Fault::Page { present: true });
        }
        Ok(Reached { gpa, stale })
    }
}

/// Whether the tables, read now and from the root, take `va` to `gpa`.
fn is_current(ram: &Ram, space: AddressSpace, va: Gva, gpa: Gpa, write: bool) -> bool {
    translate(ram, space.root, va)
        .is_ok_and(|leaf| leaf.gpa_of(va) == gpa && (leaf.writable || !write))
}

#[cfg(test)]
mod tests;
