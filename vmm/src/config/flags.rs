//! Flags of the command line that need a look of their own.

use super::error::ConfigError;
use super::{Guest, Mediation, Overrides, Workload};
use crate::sim;
use lacuna_abi::fault::Fault;
use std::path::{Path, PathBuf};

/// Refuses what the command line foresees and this version does not have, and flags that need
/// others.
pub(super) fn refuse_what_is_missing(overrides: &Overrides) -> Result<(), ConfigError> {
    let refuse = |flag, what: String, remedy: &str| Err(ConfigError::flag(flag, what, remedy));
    match overrides {
        Overrides { step_from: Some(_), mediate, .. } if *mediate != Some(Mediation::Step) => {
            refuse("--step-from", "it belongs to --mediate step".into(), "add --mediate step")
        }
        Overrides { step_to: Some(_), mediate, .. } if *mediate != Some(Mediation::Step) => {
            refuse("--step-to", "it belongs to --mediate step".into(), "add --mediate step")
        }
        Overrides { step_from: Some(from), step_to: Some(to), .. } if from > to => refuse(
            "--step-to",
            format!("event {to} comes before event {from}"),
            "give --step-to the larger number",
        ),
        Overrides { record: true, out: None, .. } => {
            refuse("--record", "a recording needs a folder to lie in".into(), "add --out DIR")
        }
        _ => Ok(()),
    }
}

/// Refuses what a guest needs KVM for: instructions of its own.
pub(super) fn refuse_what_a_simulation_lacks(
    guest: &Guest,
    workload: &Workload,
    overrides: &Overrides,
) -> Result<(), ConfigError> {
    for (flag, number) in [("--step-from", overrides.step_from), ("--step-to", overrides.step_to)] {
        if number.is_some() {
            let what = "a simulated machine sees all of a run, at no cost".to_owned();
            return Err(ConfigError::flag(flag, what, "leave it out"));
        }
    }
    let what = match workload {
        _ if guest.image.is_some() => {
            "a simulated machine runs no image ([guest] image)".to_owned()
        }
        Workload::Touch { touch } if !sim::can_touch(*touch) => {
            format!("a simulated CPU cannot touch a frame by \"{}\"", touch.name())
        }
        Workload::Crash { crash } if !sim::can_crash(*crash) => {
            format!("a simulated CPU cannot fail by \"{}\"", crash.name())
        }
        _ => return Ok(()),
    };
    Err(ConfigError::flag("--machine", what, "use --machine kvm"))
}

/// The faults of these names, each once; the guest has the vCPUs that they need.
pub(super) fn faults(names: &[String], vcpus: u8) -> Result<Vec<Fault>, ConfigError> {
    let mut faults = Vec::new();
    for name in names {
        let fault = Fault::from_name(name).ok_or_else(|| {
            let known: Vec<_> = Fault::ALL.iter().map(|fault| fault.name()).collect();
            let what = format!("there is no fault {name:?}");
            ConfigError::flag("--inject", what, format!("the faults are {}", known.join(", ")))
        })?;
        if vcpus < fault.vcpus() {
            let what = format!("{name} is no fault in a guest of {vcpus} vCPU");
            let remedy = format!("set [guest] vcpus = {} or more", fault.vcpus());
            return Err(ConfigError::flag("--inject", what, remedy));
        }
        if !faults.contains(&fault) {
            faults.push(fault);
        }
    }
    Ok(faults)
}

/// A folder that exists or can be made later.
pub(super) fn folder(path: &Path) -> Result<PathBuf, ConfigError> {
    if path.exists() && !path.is_dir() {
        let what = format!("{} is no directory", path.display());
        return Err(ConfigError::flag("--out", what, "name a directory, or one to be made"));
    }
    Ok(path.to_owned())
}
