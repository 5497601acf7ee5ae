//! Events on their way from the guest's rings to the audit: taken from the rings, put in the order
//! of their numbers, recorded. Nothing is lost in silence.

mod file;
mod ring;
mod sequencer;
mod sightings;
mod waiting;

pub use file::{EVENTS_MAGIC, EventFile, read_events};
pub use ring::{Drained, RingReader};
pub use sequencer::{Sequencer, Standing};
pub use sightings::{MANY_SIGHTINGS, Sightings};
