//! Section `[workload]`: the program and the fields that belong to it.

use super::error::ConfigError;
use super::fields::IN_PLACE;
use super::raw::{self, Number, Text};
use super::resolve::Resolver;
use super::{Workload, fields, input};
use crate::leak::MAX_SECRET;
use crate::trace::{Secret, is_gfp_name};
use lacuna_abi::workload::{Bench, Crash, Program, Scenario, Selftest, Touch};
use std::path::{Path, PathBuf};
use toml::Spanned;

/// Operations of the program `stress` where the file gives no number.
const STRESS_OPERATIONS: u64 = 5000;

impl Resolver<'_> {
    pub(super) fn workload(
        &self,
        raw: &raw::Workload,
        flag: Option<&Path>,
    ) -> Result<Workload, ConfigError> {
        let Some(program) = &raw.program else {
            return Err(self.refuse(("workload", "program"), None, "it is missing"));
        };
        // The bench's own has no fields: nothing but the bench gives its arguments.
        let for_users = |name: &str| Program::from_name(name).filter(|p| *p != Program::Flush);
        let program = self.named(("workload", "program"), program, for_users)?;
        self.refuse_foreign_fields(program, raw)?;
        if flag.is_some() && !matches!(program, Program::Replay | Program::Secrets) {
            let what = format!("the program \"{}\" has no input", program.name());
            return Err(ConfigError::flag("--input", what, "leave it out"));
        }
        let required = |name, text: &Text| match text {
            Some(text) => Ok(text.clone()),
            None => {
                let what = format!("program = \"{}\" needs it", program.name());
                Err(self.refuse(("workload", name), None, what))
            }
        };
        Ok(match program {
            Program::Idle | Program::Flush => Workload::Idle,
            Program::Replay => Workload::Replay {
                input: self.input(program, &raw.input, flag)?,
                events: self.number(("workload", "events"), &raw.events, 1..=u64::MAX)?,
                secret: self.secret(raw.secret.as_ref())?,
                in_place: self.in_place(&raw.in_place)?,
            },
            Program::Secrets => Workload::Secrets { input: self.input(program, &raw.input, flag)? },
            Program::Stress => {
                let operations = ("workload", "operations");
                let order = self.number(("workload", "max_order"), &raw.max_order, 0..=10)?;
                Workload::Stress {
                    operations: self
                        .number(operations, &raw.operations, 1..=u64::MAX)?
                        .unwrap_or(STRESS_OPERATIONS),
                    max_order: order.and_then(|order| u8::try_from(order).ok()).unwrap_or(10),
                }
            }
            Program::Selftest => {
                let test = required("test", &raw.test)?;
                let test = self.named(("workload", "test"), &test, Selftest::from_name)?;
                let name = ("workload", "operations");
                let operations = self.number(name, &raw.operations, 1..=u64::MAX)?;
                if operations.is_some() && test != Selftest::PageAllocStressInterleaved {
                    let what = format!("the test \"{}\" counts no operations", test.name());
                    return Err(self.refuse(name, None, what));
                }
                Workload::Selftest { test, operations }
            }
            Program::Bench => {
                let bench = required("bench", &raw.bench)?;
                let order = self.number(("workload", "order"), &raw.order, 0..=10)?;
                let rounds = self.number(("workload", "rounds"), &raw.rounds, 1..=u64::MAX)?;
                Workload::Bench {
                    bench: self.named(("workload", "bench"), &bench, Bench::from_name)?,
                    order: order.and_then(|order| u8::try_from(order).ok()).unwrap_or(0),
                    rounds: rounds.unwrap_or(1),
                }
            }
            Program::Probe => {
                let rounds = self.number(("workload", "rounds"), &raw.rounds, 1..=u64::MAX)?;
                let scenario = match &raw.scenario {
                    Some(scenario) => {
                        self.named(("workload", "scenario"), scenario, Scenario::from_name)?
                    }
                    None => Scenario::Table,
                };
                Workload::Probe { scenario, rounds: rounds.unwrap_or(1) }
            }
            Program::Touch => {
                let touch = required("touch", &raw.touch)?;
                Workload::Touch {
                    touch: self.named(("workload", "touch"), &touch, Touch::from_name)?,
                }
            }
            Program::Crash => {
                let crash = required("crash", &raw.crash)?;
                Workload::Crash {
                    crash: self.named(("workload", "crash"), &crash, Crash::from_name)?,
                }
            }
        })
    }

    fn refuse_foreign_fields(
        &self,
        program: Program,
        raw: &raw::Workload,
    ) -> Result<(), ConfigError> {
        let given = [
            ("input", raw.input.is_some()),
            ("events", raw.events.is_some()),
            ("secret", raw.secret.is_some()),
            ("in_place", raw.in_place.is_some()),
            ("operations", raw.operations.is_some()),
            ("max_order", raw.max_order.is_some()),
            ("test", raw.test.is_some()),
            ("bench", raw.bench.is_some()),
            ("order", raw.order.is_some()),
            ("rounds", raw.rounds.is_some()),
            ("touch", raw.touch.is_some()),
            ("crash", raw.crash.is_some()),
            ("scenario", raw.scenario.is_some()),
        ];
        for (name, given) in given {
            let owners = fields::find("workload", name).map_or(&[][..], |field| field.programs);
            if given && !owners.contains(&program) {
                let owners: Vec<_> = owners.iter().map(|p| format!("\"{}\"", p.name())).collect();
                let owners = owners.join(" or ");
                let what = format!("it belongs to program = {owners}, not \"{}\"", program.name());
                let remedy = format!("remove it, or set program = {owners}");
                return Err(self.source.error("workload", name, None, what, remedy));
            }
        }
        Ok(())
    }

    fn input(
        &self,
        program: Program,
        raw: &Text,
        flag: Option<&Path>,
    ) -> Result<PathBuf, ConfigError> {
        let checked = |path: PathBuf, wrong: &dyn Fn(input::Wrong) -> ConfigError| {
            // A recording is bounded by its number of events, when it is read.
            let max = if program == Program::Secrets { MAX_SECRET } else { u64::MAX };
            input::check(&path, max).map(|()| path).map_err(wrong)
        };
        if let Some(path) = flag {
            return checked(path.to_owned(), &|(what, remedy)| {
                ConfigError::flag("--input", what, remedy)
            });
        }
        let Some(path) = raw else {
            let what = format!("program = \"{}\" needs it", program.name());
            return Err(self.refuse(("workload", "input"), None, what));
        };
        checked(self.relative(path.get_ref()), &|(what, remedy)| {
            self.source.error("workload", "input", Some(path.span()), what, remedy)
        })
    }

    fn in_place(&self, raw: &Number) -> Result<u8, ConfigError> {
        let percent = self.number(("workload", "in_place"), raw, IN_PLACE)?;
        Ok(percent.and_then(|percent| u8::try_from(percent).ok()).unwrap_or(0))
    }

    fn secret(&self, raw: Option<&Spanned<raw::Secret>>) -> Result<Secret, ConfigError> {
        let Some(raw) = raw else { return Ok(Secret::default()) };
        let refuse = |what| Err(self.refuse(("workload", "secret"), Some(raw.span()), what));
        match raw.get_ref() {
            raw::Secret::Word(word) => match word.as_str() {
                "user" => Ok(Secret::User),
                "all" => Ok(Secret::All),
                "none" => Ok(Secret::None),
                _ => refuse(format!("{word:?} is not known")),
            },
            raw::Secret::Names(names) if names.is_empty() => refuse("the list is empty".to_owned()),
            raw::Secret::Names(names) => match names.iter().find(|name| !is_gfp_name(name)) {
                Some(name) => refuse(format!("{name:?} cannot be the name of a flag")),
                None => Ok(Secret::Names(names.clone())),
            },
        }
    }
}
