//! JUnit XML, as continuous integration reads it: a suite for each scenario, a test for each case.

use super::judge::{Outcome, Ran};
use super::results::Results;
use super::session::Done;
use std::fmt::Write;
use std::time::Duration;

/// The results as JUnit XML.
#[must_use]
pub fn junit(results: &Results<'_>) -> String {
    let mut out = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    let all: Vec<_> = results.done.iter().collect();
    // Writing to a string does not fail.
    _ = writeln!(
        out,
        "<testsuites name=\"lacuna check\" {} time=\"{}\">",
        counts(&all),
        seconds(results.took)
    );
    let mut scenarios: Vec<&str> = Vec::new();
    for done in &results.done {
        if !scenarios.contains(&done.case.scenario.as_str()) {
            scenarios.push(&done.case.scenario);
        }
    }
    for scenario in scenarios {
        let these: Vec<_> = all.iter().copied().filter(|d| d.case.scenario == scenario).collect();
        let time = these.iter().map(|done| done.took).sum();
        _ = writeln!(
            out,
            "  <testsuite name=\"{}\" {} time=\"{}\">",
            escaped(scenario),
            counts(&these),
            seconds(time)
        );
        these.iter().for_each(|done| case(&mut out, done, &results.repeat(&done.case.name)));
        out.push_str("  </testsuite>\n");
    }
    out.push_str("</testsuites>\n");
    out
}

/// What JUnit calls it: a failure is something found, an error something that kept it from being told.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Passed,
    Failure,
    Error,
    Skipped,
}

fn kind(done: &Done<'_>) -> Kind {
    match (done.judgement.outcome, &done.ran) {
        (Outcome::Passed, _) => Kind::Passed,
        (Outcome::Failed, Ran::Reported(_)) => Kind::Failure,
        (Outcome::Failed | Outcome::Inconclusive, _) => Kind::Error,
        // One that must run and cannot is no success.
        (Outcome::Skipped, _) if !done.case.optional => Kind::Error,
        (Outcome::Skipped | Outcome::NotRun, _) => Kind::Skipped,
    }
}

fn counts(done: &[&Done<'_>]) -> String {
    let count = |wanted| done.iter().filter(|done| kind(done) == wanted).count();
    format!(
        "tests=\"{}\" failures=\"{}\" errors=\"{}\" skipped=\"{}\"",
        done.len(),
        count(Kind::Failure),
        count(Kind::Error),
        count(Kind::Skipped)
    )
}

fn case(out: &mut String, done: &Done<'_>, repeat: &str) {
    // The class is the scenario; what is left of the name tells its cases apart.
    let name = done.case.name.split_once('/').map_or(done.case.name.as_str(), |(_, rest)| rest);
    _ = write!(
        out,
        "    <testcase classname=\"{}\" name=\"{}\" time=\"{}\"",
        escaped(&done.case.scenario),
        escaped(name),
        seconds(done.took)
    );
    let element = match kind(done) {
        Kind::Passed => {
            out.push_str("/>\n");
            return;
        }
        Kind::Failure => "failure",
        Kind::Error => "error",
        Kind::Skipped => "skipped",
    };
    let reasons = &done.judgement.reasons;
    let first = reasons.first().map_or("", String::as_str);
    _ = write!(out, ">\n      <{element} message=\"{}\"", escaped(first));
    if element == "skipped" {
        out.push_str("/>\n    </testcase>\n");
        return;
    }
    let text = format!("{}\nagain: {repeat}", reasons.join("\n"));
    let outcome = done.judgement.outcome.name().to_lowercase();
    _ = write!(out, " type=\"{outcome}\">{}</{element}>\n    </testcase>\n", escaped(&text));
}

fn seconds(time: Duration) -> String {
    format!("{}.{:03}", time.as_secs(), time.subsec_millis())
}

/// Text as XML 1.0 can hold it: what it cannot, which a guest may have said, becomes U+FFFD.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for char in text.chars() {
        match char {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&apos;"),
            // Parsers make spaces of these where they stand in an attribute as they are.
            '\t' | '\n' | '\r' => _ = write!(out, "&#{};", u32::from(char)),
            '\0'..='\u{1f}' | '\u{fffe}' | '\u{ffff}' => out.push('\u{fffd}'),
            char => out.push(char),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Whatever a guest says, a parser reads the same, but for what XML cannot hold.
        #[test]
        fn any_text_survives(text in any::<String>(), control in any::<[char; 3]>()) {
            let text = format!("{text}<&>\"'\n\t\r\u{0}\u{1b}\u{ffff}{}", String::from_iter(control));
            let xml = format!("<a b=\"{0}\">{0}</a>", escaped(&text));
            let document = roxmltree::Document::parse(&xml).unwrap();
            let root = document.root_element();
            let kept = |c: char| match c {
                '\t' | '\n' | '\r' => c,
                '\0'..='\u{1f}' | '\u{fffe}' | '\u{ffff}' => '\u{fffd}',
                c => c,
            };
            let kept: String = text.chars().map(kept).collect();
            prop_assert_eq!(root.attribute("b"), Some(kept.as_str()));
            prop_assert_eq!(root.text(), Some(kept.as_str()));
        }
    }
}
