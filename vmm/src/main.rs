//! The command `lacuna`.
#![forbid(unsafe_code)]

use clap::Parser;
use lacuna::cli::{self, Cli, Command};
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = Cli::parse();
    cli::init_log(cli.verbose);
    match &cli.command {
        Command::Run(args) => cli::run(args),
        Command::Check(args) => cli::check(args),
        Command::Doctor(args) => cli::doctor(args),
        Command::Probe(args) => cli::probe(args),
        Command::Bench(args) => cli::bench(args),
        Command::Audit(args) => cli::audit(args),
        Command::Lab(args) => cli::lab(args),
    }
    .into()
}
