//! What the VMM tells the guest before its first instruction: one read-only page.

use crate::ABI_VERSION;
use crate::addr::Gpa;
use crate::layout::{
    CPU_AREA, IMAGE, INPUT, Layout, METADATA, POOL, Region, SCRATCH, SHARED, TABLE_COPY, direct_map,
};
use crate::words_struct;

/// First word of the boot information: "LACUNA" and the format's number.
pub const BOOT_MAGIC: u64 = 0x4c41_4355_4e41_0001;

/// Pageblocks are zeroed when they flip, ahead of demand (the pre-zeroed pool).
pub const FEATURE_PREZERO: u64 = 1 << 0;
/// An empty pool may be refilled by flipping pageblocks. Without it every secret request of an
/// empty pool fails.
pub const FEATURE_FLIP: u64 = 1 << 1;
/// Freed mapped pages are filled with a pattern, which is checked when they are handed out.
pub const FEATURE_POISON: u64 = 1 << 2;
/// Secret pages that are known to be zero are looked at when they are handed out as zero.
pub const FEATURE_CHECK_ZERO: u64 = 1 << 3;
/// Freed mapped pages are zeroed. Without this and [`FEATURE_POISON`] they are left as they are.
pub const FEATURE_ZERO_ON_FREE: u64 = 1 << 4;
/// Freed secret pages that were written to are zeroed, many together. Without it they are zeroed
/// when they are handed out as zero, or leave the unmapped side.
pub const FEATURE_SCRUB: u64 = 1 << 5;
/// Shootdown interrupts are sent by gate call ([`crate::gate::Call::Interrupt`]), not through the
/// CPU's own interrupt controller.
pub const FEATURE_GATE_SHOOTDOWN: u64 = 1 << 6;
/// Direct paging: the table pool is not mapped. Entries are read in the copy of the tables and written
/// by gate call ([`crate::direct`]); what was written is recorded all the same, when the call has
/// returned.
pub const FEATURE_DIRECT_PAGING: u64 = 1 << 7;
/// Everything that this version knows.
pub const FEATURES: u64 = FEATURE_PREZERO
    | FEATURE_FLIP
    | FEATURE_POISON
    | FEATURE_CHECK_ZERO
    | FEATURE_ZERO_ON_FREE
    | FEATURE_SCRUB
    | FEATURE_GATE_SHOOTDOWN
    | FEATURE_DIRECT_PAGING;

/// [`BootInfo::min_free`] that leaves the choice to the guest.
pub const MIN_FREE_BY_SIZE: u64 = u64::MAX;

words_struct! {
    /// Boot information. Virtual places are constants of [`crate::layout`]; only physical places
    /// and sizes differ from guest to guest.
    pub struct BootInfo {
        /// [`BOOT_MAGIC`].
        magic,
        /// [`ABI_VERSION`] of the VMM.
        version,
        /// `FEATURE_*` bits.
        features,
        /// Number of virtual CPUs.
        cpus,
        /// Physical address of the root that all CPUs start with.
        root,
        /// Pages of the table pool that the VMM used; those behind are free and zero.
        pool_used,
        /// Faults and slips to plant, one bit each ([`crate::fault::Fault::bit`],
        /// [`crate::fault::Slip::bit`]); 0 in ordinary guests.
        faults,
        /// Seed for whatever the guest draws at random.
        seed,
        /// Pages of the mapped side that are kept for callers that cannot wait;
        /// [`MIN_FREE_BY_SIZE`] for what suits the zone.
        min_free,
        /// Free secret pages below which pageblocks flip ahead of demand.
        pool_low,
        /// Free secret pages up to which they do.
        pool_high,
        /// Physical address of the image.
        image_gpa,
        /// Bytes of the image.
        image_len,
        /// Physical address of the table pool.
        pool_gpa,
        /// Bytes of the table pool.
        pool_len,
        /// Physical address of the shared region.
        shared_gpa,
        /// Bytes of the shared region.
        shared_len,
        /// Physical address of the input region.
        input_gpa,
        /// Bytes of the input region.
        input_len,
        /// Physical address of the per-CPU areas.
        cpu_areas_gpa,
        /// Bytes of the per-CPU areas.
        cpu_areas_len,
        /// Physical address of the metadata.
        metadata_gpa,
        /// Bytes of the metadata.
        metadata_len,
        /// Physical address of the workload memory.
        scratch_gpa,
        /// Bytes of the workload memory.
        scratch_len,
        /// Physical address of the copy of the tables.
        table_copy_gpa,
        /// Bytes of the copy of the tables.
        table_copy_len,
        /// Physical address of the zone.
        zone_gpa,
        /// Bytes of the zone.
        zone_len,
        /// Program to run ([`crate::workload::Program`]).
        program,
        /// First argument of the program; what it means is said there.
        arg0,
        /// Second argument of the program.
        arg1,
        /// Third argument of the program.
        arg2,
    }
}

/// Why boot information cannot be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BadBootInfo {
    /// The magic is wrong: this is no boot information.
    Magic,
    /// It was written for another version of the ABI.
    Version(u64),
    /// It asks for features that this image does not know.
    Features(u64),
}

impl BootInfo {
    /// Boot information for a guest laid out like this; the caller fills in the rest.
    #[must_use]
    pub fn for_layout(layout: &Layout) -> Self {
        Self {
            magic: BOOT_MAGIC,
            version: ABI_VERSION,
            cpus: layout.cpus as u64,
            image_gpa: layout.image.gpa.0,
            image_len: layout.image.len,
            pool_gpa: layout.pool.gpa.0,
            pool_len: layout.pool.len,
            shared_gpa: layout.shared.gpa.0,
            shared_len: layout.shared.len,
            input_gpa: layout.input.gpa.0,
            input_len: layout.input.len,
            cpu_areas_gpa: layout.cpu_areas.gpa.0,
            cpu_areas_len: layout.cpu_areas.len,
            metadata_gpa: layout.metadata.gpa.0,
            metadata_len: layout.metadata.len,
            scratch_gpa: layout.scratch.gpa.0,
            scratch_len: layout.scratch.len,
            table_copy_gpa: layout.table_copy.gpa.0,
            table_copy_len: layout.table_copy.len,
            zone_gpa: layout.zone.gpa.0,
            zone_len: layout.zone.len,
            ..Self::default()
        }
    }

    /// Checks magic, version and features.
    ///
    /// # Errors
    /// [`BadBootInfo`] names the first that does not fit.
    pub const fn check(&self) -> Result<(), BadBootInfo> {
        if self.magic != BOOT_MAGIC {
            return Err(BadBootInfo::Magic);
        }
        if self.version != ABI_VERSION {
            return Err(BadBootInfo::Version(self.version));
        }
        if self.features & !FEATURES != 0 {
            return Err(BadBootInfo::Features(self.features & !FEATURES));
        }
        Ok(())
    }

    /// The layout that this describes.
    #[must_use]
    pub fn layout(&self) -> Layout {
        let region = |gpa, va, len| Region { gpa: Gpa(gpa), va, len };
        Layout {
            cpus: usize::try_from(self.cpus).unwrap_or(0),
            image: region(self.image_gpa, IMAGE, self.image_len),
            pool: region(self.pool_gpa, POOL, self.pool_len),
            shared: region(self.shared_gpa, SHARED, self.shared_len),
            input: region(self.input_gpa, INPUT, self.input_len),
            cpu_areas: region(self.cpu_areas_gpa, CPU_AREA, self.cpu_areas_len),
            metadata: region(self.metadata_gpa, METADATA, self.metadata_len),
            scratch: region(self.scratch_gpa, SCRATCH, self.scratch_len),
            table_copy: region(self.table_copy_gpa, TABLE_COPY, self.table_copy_len),
            zone: region(self.zone_gpa, direct_map(Gpa(self.zone_gpa)), self.zone_len),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Needs;

    #[test]
    fn a_layout_survives_boot_information() {
        let needs = Needs { image: 1 << 20, memory_mib: 64, cpus: 2, input: 77, scratch: 1 << 16 };
        let layout = Layout::new(&needs).unwrap();
        let info = BootInfo::for_layout(&layout);
        assert_eq!(BootInfo::from_words(&info.to_words()).layout(), layout);
        assert_eq!(info.check(), Ok(()));
    }

    #[test]
    fn foreign_boot_information_is_refused() {
        let good = BootInfo { magic: BOOT_MAGIC, version: ABI_VERSION, ..BootInfo::default() };
        assert_eq!(BootInfo::default().check(), Err(BadBootInfo::Magic));
        assert_eq!(BootInfo { version: 9, ..good }.check(), Err(BadBootInfo::Version(9)));
        let odd = BootInfo { features: 1 << 40, ..good };
        assert_eq!(odd.check(), Err(BadBootInfo::Features(1 << 40)));
    }
}
