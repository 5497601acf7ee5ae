//! The allocator against a plain model, and on two threads at once.

use crate::alloc::Request;
use crate::freetype::Migratetype;
use crate::secret::{Access, SecretPages};
use crate::testing::step::{ORDERS, Setup, Step, Turn, Use};
use crate::testing::{Mock, Random, history};
use proptest::prelude::*;
use std::vec::Vec;

fn turn() -> impl Strategy<Value = Turn> {
    let order = prop_oneof![8 => 0u8..4, 2 => 4u8..9, 2 => 9u8..ORDERS];
    let alloc = (order, 0usize..3, any::<[bool; 2]>(), 0u8..4).prop_map(
        |(order, migratetype, [zero, secret], noblock)| {
            let migratetype = Migratetype::ALL[migratetype];
            Step::Alloc(Request { order, migratetype, zero, noblock: noblock == 0 }, secret)
        },
    );
    let what = (any::<u8>(), 0u16..1024, 0u16..1024, any::<[bool; 3]>(), 0u8..8).prop_map(
        |(which, first, count, [write, special, other], during)| {
            Step::Use(Use { which, first, count, write, special, other, during })
        },
    );
    let step = prop_oneof![
        12 => alloc,
        7 => any::<u8>().prop_map(Step::Free),
        6 => what,
        4 => any::<u8>().prop_map(Step::Convert),
        1 => any::<u8>().prop_map(Step::Renew),
        1 => any::<u64>().prop_map(Step::Forge),
        3 => prop_oneof![Just(Step::Balance), Just(Step::Shrink), Just(Step::Teardown)],
        1 => (0u8..8).prop_map(Step::InterruptsOff),
        1 => (0u8..16).prop_map(Step::Refuse),
    ];
    (0u8..4, step).prop_map(|(cpu, step)| Turn { cpu, step })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn every_public_operation_does_what_a_model_says(
        turns in prop::collection::vec(turn(), 1..160), cpus in 1usize..=4, flags: [bool; 5],
        no_flip in prop::bool::weighted(0.2), more: [bool; 2],
    ) {
        let setup = Setup::new(cpus, flags).with([no_flip, more[0], more[1]]);
        history::run(setup, turns.into_iter());
    }
}

#[test]
fn two_cpus_at_once_never_share_a_page() {
    let mock = Mock::new(16, 2);
    mock.stop_recording();
    let allocator = mock.allocator();
    std::thread::scope(|scope| {
        for cpu in 0..2_u64 {
            let (mock, allocator) = (&mock, &allocator);
            scope.spawn(move || {
                mock.on_cpu(cpu as usize);
                let mut random = Random(cpu);
                let mut held: Vec<(SecretPages<'_, '_, Mock>, u64)> = Vec::new();
                for op in 0..3000 {
                    if held.len() > 40 || (!held.is_empty() && random.below(3) == 0) {
                        let (pages, tag) =
                            held.swap_remove(random.below(held.len() as u64) as usize);
                        let count = pages.frames().count();
                        let window = pages.open(0, count, Access::Read).unwrap();
                        assert_eq!(window.load((count - 1) * 4096), Ok(tag));
                        continue;
                    }
                    let request = Request {
                        order: random.below(5) as u8,
                        migratetype: Migratetype::Unmovable,
                        zero: true,
                        noblock: false,
                    };
                    let Ok(pages) = allocator.alloc_secret(request) else { continue };
                    let count = pages.frames().count();
                    let window = pages.open(0, count, Access::Write).unwrap();
                    assert_eq!(window.load((count - 1) * 4096), Ok(0));
                    let tag = op * 2 + cpu + 1;
                    window.store((count - 1) * 4096, tag).unwrap();
                    window.close().unwrap();
                    held.push((pages, tag));
                }
            });
        }
    });
    assert_eq!(allocator.counters().nr_allocated, 0);
    allocator.zone().check(&mock.map());
    allocator.shrink().unwrap();
    assert!(mock.in_direct_map(mock.layout.zone_frames()));
}

/// What the model says of random histories with a fault planted: the histories differ from the
/// model, or the machine's host finds a violation, within a few hundred steps.
#[cfg(feature = "faults")]
#[test]
fn twin_no_planted_fault_passes_random_histories() {
    use lacuna_abi::fault::Fault;
    // Lies of the records alone change no history.
    for fault in Fault::ALL.iter().copied().filter(|fault| fault.modes().contains(&"trace")) {
        let found = (0..40).any(|seed| {
            let mut random = Random(seed);
            let bytes: Vec<u8> = (0..600).map(|_| random.below(256) as u8).collect();
            let history = || history::run_bytes_with(&bytes, |mock| mock.plant(fault));
            std::panic::catch_unwind(history).is_err()
        });
        assert!(found, "{} is not found", fault.name());
    }
}
