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
}

impl Mmu {
    /// An MMU that has cached nothing. What it leaves to chance follows from `seed`.
    #[must_use]
    pub fn new(cpu: usize, seed: u64) -> Self {
        let random = Random::new(seed, 1 + cpu as u64);
        let (tlb, paths) = (Tlb::default(), Paths::default());
        Self { cpu, tlb, paths, random, counters: MmuCounters::default() }
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
mod tests {
    use super::super::ram::tests::booted;
    use super::*;
    use lacuna_abi::addr::{FrameRange, Gfn};
    use lacuna_abi::event::EntryWrite;
    use lacuna_abi::walk::locate;

    struct Machine {
        ram: Ram,
        space: AddressSpace,
        mmu: Mmu,
        frame: Gfn,
    }

    impl Machine {
        fn new(seed: u64) -> Self {
            let (_, ram, root) = booted(2);
            let frame = ram.layout().zone_frames().start();
            let space = AddressSpace { root, pcid: 0 };
            Self { ram, space, mmu: Mmu::new(0, seed), frame }
        }

        fn write(&self, va: Gva, level: Level, new: Entry) {
            let at = locate(&self.ram, self.space.root, va, level).unwrap();
            let word = self.ram.word(at).unwrap();
            let old = Entry(word.swap(new.0, std::sync::atomic::Ordering::Relaxed));
            let (root, pcid) = (self.space.root, self.space.pcid);
            let write = EntryWrite { root, pcid, va, level, count: 1, old, new, grant: 0 };
            self.ram.versions.count(&write);
        }

        fn map(&self, va: Gva, frame: Gfn) {
            self.write(va, Level::Pt, Entry::new(frame, Entry::DATA));
        }

        fn read(&mut self, va: Gva) -> Result<Gfn, Fault> {
            self.mmu.access(&self.ram, self.space, va, false).map(Gpa::frame)
        }

        fn close(&self, frame: Gfn, closed: bool) {
            self.ram.frames.set(FrameRange::single(frame), closed);
        }
    }

    const PAGE: Gva = window(0).wrapping_add(5 * PAGE_SIZE);

    #[test]
    fn a_stale_translation_is_used_until_it_is_flushed() {
        let mut machine = Machine::new(1);
        let (old, new) = (machine.frame, machine.frame.wrapping_add(1));
        machine.map(PAGE, old);
        assert_eq!(machine.read(PAGE), Ok(old));
        machine.write(PAGE, Level::Pt, Entry::EMPTY);
        assert_eq!(machine.read(PAGE), Ok(old), "not present any more, but cached");
        machine.map(PAGE, new);
        assert_eq!(machine.read(PAGE), Ok(old));
        assert_eq!(machine.mmu.counters().stale_uses, 2);
        machine.mmu.invalidate(&Invalidation::Page { va: PAGE, pcid: 0 });
        assert_eq!(machine.read(PAGE), Ok(new));
        machine.map(PAGE, new);
        assert_eq!(machine.read(PAGE), Ok(new), "written again, to the same");
        assert_eq!(machine.mmu.counters().stale_uses, 2);
    }

    #[test]
    fn closing_a_frame_drops_what_is_cached_of_it() {
        let mut machine = Machine::new(1);
        let frame = machine.frame;
        machine.map(PAGE, frame);
        machine.read(PAGE).unwrap();
        machine.close(frame, true);
        let sealed = Fault::Sealed(frame.gpa(), AccessKind::Read);
        assert_eq!(machine.read(PAGE), Err(sealed), "mapped, but denied");
        machine.write(PAGE, Level::Pt, Entry::EMPTY);
        assert_eq!(machine.read(PAGE), Err(Fault::Page { present: false }));
        machine.close(frame, false);
        assert_eq!(machine.read(PAGE), Err(Fault::Page { present: false }), "and not back");
        assert_eq!(machine.mmu.counters().stale_uses, 0);
    }

    #[test]
    fn a_large_page_loses_only_the_frames_that_were_closed() {
        let mut machine = Machine::new(1);
        let va = direct_map(machine.frame.gpa());
        for page in 0..64 {
            machine.read(va.wrapping_add(page * PAGE_SIZE)).unwrap();
        }
        machine.close(machine.frame.wrapping_add(3), true);
        machine.write(va, Level::Pd, Entry::EMPTY);
        let lost = machine.read(va.wrapping_add(3 * PAGE_SIZE));
        assert_eq!(lost, Err(Fault::Page { present: false }));
        let kept = (0..64).filter(|n| machine.read(va.wrapping_add(n * PAGE_SIZE)).is_ok());
        assert!(kept.count() > 32, "stale, and used all the same");
    }

    #[test]
    fn a_walk_may_start_at_a_table_that_is_none_any_more() {
        let mut machine = Machine::new(1);
        let (old, new) = (machine.frame, machine.frame.wrapping_add(1));
        machine.map(PAGE, old);
        machine.read(PAGE).unwrap();
        // The window gets another page table, in which the page leads elsewhere.
        let table = machine.ram.layout().pool.end().0 - PAGE_SIZE;
        let entry = Gpa(table).wrapping_add(8 * Level::Pt.index(PAGE));
        let word = machine.ram.word(entry).unwrap();
        word.store(Entry::new(new, Entry::DATA).0, std::sync::atomic::Ordering::Relaxed);
        let linked = Entry::new(Gpa(table).frame(), Entry::TABLE);
        machine.write(window(0), Level::Pd, linked);
        let next = PAGE.wrapping_add(PAGE_SIZE);
        let word = machine.ram.word(entry.wrapping_add(8)).unwrap();
        word.store(Entry::new(new, Entry::DATA).0, std::sync::atomic::Ordering::Relaxed);
        // The neighbour was never translated: only the path to its old table is cached.
        assert_eq!(
            machine.read(next),
            Err(Fault::Page { present: false }),
            "through the old table"
        );
        machine.mmu.invalidate(&Invalidation::Page { va: Gva(0), pcid: 0 });
        assert_eq!(machine.read(next), Ok(new), "INVLPG of any page drops the path");
        assert_eq!(machine.read(PAGE), Ok(old), "but not the translation of another");
    }

    #[test]
    fn rights_are_those_of_the_whole_path() {
        let mut machine = Machine::new(1);
        let write =
            |machine: &mut Machine, va| machine.mmu.access(&machine.ram, machine.space, va, true);
        machine.write(PAGE, Level::Pt, Entry::new(machine.frame, Entry::READ_ONLY));
        let denied = Err(Fault::Page { present: true });
        assert_eq!(write(&mut machine, PAGE), denied);
        assert!(machine.read(PAGE).is_ok());
        machine.mmu.invalidate(&Invalidation::Everything);
        machine.map(PAGE, machine.frame);
        assert!(write(&mut machine, PAGE).is_ok());
        assert_eq!(write(&mut machine, Gva(1 << 63)), Err(Fault::NotCanonical));
        assert_eq!(write(&mut machine, window(7)), Err(Fault::Page { present: false }));
    }

    #[test]
    fn more_rights_without_a_flush_may_fault_once() {
        let faults = (0..64).filter(|seed| {
            let mut machine = Machine::new(*seed);
            machine.write(PAGE, Level::Pt, Entry::new(machine.frame, Entry::READ_ONLY));
            machine.read(PAGE).unwrap();
            machine.map(PAGE, machine.frame);
            machine.mmu.access(&machine.ram, machine.space, PAGE, true).is_err()
        });
        assert!((16..48).contains(&faults.count()));
    }

    #[test]
    fn whims_cache_what_nobody_asked_for_and_only_what_is_mapped() {
        let mut machine = Machine::new(9);
        machine.map(window(1), machine.frame);
        let mut foreign = false;
        for _ in 0..5000 {
            machine.mmu.whim(&machine.ram, machine.space);
            foreign |= machine.mmu.tlb.iter().any(|cached| cached.va == window(1));
        }
        let layout = *machine.ram.layout();
        let direct =
            |va: Gva| layout.place_of(va) == Place::DirectMap && layout.zone.contains_va(va);
        assert!(machine.mmu.tlb.iter().all(|cached| cached.va == window(1) || direct(cached.va)));
        assert!(foreign, "another CPU's window is cached too");
        let all = machine.mmu.tlb.iter().filter(|cached| cached.size == Level::Pd).count() as u64;
        assert_eq!(all, layout.zone_blocks());
        assert_eq!(machine.mmu.counters().stale_uses, 0);
    }

    #[test]
    fn a_speculative_read_of_a_secret_counts_if_it_goes_through_the_direct_map() {
        for (va, secret, counted) in [(PAGE, true, 0), (Gva(0), true, 1), (Gva(0), false, 0)] {
            let mut machine = Machine::new(1);
            let direct = direct_map(machine.frame.gpa());
            let (va, level) = if va == PAGE { (PAGE, Level::Pt) } else { (direct, Level::Pd) };
            if va == PAGE {
                machine.map(va, machine.frame);
            }
            machine.mmu.speculate(&machine.ram, machine.space, va);
            machine.write(va, level, Entry::EMPTY);
            machine.ram.frames.set_secret(FrameRange::single(machine.frame), secret);
            machine.mmu.speculate(&machine.ram, machine.space, va);
            let counters = machine.mmu.counters();
            assert_eq!((counters.stale_uses, counters.stale_secret_uses), (1, counted), "{va}");
        }
    }
}
