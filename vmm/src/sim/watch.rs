//! What the simulated machine itself sees under `--mediate step`: every store of an entry, every
//! invalidation, every load of a control register, below [`lacuna_guest::platform::Platform`], where
//! the guest's code cannot reach.

use super::cpu;
use super::machine::SimMachine;
use super::tlb::Invalidation;
use crate::run::End;
use lacuna_abi::event::{EntryStores, Flush, Sighting};
use lacuna_abi::paging::{Entry, Level};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Release};

use lacuna_abi::addr::{Gpa, Gva};
use lacuna_abi::layout::Place;

/// Sightings that may wait for the audit before a CPU has it look at them.
const MANY: usize = 1 << 14;

impl SimMachine {
    /// Stores an entry.
    #[inline]
    pub(super) fn store_entry(&self, site: u32, at: Gpa, word: &AtomicU64, new: Entry) {
        let Some(sightings) = &self.sightings else {
            word.store(new.0, Release);
            return;
        };
        let old = Entry(word.load(Acquire));
        let stores = EntryStores { at, level: Level::Pt, count: 1, old, new, grant: 0 };
        let number = cpu::number();
        // Below MAX_CPUS, 8.
        let seen = sightings.stores((number as u8, site), stores, || word.store(new.0, Release));
        if let Err(error) = seen {
            self.end(number, End::Host(error.to_string()));
        }
    }

    /// Notes what this CPU is about to do.
    pub(super) fn see(&self, site: u32, sighting: Sighting) {
        let Some(sightings) = &self.sightings else { return };
        let number = cpu::number();
        if let Err(error) = sightings.note(number as u8, site, sighting) {
            self.end(number, End::Host(error.to_string()));
        }
    }

    /// Notes that CPU `number` has read or written an address, if it lies in a window.
    #[inline]
    pub(super) fn see_access(&self, number: usize, va: Gva, write: bool) {
        let Some(sightings) = &self.sightings else { return };
        if !matches!(self.ram.layout().place_of(va), Place::Window(_)) {
            return;
        }
        if let Err(error) = sightings.access((number as u8, 0), va, write) {
            self.end(number, End::Host(error.to_string()));
        }
    }

    /// Carries out an invalidation that `flush` names.
    pub(super) fn invalidate(&self, site: u32, flush: Flush, what: &Invalidation) {
        self.see(site, Sighting::Flush(flush));
        self.cpus[cpu::number()].mmu().invalidate(what);
    }

    /// Has the audit look at what was seen, if that has become much.
    pub(super) fn show_sightings(&self) {
        if self.sightings.as_ref().is_some_and(|sightings| sightings.len() >= MANY) {
            self.make_room(cpu::number());
        }
    }
}
