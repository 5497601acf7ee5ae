//! End to end on `/dev/kvm`: the command line as a user calls it, judged by its JSON report and
//! its exit status.
//!
//! Where `/dev/kvm` cannot be used, every test here is listed as ignored and counted; with
//! `LACUNA_REQUIRE_KVM=1` it runs and fails instead.

mod benches;
mod stories;
mod support;

use benches::quick;
use lacuna::config::MachineKind;
use lacuna_abi::fault::{Fault, Slip};
use lacuna_abi::workload::Selftest;
use libtest_mimic::Trial;
use serde_json::Value;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use stories::{STORIES, story_is_told};
use support::matrix::{SEALS, Twin, seals};
use support::{
    Check, EVENTS, LACUNA, Run, dirty, ensure, fault_is_found, is_judged_the_same, lacuna, replay,
    repository, selftest, slips, trial,
};

fn main() {
    support::run(trials(), true);
}

fn trials() -> Vec<Trial> {
    let mut trials = vec![
        trial("quickstart_is_clean_and_exercises_its_rules", quickstart),
        trial("every_order_below_a_block_converts_in_place", orders_in_place),
        trial("nothing_secret_means_nothing_sealed", nothing_secret),
        trial("a_dirty_zone_is_clean_too", dirty_zone),
        trial("a_recorded_replay_is_judged_the_same", || {
            is_judged_the_same(&dirty(&replay(EVENTS, "all")), &[])
        }),
        trial("a_recorded_fault_is_found_again", || {
            is_judged_the_same(&dirty(&replay(EVENTS, "all")), &["--inject", "skip-flip-flush"])
        }),
        trial("a_recorded_run_on_two_vcpus_is_judged_the_same", || {
            is_judged_the_same(&selftest(Selftest::ALL[0]), &["--seal", "memslot"])
        }),
        trial("without_prezero_pages_are_zeroed_when_handed_out", no_prezero),
        trial("a_small_guest_gives_unmapped_blocks_back_under_pressure", pressure),
        trial("two_runs_find_and_count_the_same", determinism),
        trial("secrets_leave_no_trace", secrets),
        trial("a_secret_too_plain_to_recognise_is_inconclusive", plain_secret),
        trial("a_required_rule_that_did_not_run_is_inconclusive", required_rule),
        trial("an_expected_access_that_does_not_happen_is_inconclusive", expected_access),
        trial("a_hang_ends_with_its_timeout", hang),
        trial("ctrl_c_ends_at_once_and_leaves_a_report", ctrl_c),
        trial("out_holds_report_log_and_events", out_folder),
        trial("bad_gate_calls_are_answered", bad_calls),
        trial("a_foreign_file_is_no_image", foreign_image),
        trial("a_quick_bench_of_zeroing_measures_both_ways", bench_zero),
        trial("a_quick_bench_of_flips_brings_every_block_back", bench_flip),
    ];
    for seal in SEALS {
        trials.push(trial(&format!("replay_is_clean_under_{seal}"), move || clean_replay(seal)));
        let name = format!("converting_in_place_is_clean_under_{seal}");
        trials.push(trial(&name, move || clean_in_place(seal)));
    }
    trials.extend(under_tables());
    for fault in Fault::ALL.iter().filter(|f| f.vcpus() == 1 && f.modes().contains(&"trace")) {
        for seal in seals(*fault) {
            // The clean twins of these runs are `replay_is_clean_under_…`,
            // `converting_in_place_is_clean_under_…` and
            // `without_prezero_pages_are_zeroed_when_handed_out`: the same configurations.
            let name = format!("{}_is_found_under_{seal}", fault.name());
            let config = Twin::of(*fault).config(1);
            trials.push(trial(&name, move || fault_is_found(&config, *fault, &["--seal", seal])));
        }
    }
    for slip in Slip::ALL.iter().filter(|slip| slip.vcpus() == 1) {
        let seal = slips::seals(*slip)[0];
        let name = format!("slip_{}_is_found_under_{seal}", slip.name());
        let found = move || slips::is_found(*slip, MachineKind::Kvm, 1, seal);
        trials.push(trial(&name, found));
    }
    trials.push(trial("the_ordinary_image_does_not_listen_for_faults", || {
        slips::the_ordinary_image_does_not_listen(MachineKind::Kvm)
    }));
    for story in STORIES {
        let name = format!("{}_tells_its_story", story.fault);
        trials.push(trial(&name, || story_is_told(story, &[])));
    }
    for test in Selftest::ALL.iter().filter(|test| test.cpus() == 1) {
        trials.push(trial(&format!("selftest::{}", test.name()), move || {
            lacuna(&selftest(*test), &[])?.clean()
        }));
    }
    trials.push(trial("random_requests_find_every_page_as_it_should_be", stress));
    for (touch, kind) in TOUCHES {
        for seal in ["guard", "mprotect", "memslot"] {
            let name = format!("a_{touch}_of_a_sealed_frame_is_caught_under_{seal}");
            trials.push(trial(&name, move || sealed_touch(touch, kind, seal)));
        }
    }
    for (crash, needles) in CRASHES {
        let name = format!("a_{crash}_is_reported");
        trials.push(trial(&name, move || crash_is_reported(crash, needles)));
    }
    trials
}

/// Ways to touch a sealed frame, and the kind that the report must name.
const TOUCHES: &[(&str, &str)] = &[
    ("read", "read"),
    ("write", "write"),
    ("fetch", "fetch"),
    ("locked", "write"),
    ("string", "read"),
    ("stack", "write"),
    ("event-delivery", "event-delivery"),
    ("page-walk", "page-walk"),
];

/// Ways to fail, and what the message must say.
const CRASHES: &[(&str, &[&str])] = &[
    ("panic", &["panic", "asked to", "crash.rs:"]),
    ("page-fault", &["#PF", "0xffff9101c0000123"]),
    ("general-protection", &["#GP"]),
    ("invalid-opcode", &["#UD"]),
    ("stack-overflow", &["#PF", "main stack", "overflowed"]),
    ("triple-fault", &["triple fault"]),
    ("write-text", &["#PF", "error code 0x3"]),
];

/// Direct paging: the same path as on the simulated machine, where all faults are tried
/// (`faults.rs`); here one of each kind that the host treats in its own way.
fn under_tables() -> Vec<Trial> {
    let tables = ["--mediate", "tables"];
    let mut trials = vec![
        trial("replay_in_place_is_clean_under_tables", move || {
            clean_under_tables(&Twin::InPlace.config(1), &tables)
        }),
        trial("a_recorded_run_under_tables_is_judged_the_same", move || {
            is_judged_the_same(&selftest(Selftest::ALL[0]), &tables)
        }),
        trial("a_guest_that_cannot_write_its_tables_links_no_frame_as_one", walk_under_tables),
    ];
    let faults = [
        Fault::LeaveDirectMapAlias,
        Fault::GlobalWindow,
        Fault::TableFreeStale,
        Fault::OpenEarly,
        Fault::ForgedTableWrite,
    ];
    for fault in faults {
        let name = format!("{}_is_found_under_tables", fault.name());
        let found = move || fault_is_found(&Twin::of(fault).config(1), fault, &tables);
        trials.push(trial(&name, found));
    }
    trials
}

fn clean_under_tables(config: &str, args: &[&str]) -> Check {
    let run = lacuna(config, args)?;
    run.clean()?;
    ensure(run.report["machine"]["mediation"] == "tables", "the host did not write the tables")?;
    ensure(run.counter("table_writes") > 100, "nothing was written")?;
    ensure(run.counter("table_writes_refused") == 0, "something was refused")
}

/// A secret frame as a page table: no access through it ever takes place, because it is not linked.
fn walk_under_tables() -> Check {
    let config =
        "[guest]\nmemory_mib = 16\n[workload]\nprogram = \"touch\"\ntouch = \"page-walk\"\n";
    let run = lacuna(config, &["--mediate", "tables"])?;
    run.expect(1, "violation")?;
    ensure(run.check("table-alias", "violations") == 1, &format!("{:#}", run.report))?;
    let none = run.report["sealed_accesses"].as_array().is_some_and(Vec::is_empty);
    ensure(none, "the frame was touched")?;
    let message = run.report["guest_error"]["message"].to_string();
    ensure(message.contains("the host refused"), &message)
}

fn bench_zero() -> Check {
    let results = quick("zero", "kvm")?;
    for field in ["window_page_ticks", "direct_page_ticks", "speed_ratio"] {
        let positive = results[field].as_f64().is_some_and(|value| value > 0.0);
        ensure(positive, &format!("{field} is not measured: {results:#}"))?;
    }
    ensure(results["window"]["local_flushes"] == 1.0, &format!("{results:#}"))
}

fn bench_flip() -> Check {
    let results = quick("flip", "kvm")?;
    let batches = results["batches"].as_array().ok_or("there are no batches")?;
    for batch in batches {
        let counts = &batch["per_block"];
        let back = counts["flips_out"] == 1.0 && counts["flips_back"] == 1.0;
        ensure(back && batch["block_ticks"].as_f64() > Some(0.0), &format!("{batch:#}"))?;
    }
    ensure(batches.len() == 3, &format!("{results:#}"))
}

/// As [`replay`], all of it secret, with this percentage of what can be converted in place.
fn replay_in_place(events: u64, percent: u8) -> String {
    replay(events, "all") + &format!("in_place = {percent}\n")
}

fn stress() -> Check {
    let config = "[guest]\nmemory_mib = 64\nfill = 0xa5\n[allocator]\non_free = \"poison\"\n\
                  [workload]\nprogram = \"stress\"\noperations = 1500\nmax_order = 6\n";
    let run = lacuna(config, &["--seed", "5"])?;
    run.clean()?;
    for counter in ["alloc", "alloc_secret", "flip_to_unmapped", "tags_checked", "poison_checked"] {
        ensure(run.counter(counter) > 0, &format!("{counter} is 0"))?;
    }
    Ok(())
}

fn quickstart() -> Check {
    let file = repository().join("configs/quickstart.toml");
    let output = Command::new(LACUNA).arg("run").arg(file).args(["--report", "json"]).output()?;
    let run = Run::of(&output)?;
    run.clean()?;
    for rule in [
        "direct-map-alias",
        "foreign-alias",
        "global-window",
        "stale-direct-map",
        "stale-window",
        "stale-table",
        "second-stage-open",
        "residue",
        "table-alias",
        "write-execute",
        "user-access",
        "control-state",
        "trace-honesty",
    ] {
        ensure(run.check(rule, "checked") > 0, &format!("{rule} was never checked"))?;
    }
    for counter in [
        "alloc",
        "alloc_secret",
        "flip_to_unmapped",
        "flip_to_mapped",
        "splits",
        "merges",
        "converted",
        "restored",
        "shootdowns",
        "window_flushes",
        "seals",
        "opens",
        "gate_calls",
        "events",
    ] {
        ensure(run.counter(counter) > 0, &format!("the counter {counter} is zero"))?;
    }
    ensure(run.counter("work") >= 2000, "fewer than 2,000 events of the recording")
}

fn clean_replay(seal: &str) -> Check {
    let run = lacuna(&dirty(&replay(EVENTS, "all")), &["--seal", seal])?;
    run.clean()?;
    ensure(run.report["second_stage"]["backend"] == *seal, "the report names another seal")?;
    let (all, secret) = (run.counter("alloc"), run.counter("alloc_secret"));
    ensure(all == secret && all > 0, &format!("{secret} of {all} are secret"))?;
    ensure(run.counter("window_flushes") > 0, "no window wrapped")?;
    let (checked, not) =
        (run.check("second-stage-open", "checked"), run.check("second-stage-open", "not_checked"));
    match seal {
        "guard" => ensure(checked > 0 && not == 0, &format!("{checked} checked, {not} not")),
        "memslot" => ensure(checked > 0, "nothing was checked"),
        _ => ensure(not > 0, "the seal is off, but nothing counts as not checked"),
    }
}

/// Every secret page that can be is converted in place.
fn clean_in_place(seal: &str) -> Check {
    let run = lacuna(&dirty(&replay_in_place(EVENTS, 100)), &["--seal", seal])?;
    run.clean()?;
    let converted = run.counter("converted");
    ensure(converted > 50, &format!("{converted} allocations were converted"))?;
    ensure(run.counter("restored") == converted, "not all were mapped again")?;
    let (splits, merges) = (run.counter("splits"), run.counter("merges"));
    ensure(splits > 0 && splits == merges, &format!("{splits} splits, {merges} merges"))?;
    ensure(run.counter("nr_table_pages") == 0, "a table is left")?;
    ensure(run.check("stale-table", "checked") >= 3 * splits, "tables were not checked")?;
    ensure(run.counter("tags_checked") > converted, "the contents were not checked")
}

/// Every order below a pageblock's, in several pageblocks, freed in another order than they came.
fn orders_in_place() -> Check {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("orders.csv");
    let allocs = (0..9).map(|order| format!("{order},0,A,{order},{order},0,GFP_HIGHUSER\n"));
    let frees = [4, 8, 0, 2, 6, 7, 1, 3, 5].into_iter().zip(9..);
    let frees = frees.map(|(id, time)| format!("{time},0,F,{id},{id},,\n"));
    let lines: String = allocs.chain(frees).collect();
    std::fs::write(&path, format!("t_us,cpu,op,id,order,migratetype,gfp\n{lines}"))?;
    let config = dirty(&format!(
        "program = \"replay\"\ninput = {path:?}\nsecret = \"all\"\nin_place = 100\n"
    ));
    let run = lacuna(&config, &[])?;
    run.clean()?;
    let (converted, pages) = (run.counter("converted"), run.counter("converted_pages"));
    ensure((converted, pages) == (9, 511), &format!("{converted} converted, {pages} pages"))?;
    // Each page's tag is checked when it has become secret, and before it is freed.
    let tags = run.counter("tags_checked");
    ensure(tags == 2 * 511, &format!("{tags} tags were checked"))
}

fn nothing_secret() -> Check {
    let run = lacuna(&dirty(&replay(200, "none")), &[])?;
    run.clean()?;
    ensure(run.counter("alloc") > 0 && run.counter("seals") == 0, "something was sealed")
}

fn dirty_zone() -> Check {
    let run = lacuna(&dirty(&replay(150, "user")), &[])?;
    run.clean()?;
    ensure(run.check("residue", "checked") > 0, "residue was not checked")
}

fn no_prezero() -> Check {
    let config = dirty(&replay(EVENTS, "all")).replace("[guest]\n", "[guest]\nprezero = false\n");
    let run = lacuna(&config, &[])?;
    run.clean()?;
    ensure(run.counter("zeroed_flip") == 0, "pages were zeroed at the flip")?;
    ensure(run.counter("zeroed_alloc") > 0, "no page was zeroed when it was handed out")
}

/// Six of eight pageblocks are secret and freed; then six mapped blocks are wanted at once, which
/// only blocks that flip back can serve.
fn pressure() -> Check {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("pressure.csv");
    let mut csv = String::from("t_us,cpu,op,id,order,migratetype,gfp\n");
    let secret = "GFP_HIGHUSER";
    let mapped = "GFP_KERNEL";
    for (round, gfp) in [secret, mapped].into_iter().enumerate() {
        let ids = || (0..6).map(|i| round * 6 + i);
        for id in ids() {
            csv += &format!("{id},0,A,{id},9,0,{gfp}\n");
        }
        for id in ids() {
            csv += &format!("{},0,F,{id},9,,\n", id + 6);
        }
    }
    // Times must not go back.
    let lines: Vec<_> = csv.lines().map(str::to_owned).collect();
    let mut sorted = lines[..1].to_vec();
    for (time, line) in lines[1..].iter().enumerate() {
        let rest = line.split_once(',').ok_or("a line without columns")?.1;
        sorted.push(format!("{time},{rest}"));
    }
    std::fs::write(&path, sorted.join("\n") + "\n")?;
    let config = format!(
        "[guest]\nmemory_mib = 16\nfill = 0xA5\n[workload]\nprogram = \"replay\"\ninput = {path:?}\n"
    );
    let run = lacuna(&config, &[])?;
    run.clean()?;
    ensure(run.counter("alloc_secret") == 6 && run.counter("alloc") == 12, "not all were served")?;
    ensure(run.counter("alloc_fail") == 0, "a mapped request failed although blocks were free")?;
    let back = run.counter("flip_to_mapped");
    ensure(back >= 6, &format!("{back} blocks came back"))
}

fn determinism() -> Check {
    let config = dirty(&replay(150, "user"));
    let (a, b) = (lacuna(&config, &[])?, lacuna(&config, &[])?);
    ensure(a.report["checks"] == b.report["checks"], "the checks differ")?;
    ensure(a.report["counters"] == b.report["counters"], "the counters differ")
}

/// Text that does not repeat.
fn secret_text() -> Vec<u8> {
    let mut state = 0x1234_5678_9abc_def1_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        b'!' + (state % 90) as u8
    };
    (0..9000).map(|_| next()).collect()
}

fn secrets() -> Check {
    let folder = tempfile::tempdir()?;
    let input = folder.path().join("secret.bin");
    std::fs::write(&input, secret_text())?;
    let out = folder.path().join("out");
    for seal in ["guard", "memslot", "off"] {
        let config = dirty(&format!("program = \"secrets\"\ninput = {input:?}\n"));
        let out = out.join(seal);
        let run = lacuna(&config, &["--seal", seal, "--out", &out.display().to_string(), "-v"])?;
        run.clean()?;
        ensure(run.check("input-leak", "checked") > 0, "nothing was searched")?;
        ensure(run.counter("work") >= 3, "fewer than three pages were stored")?;
        ensure(run.counter("converted") == 1, "not every other page was converted in place")?;
        let text = secret_text();
        for entry in std::fs::read_dir(&out)? {
            let path = entry?.path();
            let bytes = std::fs::read(&path)?;
            let leaked = text.windows(16).any(|run| bytes.windows(16).any(|b| b == run));
            ensure(!leaked, &format!("{} holds the secret", path.display()))?;
        }
    }
    Ok(())
}

fn plain_secret() -> Check {
    let folder = tempfile::tempdir()?;
    let input = folder.path().join("plain.bin");
    std::fs::write(&input, [7; 64])?;
    let run = lacuna(&dirty(&format!("program = \"secrets\"\ninput = {input:?}\n")), &[])?;
    run.expect(5, "inconclusive")?;
    ensure(run.check("input-leak", "not_checked") > 0, "it does not count as not checked")
}

fn required_rule() -> Check {
    let config = "[workload]\nprogram = \"idle\"\n[audit]\nrequire = [\"residue\"]\n";
    let run = lacuna(config, &[])?;
    run.expect(5, "inconclusive")?;
    ensure(run.report["inconclusive"].to_string().contains("residue"), "the reason names no rule")
}

fn expected_access() -> Check {
    let config = "[workload]\nprogram = \"idle\"\n[audit]\nexpect = [\"sealed-access\"]\n";
    lacuna(config, &[])?.expect(5, "inconclusive")
}

fn sealed_touch(touch: &str, kind: &str, seal: &str) -> Check {
    let second = match seal {
        "memslot" => "seal = \"memslot\"",
        "mprotect" => "seal = \"guard\"\nguard = \"mprotect\"",
        _ => "seal = \"guard\"",
    };
    // A touch of a sealed frame is possible only through a mapping that should be gone.
    let expect = match touch {
        "page-walk" => "\"sealed-access\", \"foreign-alias\", \"table-alias\"",
        _ => "\"sealed-access\", \"foreign-alias\"",
    };
    let config = format!(
        "[guest]\nmemory_mib = 16\n[workload]\nprogram = \"touch\"\ntouch = \"{touch}\"\n[second_stage]\n{second}\n"
    );
    let run = lacuna(&config, &[])?;
    ensure(run.status == 1, &format!("unexpected: a violation is left\n{:#}", run.report))?;
    let access = &run.report["sealed_accesses"][0];
    ensure(access["kind"] == kind, &format!("expected a {kind}:\n{:#}", run.report))?;
    ensure(access["gpa"].as_str().is_some_and(|gpa| gpa.starts_with("0x10")), "no address")?;
    ensure(access["vcpu"] == 0, "no vCPU")?;
    ensure(access["rip"].as_str().is_some_and(|rip| rip.starts_with("0xffff")), "no RIP")?;
    // With all of it expected, the run passes.
    let run = lacuna(&format!("{config}[audit]\nexpect = [{expect}]\n"), &[])?;
    run.expect(0, "pass")
}

fn crash_is_reported(crash: &str, needles: &[&str]) -> Check {
    let config =
        format!("[guest]\nmemory_mib = 16\n[workload]\nprogram = \"crash\"\ncrash = \"{crash}\"\n");
    // An IDT that cannot deliver anything is not the one that the guest registered.
    let config = match crash {
        "triple-fault" => config + "[audit]\nexpect = [\"control-state\"]\n",
        _ => config,
    };
    let run = lacuna(&config, &[])?;
    run.expect(4, "guest-error")?;
    let error = &run.report["guest_error"];
    let message = error["message"].as_str().unwrap_or_default();
    for needle in needles {
        let found = message.contains(needle) || error["kind"] == *needle;
        ensure(found, &format!("{needle:?} is missing in {error:#}"))?;
    }
    let frames = error["backtrace"].as_array().map_or(0, Vec::len);
    ensure(frames > 0 || crash == "triple-fault", &format!("no backtrace: {error:#}"))?;
    let named = error["backtrace"].to_string().contains("crash");
    ensure(named || ["panic", "triple-fault"].contains(&crash), &format!("no names: {error:#}"))
}

fn hang() -> Check {
    for crash in ["hang", "halt"] {
        let config = format!(
            "[guest]\nmemory_mib = 16\n[workload]\nprogram = \"crash\"\ncrash = \"{crash}\"\n[limits]\ntimeout_s = 1\n"
        );
        let started = Instant::now();
        let run = lacuna(&config, &[])?;
        run.expect(4, "guest-error")?;
        ensure(run.report["guest_error"]["kind"] == "timeout", "the kind is not timeout")?;
        ensure(started.elapsed() < Duration::from_secs(20), "it took too long")?;
    }
    Ok(())
}

fn ctrl_c() -> Check {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("hang.toml");
    std::fs::write(
        &file,
        "[guest]\nmemory_mib = 16\n[workload]\nprogram = \"crash\"\ncrash = \"hang\"\n",
    )?;
    let child = Command::new(LACUNA)
        .arg("run")
        .arg(&file)
        .args(["--report", "json", "--out"])
        .arg(folder.path().join("out"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    std::thread::sleep(Duration::from_millis(500));
    let told = Instant::now();
    let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status()?;
    ensure(killed.success(), "kill failed")?;
    let run = Run::of(&child.wait_with_output()?)?;
    ensure(told.elapsed() < Duration::from_secs(5), "it did not end at once")?;
    run.expect(5, "inconclusive")?;
    ensure(
        run.report["inconclusive"].to_string().contains("interrupted"),
        "the reason is missing",
    )?;
    ensure(folder.path().join("out/report.json").is_file(), "no report was left")
}

fn out_folder() -> Check {
    let folder = tempfile::tempdir()?;
    let out: PathBuf = folder.path().join("new/out");
    let run = lacuna(&dirty(&replay(200, "user")), &["--out", &out.display().to_string()])?;
    run.clean()?;
    let written: Value = serde_json::from_slice(&std::fs::read(out.join("report.json"))?)?;
    ensure(written == run.report, "the file is not the report")?;
    ensure(out.join("guest.log").is_file(), "no guest log")?;
    let events = std::fs::File::open(out.join("events.bin"))?;
    let mut last = 0;
    let mut count = 0_u64;
    let mut ordered = true;
    lacuna::events::read_events(std::io::BufReader::new(events), &mut |record| {
        ordered &= record.seq > last;
        last = record.seq;
        count += 1;
    })?;
    ensure(ordered && count > run.counter("events"), &format!("{count} events, ordered: {ordered}"))
}

fn bad_calls() -> Check {
    let config =
        "[guest]\nmemory_mib = 16\n[workload]\nprogram = \"crash\"\ncrash = \"bad-calls\"\n";
    let run = lacuna(config, &[])?;
    run.expect(0, "pass")?;
    ensure(run.counter("gate_refused") > 100, "few calls were refused")
}

fn foreign_image() -> Check {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("test.toml");
    std::fs::write(folder.path().join("x.elf"), "not an image")?;
    std::fs::write(&file, "[guest]\nimage = \"x.elf\"\n[workload]\nprogram = \"idle\"\n")?;
    let output = Command::new(LACUNA).arg("run").arg(&file).output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure(output.status.code() == Some(2), &format!("status {:?}", output.status))?;
    ensure(stderr.contains("ELF"), &format!("the message: {stderr}"))
}
