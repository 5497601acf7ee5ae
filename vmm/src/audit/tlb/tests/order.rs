//! The order in which duties are found: it depends on what they are, and not on where they lie.

use super::super::*;
use lacuna_abi::addr::PAGE_SIZE;

const ROOT: Gpa = Gpa(0x1000);

fn started() -> Tlb {
    let start = Start { root: ROOT, cr0: bits::CR0_PG, cr4: bits::CR4_PAE, efer: 0 };
    let mut tlb = Tlb::new(1, start, Profile::Intel);
    tlb.start(0);
    tlb
}

fn leaves(page: u64) -> Leaves {
    let va = Gva(0x4000_0000 + page * PAGE_SIZE);
    let frames = FrameRange::single(Gfn(0x100 + page));
    Leaves { root: ROOT, va, level: Level::Pt, frames, global: false, since: 0 }
}

fn revoke(tlb: &mut Tlb, page: u64, seq: u64) {
    tlb.revoke(&leaves(page), EVERY, seq).unwrap();
}

fn drop_page(tlb: &mut Tlb, page: u64, seq: u64) {
    tlb.discharge(leaves(page).frames, seq).unwrap();
}

/// Revokes the pages 1 to 8, after others came and went.
fn revoked(others: &[u64]) -> Tlb {
    let mut tlb = started();
    for page in others {
        revoke(&mut tlb, 20 + page, 1);
    }
    for page in others.iter().rev() {
        drop_page(&mut tlb, 20 + page, 2);
    }
    for page in 1..=8 {
        revoke(&mut tlb, page, 10 + page * 7 % 11);
    }
    tlb
}

#[test]
fn duties_are_found_in_the_order_of_their_revokes_whatever_slots_they_lie_in() {
    let all = |tlb: &Tlb| {
        let frames = FrameRange::new(Gfn(0x100), 64).unwrap();
        let at = tlb.at((leaves(0).va, leaves(63).va), |_| true);
        assert_eq!(tlb.of_frames(frames), at);
        at
    };
    let expected = all(&revoked(&[]));
    assert_eq!(expected.len(), 8);
    assert!(expected.is_sorted_by_key(|duty| duty.seq));
    assert!(!expected.is_sorted_by_key(|duty| duty.va), "the order is not that of addresses");
    for others in [&[1, 2, 3][..], &[5, 1, 4, 2], &[8, 7, 6, 5, 4, 3, 2, 1]] {
        assert_eq!(all(&revoked(others)), expected, "after {others:?}");
    }
    // So many more that every slot is looked at instead of a chain.
    let mut few = revoked(&[3]);
    drop_page(&mut few, 8, 100);
    drop_page(&mut few, 7, 100);
    let mut wide = few.at((Gva(0), Gva(u64::MAX)), |_| true);
    assert_eq!(wide, few.at((leaves(0).va, leaves(63).va), |_| true));
    wide.reverse();
    assert_ne!(wide, few.at((leaves(0).va, leaves(63).va), |_| true), "the order is looked at");
}

#[test]
fn paths_to_tables_are_followed_in_the_order_of_the_tables_and_not_as_they_came() {
    let with = |tables: &[u64]| {
        let mut tlb = started();
        for table in tables {
            let va = Gva(0x8000_0000 + table * Level::Pd.span());
            let path = Path { root: ROOT, va, level: Level::Pd, table: Gfn(*table), since: 0 };
            let own = Leaves { va, ..leaves(*table) };
            tlb.unlink(&path, &[(own, EVERY)], 5).unwrap();
        }
        tlb.at((Gva(0), Gva(u64::MAX)), |_| true)
    };
    let expected = with(&[1, 2, 3, 4]);
    assert_eq!(expected.len(), 4);
    assert_eq!(with(&[4, 2, 1, 3]), expected);
}
