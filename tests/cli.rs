//! Wrong input, as a user gives it: the exit status and the message, which names what, where and
//! the remedy. Nothing here needs `/dev/kvm`.

use std::path::Path;
use std::process::{Command, Output};

/// Files of a folder, arguments behind `lacuna`, and what the message must hold.
struct Case {
    files: &'static [(&'static str, &'static str)],
    args: &'static [&'static str],
    needles: &'static [&'static str],
}

const IDLE: &str = "[workload]\nprogram = \"idle\"\n";

fn lacuna(folder: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_lacuna")).args(args).current_dir(folder).output().unwrap()
}

fn check(case: &Case) {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in case.files {
        std::fs::write(folder.path().join(name), text).unwrap();
    }
    let output = lacuna(folder.path(), case.args);
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{:?}: {message}", case.args);
    assert!(output.stdout.is_empty(), "nothing belongs on standard output");
    for needle in case.needles {
        assert!(message.contains(needle), "{needle:?} is missing in: {message}");
    }
}

macro_rules! refused {
    ($($name:ident: $files:expr, $args:expr, $needles:expr;)*) => {$(
        #[test]
        fn $name() {
            check(&Case { files: &$files, args: &$args, needles: &$needles });
        }
    )*};
}

refused! {
    a_missing_configuration: [], ["run", "no.toml"], ["no.toml", "does not exist", "configs/"];
    a_folder: [], ["run", "."], ["directory"];
    a_syntax_error: [("a.toml", "[guest\n")], ["run", "a.toml"], ["a.toml:1", "not TOML"];
    an_unknown_field:
        [("a.toml", "[guest]\nmemry_mib = 64\n[workload]\nprogram = \"idle\"\n")], ["run", "a.toml"],
        ["a.toml:2", "memry_mib", "memory_mib"];
    a_wrong_type:
        [("a.toml", "[guest]\nmemory_mib = \"x\"\n[workload]\nprogram = \"idle\"\n")],
        ["run", "a.toml"], ["a.toml:2", "memory_mib", "16 to 65536"];
    an_impossible_size:
        [("a.toml", "[guest]\nmemory_mib = 8\n[workload]\nprogram = \"idle\"\n")],
        ["run", "a.toml"], ["a.toml:2", "memory_mib", "16 to 65536"];
    a_missing_input:
        [("a.toml", "[workload]\nprogram = \"replay\"\ninput = \"no.csv\"\n")], ["run", "a.toml"],
        ["a.toml:3", "no.csv", "check the path"];
    a_recording_that_is_none:
        [("a.toml", "[workload]\nprogram = \"replay\"\ninput = \"a.toml\"\n")], ["run", "a.toml"],
        ["a.toml:1", "header", "t_us,cpu,op"];
    a_recording_with_a_bad_line:
        [("a.toml", "[workload]\nprogram = \"replay\"\ninput = \"x.csv\"\n"),
         ("x.csv", "t_us,cpu,op,id,order,migratetype,gfp\n0,0,A,1,99,0,GFP_KERNEL\n")],
        ["run", "a.toml"], ["x.csv:2", "order", "10"];
    an_unknown_program:
        [("a.toml", "[workload]\nprogram = \"relay\"\n")], ["run", "a.toml"],
        ["a.toml:2", "relay", "\"replay\""];
    an_unknown_fault: [("a.toml", IDLE)], ["run", "a.toml", "--inject", "nonsense"],
        ["nonsense", "leave-direct-map-alias"];
    an_unknown_seal: [("a.toml", IDLE)], ["run", "a.toml", "--seal", "wax"], ["wax", "memslot"];
    an_unknown_flag: [("a.toml", IDLE)], ["run", "a.toml", "--frobnicate"], ["--frobnicate"];
    an_unknown_rule:
        [("a.toml", "[workload]\nprogram = \"idle\"\n[audit]\nrequire = [\"resdue\"]\n")],
        ["run", "a.toml"], ["a.toml:4", "resdue", "residue"];
    more_vcpus_than_a_guest_can_have:
        [("a.toml", "[guest]\nvcpus = 9\n[workload]\nprogram = \"idle\"\n")], ["run", "a.toml"],
        ["a.toml:2", "vcpus", "from 1 to 8"];
    a_fault_that_needs_more_vcpus:
        [("a.toml", IDLE)], ["run", "a.toml", "--inject", "local-only-flip-flush"],
        ["--inject", "local-only-flip-flush", "vcpus = 2"];
    a_mode_that_this_version_lacks: [("a.toml", IDLE)], ["run", "a.toml", "--mediate", "step"],
        ["--mediate", "trace"];
    a_folder_for_results_that_cannot_be:
        [("a.toml", IDLE)], ["run", "a.toml", "--out", "a.toml/x"], ["--out", "folder"];
    a_foreign_image:
        [("a.toml", "[guest]\nimage = \"a.toml\"\n[workload]\nprogram = \"idle\"\n")],
        ["run", "a.toml"], ["a.toml", "ELF", "docs/guests.md"];
    no_command: [], [], ["Usage"];
    an_unknown_bench: [], ["bench", "warp"], ["warp", "alloc", "boot"];
    two_benches: [], ["bench", "zero", "flip"], ["flip", "Usage"];
    an_unknown_machine_for_a_bench: [], ["bench", "zero", "--machine", "abacus"], ["abacus", "sim"];
    a_bench_that_measures_a_processor:
        [], ["bench", "boot", "--machine", "sim"], ["bench boot", "--machine kvm", "zero"];
}

#[test]
fn a_secret_larger_than_can_be_searched_for() {
    let folder = tempfile::tempdir().unwrap();
    let config = "[guest]\nmemory_mib = 16\n[workload]\nprogram = \"secrets\"\ninput = \"s\"\n";
    std::fs::write(folder.path().join("a.toml"), config).unwrap();
    std::fs::write(folder.path().join("s"), vec![1; (4 << 20) + 1]).unwrap();
    let output = lacuna(folder.path(), &["run", "a.toml"]);
    assert_eq!(output.status.code(), Some(2));
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(message.contains("larger than 4 MiB"), "{message}");
}

#[test]
fn help_and_version_are_no_errors() {
    let folder = tempfile::tempdir().unwrap();
    for args in [&["--help"][..], &["--version"], &["run", "--help"], &["bench", "--help"]] {
        let output = lacuna(folder.path(), args);
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        assert!(!output.stdout.is_empty());
    }
    let help = lacuna(folder.path(), &["run", "--help"]);
    let help = String::from_utf8_lossy(&help.stdout).into_owned();
    for needle in ["Exit status", "--seal", "--inject", "global-window", "Examples"] {
        assert!(help.contains(needle), "{needle:?} is missing in: {help}");
    }
}

#[test]
fn without_a_name_bench_lists_what_can_be_measured() {
    let folder = tempfile::tempdir().unwrap();
    let list = lacuna(folder.path(), &["bench"]);
    assert_eq!(list.status.code(), Some(0));
    let help = lacuna(folder.path(), &["bench", "--help"]);
    let json = lacuna(folder.path(), &["bench", "--json"]);
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    let named = json.as_array().unwrap();
    assert!(named.len() >= 5, "{json:#}");
    for bench in named {
        let line = format!("  {}", bench["name"].as_str().unwrap());
        let what = bench["what"].as_str().unwrap();
        for text in [&list.stdout, &help.stdout] {
            let text = String::from_utf8_lossy(text);
            let has = |l: &str| l.starts_with(&line) && l.ends_with(what);
            assert!(text.lines().any(has), "{line} is missing in: {text}");
        }
    }
    for flag in ["--quick", "--machine", "--json"] {
        assert!(String::from_utf8_lossy(&help.stdout).contains(flag), "{flag}");
    }
}

#[test]
fn doctor_speaks_json() {
    let folder = tempfile::tempdir().unwrap();
    let output = lacuna(folder.path(), &["doctor", "--json"]);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let status = if json["can_run"] == true { 0 } else { 3 };
    assert_eq!(output.status.code(), Some(status), "{json:#}");
}

#[test]
fn a_recording_needs_a_folder_and_an_audit_a_recording() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("a.toml"), "[workload]\nprogram = \"idle\"\n").unwrap();
    std::fs::write(
        folder.path().join("recording.bin"),
        "something else, and long enough for a head",
    )
    .unwrap();
    for (args, needle) in [
        (&["run", "a.toml", "--record"][..], "--record: a recording needs a folder to lie in"),
        (&["audit", "nowhere"], "nowhere/recording.bin: No such file"),
        (&["audit", "."], "does not start with LACUNARC"),
        (&["audit", ".", "--profile", "z80"], "intel-invlpg-erratum"),
    ] {
        let output = lacuna(folder.path(), args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(message.contains(needle), "{message}");
    }
}
