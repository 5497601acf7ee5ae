//! Every planted slip really happens in a normal replay, and is of the kind that its rule names.

use crate::programs::{self, ProgramError, Team};
use crate::testing::{Mock, Random};
use lacuna_abi::fault::Fault;
use lacuna_abi::workload::{Program, ReplayAction, ReplayOp};
use std::string::String;
use std::vec::Vec;

const SLOTS: u64 = 16;

/// Replays with this fault planted; says what the program and what the machine's host found.
fn replay(fault: Option<Fault>) -> (Option<ProgramError>, Vec<String>) {
    let cpus = fault.map_or(1, |fault| fault.vcpus().into());
    let mock = Mock::new(16, cpus);
    mock.stop_recording();
    if let Some(fault) = fault {
        mock.plant(fault);
    }
    let mut random = Random(3);
    let mut turns = [0; SLOTS as usize];
    let ops: Vec<_> = (0..2000)
        .map(|number| {
            let slot = random.below(SLOTS) as usize;
            let turn = turns[slot];
            turns[slot] += 1;
            let action = if turn % 2 == 0 {
                let order = [0, 1, 2, 9][random.below(4) as usize];
                let (zero, secret) = (random.below(2) == 0, random.below(2) == 0);
                // Not from the start: the flushes that conversions need anyway would make up for
                // those that a slip leaves out.
                let in_place = number > 1000 && secret && order < 9 && random.below(3) == 0;
                ReplayAction::Alloc {
                    order,
                    migratetype: 0,
                    zero,
                    noblock: false,
                    secret,
                    in_place,
                }
            } else {
                ReplayAction::Free
            };
            ReplayOp { cpu: random.below(cpus as u64) as u8, slot: slot as u32, turn, action }
        })
        .collect();
    mock.state().input = ops.iter().flat_map(ReplayOp::to_words).collect();
    let args = [ops.len() as u64, SLOTS, 0];
    let team = Team::new();
    let allocator = mock.allocator();
    let run = || programs::run(Program::Replay, args, &allocator, &mock, &mock, &team).err();
    let errors = mock.on_all_cpus(run);
    (errors.into_iter().flatten().next(), mock.violations())
}

#[test]
fn without_a_fault_the_replay_is_clean() {
    let (error, violations) = replay(None);
    assert_eq!((error, violations), (None, Vec::new()));
}

fn is_found(fault: Fault) -> Option<ProgramError> {
    let (error, violations) = replay(Some(fault));
    let found = violations.iter().any(|violation| violation.starts_with(fault.rule()));
    assert!(found, "{} is not found: {violations:?}", fault.name());
    error
}

#[test]
fn flushes_that_are_missing_too_weak_or_too_early_leave_the_direct_map_stale() {
    for fault in [Fault::SkipFlipFlush, Fault::Cr3FlipFlush, Fault::FlushBeforeUnmap] {
        assert_eq!(is_found(fault), None);
    }
}

#[test]
fn a_block_that_is_opened_before_its_flush_is_still_cached() {
    assert_eq!(is_found(Fault::OpenEarly), None);
}

#[test]
fn a_flush_on_one_cpu_leaves_the_direct_map_stale_on_the_other() {
    assert_eq!(is_found(Fault::LocalOnlyFlipFlush), None);
}

#[test]
fn a_mapping_in_another_cpus_window_is_foreign() {
    assert_eq!(is_found(Fault::WrongCpuWindow), None);
}

#[test]
fn an_entry_that_is_not_cleared_is_an_alias() {
    assert_eq!(is_found(Fault::LeaveDirectMapAlias), None);
}

#[test]
fn an_entry_that_stays_when_pages_are_converted_is_an_alias() {
    assert_eq!(is_found(Fault::PartialBlockUnmap), None);
}

#[test]
fn a_split_without_a_flush_leaves_the_direct_map_stale() {
    assert_eq!(is_found(Fault::SplitWithoutFlush), None);
}

#[test]
fn a_table_that_is_freed_without_a_flush_is_stale() {
    assert_eq!(is_found(Fault::TableFreeStale), None);
}

#[test]
fn a_global_window_is_one() {
    assert_eq!(is_found(Fault::GlobalWindow), None);
}

#[test]
fn a_window_that_wraps_without_a_flush_is_stale() {
    assert_eq!(is_found(Fault::SkipWindowFlush), None);
}

#[test]
fn a_release_without_a_window_flush_is_stale() {
    assert_eq!(is_found(Fault::FreeBeforeWindowFlush), None);
}

#[test]
fn a_block_that_is_not_sealed_is_open_in_the_pool() {
    // It cannot be released either: the host says that it is still open.
    assert!(matches!(
        is_found(Fault::SkipSeal),
        Some(ProgramError::Use(_) | ProgramError::Alloc { .. })
    ));
}

#[test]
fn pages_that_are_not_zeroed_are_residue() {
    assert!(matches!(is_found(Fault::SkipZero), Some(ProgramError::NotZero { .. })));
}

#[test]
fn pages_that_are_not_scrubbed_are_residue_when_they_are_released() {
    let (error, violations) = replay(Some(Fault::SkipScrubOnRemap));
    assert_eq!(error, None);
    assert!(!violations.is_empty());
    assert!(violations.iter().all(|v| v.starts_with("residue: released")), "{violations:?}");
}

#[test]
fn every_fault_that_can_be_planted_is_tried_here() {
    // What only the records lie about is the business of whoever sees for itself.
    let tried = Fault::ALL.iter().filter(|fault| fault.modes().contains(&"trace"));
    assert_eq!(tried.count(), 16);
}
