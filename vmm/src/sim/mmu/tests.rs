//! What an MMU may use, and what it must not.

use super::*;
use crate::sim::ram::tests::booted;
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
    assert_eq!(machine.read(next), Err(Fault::Page { present: false }), "through the old table");
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
    let direct = |va: Gva| layout.place_of(va) == Place::DirectMap && layout.zone.contains_va(va);
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
