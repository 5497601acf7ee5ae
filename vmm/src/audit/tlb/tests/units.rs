//! What the small worlds are too small for: runs, large steps, limits.

use super::super::stale::MAX_PATHS;
use super::super::store::MAX_DUTIES;
use super::super::*;
use lacuna_abi::addr::PAGE_SIZE;
use lacuna_abi::event::Flush;

const ROOT: Gpa = Gpa(0x1000);

fn tlb(cpus: u8) -> Tlb {
    let start = Start { root: ROOT, cr0: bits::CR0_PG, cr4: bits::CR4_PGE, efer: 0 };
    let mut tlb = Tlb::new(usize::from(cpus), start, Profile::Intel);
    (0..cpus).for_each(|cpu| tlb.start(cpu));
    tlb
}

fn leaves(level: Level, va: u64, frame: u64, count: u64) -> Leaves {
    let frames = FrameRange::new(Gfn(frame), count).unwrap();
    Leaves { root: ROOT, va: Gva(va), level, frames, global: true, since: 0 }
}

fn invlpg(tlb: &mut Tlb, va: u64, count: u32, level: Level) {
    tlb.flush(0, &Flush::Pages { va: Gva(va), count, level }, 9).unwrap();
}

fn left_of(tlb: &Tlb) -> u64 {
    let all = FrameRange::new(Gfn(0), 1 << 40).unwrap();
    tlb.of_frames(all).iter().map(|duty| duty.frames.count()).sum()
}

#[test]
fn invlpg_of_any_address_removes_all_of_a_large_page_and_of_no_other() {
    for (level, order) in [(Level::Pd, 9), (Level::Pdpt, 18)] {
        let (va, frame) = (level.span() * 5, 3 << order);
        let mut tlb = tlb(1);
        tlb.revoke(&leaves(level, va, frame, level.frames()), EVERY, 5).unwrap();
        invlpg(&mut tlb, va - PAGE_SIZE, 1, Level::Pt);
        invlpg(&mut tlb, va + level.span(), 4, Level::Pd);
        assert_eq!(left_of(&tlb), level.frames());
        invlpg(&mut tlb, va + level.span() - 1, 1, Level::Pt);
        assert_eq!(left_of(&tlb), 0);
    }
}

#[test]
fn invlpg_in_large_steps_removes_one_small_page_in_each_step() {
    let mut tlb = tlb(1);
    tlb.revoke(&leaves(Level::Pt, 4 << 21, 512, 512), EVERY, 5).unwrap();
    invlpg(&mut tlb, (3 << 21) + 7 * PAGE_SIZE, 2, Level::Pd);
    assert_eq!(left_of(&tlb), 511);
    let hit = Gva((4 << 21) + 7 * PAGE_SIZE);
    assert_eq!(tlb.at((hit, hit), |_| true), []);
}

#[test]
fn a_seal_discharges_what_was_revoked_before_it_and_leaves_the_rest_of_a_run() {
    let mut tlb = tlb(2);
    let run = leaves(Level::Pt, 4 << 21, 512, 8);
    tlb.revoke(&run, EVERY, 5).unwrap();
    tlb.discharge(run.frames, 5).unwrap();
    assert_eq!(left_of(&tlb), 8);
    tlb.discharge(FrameRange::new(Gfn(514), 2).unwrap(), 6).unwrap();
    let runs: Vec<_> = tlb.of_frames(run.frames).iter().map(|duty| duty.frames).collect();
    assert_eq!(runs.iter().map(|run| run.count()).sum::<u64>(), 6);
    assert!(tlb.of_frames(run.frames).iter().all(|duty| duty.cpus == 0b11));
}

#[test]
fn a_cpu_that_flushed_is_not_blamed_again_for_a_newer_number() {
    let mut tlb = tlb(2);
    let run = leaves(Level::Pd, 4 << 21, 512, 512);
    tlb.revoke(&run, EVERY, 5).unwrap();
    tlb.flush(1, &Flush::Everything, 6).unwrap();
    tlb.revoke(&run, only(0), 8).unwrap();
    assert_eq!(tlb.of_frames(run.frames)[0].cpus, 0b01);
}

#[test]
fn what_epochs_discharged_makes_room_and_a_full_list_says_so() {
    let nth = |n: u64| leaves(Level::Pd, n << 21, n << 9, 512);
    let limit = u64::try_from(MAX_DUTIES).unwrap();
    let mut full = tlb(1);
    for n in 0..limit {
        full.revoke(&nth(n), EVERY, 5).unwrap();
    }
    assert_eq!(full.revoke(&nth(limit), EVERY, 5), Err(TooMany));
    let mut tlb = tlb(1);
    for n in 0..2 * limit {
        tlb.revoke(&nth(n), EVERY, 7 + 2 * n).unwrap();
        tlb.flush(0, &Flush::Everything, 8 + 2 * n).unwrap();
    }
    assert!(tlb.duties.len() <= 1024);
}

#[test]
fn too_many_paths_to_one_table_are_said() {
    let mut tlb = tlb(1);
    let mut unlink = |n: u64| {
        let (va, level, table) = (Gva(n << 21), Level::Pd, Gfn(1));
        tlb.unlink(&Path { root: ROOT, va, level, table, since: 0 }, &[], 5)
    };
    assert!((0..512).all(|n| unlink(n).is_ok()));
    assert_eq!(unlink(512), Err(TooMany));
}

#[test]
fn what_is_linked_into_a_table_that_cpus_may_still_walk_to_is_cached_at_the_old_address() {
    let mut tlb = tlb(1);
    let (va, level, parent) = (Gva(1 << 30), Level::Pdpt, Gfn(1));
    tlb.unlink(&Path { root: ROOT, va, level, table: parent, since: 0 }, &[], 5).unwrap();
    // Linked elsewhere, and a table of small entries into it.
    let elsewhere = (5 << 30) + (3 << 21);
    let path = Path { root: ROOT, va: Gva(elsewhere), level: Level::Pd, table: Gfn(2), since: 6 };
    let own = leaves(Level::Pt, elsewhere + PAGE_SIZE, 512, 1);
    tlb.linked(parent, 3 << 21, &path, &[own]).unwrap();
    let old = Gva((1 << 30) + (3 << 21) + PAGE_SIZE);
    assert_eq!(
        tlb.at((old, old), |_| true).iter().map(|duty| duty.frames).collect::<Vec<_>>(),
        [own.frames]
    );
    tlb.flush(0, &Flush::NonGlobal, 9).unwrap();
    assert_eq!(tlb.of_table(Gfn(2)), [], "the path is gone");
    assert_eq!(left_of(&tlb), 1, "what it was global for is not");
}

/// A guest that unlinks tables of scattered pages, each at many places, and never flushes. Number of
/// the unlinks that were followed.
fn unlink_scattered(tlb: &mut Tlb) -> u64 {
    let mut followed = 0;
    for table in 0..64 {
        let own: Vec<_> = (0..512)
            .map(|page| (leaves(Level::Pt, page << 12, table << 12 | page << 1, 1), EVERY))
            .collect();
        for place in 0..200 {
            let va = Gva((table * 200 + place) << 21);
            let own: Vec<_> = own
                .iter()
                .map(|(leaves, cpus)| {
                    (Leaves { va: va.wrapping_add(leaves.va.0), ..*leaves }, *cpus)
                })
                .collect();
            let path =
                Path { root: ROOT, va, level: Level::Pd, table: Gfn(9 << 20 | table), since: 0 };
            if tlb.unlink(&path, &own, 5).is_err() {
                return followed;
            }
            followed += 1;
        }
    }
    followed
}

#[test]
fn what_a_question_looks_at_is_bounded_whatever_a_guest_unlinks() {
    let mut tlb = tlb(1);
    let followed = unlink_scattered(&mut tlb);
    assert_eq!(followed, u64::try_from(MAX_PATHS).unwrap(), "what is past the bound says so");
    let looked_at = std::cell::Cell::new(0_u64);
    let count = |_: &Duty| {
        looked_at.set(looked_at.get() + 1);
        true
    };
    let everything = FrameRange::new(Gfn(0), 1 << 40).unwrap();
    let found = tlb.some_of_frames(everything, count);
    assert_eq!(u64::try_from(found.len()).unwrap(), followed * 512);
    assert!(looked_at.replace(0) <= 1 << 21);
    // One page of one table: once for each place of the table.
    let one = FrameRange::single(Gfn(3 << 12 | 7 << 1));
    assert_eq!(tlb.some_of_frames(one, count).len(), 200);
    assert_eq!(looked_at.replace(0), 200);
    let va = Gva(5 << 21);
    assert_eq!(tlb.at((va, va), count).len(), 1);
    assert_eq!(looked_at.get(), 1);
}

#[test]
fn the_same_duty_through_several_paths_is_found_once_with_all_its_cpus() {
    let mut tlb = tlb(3);
    let own = [(leaves(Level::Pt, 4 << 21, 512, 8), EVERY)];
    let path = Path { root: ROOT, va: Gva(4 << 21), level: Level::Pd, table: Gfn(9), since: 0 };
    tlb.unlink(&path, &own, 5).unwrap();
    let found = tlb.of_frames(own[0].0.frames);
    assert_eq!(found.iter().map(|duty| duty.cpus).collect::<Vec<_>>(), [0b111]);
}
