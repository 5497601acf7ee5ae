//! How the use of secret pages fails, the allocator's own included.

use crate::mermap::MermapError;
use crate::platform::GateError;

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
