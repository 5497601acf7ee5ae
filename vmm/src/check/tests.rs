//! Scenarios that are right and wrong, and judgements of reports made by hand.

mod judgements;
mod results;
mod scenarios;

use super::case::Case;
use super::scenario::from_text;
use std::path::Path;

/// A scenario on simulated machines, with these lines in its section.
fn scenario(lines: &str) -> String {
    format!(
        "[scenario]\nmachine = [\"sim\"]\nrequire = [\"table-alias\"]\n{lines}\n\n\
         [workload]\nprogram = \"idle\"\n"
    )
}

fn cases(text: &str) -> Vec<Case> {
    from_text(Path::new("folder/some.toml"), text).unwrap()
}

fn names(text: &str) -> Vec<String> {
    cases(text).into_iter().map(|case| case.name).collect()
}

fn refused(text: &str) -> String {
    from_text(Path::new("folder/some.toml"), text).unwrap_err().to_string()
}
