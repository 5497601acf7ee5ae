//! Why a run ended.

use crate::machine::decode::SealedAccess;
use crate::stop::Stopped;
use lacuna_abi::counter::Counters;

/// Where a vCPU was.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Place {
    /// vCPU.
    pub cpu: u8,
    /// RIP; a simulated CPU has none.
    pub rip: Option<u64>,
    /// Function that holds it.
    pub symbol: Option<String>,
    /// RIP and return addresses, each with its function and how far in, innermost first.
    pub backtrace: Vec<(u64, Option<String>)>,
}

/// How a guest ended itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GuestEnd {
    /// A word for programs: `panic`, `exception`, `triple-fault`, …
    pub kind: &'static str,
    /// A sentence for people.
    pub message: String,
    /// Where.
    pub place: Place,
}

/// Why a run ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum End {
    /// The program came to its end, with this status and these counters.
    Exit(u64, Box<Counters>),
    /// The guest touched a sealed frame.
    Sealed(Box<SealedAccess>, Box<Place>),
    /// The guest failed.
    Guest(Box<GuestEnd>),
    /// It was told to stop.
    Stopped(Stopped, Box<Place>),
    /// Stepping lost track of the guest: what it did from there on is not known.
    Lost(String),
    /// The host failed.
    Host(String),
}
