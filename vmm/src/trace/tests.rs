use super::*;
use flate2::Compression;
use flate2::write::GzEncoder;
use lacuna_abi::workload::ReplayAction::{self, Alloc, Free};
use proptest::prelude::*;
use std::io::{Read, Write};

const REAL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/data/compile.csv.gz");

fn selection(secret: Secret) -> Selection {
    Selection { events: None, secret, in_place: 0, cpus: NonZeroU8::new(2).unwrap() }
}

fn user() -> Selection {
    selection(Secret::User)
}

fn parsed(lines: &str, selection: &Selection) -> Result<Replay, String> {
    let text = format!("{HEADER}\n{lines}");
    parse(text.as_bytes(), selection).map_err(|error| error.to_string())
}

fn refused(lines: &str) -> String {
    parsed(lines, &user()).unwrap_err()
}

fn gzipped(text: &str) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(text.as_bytes()).unwrap();
    encoder.finish().unwrap()
}

const THREE: &str =
    "0,0,A,7,0,1,GFP_HIGHUSER_MOVABLE|__GFP_ZERO\n5,3,A,8,10,2,GFP_NOWAIT\n9,1,F,7,0,,\n";

#[test]
fn events_become_operations() {
    let replay = parsed(THREE, &user()).unwrap();
    let alloc = |order, migratetype, zero, noblock, secret| Alloc {
        order,
        migratetype,
        zero,
        noblock,
        secret,
        in_place: false,
    };
    let expected: [(u8, u32, u32, ReplayAction); 3] = [
        (0, 0, 0, alloc(0, 1, true, false, true)),
        (1, 1, 0, alloc(10, 2, false, true, false)),
        (1, 0, 1, Free),
    ];
    let expected = expected.map(|(cpu, slot, turn, action)| ReplayOp { cpu, slot, turn, action });
    assert_eq!(replay.ops, expected);
    assert_eq!(replay.slots, 2);
    let stats = Stats {
        allocs: 2,
        frees: 1,
        secret: 1,
        in_place: 0,
        zero: 1,
        noblock: 1,
        peak_mapped_pages: 1024,
        peak_secret_pages: 1,
        span_us: 9,
        warnings: Vec::new(),
    };
    assert_eq!(replay.stats, stats);
}

#[test]
fn the_last_of_those_that_can_be_converted_in_place_are() {
    // What cannot: too large, not secret, a caller that must not block.
    let text = "0,0,A,1,0,0,GFP_HIGHUSER\n1,0,A,2,9,0,GFP_HIGHUSER\n2,0,A,3,8,0,GFP_HIGHUSER\n\
                3,0,A,4,0,0,GFP_KERNEL\n4,0,A,5,0,0,GFP_NOWAIT|__GFP_HIGHMEM\n\
                5,0,A,6,1,0,GFP_HIGHUSER\n6,0,F,6,1,,\n";
    let secret = || Secret::Names(vec!["GFP_HIGHUSER".into(), "GFP_NOWAIT".into()]);
    let chosen = |percent| -> Vec<usize> {
        let replay = parsed(text, &Selection { in_place: percent, ..selection(secret()) }).unwrap();
        let in_place = |op: &ReplayOp| matches!(op.action, Alloc { in_place: true, .. });
        let chosen: Vec<_> = (0..replay.ops.len()).filter(|i| in_place(&replay.ops[*i])).collect();
        assert_eq!(replay.stats.in_place, chosen.len() as u64);
        chosen
    };
    assert!(chosen(0).is_empty());
    assert_eq!(chosen(1), [5]);
    assert_eq!(chosen(33), [5]);
    assert_eq!(chosen(50), [2, 5]);
    assert_eq!(chosen(100), [0, 2, 5]);
}

#[test]
fn the_bundled_recording_is_read_whole() {
    let replay = load(Path::new(REAL), &user()).unwrap();
    assert_eq!(replay.ops.len(), 18_661 + 8_925);
    assert_eq!((replay.stats.allocs, replay.stats.frees), (18_661, 8_925));
    assert_eq!(replay.stats.zero, 6_859);
    assert_eq!(replay.stats.noblock, 173);
    assert!(replay.slots >= 9_736 && u64::from(replay.slots) < replay.stats.allocs);
    assert_eq!(replay.stats.warnings, Vec::<String>::new());
}

#[test]
fn the_same_recording_gives_the_same_operations_plain_and_gzipped() {
    let text = format!("{HEADER}\n{THREE}");
    let plain = parse(text.as_bytes(), &user()).unwrap();
    assert_eq!(parse(gzipped(&text).as_slice(), &user()).unwrap(), plain);
    // Gzip files may be joined.
    let (head, tail) = text.split_at(50);
    let joined = [gzipped(head), gzipped(tail)].concat();
    assert_eq!(parse(joined.as_slice(), &user()).unwrap(), plain);
}

#[test]
fn a_slot_is_used_again_only_when_it_is_free() {
    let lines: String = (0..50)
        .map(|n| format!("{n},0,A,{n},0,0,GFP_KERNEL\n"))
        .chain((0..50).step_by(2).map(|n| format!("99,0,F,{n},0,,\n")))
        .chain((50..80).map(|n| format!("99,0,A,{n},0,0,GFP_KERNEL\n")))
        .collect();
    let replay = parsed(&lines, &user()).unwrap();
    assert_eq!(replay.slots, 55);
    let mut filled = [false; 55];
    for op in &replay.ops {
        let slot = &mut filled[op.slot as usize];
        let alloc = op.action != Free;
        assert_ne!(*slot, alloc, "slot {}", op.slot);
        *slot = alloc;
    }
}

#[test]
fn an_id_may_be_taken_again_after_its_free() {
    let again = "0,0,A,7,0,0,GFP_KERNEL\n1,0,F,7,0,,\n2,0,A,7,0,0,GFP_KERNEL\n";
    assert_eq!(parsed(again, &user()).unwrap().slots, 1);
}

#[test]
fn each_selection_makes_secret_what_it_names() {
    let lines = "0,0,A,0,0,1,GFP_HIGHUSER_MOVABLE\n0,0,A,1,0,0,GFP_KERNEL|__GFP_ACCOUNT\n\
                 0,0,A,2,0,0,GFP_HIGHUSER|__GFP_ACCOUNT\n";
    let secret = |secret| {
        let replay = parsed(lines, &selection(secret)).unwrap();
        replay.ops.iter().map(|op| matches!(op.action, Alloc { secret: true, .. })).collect()
    };
    let names = |names: &[&str]| Secret::Names(names.iter().map(|n| (*n).to_owned()).collect());
    let cases: [(Secret, [bool; 3]); 5] = [
        (Secret::User, [true, false, true]),
        (Secret::All, [true; 3]),
        (Secret::None, [false; 3]),
        (names(&["__GFP_ACCOUNT"]), [false, true, true]),
        (names(&["GFP_HIGHUSER", "GFP_KERNEL"]), [false, true, true]),
    ];
    for (which, expected) in cases {
        let found: Vec<bool> = secret(which.clone());
        assert_eq!(found, expected, "{which:?}");
    }
}

#[test]
fn a_name_that_no_event_has_is_a_warning() {
    let names = Secret::Names(vec!["GFP_HIGHUSER_MOVABLE".into(), "GFP_USER".into()]);
    let warnings = parsed(THREE, &selection(names)).unwrap().stats.warnings;
    assert_eq!(warnings, ["[workload] secret: no event that was read has the flag GFP_USER"]);
}

#[test]
fn a_limit_takes_a_prefix_and_leaves_the_rest_unread() {
    let two = Selection { events: Some(2), ..user() };
    assert_eq!(parsed(&format!("{THREE}nonsense\n"), &two).unwrap().ops.len(), 2);
    let many = Selection { events: Some(4), ..user() };
    let warnings = parsed(THREE, &many).unwrap().stats.warnings;
    assert_eq!(warnings, ["[workload] events: 4 were asked for, the trace has 3"]);
}

#[test]
fn a_free_may_name_no_order_and_another_order_is_a_warning() {
    let alloc = "0,0,A,7,2,0,GFP_KERNEL\n";
    let free = |order| parsed(&format!("{alloc}1,0,F,7,{order},,\n"), &user()).unwrap().stats;
    assert_eq!(free("").warnings, Vec::<String>::new());
    assert_eq!(free("2").warnings, Vec::<String>::new());
    assert!(free("0").warnings[0].starts_with("1 frees in the trace name another order"));
}

#[test]
fn quotation_marks_line_ends_and_empty_lines_do_not_matter() {
    let odd = "\"0\",\"0\",\"A\",\"7\",\"0\",\"1\",\"GFP_KERNEL\"\r\n\r\n 1 , 0 , F , 7 , 0 , , ";
    assert_eq!(parsed(odd, &user()).unwrap().ops.len(), 2);
}

#[test]
fn each_mistake_is_named_with_its_line_and_a_remedy() {
    let first = "0,0,A,7,0,1,GFP_KERNEL\n";
    for (line, message) in [
        ("1,0,A,8,0,1", "line 3: the line has 6 columns; it must have 7: t_us,cpu"),
        ("1,0,A,8,0,1,GFP_KERNEL,9", "line 3: the line has 8 columns; it must have 7"),
        ("x,0,A,8,0,1,GFP_KERNEL", "line 3: t_us is \"x\"; it must be a number of micro"),
        ("-1,0,A,8,0,1,GFP_KERNEL", "line 3: t_us is \"-1\"; it must be"),
        ("1,256,A,8,0,1,GFP_KERNEL", "line 3: cpu is \"256\"; it must be a number from 0 to 255"),
        ("1,+1,A,8,0,1,GFP_KERNEL", "line 3: cpu is \"+1\"; it must be"),
        ("1,0,B,8,0,1,GFP_KERNEL", "line 3: op is \"B\"; it must be A (allocation) or F (free)"),
        ("1,0,A,,0,1,GFP_KERNEL", "line 3: id is \"\"; it must be a number"),
        ("1,0,A,8,11,1,GFP_KERNEL", "line 3: order is \"11\"; it must be a number from 0 to 10"),
        ("1,0,A,8,,1,GFP_KERNEL", "line 3: order is \"\"; it must be"),
        ("1,0,F,7,11,,", "line 3: order is \"11\"; it must be"),
        ("1,0,A,8,0,3,GFP_KERNEL", "line 3: migratetype is \"3\"; it must be 0 (unmovable), 1"),
        ("1,0,A,8,0,,GFP_KERNEL", "line 3: migratetype is \"\"; it must be"),
        ("1,0,A,8,0,1,", "line 3: gfp is \"\"; it must be the names"),
        ("1,0,A,8,0,1,|", "line 3: gfp is \"|\"; it must be the names"),
        ("1,0,F,7,0,1,", "line 3: migratetype is \"1\"; it must be empty in a free"),
        ("1,0,F,7,0,,GFP_KERNEL", "line 3: gfp is \"GFP_KERNEL\"; it must be empty in a free"),
        ("1,0,A,7,0,1,GFP_KERNEL", "line 3: allocation 7 is alive since line 2; free it first"),
        ("1,0,F,8,0,,", "line 3: no allocation 8 is alive here; leave out frees"),
        ("9,0,F,7,0,,\n8,0,A,7,0,1,GFP_KERNEL", "line 4: t_us is 8 after 9; sort the events"),
        ("\n\n1,0,F,8,0,,", "line 5: no allocation 8"),
    ] {
        let error = refused(&format!("{first}{line}\n"));
        assert!(error.starts_with(message), "{line}: {error}");
    }
    let messy = refused("1,0,\u{1b}[31m,8,0,1,GFP_KERNEL\n");
    assert!(!messy.contains('\u{1b}'), "{messy}");
}

#[test]
fn flag_names_never_seen_before_are_taken() {
    let line = "0,0,A,1,0,0,GFP_NEW|__GFP_NEW|0x8000000|something else\n";
    assert_eq!(parsed(line, &user()).unwrap().ops.len(), 1);
}

#[test]
fn a_field_that_is_no_text_is_named() {
    let bytes = [HEADER.as_bytes(), b"\n0,0,A,1,0,0,GFP_\xff\n"].concat();
    let error = parse(bytes.as_slice(), &user()).unwrap_err().to_string();
    assert_eq!(error, "line 2: gfp is not UTF-8 text; is the file a trace?");
}

#[test]
fn a_wrong_header_is_shown_beside_the_right_one() {
    let error = parse(&b"time,cpu,op\n"[..], &user()).unwrap_err().to_string();
    let right = format!("line 1: the header is \"time,cpu,op\"; it must be \"{HEADER}\"");
    assert_eq!(error, right);
    let binary = parse(&[0x7f, b'E', b'L', b'F', 0, 1, 2, b'\n'][..], &user());
    assert!(matches!(binary.unwrap_err().problem, Problem::Header(_)));
}

#[test]
fn a_trace_without_events_is_refused() {
    for text in ["", "\n\n", HEADER] {
        let error = parse(text.as_bytes(), &user()).unwrap_err();
        assert!(matches!(error.problem, Problem::NoEvents), "{text:?}: {error}");
    }
}

#[test]
fn damaged_compression_is_told_from_a_bad_trace() {
    let mut bytes = gzipped(&format!("{HEADER}\n{THREE}"));
    bytes.truncate(bytes.len() - 20);
    let error = parse(bytes.as_slice(), &user()).unwrap_err();
    assert!(matches!(error.problem, Problem::Damaged(_)), "{error}");
    assert!(error.to_string().contains("cut off or damaged"), "{error}");
}

#[test]
fn a_bomb_ends_at_a_bound() {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    std::io::copy(&mut std::io::repeat(b'x').take(8 << 20), &mut encoder).unwrap();
    let bytes = encoder.finish().unwrap();
    let error = parse(bytes.as_slice(), &user()).unwrap_err();
    assert!(matches!(error.problem, Problem::LineTooLong), "{error}");
    assert_eq!(error.line, Some(1));
}

#[test]
fn a_byte_order_mark_does_not_matter() {
    let text = format!("\u{feff}{HEADER}\n{THREE}");
    assert_eq!(parse(text.as_bytes(), &user()).unwrap().ops.len(), 3);
}

#[test]
fn a_file_that_cannot_be_opened_or_read_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("none.csv");
    let error = load(&missing, &user()).unwrap_err().to_string();
    assert!(error.starts_with(&format!("{}: cannot open the trace", missing.display())), "{error}");
    let error = load(folder.path(), &user()).unwrap_err().to_string();
    assert!(error.contains("cannot read the trace"), "{error}");
    let bad = folder.path().join("bad.csv");
    std::fs::write(&bad, format!("{HEADER}\n1\n")).unwrap();
    let error = load(&bad, &user()).unwrap_err().to_string();
    assert!(error.starts_with(&format!("{}:2: ", bad.display())), "{error}");
}

/// Lines that are often right.
const LIKELY: &str = "[0-3]{1,2},[01],[AF],[0-3],[0-9]?,[0-3]?,(GFP_USER|none)?";

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = parse(bytes.as_slice(), &user());
        let _ = parse([&[0x1f, 0x8b, 8, 0][..], &bytes].concat().as_slice(), &user());
        let _ = parse([HEADER.as_bytes(), b"\n", &bytes].concat().as_slice(), &user());
    }

    #[test]
    fn any_lines_of_likely_fields_are_read_or_refused(
        lines in prop::collection::vec(LIKELY, 0..20),
    ) {
        if let Ok(replay) = parsed(&lines.join("\n"), &user()) {
            prop_assert_eq!(replay.ops.len(), lines.len());
            prop_assert!(replay.ops.iter().all(|op| op.slot < replay.slots && op.cpu < 2));
        }
    }
}
