//! A recording is judged as its run was.

use super::*;
use crate::audit::Profile;
use crate::recording::judge_file;
use crate::recording::replay::{Recording, items};
use crate::report::Verdict;

/// The report of the recording is the run's, byte for byte.
fn same(recorded: &Recorded) {
    let again = judge_file(recorded.folder.path(), None).unwrap();
    assert_eq!(again.to_json().unwrap(), recorded.report.to_json().unwrap());
}

#[test]
fn a_clean_run_is_judged_the_same_under_every_seal() {
    for seal in [Seal::Guard, Seal::Memslot, Seal::Off] {
        let recorded = Recorded::new(&replay(), &[], seal);
        assert_eq!(recorded.report.verdict, Verdict::Pass, "{:#?}", recorded.report.inconclusive);
        same(&recorded);
    }
}

#[test]
fn faults_are_found_again_with_their_stories() {
    for (fault, seal) in [
        ("skip-flip-flush", Seal::Guard),
        ("leave-direct-map-alias", Seal::Guard),
        ("skip-window-flush", Seal::Off),
        ("skip-zero", Seal::Guard),
        ("skip-seal", Seal::Memslot),
        ("open-early", Seal::Guard),
    ] {
        let recorded = Recorded::new(&replay(), &[fault], seal);
        assert_eq!(recorded.report.verdict, Verdict::Violation, "{fault}");
        assert!(recorded.report.violations.iter().all(|found| !found.story.is_empty()), "{fault}");
        same(&recorded);
    }
}

/// So many random requests on two CPUs.
fn stress(operations: u64) -> String {
    format!(
        "[guest]\nmemory_mib = 32\nvcpus = 2\nfill = 0xa5\n[workload]\nprogram = \"stress\"\n\
         operations = {operations}\n[audit]\nquiesce_every = 5000\n"
    )
}

#[test]
fn random_requests_on_two_cpus_are_judged_the_same() {
    same(&Recorded::new(&stress(3000), &[], Seal::Guard));
}

#[test]
fn what_the_guest_observed_is_judged_the_same() {
    let text = "[guest]\nmemory_mib = 32\n[workload]\nprogram = \"probe\"\nrounds = 2\n";
    let recorded = Recorded::new(text, &[], Seal::Guard);
    assert!(!recorded.report.observed.is_empty());
    same(&recorded);
}

#[test]
fn another_profile_is_said_and_a_run_without_pcids_is_judged_the_same_for_it() {
    let recorded = Recorded::new(&replay(), &["skip-flip-flush"], Seal::Guard);
    let again = judge_file(recorded.folder.path(), Some(Profile::IntelInvlpgErratum)).unwrap();
    assert_eq!(again.machine.profile, "intel-invlpg-erratum");
    assert!(again.warnings.iter().any(|warning| warning.contains("the run was judged as intel")));
    assert_eq!(again.checks, recorded.report.checks);
    assert_eq!(again.inconclusive, Vec::<String>::new());
}

#[test]
fn no_contents_of_frames_are_in_a_recording() {
    let folder = tempfile::tempdir().unwrap();
    let secret: Vec<u8> =
        (0..6000_u32).flat_map(|n| n.wrapping_mul(0x9e37_79b9).to_le_bytes()).collect();
    let path = folder.path().join("secret");
    std::fs::write(&path, &secret).unwrap();
    let text = format!(
        "[guest]\nmemory_mib = 32\nfill = 0x5a\n[workload]\nprogram = \"secrets\"\ninput = {path:?}\n"
    );
    let recorded = Recorded::new(&text, &[], Seal::Guard);
    same(&recorded);
    let bytes = recorded.bytes();
    let mut recording = Recording::open(&bytes[..]).unwrap();
    let unpacked: Vec<u8> =
        items(&mut recording).unwrap().iter().flat_map(|item| item.guest_bytes()).collect();
    assert!(unpacked.len() > 10_000);
    let scanner = crate::leak::LeakScanner::new(&secret);
    for held in [&bytes, &unpacked] {
        assert_eq!(scanner.find(held), None);
        assert!(!held.windows(8).any(|run| run == [0x5a; 8]), "the fill pattern is in it");
    }
    // The scanner would have found it.
    assert!(scanner.find(&[&bytes[..], &secret[..64]].concat()).is_some());
}

#[test]
fn a_recording_that_was_cut_is_inconclusive_and_both_reports_say_so() {
    let recorded = Recorded::limited(&stress(6000), &[], Seal::Guard, 290 << 10);
    assert_eq!(recorded.report.verdict, Verdict::Pass);
    assert!(recorded.report.warnings.iter().any(|warning| warning.contains("events_mib")));
    assert!(recorded.bytes().len() < 290 << 10);
    let again = judge_file(recorded.folder.path(), None).unwrap();
    assert_eq!(again.verdict, Verdict::Inconclusive);
    let says = |reason: &String| reason.contains("ends early") && reason.contains("events_mib");
    assert!(again.inconclusive.iter().any(says), "{:?}", again.inconclusive);
    assert!(again.checks.iter().any(|check| check.checked > 0));
}
