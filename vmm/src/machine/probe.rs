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

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_abi::walk::translate;

    const FRAME: Gfn = Gfn(0x10_0005);

    fn touch(kind: ProbeKind) -> Touch {
        Touch::new(3, kind, FRAME.gpa().wrapping_add(0x128), 7)
    }

    /// The outcome when the vCPU leaves at the instruction that makes the access.
    fn standing(kind: ProbeKind, exit: Exit) -> Touched {
        let touch = touch(kind);
        touch.outcome(&exit, &ProbeEnd { rip: touch.start().rip, rax: 7 })
    }

    fn is_failure(outcome: &Touched) -> bool {
        matches!(outcome, Touched::Failed(_))
    }

    #[test]
    fn each_way_in_which_kvm_stops_an_access_is_a_trap() {
        use ProbeKind::{Fetch, Read, Write};
        let gpa = FRAME.gpa().wrapping_add(0x128);
        for (kind, exit) in [
            (Read, Exit::MmioRead { gpa }),
            (Write, Exit::MmioWrite { gpa }),
            (Fetch, Exit::InternalError { suberror: 1 }),
            (Read, Exit::Fault),
            (Write, Exit::Fault),
            (Fetch, Exit::Fault),
            (Read, Exit::MemoryFault { gpa: FRAME.gpa() }),
        ] {
            assert_eq!(standing(kind, exit), Touched::Trapped, "{kind:?} {exit:?}");
        }
    }

    #[test]
    fn what_says_nothing_of_the_access_is_no_trap() {
        use ProbeKind::{Fetch, Read, Write};
        let gpa = FRAME.gpa().wrapping_add(0x130);
        for (kind, exit) in [
            (Read, Exit::MmioRead { gpa }),
            (Read, Exit::MmioWrite { gpa: FRAME.gpa().wrapping_add(0x128) }),
            (Write, Exit::MmioRead { gpa: FRAME.gpa().wrapping_add(0x128) }),
            (Read, Exit::InternalError { suberror: 1 }),
            (Fetch, Exit::InternalError { suberror: 3 }),
            (Read, Exit::MemoryFault { gpa: PROBE_START }),
            (Read, Exit::Shutdown),
            (Fetch, Exit::Interrupted),
            (Write, Exit::Error(22)),
            (Write, Exit::Halt),
        ] {
            assert!(is_failure(&standing(kind, exit)), "{kind:?} {exit:?}");
        }
        // A fault elsewhere than at the access: the probe's own memory.
        let elsewhere = touch(Read).outcome(&Exit::Fault, &ProbeEnd { rip: 0, rax: 7 });
        assert!(is_failure(&elsewhere));
    }

    #[test]
    fn what_reaches_the_out_behind_it_went_through() {
        let exit = Exit::PortOut { port: PROBE_PORT, value: 7, len: 4 };
        for kind in ProbeKind::ALL {
            assert_eq!(standing(*kind, exit), Touched::WentThrough, "{kind:?}");
        }
        let other = touch(ProbeKind::Read).outcome(&exit, &ProbeEnd { rip: 0, rax: 8 });
        assert!(is_failure(&other), "a read that saw something else");
        let other = touch(ProbeKind::Fetch).outcome(&exit, &ProbeEnd { rip: 0, rax: 7 });
        assert!(is_failure(&other), "an OUT that was executed elsewhere");
        let port = Exit::PortOut { port: PROBE_PORT + 1, value: 7, len: 4 };
        assert!(is_failure(&standing(ProbeKind::Read, port)));
    }

    #[test]
    fn the_tables_lead_to_code_control_page_and_each_frame_and_nowhere_else() {
        let memory = ProbeMemory::new().unwrap();
        let frames = [FRAME, Gfn(0x20_0000), FRAME];
        drop(memory.open(&frames).unwrap());
        let read = |at: Gpa| {
            let offset = at.offset_from(PROBE_START)?;
            Some(Entry(
                memory.words().words(offset, 1)?[0].load(std::sync::atomic::Ordering::Acquire),
            ))
        };
        let own = |page| PROBE_START.wrapping_add(page * PAGE_SIZE).frame();
        let mapped = [own(CODE), own(CONTROL)].into_iter().chain(frames);
        for (index, frame) in (0..).zip(mapped) {
            let leaf = translate(&read, PROBE_START, page(index)).unwrap();
            assert_eq!((leaf.frame(), leaf.level), (frame, Level::Pt));
            assert!(leaf.writable && leaf.executable && !leaf.user && !leaf.global());
        }
        assert!(translate(&read, PROBE_START, page(5)).is_err());
        let third = Touch::new(2, ProbeKind::Read, FRAME.gpa().wrapping_add(8), 0);
        assert_eq!(third.va, page(4).wrapping_add(8));
        assert!(memory.open(&[FRAME; MAX_TOUCHES + 1]).is_err());
    }

    #[test]
    fn what_a_guest_left_there_is_gone_in_the_next_round() {
        let memory = ProbeMemory::new().unwrap();
        drop(memory.open(&[FRAME; 4]).unwrap());
        let copy = || -> Vec<u64> {
            let count = usize::try_from(PROBE_BYTES / 8).unwrap();
            let words = memory.words().words(0, count).unwrap();
            words.iter().map(|word| word.load(std::sync::atomic::Ordering::Acquire)).collect()
        };
        let fresh = copy();
        let count = usize::try_from(PROBE_BYTES / 8).unwrap();
        memory
            .words()
            .words(0, count)
            .unwrap()
            .iter()
            .for_each(|word| word.store(u64::MAX, Release));
        drop(memory.open(&[FRAME; 4]).unwrap());
        assert_eq!(copy(), fresh);
    }
}
