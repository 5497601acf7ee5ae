mod mistakes;

use super::*;
use std::fs;
use tempfile::TempDir;

const CONFIGS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs");
const IDLE: &str = "[workload]\nprogram = \"idle\"\n";

/// A folder with a file `in.csv` of one byte.
fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("in.csv"), "x").unwrap();
    folder
}

fn loaded(text: &str, overrides: &Overrides) -> Result<Config, ConfigError> {
    Config::from_text(&folder().path().join("test.toml"), text, overrides)
}

fn refused(text: &str) -> String {
    tail(&loaded(text, &Overrides::default()).unwrap_err())
}

/// The message from the file's name on.
fn tail(error: &ConfigError) -> String {
    let message = error.to_string();
    message.split_once("/test.toml").map_or(message.clone(), |(_, tail)| tail.to_owned())
}

#[test]
fn the_bundled_configurations_are_right() {
    let load = |name: &str| Config::load(&Path::new(CONFIGS).join(name), &Overrides::default());
    for entry in fs::read_dir(CONFIGS).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if name.ends_with(".toml") {
            load(&name).unwrap_or_else(|error| panic!("{error}"));
        }
    }
    let quickstart = load("quickstart.toml").unwrap();
    let Workload::Replay { events, secret, in_place, .. } = quickstart.workload else {
        panic!("{:?}", quickstart.workload)
    };
    assert!(events.unwrap() >= 2000);
    assert_eq!(secret, Secret::User);
    assert!((1..100).contains(&in_place), "both ways to secret pages");
    let touch = load("touch.toml").unwrap();
    assert!(touch.audit.expect.sealed_access);
}

#[test]
fn everything_but_the_program_has_a_default() {
    let config = loaded(IDLE, &Overrides::default()).unwrap();
    let guest = Guest {
        memory_mib: 64,
        vcpus: 1,
        shootdown: Shootdown::X2apic,
        image: None,
        fill: None,
        prezero: true,
        seed: 0,
    };
    assert_eq!(config.guest, guest);
    assert_eq!(config.workload, Workload::Idle);
    assert_eq!(config.second_stage.seal, Seal::Auto);
    assert_eq!((config.audit.quiesce_every, config.audit.probes), (1000, 16));
    assert_eq!(
        config.limits,
        Limits { timeout_s: 60, shootdown_s: 10, guest_log_kib: 1024, events_mib: 64 }
    );
    assert_eq!((config.machine, config.mediation), (MachineKind::Kvm, Mediation::Trace));
}

#[test]
fn the_reference_shows_the_defaults_and_every_field() {
    let path = Path::new(CONFIGS).join("reference.toml");
    let text = fs::read_to_string(&path).unwrap();
    let shown = Config::load(&path, &Overrides::default()).unwrap();
    let minimal = "[workload]\nprogram = \"replay\"\ninput = \"data/compile.csv.gz\"\n";
    assert_eq!(shown, Config::from_text(&path, minimal, &Overrides::default()).unwrap());
    for field in FIELDS {
        let section = text.split(&format!("\n[{}]\n", field.section)).nth(1).unwrap();
        let section = section.split("\n[").next().unwrap();
        let assigned = |line: &str| line.trim_start_matches("# ").starts_with(field.name);
        let shown = section.lines().filter(|l| l.contains(" = ")).any(assigned);
        assert!(shown, "[{}] {} is not in the reference", field.section, field.name);
    }
}

#[test]
fn the_table_of_fields_is_what_the_parser_takes() {
    for section in ["guest", "workload", "second_stage", "audit", "limits"] {
        let error = refused(&format!("[{section}]\nnone = 1\n"));
        let known = CONFIG.names(section);
        let text = format!("[{section}]\nnone = 1\n");
        let toml = toml::from_str::<raw::Raw>(&text).unwrap_err();
        let listed: Vec<_> = toml.message().split('`').skip(3).step_by(2).collect();
        assert_eq!(listed, known);
        let expected =
            format!(":2: [{section}] none: there is no such field; known: {}", known.join(", "));
        assert_eq!(error, expected);
    }
}

#[test]
fn the_choices_that_fields_name_are_all_choices() {
    let quoted = |section, name| -> Vec<_> {
        fields::find(section, name).unwrap().takes.split('"').skip(1).step_by(2).collect()
    };
    let names = |names: &mut dyn Iterator<Item = &'static str>| {
        let mut names: Vec<_> = names.collect();
        names.sort_unstable();
        names
    };
    let sorted = |section, name| names(&mut quoted(section, name).into_iter());
    let programs =
        names(&mut Program::ALL.iter().filter(|p| **p != Program::Flush).map(|p| p.name()));
    assert_eq!(sorted("workload", "program"), programs);
    assert_eq!(
        quoted("workload", "touch"),
        Touch::ALL.iter().map(|t| t.name()).collect::<Vec<_>>()
    );
    assert_eq!(
        quoted("workload", "crash"),
        Crash::ALL.iter().map(|c| c.name()).collect::<Vec<_>>()
    );
    let benches: Vec<_> = Bench::ALL.iter().map(|b| b.name()).collect();
    assert_eq!(quoted("workload", "bench"), benches);
    // The regression tests stand there as a range.
    let tests: Vec<_> = Selftest::ALL.iter().map(|t| t.name()).collect();
    let series = tests.iter().position(|t| *t == "regression::series_01").unwrap();
    let listed = [&tests[..=series], &tests[tests.len() - 1..]].concat();
    assert_eq!(quoted("workload", "test"), listed);
    assert_eq!(
        quoted("second_stage", "seal"),
        Seal::ALL.iter().map(|s| s.name()).collect::<Vec<_>>()
    );
    let on_free: Vec<_> = OnFree::ALL.iter().map(|o| o.name()).collect();
    assert_eq!(quoted("allocator", "on_free"), on_free);
    let guard: Vec<_> = GuardChoice::ALL.iter().map(|g| g.name()).collect();
    assert_eq!(quoted("second_stage", "guard"), guard);
}

#[test]
fn each_program_takes_its_fields() {
    let text = "[workload]\nprogram = \"replay\"\ninput = \"in.csv\"\nevents = 5\n\
                secret = [\"GFP_USER\", \"__GFP_ZERO\"]\nin_place = 30\n";
    let Workload::Replay { input, events, secret, in_place } =
        loaded(text, &Overrides::default()).unwrap().workload
    else {
        panic!("not replay")
    };
    assert!(input.ends_with("in.csv") && input.is_absolute());
    assert_eq!((events, in_place), (Some(5), 30));
    assert_eq!(secret, Secret::Names(vec!["GFP_USER".into(), "__GFP_ZERO".into()]));
    for (word, secret) in [("user", Secret::User), ("all", Secret::All), ("none", Secret::None)] {
        let text = format!("[workload]\nprogram='replay'\ninput='in.csv'\nsecret='{word}'\n");
        let workload = loaded(&text, &Overrides::default()).unwrap().workload;
        assert!(matches!(workload, Workload::Replay { secret: s, .. } if s == secret));
    }
    let stress = "[workload]\nprogram = \"stress\"\noperations = 7\nmax_order = 3\n";
    let stress = loaded(stress, &Overrides::default()).unwrap().workload;
    assert_eq!(stress, Workload::Stress { operations: 7, max_order: 3 });
    let test = "[workload]\nprogram = \"selftest\"\ntest = \"mermap::size\"\n";
    let test = loaded(test, &Overrides::default()).unwrap().workload;
    assert_eq!(test, Workload::Selftest { test: Selftest::MermapSize, operations: None });
    let test = "[workload]\nprogram = \"selftest\"\ntest = \"page_alloc::stress_interleaved\"\n\
                operations = 9\n";
    let test = loaded(test, &Overrides::default()).unwrap().workload;
    let stress = Selftest::PageAllocStressInterleaved;
    assert_eq!(test, Workload::Selftest { test: stress, operations: Some(9) });
    let touch = "[workload]\nprogram = \"touch\"\ntouch = \"page-walk\"\n";
    let touch = loaded(touch, &Overrides::default()).unwrap().workload;
    assert_eq!(touch, Workload::Touch { touch: Touch::PageWalk });
    let crash = "[workload]\nprogram = \"crash\"\ncrash = \"hang\"\n";
    let crash = loaded(crash, &Overrides::default()).unwrap().workload;
    assert_eq!(crash, Workload::Crash { crash: Crash::Hang });
}

#[test]
fn what_is_expected_may_be_rules_and_sealed_accesses() {
    let text = format!(
        "{IDLE}[audit]\nexpect = [\"foreign-alias\", \"sealed-access\", \"foreign-alias\"]\n\
         require = [\"residue\"]\n"
    );
    let audit = loaded(&text, &Overrides::default()).unwrap().audit;
    assert_eq!(audit.expect, Expect { sealed_access: true, rules: vec![Rule::ForeignAlias] });
    assert_eq!(audit.require, [Rule::Residue]);
}

#[test]
fn the_largest_file_is_still_read() {
    let folder = folder();
    let path = folder.path().join("test.toml");
    let mut text = IDLE.to_owned();
    text.push_str(&"#".repeat((1 << 20) - IDLE.len()));
    fs::write(&path, text).unwrap();
    Config::load(&path, &Overrides::default()).unwrap();
}

#[test]
fn the_command_line_goes_before_the_file() {
    let folder = folder();
    let input = folder.path().join("in.csv");
    let overrides = Overrides {
        machine: Some(MachineKind::Kvm),
        mediate: Some(Mediation::Trace),
        seal: Some(Seal::Off),
        input: Some(input.clone()),
        inject: vec!["global-window".into(), "skip-zero".into(), "global-window".into()],
        seed: Some(u64::MAX),
        report: Some(ReportFormat::Json),
        out: Some(folder.path().join("new")),
        ..Overrides::default()
    };
    let text = "[guest]\nseed = 5\n[workload]\nprogram = \"replay\"\ninput = \"none\"\n\
                [second_stage]\nseal = \"guard\"\n";
    let config = loaded(text, &overrides).unwrap();
    assert_eq!(config.guest.seed, u64::MAX);
    assert_eq!(config.workload.input(), Some(&*input));
    assert_eq!(config.second_stage.seal, Seal::Off);
    assert_eq!(config.inject, [Fault::GlobalWindow, Fault::SkipZero]);
    assert_eq!(config.output.report, ReportFormat::Json);
    assert_eq!(config.output.out, Some(folder.path().join("new")));
}

#[test]
fn a_configuration_is_serialised_with_the_names_of_the_file() {
    let text = "[guest]\nfill = 0xA5\n[workload]\nprogram = \"touch\"\ntouch = \"page-walk\"\n\
                [audit]\nexpect = [\"sealed-access\", \"residue\"]\n";
    let overrides = Overrides { inject: vec!["skip-zero".into()], ..Overrides::default() };
    let json = serde_json::to_value(loaded(text, &overrides).unwrap()).unwrap();
    assert_eq!(json["guest"]["fill"], 0xa5);
    assert_eq!(json["workload"]["program"], "touch");
    assert_eq!(json["workload"]["touch"], "page-walk");
    assert_eq!(json["second_stage"]["seal"], "auto");
    assert_eq!(json["audit"]["expect"]["rules"][0], "residue");
    assert_eq!(json["inject"][0], "skip-zero");
}
