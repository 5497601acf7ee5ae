//! What an instruction did, once it has run.

use super::effects::{Access, Intended, Special, Watch};
use super::{Stepper, Why, failed};
use crate::machine::state::Registers;
use lacuna_abi::addr::{Gpa, Gva};
use lacuna_abi::event::{ControlRegister, EntryStores, Flush, Sighting};
use lacuna_abi::paging::{Entry, Level};

/// CR4.PCIDE.
const CR4_PCIDE: u64 = 1 << 17;
/// Bit 63 of a MOV to CR3.
const NO_FLUSH: u64 = 1 << 63;

impl Stepper {
    /// Notes what an instruction did.
    pub(super) fn note(
        &self,
        before: &Registers,
        intended: &Intended,
        after: &Registers,
    ) -> Result<(), Why> {
        let site = site_of(intended.instruction.ip());
        let done = done(before, intended, after);
        if intended.beyond.is_some_and(|beyond| done.is_none_or(|done| done > beyond)) {
            return Err("its stores go further than they are followed".into());
        }
        let is_done = |offset| done.is_none_or(|done| offset < done);
        self.used(site, intended, is_done)?;
        for watch in intended.watches.iter().filter(|watch| is_done(watch.offset)) {
            self.stored(site, watch)?;
        }
        self.loaded(site, before, intended.special, after)?;
        match intended.special {
            Some(Special::Invalidate(va)) => {
                self.flushed(site, Flush::Pages { va, count: 1, level: Level::Pt })
            }
            Some(Special::Pcid(kind, [pcid, va])) => {
                let pcid = u16::try_from(pcid & 0xfff).unwrap_or(0);
                self.flushed(
                    site,
                    match kind {
                        0 => Flush::PageOfPcid { va: Gva(va), pcid },
                        1 => Flush::Pcid(pcid),
                        2 => Flush::Everything,
                        _ => Flush::AllPcids,
                    },
                )
            }
            Some(Special::LoadRoot(value)) => self.root(site, before, value),
            Some(Special::PushFlags(va)) => {
                self.hide_trap_flag(va);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Notes accesses through windows.
    fn used(
        &self,
        site: u32,
        intended: &Intended,
        is_done: impl Fn(u64) -> bool,
    ) -> Result<(), Why> {
        for access in intended.accesses.iter().filter(|access| is_done(access.offset)) {
            let Access { page, write, .. } = *access;
            self.sightings.access((self.cpu, site), page, write).map_err(failed)?;
        }
        Ok(())
    }

    /// Notes what an instruction did before it ended in an exception: what it changed, and of a string
    /// what it had reached.
    pub(super) fn note_changed(
        &self,
        before: &Registers,
        intended: &Intended,
        after: &Registers,
    ) -> Result<(), Why> {
        let site = site_of(intended.instruction.ip());
        if let Some(done) = done(before, intended, after) {
            self.used(site, intended, |offset| offset < done)?;
        }
        for watch in &intended.watches {
            if self.memory.load(watch.at).map_err(failed)? != watch.old {
                self.stored(site, watch)?;
            }
        }
        Ok(())
    }

    /// Notes a store to the table pool. No other vCPU runs and the host judges nothing meanwhile: its
    /// number can be taken now, for a grant too.
    fn stored(&self, site: u32, watch: &Watch) -> Result<(), Why> {
        let new = self.memory.load(watch.at).map_err(failed)?;
        if watch.conditional && new == watch.old {
            return Ok(());
        }
        let (at, level, old, new) = (watch.at, Level::Pt, Entry(watch.old), Entry(new));
        let stores = EntryStores { at, level, count: 1, old, new, grant: 0 };
        self.sightings.stores((self.cpu, site), stores, || ()).map_err(failed)
    }

    fn flushed(&self, site: u32, flush: Flush) -> Result<(), Why> {
        self.sightings.note(self.cpu, site, Sighting::Flush(flush)).map_err(failed)
    }

    fn root(&self, site: u32, before: &Registers, value: u64) -> Result<(), Why> {
        let pcids = before.cr4 & CR4_PCIDE != 0;
        let pcid = if pcids { u16::try_from(value & 0xfff).unwrap_or(0) } else { 0 };
        let (root, no_flush) = (Gpa(value & Entry::ADDRESS), pcids && value & NO_FLUSH != 0);
        let same = root == before.root() && !pcids;
        let sighting = if same {
            Sighting::Flush(Flush::NonGlobal)
        } else {
            Sighting::RootLoad { root, pcid, no_flush }
        };
        self.sightings.note(self.cpu, site, sighting).map_err(failed)
    }

    /// Notes changes of control registers, which only instructions for that make.
    fn loaded(
        &self,
        site: u32,
        before: &Registers,
        special: Option<Special>,
        after: &Registers,
    ) -> Result<(), Why> {
        let root = matches!(special, Some(Special::LoadRoot(_)));
        if before.cr3 != after.cr3 && !root {
            return Err("CR3 changed, and it does not load CR3".into());
        }
        for (register, old, new) in [
            (ControlRegister::Cr0, before.cr0, after.cr0),
            (ControlRegister::Cr4, before.cr4, after.cr4),
            (ControlRegister::Efer, before.efer, after.efer),
        ] {
            if old == new {
                continue;
            }
            if special != Some(Special::Control) {
                return Err(format!("{} changed, which it does not do", register.name()));
            }
            let control = Sighting::Control { register, old, new };
            self.sightings.note(self.cpu, site, control).map_err(failed)?;
        }
        Ok(())
    }
}

/// Bytes of a repeated string that were done.
fn done(before: &Registers, intended: &Intended, after: &Registers) -> Option<u64> {
    intended.element.map(|element| {
        let [from, to] = [before, after].map(|at| at.general[Registers::RCX]);
        from.wrapping_sub(to).wrapping_mul(element)
    })
}

/// The site of code at an address: its low half.
const fn site_of(rip: u64) -> u32 {
    let [a, b, c, d, ..] = rip.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}
