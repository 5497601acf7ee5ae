//! The regression suite: scenarios from files, the cases that they make, and how each must end.
//!
//! A [`Suite`] is read from a folder ([`Suite::load`]) or comes with the program
//! ([`Suite::built_in`]). A [`Case`] has a configuration ([`Case::config`]) and says what is expected.
//! Whatever runs it, its result is judged by [`judge()`], which looks at nothing but case and report.
//! [`run`] runs many, by any [`Runner`]; [`Children`] gives each a process of its own.
//!
//! ```
//! use lacuna::check::Suite;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let suite = Suite::built_in()?;
//! for case in suite.select(Some("*/sim/*/skip-seal"), false)? {
//!     println!("{}: {}", case.name, case.expected.name());
//! }
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

mod builder;
mod builtin;
mod case;
mod child;
mod confirm;
mod judge;
mod junit;
mod pattern;
mod raw;
mod results;
mod scenario;
mod session;
mod suite;
mod table;
#[cfg(test)]
mod tests;
mod witness;

pub use case::{Case, Expected, Violation};
pub use child::Children;
pub use confirm::Records;
pub use judge::{Judgement, Outcome, Ran, Reported, judge};
pub use junit::junit;
pub use results::{Counts, Document, Results};
pub use session::{Done, Runner, run};
pub use suite::{Suite, SuiteError};
pub use table::{list, table};
pub use witness::{Seen, Witness};
