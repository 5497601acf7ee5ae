//! What the small worlds are too small for: runs, large steps, limits.

use super::super::store::MAX_DUTIES;
use super::super::*;
use lacuna_abi::addr::PAGE_SIZE;

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
