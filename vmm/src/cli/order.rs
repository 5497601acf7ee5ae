//! What the arguments of a `lacuna` in a lab name: looked up here, so that mistakes are found before the
//! lab starts.

use super::{Cli, Command, ExitStatus};
use crate::check::Suite;
use crate::config::{Config, Workload};
use crate::lab::{Kept, LabError, Order};
use crate::recording;
use clap::Parser;
use std::ffi::OsString;
use std::path::Path;

/// What a lab is to run, and what it has to be like for that.
#[derive(PartialEq, Eq, Debug)]
pub(super) struct Wanted {
    /// The order.
    pub(super) order: Order,
    /// Processors, if nobody says how many. Two where one processor must keep what the other has changed;
    /// else one, on which everything else is seen as well: an emulator of one has no races
    /// (docs/labs.md, "One processor or two").
    pub(super) cpus: u8,
}

/// The order for a lab: what these arguments name is looked up, so that mistakes are found here. A
/// status, where they only ask for help or are wrong.
pub(super) fn order(args: &[OsString]) -> Result<Result<Wanted, ExitStatus>, LabError> {
    let words = std::iter::once(OsString::from("lacuna")).chain(args.iter().cloned());
    let cli = match Cli::try_parse_from(words) {
        Ok(cli) => cli,
        Err(error) => {
            // Help on a closed pipe is nobody's loss.
            let _ = error.print();
            let help = error.exit_code() == 0;
            return Ok(Err(if help { ExitStatus::Pass } else { ExitStatus::Usage }));
        }
    };
    let folder = std::env::current_dir().map_err(|error| {
        LabError::Arguments(format!("the working directory cannot be found: {error}"))
    })?;
    let environment = std::env::var_os("RUST_LOG").map(|value| ("RUST_LOG", value));
    let mut order = Order {
        commands: vec![args.to_vec()],
        folder,
        environment: environment.into_iter().collect(),
        ..Order::default()
    };
    let mut cpus = 1;
    match cli.command {
        Command::Run(run) => {
            let config = Config::load(&run.config, &run.overrides())?;
            if matches!(config.workload, Workload::Probe { .. }) {
                cpus = config.guest.vcpus.min(2);
            }
            order.files.push(run.config);
            order.files.extend(config.workload.input().map(Path::to_owned));
            order.files.extend(config.guest.image);
            order.keep = config.output.out.map(Kept::Folder);
        }
        Command::Check(check) => {
            let suite = check.suite().map_err(arguments)?;
            let cases = suite.select(check.filter.as_deref(), check.all).map_err(arguments)?;
            Suite::prepare(&cases).map_err(arguments)?;
            if check.scenarios.is_some() {
                order.files.extend(suite.files().map(Path::to_owned));
                // Inside, all are looked at again, chosen or not.
                for case in suite.cases() {
                    let config = case.config().map_err(arguments)?;
                    order.files.extend(config.workload.input().map(Path::to_owned));
                    order.files.extend(config.guest.image);
                }
            }
            order.keep = check.junit.filter(|_| !check.list).map(Kept::File);
        }
        Command::Audit(audit) => {
            let file = audit.folder.join(recording::FILE);
            if !file.is_file() {
                return Err(LabError::Arguments(format!(
                    "there is no {}; name the folder that lacuna run --record --out DIR wrote",
                    file.display()
                )));
            }
            order.files.push(file);
        }
        Command::Lab(_) => {
            let what = "a lab inside a lab is not possible: the emulated machine has no emulator";
            return Err(LabError::Arguments(what.into()));
        }
        Command::Probe(probe) => cpus = probe.vcpus.unwrap_or(1).min(2),
        // The others name no files.
        _ => {}
    }
    Ok(Ok(Wanted { order, cpus }))
}

fn arguments(error: impl std::fmt::Display) -> LabError {
    LabError::Arguments(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::PathBuf;

    fn wanted(args: &[&str]) -> Result<Result<Wanted, ExitStatus>, LabError> {
        order(&args.iter().map(OsString::from).collect::<Vec<_>>())
    }

    fn ordered(args: &[&str]) -> Result<Result<Order, ExitStatus>, LabError> {
        Ok(wanted(args)?.map(|wanted| wanted.order))
    }

    #[test]
    fn two_processors_are_wanted_where_one_is_to_see_what_the_other_changed() {
        let cpus = |args: &[&str]| wanted(args).unwrap().unwrap().cpus;
        let config = |name: &str| {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("configs");
            folder.join(name).display().to_string()
        };
        assert_eq!(cpus(&["run", &config("stale-read.toml")]), 2);
        assert_eq!(cpus(&["run", &config("quickstart.toml")]), 1);
        assert_eq!(cpus(&["probe"]), 1);
        assert_eq!(cpus(&["probe", "--vcpus", "1"]), 1);
        assert_eq!(cpus(&["probe", "--vcpus", "4"]), 2);
        assert_eq!(cpus(&["bench", "boot"]), 1);
    }

    #[test]
    fn files_that_arguments_and_configuration_name_are_taken_along() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = folder.path().join(name);
            fs::write(&path, text).unwrap();
            path
        };
        let (secret, other) = (file("s.txt", "secret"), file("o.txt", "other"));
        let image = file("g.elf", "image");
        let config = file(
            "c.toml",
            "[guest]\nimage = \"g.elf\"\n[workload]\nprogram = \"secrets\"\ninput = \"s.txt\"\n",
        );
        let config = config.display().to_string();
        let order = ordered(&["run", &config, "--out", "results"]).unwrap().unwrap();
        assert_eq!(order.files, [PathBuf::from(&config), secret, image.clone()]);
        assert_eq!(order.keep, Some(Kept::Folder("results".into())));
        let input = other.display().to_string();
        let order = ordered(&["run", &config, "--input", &input]).unwrap().unwrap();
        assert_eq!(order.files, [PathBuf::from(&config), other, image]);
        assert_eq!(order.keep, None);
        assert!(ordered(&["doctor"]).unwrap().unwrap().files.is_empty());
        let recording = file(recording::FILE, "a recording");
        let results = folder.path().display().to_string();
        let order = ordered(&["audit", &results, "--json"]).unwrap().unwrap();
        assert_eq!(order.files, [recording]);
        let recorded = ordered(&["run", &config, "--record", "--out", "results"]).unwrap();
        assert_eq!(recorded.unwrap().keep, Some(Kept::Folder("results".into())));
    }

    #[test]
    fn mistakes_are_found_before_a_lab_starts() {
        assert_eq!(ordered(&["run"]).unwrap(), Err(ExitStatus::Usage));
        assert_eq!(ordered(&["--help"]).unwrap(), Err(ExitStatus::Pass));
        let missing = ordered(&["run", "/nowhere/c.toml"]).unwrap_err();
        assert_eq!(ExitStatus::from(&missing), ExitStatus::Usage);
        let unrecorded = ordered(&["audit", "/nowhere"]).unwrap_err();
        assert_eq!(ExitStatus::from(&unrecorded), ExitStatus::Usage);
        let nested = ordered(&["lab", "npt", "--", "doctor"]).unwrap_err();
        assert_eq!(ExitStatus::from(&nested), ExitStatus::Usage);
    }

    #[test]
    fn scenarios_and_what_they_name_are_taken_along() {
        let order = ordered(&["check", "*/kvm/*", "--junit", "a/results.xml"]).unwrap().unwrap();
        assert!(order.files.is_empty());
        assert_eq!(order.keep, Some(Kept::File("a/results.xml".into())));
        let folder = tempfile::tempdir().unwrap();
        let scenario = folder.path().join("mine.toml");
        let text = "[scenario]\nmachine = [\"kvm\"]\nrequire = [\"input-leak\"]\n\
                    [workload]\nprogram = \"secrets\"\ninput = \"key.txt\"\n";
        fs::write(&scenario, text).unwrap();
        let place = folder.path().display().to_string();
        let check = ["check", "--all", "--scenarios", &place];
        let missing = ordered(&check).unwrap_err();
        assert_eq!(ExitStatus::from(&missing), ExitStatus::Usage);
        assert!(missing.to_string().contains("key.txt"), "{missing}");
        let key = folder.path().join("key.txt");
        fs::write(&key, "a secret of some length").unwrap();
        let order = ordered(&check).unwrap().unwrap();
        assert!(
            order.files.starts_with(&[scenario.clone(), scenario]) && order.files.ends_with(&[key])
        );
        let other = folder.path().join("other.toml");
        let text = "[scenario]\nmachine = [\"sim\"]\nrequire = [\"residue\"]\n\
                    [workload]\nprogram = \"idle\"\n";
        fs::write(other, text).unwrap();
        let order = ordered(&["check", "other/*", "--all", "--scenarios", &place]);
        let key = folder.path().join("key.txt");
        assert!(order.unwrap().unwrap().files.contains(&key), "those of others are looked at too");
        let none = ordered(&["check", "no/such/case"]).unwrap_err();
        assert_eq!(ExitStatus::from(&none), ExitStatus::Usage);
    }
}
