//! The command line: what it takes, and how its results leave the process.
#![forbid(unsafe_code)]

mod check;
mod exit;
mod lab;
mod order;
mod probe;
mod progress;
mod recording;
mod run;
#[cfg(test)]
mod tests;
mod tools;

pub use check::check;
pub use exit::ExitStatus;
pub use lab::{LabArgs, LabCommand, LabRunArgs, LabSetupArgs, lab};
pub use probe::probe;
pub use progress::Progress;
pub use recording::audit;
pub use run::run;
pub use tools::{bench, doctor};

use crate::audit::Profile;
use crate::config::{MachineKind, Mediation, Overrides, ReportFormat, Seal};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{ArgAction, Args, Parser, Subcommand};
use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::path::PathBuf;

const EXIT_STATUSES: &str = "\
Exit status:
  0  pass
  1  violation: a rule that the host checks does not hold
  2  wrong usage or configuration; the message names file, line and field
  3  this host cannot do it; the message names what is missing and the remedy
  4  guest error: panic, exception, hang past its time limit, unexpected sealed access
  5  inconclusive: something that had to be checked could not be";

const CHECK_STATUSES: &str = "\
Exit status:
  0  every clean case is clean with its required rules exercised, every fault is found by its rule
  1  a case ended otherwise, ended without a report, or took too long
  2  wrong usage or scenario; the message names file, line and field
  3  this host cannot run a case that is not optional; all others ended as they must
  5  it cannot be told of a case, or the suite was broken off";

const EXAMPLES: &str = "\
Examples:
  lacuna run configs/quickstart.toml
  lacuna run configs/quickstart.toml --inject global-window --report json
  lacuna run configs/secrets.toml --input my-keys.txt --seal memslot --out results
  lacuna run configs/quickstart.toml --record --out results
  lacuna audit results
  lacuna check
  lacuna check '*/sim/*' --all --junit results.xml
  lacuna probe --machine sim
  lacuna doctor
  lacuna lab npt -- run configs/quickstart.toml";

/// Runs small KVM guests whose secret pages are absent from the guest's own direct map and closed
/// in the second stage, and checks from outside that they are.
#[derive(Clone, PartialEq, Eq, Debug, Parser)]
#[command(name = "lacuna", version, propagate_version = true, arg_required_else_help = true)]
#[command(after_help = EXIT_STATUSES, after_long_help = format!("{EXIT_STATUSES}\n\n{EXAMPLES}"))]
pub struct Cli {
    /// Says more about what is going on; twice for everything. RUST_LOG goes before it.
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub verbose: u8,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Clone, PartialEq, Eq, Debug, Subcommand)]
pub enum Command {
    /// Runs a guest and reports what the host found.
    #[command(after_help = EXIT_STATUSES)]
    #[command(after_long_help = format!("{EXIT_STATUSES}\n\n{EXAMPLES}"))]
    Run(RunArgs),
    /// Judges a recorded run again, without the machine that ran it.
    #[command(after_help = EXIT_STATUSES)]
    Audit(AuditArgs),
    /// Runs the regression suite: every clean case must be clean, every planted fault be found.
    #[command(after_help = CHECK_STATUSES)]
    Check(CheckArgs),
    /// Says what this host can do, and what is missing for what.
    #[command(after_help = "Exit status: 0 if guests can run here, 3 if not.")]
    Doctor(DoctorArgs),
    /// Shows which stale translations this machine uses, beside what the audit's model allows.
    #[command(after_help = EXIT_STATUSES)]
    Probe(ProbeArgs),
    /// Measures, as ratios within one run; without a name, lists what can be measured.
    #[command(after_help = format!("{}\n{EXIT_STATUSES}", Bench::list()))]
    Bench(BenchArgs),
    /// Runs lacuna inside an emulated machine with real NPT or EPT, for hosts that have neither.
    #[command(after_help = EXIT_STATUSES)]
    #[command(after_long_help = format!("{EXIT_STATUSES}\n\n{}", lab::EXAMPLES))]
    Lab(LabArgs),
}

/// Arguments of `lacuna run`.
#[derive(Clone, PartialEq, Eq, Debug, Args)]
pub struct RunArgs {
    /// Configuration in TOML; configs/reference.toml explains every field.
    pub config: PathBuf,
    /// What runs the guest: the host's KVM, or a simulated machine, which needs none.
    #[arg(long, value_parser = MachineKind::parser())]
    pub machine: Option<MachineKind>,
    /// How the host learns of table writes. This version has trace.
    #[arg(long, value_parser = Mediation::parser())]
    pub mediate: Option<Mediation>,
    /// First event that --mediate step looks at.
    #[arg(long, value_name = "EVENT")]
    pub step_from: Option<u64>,
    /// Last event that --mediate step looks at.
    #[arg(long, value_name = "EVENT")]
    pub step_to: Option<u64>,
    /// How secret pages are closed in the second stage.
    #[arg(long, value_parser = Seal::parser())]
    pub seal: Option<Seal>,
    /// Input of the program, in place of the configuration's.
    #[arg(long, value_name = "FILE")]
    pub input: Option<PathBuf>,
    /// Plants a fault that the host must find; may be given several times.
    #[arg(long, value_name = "FAULT", long_help = inject_help())]
    pub inject: Vec<String>,
    /// Seed of whatever is left to chance; with --machine sim the same seed repeats a run exactly.
    #[arg(long, value_name = "NUMBER")]
    pub seed: Option<u64>,
    /// Form of the report on standard output.
    #[arg(long, value_parser = ReportFormat::parser())]
    pub report: Option<ReportFormat>,
    /// Keeps report, guest log and events in this directory.
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Records the run there too, so that lacuna audit DIR can judge it again.
    #[arg(long)]
    pub record: bool,
}

/// Arguments of `lacuna audit`.
#[derive(Clone, PartialEq, Eq, Debug, Args)]
pub struct AuditArgs {
    /// Folder that lacuna run --record --out DIR wrote.
    #[arg(value_name = "DIR")]
    pub folder: PathBuf,
    /// Prints the report as JSON.
    #[arg(long)]
    pub json: bool,
    /// How the CPUs invalidate translations, in place of how the run's did.
    #[arg(long, value_parser = Profile::parser())]
    pub profile: Option<Profile>,
}

/// Arguments of `lacuna check`.
#[derive(Clone, PartialEq, Eq, Debug, Args)]
pub struct CheckArgs {
    /// A part of the names of the cases to run, or, with * or ?, a pattern of whole names.
    pub filter: Option<String>,
    /// Lists the cases and what is expected of each, and runs none.
    #[arg(long)]
    pub list: bool,
    /// Prints the results, or the list, as one JSON document.
    #[arg(long)]
    pub json: bool,
    /// Writes the results as JUnit XML to this file too.
    #[arg(long, value_name = "FILE", conflicts_with = "list")]
    pub junit: Option<PathBuf>,
    /// Cases that run at a time; as many as there are processors if left out.
    #[arg(long, value_name = "NUMBER")]
    pub jobs: Option<NonZeroUsize>,
    /// Takes all cases, rather than the quick ones.
    #[arg(long)]
    pub all: bool,
    /// Folder of scenarios, files that end in .toml (docs/check.md), in place of the built-in ones.
    #[arg(long, value_name = "DIR")]
    pub scenarios: Option<PathBuf>,
    /// Runs the case of this name in this process and prints what it leaves.
    #[arg(long, value_name = "NAME", hide = true, requires = "scenarios")]
    pub child: Option<String>,
}

/// Arguments of `lacuna doctor`.
#[derive(Clone, PartialEq, Eq, Debug, Args)]
pub struct DoctorArgs {
    /// Prints JSON.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `lacuna probe`.
#[derive(Clone, PartialEq, Eq, Debug, Args)]
pub struct ProbeArgs {
    /// Rounds of each case.
    #[arg(long, value_name = "NUMBER", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: u32,
    /// What runs the guest: the host's KVM, or a simulated machine, whose CPUs cache lazily.
    #[arg(long, value_parser = MachineKind::parser())]
    pub machine: Option<MachineKind>,
    /// Virtual CPUs; two show what one CPU keeps when another changes the tables. Two where the host
    /// has as many processors.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u8).range(1..=8))]
    pub vcpus: Option<u8>,
    /// Seed of whatever is left to chance.
    #[arg(long, value_name = "NUMBER")]
    pub seed: Option<u64>,
    /// Prints the report as JSON; `observed` holds the table.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `lacuna bench`.
#[derive(Clone, PartialEq, Eq, Debug, Args)]
pub struct BenchArgs {
    /// What to measure; without a name, what there is is listed.
    #[arg(value_parser = Bench::parser())]
    pub name: Option<Bench>,
    /// What runs the guests: the host's KVM, or a simulated machine, for the benches that take one.
    #[arg(long, default_value = "kvm", value_parser = MachineKind::parser())]
    pub machine: MachineKind,
    /// Takes as few and as short runs as it can: counts mean something then, times little. To see
    /// that a bench works.
    #[arg(long)]
    pub quick: bool,
    /// Prints JSON.
    #[arg(long)]
    pub json: bool,
}

/// What can be measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bench {
    /// Allocation.
    Alloc,
    /// Zeroing.
    Zero,
    /// Flips.
    Flip,
    /// Boot.
    Boot,
    /// Invalidations.
    Flush,
    /// Ways to learn of table writes.
    Mediate,
    /// The audit by itself.
    Audit,
}

impl Bench {
    /// Everything that can be measured.
    pub const ALL: &'static [Self] =
        &[Self::Alloc, Self::Zero, Self::Flip, Self::Boot, Self::Flush, Self::Mediate, Self::Audit];

    /// Whether simulated machines can be measured; the others measure a processor.
    #[must_use]
    pub const fn takes_sim(self) -> bool {
        matches!(self, Self::Alloc | Self::Zero | Self::Flip | Self::Mediate)
    }

    /// The name on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Alloc => "alloc",
            Self::Zero => "zero",
            Self::Flip => "flip",
            Self::Boot => "boot",
            Self::Flush => "flush",
            Self::Mediate => "mediate",
            Self::Audit => "audit",
        }
    }

    /// What it measures, in a line.
    #[must_use]
    pub const fn what(self) -> &'static str {
        match self {
            Self::Alloc => "secret pages against mapped ones over their whole cycle; policies",
            Self::Zero => "zeroing pageblocks through a window against the direct map",
            Self::Flip => "pageblocks that leave the direct map and come back, several at a time",
            Self::Boot => {
                "time until the allocator is ready, and memory, for guests of several sizes"
            }
            Self::Mediate => {
                "guests whose table writes the host makes, against those that only report"
            }
            Self::Flush => "runs of INVLPG against a CR3 load, in a guest",
            Self::Audit => "what judging a guest's events and tables costs, without a machine",
        }
    }

    /// Everything that can be measured, a line each.
    #[must_use]
    pub fn list() -> String {
        use std::fmt::Write;
        let mut list = "Benches:\n".to_owned();
        for bench in Self::ALL {
            let machines = if bench.takes_sim() { "kvm, sim" } else { "kvm" };
            // Writing to a string does not fail.
            _ = writeln!(list, "  {:8}{:10}{}", bench.name(), machines, bench.what());
        }
        list
    }
}

impl RunArgs {
    /// What the flags put in place of the configuration's settings.
    #[must_use]
    pub fn overrides(&self) -> Overrides {
        let args = self.clone();
        Overrides {
            machine: args.machine,
            mediate: args.mediate,
            step_from: args.step_from,
            step_to: args.step_to,
            seal: args.seal,
            input: args.input,
            inject: args.inject,
            seed: args.seed,
            report: args.report,
            out: args.out,
            record: args.record,
        }
    }
}

/// Starts logging to standard error: warnings, or more with `-v`, or what `RUST_LOG` says. A
/// logger that is already there stays.
pub fn init_log(verbose: u8) {
    let level = match verbose {
        0 => "warn",
        1 => "info",
        _ => "trace",
    };
    let env = env_logger::Env::default().default_filter_or(level);
    if env_logger::Builder::from_env(env).try_init().is_err() {
        log::debug!("another logger is in place");
    }
}

/// Writes `text` to standard output. A reader that went away is no error.
///
/// # Errors
/// Any other failure to write.
pub fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

/// An argument that is one of a few names: the parser lists them where another is given.
trait Choice: Copy + Send + Sync + 'static {
    const CHOICES: &'static [Self];

    fn word(self) -> &'static str;

    fn parser() -> impl TypedValueParser<Value = Self> {
        let words = PossibleValuesParser::new(Self::CHOICES.iter().map(|choice| choice.word()));
        words.try_map(|word| {
            let choice = Self::CHOICES.iter().copied().find(|choice| choice.word() == word);
            choice.ok_or("the name is not known")
        })
    }
}

macro_rules! choices {
    ($($type:ty),*) => {$(
        impl Choice for $type {
            const CHOICES: &'static [Self] = Self::ALL;

            fn word(self) -> &'static str {
                self.name()
            }
        }
    )*};
}

choices!(Profile, MachineKind, Mediation, Seal, ReportFormat, Bench, lab::Kernel);

fn inject_help() -> String {
    use std::fmt::Write;
    let mut help = "Plants a fault that the host must find; may be given several times.\n\n\
                    Faults, and the rules that find them:"
        .to_owned();
    for fault in lacuna_abi::fault::Fault::ALL {
        _ = write!(help, "\n  {:26}{}", fault.name(), fault.rule());
    }
    help
}
