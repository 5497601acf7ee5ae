//! How the use of secret pages fails, the allocator's own included.

use crate::mermap::MermapError;
use crate::platform::GateError;

/// The first failure among steps that each go on whatever became of the others.
#[derive(Debug, Default)]
pub(crate) struct FirstFailure(Option<UseError>);

impl FirstFailure {
    /// Notes how a step went.
    pub(crate) fn note(&mut self, step: Result<(), UseError>) {
        self.0 = self.0.or(step.err());
    }

    /// The first failure, or `other` if nothing failed.
    pub(crate) fn or<E: From<UseError>>(self, other: E) -> E {
        self.0.map_or(other, E::from)
    }

    /// Whether all went well.
    ///
    /// # Errors
    /// The first failure.
    pub(crate) fn result(self) -> Result<(), UseError> {
        self.0.map_or(Ok(()), Err)
    }
}

/// Why secret pages could not be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum UseError {
    /// The pages or bytes are not all in the allocation or window, or not a multiple of 8.
    OutOfRange,
    /// The window was opened for reading.
    ReadOnly,
    /// The host refused to open or to release.
    Gate(GateError),
    /// The host refused to close what was open. The pages are never handed out again.
    Unsealed(GateError),
    /// No window could be had.
    Window(MermapError),
    /// Interrupts are off, so that other CPUs cannot be waited for.
    WouldBlock,
}
