//! What a CPU executes: root loads, invalidations, changes of control registers.

use super::cpu::Mode;
use super::duty::PageFlush;
use super::epochs::Scope;
use super::profile::Profile;
use super::store::TooMany;
use super::{Tlb, bits};
use lacuna_abi::addr::Gpa;
use lacuna_abi::event::{ControlRegister, Flush};
use lacuna_abi::paging::Level;

impl Tlb {
    /// The CPU loads CR3. Without bit 63 that drops all but global translations of the new PCID
    /// (SDM volume 3, "Operations that Invalidate TLBs and Paging-Structure Caches"; bit 63 is
    /// `no_flush`).
    pub(in crate::audit) fn load(
        &mut self,
        cpu: u8,
        (root, pcid): (Gpa, u16),
        no_flush: bool,
        seq: u64,
    ) -> Result<(), TooMany> {
        let Some(state) = self.running_mut(cpu) else { return Ok(()) };
        let pcid = if state.cr4 & bits::CR4_PCIDE != 0 { pcid } else { 0 };
        let mode = Mode { root, pcid, ..state.mode };
        let scope = (!no_flush).then_some(Scope::Pcid(pcid));
        let entered = state.switch(mode, scope, seq);
        let flushed = scope.map_or(Ok(()), |scope| self.flush_duties(cpu, scope, seq));
        self.stale.switch(cpu, mode.paging.then_some(pcid));
        entered.map_err(|_| TooMany).and(flushed)
    }

    /// The CPU invalidates.
    pub(in crate::audit) fn flush(
        &mut self,
        cpu: u8,
        flush: &Flush,
        seq: u64,
    ) -> Result<(), TooMany> {
        let profile = self.profile;
        let Some(state) = self.running_mut(cpu) else { return Ok(()) };
        let pcid = state.mode.pcid;
        match *flush {
            Flush::NonGlobal => self.flush_scope(cpu, Scope::Pcid(pcid), seq),
            Flush::Pcid(pcid) => self.flush_scope(cpu, Scope::Pcid(pcid), seq),
            Flush::AllPcids => self.flush_scope(cpu, Scope::AllPcids, seq),
            Flush::Everything => self.flush_scope(cpu, Scope::Everything, seq),
            // INVLPG drops global translations of the page under any PCID, and all paths of its
            // own PCID, whatever the address.
            Flush::Pages { va, count, level } => {
                let spares_globals =
                    profile == Profile::IntelInvlpgErratum && state.cr4 & bits::CR4_PCIDE != 0;
                let spares_paths = profile == Profile::Amd && state.efer & bits::EFER_TCE != 0;
                let flush = PageFlush { va, count, level, pcid, globals: !spares_globals, seq };
                self.flush_pages(cpu, &flush, !spares_paths)
            }
            // INVPCID of type 0 drops what translates the address: of the paths only those.
            Flush::PageOfPcid { va, pcid } => {
                let (count, level, globals) = (1, Level::Pt, false);
                let flush = PageFlush { va, count, level, pcid, globals, seq };
                self.flush_pages(cpu, &flush, false)
            }
        }
    }

    /// The CPU changes a control register. CR0.WP and EFER.NXE change what a cached entry permits,
    /// not what is cached (SDM volume 3, "Access Rights").
    pub(in crate::audit) fn control(
        &mut self,
        cpu: u8,
        register: ControlRegister,
        (old, new): (u64, u64),
        seq: u64,
    ) -> Result<(), TooMany> {
        let Some(state) = self.running_mut(cpu) else { return Ok(()) };
        let known = match register {
            ControlRegister::Cr0 => &mut state.cr0,
            ControlRegister::Cr4 => &mut state.cr4,
            ControlRegister::Efer => &mut state.efer,
        };
        // Only a change that the record and what is known agree on invalidates anything.
        let changed = (old ^ new) & (*known ^ new);
        *known = new;
        let mode = Mode {
            paging: state.cr0 & bits::CR0_PG != 0,
            globals: state.cr4 & bits::CR4_PGE != 0,
            pcid: if state.cr4 & bits::CR4_PCIDE != 0 { state.mode.pcid } else { 0 },
            ..state.mode
        };
        let has = |bit| changed & bit != 0;
        let gone = |bit| has(bit) && new & bit == 0;
        let (everything, pcid) = match register {
            ControlRegister::Cr0 => (gone(bits::CR0_PG), false),
            ControlRegister::Cr4 => (
                has(bits::CR4_PGE) || gone(bits::CR4_PCIDE),
                has(bits::CR4_PAE) || (has(bits::CR4_SMEP) && new & bits::CR4_SMEP != 0),
            ),
            ControlRegister::Efer => (false, false),
        };
        if everything {
            let flushed = self.flush_scope(cpu, Scope::Everything, seq);
            let entered = self.running_mut(cpu).map_or(Ok(()), |cpu| cpu.flush_for(mode, seq));
            self.stale.switch(cpu, mode.paging.then_some(mode.pcid));
            return entered.map_err(|_| TooMany).and(flushed);
        }
        let was = state.mode;
        let entered = if mode == was { Ok(()) } else { state.switch(mode, None, seq) };
        if mode != was {
            self.stale.switch(cpu, mode.paging.then_some(mode.pcid));
        }
        let flushed =
            if pcid { self.flush_scope(cpu, Scope::Pcid(mode.pcid), seq) } else { Ok(()) };
        entered.map_err(|_| TooMany).and(flushed)
    }

    fn flush_scope(&mut self, cpu: u8, scope: Scope, seq: u64) -> Result<(), TooMany> {
        if let Some(state) = self.cpus.get_mut(usize::from(cpu)) {
            state.flush(scope, seq);
        }
        self.flush_duties(cpu, scope, seq)
    }

    fn flush_duties(&mut self, cpu: u8, scope: Scope, seq: u64) -> Result<(), TooMany> {
        let Self { stale, duties, epochs, .. } = self;
        epochs.flush(cpu, scope, seq);
        let mut kept = Ok(());
        if !stale.is_empty() {
            stale.flush(cpu, scope, seq, &mut |duty| kept = kept.and(duties.add(&duty, epochs)));
        }
        kept
    }

    pub(super) fn flush_pages(
        &mut self,
        cpu: u8,
        flush: &PageFlush,
        all_paths: bool,
    ) -> Result<(), TooMany> {
        let mut kept = Ok(());
        let Self { cpus, stale, duties, epochs, .. } = self;
        if !stale.is_empty() {
            stale.flush_pages(cpu, flush, all_paths, &mut |duty| {
                kept = kept.and(duties.add(&duty, epochs));
            });
        }
        kept = kept.and(duties.invalidate(cpu, flush, epochs));
        if let Some(state) = cpus.get_mut(usize::from(cpu)) {
            state.flush_pages(flush, all_paths);
        }
        kept
    }
}
