//! `lacuna check` as a user calls it: exit status, table, JSON and JUnit. Each judgement has a twin that
//! goes the other way. Nothing here needs `/dev/kvm` but what says so.

mod support;

use libtest_mimic::{Failed, Trial};
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};
use support::{Check, LACUNA, ensure, needing_kvm, repository, trial};

fn main() {
    let mut trials = trials();
    trials.extend(needing_kvm(vec![
        trial("a_users_own_image_can_be_a_case", own_image),
        trial("hostile_images_of_a_user_fail_their_case_and_nothing_else", hostile_image),
    ]));
    support::run(trials, false);
}

/// Scenarios with their twins: what stands in the section, the rest of the file, the exit status, and a
/// text of the table.
const JUDGED: &[(&str, &str, &str, i32, &str)] = &[
    ("a_clean_case_passes", "require = [\"table-alias\"]", IDLE, 0, "PASS: "),
    (
        "a_required_rule_that_is_not_exercised_fails",
        "require = [\"residue\"]",
        IDLE,
        1,
        "the rule residue was never exercised",
    ),
    (
        "a_clean_case_that_is_not_clean_fails",
        "require = []\nseal = [\"off\"]",
        "[workload]\nprogram = \"touch\"\ntouch = \"read\"\n",
        1,
        "foreign-alias is violated",
    ),
    ("a_fault_that_is_found_passes", FAULT, REPLAY, 0, "1/1          1/1"),
    (
        "a_fault_that_is_not_found_fails",
        // A completed seal makes up for it.
        "require = []\nseal = [\"guard\"]\n[[scenario.fault]]\ninject = [\"skip-window-flush\"]",
        REPLAY,
        1,
        "no violation of stale-window was found",
    ),
    (
        "a_fault_that_is_found_by_another_rule_fails",
        "require = []\n[[scenario.fault]]\ninject = [\"skip-seal\"]\nrule = \"user-access\"",
        REPLAY,
        1,
        "no violation of user-access was found",
    ),
    (
        "a_fault_that_is_found_on_another_vcpu_fails",
        "require = []\n[[scenario.fault]]\ninject = [\"skip-flip-flush\"]\nvcpu = 3",
        REPLAY,
        1,
        "is where it should be: vCPU 3",
    ),
    (
        "a_fault_that_is_found_in_its_function_passes",
        "require = []\n[[scenario.fault]]\ninject = [\"skip-flip-flush\"]\nvcpu = 0\nfunction = \"flip::\"",
        REPLAY,
        0,
        "PASS: ",
    ),
    (
        "a_guest_that_fails_as_expected_passes",
        "expect = \"guest-error\"\nmessage = \"asked to\"",
        "[workload]\nprogram = \"crash\"\ncrash = \"panic\"\n",
        0,
        "1/1",
    ),
    (
        "a_guest_that_does_not_fail_as_expected_fails",
        "expect = \"guest-error\"",
        IDLE,
        1,
        "the verdict is pass, not guest-error",
    ),
    (
        "a_violation_without_a_fault_can_be_expected",
        "expect = \"foreign-alias\"\nseal = [\"off\"]",
        "[workload]\nprogram = \"touch\"\ntouch = \"read\"\n",
        0,
        "PASS: ",
    ),
    (
        "doubt_is_status_5",
        "require = [\"table-alias\"]",
        "[workload]\nprogram = \"idle\"\n[audit]\nexpect = [\"residue\"]\n",
        5,
        "a violation of residue was expected, none was found",
    ),
    (
        "a_case_that_takes_too_long_fails",
        "require = []\ntimeout_s = 1",
        "[workload]\nprogram = \"crash\"\ncrash = \"hang\"\n",
        1,
        "it took longer than 1 s ([scenario] timeout_s)",
    ),
];

const IDLE: &str = "[guest]\nmemory_mib = 16\n[workload]\nprogram = \"idle\"\n";
const FAULT: &str = "require = [\"residue\"]\n[[scenario.fault]]\ninject = [\"skip-seal\"]";
/// A replay; `RECORDING` stands for its input.
const REPLAY: &str = "[guest]\nmemory_mib = 32\nfill = 0xA5\n[workload]\nprogram = \"replay\"\n\
                      input = RECORDING\nevents = 260\nsecret = \"all\"\n[audit]\nquiesce_every = 400\n";

fn trials() -> Vec<Trial> {
    let mut trials = vec![
        trial("without_a_folder_the_built_in_scenarios_run_anywhere", built_in),
        trial("the_list_runs_nothing_and_names_every_case", lists),
        trial("what_is_wrong_is_status_2_and_nothing_runs", refused),
        trial("json_and_junit_say_the_same_as_the_table", forms),
        trial("ctrl_c_ends_the_suite_with_what_was_done_so_far", ctrl_c),
        trial("a_case_ends_with_the_process_that_started_it", orphan),
        trial("the_names_of_cases_are_the_same_from_a_folder", same_names),
    ];
    for (name, section, rest, status, needle) in JUDGED {
        trials.push(trial(name, || judged(section, rest, *status, needle)));
    }
    trials
}

fn write(folder: &Path, name: &str, section: &str, rest: &str) -> Check {
    let input = repository().join("configs/data/compile.csv.gz");
    let rest = rest.replace("RECORDING", &format!("{input:?}"));
    let text = format!("[scenario]\nmachine = [\"sim\"]\n{section}\n\n{rest}");
    Ok(std::fs::write(folder.join(name), text)?)
}

fn check(folder: &Path, args: &[&str]) -> Result<Output, Failed> {
    let mut command = Command::new(LACUNA);
    command.args(["check", "--scenarios"]).arg(folder).args(args).current_dir(folder);
    Ok(command.stdin(Stdio::null()).output()?)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn expect(output: &Output, status: i32, needle: &str) -> Check {
    let said = format!("{}{}", text(&output.stdout), text(&output.stderr));
    ensure(output.status.code() == Some(status), &format!("{:?}: {said}", output.status))?;
    ensure(said.contains(needle), &format!("{needle:?} is missing in {said}"))
}

fn judged(section: &str, rest: &str, status: i32, needle: &str) -> Check {
    let folder = tempfile::tempdir()?;
    write(folder.path(), "case.toml", section, rest)?;
    expect(&check(folder.path(), &[])?, status, needle)
}

fn built_in() -> Check {
    let folder = tempfile::tempdir()?;
    let run = |filter: &str| -> Result<Output, Failed> {
        Ok(Command::new(LACUNA).args(["check", filter]).current_dir(folder.path()).output()?)
    };
    let output = run("replay/sim/trace/guard/vcpus=2/skip-seal")?;
    expect(&output, 0, "1 cases: 1 as expected")?;
    ensure(text(&output.stderr).contains("[1/1] ok"), "no progress on standard error")?;
    expect(&run("no-such-case")?, 2, "no case matches \"no-such-case\"")
}

fn lists() -> Check {
    let folder = tempfile::tempdir()?;
    write(folder.path(), "case.toml", &format!("quick = [\"*/clean\"]\n{FAULT}"), REPLAY)?;
    let names = |args: &[&str]| -> Result<Vec<String>, Failed> {
        let output = check(folder.path(), args)?;
        expect(&output, 0, "")?;
        ensure(output.stderr.is_empty(), "it runs something")?;
        Ok(text(&output.stdout).lines().map(str::to_owned).collect())
    };
    let clean = "case/sim/trace/auto/vcpus=1/clean";
    ensure(names(&["--list"])? == [format!("{clean}  pass")], "the quick ones")?;
    let all = names(&["--list", "--all"])?;
    ensure(
        all.len() == 2 && all[1].ends_with("/skip-seal  second-stage-open"),
        &format!("{all:?}"),
    )?;
    let json: Value = serde_json::from_str(&names(&["--list", "--json"])?.join("\n"))?;
    ensure(json[0]["name"] == clean && json[0]["expected"] == "pass", &format!("{json:#}"))
}

fn refused() -> Check {
    let folder = tempfile::tempdir()?;
    let path = folder.path();
    let wrong = |output: &Output, needle: &str| {
        expect(output, 2, needle)?;
        ensure(output.stdout.is_empty(), "nothing belongs on standard output")
    };
    wrong(&check(path, &[])?, "there is no scenario in this folder")?;
    write(path, "case.toml", "require = []\nsael = [\"off\"]", IDLE)?;
    wrong(&check(path, &[])?, "case.toml:4: [scenario] sael: there is no such field; known: ")?;
    write(path, "case.toml", "require = []\nmediate = [\"ear\"]", IDLE)?;
    wrong(&check(path, &[])?, "case.toml:4: [scenario] mediate: \"ear\" is not known")?;
    write(
        path,
        "case.toml",
        "require = []",
        "[guest]\nmemory_mib = 15\n[workload]\nprogram = \"idle\"\n",
    )?;
    wrong(&check(path, &[])?, "case.toml:6: [guest] memory_mib: 15 is out of range")?;
    std::fs::write(path.join("x.csv"), "t_us\n")?;
    let recording = "[workload]\nprogram = \"replay\"\ninput = \"x.csv\"\n";
    write(path, "case.toml", "require = []", recording)?;
    wrong(&check(path, &[])?, "x.csv:1")?;
    write(path, "case.toml", "require = []", IDLE)?;
    wrong(&check(path, &["--junit", "no/such/folder.xml"])?, "--junit: cannot write")?;
    wrong(&check(path, &["--list", "--junit", "x.xml"])?, "cannot be used with")?;
    wrong(&check(path, &["kvm"])?, "no case matches \"kvm\"")?;
    std::fs::create_dir(path.join("empty"))?;
    wrong(&check(&path.join("empty"), &[])?, "there is no scenario in this folder")
}

fn forms() -> Check {
    let folder = tempfile::tempdir()?;
    write(folder.path(), "good <&> \"case\".toml", FAULT, REPLAY)?;
    write(folder.path(), "bad.toml", "require = [\"residue\"]", IDLE)?;
    let output = check(folder.path(), &["--json", "--junit", "results.xml", "--jobs", "3"])?;
    expect(&output, 1, "")?;
    let json: Value = serde_json::from_slice(&output.stdout)?;
    ensure(json["verdict"] == "fail" && json["exit_status"] == 1, &format!("{json:#}"))?;
    let counts = &json["counts"];
    ensure(
        counts["cases"] == 3 && counts["passed"] == 2 && counts["failed"] == 1,
        &format!("{counts}"),
    )?;
    let fault =
        json["cases"].as_array().into_iter().flatten().find(|case| case["fault"] == "skip-seal");
    let fault = fault.ok_or("no case with the fault")?;
    ensure(fault["confirmed"].as_u64() > Some(0), "no finding is confirmed by the events")?;
    ensure(fault["violations"][0]["frame"].is_string(), "no frame")?;
    let xml = std::fs::read_to_string(folder.path().join("results.xml"))?;
    let document = roxmltree::Document::parse(&xml)?;
    let root = document.root_element();
    ensure(root.attribute("tests") == Some("3") && root.attribute("failures") == Some("1"), &xml)?;
    let named = |name| document.descendants().any(|node| node.attribute("classname") == Some(name));
    ensure(named("good <&> \"case\"") && named("bad"), &xml)?;
    let failures: Vec<_> =
        document.descendants().filter(|node| node.has_tag_name("failure")).collect();
    let message = failures.first().and_then(|node| node.attribute("message"));
    ensure(message == Some("the rule residue was never exercised"), &xml)
}

/// A suite that takes minutes.
fn long(folder: &Path) -> Check {
    let stress =
        "[workload]\nprogram = \"stress\"\noperations = 100000000\n[limits]\ntimeout_s = 600\n";
    write(folder, "a.toml", "require = [\"table-alias\"]", IDLE)?;
    write(folder, "b.toml", "require = []", stress)
}

fn ctrl_c() -> Check {
    let folder = tempfile::tempdir()?;
    long(folder.path())?;
    write(folder.path(), "c.toml", "require = []", IDLE)?;
    let mut command = Command::new(LACUNA);
    command.args(["check", "--jobs", "1", "--junit", "results.xml", "--scenarios", "."]);
    let child =
        command.current_dir(folder.path()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    std::thread::sleep(Duration::from_secs(2));
    let told = Instant::now();
    let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status()?;
    ensure(killed.success(), "kill failed")?;
    let output = child.wait_with_output()?;
    ensure(told.elapsed() < Duration::from_secs(20), "it did not end")?;
    expect(&output, 5, "3 cases: 1 as expected, 0 failed, 0 inconclusive, 0 skipped, 2 not run")?;
    let xml = std::fs::read_to_string(folder.path().join("results.xml"))?;
    let document = roxmltree::Document::parse(&xml)?;
    let skipped = document.descendants().filter(|node| node.has_tag_name("skipped")).count();
    ensure(skipped == 2, &xml)
}

fn orphan() -> Check {
    let folder = tempfile::tempdir()?;
    long(folder.path())?;
    let mut command = Command::new(LACUNA);
    command.args(["check", "--child", "b/sim/trace/auto/vcpus=1/clean", "--scenarios", "."]);
    let mut child = command
        .current_dir(folder.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    ensure(child.try_wait()?.is_none(), "it has ended by itself")?;
    drop(child.stdin.take());
    let deadline = Instant::now() + Duration::from_secs(60);
    while child.try_wait()?.is_none() {
        if Instant::now() > deadline {
            child.kill()?;
            return Err("it goes on without the process that started it".into());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn same_names() -> Check {
    let list = |args: &[&str]| -> Result<String, Failed> {
        let output = Command::new(LACUNA).args(["check", "--list", "--all"]).args(args).output()?;
        Ok(text(&output.stdout))
    };
    let folder = repository().join("configs/scenarios").display().to_string();
    let (built_in, folder) = (list(&[])?, list(&["--scenarios", &folder])?);
    ensure(built_in == folder && built_in.lines().count() > 300, "the lists differ")
}

fn own_image() -> Check {
    let folder = tempfile::tempdir()?;
    std::fs::write(folder.path().join("my.elf"), lacuna::image::ORDINARY)?;
    let rest = "[guest]\nimage = \"my.elf\"\n[workload]\nprogram = \"idle\"\n";
    write(folder.path(), "mine.toml", "require = [\"table-alias\"]", rest)?;
    // A simulated machine runs no image.
    expect(
        &check(folder.path(), &[])?,
        2,
        "mine.toml:2: [scenario] machine: a simulated machine runs no image",
    )?;
    let path = folder.path().join("mine.toml");
    std::fs::write(&path, std::fs::read_to_string(&path)?.replace("sim", "kvm"))?;
    expect(&check(folder.path(), &[])?, 0, "mine      kvm              1/1")
}

fn hostile_image() -> Check {
    let folder = tempfile::tempdir()?;
    let sin = lacuna::hostile::Sin::DirectMapped;
    std::fs::write(folder.path().join("bad.elf"), sin.image()?)?;
    let rest = "[guest]\nmemory_mib = 16\nimage = \"bad.elf\"\n[workload]\nprogram = \"idle\"\n";
    write(folder.path(), "bad.toml", "require = []", rest)?;
    write(folder.path(), "told.toml", &format!("expect = {:?}", sin.rule().name()), rest)?;
    write(folder.path(), "good.toml", "require = []", IDLE)?;
    for name in ["bad.toml", "told.toml"] {
        let path = folder.path().join(name);
        std::fs::write(&path, std::fs::read_to_string(&path)?.replace("[\"sim\"]", "[\"kvm\"]"))?;
    }
    expect(&check(folder.path(), &[])?, 1, "3 cases: 2 as expected, 1 failed")
}
