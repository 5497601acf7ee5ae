//! Random histories of worlds that are too large to be walked.

use super::super::Profile;
use super::reference::{Act, Pde, Pte};
use super::world::{Op, Size, Slip, World};
use proptest::prelude::*;

const SIZE: Size = Size {
    cpus: 3,
    roots: 3,
    tables: 3,
    pages: 4,
    profile: Profile::Intel,
    pge: true,
    pcide: true,
    tce: false,
};

/// Any operation. With `own`, each root has a PCID of its own, as an honest guest has it.
fn op(own: bool) -> impl Strategy<Value = Op> {
    let pde = prop_oneof![
        1 => Just(Pde::Empty),
        1 => any::<[bool; 2]>().prop_map(|[g, w]| Pde::Large { g, w }),
        4 => (0..SIZE.tables, any::<bool>()).prop_map(|(t, w)| Pde::Table { t, w }),
    ];
    let pte = prop_oneof![
        1 => Just(Pte::Empty),
        3 => (0..SIZE.pages, any::<[bool; 2]>()).prop_map(|(f, [g, w])| Pte::Page { f, g, w }),
    ];
    let at = prop::option::weighted(0.8, 0..SIZE.pages);
    let pcid = 0..3u16;
    let load = (0..SIZE.roots, pcid.clone(), any::<bool>()).prop_map(move |(r, p, no_flush)| {
        let p = if own { u16::try_from(r).unwrap() } else { p };
        Act::Load { r, p, no_flush }
    });
    let act = prop_oneof![
        6 => load,
        4 => at.clone().prop_map(Act::Invlpg),
        2 => (at, pcid.clone()).prop_map(|(at, p)| Act::PageOfPcid(at, p)),
        1 => pcid.prop_map(Act::Pcid),
        1 => Just(Act::AllPcids),
        1 => Just(Act::Everything),
        1 => prop_oneof![Just(Act::Pge), Just(Act::Pcide), Just(Act::Pg), Just(Act::Smep)],
    ];
    prop_oneof![
        3 => (0..SIZE.roots, pde).prop_map(|(r, pde)| Op::Pde(r, pde)),
        6 => (0..SIZE.tables, 0..SIZE.pages, pte).prop_map(|(t, i, pte)| Op::Pte(t, i, pte)),
        8 => (0..SIZE.cpus, act).prop_map(|(cpu, act)| Op::Act(cpu, act)),
        1 => (0..SIZE.pages).prop_map(Op::Seal),
        1 => (0..SIZE.cpus).prop_map(Op::Stop),
        1 => (0..SIZE.cpus).prop_map(Op::Start),
    ]
}

fn profile() -> impl Strategy<Value = (Profile, bool)> {
    prop_oneof![
        Just((Profile::Intel, false)),
        Just((Profile::IntelInvlpgErratum, false)),
        Just((Profile::Amd, false)),
        Just((Profile::Amd, true)),
    ]
}

fn check(ops: &[Op], (profile, tce): (Profile, bool), exact: bool) -> Result<(), TestCaseError> {
    let mut world = World::new(Size { profile, tce, ..SIZE }, false, Slip::None);
    for op in ops {
        if world.allows(*op) {
            world.apply(*op);
            world.compare(exact).map_err(|why| TestCaseError::fail(format!("{op:?}: {why}")))?;
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn nothing_is_missed_whatever_guests_do_with_pcids(
        ops in prop::collection::vec(op(false), 0..60), profile in profile(),
    ) {
        check(&ops, profile, false)?;
    }

    #[test]
    fn nothing_is_called_stale_that_is_not_while_each_root_has_its_pcid(
        ops in prop::collection::vec(op(true), 0..60), profile in profile(),
    ) {
        check(&ops, profile, true)?;
    }
}
