//! The protocol of a secret frame's life, explored exhaustively: two CPUs flip, use, free and give
//! back two pageblocks, in every order that their steps can interleave in, on MMUs that may cache
//! whatever the architecture allows.
//!
//! - Nothing left out: no state breaks a rule, and none lets a CPU reach a secret frame in a way that
//!   the protocol must prevent.
//! - Each step left out in turn: the shortest sequence of steps that breaks a rule. The audit itself
//!   is then shown the same sequence and must say the same.
//!
//! `docs/protocol.md` holds what is printed here.

mod explore;
mod machine;
mod print;
mod replay;
mod steps;

use super::Rule;
use explore::{Counterexample, Explored, Until, explore};
use machine::Seal;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use steps::Slip;

/// A protocol with a slip and how it ends.
fn run(slip: Slip, seal: Seal) -> Result<Explored, Box<Counterexample>> {
    explore(slip, seal, Until::Rule).map_err(Box::new)
}

#[test]
fn nothing_left_out_breaks_no_rule_and_no_secret_frame_is_reached() {
    for seal in [Seal::Closes, Seal::Off] {
        let explored = run(Slip::Nothing, seal).unwrap_or_else(|found| {
            panic!("{}", print::counterexample(&found));
        });
        println!("{seal:?}: {} states, {} steps", explored.states, explored.steps);
        assert!(explored.states > 10_000, "{explored:?}");
    }
}

#[test]
fn each_step_that_is_left_out_breaks_the_rule_that_asks_for_it() {
    for slip in Slip::ALL.into_iter().filter(|slip| *slip != Slip::Nothing) {
        for seal in [Seal::Closes, Seal::Off] {
            let found = run(slip, seal).err().and_then(|found| found.broken);
            assert_eq!(found, slip.breaks(seal), "{slip:?} with {seal:?}");
        }
    }
}

#[test]
fn the_audit_finds_what_the_exploration_finds() {
    for slip in Slip::ALL {
        for seal in [Seal::Closes, Seal::Off] {
            let Err(found) = run(slip, seal) else { continue };
            let rules = replay::rules(&found);
            let broken = found.broken.is_some_and(|rule| rules.contains(&rule));
            assert!(broken, "{slip:?} with {seal:?}: {rules:?}");
            // Up to the last step the audit has nothing to say either.
            let before =
                Counterexample { steps: found.steps[..found.steps.len() - 1].to_vec(), ..*found };
            assert_eq!(replay::rules(&before), [], "{slip:?} with {seal:?}, before the last step");
        }
    }
}

/// That no rule was broken shows something because without the rules the harm is done. A completed
/// seal would have prevented it too, but nobody relies on that: the seal may be off.
#[test]
fn twin_without_the_rules_a_slip_does_the_harm() {
    let stale = Slip::ALL.into_iter().filter(|slip| {
        let rule = slip.breaks(Seal::Off);
        rule == Some(Rule::StaleDirectMap) || *slip == Slip::Refresh
    });
    // What is opened early is not secret yet.
    for slip in stale.filter(|slip| *slip != Slip::OpenEarly) {
        assert!(explore(slip, Seal::Off, Until::Harm).is_err(), "{slip:?}");
        assert!(explore(slip, Seal::Closes, Until::Harm).is_ok(), "{slip:?} under a seal");
    }
    assert!(explore(Slip::Nothing, Seal::Off, Until::Harm).is_ok());
}

/// The part of the document that is made here.
fn document() -> String {
    let mut text = String::new();
    for seal in [Seal::Closes, Seal::Off] {
        if let Ok(explored) = run(Slip::Nothing, seal) {
            let Explored { states, steps } = explored;
            let _ = writeln!(
                text,
                "- {}: {states} states, {steps} steps, no rule broken.",
                seal.text()
            );
        }
    }
    for slip in Slip::ALL.into_iter().filter(|slip| *slip != Slip::Nothing) {
        let _ = writeln!(text, "\n### {}\n", slip.text());
        for seal in [Seal::Closes, Seal::Off] {
            match run(slip, seal) {
                Ok(explored) => {
                    let Explored { states, .. } = explored;
                    let _ =
                        writeln!(text, "{}: no rule is broken, in {states} states.", seal.text());
                }
                Err(found) if seal == Seal::Closes || slip.breaks(Seal::Closes).is_none() => {
                    let _ = writeln!(
                        text,
                        "{}:\n\n```text\n{}```",
                        seal.text(),
                        print::counterexample(&found)
                    );
                }
                Err(_) => {
                    let _ = writeln!(text, "{}: the same.", seal.text());
                }
            }
        }
    }
    text
}

#[test]
fn the_document_holds_what_is_found() {
    const START: &str = "<!-- what the exploration prints -->\n";
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/protocol.md");
    let page = fs::read_to_string(&path).unwrap();
    let (head, found) = page.split_once(START).expect("the mark in docs/protocol.md");
    let expected = document();
    if std::env::var_os("LACUNA_WRITE_DOCS").is_some() {
        fs::write(&path, format!("{head}{START}\n{expected}")).unwrap();
        return;
    }
    assert_eq!(
        found.trim(),
        expected.trim(),
        "docs/protocol.md is not what the exploration finds; LACUNA_WRITE_DOCS=1 writes it anew"
    );
}
