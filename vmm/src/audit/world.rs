//! What the audit asks of the machine, and what it is told about it at the start.

use super::Profile;
use lacuna_abi::addr::{FrameRange, Gfn, Gpa};
use lacuna_abi::event::EntryWrite;
use lacuna_abi::gate::PAGE_WORDS;
use lacuna_abi::layout::Layout;
use lacuna_abi::walk::Tables;

/// The entries of one table.
pub type TableWords = [u64; PAGE_WORDS];

/// What the second stage grants of a frame, by its own state.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Denial {
    /// No access gets through.
    Denied,
    /// Accesses get through, and nothing calls for it.
    Open,
    /// Accesses get through because another frame of the same granule is open.
    HeldOpen,
    /// Nothing is ever denied: the seal is off.
    NotEnforced,
}

/// Registers of one CPU, as `control-state` compares them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CpuState {
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// The MSR IA32_EFER.
    pub efer: u64,
    /// Base of the interrupt descriptor table.
    pub idt_base: u64,
    /// Limit of the interrupt descriptor table.
    pub idt_limit: u64,
    /// Base of the global descriptor table.
    pub gdt_base: u64,
    /// Limit of the global descriptor table.
    pub gdt_limit: u64,
}

/// The machine as the audit sees it: a live guest, a recording or a test. Table entries come
/// through [`Tables`]; an entry can be read only inside the table pool.
pub trait World: Tables {
    /// All entries of the table at a frame, each read once; false where no table can be. A machine
    /// that can copy a page at once should.
    fn read_table(&self, table: Gfn, into: &mut TableWords) -> bool {
        (0..).zip(into).all(|(index, word)| {
            let entry = self.read_entry(table.gpa().wrapping_add(8 * index));
            *word = entry.unwrap_or_default().0;
            entry.is_some()
        })
    }

    /// Whether every byte of the frame is zero; `None` if the host cannot see it.
    fn content_is_zero(&self, frame: Gfn) -> Option<bool>;

    /// Offset of the first byte of the frame that is not zero, for the story of a finding; `None` if
    /// there is none or the host cannot tell.
    fn first_nonzero(&self, _frame: Gfn) -> Option<u64> {
        None
    }

    /// Whether all these frames are known to be zero. A machine that can tell of many frames at once
    /// should.
    fn contents_are_zero(&self, frames: FrameRange) -> bool {
        frames.iter().all(|frame| self.content_is_zero(frame) == Some(true))
    }

    /// What the second stage grants of the frame: its own state, not the audit's.
    fn denial(&self, frame: Gfn) -> Denial;

    /// Whether no access to any of these frames gets through. A machine that can tell of many frames at
    /// once should.
    fn denies_all(&self, frames: FrameRange) -> bool {
        frames.iter().all(|frame| self.denial(frame) == Denial::Denied)
    }

    /// The CPU's registers; `None` if they cannot be read now.
    fn cpu_state(&self, cpu: u8) -> Option<CpuState>;

    /// The entry write that the CPU has announced but not yet recorded.
    fn intent(&self, cpu: u8) -> Option<EntryWrite>;
}

/// Bits of control registers that must be set, and bits that must be clear (SDM volume 3,
/// "Control Registers" and "Extended Feature Enable Register").
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ControlPolicy {
    /// Bits of CR0 that must be set.
    pub cr0_set: u64,
    /// Bits of CR0 that must be clear.
    pub cr0_clear: u64,
    /// Bits of CR4 that must be set.
    pub cr4_set: u64,
    /// Bits of CR4 that must be clear.
    pub cr4_clear: u64,
    /// Bits of IA32_EFER that must be set.
    pub efer_set: u64,
    /// Bits of IA32_EFER that must be clear.
    pub efer_clear: u64,
}

impl ControlPolicy {
    /// CR0.WP.
    pub const CR0_WP: u64 = 1 << 16;
    /// CR0.PG.
    pub const CR0_PG: u64 = 1 << 31;
    /// CR4.PGE.
    pub const CR4_PGE: u64 = 1 << 7;
    /// CR4.LA57.
    pub const CR4_LA57: u64 = 1 << 12;
    /// CR4.VMXE: with it set a guest could have guests of its own.
    pub const CR4_VMXE: u64 = 1 << 13;
    /// CR4.PCIDE.
    pub const CR4_PCIDE: u64 = 1 << 17;
    /// CR4.SMEP.
    pub const CR4_SMEP: u64 = 1 << 20;
    /// CR4.SMAP.
    pub const CR4_SMAP: u64 = 1 << 21;
    /// CR4.PKE.
    pub const CR4_PKE: u64 = 1 << 22;
    /// CR4.PKS.
    pub const CR4_PKS: u64 = 1 << 24;
    /// IA32_EFER.NXE.
    pub const EFER_NXE: u64 = 1 << 11;
    /// EFER.SVME, as CR4.VMXE.
    pub const EFER_SVME: u64 = 1 << 12;
    /// EFER.TCE (AMD APM volume 2, "Extended Feature Enable Register").
    pub const EFER_TCE: u64 = 1 << 15;
}

impl Default for ControlPolicy {
    /// WP, PG, PGE and NXE set; everything that changes what an entry or an invalidation means
    /// is off.
    fn default() -> Self {
        Self {
            cr0_set: Self::CR0_WP | Self::CR0_PG,
            cr0_clear: 0,
            cr4_set: Self::CR4_PGE,
            cr4_clear: Self::CR4_LA57
                | Self::CR4_VMXE
                | Self::CR4_PCIDE
                | Self::CR4_SMEP
                | Self::CR4_SMAP
                | Self::CR4_PKE
                | Self::CR4_PKS,
            efer_set: Self::EFER_NXE,
            efer_clear: Self::EFER_TCE | Self::EFER_SVME,
        }
    }
}

/// What the audit is told at the start.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AuditConfig {
    /// Where everything lies. CPU 0 runs from the start, the others from [`super::Audit::start_cpu`]
    /// on.
    pub layout: Layout,
    /// Root that every CPU starts with.
    pub boot_root: Gpa,
    /// Whether a completed seal denies access and drops translations; false with the seal off.
    pub seal_closes: bool,
    /// What the control registers must hold. Bits that must be set are from the start.
    pub control: ControlPolicy,
    /// How the CPUs invalidate.
    pub profile: Profile,
    /// Most findings that are kept in words; the counts stay exact.
    pub max_findings: usize,
}
