//! From the axes of a scenario to its cases.

use super::case::{Base, Case, Expected};
use super::raw::SECTION;
use super::scenario::{Axes, Planted, Reader};
use crate::audit::Rule;
use crate::config::{Config, ConfigError, MachineKind, Mediation, Place, Seal, Setting};
use lacuna_abi::fault::Fault;
use std::sync::Arc;
use std::time::Duration;

/// Most cases of a scenario: more are a slip of the pen in an axis.
const MAX_CASES: usize = 10_000;

/// Makes the cases of a scenario.
pub(super) struct Builder<'a> {
    pub(super) reader: &'a Reader<'a>,
    pub(super) name: String,
    pub(super) base: Arc<Base>,
    pub(super) plain: Config,
    pub(super) axes: Axes,
    pub(super) vary: Vec<Vec<Setting>>,
    pub(super) require: Vec<Rule>,
    pub(super) expected: Expected,
    pub(super) optional: bool,
    pub(super) timeout: Duration,
}

impl Builder<'_> {
    /// The cases, the clean ones first.
    ///
    /// # Errors
    /// [`ConfigError`] for a case whose configuration is wrong.
    pub(super) fn cases(&self, planted: &[Planted]) -> Result<Vec<Case>, ConfigError> {
        let mut cases = Vec::new();
        for settings in combinations(&self.vary) {
            self.add(&mut cases, &self.axes, &settings, None)?;
            for planted in planted {
                // A fault's own axes go before the scenario's.
                let own = planted.axes.clone();
                let axes = Axes {
                    machine: own.machine.or_else(|| self.axes.machine.clone()),
                    mediate: own.mediate.or_else(|| self.axes.mediate.clone()),
                    seal: own.seal.or_else(|| self.axes.seal.clone()),
                    vcpus: own.vcpus.or_else(|| self.axes.vcpus.clone()),
                };
                let before = cases.len();
                self.add(&mut cases, &axes, &settings, Some(planted))?;
                if cases.len() == before {
                    return Err(self.no_case(planted.fault, &axes));
                }
            }
            if cases.len() > MAX_CASES {
                let what = format!("that makes more than {MAX_CASES} cases");
                return Err(self.reader.refuse("vary", None, what));
            }
        }
        Ok(cases)
    }

    /// Why a fault makes no case.
    fn no_case(&self, fault: Fault, axes: &Axes) -> ConfigError {
        let (name, vcpus, modes) = (fault.name(), fault.vcpus(), fault.modes());
        let own = [self.plain.guest.vcpus];
        let enough = axes.vcpus.as_deref().unwrap_or(&own);
        let (what, remedy) = if enough.iter().all(|given| *given < vcpus) {
            let what = format!("{name} is no fault with fewer than {vcpus} vCPUs");
            (what, format!("add {vcpus} to vcpus"))
        } else {
            let what = format!("{name} is found under {} only", modes.join(" and "));
            (what, format!("add {:?} to mediate", modes[0]))
        };
        self.reader.source.error(SECTION, "fault", None, what, remedy)
    }

    fn add(
        &self,
        cases: &mut Vec<Case>,
        axes: &Axes,
        settings: &[Setting],
        planted: Option<&Planted>,
    ) -> Result<(), ConfigError> {
        let or = |list: &Option<Vec<u8>>, own| list.clone().unwrap_or_else(|| vec![own]);
        let fewest = planted.map_or(1, |planted| planted.fault.vcpus());
        let sees = |mediation: &&Mediation| {
            planted.is_none_or(|planted| planted.fault.modes().contains(&mediation.name()))
        };
        let own_seal = || vec![self.plain.second_stage.seal];
        for machine in axes.machine.as_deref().unwrap_or(&[MachineKind::Kvm]) {
            let modes = axes.mediate.as_deref().unwrap_or(&[Mediation::Trace]);
            for mediation in modes.iter().filter(sees) {
                for seal in axes.seal.clone().unwrap_or_else(own_seal) {
                    for vcpus in or(&axes.vcpus, self.plain.guest.vcpus) {
                        if vcpus >= fewest {
                            let place = (*machine, *mediation, seal, vcpus);
                            cases.push(self.case(place, settings, planted)?);
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn case(
        &self,
        (machine, mediation, seal, vcpus): (MachineKind, Mediation, Seal, u8),
        settings: &[Setting],
        planted: Option<&Planted>,
    ) -> Result<Case, ConfigError> {
        let expected = match planted {
            Some(planted) => Expected::Violation(planted.violation.clone()),
            None => self.expected.clone(),
        };
        let what = match (planted, &expected) {
            (Some(planted), _) => planted.fault.name(),
            (None, Expected::Pass) => "clean",
            (None, expected) => expected.name(),
        };
        let varied = settings.iter().map(|setting| {
            let value = setting.value.trim_matches('"');
            format!("{}={value}/", setting.field)
        });
        let name = format!(
            "{}/{}/{}/{}/vcpus={vcpus}/{}{what}",
            self.name,
            machine.name(),
            mediation.name(),
            seal.name(),
            varied.collect::<String>()
        );
        let vcpus_too =
            self.axes.vcpus.is_some() || planted.is_some_and(|p| p.axes.vcpus.is_some());
        let vcpus_too = vcpus_too.then(|| Setting {
            section: "guest".into(),
            field: "vcpus".into(),
            value: vcpus.to_string(),
            at: None,
        });
        // Where nothing is closed, that cannot be exercised.
        let applies = |rule: &Rule| seal != Seal::Off || *rule != Rule::SecondStageOpen;
        let clean = expected == Expected::Pass;
        let case = Case {
            name,
            scenario: self.name.clone(),
            machine,
            mediation,
            seal,
            vcpus,
            fault: planted.map(|planted| planted.fault),
            expected,
            require: self.require.iter().copied().filter(|r| clean && applies(r)).collect(),
            quick: true,
            optional: self.optional,
            timeout: self.timeout,
            base: Arc::clone(&self.base),
            settings: settings.iter().cloned().chain(vcpus_too).collect(),
        };
        case.config().map_err(|error| self.explain(error, &case.name))?;
        Ok(case)
    }

    /// A mistake that shows in one case only: at the list that it comes from, where one can be named.
    fn explain(&self, error: ConfigError, case: &str) -> ConfigError {
        let what = format!("{} (case {case})", error.what);
        let field = match *error.place {
            Place::Flag("--machine") => "machine",
            Place::Flag("--mediate") => "mediate",
            Place::Flag("--inject") => "fault",
            place => return ConfigError::new(place, what, error.remedy),
        };
        self.reader.source.error(SECTION, field, None, what, error.remedy)
    }
}

/// One setting of each list, in all combinations; the last list varies fastest.
fn combinations(lists: &[Vec<Setting>]) -> Vec<Vec<Setting>> {
    lists.iter().fold(vec![Vec::new()], |all, list| {
        let with = |so_far: Vec<Setting>| {
            list.iter()
                .map(move |setting| [so_far.as_slice(), std::slice::from_ref(setting)].concat())
        };
        all.into_iter().flat_map(with).take(MAX_CASES + 1).collect()
    })
}
