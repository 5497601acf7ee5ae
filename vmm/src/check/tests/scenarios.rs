//! Scenarios: what they make, and what is said of those that are wrong.

use super::super::suite::Suite;
use super::*;
use crate::audit::Rule;
use crate::config::Workload;
use std::fs;

#[test]
fn axes_make_cases_with_stable_names() {
    let text = scenario(
        "seal = [\"guard\", \"off\"]\nvcpus = [1, 2]\n[[scenario.fault]]\ninject = [\"skip-seal\", \"wrong-cpu-window\"]\nseal = [\"off\"]",
    );
    let expected = [
        "some/sim/trace/guard/vcpus=1/clean",
        "some/sim/trace/guard/vcpus=2/clean",
        "some/sim/trace/off/vcpus=1/clean",
        "some/sim/trace/off/vcpus=2/clean",
        "some/sim/trace/off/vcpus=1/skip-seal",
        "some/sim/trace/off/vcpus=2/skip-seal",
        // With one vCPU there is no other CPU's window.
        "some/sim/trace/off/vcpus=2/wrong-cpu-window",
    ];
    assert_eq!(names(&text), expected);
}

#[test]
fn without_axes_the_configuration_says_where_it_runs() {
    let text = "[scenario]\nrequire = []\n[guest]\nvcpus = 3\n[workload]\nprogram = \"idle\"\n\
                [second_stage]\nseal = \"memslot\"\n";
    assert_eq!(names(text), ["some/kvm/trace/memslot/vcpus=3/clean"]);
}

#[test]
fn fields_vary_in_all_combinations_and_reach_the_configuration() {
    let text = "[scenario]\nmachine = [\"sim\"]\nrequire = []\nvcpus = [4]\n\
                [scenario.vary]\n\"workload.max_order\" = [0, 3]\n\"guest.seed\" = [7, 8]\n\
                [workload]\nprogram = \"stress\"\nmax_order = 9\n";
    let cases = cases(text);
    let names: Vec<_> = cases.iter().map(|case| case.name.as_str()).collect();
    assert_eq!(
        names,
        [
            "some/sim/trace/auto/vcpus=4/seed=7/max_order=0/clean",
            "some/sim/trace/auto/vcpus=4/seed=7/max_order=3/clean",
            "some/sim/trace/auto/vcpus=4/seed=8/max_order=0/clean",
            "some/sim/trace/auto/vcpus=4/seed=8/max_order=3/clean",
        ]
    );
    let config = cases[1].config().unwrap();
    assert_eq!((config.guest.seed, config.guest.vcpus), (7, 4));
    assert!(matches!(config.workload, Workload::Stress { max_order: 3, .. }));
}

#[test]
fn what_must_be_exercised_comes_from_the_scenario_and_its_configuration() {
    let text = scenario("seal = [\"guard\", \"off\"]").replace(
        "require = [\"table-alias\"]",
        "require = [\"table-alias\", \"second-stage-open\"]",
    ) + "[audit]\nrequire = [\"control-state\"]\n";
    let cases = cases(&text);
    let always = [Rule::ControlState, Rule::TableAlias];
    assert_eq!(cases[0].require, [&always[..], &[Rule::SecondStageOpen]].concat());
    // Where nothing is closed, that cannot be exercised.
    assert_eq!(cases[1].require, always);
}

#[test]
fn quick_cases_are_those_of_the_patterns_or_all() {
    let text = |quick| scenario(&format!("seal = [\"guard\", \"off\"]\n{quick}"));
    let quick = |text: &str| cases(text).iter().map(|case| case.quick).collect::<Vec<_>>();
    assert_eq!(quick(&text("")), [true, true]);
    assert_eq!(quick(&text("quick = []")), [false, false]);
    assert_eq!(quick(&text("quick = [\"*/off/*\"]")), [false, true]);
}

#[test]
fn mistakes_are_named_with_file_line_field_and_remedy() {
    let fault = "[[scenario.fault]]\ninject = [\"skip-seal\"]\n";
    for (lines, needles) in [
        (
            "sael = [\"off\"]",
            &["some.toml:4: [scenario] sael: there is no such field; known: "][..],
        ),
        ("seal = \"off\"", &["some.toml:4: [scenario] seal: ", "give a list of \"guard\""]),
        (
            "seal = [\"off\", \"wax\"]",
            &["some.toml:4: [scenario] seal: \"wax\" is not known; give"],
        ),
        ("seal = []", &["some.toml:4: [scenario] seal: without a value there is no case"]),
        ("vcpus = [1, 9]", &["some.toml:4: [scenario] vcpus: 9 is out of range", "1 to 8"]),
        ("vcpus = [2, 2]", &["some.toml:4: [scenario] vcpus: it is there twice"]),
        ("mediate = [\"ear\"]", &["some.toml:4: [scenario] mediate: \"ear\" is not known"]),
        ("timeout_s = 0", &["some.toml:4: [scenario] timeout_s: 0 is out of range"]),
        (
            "expect = \"resdue\"",
            &["some.toml:4: [scenario] expect: there is no rule \"resdue\"; known: "],
        ),
        ("message = \"x\"", &["some.toml:4: [scenario] message: nothing is said where \"pass\""]),
        ("quick = [\"*/kvm/*\"]", &["some.toml:4: [scenario] quick: no case matches \"*/kvm/*\""]),
        ("leave_out = [\"*/kvm/*\"]", &["some.toml:4: [scenario] leave_out: no case matches"]),
        ("quick = [\"[\"]", &["some.toml:4: [scenario] quick: \"[\" is no pattern"]),
        (
            "config = \"no.toml\"",
            &["some.toml:4: [scenario] config: the file has a section [workload]"],
        ),
        (
            "vary = { \"guest.vcps\" = [1] }",
            &["some.toml:4: [scenario] vary: no configuration has a field"],
        ),
        ("vary = { \"guest.vcpus\" = [1] }", &["some.toml:4: [scenario] vary", "use vcpus = "]),
        ("vary = { \"guest.seed\" = [] }", &["some.toml:4: [scenario] vary", "no values"]),
        (
            "vary = { \"guest.memory_mib\" = [64, 63] }",
            &["some.toml:4: [guest] memory_mib: 63 is odd"],
        ),
        (
            "vary = { \"guest.memory_mib\" = [\"x\"] }",
            &["some.toml:4: [guest] memory_mib: ", "16 to 65536"],
        ),
        (
            "[[scenario.fault]]\ninject = [\"skip-sael\"]",
            &["some.toml:5: [scenario] fault: there is no fault \"skip-sael\"; the faults are"],
        ),
        (
            "[[scenario.fault]]\nrule = \"residue\"",
            &["some.toml:4: [scenario] fault: inject is missing"],
        ),
        (
            "[[scenario.fault]]\ninject = [\"wrong-cpu-window\"]",
            &["fault: wrong-cpu-window is no fault with fewer than 2 vCPUs; add 2 to vcpus"],
        ),
        (
            "[[scenario.fault]]\ninject = [\"forged-flush\"]",
            &["fault: forged-flush is found under step only; add \"step\" to mediate"],
        ),
        (
            &format!("{fault}frame = \"5\""),
            &["some.toml:6: [scenario] fault: frame: \"5\" is no address"],
        ),
        (&format!("{fault}vcpu = 8"), &["some.toml:6: [scenario] fault: 8 is out of range"]),
        (&format!("{fault}cpu = 1"), &["some.toml:6: [scenario] fault: unknown field `cpu`"]),
        (
            &format!("expect = \"residue\"\n{fault}"),
            &["fault: without its faults the scenario is not clean"],
        ),
    ] {
        let error = refused(&scenario(lines));
        for needle in needles {
            assert!(error.contains(needle), "{lines}: {needle:?} is missing in {error}");
        }
    }
}

#[test]
fn a_case_that_would_be_there_twice_is_refused() {
    let fault = "[[scenario.fault]]\ninject = [\"skip-seal\"]\n";
    let error = refused(&scenario(&format!("{fault}{fault}seal = [\"off\", \"auto\"]\n")));
    let what = "fault: that makes the case some/sim/trace/auto/vcpus=1/skip-seal twice; leave one";
    assert!(error.contains(what), "{error}");
    let error = refused(&scenario("vary = { \"guest.seed\" = [1, 1] }"));
    assert!(error.contains("vary: that makes the case some/sim/trace/auto/vcpus=1/seed=1/clean"));
}

#[test]
fn a_scenario_that_requires_nothing_must_say_so() {
    let text = scenario("").replace("require = [\"table-alias\"]", "");
    assert!(refused(&text).contains("some.toml:1: [scenario] require: it is missing"));
    assert_eq!(cases(&text.replace("[scenario]", "[scenario]\nrequire = []")).len(), 1);
    let crashes = text.replace("[scenario]", "[scenario]\nexpect = \"guest-error\"");
    assert_eq!(cases(&crashes)[0].name, "some/sim/trace/auto/vcpus=1/guest-error");
}

#[test]
fn a_lie_is_planted_only_where_somebody_looks() {
    let text = scenario(
        "mediate = [\"trace\", \"tables\", \"step\"]\n[[scenario.fault]]\n\
         inject = [\"forged-flush\", \"forged-table-write\"]",
    );
    let planted = names(&text).into_iter().filter(|name| !name.ends_with("clean"));
    assert_eq!(
        planted.collect::<Vec<_>>(),
        [
            "some/sim/step/auto/vcpus=1/forged-flush",
            "some/sim/tables/auto/vcpus=1/forged-table-write",
            "some/sim/step/auto/vcpus=1/forged-table-write",
        ]
    );
}

#[test]
fn cases_of_these_patterns_are_left_out() {
    let text = scenario(
        "mediate = [\"trace\", \"step\"]\nseal = [\"guard\", \"off\"]\n\
         leave_out = [\"*/step/off/*\"]\nquick = [\"*/off/*\"]",
    );
    let cases = cases(&text);
    let names: Vec<_> = cases.iter().map(|case| (case.name.as_str(), case.quick)).collect();
    assert_eq!(
        names,
        [
            ("some/sim/trace/guard/vcpus=1/clean", false),
            ("some/sim/trace/off/vcpus=1/clean", true),
            ("some/sim/step/guard/vcpus=1/clean", false),
        ]
    );
}

#[test]
fn a_file_without_the_section_is_no_scenario() {
    assert!(refused("[workload]\nprogram = \"idle\"\n").contains("add the section [scenario]"));
    assert!(refused("[scenario\n").contains("some.toml:1: this is not TOML"));
}

#[test]
fn a_plain_configuration_has_no_section_for_scenarios() {
    let file = Path::new("some.toml");
    let error = crate::config::Config::from_text(file, &scenario(""), &Default::default());
    let error = error.unwrap_err().to_string();
    assert!(error.contains("[scenario]: there is no such section; the sections are"), "{error}");
}

#[test]
fn a_named_configuration_is_read_from_the_scenarios_folder() {
    let folder = tempfile::tempdir().unwrap();
    let scenarios = folder.path().join("scenarios");
    fs::create_dir(&scenarios).unwrap();
    let config = "[guest]\nvcpus = 2\n[workload]\nprogram = \"idle\"\n";
    fs::write(folder.path().join("a.toml"), config).unwrap();
    let text = "[scenario]\nconfig = \"../a.toml\"\nvcpus = [1]\nrequire = [\"table-alias\"]\n";
    fs::write(scenarios.join("b.toml"), text).unwrap();
    fs::write(scenarios.join("README.md"), "no scenario").unwrap();
    let suite = Suite::load(&scenarios).unwrap();
    assert_eq!(suite.cases()[0].name, "b/kvm/trace/auto/vcpus=1/clean");
    assert_eq!(suite.cases()[0].config().unwrap().guest.vcpus, 1);
    fs::write(scenarios.join("c.toml"), text.replace("a.toml", "no.toml")).unwrap();
    let error = Suite::load(&scenarios).unwrap_err().to_string();
    assert!(
        error.contains("c.toml:2: [scenario] config: ") && error.contains("does not exist"),
        "{error}"
    );
}

#[test]
fn a_folder_without_scenarios_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let error = Suite::load(folder.path()).unwrap_err().to_string();
    assert!(error.contains("no scenario in this folder"), "{error}");
    let error = Suite::load(&folder.path().join("none")).unwrap_err().to_string();
    assert!(error.contains("none: cannot be read as a folder"), "{error}");
}

#[test]
fn filters_select_quick_cases_all_cases_or_one() {
    let folder = tempfile::tempdir().unwrap();
    let text = scenario("seal = [\"guard\", \"off\"]\nquick = [\"*/guard/*\"]");
    fs::write(folder.path().join("s.toml"), text).unwrap();
    let suite = Suite::load(folder.path()).unwrap();
    let select = |filter, all| match suite.select(filter, all) {
        Ok(cases) => cases.iter().map(|case| case.seal.name()).collect::<Vec<_>>().join(" "),
        Err(error) => error.to_string(),
    };
    assert_eq!(select(None, false), "guard");
    assert_eq!(select(None, true), "guard off");
    assert_eq!(select(Some("sim"), false), "guard");
    assert_eq!(select(Some("s/*/clean"), true), "guard off");
    assert_eq!(select(Some("s/sim/trace/off/vcpus=1/clean"), false), "off");
    assert!(select(Some("/off/"), false).contains("1 that are not quick do: add --all"));
    assert!(select(Some("kvm"), true).contains("no case matches \"kvm\"; --list --all"));
    assert!(select(Some("["), true).contains("is no pattern"));
}

#[test]
fn a_file_that_a_case_names_is_looked_at_before_any_case_runs() {
    let folder = tempfile::tempdir().unwrap();
    let text =
        "[scenario]\nrequire = []\n[guest]\nimage = \"x.elf\"\n[workload]\nprogram = \"idle\"\n";
    fs::write(folder.path().join("s.toml"), text).unwrap();
    fs::write(folder.path().join("x.elf"), "no image").unwrap();
    let suite = Suite::load(folder.path()).unwrap();
    let cases: Vec<_> = suite.cases().iter().collect();
    let error = Suite::prepare(&cases).unwrap_err().to_string();
    assert!(error.contains("s.toml: [guest] image: ") && error.contains("x.elf"), "{error}");
}

/// What the built-in suite covers, so that nothing falls out of it unseen.
#[test]
fn the_built_in_suite_has_every_fault_in_every_mode_under_every_seal_that_shows_it() {
    use crate::config::{MachineKind, Mediation, Seal};
    use lacuna_abi::fault::Fault;
    let suite = Suite::built_in().unwrap();
    for fault in Fault::ALL {
        let seals: &[Seal] = match fault {
            Fault::SkipWindowFlush | Fault::FreeBeforeWindowFlush => &[Seal::Off],
            _ => &[Seal::Guard, Seal::Memslot, Seal::Off],
        };
        let modes = Mediation::ALL.iter().filter(|mode| fault.modes().contains(&mode.name()));
        for (machine, mode) in MachineKind::ALL.iter().flat_map(|m| modes.clone().map(|o| (*m, *o)))
        {
            let there = |vcpus, seal: Seal, quick: bool| {
                suite.cases().iter().any(|case| {
                    (case.fault, case.vcpus) == (Some(*fault), vcpus)
                        && (case.machine, case.mediation) == (machine, mode)
                        && seal == case.seal
                        && (case.quick || !quick)
                })
            };
            let name = format!("{} on {} under {}", fault.name(), machine.name(), mode.name());
            // A vCPU that is stepped takes its time: one seal and few vCPUs are enough there.
            let slow = machine == MachineKind::Kvm && mode == Mediation::Step;
            let seals = if slow { &seals[..1] } else { seals };
            let vcpus: &[u8] = if slow { &[fault.vcpus()] } else { &[1, 2, 4] };
            for vcpus in vcpus.iter().filter(|vcpus| **vcpus >= fault.vcpus()) {
                for seal in seals {
                    assert!(there(*vcpus, *seal, false), "{name}: {vcpus} vCPUs, {seal:?}");
                }
            }
            let quick = (1..=8).any(|vcpus| seals.iter().any(|seal| there(vcpus, *seal, true)));
            let among = mode == Mediation::Trace || machine == MachineKind::Sim;
            assert!(quick || !among, "{name} is not among the quick ones");
        }
    }
}
