//! What a guest finds when it starts: tables, image, boot information.
//!
//! All first tables are built here, the direct map included, so that the guest's own start does
//! not grow with its memory.

use crate::image::Image;
use crate::machine::memory::{Memory, MemoryError};
use lacuna_abi::addr::{BLOCK_SIZE, Gpa, Gva, PAGE_SIZE};
use lacuna_abi::boot::{BootInfo, FEATURE_DIRECT_PAGING};
use lacuna_abi::layout::{
    BOOT_INFO_OFFSET, CPU_BYTES, CPU_PARTS, Layout, SHARED, WINDOW_LARGE_OFFSET, cpu_area,
    direct_map, window,
};
use lacuna_abi::paging::{Entry, Level};
use lacuna_abi::walk::entry_address;

/// Why the first tables could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The table pool is too small: a fault of the layout.
    #[error("the table pool of {0} pages is too small for the first tables")]
    PoolFull(u64),
    /// Guest memory could not be written.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// The tables under construction.
struct Tables<'m> {
    memory: &'m Memory,
    root: Gpa,
    used: u64,
}

impl<'m> Tables<'m> {
    fn new(memory: &'m Memory) -> Result<Self, BootError> {
        let mut tables = Self { memory, root: Gpa(0), used: 0 };
        tables.root = tables.new_table()?;
        Ok(tables)
    }

    fn new_table(&mut self) -> Result<Gpa, BootError> {
        let pool = &self.memory.layout().pool;
        let offset = self.used * PAGE_SIZE;
        if offset >= pool.len {
            return Err(BootError::PoolFull(pool.len / PAGE_SIZE));
        }
        self.used += 1;
        Ok(pool.gpa.wrapping_add(offset))
    }

    /// The table of `level` that holds the entry for `va`, made if there is none.
    fn table_for(&mut self, va: Gva, level: Level) -> Result<Gpa, BootError> {
        let mut table = self.root;
        let mut here = Level::Pml4;
        while here > level {
            let at = entry_address(table, here, va);
            let entry = Entry(self.memory.load(at)?);
            table = if entry.is_present() {
                entry.frame(here).gpa()
            } else {
                let new = self.new_table()?;
                self.memory.store(at, Entry::new(new.frame(), Entry::TABLE).0)?;
                new
            };
            let Some(below) = here.below() else { break };
            here = below;
        }
        Ok(table)
    }

    /// Maps `len` bytes from `gpa` at `va` by pages of `level`.
    fn map(
        &mut self,
        va: Gva,
        gpa: Gpa,
        len: u64,
        level: Level,
        flags: u64,
    ) -> Result<(), BootError> {
        let size = if level == Level::Pt { 0 } else { Entry::PAGE_SIZE };
        let mut done = 0;
        while done < len {
            let here = va.wrapping_add(done);
            let table = self.table_for(here, level)?;
            // As many entries as the table holds, without looking for it again.
            let entries = (512 - level.index(here)).min((len - done).div_ceil(level.span()));
            for index in 0..entries {
                let offset = done + index * level.span();
                let entry = Entry::new(gpa.wrapping_add(offset).frame(), flags | size);
                let at = entry_address(table, level, va.wrapping_add(offset));
                self.memory.store(at, entry.0)?;
            }
            done += entries * level.span();
        }
        Ok(())
    }
}

/// Builds tables, loads the image, writes the boot information (with root and used pool pages
/// filled in), and returns it.
///
/// # Errors
/// [`BootError`]; both kinds would be faults of the layout.
pub fn prepare(memory: &Memory, image: &Image, info: BootInfo) -> Result<BootInfo, BootError> {
    let layout = *memory.layout();
    let mut tables = Tables::new(memory)?;
    map_image(&mut tables, image, &layout)?;
    let direct = info.features & FEATURE_DIRECT_PAGING != 0;
    map_regions(&mut tables, &layout, direct)?;
    for cpu in 0..layout.cpus {
        map_cpu(&mut tables, &layout, cpu)?;
    }
    for segment in &image.segments {
        memory.write(layout.image.gpa_of(segment.va), &segment.bytes)?;
    }
    if direct {
        memory.copy_tables(tables.used)?;
    }
    let info = BootInfo { root: tables.root.0, pool_used: tables.used, ..info };
    let at = layout.shared.gpa.wrapping_add(BOOT_INFO_OFFSET);
    memory.store_words(at, &info.to_words())?;
    Ok(info)
}

fn map_image(tables: &mut Tables<'_>, image: &Image, layout: &Layout) -> Result<(), BootError> {
    for segment in &image.segments {
        let len = segment.len.next_multiple_of(PAGE_SIZE);
        let gpa = layout.image.gpa_of(segment.va);
        tables.map(segment.va, gpa, len, Level::Pt, segment.flags | Entry::GLOBAL)?;
    }
    Ok(())
}

fn map_regions(tables: &mut Tables<'_>, layout: &Layout, direct: bool) -> Result<(), BootError> {
    let data = Entry::DATA | Entry::GLOBAL;
    let zone = layout.zone;
    tables.map(direct_map(zone.gpa), zone.gpa, zone.len, Level::Pd, data)?;
    for region in [layout.metadata, layout.scratch] {
        tables.map(region.va, region.gpa, region.len, Level::Pd, data)?;
    }
    // Under direct paging the guest sees a copy of the pool, and no page of it.
    let Layout { pool, table_copy: copy, .. } = *layout;
    if direct {
        tables.map(copy.va, copy.gpa, copy.len, Level::Pd, Entry::READ_ONLY | Entry::GLOBAL)?;
    } else {
        tables.map(pool.va, pool.gpa, pool.len, Level::Pd, data)?;
    }
    let input = layout.input;
    tables.map(input.va, input.gpa, input.len, Level::Pd, Entry::READ_ONLY | Entry::GLOBAL)?;
    // The boot information's page is read-only, the rest of the shared region is not.
    let shared = layout.shared;
    let read_only = Entry::READ_ONLY | Entry::GLOBAL;
    tables.map(SHARED, shared.gpa, PAGE_SIZE, Level::Pt, read_only)?;
    let rest = shared.gpa.wrapping_add(PAGE_SIZE);
    tables.map(SHARED.wrapping_add(PAGE_SIZE), rest, shared.len - PAGE_SIZE, Level::Pt, data)
}

/// Stacks with their guards, and the window's tables: the page table of its 4 KiB part and the
/// directory of its 2 MiB part are there from the start and stay.
fn map_cpu(tables: &mut Tables<'_>, layout: &Layout, cpu: usize) -> Result<(), BootError> {
    let area = layout.cpu_areas.gpa.wrapping_add(cpu as u64 * CPU_BYTES);
    for part in CPU_PARTS {
        let va = cpu_area(cpu).wrapping_add(part.virt);
        let gpa = area.wrapping_add(part.phys);
        tables.map(va, gpa, part.len, Level::Pt, Entry::DATA | Entry::GLOBAL)?;
    }
    tables.table_for(window(cpu), Level::Pt)?;
    tables.table_for(window(cpu).wrapping_add(WINDOW_LARGE_OFFSET), Level::Pd)?;
    Ok(())
}

const _: () = assert!(BLOCK_SIZE == Level::Pd.span());

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_abi::layout::{MAIN_STACK, MAX_MEMORY_MIB, METADATA, Needs, POOL, TABLE_COPY};
    use lacuna_abi::walk::{EVERYTHING, Leaf, Visit, translate, visit};
    use std::collections::HashSet;

    fn booted(memory_mib: u64, cpus: usize) -> (Memory, BootInfo, Image) {
        booted_with(memory_mib, cpus, 0)
    }

    fn booted_with(memory_mib: u64, cpus: usize, features: u64) -> (Memory, BootInfo, Image) {
        let image = Image::parse(crate::image::ORDINARY).unwrap();
        let needs =
            Needs { image: image.len(), memory_mib, cpus, input: 100_000, scratch: 3 << 20 };
        let layout = Layout::new(&needs).unwrap();
        let memory = Memory::new(layout).unwrap();
        let info = BootInfo { features, ..BootInfo::for_layout(&layout) };
        let info = prepare(&memory, &image, info).unwrap();
        (memory, info, image)
    }

    fn leaves(memory: &Memory, info: &BootInfo) -> Vec<Leaf> {
        let mut leaves = Vec::new();
        let mut collect = |v| match v {
            Visit::Leaf(leaf) => leaves.push(leaf),
            Visit::Table { .. } => {}
            Visit::Unreadable { at, .. } => panic!("unreadable table behind {at}"),
        };
        visit(memory, Gpa(info.root), EVERYTHING, 10_000, &mut collect).unwrap();
        leaves
    }

    #[test]
    fn no_frame_is_writable_and_executable_and_none_is_mapped_twice() {
        let (memory, info, _) = booted(64, 2);
        let mut seen = HashSet::new();
        for leaf in leaves(&memory, &info) {
            assert!(!leaf.writable || !leaf.executable, "{leaf:?}");
            assert!(!leaf.user, "{leaf:?}");
            for frame in leaf.frame().0..leaf.frame().0 + leaf.frames() {
                assert!(seen.insert(frame), "frame {frame:#x} is mapped twice");
            }
        }
    }

    #[test]
    fn the_direct_map_holds_the_zone_and_nothing_else() {
        let (memory, info, _) = booted(64, 1);
        let layout = *memory.layout();
        let zone: Vec<_> = leaves(&memory, &info)
            .into_iter()
            .filter(|l| l.va.0 >> 39 == layout.zone.va.0 >> 39)
            .collect();
        assert_eq!(zone.len(), 32);
        for leaf in zone {
            assert_eq!(leaf.level, Level::Pd);
            assert!(leaf.global() && !leaf.executable && layout.zone.contains(leaf.frame().gpa()));
        }
    }

    #[test]
    fn stacks_are_mapped_and_their_guards_are_not() {
        let (memory, info, _) = booted(64, 2);
        let root = Gpa(info.root);
        for cpu in 0..2 {
            let top = MAIN_STACK.top(cpu);
            assert!(translate(&memory, root, Gva(top.0 - 8)).is_ok());
            assert!(translate(&memory, root, top).is_err());
            assert!(translate(&memory, root, Gva(MAIN_STACK.start(cpu).0 - 8)).is_err());
        }
    }

    #[test]
    fn the_image_and_the_boot_information_are_in_place() {
        let (memory, info, image) = booted(64, 1);
        let text = translate(&memory, Gpa(info.root), image.entry).unwrap();
        assert!(text.executable && !text.writable);
        let page = memory.shared_page(BOOT_INFO_OFFSET, BootInfo::WORDS).unwrap();
        assert_eq!(page[..BootInfo::WORDS], info.to_words());
        assert!(!translate(&memory, Gpa(info.root), SHARED).unwrap().writable);
        assert!(translate(&memory, Gpa(info.root), POOL).unwrap().writable);
        assert!(translate(&memory, Gpa(info.root), METADATA).unwrap().writable);
    }

    #[test]
    fn under_direct_paging_no_frame_of_the_pool_is_mapped_and_a_copy_is_read_only() {
        for (features, of_pool, of_copy) in [(0, true, false), (FEATURE_DIRECT_PAGING, false, true)]
        {
            let (memory, info, _) = booted_with(64, 2, features);
            let Layout { pool, table_copy, .. } = *memory.layout();
            let leaves = leaves(&memory, &info);
            let of = |region: &lacuna_abi::layout::Region| {
                let mut of = leaves.iter().filter(|leaf| region.contains(leaf.frame().gpa()));
                of.next().map(|leaf| (leaf.va, leaf.writable))
            };
            assert_eq!(of(&pool), of_pool.then_some((POOL, true)));
            assert_eq!(of(&table_copy), of_copy.then_some((TABLE_COPY, false)));
            if of_copy {
                let words = |at: Gpa| (0..512 * info.pool_used).map(move |word| at.0 + 8 * word);
                let same =
                    |(copy, word)| memory.load(Gpa(copy)).ok() == memory.load(Gpa(word)).ok();
                assert!(words(table_copy.gpa).zip(words(pool.gpa)).all(same));
            }
        }
    }

    #[test]
    fn the_pool_is_large_enough_for_the_largest_guest_and_half_of_it_stays_free() {
        for (memory_mib, cpus) in [(16, 1), (64, 8), (MAX_MEMORY_MIB, 8)] {
            let (memory, info, _) = booted(memory_mib, cpus);
            assert!(2 * info.pool_used <= memory.layout().pool.len / PAGE_SIZE);
        }
    }
}
