//! Where everything lies: guest-physical regions and their guest-virtual places.
//!
//! Every region starts on a 2 MiB boundary. The *zone*, the memory that the guest's allocator
//! hands out, starts at 4 GiB and is the only region in the direct map and the only one whose
//! frames may become secret. Everything else lies below 3 GiB, each region with a virtual place of
//! its own in a PML4 slot of its own.

use crate::MAX_CPUS;
use crate::addr::{BLOCK_FRAMES, BLOCK_SIZE, FrameRange, Gfn, Gpa, Gva, PAGE_SIZE};
use crate::event::{RING_BYTES, RING_RECORDS};

/// Start of the direct map: `DIRECT_MAP + gpa` maps `gpa`.
pub const DIRECT_MAP: Gva = Gva(0xffff_8880_0000_0000);
/// Start of the mermap region: one window per CPU, [`WINDOW_STRIDE`] apart.
pub const MERMAP: Gva = Gva(0xffff_9100_0000_0000);
/// Where the table pool is mapped, unless under direct paging.
pub const POOL: Gva = Gva(0xffff_c000_0000_0000);
/// Where the copy of the tables is mapped, read-only, under direct paging.
pub const TABLE_COPY: Gva = Gva(0xffff_c400_0000_0000);
/// Where boot information, call pages and event rings are mapped.
pub const SHARED: Gva = Gva(0xffff_c800_0000_0000);
/// Where the input region is mapped, read-only.
pub const INPUT: Gva = Gva(0xffff_d000_0000_0000);
/// Where the workload's own memory is mapped.
pub const SCRATCH: Gva = Gva(0xffff_d800_0000_0000);
/// Where the page metadata is mapped.
pub const METADATA: Gva = Gva(0xffff_ea00_0000_0000);
/// Where the per-CPU areas (stacks, descriptor tables) are mapped, [`CPU_STRIDE`] apart.
pub const CPU_AREA: Gva = Gva(0xffff_fe00_0000_0000);
/// Where the kernel image is linked and mapped.
pub const IMAGE: Gva = Gva(0xffff_ffff_8020_0000);

/// Bytes of address space for one CPU's window.
pub const WINDOW_STRIDE: u64 = 1 << 30;
/// Pages in the 4 KiB part of a window, the last of which is the reserve: one page table.
pub const WINDOW_PAGES: u64 = 512;
/// Where the 2 MiB part of a window starts, from the window's start.
pub const WINDOW_LARGE_OFFSET: u64 = 512 << 20;
/// 2 MiB slots in the 2 MiB part of a window.
pub const WINDOW_LARGE_SLOTS: u64 = 4;

/// Bytes of address space for one CPU's area.
pub const CPU_STRIDE: u64 = 256 << 10;
/// Physical bytes behind one CPU's area.
pub const CPU_BYTES: u64 = 128 << 10;

/// Physical address at which the zone starts.
pub const ZONE_START: Gpa = Gpa(4 << 30);
/// Physical address at which the image starts.
pub const IMAGE_START: Gpa = Gpa(0x20_0000);
/// Where the regions below the zone must end: device memory follows.
pub const LOW_END: Gpa = Gpa(3 << 30);

/// Bytes of metadata for one frame (`lacuna-guest` asserts that its structure has this size).
pub const PAGE_META_BYTES: u64 = 32;
/// Bytes of metadata for one pageblock (likewise asserted).
pub const BLOCK_META_BYTES: u64 = 128;

/// Smallest zone that a guest can work with, in MiB.
pub const MIN_MEMORY_MIB: u64 = 16;
/// Largest zone: what one PML4 slot of direct map and the region below 3 GiB can serve.
pub const MAX_MEMORY_MIB: u64 = 64 << 10;
/// Largest input region in bytes.
pub const MAX_INPUT: u64 = 256 << 20;
/// Largest scratch region in bytes.
pub const MAX_SCRATCH: u64 = 512 << 20;

/// One part of a CPU's area: `len` bytes of physical memory at `phys` from the area's physical
/// start, mapped at `virt` from the area's virtual start. What lies between two parts is a guard:
/// never mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CpuPart {
    /// What it is, for messages.
    pub name: &'static str,
    /// Offset in the area's address space.
    pub virt: u64,
    /// Offset in the area's physical memory.
    pub phys: u64,
    /// Bytes.
    pub len: u64,
}

impl CpuPart {
    /// One past the part's last address on CPU `cpu`: where a stack starts.
    #[must_use]
    pub const fn top(&self, cpu: usize) -> Gva {
        self.start(cpu).wrapping_add(self.len)
    }

    /// First address of the part on CPU `cpu`.
    #[must_use]
    pub const fn start(&self, cpu: usize) -> Gva {
        cpu_area(cpu).wrapping_add(self.virt)
    }
}

/// The main stack of a CPU.
pub const MAIN_STACK: CpuPart = CpuPart { name: "main stack", virt: 0x1000, phys: 0, len: 0x10000 };
/// IST 1: exceptions.
pub const EXCEPTION_STACK: CpuPart =
    CpuPart { name: "exception stack (IST 1)", virt: 0x12000, phys: 0x10000, len: 0x4000 };
/// IST 2: double fault.
pub const DOUBLE_FAULT_STACK: CpuPart =
    CpuPart { name: "double-fault stack (IST 2)", virt: 0x17000, phys: 0x14000, len: 0x2000 };
/// IST 3: NMI.
pub const NMI_STACK: CpuPart =
    CpuPart { name: "NMI stack (IST 3)", virt: 0x1a000, phys: 0x16000, len: 0x2000 };
/// IST 4: machine check.
pub const MACHINE_CHECK_STACK: CpuPart =
    CpuPart { name: "machine-check stack (IST 4)", virt: 0x1d000, phys: 0x18000, len: 0x2000 };
/// IST 5: interrupts.
pub const INTERRUPT_STACK: CpuPart =
    CpuPart { name: "interrupt stack (IST 5)", virt: 0x20000, phys: 0x1a000, len: 0x2000 };
/// Per-CPU data: the CPU's number, GDT and TSS.
pub const CPU_DATA: CpuPart =
    CpuPart { name: "per-CPU data", virt: 0x23000, phys: 0x1c000, len: 0x2000 };

/// All parts of a CPU's area, in order of address.
pub const CPU_PARTS: [CpuPart; 7] = [
    MAIN_STACK,
    EXCEPTION_STACK,
    DOUBLE_FAULT_STACK,
    NMI_STACK,
    MACHINE_CHECK_STACK,
    INTERRUPT_STACK,
    CPU_DATA,
];

/// Address of a CPU's area.
#[must_use]
pub const fn cpu_area(cpu: usize) -> Gva {
    CPU_AREA.wrapping_add(cpu as u64 * CPU_STRIDE)
}

/// Address of a CPU's mermap window.
#[must_use]
pub const fn window(cpu: usize) -> Gva {
    MERMAP.wrapping_add(cpu as u64 * WINDOW_STRIDE)
}

/// The address of `gpa` in the direct map.
#[must_use]
pub const fn direct_map(gpa: Gpa) -> Gva {
    DIRECT_MAP.wrapping_add(gpa.0)
}

/// Bytes of the shared region in front of the per-CPU parts: boot information in the first page,
/// the sequence page in the second.
const SHARED_HEAD: u64 = 2 * PAGE_SIZE;
/// Bytes of one CPU's part of the shared region: call page, report page, ring.
const SHARED_CPU: u64 = 2 * PAGE_SIZE + RING_BYTES;

/// Offset of the boot information in the shared region.
pub const BOOT_INFO_OFFSET: u64 = 0;
/// Offset of the sequence page in the shared region: the counter that numbers events, followed by
/// one progress word for each CPU.
pub const SEQUENCE_OFFSET: u64 = PAGE_SIZE;

/// Offset of a CPU's call page in the shared region: arguments and results of its gate calls.
#[must_use]
pub const fn call_page_offset(cpu: usize) -> u64 {
    SHARED_HEAD + cpu as u64 * SHARED_CPU
}

/// Offset of a CPU's report page in the shared region: exceptions and panics, which may interrupt
/// a gate call.
#[must_use]
pub const fn report_page_offset(cpu: usize) -> u64 {
    call_page_offset(cpu) + PAGE_SIZE
}

/// Offset of a CPU's event ring in the shared region.
#[must_use]
pub const fn ring_offset(cpu: usize) -> u64 {
    report_page_offset(cpu) + PAGE_SIZE
}

/// A physical region and its virtual place.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Region {
    /// First physical address.
    pub gpa: Gpa,
    /// First virtual address. For the zone, its place in the direct map.
    pub va: Gva,
    /// Bytes, a multiple of the page size; 0 for a region that this guest does not have.
    pub len: u64,
}

impl Region {
    /// The region's frames; `None` if it is empty.
    #[must_use]
    pub const fn frames(&self) -> Option<FrameRange> {
        FrameRange::new(self.gpa.frame(), self.len / PAGE_SIZE)
    }

    /// Whether `gpa` lies in the region.
    #[must_use]
    pub const fn contains(&self, gpa: Gpa) -> bool {
        gpa.0 >= self.gpa.0 && gpa.0 - self.gpa.0 < self.len
    }

    /// Whether `va` lies in the region's virtual place.
    #[must_use]
    pub const fn contains_va(&self, va: Gva) -> bool {
        va.0 >= self.va.0 && va.0 - self.va.0 < self.len
    }

    /// One past the region's last physical address.
    #[must_use]
    pub const fn end(&self) -> Gpa {
        Gpa(self.gpa.0 + self.len)
    }

    /// Physical address of `va`, which must lie in the region.
    #[must_use]
    pub const fn gpa_of(&self, va: Gva) -> Gpa {
        Gpa(self.gpa.0 + (va.0 - self.va.0))
    }

    /// Virtual address of `gpa`, which must lie in the region.
    #[must_use]
    pub const fn va_of(&self, gpa: Gpa) -> Gva {
        Gva(self.va.0 + (gpa.0 - self.gpa.0))
    }
}

/// What a guest needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Needs {
    /// Bytes that the kernel image fills, from its first to its last section.
    pub image: u64,
    /// Memory for the allocator, in MiB.
    pub memory_mib: u64,
    /// Virtual CPUs.
    pub cpus: usize,
    /// Bytes of input.
    pub input: u64,
    /// Bytes of workload memory.
    pub scratch: u64,
}

/// Why a guest cannot be laid out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LayoutError {
    /// Memory outside [`MIN_MEMORY_MIB`] to [`MAX_MEMORY_MIB`], or not a multiple of 2 MiB.
    Memory,
    /// No CPU, or more than [`MAX_CPUS`].
    Cpus,
    /// More than [`MAX_INPUT`] bytes of input.
    Input,
    /// More than [`MAX_SCRATCH`] bytes of workload memory.
    Scratch,
    /// The image is empty, or the regions together do not fit below [`LOW_END`].
    Low,
}

/// Where everything lies in one guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Layout {
    /// Number of virtual CPUs.
    pub cpus: usize,
    /// The kernel image.
    pub image: Region,
    /// The table pool: every page table lies here, and nothing else.
    pub pool: Region,
    /// Boot information, call pages, event rings; host-visible, never secret.
    pub shared: Region,
    /// Input; host-visible, never secret; read-only for the guest.
    pub input: Region,
    /// Stacks and per-CPU data.
    pub cpu_areas: Region,
    /// Metadata: one record a frame, then one record a pageblock.
    pub metadata: Region,
    /// Workload memory.
    pub scratch: Region,
    /// What the table pool holds, for the guest to read: kept by the host under direct paging,
    /// otherwise not mapped and never touched.
    pub table_copy: Region,
    /// What the allocator hands out; `va` is its place in the direct map.
    pub zone: Region,
}

const fn round_up(len: u64) -> u64 {
    len.div_ceil(BLOCK_SIZE) * BLOCK_SIZE
}

impl Layout {
    /// Lays out a guest.
    ///
    /// # Errors
    /// [`LayoutError`] names the need that cannot be met.
    pub fn new(needs: &Needs) -> Result<Self, LayoutError> {
        if !(MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&needs.memory_mib)
            || !needs.memory_mib.is_multiple_of(2)
        {
            return Err(LayoutError::Memory);
        }
        if needs.cpus == 0 || needs.cpus > MAX_CPUS {
            return Err(LayoutError::Cpus);
        }
        if needs.input > MAX_INPUT {
            return Err(LayoutError::Input);
        }
        if needs.scratch > MAX_SCRATCH {
            return Err(LayoutError::Scratch);
        }
        if needs.image == 0 || needs.image > 64 << 20 {
            return Err(LayoutError::Low);
        }
        let cpus = needs.cpus as u64;
        let zone_len = needs.memory_mib << 20;
        let frames = zone_len / PAGE_SIZE;
        let blocks = zone_len / BLOCK_SIZE;
        let mut next = IMAGE_START;
        let mut place = |va: Gva, len: u64| {
            let region = Region { gpa: next, va, len: round_up(len) };
            next = region.end();
            region
        };
        let image = place(IMAGE, needs.image);
        let metadata_len = frames * PAGE_META_BYTES + blocks * BLOCK_META_BYTES;
        let low = needs.image + needs.input + needs.scratch + metadata_len;
        let pool_len = pool_pages(zone_len, low, cpus) * PAGE_SIZE;
        let pool = place(POOL, pool_len);
        let layout = Self {
            cpus: needs.cpus,
            image,
            pool,
            shared: place(SHARED, SHARED_HEAD + cpus * SHARED_CPU),
            input: place(INPUT, needs.input),
            cpu_areas: place(CPU_AREA, cpus * CPU_BYTES),
            metadata: place(METADATA, metadata_len),
            scratch: place(SCRATCH, needs.scratch),
            table_copy: place(TABLE_COPY, pool_len),
            zone: Region { gpa: ZONE_START, va: direct_map(ZONE_START), len: zone_len },
        };
        if next > LOW_END {
            return Err(LayoutError::Low);
        }
        Ok(layout)
    }

    /// One past the last address of the regions below the zone.
    #[must_use]
    pub const fn low_end(&self) -> Gpa {
        self.table_copy.end()
    }

    /// The zone's frames.
    #[must_use]
    pub const fn zone_frames(&self) -> FrameRange {
        match self.zone.frames() {
            Some(frames) => frames,
            None => FrameRange::single(Gfn(0)),
        }
    }

    /// Number of pageblocks in the zone.
    #[must_use]
    pub const fn zone_blocks(&self) -> u64 {
        self.zone.len / BLOCK_SIZE
    }

    /// Number of a zone frame's pageblock, counted from the zone's start; `None` outside.
    #[must_use]
    pub fn block_of(&self, frame: Gfn) -> Option<u64> {
        let zone = self.zone_frames();
        zone.contains(frame).then(|| (frame.0 - zone.start().0) / BLOCK_FRAMES)
    }

    /// The pageblock records, which follow the frame records in the metadata region.
    #[must_use]
    pub const fn block_metadata(&self) -> Gva {
        self.metadata.va.wrapping_add(self.zone.len / PAGE_SIZE * PAGE_META_BYTES)
    }

    /// The regions, named, in order of physical address; empty ones included.
    #[must_use]
    pub const fn regions(&self) -> [(&'static str, Region); 9] {
        [
            ("image", self.image),
            ("table pool", self.pool),
            ("shared", self.shared),
            ("input", self.input),
            ("per-CPU areas", self.cpu_areas),
            ("metadata", self.metadata),
            ("scratch", self.scratch),
            ("copy of the tables", self.table_copy),
            ("zone", self.zone),
        ]
    }

    /// What `va` is for.
    #[must_use]
    pub fn place_of(&self, va: Gva) -> Place {
        if let Some(offset) = va.offset_from(MERMAP)
            && offset < self.cpus as u64 * WINDOW_STRIDE
        {
            let cpu = usize::try_from(offset / WINDOW_STRIDE).unwrap_or(usize::MAX);
            return Place::Window(cpu);
        }
        // The whole slot counts as direct map, not only the part behind which there is memory.
        if va >= DIRECT_MAP && va.0 - DIRECT_MAP.0 < 512 << 30 {
            return Place::DirectMap;
        }
        if self.pool.contains_va(va) {
            return Place::Pool;
        }
        Place::Other
    }
}

/// What a virtual address is for, as far as the rules tell places apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// The direct map's PML4 slot.
    DirectMap,
    /// The mermap window of this CPU.
    Window(usize),
    /// The table pool's own mapping.
    Pool,
    /// Anything else.
    Other,
}

/// Pages that the table pool gets: what the first tables need, at least, and as much again plus
/// 256 pages to split pageblocks and for further address spaces.
const fn pool_pages(zone: u64, low: u64, cpus: u64) -> u64 {
    let direct_map = zone.div_ceil(1 << 30) + 1;
    // Regions other than the zone are mapped by 4 KiB or 2 MiB pages: one table per 2 MiB is
    // enough for either.
    let others = low.div_ceil(BLOCK_SIZE) + 8 * 4;
    let windows = cpus * 3;
    let cpu_areas = cpus + 2;
    let boot = 1 + 8 + direct_map + others + windows + cpu_areas;
    2 * boot + 256
}

/// Most pages that a table pool can have.
pub const MAX_POOL_PAGES: usize = 4096;

const _: () = assert!(
    round_up(pool_pages(MAX_MEMORY_MIB << 20, LOW_END.0, MAX_CPUS as u64) * PAGE_SIZE)
        <= MAX_POOL_PAGES as u64 * PAGE_SIZE
);
const _: () = assert!(RING_RECORDS.is_power_of_two());
const _: () = assert!(WINDOW_STRIDE * MAX_CPUS as u64 <= 512 << 30);
const _: () = assert!(CPU_DATA.phys + CPU_DATA.len <= CPU_BYTES);
const _: () = assert!(CPU_DATA.virt + CPU_DATA.len < CPU_STRIDE);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::paging::Level;
    use std::vec::Vec;

    const NEEDS: Needs =
        Needs { image: 100_000, memory_mib: 256, cpus: 2, input: 5_000, scratch: 1 << 20 };

    #[test]
    fn regions_neither_overlap_nor_leave_their_place() {
        for (memory_mib, cpus) in [(16, 1), (256, 2), (8 << 10, 8), (64 << 10, 8)] {
            let layout = Layout::new(&Needs { memory_mib, cpus, ..NEEDS }).unwrap();
            let regions = layout.regions();
            for pair in regions.windows(2) {
                assert!(pair[0].1.end() <= pair[1].1.gpa, "{pair:?}");
            }
            assert!(layout.low_end() <= LOW_END);
            assert_eq!(layout.table_copy.len, layout.pool.len);
            assert!(regions.iter().all(|(_, r)| r.gpa.is_aligned(BLOCK_SIZE)));
        }
    }

    #[test]
    fn every_region_has_a_root_slot_of_its_own() {
        let layout = Layout::new(&NEEDS).unwrap();
        let mut slots: Vec<_> =
            layout.regions().iter().map(|(_, r)| Level::Pml4.index(r.va)).collect();
        slots.push(Level::Pml4.index(MERMAP));
        slots.sort_unstable();
        let before = slots.len();
        slots.dedup();
        assert_eq!(slots.len(), before);
    }

    #[test]
    fn impossible_needs_are_named() {
        let with = |f: fn(&mut Needs)| {
            let mut needs = NEEDS;
            f(&mut needs);
            Layout::new(&needs).unwrap_err()
        };
        assert_eq!(with(|n| n.memory_mib = 15), LayoutError::Memory);
        assert_eq!(with(|n| n.memory_mib = 17), LayoutError::Memory);
        assert_eq!(with(|n| n.memory_mib = u64::MAX), LayoutError::Memory);
        assert_eq!(with(|n| n.cpus = 0), LayoutError::Cpus);
        assert_eq!(with(|n| n.cpus = 9), LayoutError::Cpus);
        assert_eq!(with(|n| n.input = u64::MAX), LayoutError::Input);
        assert_eq!(with(|n| n.scratch = u64::MAX), LayoutError::Scratch);
        assert_eq!(with(|n| n.image = 0), LayoutError::Low);
    }

    #[test]
    fn stacks_have_guards_on_both_sides() {
        let mut end = 0;
        for part in CPU_PARTS {
            assert!(part.virt > end, "{} has no guard below", part.name);
            end = part.virt + part.len;
        }
        assert!(end < CPU_STRIDE);
    }

    #[test]
    fn places_are_told_apart() {
        let layout = Layout::new(&NEEDS).unwrap();
        assert_eq!(layout.place_of(window(1)), Place::Window(1));
        assert_eq!(layout.place_of(window(2)), Place::Other);
        assert_eq!(layout.place_of(direct_map(ZONE_START)), Place::DirectMap);
        assert_eq!(layout.place_of(POOL), Place::Pool);
        assert_eq!(layout.place_of(Gva(0)), Place::Other);
    }
}
