//! Conversions mixed with everything else against a plain model, and on several threads at once.

use super::convert::secret;
use crate::alloc::{PageAllocator, Request};
use crate::freetype::Migratetype;
use crate::mapped::MappedPages;
use crate::platform::{InterruptsOff, Platform};
use crate::secret::{Access, SecretPages};
use crate::testing::{Mock, Random, pages};
use lacuna_abi::addr::PAGE_SIZE;
use proptest::prelude::*;
use std::sync::Barrier;
use std::vec::Vec;

/// One step of a random history.
#[derive(Clone, Copy, Debug)]
enum Step {
    Alloc {
        order: u8,
        secret: bool,
        noblock: bool,
    },
    /// The allocation with this number, counted around, changes sides.
    Convert(usize),
    Free {
        number: usize,
        interrupts_off: bool,
    },
    Shrink,
}

fn step() -> impl Strategy<Value = Step> {
    let order = prop_oneof![6 => 0u8..4, 2 => 4u8..9, 1 => Just(9)];
    prop_oneof![
        5 => (order, any::<bool>(), any::<bool>())
            .prop_map(|(order, secret, noblock)| Step::Alloc { order, secret, noblock }),
        5 => any::<usize>().prop_map(Step::Convert),
        4 => (any::<usize>(), prop::bool::weighted(0.2))
            .prop_map(|(number, interrupts_off)| Step::Free { number, interrupts_off }),
        1 => Just(Step::Shrink),
    ]
}

/// An allocation with the tag that its last word holds.
enum Held<'r, 'a> {
    Mapped(MappedPages<'r, 'a, Mock>, u64),
    Secret(SecretPages<'r, 'a, Mock>, u64),
}

impl Held<'_, '_> {
    fn pages(&self) -> u64 {
        match self {
            Self::Mapped(pages, _) => pages.frames().count(),
            Self::Secret(pages, _) => pages.frames().count(),
        }
    }

    /// The pages are where they should be and hold what was stored.
    fn check(&self, mock: &Mock) {
        match self {
            Self::Mapped(pages, tag) => {
                let last = pages.pin().va().wrapping_add(pages.frames().count() * PAGE_SIZE - 8);
                assert_eq!(mock.load(last), *tag);
                assert!(mock.in_direct_map(pages.frames()));
            }
            Self::Secret(pages, tag) => {
                let last = pages.frames().count() - 1;
                let window = pages.open(last, 1, Access::Read).unwrap();
                assert_eq!(window.load(PAGE_SIZE - 8), Ok(*tag));
                assert!(!mock.in_direct_map(pages.frames()));
            }
        }
    }
}

fn turned<'r, 'a>(mock: &Mock, held: Held<'r, 'a>) -> Held<'r, 'a> {
    match held {
        Held::Mapped(pages, tag) => match pages.into_secret() {
            Ok(pages) => Held::Secret(pages, tag),
            Err((pages, _)) => Held::Mapped(pages, tag),
        },
        Held::Secret(pages, tag) => match pages.into_mapped() {
            Ok(pages) => {
                let last = pages.pin().va().wrapping_add(pages.frames().count() * PAGE_SIZE - 8);
                assert_eq!(mock.load(last), 0, "scrubbed");
                Held::Mapped(pages, 0)
            }
            Err((pages, _)) => Held::Secret(pages, tag),
        },
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn conversions_mix_with_everything_else(
        steps in prop::collection::vec(step(), 1..100), prezero: bool,
    ) {
        let mock = Mock::new(16, 2);
        mock.stop_recording();
        let allocator = mock.allocator_with(prezero);
        let mut held: Vec<Held<'_, '_>> = Vec::new();
        for (number, step) in (1..).zip(steps) {
            match step {
                Step::Alloc { order, secret, noblock } => {
                    let migratetype = Migratetype::ALL[number as usize % 3];
                    let request = Request { order, migratetype, zero: false, noblock };
                    if secret {
                        let Ok(pages) = allocator.alloc_secret(request) else { continue };
                        let count = pages.frames().count();
                        let window = pages.open(count - 1, 1, Access::Write).unwrap();
                        window.store(PAGE_SIZE - 8, number).unwrap();
                        window.close().unwrap();
                        held.push(Held::Secret(pages, number));
                    } else {
                        let Ok(pages) = allocator.alloc_mapped(request) else { continue };
                        let bytes = pages.frames().count() * PAGE_SIZE;
                        mock.store(pages.pin().va().wrapping_add(bytes - 8), number);
                        held.push(Held::Mapped(pages, number));
                    }
                }
                Step::Convert(which) if !held.is_empty() => {
                    let which = which % held.len();
                    let turned = turned(&mock, held.swap_remove(which));
                    held.push(turned);
                }
                Step::Free { number, interrupts_off } if !held.is_empty() => {
                    let held = held.swap_remove(number % held.len());
                    let off = interrupts_off.then(|| InterruptsOff::new(&mock));
                    drop(held);
                    drop(off);
                }
                Step::Convert(_) | Step::Free { .. } => {}
                Step::Shrink => allocator.shrink().unwrap(),
            }
            let counters = allocator.counters();
            let owned: u64 = held.iter().map(Held::pages).sum();
            // What is not owned is parked.
            prop_assert!(counters.nr_allocated >= owned);
            prop_assert!(!matches!(step, Step::Shrink) || counters.nr_allocated == owned);
            prop_assert_eq!(counters.splits - counters.merges, counters.nr_table_pages);
            prop_assert_eq!(counters.nr_table_pages, mock.state().live_tables() as u64);
            allocator.zone().check(&mock.map());
        }
        held.iter().for_each(|held| held.check(&mock));
        drop(held);
        allocator.shrink().unwrap();
        let counters = allocator.counters();
        prop_assert_eq!((counters.nr_allocated, counters.nr_table_pages), (0, 0));
        prop_assert_eq!(counters.converted, counters.restored);
        prop_assert!(mock.in_direct_map(mock.layout.zone_frames()));
    }
}

const ROUNDS: u64 = 20;

/// Pages that hold a tag in their last word, made secret.
fn tagged_secret<'r, 'a>(
    mock: &Mock,
    allocator: &'r PageAllocator<'a, Mock>,
    order: u8,
    tag: u64,
) -> Option<Held<'r, 'a>> {
    let pages = allocator.alloc_mapped(pages(order)).ok()?;
    let bytes = pages.frames().count() * PAGE_SIZE;
    mock.store(pages.pin().va().wrapping_add(bytes - 8), tag);
    Some(Held::Secret(secret(pages), tag))
}

#[test]
fn cpus_convert_pages_of_one_pageblock_at_once() {
    let mock = Mock::new(16, 4);
    mock.stop_recording();
    let allocator = mock.allocator();
    // Most of the memory is taken, so that all CPUs meet in one pageblock.
    let fill = [10, 10, 10, 9].map(|order| allocator.alloc_mapped(pages(order)).unwrap());
    let kept = allocator.alloc_mapped(pages(0)).unwrap();
    mock.state().watch(kept.frames());
    let all = Barrier::new(4);
    mock.on_all_cpus(|| {
        let mut random = Random(mock.cpu() as u64);
        for round in 1..=ROUNDS {
            let mut held = std::vec![tagged_secret(&mock, &allocator, 0, round).unwrap()];
            all.wait();
            // Each CPU has converted pages, and there is one pageblock that they can be of.
            assert_eq!(allocator.counters().nr_table_pages, 1);
            all.wait();
            for op in 0..20 {
                if held.len() > 5 || (!held.is_empty() && random.below(3) == 0) {
                    let which = random.below(held.len() as u64) as usize;
                    held.swap_remove(which).check(&mock);
                } else {
                    let order = random.below(4) as u8;
                    held.extend(tagged_secret(&mock, &allocator, order, ROUNDS + op));
                }
            }
        }
    });
    let counters = allocator.counters();
    assert!(counters.converted >= 4 * ROUNDS, "{counters:?}");
    assert_eq!((counters.splits, counters.nr_table_pages), (counters.merges, 0));
    assert_eq!(counters.converted, counters.restored);
    drop((fill, kept));
    assert_eq!(allocator.counters().nr_allocated, 0);
    allocator.zone().check(&mock.map());
    assert!(mock.in_direct_map(mock.layout.zone_frames()));
}
