//! The allocator against a plain model, and on two threads at once.

use crate::alloc::Request;
use crate::counters::Pages;
use crate::freetype::Migratetype;
use crate::mapped::MappedPages;
use crate::secret::{Access, SecretPages};
use crate::testing::{Mock, Random};
use lacuna_abi::addr::FrameRange;
use proptest::prelude::*;
use std::vec::Vec;

/// One step of a random history.
#[derive(Clone, Copy, Debug)]
enum Step {
    Alloc(Request, bool),
    /// Free the allocation with this number, counted around.
    Free(usize),
    Shrink,
}

fn step() -> impl Strategy<Value = Step> {
    let order = prop_oneof![8 => 0u8..4, 2 => 4u8..9, 2 => 9u8..=10];
    let alloc = (order, 0usize..3, any::<[bool; 2]>(), any::<bool>()).prop_map(
        |(order, migratetype, [zero, noblock], secret)| {
            let migratetype = Migratetype::ALL[migratetype];
            Step::Alloc(Request { order, migratetype, zero, noblock }, secret)
        },
    );
    prop_oneof![6 => alloc, 4 => any::<usize>().prop_map(Step::Free), 1 => Just(Step::Shrink)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_handed_out_is_what_a_model_says(
        steps in prop::collection::vec(step(), 1..120), prezero: bool,
    ) {
        let mock = Mock::new(16, 1);
        let allocator = mock.allocator_with(prezero);
        let zone = mock.layout.zone_frames();
        // The model: which runs are handed out, and their handles.
        let mut held: Vec<(FrameRange, u64, bool)> = Vec::new();
        for step in steps {
            match step {
                Step::Alloc(request, secret) => {
                    let got = if secret {
                        allocator.alloc_secret(request).map(|p| (p.frames(), p.into_raw(), true))
                    } else {
                        allocator.alloc_mapped(request).map(|p| (p.frames(), p.into_raw(), false))
                    };
                    let Ok((frames, ..)) = got else { continue };
                    prop_assert_eq!(frames.count(), 1 << request.order);
                    prop_assert!(frames.start().0.is_multiple_of(frames.count()));
                    prop_assert!(zone.contains_range(frames));
                    prop_assert_eq!(mock.in_direct_map(frames), !secret);
                    if request.zero {
                        let zero = |frame| mock.state().frame(frame).contents.is_zero();
                        prop_assert!(frames.iter().all(zero));
                    }
                    held.extend(got);
                }
                Step::Free(number) if !held.is_empty() => {
                    let (_, handle, secret) = held.swap_remove(number % held.len());
                    if secret {
                        drop(SecretPages::from_raw(&allocator, handle).unwrap());
                    } else {
                        drop(MappedPages::from_raw(&allocator, handle).unwrap());
                    }
                }
                Step::Free(_) => {}
                Step::Shrink => allocator.shrink().unwrap(),
            }
            // Movable pages may lie elsewhere by now.
            for (frames, handle, secret) in &mut held {
                if *secret {
                    let pages = SecretPages::from_raw(&allocator, *handle).unwrap();
                    (*frames, *handle) = (pages.frames(), pages.into_raw());
                } else {
                    let pages = MappedPages::from_raw(&allocator, *handle).unwrap();
                    (*frames, *handle) = (pages.frames(), pages.into_raw());
                }
            }
            for (index, (frames, ..)) in held.iter().enumerate() {
                let apart = |other: &(FrameRange, u64, bool)| other.0.intersection(*frames).is_none();
                prop_assert!(held[..index].iter().all(apart), "{frames} is handed out twice");
            }
            let (pages, _) = allocator.pages();
            prop_assert!(pages.iter().all(Pages::adds_up), "{pages:?}");
            let counters = allocator.counters();
            let allocated: u64 = held.iter().map(|(frames, ..)| frames.count()).sum();
            prop_assert_eq!(counters.nr_allocated, allocated);
            let free = counters.nr_free_mapped + counters.nr_free_unmapped;
            prop_assert_eq!(free + allocated + counters.nr_fresh, zone.count());
            allocator.zone().check(&mock.map());
        }
        let secret: u64 = held.iter().filter(|h| h.2).map(|h| h.0.count()).sum();
        let state = mock.state();
        let unmapped = zone.iter().filter(|frame| !state.frame(*frame).direct).count() as u64;
        drop(state);
        prop_assert_eq!(unmapped, secret + allocator.counters().nr_free_unmapped);
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
