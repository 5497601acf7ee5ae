//! What a probe vCPU is made of: memory of its own, first tables, a few instructions; and what the
//! way in which it leaves says of the frame that it touched.
//!
//! Its memory is no region of the guest. KVM finds it in a slot of its own, behind a mapping that is
//! closed while the guest runs, so that a guest which maps the place reaches nothing. Before each
//! round of touches, while no vCPU of the guest runs, all of it is written anew: nothing in it is
//! trusted any longer than that.

use crate::audit::{ProbeKind, Touched};
use crate::machine::exit::Exit;
use crate::machine::sys::{self, Access, HostMapping, Words};
use lacuna_abi::addr::{Gfn, Gpa, Gva, PAGE_SIZE};
use lacuna_abi::layout::LOW_END;
use lacuna_abi::paging::{ENTRIES, Entry, Level};
use std::io;
use std::sync::atomic::Ordering::Release;

/// Where the probe's memory lies: above all low regions, below the zone. Its root comes first.
pub const PROBE_START: Gpa = LOW_END;
/// Bytes of it: a table of each level, the code, and a page to try the probe on.
pub const PROBE_BYTES: u64 = 6 * PAGE_SIZE;
/// Port by which a probe says that its access went through; no device has it.
pub const PROBE_PORT: u16 = 0x4c50;
/// Most touches in one round: what one page table maps, beside the probe's own pages.
pub const MAX_TOUCHES: usize = 256;

/// Pages of the probe's memory: tables from the root down to the page table, code, control page.
const PAGE_TABLE: u64 = 3;
const CODE: u64 = 4;
const CONTROL: u64 = 5;
/// Where its page table maps: code, control page, then a page for each touch.
const BASE: Gva = Gva(1 << 39);
const CODE_INDEX: u64 = 0;
const CONTROL_INDEX: u64 = 1;
const FIRST_TOUCH: u64 = 2;
/// Rights are never what stops a touch.
const ALL_RIGHTS: u64 = Entry::PRESENT | Entry::WRITABLE | Entry::ACCESSED | Entry::DIRTY;

/// `out dx, eax`: what a fetch finds, and what follows each access.
pub const OUT: u8 = 0xef;
/// `mov rax, [rbx]`, then OUT.
const READ_CODE: u64 = u64::from_le_bytes([0x48, 0x8b, 0x03, OUT, 0, 0, 0, 0]);
/// `mov [rbx], rax`, then OUT.
const WRITE_CODE: u64 = u64::from_le_bytes([0x48, 0x89, 0x03, OUT, 0, 0, 0, 0]);
/// What the control page holds throughout, so that it can be executed anywhere.
const CONTROL_WORD: u64 = u64::from_le_bytes([OUT; 8]);

/// Registers with which a touch starts; all others are the same for all.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ProbeStart {
    /// RIP.
    pub rip: u64,
    /// RAX: what a write writes.
    pub rax: u64,
    /// RBX: the address that is read or written.
    pub rbx: u64,
    /// RDX: the port.
    pub rdx: u64,
}

/// Registers after a touch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ProbeEnd {
    /// RIP.
    pub rip: u64,
    /// RAX: what a read read.
    pub rax: u64,
}

/// One touch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Touch {
    /// How.
    pub kind: ProbeKind,
    /// What is touched.
    pub gpa: Gpa,
    /// Through which address.
    pub va: Gva,
    /// What memory holds there: what a read must see, and what a write writes back.
    pub value: u64,
}

impl Touch {
    /// The touch number `index` of a round, of the word at `gpa`.
    #[must_use]
    pub fn new(index: u64, kind: ProbeKind, gpa: Gpa, value: u64) -> Self {
        let va = page(FIRST_TOUCH + index).wrapping_add(gpa.0 % PAGE_SIZE);
        Self { kind, gpa, va, value }
    }

    /// The touch of the probe's own control page that every round starts with: a probe that does not
    /// get through there would call every frame closed.
    #[must_use]
    pub fn control(kind: ProbeKind) -> Self {
        let gpa = PROBE_START.wrapping_add(CONTROL * PAGE_SIZE);
        Self { kind, gpa, va: page(CONTROL_INDEX), value: CONTROL_WORD }
    }

    /// How the vCPU starts.
    #[must_use]
    pub const fn start(&self) -> ProbeStart {
        ProbeStart {
            rip: self.instruction().0,
            rax: if matches!(self.kind, ProbeKind::Write) { self.value } else { 0 },
            rbx: self.va.0,
            rdx: PROBE_PORT as u64,
        }
    }

    /// Where the instruction lies that makes the access.
    const fn instruction(&self) -> Gva {
        match self.kind {
            ProbeKind::Read => page(CODE_INDEX),
            ProbeKind::Write => page(CODE_INDEX).wrapping_add(8),
            ProbeKind::Fetch => self.va,
        }
    }

    /// What came of it, by the way in which the vCPU left. KVM says that the second stage stopped an
    /// access in several ways, and RIP then still stands at the instruction that made it.
    #[must_use]
    pub fn outcome(&self, exit: &Exit, end: &ProbeEnd) -> Touched {
        let stands = end.rip == self.instruction().0;
        match *exit {
            Exit::PortOut { port: PROBE_PORT, len: 4, .. } => self.went_through(end),
            Exit::MmioRead { gpa } if self.kind == ProbeKind::Read && gpa == self.gpa => {
                Touched::Trapped
            }
            Exit::MmioWrite { gpa } if self.kind == ProbeKind::Write && gpa == self.gpa => {
                Touched::Trapped
            }
            Exit::MemoryFault { gpa } if gpa.frame() == self.gpa.frame() => Touched::Trapped,
            Exit::Fault if stands => Touched::Trapped,
            // An instruction that KVM cannot even read.
            Exit::InternalError { suberror: 1 } if self.kind == ProbeKind::Fetch && stands => {
                Touched::Trapped
            }
            Exit::Interrupted => Touched::Failed("it did not come back in time".into()),
            Exit::Shutdown => Touched::Failed("an exception shut the probe vCPU down".into()),
            other => Touched::Failed(format!("the probe vCPU left with {other:?}")),
        }
    }

    fn went_through(&self, end: &ProbeEnd) -> Touched {
        let reached = match self.kind {
            ProbeKind::Read => end.rax == self.value,
            ProbeKind::Write => true,
            // OUT is one byte long; whether RIP has passed it already is KVM's choice.
            ProbeKind::Fetch => end.rip.wrapping_sub(self.va.0) <= 1,
        };
        match reached {
            true => Touched::WentThrough,
            false => Touched::Failed("the probe reached something else than memory".into()),
        }
    }
}

/// Address of the page that the probe's page table maps by this entry.
const fn page(index: u64) -> Gva {
    BASE.wrapping_add(index * PAGE_SIZE)
}

/// The memory of a probe vCPU, in two mappings: the VMM's, and KVM's, which is closed but for the
/// time of a round.
#[derive(Debug)]
pub struct ProbeMemory {
    words: Words,
    mapping: HostMapping,
}

impl ProbeMemory {
    /// New memory, closed.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new() -> io::Result<Self> {
        let file = sys::memory_file(c"lacuna-probe", PROBE_BYTES)?;
        let len = usize::try_from(PROBE_BYTES).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let (words, mapping) = (Words::new(&file, len)?, HostMapping::new(&file, len)?);
        mapping.set(Access::Protection, 0, len, true)?;
        Ok(Self { words, mapping })
    }

    /// Address in this process at which KVM finds it.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.mapping.address()
    }

    /// The memory as the VMM sees it, and simulated CPUs.
    #[must_use]
    pub const fn words(&self) -> &Words {
        &self.words
    }

    /// Writes all of it anew, with a page for each touch of `frames`, and opens it until the guard is
    /// dropped. No vCPU of the guest may run meanwhile.
    ///
    /// # Errors
    /// What the kernel says; `InvalidInput` for more than [`MAX_TOUCHES`].
    pub fn open(&self, frames: &[Gfn]) -> io::Result<Opened<'_>> {
        if frames.len() > MAX_TOUCHES {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.write(frames).ok_or(io::ErrorKind::InvalidInput)?;
        self.mapping.set(Access::Protection, 0, self.mapping.len(), false)?;
        Ok(Opened(self))
    }

    fn write(&self, frames: &[Gfn]) -> Option<()> {
        self.words.zero(0, self.mapping.len()).then_some(())?;
        let put = |page: u64, index: u64, value: u64| {
            let word = self.words.words(page * PAGE_SIZE + 8 * index, 1)?.first()?;
            word.store(value, Release);
            Some(())
        };
        let own = |page| PROBE_START.wrapping_add(page * PAGE_SIZE).frame();
        for (page, level) in (0..).zip([Level::Pml4, Level::Pdpt, Level::Pd]) {
            put(page, level.index(BASE), Entry::new(own(page + 1), Entry::TABLE).0)?;
        }
        let mapped = [own(CODE), own(CONTROL)].into_iter().chain(frames.iter().copied());
        for (index, frame) in (0..).zip(mapped) {
            put(PAGE_TABLE, index, Entry::new(frame, ALL_RIGHTS).0)?;
        }
        put(CODE, 0, READ_CODE)?;
        put(CODE, 1, WRITE_CODE)?;
        (0..ENTRIES).try_for_each(|index| put(CONTROL, index, CONTROL_WORD))
    }
}

/// The probe's memory while it is open.
#[must_use = "the memory is closed when this is dropped"]
pub struct Opened<'p>(&'p ProbeMemory);

impl Drop for Opened<'_> {
    fn drop(&mut self) {
        let mapping = &self.0.mapping;
        if let Err(error) = mapping.set(Access::Protection, 0, mapping.len(), true) {
            // The guest could use it as memory, and nothing else: it is written anew before each use.
            log::warn!("the memory of the probe vCPU cannot be closed: {error}");
        }
    }
}
