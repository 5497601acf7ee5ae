//! Lacuna: launches small KVM guests whose secret pages are absent from the guest's own direct map
//! and closed in the second-stage page tables, and checks from outside that they are.
//!
//! The command line is thin: everything can be used as a library. Several machines may run in one
//! process.
//!
//! ```no_run
//! use lacuna::{config, run};
//! use std::ops::ControlFlow;
//! use std::path::Path;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let config = config::Config::load(Path::new("quickstart.toml"), &config::Overrides::default())?;
//! let (plan, _warnings) = run::Plan::new(&config)?;
//! let machine = run::Machine::open(run::Host::of(config.machine)?, plan, Vec::new())?;
//! let outcome = machine.start()?.wait(|_work_done| ControlFlow::Continue(()));
//! let result = outcome.with_gate(|gate| gate.result());
//! println!("{} findings", result.findings.len());
//! # Ok(())
//! # }
//! ```

pub mod audit;
pub mod bench;
pub mod check;
pub mod cli;
pub mod config;
pub mod doctor;
pub mod events;
pub mod gate;
pub mod hostile;
pub mod image;
pub mod lab;
pub mod leak;
pub mod machine;
pub mod names;
pub mod printable;
pub mod recording;
pub mod report;
pub mod run;
pub mod second_stage;
pub mod sim;
pub mod stop;
mod ticks;
pub mod trace;
