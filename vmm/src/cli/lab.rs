//! `lacuna lab`.

use super::order::{self, Wanted};
use super::progress::Steps;
use super::run::interrupts;
use super::{Choice, ExitStatus, print};
use crate::lab::{
    self, Cache, Ending, Kept, Kind, Lab, LabError, Order, QEMU, Set, Settings, Stream, Watcher,
};
use crate::stop::{Stop, Stopped};
use clap::{Args, Subcommand};
use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

pub(super) const EXAMPLES: &str = "\
Examples:
  lacuna lab npt -- doctor
  lacuna lab npt --timeout 600 -- run configs/quickstart.toml --out results
  lacuna lab ept -- run configs/secrets.toml --input my-keys.txt
  lacuna lab setup";

/// Pause between two looks whether Ctrl-C was pressed.
const LOOK: Duration = Duration::from_millis(20);

/// Arguments of `lacuna lab`.
#[derive(Clone, PartialEq, Eq, Debug, Args)]
pub struct LabArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: LabCommand,
}

/// What to do with labs.
#[derive(Clone, PartialEq, Eq, Debug, Subcommand)]
pub enum LabCommand {
    /// Runs `lacuna ARGS` on real AMD nested page tables, which QEMU emulates.
    Npt(LabRunArgs),
    /// Runs `lacuna ARGS` on real Intel extended page tables, which Bochs emulates: slower, one
    /// processor.
    Ept(LabRunArgs),
    /// Downloads and unpacks what labs are made of, and builds nothing on the system.
    Setup(LabSetupArgs),
    /// Says what of that is there. Exit status: 0 if both labs can start without a download, 3 if not.
    Status(LabSetupArgs),
}

/// Arguments of `lacuna lab npt` and `lacuna lab ept`.
#[derive(Clone, PartialEq, Eq, Debug, Args)]
pub struct LabRunArgs {
    /// Processors of the emulated machine, 1 to 8 (default: 2 for the program probe on two vCPUs, in which
    /// one keeps what the other has changed; else 1); with EPT there is one.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u8).range(1..=8))]
    pub cpus: Option<u8>,
    /// Memory of the emulated machine in MiB (default 1024 with NPT, 512 with EPT).
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u32).range(256..=2048))]
    pub memory: Option<u32>,
    /// Seconds from the start of the emulated machine after which it is stopped (default 600 with NPT,
    /// 1800 with EPT).
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=604_800))]
    pub timeout: Option<u64>,
    /// The kernel inside: Debian's own, or the newer one of its backports.
    #[arg(long, default_value = "stable", value_parser = Kernel::parser())]
    pub kernel: Kernel,
    /// The folder in which labs are kept (default: lacuna in the user's folder for caches).
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
    /// A statically linked lacuna to run inside; without it this program is taken if it is static, or
    /// one is built from the source tree.
    #[arg(long, value_name = "FILE")]
    pub lacuna: Option<PathBuf>,
    /// Arguments of the lacuna inside. Files that they name, and those that a configuration names, are
    /// taken along; the files of --out are brought back.
    #[arg(last = true, required = true, value_name = "ARGS")]
    pub args: Vec<OsString>,
}

/// Arguments of `lacuna lab setup` and `lacuna lab status`.
#[derive(Clone, PartialEq, Eq, Debug, Args)]
pub struct LabSetupArgs {
    /// The folder in which labs are kept (default: lacuna in the user's folder for caches).
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
    /// The kernel inside: Debian's own, or the newer one of its backports.
    #[arg(long, default_value = "stable", value_parser = Kernel::parser())]
    pub kernel: Kernel,
}

/// A lab's kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kernel {
    /// That of the release.
    Stable,
    /// That of its backports.
    Backports,
}

impl Kernel {
    pub(super) const ALL: &'static [Self] = &[Self::Stable, Self::Backports];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Stable => "stable",
            Self::Backports => "backports",
        }
    }
}

/// Runs a command in a lab, or sets labs up.
#[must_use]
pub fn lab(args: &LabArgs) -> ExitStatus {
    let done = match &args.command {
        LabCommand::Npt(args) => run(Kind::Npt, args),
        LabCommand::Ept(args) => run(Kind::Ept, args),
        LabCommand::Setup(args) => set_up(args),
        LabCommand::Status(args) => status(args),
    };
    done.unwrap_or_else(|error| {
        eprintln!("error: {error}");
        ExitStatus::from(&error)
    })
}

fn run(kind: Kind, args: &LabRunArgs) -> Result<ExitStatus, LabError> {
    let Wanted { order, cpus } = match order::order(&args.args)? {
        Ok(wanted) => wanted,
        Err(status) => return Ok(status),
    };
    let npt = kind == Kind::Npt;
    if !npt && args.cpus.is_some_and(|cpus| cpus != 1) {
        return Err(LabError::Arguments("--cpus: a lab with EPT has one processor".into()));
    }
    if let Some(Kept::File(file)) = &order.keep {
        // Said before anything runs, as without a lab.
        fs::File::create(file).map_err(|error| cannot_write(file, &error))?;
    }
    let settings = Settings {
        kind,
        backports: args.kernel == Kernel::Backports,
        cpus: args.cpus.unwrap_or(if npt { cpus } else { 1 }),
        memory_mib: args.memory.unwrap_or(if npt { 1024 } else { 512 }),
        timeout: Duration::from_secs(args.timeout.unwrap_or(if npt { 600 } else { 1800 })),
        lacuna: args.lacuna.clone(),
    };
    let interrupted = listen()?;
    let cache = Cache::open(args.cache.as_deref())?;
    let mut steps = Setup { steps: Steps::new(false), interrupted: Arc::clone(&interrupted) };
    let lab = Lab::prepare(settings, cache, &mut steps)?;
    steps.steps.finish();
    let ending = supervised(&interrupted, |stop| lab.run(&order, stop, &mut pass_on))?;
    keep(&order, &ending)?;
    Ok(ending.statuses.first().map_or(ExitStatus::Inconclusive, |status| status_of(*status)))
}

/// Runs something that is told to stop when Ctrl-C or SIGTERM comes.
fn supervised<R>(interrupted: &AtomicBool, run: impl FnOnce(&Stop) -> R) -> R {
    let (stop, done) = (Stop::default(), AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Acquire) {
                if interrupted.load(Ordering::Relaxed) {
                    stop.tell(Stopped::Cancelled);
                }
                thread::sleep(LOOK);
            }
        });
        let result = run(&stop);
        done.store(true, Ordering::Release);
        result
    })
}

/// Writes what the command wrote.
fn pass_on(stream: Stream, bytes: &[u8]) {
    let written = match stream {
        Stream::Out => io::stdout().write_all(bytes).and_then(|()| io::stdout().flush()),
        Stream::Err => io::stderr().write_all(bytes),
    };
    if let Err(error) = written
        && error.kind() != io::ErrorKind::BrokenPipe
    {
        log::warn!("what the lab wrote cannot be passed on: {error}");
    }
}

/// Writes the files that came back.
fn keep(order: &Order, ending: &Ending) -> Result<(), LabError> {
    let Some(folder) = order.keep.as_ref().map(Kept::folder) else { return Ok(()) };
    for (path, contents) in &ending.files {
        let path = folder.join(path);
        let made = path.parent().map_or(Ok(()), fs::create_dir_all);
        let written = made.and_then(|()| fs::write(&path, contents));
        written.map_err(|error| cannot_write(&path, &error))?;
    }
    Ok(())
}

fn cannot_write(path: &Path, error: &io::Error) -> LabError {
    LabError::Arguments(format!(
        "what comes back cannot be written to {}: {error}; name a place that can be written",
        path.display()
    ))
}

fn status_of(status: u8) -> ExitStatus {
    let known = ExitStatus::ALL.into_iter().find(|known| *known as u8 == status);
    known.unwrap_or_else(|| {
        let what = match status {
            128.. => format!("by signal {}", status - 128),
            _ => format!("with status {status}"),
        };
        eprintln!("error: lacuna ended in the lab {what}, which it never should");
        ExitStatus::Inconclusive
    })
}

fn set_up(args: &LabSetupArgs) -> Result<ExitStatus, LabError> {
    let cache = Cache::open(args.cache.as_deref())?;
    let mut steps = Setup { steps: Steps::new(true), interrupted: listen()? };
    let sets = all_sets(args);
    lab::set_up(&cache, &sets, &mut steps)?;
    steps.steps.finish();
    status(args)
}

/// The sets of both labs.
fn all_sets(args: &LabSetupArgs) -> Vec<Set> {
    let backports = args.kernel == Kernel::Backports;
    let mut sets = lab::sets(Kind::Npt, backports);
    let more = lab::sets(Kind::Ept, backports).into_iter();
    let more: Vec<_> = more.filter(|set| !sets.contains(set)).collect();
    sets.extend(more);
    sets
}

fn status(args: &LabSetupArgs) -> Result<ExitStatus, LabError> {
    let cache = Cache::open(args.cache.as_deref())?;
    let sets = all_sets(args);
    let missing = lab::missing(&cache, &sets);
    let mut text = format!("cache  {}\n", cache.folder().display());
    for set in &sets {
        let wrong = missing.iter().find(|(missing, _)| missing == set);
        let state = wrong.map_or("ready", |(_, why)| why.as_str());
        text += &format!("{:34}{state}\n", set.what());
    }
    if let Some(version) = lab::installed_qemu() {
        text += &format!("QEMU {version} is installed, and new enough (from {QEMU})\n");
    }
    for (kind, name) in [(Kind::Npt, "npt"), (Kind::Ept, "ept")] {
        let needed = lab::sets(kind, args.kernel == Kernel::Backports);
        let lacks = missing.iter().any(|(set, _)| needed.contains(set));
        let state = if lacks { "has to be set up: lacuna lab setup" } else { "ready" };
        text += &format!("lacuna lab {name}: {state}\n");
    }
    // A closed pipe is no error; anything else can hardly be said.
    let _ = print(&text);
    Ok(if missing.is_empty() { ExitStatus::Pass } else { ExitStatus::Host })
}

/// Shows how far a set-up is, and ends it on Ctrl-C.
struct Setup {
    steps: Steps,
    interrupted: Arc<AtomicBool>,
}

impl Watcher for Setup {
    fn begin(&mut self, what: &str, bytes: Option<u64>) {
        self.steps.begin(what, bytes);
    }

    fn at(&mut self, bytes: u64) {
        self.steps.at(bytes);
    }

    fn go_on(&mut self) -> Result<(), LabError> {
        if self.interrupted.load(Ordering::Relaxed) { Err(LabError::Cancelled) } else { Ok(()) }
    }
}

fn listen() -> Result<Arc<AtomicBool>, LabError> {
    interrupts().map_err(|error| LabError::Host {
        what: format!("cannot listen for Ctrl-C: {error}"),
        remedy: "free some memory".into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_come_back_below_the_folder_of_out() {
        let folder = tempfile::tempdir().unwrap();
        let keep_in = Some(Kept::Folder(folder.path().join("a/b")));
        let order = Order { keep: keep_in, ..Order::default() };
        let files = vec![(PathBuf::from("c/report.json"), b"{}".to_vec())];
        keep(&order, &Ending { statuses: vec![0], files }).unwrap();
        assert_eq!(fs::read(folder.path().join("a/b/c/report.json")).unwrap(), b"{}");
    }

    #[test]
    fn statuses_that_lacuna_has_come_back_and_others_are_inconclusive() {
        for status in ExitStatus::ALL {
            assert_eq!(status_of(status as u8), status);
        }
        for other in [6, 101, 137] {
            assert_eq!(status_of(other), ExitStatus::Inconclusive);
        }
    }

    #[test]
    fn what_runs_is_stopped_when_somebody_interrupts() {
        let interrupted = AtomicBool::new(true);
        let told = supervised(&interrupted, |stop| {
            while stop.told().is_none() {
                thread::sleep(LOOK);
            }
            stop.told()
        });
        assert_eq!(told, Some(Stopped::Cancelled));
    }
}
