//! What a guest does, written down: real tables in real guest memory, and the records and gate
//! operations that lead from one state of them to the next.

use crate::audit::{AuditConfig, ControlPolicy, CpuState, Denial, Profile, TableWords, World};
use crate::bench::BenchError;
use crate::image::{Image, ORDINARY};
use crate::machine::boot::prepare;
use crate::machine::memory::Memory;
use lacuna_abi::addr::{BLOCK_FRAMES, BLOCK_SIZE, FrameRange, Gfn, Gpa, Gva, PAGE_SIZE};
use lacuna_abi::boot::BootInfo;
use lacuna_abi::event::{EntryWrite, Event, Flush, Life, Record, TableFill};
use lacuna_abi::gate::{CpuRegistration, Op, OpKind};
use lacuna_abi::layout::{
    Layout, Needs, WINDOW_LARGE_OFFSET, WINDOW_LARGE_SLOTS, direct_map, window,
};
use lacuna_abi::paging::{Entry, Level};
use lacuna_abi::walk::{Tables, locate};

/// Addresses of a window's 4 KiB part that are used before they are flushed.
const SLOTS: u64 = 64;
/// Pages that are scrubbed together.
const BATCH: u64 = 32;
const WHOLE: u64 = Entry::DATA | Entry::PAGE_SIZE | Entry::GLOBAL;
const SMALL: u64 = Entry::DATA | Entry::GLOBAL;

/// One thing that the audit is told.
#[derive(Clone, Copy, Debug)]
pub(super) enum Step {
    /// A record.
    Record(Record),
    /// A gate operation, with its numbers on arrival and when it is done.
    Operation(u8, Op, u64, u64),
}

/// A guest whose every step is written down.
pub(super) struct Guest {
    pub(super) memory: Memory,
    pub(super) root: Gpa,
    pub(super) steps: Vec<Step>,
    tables_used: u64,
    seq: u64,
    /// Next address of each CPU's window: of the 4 KiB part, of the 2 MiB part.
    slots: Vec<(u64, u64)>,
}

impl Guest {
    /// A guest that has just been set up, with `spare` pages more in its table pool than it needs.
    ///
    /// # Errors
    /// [`BenchError`].
    pub(super) fn new(memory_mib: u64, cpus: usize, spare: u64) -> Result<Self, BenchError> {
        let failed =
            |why: &dyn std::fmt::Display| BenchError::NotMeasured("audit".into(), why.to_string());
        let image = Image::parse(ORDINARY).map_err(|error| failed(&error))?;
        let needs = Needs { image: image.len(), memory_mib, cpus, input: 0, scratch: 4 << 20 };
        let layout = Layout::new(&needs).map_err(|error| failed(&format!("{error:?}")))?;
        let layout = with_spare_tables(layout, spare);
        let memory = Memory::new(layout).map_err(|error| failed(&error))?;
        let info = prepare(&memory, &image, BootInfo::for_layout(&layout));
        let info = info.map_err(|error| failed(&error))?;
        Ok(Self {
            memory,
            root: Gpa(info.root),
            steps: Vec::new(),
            tables_used: info.pool_used,
            seq: 0,
            slots: vec![(0, 0); cpus],
        })
    }

    /// What the audit is told of it at the start.
    pub(super) fn config(&self) -> AuditConfig {
        let (layout, boot_root) = (*self.memory.layout(), self.root);
        let control = ControlPolicy::default();
        let (seal_closes, profile) = (true, Profile::Intel);
        AuditConfig { layout, boot_root, seal_closes, control, profile, max_findings: 16 }
    }

    pub(super) fn layout(&self) -> &Layout {
        self.memory.layout()
    }

    /// Takes the steps that were written down so far.
    pub(super) fn take(&mut self) -> Vec<Step> {
        std::mem::take(&mut self.steps)
    }

    /// Frames of a pageblock of the zone.
    pub(super) fn block(&self, block: u64) -> FrameRange {
        let zone = self.layout().zone_frames();
        part(zone, block * BLOCK_FRAMES, BLOCK_FRAMES)
    }

    /// A batch of pages of a pageblock that has left the direct map is handed out, used by its
    /// owner page by page, freed, and scrubbed together.
    pub(super) fn pool_hits(&mut self, cpu: u8, frames: FrameRange) {
        for frame in frames.iter().map(FrameRange::single) {
            self.life(cpu, Life::HandedOutZero, frame);
            self.use_pages(cpu, frame);
            self.life(cpu, Life::Freed, frame);
        }
        self.use_pages(cpu, frames);
        self.life(cpu, Life::PooledZero, frames);
    }

    /// Pages of a batch, one after another through the pageblock.
    pub(super) fn batch(&self, block: u64, number: u64) -> FrameRange {
        part(self.block(block), number % (BLOCK_FRAMES / BATCH) * BATCH, BATCH)
    }

    /// A pageblock leaves the direct map and is zeroed.
    pub(super) fn flip(&mut self, cpu: u8, block: u64) {
        let frames = self.block(block);
        let va = direct_map(frames.start().gpa());
        self.write(cpu, va, Level::Pd, 1, Entry::EMPTY);
        self.shoot(Flush::Pages { va, count: 1, level: Level::Pd });
        self.operation(cpu, OpKind::Seal, frames);
        self.use_block(cpu, frames);
        self.life(cpu, Life::PooledZero, frames);
    }

    /// A pageblock comes back.
    pub(super) fn flip_back(&mut self, cpu: u8, block: u64) {
        let frames = self.block(block);
        self.life(cpu, Life::Unpooled, frames);
        self.use_block(cpu, frames);
        self.record(cpu, Event::Flush(Flush::NonGlobal));
        self.operation(cpu, OpKind::Release, frames);
        let whole = Entry::new(frames.start(), WHOLE);
        self.write(cpu, direct_map(frames.start().gpa()), Level::Pd, 1, whole);
    }

    /// The pageblock's entry becomes a table, and `count` of its pages become secret.
    pub(super) fn convert(&mut self, cpu: u8, block: u64, count: u64) -> Gpa {
        let frames = self.block(block);
        let va = direct_map(frames.start().gpa());
        let table = self.new_table();
        self.life(cpu, Life::TableAllocated, FrameRange::single(table.frame()));
        self.fill(cpu, table, Entry::new(frames.start(), SMALL));
        self.write(cpu, va, Level::Pd, 1, Entry::new(table.frame(), Entry::TABLE));
        self.shoot(Flush::Everything);
        self.write(cpu, va, Level::Pt, count, Entry::EMPTY);
        self.shoot(pages(va, count));
        let range = part(frames, 0, count);
        self.operation(cpu, OpKind::Seal, range);
        self.life(cpu, Life::HandedOut, range);
        self.use_pages(cpu, range);
        table
    }

    /// The way back of [`Self::convert`].
    pub(super) fn convert_back(&mut self, cpu: u8, block: u64, count: u64, table: Gpa) {
        let frames = self.block(block);
        let va = direct_map(frames.start().gpa());
        let range = part(frames, 0, count);
        self.use_pages(cpu, range);
        self.record(cpu, Event::Flush(Flush::NonGlobal));
        self.operation(cpu, OpKind::Release, range);
        let small = Entry::new(frames.start(), SMALL);
        self.write(cpu, va, Level::Pt, count, small);
        self.write(cpu, va, Level::Pd, 1, Entry::new(frames.start(), WHOLE));
        self.shoot(Flush::Everything);
        self.life(cpu, Life::TableFreed, FrameRange::single(table.frame()));
        self.tables_used -= 1;
    }

    /// One flush of each kind that guests make often.
    pub(super) fn flushes(&mut self, cpu: u8) {
        let root = self.root;
        self.record(cpu, Event::Flush(Flush::NonGlobal));
        self.record(cpu, Event::Flush(pages(window(usize::from(cpu)), 4)));
        self.record(cpu, Event::RootLoad { root, pcid: 0, no_flush: false });
        self.record(cpu, Event::Flush(Flush::Everything));
    }

    /// Open, mapped, unmapped, sealed, in the 4 KiB part of the CPU's window.
    fn use_pages(&mut self, cpu: u8, frames: FrameRange) {
        let (slot, _) = self.slots[usize::from(cpu)];
        if slot + frames.count() > SLOTS {
            self.record(cpu, Event::Flush(Flush::NonGlobal));
            self.slots[usize::from(cpu)].0 = 0;
        }
        let slot = self.slots[usize::from(cpu)].0;
        self.slots[usize::from(cpu)].0 += frames.count();
        let va = window(usize::from(cpu)).wrapping_add(slot * PAGE_SIZE);
        self.operation(cpu, OpKind::Open, frames);
        self.write(cpu, va, Level::Pt, frames.count(), Entry::new(frames.start(), Entry::DATA));
        self.write(cpu, va, Level::Pt, frames.count(), Entry::EMPTY);
        self.operation(cpu, OpKind::Seal, frames);
    }

    /// The same in the 2 MiB part.
    fn use_block(&mut self, cpu: u8, frames: FrameRange) {
        let slot = self.slots[usize::from(cpu)].1 % WINDOW_LARGE_SLOTS;
        if slot == 0 {
            self.record(cpu, Event::Flush(Flush::NonGlobal));
        }
        self.slots[usize::from(cpu)].1 += 1;
        let va = window(usize::from(cpu)).wrapping_add(WINDOW_LARGE_OFFSET + slot * BLOCK_SIZE);
        self.operation(cpu, OpKind::Open, frames);
        let large = Entry::new(frames.start(), Entry::DATA | Entry::PAGE_SIZE);
        self.write(cpu, va, Level::Pd, 1, large);
        self.write(cpu, va, Level::Pd, 1, Entry::EMPTY);
        self.operation(cpu, OpKind::Seal, frames);
    }

    fn shoot(&mut self, flush: Flush) {
        for cpu in (0..=u8::MAX).take(self.slots.len()) {
            self.record(cpu, Event::Flush(flush));
        }
    }

    fn new_table(&mut self) -> Gpa {
        let table = self.layout().pool.gpa.wrapping_add(self.tables_used * PAGE_SIZE);
        self.tables_used += 1;
        table
    }

    fn fill(&mut self, cpu: u8, table: Gpa, first: Entry) {
        let fill = TableFill { table, level: Level::Pt, first };
        for index in 0..BLOCK_FRAMES {
            self.store(table.wrapping_add(8 * index), fill.entry(index));
        }
        self.record(cpu, Event::TableFill(fill));
    }

    /// Stores a run of entries and records it.
    fn write(&mut self, cpu: u8, va: Gva, level: Level, count: u64, new: Entry) {
        let root = self.root;
        let place = locate(&self.memory, root, va, level).unwrap_or(self.layout().pool.gpa);
        let old = self.memory.read_entry(place).unwrap_or_default();
        for index in 0..count {
            self.store(place.wrapping_add(8 * index), new.nth_of_run(level, index));
        }
        let remap = old.is_present() && new.is_present();
        self.seq += u64::from(remap);
        let grant = if remap { self.seq } else { 0 };
        let count = u32::try_from(count).unwrap_or(1);
        let write = EntryWrite { root, pcid: 0, va, level, count, old, new, grant };
        self.record(cpu, Event::EntryWrite(write));
    }

    /// Only the pool is stored to, which lies in low memory: that does not fail.
    fn store(&self, at: Gpa, entry: Entry) {
        let stored = self.memory.store(at, entry.0);
        debug_assert!(stored.is_ok());
    }

    fn life(&mut self, cpu: u8, life: Life, frames: FrameRange) {
        self.record(cpu, Event::Life(life, frames));
    }

    fn operation(&mut self, cpu: u8, kind: OpKind, frames: FrameRange) {
        self.seq += 1;
        self.steps.push(Step::Operation(cpu, Op { kind, frames }, self.seq - 1, self.seq));
    }

    fn record(&mut self, cpu: u8, event: Event) {
        self.seq += 1;
        self.steps.push(Step::Record(Record { seq: self.seq, cpu, site: 0, event }));
    }
}

/// The layout with a larger table pool, which comes after everything else but the workload's memory.
fn with_spare_tables(layout: Layout, spare: u64) -> Layout {
    let mut layout = layout;
    if spare > 0 {
        let len = layout.pool.len + (spare * PAGE_SIZE).next_multiple_of(BLOCK_SIZE);
        layout.pool.gpa = layout.scratch.gpa;
        layout.pool.len = len;
        layout.scratch.gpa = layout.pool.end();
    }
    layout
}

/// `count` frames of a range from frame `first` of it on.
fn part(frames: FrameRange, first: u64, count: u64) -> FrameRange {
    let start = Gfn(frames.start().0 + first);
    FrameRange::new(start, count).unwrap_or(FrameRange::single(start))
}

fn pages(va: Gva, count: u64) -> Flush {
    Flush::Pages { va, count: u32::try_from(count).unwrap_or(u32::MAX), level: Level::Pt }
}

/// The guest's machine, with a second stage that does what it is told and memory that is zero where
/// it should be.
pub(super) struct Quiet<'a>(pub(super) &'a Memory, pub(super) Gpa);

impl Tables for Quiet<'_> {
    fn read_entry(&self, at: Gpa) -> Option<Entry> {
        self.0.read_entry(at)
    }
}

impl World for Quiet<'_> {
    fn read_table(&self, table: Gfn, into: &mut TableWords) -> bool {
        self.0.read_table(table, into)
    }

    fn content_is_zero(&self, _: Gfn) -> Option<bool> {
        Some(true)
    }

    fn contents_are_zero(&self, _: FrameRange) -> bool {
        true
    }

    fn denial(&self, _: Gfn) -> Denial {
        Denial::Denied
    }

    fn denies_all(&self, _: FrameRange) -> bool {
        true
    }

    fn cpu_state(&self, _: u8) -> Option<CpuState> {
        let policy = ControlPolicy::default();
        let CpuRegistration { idt_base, idt_limit, gdt_base, gdt_limit, .. } =
            CpuRegistration::default();
        Some(CpuState {
            cr0: policy.cr0_set,
            cr3: self.1.0,
            cr4: policy.cr4_set,
            efer: policy.efer_set,
            idt_base,
            idt_limit,
            gdt_base,
            gdt_limit,
        })
    }

    fn intent(&self, _: u8) -> Option<EntryWrite> {
        None
    }
}
