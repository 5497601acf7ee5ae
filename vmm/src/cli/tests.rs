use super::*;
use crate::report::Verdict;
use clap::CommandFactory;
use clap::error::ErrorKind;
use lacuna_abi::fault::Fault;
use std::path::Path;
use std::process::ExitCode;

fn parsed(line: &str) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(line.split_whitespace())
}

fn run(line: &str) -> RunArgs {
    match parsed(&format!("lacuna run {line}")).unwrap().command {
        Command::Run(args) => args,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_definitions_are_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn every_flag_of_run_reaches_the_overrides() {
    let args = run("c.toml --machine sim --mediate step --step-from 3 --step-to 9 --seal memslot \
                    --input f --inject a --inject b --seed 7 --report json --out d --record");
    assert_eq!(args.config, Path::new("c.toml"));
    let overrides = Overrides {
        machine: Some(MachineKind::Sim),
        mediate: Some(Mediation::Step),
        step_from: Some(3),
        step_to: Some(9),
        seal: Some(Seal::Memslot),
        input: Some("f".into()),
        inject: vec!["a".into(), "b".into()],
        seed: Some(7),
        report: Some(ReportFormat::Json),
        out: Some("d".into()),
        record: true,
    };
    assert_eq!(args.overrides(), overrides);
    assert_eq!(run("c.toml").overrides(), Overrides::default());
}

#[test]
fn verbosity_is_counted_before_and_behind_the_command() {
    assert_eq!(parsed("lacuna -vv doctor").unwrap().verbose, 2);
    assert_eq!(parsed("lacuna run c.toml -v").unwrap().verbose, 1);
    assert_eq!(parsed("lacuna doctor").unwrap().verbose, 0);
}

#[test]
fn doctor_and_bench_take_their_flags() {
    let doctor = parsed("lacuna doctor --json").unwrap().command;
    assert_eq!(doctor, Command::Doctor(DoctorArgs { json: true }));
    let plain = BenchArgs { name: None, machine: MachineKind::Kvm, quick: false, json: false };
    let named = |name| BenchArgs { name: Some(name), ..plain.clone() };
    for (line, args) in [
        ("lacuna bench", plain.clone()),
        ("lacuna bench boot", named(Bench::Boot)),
        ("lacuna bench flush --json", BenchArgs { json: true, ..named(Bench::Flush) }),
        ("lacuna bench audit", named(Bench::Audit)),
        ("lacuna bench zero --quick", BenchArgs { quick: true, ..named(Bench::Zero) }),
        (
            "lacuna bench alloc --machine sim",
            BenchArgs { machine: MachineKind::Sim, ..named(Bench::Alloc) },
        ),
    ] {
        assert_eq!(parsed(line).unwrap().command, Command::Bench(args), "{line}");
    }
}

#[test]
fn probe_takes_its_flags() {
    let line = "lacuna probe --rounds 7 --machine sim --vcpus 2 --seed 3 --json";
    let machine = Some(MachineKind::Sim);
    let args = ProbeArgs { rounds: 7, machine, vcpus: Some(2), seed: Some(3), json: true };
    assert_eq!(parsed(line).unwrap().command, Command::Probe(args));
    let plain = ProbeArgs { rounds: 20, machine: None, vcpus: None, seed: None, json: false };
    assert_eq!(parsed("lacuna probe").unwrap().command, Command::Probe(plain));
}

#[test]
fn lab_takes_its_flags_and_leaves_what_follows_alone() {
    let line = "lacuna lab npt --cpus 4 --memory 512 --timeout 9 --kernel backports --cache c \
                --lacuna l -- run x.toml --out d --timeout";
    let Command::Lab(LabArgs { command: LabCommand::Npt(args) }) = parsed(line).unwrap().command
    else {
        panic!("{line}");
    };
    let expected = LabRunArgs {
        cpus: Some(4),
        memory: Some(512),
        timeout: Some(9),
        kernel: lab::Kernel::Backports,
        cache: Some("c".into()),
        lacuna: Some("l".into()),
        args: ["run", "x.toml", "--out", "d", "--timeout"].map(Into::into).to_vec(),
    };
    assert_eq!(args, expected);
    let setup = LabSetupArgs { cache: None, kernel: lab::Kernel::Stable };
    for (line, command) in [
        ("lacuna lab setup", LabCommand::Setup(setup.clone())),
        ("lacuna lab status", LabCommand::Status(setup.clone())),
    ] {
        assert_eq!(parsed(line).unwrap().command, Command::Lab(LabArgs { command }), "{line}");
    }
}

#[test]
fn wrong_usage_ends_with_status_2_and_help_with_0() {
    for line in [
        "lacuna",
        "lacuna run",
        "lacuna check a b",
        "lacuna check --jobs 0",
        "lacuna run c.toml d.toml",
        "lacuna run c.toml --seal ept",
        "lacuna run c.toml --seed -1",
        "lacuna run c.toml --unknown",
        "lacuna bench speed",
        "lacuna probe --rounds 0",
        "lacuna probe --vcpus 9",
        "lacuna probe CONFIG",
        "lacuna lab",
        "lacuna lab npt",
        "lacuna lab npt doctor",
        "lacuna lab npt --cpus 9 -- doctor",
        "lacuna lab sim -- doctor",
    ] {
        assert_eq!(parsed(line).unwrap_err().exit_code(), 2, "{line}");
    }
    for (line, kind) in [
        ("lacuna --help", ErrorKind::DisplayHelp),
        ("lacuna run --help", ErrorKind::DisplayHelp),
        ("lacuna --version", ErrorKind::DisplayVersion),
    ] {
        let error = parsed(line).unwrap_err();
        assert_eq!((error.kind(), error.exit_code()), (kind, 0), "{line}");
    }
}

#[test]
fn a_wrong_choice_is_answered_with_the_choices() {
    let error = parsed("lacuna run c.toml --seal ept").unwrap_err().to_string();
    assert!(error.contains("auto, memslot, guard, off"), "{error}");
}

#[test]
fn help_names_exit_statuses_examples_and_faults() {
    let help = parsed("lacuna run --help").unwrap_err().to_string();
    for status in [
        ExitStatus::Pass,
        ExitStatus::Violation,
        ExitStatus::Usage,
        ExitStatus::Host,
        ExitStatus::GuestError,
        ExitStatus::Inconclusive,
    ] {
        assert!(help.contains(&format!("\n  {}  ", status as u8)), "{status:?}");
    }
    assert!(help.contains("lacuna run configs/quickstart.toml"), "{help}");
    for fault in Fault::ALL {
        assert!(help.contains(fault.name()) && help.contains(fault.rule()), "{}", fault.name());
    }
}

#[test]
fn verdicts_and_exit_statuses_agree() {
    for verdict in [Verdict::Pass, Verdict::Violation, Verdict::GuestError, Verdict::Inconclusive] {
        assert_eq!(ExitStatus::from(verdict) as u8, verdict.exit_status());
    }
    assert_eq!(ExitCode::from(ExitStatus::Host), ExitCode::from(3));
}
