//! What the allocator and the mermap need of the machine below them.
//!
//! The same allocator runs on bare metal and in an ordinary process; everything that differs is
//! behind [`Platform`]. Addresses that reach it are guest addresses: no Rust object lives there,
//! and the platform refuses an address outside the memory that programs may touch.

use core::marker::PhantomData;
use lacuna_abi::addr::{FrameRange, Gpa, Gva};
use lacuna_abi::direct::TableOp;
use lacuna_abi::event::{EntryWrite, Flush, Life};
use lacuna_abi::gate::{OpKind, Status};
use lacuna_abi::paging::{Entry, Level};

/// A set of CPUs, one bit each.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CpuSet(pub u8);

impl CpuSet {
    /// No CPU.
    pub const NONE: Self = Self(0);

    /// The first `cpus` CPUs.
    #[must_use]
    pub const fn first(cpus: usize) -> Self {
        if cpus >= 8 { Self(u8::MAX) } else { Self((1 << cpus) - 1) }
    }

    /// This CPU alone.
    #[must_use]
    pub const fn only(cpu: usize) -> Self {
        Self(1 << cpu)
    }

    /// Whether the set holds no CPU.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether the set holds `cpu`.
    #[must_use]
    pub const fn contains(self, cpu: usize) -> bool {
        self.0 & (1 << cpu) != 0
    }

    /// The CPUs that are in either set.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// An address space: a root and the identifier that its translations are cached under.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AddressSpace {
    /// Physical address of the root table.
    pub root: Gpa,
    /// Process-context identifier, 0 while CR4.PCIDE is clear.
    pub pcid: u16,
}

/// The host refused a gate call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GateError {
    /// Why.
    pub status: Status,
    /// Which operation of the list, from 0.
    pub index: u32,
}

/// The machine below the allocator.
///
/// Every method that changes what a CPU may cache, or what the tables say, also records it: the
/// host judges the guest by these records.
pub trait Platform {
    /// Number of the CPU that runs this. Meaningful while interrupts are off, or where tasks do
    /// not migrate.
    fn cpu(&self) -> usize;

    /// Number of CPUs.
    fn cpus(&self) -> usize;

    /// The address space that this CPU runs in.
    fn space(&self) -> AddressSpace;

    /// Turns interrupts off; says whether they were on.
    fn interrupts_off(&self) -> bool;

    /// Turns interrupts on again if they were on.
    fn interrupts_restore(&self, were_on: bool);

    /// One turn of a loop that waits for another CPU.
    fn relax(&self);

    /// The entry at `at`, in the table pool.
    fn read_entry(&self, at: Gpa) -> Entry;

    /// Writes a run of entries of one table, the first at `at`, each by one aligned 64-bit store,
    /// and records it. The platform fills in [`EntryWrite::grant`].
    ///
    /// # Errors
    /// [`GateError`], only under direct paging: the host refused the write, and nothing was written.
    fn write_entries(&self, at: Gpa, write: &EntryWrite) -> Result<(), GateError>;

    /// Fills the table of `level` at `table`, a page of the table pool that no root reaches: entry
    /// `i` becomes `first.nth_of_run(level, i)`, for all of them. Records that, so that the host
    /// knows what is linked when the table is.
    ///
    /// # Errors
    /// As [`Self::write_entries`].
    fn fill_table(&self, table: Gpa, level: Level, first: Entry) -> Result<(), GateError>;

    /// Carries out these operations in order: under direct paging in as few calls as that takes.
    ///
    /// # Errors
    /// [`GateError`] names the first that the host refused; those before it are done.
    #[inline(always)]
    fn write_tables(&self, ops: &[TableOp]) -> Result<(), GateError> {
        for (index, op) in (0..).zip(ops) {
            let done = match *op {
                TableOp::Write { at, ref write } => self.write_entries(at, write),
                TableOp::Fill(fill) => self.fill_table(fill.table, fill.level, fill.first),
            };
            done.map_err(|error| GateError { index, ..error })?;
        }
        Ok(())
    }

    /// Records, then executes a local invalidation.
    fn flush(&self, flush: Flush);

    /// Has every CPU of the set, this one included if it is in it, carry out `flush`, and returns
    /// when all of them have. Not from under the zone lock.
    fn shootdown(&self, flush: Flush, cpus: CpuSet);

    /// Makes one gate call with these operations.
    ///
    /// # Errors
    /// [`GateError`] names the first operation that the host refused; those before it are done.
    fn gate(&self, ops: &[(OpKind, FrameRange)]) -> Result<(), GateError>;

    /// Records a step in the life of frames.
    fn life(&self, life: Life, frames: FrameRange);

    /// Fills `bytes` from `va`, both multiples of 8, with zeroes.
    fn zero(&self, va: Gva, bytes: u64);

    /// Fills `bytes` from `va`, both multiples of 8, with a word.
    fn fill(&self, va: Gva, bytes: u64, value: u64) {
        (0..bytes).step_by(8).for_each(|offset| self.store(va.wrapping_add(offset), value));
    }

    /// Copies `bytes` from `from` to `to`, which do not overlap.
    fn copy(&self, to: Gva, from: Gva, bytes: u64);

    /// The word at `va`, a multiple of 8. No access that follows is made before it.
    fn load(&self, va: Gva) -> u64;

    /// Stores a word at `va`, a multiple of 8. No access that precedes is made after it.
    fn store(&self, va: Gva, value: u64);

    /// Records an event that did not happen: for faults.
    #[cfg(feature = "faults")]
    fn forge(&self, event: lacuna_abi::event::Event) {
        let _ = event;
    }

    /// Whether this fault is planted.
    #[cfg(feature = "faults")]
    fn planted(&self, fault: lacuna_abi::fault::Fault) -> bool;

    /// Whether this slip is planted: never, where no test plants any.
    #[cfg(feature = "faults")]
    fn slips(&self, slip: lacuna_abi::fault::Slip) -> bool {
        let _ = slip;
        false
    }
}

/// Carries out each of the operations, whatever becomes of the others, in as few gate calls as that
/// takes: one more for each that the host refuses, whose number and error `refused` is told.
pub(crate) fn gate_each<P: Platform>(
    platform: &P,
    ops: &[(OpKind, FrameRange)],
    refused: impl FnMut(usize, GateError),
) {
    each(ops, |ops| platform.gate(ops), refused);
}

/// The same of any operations, which `call` asks for.
#[inline(always)]
pub(crate) fn each<T>(
    ops: &[T],
    call: impl Fn(&[T]) -> Result<(), GateError>,
    mut refused: impl FnMut(usize, GateError),
) {
    let mut next = 0;
    while next < ops.len()
        && let Err(error) = call(&ops[next..])
    {
        next += (error.index as usize).min(ops.len() - next - 1);
        refused(next, error);
        next += 1;
    }
}

/// Whether `fault` is planted on `platform`; without the feature `faults` the question is not in
/// the image.
#[cfg(feature = "faults")]
macro_rules! planted {
    ($platform:expr, $fault:ident) => {
        $crate::platform::Platform::planted($platform, lacuna_abi::fault::Fault::$fault)
    };
}
#[cfg(not(feature = "faults"))]
macro_rules! planted {
    ($platform:expr, $fault:ident) => {{
        let _ = &$platform;
        false
    }};
}

/// Whether the test's `slip` is planted, likewise.
#[cfg(feature = "faults")]
macro_rules! slips {
    ($platform:expr, $slip:ident) => {
        $crate::platform::Platform::slips($platform, lacuna_abi::fault::Slip::$slip)
    };
}
#[cfg(not(feature = "faults"))]
macro_rules! slips {
    ($platform:expr, $slip:ident) => {{
        let _ = &$platform;
        false
    }};
}
/// Records an event that did not happen; without the feature `faults` nothing can.
#[cfg(feature = "faults")]
macro_rules! forge {
    ($platform:expr, $event:expr) => {
        $crate::platform::Platform::forge($platform, $event)
    };
}
#[cfg(not(feature = "faults"))]
macro_rules! forge {
    ($platform:expr, $event:expr) => {{
        let _ = (&$platform, $event);
    }};
}
pub(crate) use {forge, planted, slips};

/// Interrupts are off on this CPU while this lives. It stays there, and so does whatever holds it:
/// dropped elsewhere it would turn on the interrupts of another CPU.
#[must_use = "interrupts are on again when this is dropped"]
pub struct InterruptsOff<'p, P: Platform> {
    platform: &'p P,
    were_on: bool,
    _stays: PhantomData<*const ()>,
}

impl<'p, P: Platform> InterruptsOff<'p, P> {
    /// Turns interrupts off.
    pub fn new(platform: &'p P) -> Self {
        Self { platform, were_on: platform.interrupts_off(), _stays: PhantomData }
    }
}

impl<P: Platform> Drop for InterruptsOff<'_, P> {
    fn drop(&mut self) {
        self.platform.interrupts_restore(self.were_on);
    }
}
