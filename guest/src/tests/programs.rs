//! The programs: clean runs, and each kind of wrong page, handle and recording noticed.

use crate::alloc::AllocConfig;
use crate::alloc::AllocError;
use crate::alloc::PageAllocator;
use crate::platform::Platform;
use crate::programs::{self, ProgramError, Services, Team};
use crate::testing::{Mock, Random, Seen};
use core::fmt;
use lacuna_abi::addr::PAGE_SIZE;
use lacuna_abi::event::Life;
use lacuna_abi::layout::SCRATCH;
use lacuna_abi::workload::{Program, ReplayAction, ReplayOp, SECRET_PAGE_BYTES, SLOT_BYTES};
use std::cell::RefCell;
use std::format;
use std::vec::Vec;

const SLOTS: u64 = 64;

fn alloc(slot: u32, order: u8, secret: bool, zero: bool) -> ReplayOp {
    let action = ReplayAction::Alloc {
        order,
        migratetype: 0,
        zero,
        noblock: false,
        secret,
        in_place: false,
    };
    ReplayOp { cpu: 0, slot, turn: 0, action }
}

/// The second operation on the slot.
fn free(slot: u32) -> ReplayOp {
    ReplayOp { cpu: 0, slot, turn: 1, action: ReplayAction::Free }
}

/// Replays `ops` operations of the input on CPU 0.
pub(crate) fn replay(
    allocator: &PageAllocator<'_, Mock>,
    mock: &Mock,
    services: &impl Services,
    ops: usize,
) -> Result<(), ProgramError> {
    let args = [ops as u64, SLOTS, 0];
    programs::run(Program::Replay, args, allocator, mock, services, &Team::new())
}

fn store(
    allocator: &PageAllocator<'_, Mock>,
    mock: &Mock,
    services: &impl Services,
    bytes: u64,
) -> Result<(), ProgramError> {
    let args = [bytes, 0, 0];
    programs::run(Program::Secrets, args, allocator, mock, services, &Team::new())
}

pub(crate) fn set_input(mock: &Mock, ops: &[ReplayOp]) {
    mock.state().input = ops.iter().flat_map(ReplayOp::to_words).collect();
}

fn replay_ops(mock: &Mock, prezero: bool, ops: &[ReplayOp]) -> Result<(), ProgramError> {
    set_input(mock, ops);
    replay(&mock.allocator_with(prezero), mock, mock, ops.len())
}

/// A recording as a host hands it over: slots are free before an allocation, filled before a free,
/// and each operation has its turn. It is for `cpus` CPUs.
fn recording(count: usize, cpus: u64) -> Vec<ReplayOp> {
    let mut random = Random(7);
    let mut turns = [0; SLOTS as usize];
    (0..count)
        .map(|_| {
            let slot = random.below(SLOTS) as usize;
            let turn = turns[slot];
            turns[slot] += 1;
            let cpu = random.below(cpus) as u8;
            if turn % 2 == 1 {
                return ReplayOp { cpu, turn, ..free(slot as u32) };
            }
            let order = [0, 0, 0, 1, 3, 9, 10][random.below(7) as usize];
            let migratetype = random.below(3) as u8;
            let (zero, noblock) = (random.below(2) == 0, random.below(4) == 0);
            let secret = random.below(2) == 0;
            let in_place = secret && !noblock && order < 9 && random.below(2) == 0;
            let action =
                ReplayAction::Alloc { order, migratetype, zero, noblock, secret, in_place };
            ReplayOp { cpu, slot: slot as u32, turn, action }
        })
        .collect()
}

#[test]
fn a_recording_is_replayed_and_leaves_nothing_behind() {
    for prezero in [true, false] {
        let mock = Mock::new(32, 1);
        mock.stop_recording();
        let ops = recording(3000, 1);
        set_input(&mock, &ops);
        let allocator = mock.allocator_with(prezero);
        replay(&allocator, &mock, &mock, ops.len()).unwrap();
        let counters = allocator.counters();
        assert_eq!((counters.work, counters.nr_allocated, counters.nr_free_unmapped), (3000, 0, 0));
        assert_eq!(counters.alloc, counters.free);
        assert!(counters.tags_checked > counters.alloc && counters.alloc_secret > 100);
        assert!(counters.alloc_fail + counters.alloc_fail_no_block > 0, "memory was short");
        assert!(counters.converted > 50 && counters.splits > 10);
        assert_eq!((counters.splits, counters.converted), (counters.merges, counters.restored));
        assert_eq!((counters.nr_table_pages, mock.state().live_tables()), (0, 0));
        assert_eq!(mock.state().progress, 3000);
        assert!(slots_are_empty(&mock));
        assert!(mock.in_direct_map(mock.layout.zone_frames()));
    }
}

#[test]
fn a_long_recording_is_counted_on_its_way() {
    let mock = Mock::new(16, 2);
    // Each CPU has a slot of its own, so that nobody waits for anybody but at the meetings.
    let ops: Vec<_> = (0..10_000_u32)
        .map(|number| {
            let (cpu, turn) = ((number % 2) as u8, number / 2);
            let op = if turn % 2 == 0 { alloc(0, 0, false, false) } else { free(0) };
            ReplayOp { cpu, slot: cpu.into(), turn, ..op }
        })
        .collect();
    set_input(&mock, &ops);
    let allocator = mock.allocator();
    let team = Team::new();
    mock.on_all_cpus(|| {
        let args = [ops.len() as u64, SLOTS, 0];
        programs::run(Program::Replay, args, &allocator, &mock, &mock, &team).unwrap();
    });
    let checkpoints = mock.seen().iter().filter(|seen| **seen == Seen::Checkpoint).count();
    assert_eq!(checkpoints, 3, "after 4096, 8192 and at the end");
}

/// Whether no slot holds a handle; the turns beside them stay.
fn slots_are_empty(mock: &Mock) -> bool {
    (0..SLOTS).all(|slot| mock.load(SCRATCH.wrapping_add(slot * SLOT_BYTES)) == 0)
}

#[test]
fn a_recording_is_replayed_by_several_cpus_that_free_for_each_other() {
    for cpus in [2, 4] {
        let mock = Mock::new(32, cpus);
        mock.stop_recording();
        let ops = recording(2000, cpus as u64);
        set_input(&mock, &ops);
        let allocator = mock.allocator();
        let team = Team::new();
        let args = [ops.len() as u64, SLOTS, 0];
        let ends = mock
            .on_all_cpus(|| programs::run(Program::Replay, args, &allocator, &mock, &mock, &team));
        assert!(ends.iter().all(Result::is_ok), "{ends:?}");
        let counters = allocator.counters();
        assert_eq!((counters.work, counters.nr_allocated, counters.nr_free_unmapped), (2000, 0, 0));
        assert_eq!(counters.alloc, counters.free);
        assert!(counters.tags_checked > counters.alloc && counters.alloc_secret > 100);
        assert!(slots_are_empty(&mock));
        assert!(mock.in_direct_map(mock.layout.zone_frames()));
    }
}

#[test]
fn when_one_cpu_gives_up_none_waits_for_it() {
    let mock = Mock::new(16, 2);
    mock.stop_recording();
    // CPU 1 waits for the turn that CPU 0, whose operation is impossible, never passes on.
    let first = ReplayOp { cpu: 0, ..alloc(1, 11, true, false) };
    let second = ReplayOp { cpu: 1, ..free(1) };
    set_input(&mock, &[first, second]);
    let (allocator, team) = (mock.allocator(), Team::new());
    let ends = mock.on_all_cpus(|| {
        programs::run(Program::Replay, [2, SLOTS, 0], &allocator, &mock, &mock, &team)
    });
    assert_eq!(ends, [Err(ProgramError::BadOperation { op: 0 }), Err(ProgramError::Abandoned)]);
}

#[test]
fn what_cpu_0_does_alone_the_others_wait_for() {
    let mock = Mock::new(16, 3);
    secret_input(&mock, 9000);
    let (allocator, team) = (mock.allocator(), Team::new());
    let ends = mock.on_all_cpus(|| {
        let ended = programs::run(Program::Secrets, [9000, 0, 0], &allocator, &mock, &mock, &team);
        (ended, allocator.counters().work)
    });
    assert_eq!(ends, [(Ok(()), 3); 3]);
}

#[test]
fn what_belongs_to_the_image_is_refused() {
    for program in [Program::Touch, Program::Crash] {
        let mock = Mock::new(16, 1);
        let allocator = mock.allocator();
        let ended = programs::run(program, [0; 3], &allocator, &mock, &mock, &Team::new());
        assert_eq!(ended, Err(ProgramError::ImageOnly(program)));
    }
}

#[test]
fn a_failed_allocation_is_skipped_and_so_is_its_free() {
    let mock = Mock::new(16, 1);
    let mut ops: Vec<_> = (0..5).map(|slot| alloc(slot, 10, false, false)).collect();
    ops.extend((0..5).map(free));
    assert_eq!(replay_ops(&mock, true, &ops), Ok(()));
}

#[test]
fn impossible_operations_are_refused() {
    let bad = |action| ReplayOp { cpu: 0, slot: 0, turn: 0, action };
    let with = |order, migratetype| {
        bad(ReplayAction::Alloc {
            order,
            migratetype,
            zero: false,
            noblock: false,
            secret: true,
            in_place: false,
        })
    };
    let foreign = ReplayOp { cpu: 1, ..alloc(2, 0, false, false) };
    let lost = ReplayOp { turn: 7, ..alloc(2, 0, false, false) };
    let others = [alloc(64, 0, false, false), free(u32::MAX), foreign, lost];
    let in_place = |order, noblock, secret| {
        let zero = false;
        bad(ReplayAction::Alloc { order, migratetype: 0, zero, noblock, secret, in_place: true })
    };
    for op in [in_place(9, false, true), in_place(0, true, true), in_place(0, false, false)] {
        let mock = Mock::new(16, 1);
        let error = replay_ops(&mock, true, &[op]).err();
        assert_eq!(error, Some(ProgramError::BadOperation { op: 0 }), "{op:?}");
    }
    for op in [with(11, 0), with(0, 3)].into_iter().chain(others) {
        let mock = Mock::new(16, 1);
        let ops = [alloc(1, 0, true, false), op];
        let error = replay_ops(&mock, true, &ops).err();
        assert_eq!(error, Some(ProgramError::BadOperation { op: 1 }), "{op:?}");
    }
    let mock = Mock::new(16, 1);
    let again = ReplayOp { turn: 1, ..alloc(1, 0, true, false) };
    let twice = [alloc(1, 0, true, false), again];
    assert_eq!(replay_ops(&mock, true, &twice), Err(ProgramError::BadOperation { op: 1 }));
}

/// Calls back when the program reports progress.
struct Meddler<'a, F>(&'a Mock, RefCell<Option<F>>);

impl<F: FnOnce(&Mock)> Services for Meddler<'_, F> {
    fn log(&self, _: fmt::Arguments<'_>) {}

    fn progress(&self, _: u64) {
        if let Some(meddle) = self.1.take() {
            meddle(self.0);
        }
    }

    fn clock(&self) -> u64 {
        self.0.clock()
    }

    fn input_done(&self) {
        self.0.input_done();
    }

    fn checkpoint(&self) {
        self.0.checkpoint();
    }
}

/// Replays one allocation, meddles with the machine, and lets the program find it at the end.
fn meddled(op: ReplayOp, meddle: impl FnOnce(&Mock)) -> Option<ProgramError> {
    let mock = Mock::new(16, 1);
    set_input(&mock, &[op]);
    let meddler = Meddler(&mock, RefCell::new(Some(meddle)));
    replay(&mock.allocator(), &mock, &meddler, 1).err()
}

/// Overwrites the first word of the last allocation's last page behind the program's back.
fn spoil(mock: &Mock) {
    let last = mock.state().frames.iter().rposition(|frame| {
        !frame.contents.is_zero() && matches!(frame.contents, crate::testing::Contents::Words(_))
    });
    mock.state().frames[last.unwrap()].contents = crate::testing::Contents::DIRTY;
}

#[test]
fn a_spoiled_page_is_noticed_mapped_and_secret() {
    for secret in [false, true] {
        let error = meddled(alloc(3, 2, secret, false), spoil);
        assert!(matches!(error, Some(ProgramError::Tag { .. })), "{error:?}");
        let message = format!("{}", error.unwrap());
        assert!(message.contains("0xa5a5a5a5a5a5a5a5"), "{message}");
    }
}

#[test]
fn a_lost_handle_is_noticed() {
    let error = meddled(alloc(3, 0, true, false), |mock| {
        mock.store(SCRATCH.wrapping_add(3 * SLOT_BYTES), 0x77);
    });
    assert!(matches!(error, Some(ProgramError::Handle(_))), "{error:?}");
}

#[test]
fn a_page_that_should_be_zero_and_is_not_is_noticed() {
    for prezero in [true, false] {
        let mock = Mock::new(16, 1);
        let allocator = mock.allocator_with(prezero);
        drop(allocator.alloc_secret(crate::testing::zero_pages(9)).unwrap());
        // The pool believes that its pages are zero.
        let start = mock.layout.zone_frames().start();
        mock.map().set_known(lacuna_abi::addr::FrameRange::new(start, 512).unwrap(), true);
        for frame in &mut mock.state().frames {
            frame.contents = crate::testing::Contents::DIRTY;
        }
        set_input(&mock, &[alloc(0, 0, true, true)]);
        let error = replay(&allocator, &mock, &mock, 1).err();
        assert!(matches!(error, Some(ProgramError::NotZero { .. })), "{error:?}");
        assert!(!mock.violations().is_empty(), "the machine's host saw it too");
    }
}

#[test]
fn a_refusal_of_the_host_ends_the_replay() {
    let mock = Mock::new(16, 1);
    mock.refuse(0);
    let error = replay_ops(&mock, true, &[alloc(0, 0, true, false)]).err();
    assert!(
        matches!(error, Some(ProgramError::Alloc { number: 0, error: AllocError::Gate(_) })),
        "{error:?}"
    );
}

fn secret_input(mock: &Mock, bytes: usize) {
    let mut random = Random(99);
    let mut input: Vec<u8> = (0..bytes).map(|_| random.below(256) as u8).collect();
    input.resize(bytes.next_multiple_of(8), 0);
    let words = input.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap()));
    mock.state().input = words.collect();
}

#[test]
fn input_is_stored_compared_read_back_and_scrubbed() {
    for bytes in [1, 4096, 10_001, 700_000] {
        let mock = Mock::new(16, 1);
        secret_input(&mock, bytes);
        let allocator = mock.allocator();
        store(&allocator, &mock, &mock, bytes as u64).unwrap();
        let seen = mock.seen();
        let marks: Vec<_> =
            seen.iter().filter(|s| matches!(s, Seen::InputDone | Seen::Checkpoint)).collect();
        let (done, point) = (&Seen::InputDone, &Seen::Checkpoint);
        assert_eq!(marks, [done, point, point, point]);
        let freed = |s: &&Seen| matches!(s, Seen::Life(Life::Freed, _));
        assert_eq!(seen.iter().filter(freed).count(), bytes.div_ceil(4096));
        let counters = allocator.counters();
        let pages = bytes.div_ceil(4096) as u64;
        assert_eq!((counters.work, counters.converted), (pages, pages / 2), "both ways are used");
        assert_eq!((counters.nr_allocated, counters.nr_free_unmapped), (0, 0));
    }
}

#[test]
fn no_word_of_the_input_is_left_outside_secret_pages() {
    let mock = Mock::new(16, 1);
    secret_input(&mock, 5000);
    let words = mock.state().input.clone();
    let look = |mock: &Mock| {
        for word in mock.state().scratch.values() {
            assert!(!words.contains(word), "{word:#x}");
        }
    };
    let meddler = Meddler(&mock, RefCell::new(Some(look)));
    store(&mock.allocator(), &mock, &meddler, 5000).unwrap();
    let state = mock.state();
    assert!(state.frames.iter().filter(|f| !f.direct).all(|f| f.contents.is_zero()));
}

#[test]
fn stored_input_that_changes_is_noticed_by_compare_and_by_hash() {
    let mock = Mock::new(16, 1);
    secret_input(&mock, 5000);
    let meddler = Meddler(&mock, RefCell::new(Some(spoil)));
    let error = store(&mock.allocator(), &mock, &meddler, 5000).err();
    assert!(matches!(error, Some(ProgramError::Differs { .. })), "{error:?}");

    // A wrong hash stands for a page that changed after the input was wiped.
    let mock = Mock::new(16, 1);
    secret_input(&mock, 5000);
    let hash = SCRATCH.wrapping_add(SECRET_PAGE_BYTES + 8);
    let flip = |mock: &Mock| mock.store(hash, mock.load(hash) ^ 1);
    let meddler = Meddler(&mock, RefCell::new(Some(flip)));
    let error = store(&mock.allocator(), &mock, &meddler, 5000).err();
    assert!(matches!(error, Some(ProgramError::Differs { page: 1, .. })), "{error:?}");
}

#[test]
fn input_that_does_not_fit_is_said() {
    let mock = Mock::new(16, 1);
    mock.stop_recording();
    let allocator = mock.allocator();
    let order = |order| allocator.alloc_mapped(crate::testing::pages(order)).unwrap();
    let _others = [order(10), order(10), order(10), order(9)];
    let pages = 512 + 1;
    let error = store(&allocator, &mock, &mock, pages * PAGE_SIZE).err();
    let memory = ProgramError::Alloc { number: pages - 1, error: AllocError::NoMemory };
    assert_eq!(error, Some(memory));
}

#[test]
fn a_window_that_is_still_mapped_at_the_end_is_a_leak() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let last = mock.layout.zone_frames().count() - 1;
    let frame = mock.layout.zone_frames().start().wrapping_add(last);
    let range = lacuna_abi::addr::FrameRange::single(frame);
    let leak = allocator.mermap().get(range, crate::mermap::Protection::READ).unwrap();
    let error = replay(&allocator, &mock, &mock, 0).err();
    assert!(matches!(error, Some(ProgramError::Leaks(_))), "{error:?}");
    drop(leak);
}

#[test]
fn random_requests_on_two_cpus_find_every_page_as_it_should_be() {
    let mut atomic = [0; 2];
    for prezero in [true, false] {
        let mock = Mock::new(64, 2);
        mock.stop_recording();
        let config = AllocConfig { prezero, pool_low: 512, pool_high: 2048, ..AllocConfig::PLAIN };
        let allocator = mock.allocator_as(config);
        let team = Team::new();
        std::thread::scope(|scope| {
            for cpu in 0..2 {
                let (mock, allocator, team) = (&mock, &allocator, &team);
                scope.spawn(move || {
                    mock.on_cpu(cpu);
                    let _leave = super::selftests::Leave(team);
                    let args = [20_000, 10, 7];
                    programs::run(Program::Stress, args, allocator, mock, mock, team).unwrap();
                });
            }
        });
        let counters = allocator.counters();
        assert_eq!((counters.nr_allocated, counters.nr_withheld), (0, 0));
        assert!(counters.tags_checked > 5000 && counters.flip_to_mapped > 0, "{counters:?}");
        assert!(counters.converted > 0, "{counters:?}");
        atomic[0] += counters.parked;
        atomic[1] += counters.scrubs_atomic;
    }
    // How the threads meet is up to the host, so that a single run may lack one of them.
    assert!(atomic.iter().all(|count| *count > 0), "{atomic:?}");
}
