//! What the program `probe` needs of a simulated machine: accesses that may fault, and every kind of
//! invalidation. A simulated CPU has them all; what it does not have is code that is fetched through
//! its tables.

use super::machine::SimMachine;
use super::mmu::Fault;
use super::tlb::Invalidation;
use crate::audit::ControlPolicy;
use crate::machine::kvm::CR4;
use crate::machine::sys::here_in_code;
use lacuna_abi::addr::{Gpa, Gva};
use lacuna_abi::event::{ControlRegister, Event, Flush, Sighting};
use lacuna_abi::observe::{Access, Means, Observation};
use lacuna_abi::paging::Level;
use lacuna_guest::platform::Platform;
use lacuna_guest::programs::staleness::Attempts;
use lacuna_guest::ring;
use std::sync::atomic::Ordering::{Acquire, Release};

/// What a store of an attempt leaves.
const STORED: u64 = 1;

impl SimMachine {
    /// CR4.PCIDE changes. There is one PCID, so that only what invalidates is simulated: clearing it.
    fn set_pcide(&self, set: bool) {
        let (without, with) = (CR4, CR4 | ControlPolicy::CR4_PCIDE);
        let (old, new) = if set { (without, with) } else { (with, without) };
        let register = ControlRegister::Cr4;
        let site = here_in_code();
        self.record(site, Event::Control { register, old, new });
        self.see(site, Sighting::Control { register, old, new });
        if let Some((_, cpu)) = self.enter().filter(|_| !set) {
            cpu.mmu().invalidate(&Invalidation::Everything);
        }
    }
}

impl Attempts for SimMachine {
    fn offers(&self, _: Means) -> bool {
        true
    }

    fn code(&self) -> Option<Gpa> {
        None
    }

    fn make_room(&self, records: u64) {
        if self.enter().is_some() {
            ring::make_room(&self.ring(0), records);
        }
    }

    fn spin(&self) {
        // Another CPU has to run for this one to see anything.
        self.relax();
    }

    fn attempt(&self, access: Access, va: Gva) -> Option<u64> {
        let (number, cpu) = self.enter()?;
        let write = access == Access::Write;
        let reached = cpu.mmu().access(&self.ram, self.space, va, write);
        let gpa = match reached {
            Ok(gpa) => {
                self.see_access(number, va, write);
                gpa
            }
            Err(Fault::Page { .. }) => return None,
            Err(fault) => self.fault(number, va, write, fault),
        };
        let Some(word) = self.ram.word(gpa) else {
            self.fault(number, va, write, Fault::NoMemory(gpa))
        };
        if write {
            word.store(STORED, Release);
            return Some(0);
        }
        Some(word.load(Acquire))
    }

    fn observe(&self, look: impl FnOnce() -> Observation) {
        let Some((_, cpu)) = self.enter() else { return };
        let were_on = cpu.interrupts_off();
        ring::observe(&self.ring(here_in_code()), look);
        cpu.interrupts_restore(were_on);
    }

    fn prepare(&self, means: Means) {
        if means == Means::Cr3NoFlush {
            self.set_pcide(true);
        }
    }

    fn invalidate(&self, means: Means, va: Gva) {
        let pcid = self.space.pcid;
        let flush = match means {
            Means::None | Means::Ipi => return,
            Means::Invlpg => Flush::Pages { va, count: 1, level: Level::Pt },
            Means::Cr3 => Flush::NonGlobal,
            Means::Cr3NoFlush => {
                let root = self.space.root;
                let (site, no_flush) = (here_in_code(), true);
                self.record(site, Event::RootLoad { root, pcid, no_flush });
                self.see(site, Sighting::RootLoad { root, pcid, no_flush });
                return;
            }
            Means::InvpcidAddress => Flush::PageOfPcid { va, pcid },
            Means::InvpcidContext => Flush::Pcid(pcid),
            Means::InvpcidAll | Means::Pge => Flush::Everything,
            Means::InvpcidNonGlobal => Flush::AllPcids,
        };
        self.flush(flush);
    }

    fn restore(&self, means: Means) {
        if means == Means::Cr3NoFlush {
            self.set_pcide(false);
        }
    }
}
