//! What the program `probe` needs of the bare machine: accesses whose page faults are survived, and
//! every invalidation that the processor offers.
#![allow(unsafe_code)]

use crate::machine::Machine;
use crate::{cpu, ring};
use core::arch::global_asm;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;
use lacuna_abi::MAX_CPUS;
use lacuna_abi::addr::{Gpa, Gva};
use lacuna_abi::event::{ControlRegister, Event, Flush};
use lacuna_abi::layout::{IMAGE, IMAGE_START};
use lacuna_abi::observe::{Access, Means, Observation};
use lacuna_abi::paging::Level;
use lacuna_guest::platform::Platform;
use lacuna_guest::programs::staleness::Attempts;

/// What a store of an attempt leaves.
const STORED: u64 = 1;
/// PCID of all that is cached: CR4.PCIDE is clear, or CR3 names this one.
const PCID: u16 = 0;

// Each access is one instruction at a known place, so that a fault there can be told from all others.
global_asm!(
    ".balign 16",
    ".type attempt_load, @function",
    "attempt_load:",
    "mov rax, [rdi]",
    "mov edx, 1",
    "ret",
    ".size attempt_load, . - attempt_load",
    ".type attempt_store, @function",
    "attempt_store:",
    "mov [rdi], rsi",
    "mov edx, 1",
    "ret",
    ".size attempt_store, . - attempt_store",
    ".type attempt_fetch, @function",
    "attempt_fetch:",
    "call rdi",
    "mov edx, 1",
    "ret",
    ".size attempt_fetch, . - attempt_fetch",
    ".type attempt_failed, @function",
    "attempt_failed:",
    "xor eax, eax",
    "xor edx, edx",
    "ret",
    ".size attempt_failed, . - attempt_failed",
    ".type attempt_target, @function",
    "attempt_target:",
    "ret",
    ".size attempt_target, . - attempt_target",
);

/// What an attempt returns, in RAX and RDX.
#[repr(C)]
struct Attempted {
    value: u64,
    done: u64,
}

unsafe extern "C" {
    fn attempt_load(va: u64) -> Attempted;
    fn attempt_store(va: u64, value: u64) -> Attempted;
    fn attempt_fetch(va: u64) -> Attempted;
    #[link_name = "attempt_failed"]
    safe static FAILED: u8;
    #[link_name = "attempt_target"]
    safe static TARGET: u8;
}

/// Address that each CPU is about to fetch from; 0 for none.
static FETCHED: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];

/// Where to go on after a page fault of an attempt, with which stack pointer; `None` for a fault of
/// anything else.
pub(crate) fn resume(rip: u64, rsp: u64, cr2: u64) -> Option<(u64, u64)> {
    let failed = &raw const FAILED as u64;
    if rip == attempt_load as *const () as u64 || rip == attempt_store as *const () as u64 {
        return Some((failed, rsp));
    }
    let fetched = FETCHED[cpu::number() % MAX_CPUS].load(Relaxed);
    // The call has pushed its return address.
    (fetched != 0 && rip == fetched && cr2 == fetched).then(|| (failed, rsp + 8))
}

fn invpcid(flush: Flush, kind: u64, va: Gva) {
    ring::record(cpu::here(), Event::Flush(flush));
    cpu::invpcid(kind, [PCID.into(), va.0]);
}

fn set_pcide(set: bool) {
    let old = cpu::cr4();
    let new = if set { old | cpu::CR4_PCIDE } else { old & !cpu::CR4_PCIDE };
    ring::record(cpu::here(), Event::Control { register: ControlRegister::Cr4, old, new });
    cpu::set_cr4(new);
}

impl Attempts for Machine {
    fn offers(&self, means: Means) -> bool {
        match means {
            Means::None | Means::Invlpg | Means::Cr3 | Means::Pge | Means::Ipi => true,
            Means::Cr3NoFlush => cpu::has_pcid(),
            Means::InvpcidAddress
            | Means::InvpcidContext
            | Means::InvpcidAll
            | Means::InvpcidNonGlobal => cpu::has_invpcid(),
        }
    }

    fn code(&self) -> Option<Gpa> {
        // The image lies in one piece, and its text in frames of its own, mapped nowhere else.
        let offset = Gva(&raw const TARGET as u64).offset_from(IMAGE)?;
        Some(IMAGE_START.wrapping_add(offset))
    }

    fn make_room(&self, records: u64) {
        ring::make_room(records);
    }

    fn spin(&self) {
        // No PAUSE: a hypervisor may have a loop of them exit.
    }

    fn attempt(&self, access: Access, va: Gva) -> Option<u64> {
        let here = &FETCHED[cpu::number() % MAX_CPUS];
        // SAFETY: the program's pages, in which no Rust object lies, or a function that only returns;
        // what is not mapped raises a page fault, after which `resume` goes on.
        let Attempted { value, done } = unsafe {
            match access {
                Access::Read => attempt_load(va.0),
                Access::Write => attempt_store(va.0, STORED),
                Access::Fetch => {
                    here.store(va.0, Relaxed);
                    let attempted = attempt_fetch(va.0);
                    here.store(0, Relaxed);
                    attempted
                }
            }
        };
        (done != 0).then_some(value)
    }

    fn observe(&self, look: impl FnOnce() -> Observation) {
        ring::observe(cpu::here(), look);
    }

    fn prepare(&self, means: Means) {
        if means == Means::Cr3NoFlush {
            set_pcide(true);
        }
    }

    fn invalidate(&self, means: Means, va: Gva) {
        match means {
            Means::None | Means::Ipi => {}
            Means::Invlpg => self.flush(Flush::Pages { va, count: 1, level: Level::Pt }),
            Means::Cr3 => self.flush(Flush::NonGlobal),
            Means::Pge => self.flush(Flush::Everything),
            Means::Cr3NoFlush => {
                let root = self.space().root;
                let load = Event::RootLoad { root, pcid: PCID, no_flush: true };
                ring::record(cpu::here(), load);
                cpu::load_root_without_flush();
            }
            Means::InvpcidAddress => invpcid(Flush::PageOfPcid { va, pcid: PCID }, 0, va),
            Means::InvpcidContext => invpcid(Flush::Pcid(PCID), 1, Gva(0)),
            Means::InvpcidAll => invpcid(Flush::Everything, 2, Gva(0)),
            Means::InvpcidNonGlobal => invpcid(Flush::AllPcids, 3, Gva(0)),
        }
    }

    fn restore(&self, means: Means) {
        if means == Means::Cr3NoFlush {
            set_pcide(false);
        }
    }
}
