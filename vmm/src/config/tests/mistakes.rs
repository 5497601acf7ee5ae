//! Each mistake gives a message with file, line, field and remedy.

use super::*;
use lacuna_abi::layout::MAX_INPUT;
use std::os::unix::fs::symlink;

#[test]
fn each_mistake_is_named_with_line_field_and_remedy() {
    for (text, message) in [
        (
            "[guest]\nmemory_mib = \"64\"\n",
            ":2: [guest] memory_mib: invalid type: string \"64\", expected i64; give an even",
        ),
        ("[guest]\nmemory_mib = 14\n", ":2: [guest] memory_mib: 14 is out of range; give an even"),
        ("[guest]\n\nmemory_mib = 65538\n", ":3: [guest] memory_mib: 65538 is out of range; give"),
        ("[guest]\nmemory_mib = -64\n", ":2: [guest] memory_mib: -64 is out of range; give"),
        ("[guest]\nmemory_mib = 17\n", ":2: [guest] memory_mib: 17 is odd; give an even"),
        ("[guest]\nmemory_mib = 99999999999999999999\n", ":2: [guest] memory_mib: "),
        ("[guest]\nvcpus = 0\n", ":2: [guest] vcpus: 0 is out of range; give a number from 1 to 8"),
        ("[guest]\nvcpus = 9\n", ":2: [guest] vcpus: 9 is out of range; give a number from 1 to 8"),
        (
            "[guest]\nvcpus = -1\n",
            ":2: [guest] vcpus: -1 is out of range; give a number from 1 to 8",
        ),
        (
            "[guest]\nshootdown = \"nmi\"\n[workload]\nprogram = \"idle\"\n",
            ":2: [guest] shootdown: \"nmi\" is not known; give \"x2apic\" or \"gate\"",
        ),
        (
            "[guest]\nvcpus = 1\n[workload]\nprogram = \"crash\"\ncrash = \"stuck-cpu\"\n",
            ":2: [guest] vcpus: crash = \"stuck-cpu\" needs at least 2; give a number from 2 to 8",
        ),
        (
            "[workload]\nprogram = \"idle\"\n[limits]\nshootdown_s = 0\n",
            ":4: [limits] shootdown_s: 0 is out of range; give a number of seconds from 1",
        ),
        ("[guest]\nfill = 256\n", ":2: [guest] fill: 256 is out of range; give a byte"),
        (
            "[guest]\nfill = 1\nmemory_mib = 1026\n",
            ":2: [guest] fill: 1026 MiB are too many to be filled; give a byte, 0 to 255, with",
        ),
        (
            "[guest]\nprezero = 1\n",
            ":2: [guest] prezero: invalid type: integer `1`, expected a boolean; give true or",
        ),
        ("[guest]\nseed = -1\n", ":2: [guest] seed: -1 is out of range; give a number"),
        ("[guest]\nimage = \"no.elf\"\n", ":2: [guest] image: "),
        ("[gest]\nvcpus = 1\n", ":1: [gest]: there is no such section; the sections are [guest]"),
        ("vcpus = 1\n", ":1: [vcpus]: there is no such section; the sections are [guest]"),
        ("guest = 1\n", ":1: [guest]: this must be a section; write it as [guest]"),
        ("[guest]\nvcpus = 1\nvcpus = 1\n", ":3: this is not TOML: duplicate key"),
        ("[guest\n", ":1: this is not TOML: "),
        ("[guest]\nvcpus =\n", ":2: this is not TOML: "),
        ("", ": [workload] program: it is missing; give \"replay\", \"secrets\""),
        ("\n[workload]\nevents = 1\n", ":2: [workload] program: it is missing; give"),
        (
            "[workload]\nprogram = \"replays\"\n",
            ":2: [workload] program: \"replays\" is not known; give \"replay\"",
        ),
        (
            "[workload]\nprogram = \"replay\"\n",
            ":1: [workload] input: program = \"replay\" needs it; give the path of a file,",
        ),
        (
            "[workload]\nprogram = \"secrets\"\n",
            ":1: [workload] input: program = \"secrets\" needs it",
        ),
        (
            "[workload]\nprogram = \"touch\"\n",
            ":1: [workload] touch: program = \"touch\" needs it; give \"read\", \"write\"",
        ),
        (
            "[workload]\nprogram = \"crash\"\n",
            ":1: [workload] crash: program = \"crash\" needs it; give \"panic\"",
        ),
        (
            "[workload]\nprogram = \"touch\"\ntouch = \"lick\"\n",
            ":3: [workload] touch: \"lick\" is not known; give",
        ),
        (
            "[workload]\nprogram = \"crash\"\ncrash = \"read\"\n",
            ":3: [workload] crash: \"read\" is not known",
        ),
        (
            "[workload]\nprogram = \"idle\"\ntouch = \"read\"\n",
            ":3: [workload] touch: it belongs to program = \"touch\", not \"idle\"; remove it,",
        ),
        (
            "[workload]\nprogram = \"idle\"\ninput = \"in.csv\"\n",
            ":3: [workload] input: it belongs to program = \"replay\" or \"secrets\", not",
        ),
        (
            "[workload]\nprogram = \"secrets\"\nevents = 3\n",
            ":3: [workload] events: it belongs to program = \"replay\"",
        ),
        (
            "[workload]\nprogram = \"replay\"\ninput = \"in.csv\"\nevents = 0\n",
            ":4: [workload] events: 0 is out of range; give a number of events, at least",
        ),
        (
            "[workload]\nprogram = \"replay\"\ninput = \"in.csv\"\nsecret = \"some\"\n",
            ":4: [workload] secret: \"some\" is not known; give \"user\"",
        ),
        (
            "[workload]\nprogram = \"replay\"\ninput = \"in.csv\"\nsecret = []\n",
            ":4: [workload] secret: the list is empty; give",
        ),
        (
            "[workload]\nprogram = \"replay\"\ninput = \"in.csv\"\nsecret = [\"user\"]\n",
            ":4: [workload] secret: \"user\" cannot be the name of a flag; give",
        ),
        (
            "[workload]\nprogram = \"replay\"\ninput = \"in.csv\"\nsecret = 5\n",
            ":4: [workload] secret: neither a text nor a list of texts; give \"user\"",
        ),
        (
            "[second_stage]\nseal = \"ept\"\n",
            ":2: [second_stage] seal: \"ept\" is not known; give \"auto\", \"memslot\"",
        ),
        (
            "[second_stage]\nguard = \"off\"\n",
            ":2: [second_stage] guard: \"off\" is not known; give \"auto\", \"madvise\"",
        ),
        ("[second_stage]\nvma_budget = 0\n", ":2: [second_stage] vma_budget: 0 is out of range"),
        (
            "[audit]\nquiesce_every = 0\n",
            ":2: [audit] quiesce_every: 0 is out of range; give a number of events, at least",
        ),
        (
            "[audit]\nrequire = [\n  \"residue\",\n  \"tidiness\",\n]\n",
            ":4: [audit] require: there is no rule \"tidiness\"; known: direct-map-alias,",
        ),
        (
            "[audit]\nrequire = [\"sealed-access\"]\n",
            ":2: [audit] require: there is no rule \"sealed-access\"",
        ),
        (
            "[audit]\nexpect = [\"\\u001b[1m\"]\n",
            ":2: [audit] expect: there is no rule \"\\u{1b}[1m\"; known: direct-map-alias,",
        ),
        (
            "[audit]\nexpect = \"residue\"\n",
            ":2: [audit] expect: invalid type: string \"residue\", expected a sequence; give a",
        ),
        (
            "[limits]\ntimeout_s = 0\n",
            ":2: [limits] timeout_s: 0 is out of range; give a number of seconds from 1 to",
        ),
        (
            "[limits]\ntimeout_s = 1.5\n",
            ":2: [limits] timeout_s: invalid type: floating point `1.5`, expected i64; give a",
        ),
        ("[limits]\nguest_log_kib = 0\n", ":2: [limits] guest_log_kib: 0 is out of range"),
        ("[limits]\nevents_mib = 16385\n", ":2: [limits] events_mib: 16385 is out of range"),
    ] {
        // A mistake in another section must not hide behind the missing program.
        let whole = if text.contains("workload") || text.is_empty() {
            text.to_owned()
        } else {
            format!("{text}{IDLE}")
        };
        let error = refused(&whole);
        assert!(error.starts_with(message), "{text}\ngave     {error}\nnot      {message}");
    }
}

#[test]
fn an_input_that_cannot_be_used_is_named() {
    let folder = folder();
    fs::write(folder.path().join("empty"), "").unwrap();
    symlink("loop", folder.path().join("loop")).unwrap();
    fs::create_dir(folder.path().join("dir")).unwrap();
    let large = fs::File::create(folder.path().join("large")).unwrap();
    large.set_len(MAX_INPUT + 1).unwrap();
    let config = folder.path().join("test.toml");
    for (name, what) in [
        ("none", "does not exist; check the path"),
        ("empty", "is empty; name a file"),
        ("loop", "cannot be read: "),
        ("dir", "is a directory; name a file"),
        ("large", "is larger than 4 MiB; name a smaller file"),
        ("/dev/null", "is no regular file; copy it"),
    ] {
        let text = format!("[workload]\nprogram = \"secrets\"\ninput = \"{name}\"\n");
        let error = Config::from_text(&config, &text, &Overrides::default()).unwrap_err();
        let path = folder.path().join(name);
        let message = format!(":3: [workload] input: {} {what}", path.display());
        assert!(tail(&error).starts_with(&message), "{error}");
        // By flag, the path is not relative to the file, and the flag is to blame.
        let overrides = Overrides { input: Some(path.clone()), ..Overrides::default() };
        let error = Config::from_text(&config, &text, &overrides).unwrap_err().to_string();
        assert!(error.starts_with(&format!("--input: {} {what}", path.display())), "{error}");
    }
}

#[test]
fn a_file_that_is_no_configuration_is_named() {
    let folder = folder();
    let load = |name: &str| {
        let path = folder.path().join(name);
        Config::load(&path, &Overrides::default()).unwrap_err()
    };
    fs::write(folder.path().join("latin.toml"), b"[guest]\n# caf\xe9\n").unwrap();
    fs::write(folder.path().join("large.toml"), vec![b'#'; (1 << 20) + 1]).unwrap();
    for (name, message) in [
        ("none.toml", "/none.toml: the file does not exist; check the path"),
        ("", "/: this is a directory; name a configuration file"),
        ("in.csv/x", "/in.csv/x: the file cannot be read: "),
        ("latin.toml", "/latin.toml:2: the file is not UTF-8 text; save it as UTF-8"),
        ("large.toml", "/large.toml: the file is larger than 1 MiB; this is no configuration"),
    ] {
        let error = load(name).to_string();
        let expected = format!("{}{message}", folder.path().display());
        assert!(error.starts_with(&expected), "{error}");
    }
    let unreadable = Config::load(Path::new("/proc/self/mem"), &Overrides::default());
    let error = unreadable.unwrap_err().to_string();
    assert!(error.starts_with("/proc/self/mem: the file cannot be read: "), "{error}");
}

#[test]
fn what_a_simulated_machine_cannot_do_is_refused() {
    let sim = Overrides { machine: Some(MachineKind::Sim), ..Overrides::default() };
    for (workload, message) in [
        (
            "\"touch\"\ntouch = \"fetch\"\n",
            "--machine: a simulated CPU cannot touch a frame by \"fetch\"",
        ),
        (
            "\"crash\"\ncrash = \"triple-fault\"\n",
            "--machine: a simulated CPU cannot fail by \"triple-fault\"",
        ),
    ] {
        let error = loaded(&format!("[workload]\nprogram = {workload}"), &sim).unwrap_err();
        assert!(error.to_string().starts_with(message), "{error}");
        assert!(error.to_string().ends_with("; use --machine kvm"), "{error}");
    }
    for workload in ["\"touch\"\ntouch = \"page-walk\"\n", "\"crash\"\ncrash = \"panic\"\n"] {
        loaded(&format!("[workload]\nprogram = {workload}"), &sim).unwrap();
    }
    let folder = folder();
    let image = format!("[guest]\nimage = {:?}\n{IDLE}", folder.path().join("in.csv"));
    let error = loaded(&image, &sim).unwrap_err().to_string();
    assert!(error.starts_with("--machine: a simulated machine runs no image"), "{error}");
}

#[test]
fn several_cpus_are_for_simulated_machines() {
    let sim = Overrides { machine: Some(MachineKind::Sim), ..Overrides::default() };
    for cpus in [1, 2, 8] {
        let config = loaded(&format!("[guest]\nvcpus = {cpus}\n{IDLE}"), &sim).unwrap();
        assert_eq!(config.guest.vcpus, cpus);
    }
    assert!(loaded(&format!("[guest]\nvcpus = 9\n{IDLE}"), &sim).is_err());
}

#[test]
fn what_this_version_lacks_is_refused_by_its_flag() {
    let none = Overrides::default;
    let folder = folder();
    let file = folder.path().join("in.csv");
    for (overrides, message) in [
        (
            Overrides {
                mediate: Some(Mediation::Step),
                step_from: Some(7),
                step_to: Some(6),
                ..none()
            },
            "--step-to: event 6 comes before event 7",
        ),
        (Overrides { step_from: Some(0), ..none() }, "--step-from: it belongs to --mediate step"),
        (Overrides { step_to: Some(0), ..none() }, "--step-to: it belongs to --mediate step"),
        (
            Overrides { record: true, ..none() },
            "--record: a recording needs a folder to lie in; add",
        ),
        (
            Overrides { inject: vec!["skip-everything".into()], ..none() },
            "--inject: there is no fault \"skip-everything\"; the faults are skip-flip-flush, ",
        ),
        (Overrides { out: Some(file), ..none() }, "--out: "),
        (
            Overrides { input: Some("x".into()), ..none() },
            "--input: the program \"idle\" has no input; leave it out",
        ),
    ] {
        let error = loaded(IDLE, &overrides).unwrap_err();
        assert!(matches!(*error.place, Place::Flag(_)));
        assert!(error.to_string().starts_with(message), "{error}");
    }
}
