//! Recordings that are damaged, foreign, cut off or huge.

use super::*;
use crate::recording::chunks::{ChunkReader, HEAD, Kind, file_of};
use crate::recording::codec::{Context, Decoder, Encoder};
use crate::recording::{FORMAT, judge, judge_bytes, judge_file};
use crate::report::Verdict;
use proptest::prelude::*;
use std::fs;
use std::sync::OnceLock;

/// A real recording, made once.
fn real() -> &'static [u8] {
    static REAL: OnceLock<Vec<u8>> = OnceLock::new();
    REAL.get_or_init(|| Recorded::new(&replay(), &[], Seal::Guard).bytes())
}

/// Its chunks, unpacked.
fn parts() -> &'static [(Kind, Vec<u8>)] {
    static PARTS: OnceLock<Vec<(Kind, Vec<u8>)>> = OnceLock::new();
    PARTS.get_or_init(|| {
        let mut chunks = ChunkReader::open(real()).unwrap();
        let mut parts = Vec::new();
        while let Some(kind) = chunks.next().unwrap() {
            parts.push((kind, chunks.bytes().to_vec()));
        }
        parts
    })
}

/// A file of these parts, with checksums that are right.
fn packed(parts: &[(Kind, Vec<u8>)]) -> Vec<u8> {
    let parts: Vec<_> = parts.iter().map(|(kind, bytes)| (*kind, &bytes[..])).collect();
    file_of(&parts).unwrap()
}

fn refused(bytes: &[u8]) -> String {
    judge(bytes, None).unwrap_err().to_string()
}

#[test]
fn foreign_files_are_told_from_other_versions() {
    assert!(refused(b"").contains("shorter than a head"));
    assert!(refused(&[7; 64]).contains("does not start with LACUNARC"));
    for (at, needle) in [(8, "format"), (16, "interface")] {
        let mut other = real().to_vec();
        other[at] = other[at].wrapping_add(1);
        let message = refused(&other);
        assert!(message.contains(needle) && message.contains("record the run again"), "{message}");
    }
    assert_eq!(FORMAT, 2, "docs/recordings.md describes this format");
}

#[test]
fn a_file_that_was_cut_off_anywhere_is_refused_and_the_place_is_named() {
    for len in (0..real().len()).step_by(real().len() / 40 + 1) {
        let message = refused(&real()[..len]);
        assert!(message.contains("at byte"), "{message}");
        assert!(len < 32 || message.contains("cut off"), "{len}: {message}");
    }
}

#[test]
fn what_a_killed_run_left_is_judged_up_to_its_end_and_inconclusive() {
    let parts = parts();
    let report = judge(&packed(&parts[..parts.len() - 1])[..], None).unwrap();
    assert_eq!(report.verdict, Verdict::Inconclusive);
    assert!(report.inconclusive.iter().any(|why| why.contains("the run was killed")));
    assert!(report.checks.iter().any(|check| check.checked > 0));
    // What was written last may be half there; the head does not count it.
    let mut file = packed(&parts[..parts.len() - 1]);
    file.extend([1; 100]);
    assert_eq!(judge(&file[..], None).unwrap(), report);
}

#[test]
fn parts_that_are_missing_or_stand_elsewhere_are_refused() {
    let parts = parts();
    assert!(refused(&packed(&parts[1..])).contains("does not start with how it was set up"));
    assert!(refused(&packed(&[])).contains("nothing was recorded"));
    let twice = [&parts[..1], parts].concat();
    assert!(refused(&packed(&twice)).contains("set up twice"));
    let behind = [parts, &parts[1..2]].concat();
    assert!(refused(&packed(&behind)).contains("something follows the end"));
    let only_setup = refused(&packed(&parts[..1]));
    assert!(only_setup.contains("boot root"), "{only_setup}");
}

#[test]
fn a_part_that_claims_or_unpacks_to_too_much_is_refused_before_it_takes_memory() {
    let zeroes = vec![0; 3 << 20];
    let mut bomb = file_of(&[(Kind::Setup, &zeroes)]).unwrap();
    let len = usize::try_from(HEAD).unwrap() + 12;
    bomb[len..len + 4].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(refused(&bomb).contains("more than any does"));
    let mut parts = parts().to_vec();
    let text = String::from_utf8(parts[0].1.clone()).unwrap();
    parts[0].1 = text
        .replacen("\"memory_mib\":32,\"vcpus\"", "\"memory_mib\":999999998,\"vcpus\"", 1)
        .into();
    assert!(refused(&packed(&parts)).contains("layout"));
}

#[test]
fn a_folder_without_a_recording_is_named_with_the_remedy() {
    let folder = tempfile::tempdir().unwrap();
    for message in [
        judge_file(folder.path(), None).unwrap_err().to_string(),
        judge_file(Path::new("/dev/null"), None).unwrap_err().to_string(),
    ] {
        assert!(
            message.contains("recording.bin") && message.contains("--record --out"),
            "{message}"
        );
    }
    fs::create_dir(folder.path().join("recording.bin")).unwrap();
    assert!(judge_file(folder.path(), None).unwrap_err().to_string().contains("no regular file"));
}

#[test]
fn inputs_that_the_fuzzer_kept_are_judged_or_refused() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/recording");
    if std::env::var_os("LACUNA_WRITE_CORPUS").is_some() {
        write_seeds(&corpus);
    }
    let mut count = 0;
    for file in fs::read_dir(&corpus).unwrap_or_else(|e| panic!("{}: {e}", corpus.display())) {
        let path = file.unwrap().path();
        println!("{}", path.display());
        let _ = judge_bytes(&fs::read(&path).unwrap());
        count += 1;
    }
    assert!(count >= 5, "the corpus has only {count} inputs");
    // Of another version nothing would be read behind its head.
    let clean = judge_bytes(&fs::read(corpus.join("clean")).unwrap());
    assert!(clean.is_ok(), "{:?}: LACUNA_WRITE_CORPUS=1 writes it anew", clean.err());
}

/// Writes what a fuzzer starts from into its corpus.
fn write_seeds(corpus: &Path) {
    fs::create_dir_all(corpus).unwrap();
    let text = "[guest]\nmemory_mib = 16\n[workload]\nprogram = \"stress\"\noperations = 40\n";
    for (name, inject, seal) in [
        ("clean", &[][..], Seal::Guard),
        ("memslot", &[], Seal::Memslot),
        ("off", &[], Seal::Off),
        ("skip-flip-flush", &["skip-flip-flush"], Seal::Guard),
        ("skip-seal", &["skip-seal"], Seal::Guard),
    ] {
        let bytes = Recorded::new(text, inject, seal).bytes();
        fs::write(corpus.join(name), &bytes).unwrap();
        let mut chunks = ChunkReader::open(&bytes[..]).unwrap();
        let mut tape = Vec::new();
        while let Some(kind) = chunks.next().unwrap() {
            if kind == Kind::Tape {
                tape.extend_from_slice(chunks.bytes());
            }
        }
        tape.truncate(16 << 10);
        fs::write(corpus.join(format!("{name}-tape")), tape).unwrap();
    }
}

#[test]
fn items_come_back_as_they_were_written() {
    let tape: Vec<u8> = parts()
        .iter()
        .filter(|part| part.0 == Kind::Tape)
        .flat_map(|part| part.1.clone())
        .collect();
    let file = packed(&[(Kind::Tape, tape.clone())]);
    let mut chunks = ChunkReader::open(&file[..]).unwrap();
    let (mut reading, mut writing) = (Context::new(u64::MAX), Context::new(u64::MAX));
    let mut again = Vec::new();
    while chunks.goes_on().unwrap().is_ok() {
        let item = Decoder { context: &mut reading, source: &mut chunks }.item().unwrap();
        Encoder { context: &mut writing, out: &mut again }.item(&item);
    }
    assert!(again == tape, "{} bytes became {}", tape.len(), again.len());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_changed_byte_is_noticed_or_changes_nothing(at in any::<prop::sample::Index>(), bit in 0..8_u8) {
        let mut bytes = real().to_vec();
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        let judged = judge(&bytes[..], None);
        // The count in the head may stop before the end.
        prop_assert!(judged.is_err() || judged.unwrap().verdict == Verdict::Inconclusive);
    }

    #[test]
    fn a_tape_that_was_changed_under_right_checksums_is_judged_or_refused(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut parts = parts().to_vec();
        for (at, byte) in changes {
            let part = &mut parts[1].1;
            let at = at.index(part.len());
            part[at] = byte;
        }
        if let Some(cut) = cut {
            let part = &mut parts[1].1;
            let at = cut.index(part.len());
            part.truncate(at);
        }
        let _ = judge(&packed(&parts)[..], None);
    }

    #[test]
    fn any_bytes_are_judged_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..4000)) {
        let _ = judge_bytes(&bytes);
    }
}
