//! Suites: all cases of a folder of scenarios, and which of them run.

use super::builtin;
use super::case::Case;
use super::pattern::Pattern;
use super::scenario;
use crate::config::{ConfigError, Place};
use crate::run::{Plan, PlanError};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A suite cannot be run as asked.
#[derive(Debug, thiserror::Error)]
pub enum SuiteError {
    /// A scenario, or a configuration that one names, is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A file that a scenario names cannot be used.
    #[error("{file}: {error} (case {case})")]
    Plan {
        /// The scenario's configuration.
        file: PathBuf,
        /// The case.
        case: String,
        /// What is wrong, and the remedy; boxed, so that results stay small.
        error: Box<PlanError>,
    },
    /// The filter is no pattern.
    #[error("FILTER: {0:?} is no pattern: {1}; write a part of a name, or a pattern with * and ?")]
    Filter(String, String),
    /// The filter matches nothing.
    #[error("FILTER: no case matches {filter:?}; {remedy}")]
    NoMatch {
        /// The filter.
        filter: String,
        /// What to do.
        remedy: String,
    },
    /// The scenarios of this program cannot be laid out for its cases.
    #[error(
        "cannot unpack the built-in scenarios: {0}; free space in TMPDIR, or use --scenarios DIR"
    )]
    Unpack(std::io::Error),
}

/// All cases of a folder of scenarios.
#[derive(Debug)]
pub struct Suite {
    cases: Vec<Case>,
    files: Vec<PathBuf>,
    folder: PathBuf,
    /// Where the built-in scenarios were unpacked, if they are those.
    unpacked: Option<TempDir>,
}

impl Suite {
    /// The suite that this program was built with.
    ///
    /// # Errors
    /// [`SuiteError::Unpack`].
    pub fn built_in() -> Result<Self, SuiteError> {
        let unpacked = builtin::unpack().map_err(SuiteError::Unpack)?;
        let folder = unpacked.path().join(builtin::FOLDER);
        Ok(Self { unpacked: Some(unpacked), ..Self::load(&folder)? })
    }

    /// The suite of the scenarios in this folder: each file `*.toml` is one.
    ///
    /// # Errors
    /// [`SuiteError::Config`] for the first mistake found.
    pub fn load(folder: &Path) -> Result<Self, SuiteError> {
        let refuse = |what: String, remedy: &str| {
            let place = Place::File { file: folder.to_owned(), line: None };
            ConfigError::new(place, what, remedy)
        };
        let unreadable = |error: std::io::Error| {
            refuse(format!("cannot be read as a folder: {error}"), "name a folder of scenarios")
        };
        let mut files = Vec::new();
        for entry in std::fs::read_dir(folder).map_err(unreadable)? {
            let path = entry.map_err(unreadable)?.path();
            if path.extension().is_some_and(|extension| extension == "toml") {
                files.push(path);
            }
        }
        files.sort();
        let mut cases = Vec::new();
        for file in &files {
            cases.extend(scenario::load(file)?);
        }
        if cases.is_empty() {
            let remedy = "put scenarios there, files that end in .toml (docs/check.md)";
            return Err(refuse("there is no scenario in this folder".into(), remedy).into());
        }
        Ok(Self { cases, files, folder: folder.to_owned(), unpacked: None })
    }

    /// Every case, scenario by scenario.
    #[must_use]
    pub fn cases(&self) -> &[Case] {
        &self.cases
    }

    /// The files that the cases are made of: scenarios, and configurations that they name.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        let named = self.cases.iter().map(|case| case.base.file.as_path());
        self.files.iter().map(PathBuf::as_path).chain(named)
    }

    /// The folder of the scenarios.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Whether these are the scenarios that this program was built with.
    #[must_use]
    pub const fn is_built_in(&self) -> bool {
        self.unpacked.is_some()
    }

    /// The case of this name.
    #[must_use]
    pub fn case(&self, name: &str) -> Option<&Case> {
        self.cases.iter().find(|case| case.name == name)
    }

    /// The cases whose names match the filter, all of them or the quick ones. A filter that is the full
    /// name of a case selects this one, quick or not.
    ///
    /// # Errors
    /// [`SuiteError::Filter`], [`SuiteError::NoMatch`].
    pub fn select(&self, filter: Option<&str>, all: bool) -> Result<Vec<&Case>, SuiteError> {
        let Some(filter) = filter else {
            let selected: Vec<_> = self.cases.iter().filter(|case| all || case.quick).collect();
            return match selected.is_empty() {
                true => Err(SuiteError::NoMatch {
                    filter: String::new(),
                    remedy: "no case is quick: add --all".into(),
                }),
                false => Ok(selected),
            };
        };
        if let Some(case) = self.case(filter) {
            return Ok(vec![case]);
        }
        let pattern =
            Pattern::new(filter).map_err(|why| SuiteError::Filter(filter.to_owned(), why))?;
        let matching = || self.cases.iter().filter(|case| pattern.matches(&case.name));
        let selected: Vec<_> = matching().filter(|case| all || case.quick).collect();
        if !selected.is_empty() {
            return Ok(selected);
        }
        let remedy = match matching().count() {
            0 => "--list --all shows the names".to_owned(),
            count => format!("{count} that are not quick do: add --all"),
        };
        Err(SuiteError::NoMatch { filter: filter.to_owned(), remedy })
    }

    /// Reads the files that these cases name, so that what is wrong with one is said before any runs.
    ///
    /// # Errors
    /// [`SuiteError`].
    pub fn prepare(cases: &[&Case]) -> Result<(), SuiteError> {
        let mut seen = BTreeSet::new();
        for case in cases {
            let config = case.config()?;
            let files = (config.guest.image.clone(), config.workload.input().map(Path::to_owned));
            if files != (None, None) && seen.insert((case.scenario.as_str(), files)) {
                Plan::new(&config).map_err(|error| SuiteError::Plan {
                    file: config.file.clone(),
                    case: case.name.clone(),
                    error: Box::new(error),
                })?;
            }
        }
        Ok(())
    }
}
