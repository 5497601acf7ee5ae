//! A small machine for the tests: real tables, settable contents, second stage and registers.

mod alias;
mod cached;
mod direct;
mod honesty;
mod hostile;
mod index;
mod levels;
mod observed;
mod probe;
mod properties;
mod protocol;
mod remaps;
mod rules;
mod split;
mod state;
mod story;
mod uses;

use super::*;
use lacuna_abi::addr::{BLOCK_FRAMES, BLOCK_SIZE, FrameRange, Gva};
use lacuna_abi::event::{EntryStores, EntryWrite, Flush, Life, Sighting, TableFill};
use lacuna_abi::gate::{Op, OpKind};
use lacuna_abi::layout::{IMAGE, Layout, Needs, POOL, direct_map, window};
use lacuna_abi::paging::{Entry, Level};
use lacuna_abi::walk::{Tables, entry_address, locate};
use std::collections::{BTreeMap, BTreeSet};

/// Record `n` is made by the code at this and `n`.
const SITES: u32 = 0x8000_0000;
const BLOCK_ENTRY: u64 = Entry::DATA | Entry::PAGE_SIZE;

struct Machine {
    layout: Layout,
    root: Gpa,
    tables: BTreeMap<u64, u64>,
    next_table: Gpa,
    dirty: BTreeSet<Gfn>,
    hidden: BTreeSet<Gfn>,
    denials: BTreeMap<Gfn, Denial>,
    cpus: Vec<Option<CpuState>>,
    intents: Vec<Option<EntryWrite>>,
}

impl Tables for Machine {
    fn read_entry(&self, at: Gpa) -> Option<Entry> {
        let entry = || Entry(self.tables.get(&at.0).copied().unwrap_or(0));
        self.layout.pool.contains(at).then(entry)
    }
}

impl World for Machine {
    fn content_is_zero(&self, frame: Gfn) -> Option<bool> {
        (!self.hidden.contains(&frame)).then(|| !self.dirty.contains(&frame))
    }
    fn first_nonzero(&self, frame: Gfn) -> Option<u64> {
        self.dirty.contains(&frame).then_some(0x123)
    }
    fn denial(&self, frame: Gfn) -> Denial {
        self.denials.get(&frame).copied().unwrap_or(Denial::Open)
    }
    fn cpu_state(&self, cpu: u8) -> Option<CpuState> {
        self.cpus.get(usize::from(cpu)).copied().flatten()
    }
    fn intent(&self, cpu: u8) -> Option<EntryWrite> {
        self.intents.get(usize::from(cpu)).copied().flatten()
    }
}

impl Machine {
    /// Image, table pool, direct map and empty windows, as the VMM builds them.
    fn new(cpus: usize) -> Self {
        Self::seen_by(cpus, Mediation::Trace)
    }

    fn seen_by(cpus: usize, mediation: Mediation) -> Self {
        let needs = Needs { image: 0x3000, memory_mib: 16, cpus, input: 0, scratch: 0 };
        let layout = Layout::new(&needs).unwrap();
        let root = layout.pool.gpa;
        let policy = ControlPolicy::default();
        let state = CpuState {
            cr0: policy.cr0_set,
            cr3: root.0,
            cr4: policy.cr4_set,
            efer: policy.efer_set,
            idt_limit: 0xfff,
            ..CpuState::default()
        };
        let mut machine = Self {
            layout,
            root,
            tables: BTreeMap::new(),
            next_table: root.wrapping_add(PAGE_SIZE),
            dirty: BTreeSet::new(),
            hidden: BTreeSet::new(),
            denials: BTreeMap::new(),
            cpus: vec![Some(state); cpus],
            intents: vec![None; cpus],
        };
        let text = layout.image.gpa.frame();
        machine.map(IMAGE, Level::Pt, Entry::new(text, Entry::TEXT | Entry::GLOBAL));
        let data = Entry::new(text.wrapping_add(1), Entry::DATA | Entry::GLOBAL);
        machine.map(Gva(IMAGE.0 + PAGE_SIZE), Level::Pt, data);
        let pool = if mediation == Mediation::Tables { 0 } else { layout.pool.len };
        for block in 0..pool / BLOCK_SIZE {
            let frame = layout.pool.gpa.wrapping_add(block * BLOCK_SIZE).frame();
            machine.map(
                POOL.wrapping_add(block * BLOCK_SIZE),
                Level::Pd,
                Entry::new(frame, BLOCK_ENTRY),
            );
        }
        for block in 0..layout.zone_blocks() {
            let gpa = layout.zone.gpa.wrapping_add(block * BLOCK_SIZE);
            let entry = Entry::new(gpa.frame(), BLOCK_ENTRY | Entry::GLOBAL);
            machine.map(direct_map(gpa), Level::Pd, entry);
        }
        (0..cpus).for_each(|cpu| machine.map(window(cpu), Level::Pt, Entry::EMPTY));
        machine
    }

    fn new_table(&mut self) -> Gpa {
        let table = self.next_table;
        self.next_table = table.wrapping_add(PAGE_SIZE);
        assert!(self.layout.pool.contains(table));
        table
    }

    /// Writes an entry of the boot root, with tables above it as needed.
    fn map(&mut self, va: Gva, level: Level, entry: Entry) {
        let mut table = self.root;
        for here in [Level::Pml4, Level::Pdpt, Level::Pd] {
            if here <= level {
                break;
            }
            let at = entry_address(table, here, va);
            if !self.read_entry(at).unwrap().is_present() {
                let below = self.new_table();
                self.tables.insert(at.0, Entry::new(below.frame(), Entry::TABLE).0);
            }
            table = self.read_entry(at).unwrap().frame(here).gpa();
        }
        self.tables.insert(entry_address(table, level, va).0, entry.0);
    }

    /// A root with the same upper entries as the boot root.
    fn clone_root(&mut self) -> Gpa {
        let copy = self.new_table();
        for at in (0..PAGE_SIZE).step_by(8) {
            let entry = self.read_entry(self.root.wrapping_add(at)).unwrap();
            self.tables.insert(copy.0 + at, entry.0);
        }
        copy
    }
}

/// A machine, its audit and what a guest does.
struct Scene {
    machine: Machine,
    audit: Audit,
    seq: u64,
    seal: Denial,
}

fn config(machine: &Machine, seal_closes: bool) -> AuditConfig {
    let control = ControlPolicy::default();
    let (layout, boot_root) = (machine.layout, machine.root);
    let profile = Profile::Intel;
    AuditConfig { layout, boot_root, seal_closes, control, profile, max_findings: 100 }
}

impl Scene {
    fn new(cpus: usize) -> Self {
        Self::with_seal(cpus, Denial::Denied)
    }

    fn with_seal(cpus: usize, seal: Denial) -> Self {
        Self::as_seen(cpus, seal, Mediation::Trace)
    }

    fn as_seen(cpus: usize, seal: Denial, mediation: Mediation) -> Self {
        let machine = Machine::seen_by(cpus, mediation);
        let closes = seal != Denial::NotEnforced;
        let mut audit = Audit::new(config(&machine, closes), &machine);
        if mediation != Mediation::Trace {
            audit.mediate(mediation, &machine);
        }
        for cpu in 0..cpus {
            let tables = CpuRegistration { idt_limit: 0xfff, ..CpuRegistration::default() };
            let cpu = u8::try_from(cpu).unwrap();
            audit.start_cpu(cpu);
            audit.register_cpu(cpu, tables);
        }
        Self { machine, audit, seq: 0, seal }
    }

    /// Frames of a pageblock of the zone.
    fn block(&self, block: u64) -> FrameRange {
        let start = self.machine.layout.zone_frames().start();
        FrameRange::new(start.wrapping_add(block * BLOCK_FRAMES), BLOCK_FRAMES).unwrap()
    }

    /// What a CPU does and reports; what the host sees of it, it is told too.
    fn record(&mut self, cpu: u8, event: Event) {
        if !self.audit.mediation().sees(&event) {
            self.report(cpu, event);
            return;
        }
        // Stores are made before they are reported, all else is announced.
        if let Event::EntryWrite(write) = event {
            self.see_write(cpu, &write);
        }
        self.report(cpu, event);
        if let Event::Flush(flush) = event {
            self.see(cpu, Sighting::Flush(flush));
        }
    }

    /// The host sees a run of stores, one by one.
    fn see_write(&mut self, cpu: u8, write: &EntryWrite) {
        let EntryWrite { root, va, level, .. } = *write;
        let at = locate(&self.machine, root, va, level).unwrap();
        for index in 0..u64::from(write.count) {
            let [old, new] = [write.old, write.new].map(|entry| entry.nth_of_run(level, index));
            let at = at.wrapping_add(8 * index);
            let stores = EntryStores { at, level: Level::Pt, count: 1, old, new, grant: 0 };
            self.see(cpu, Sighting::Stores(stores));
        }
    }

    fn see(&mut self, cpu: u8, sighting: Sighting) {
        self.report(cpu, Event::Seen(sighting));
    }

    fn report(&mut self, cpu: u8, event: Event) {
        self.seq += 1;
        let site = u32::try_from(self.seq).unwrap() + SITES;
        self.audit.event(&Record { seq: self.seq, cpu, site, event }, &self.machine);
    }

    /// Stores a run of entries of the boot root.
    fn store(&mut self, va: Gva, level: Level, count: u32, new: Entry) -> EntryWrite {
        let root = self.machine.root;
        let place = locate(&self.machine, root, va, level).unwrap();
        let old = self.machine.read_entry(place).unwrap();
        for index in 0..u64::from(count) {
            let entry = new.nth_of_run(level, index);
            self.machine.tables.insert(place.0 + 8 * index, entry.0);
        }
        EntryWrite { root, pcid: 0, va, level, count, old, new, grant: 0 }
    }

    /// Stores a run of entries and records it.
    fn write(&mut self, cpu: u8, va: Gva, level: Level, count: u32, new: Entry) {
        let write = self.store(va, level, count, new);
        self.record(cpu, Event::EntryWrite(write));
    }

    fn flush(&mut self, cpu: u8, flush: Flush) {
        self.record(cpu, Event::Flush(flush));
    }

    fn life(&mut self, life: Life, frames: FrameRange) {
        self.record(0, Event::Life(life, frames));
    }

    /// Carries out a gate operation as the host does.
    fn op(&mut self, cpu: u8, kind: OpKind, frames: FrameRange) -> Result<(), Status> {
        self.seq += 1;
        let op = Op { kind, frames };
        self.audit.arrival(cpu, op, self.seq, &self.machine)?;
        for frame in frames.iter() {
            let close = kind == OpKind::Seal && self.audit.frames().may_close(frame);
            let denial = if close { self.seal } else { Denial::Open };
            self.machine.denials.insert(frame, denial);
        }
        self.seq += 1;
        self.audit.done(cpu, op, self.seq, &self.machine);
        Ok(())
    }

    fn unmap_block(&mut self, frames: FrameRange) {
        self.write(0, direct_map(frames.start().gpa()), Level::Pd, 1, Entry::EMPTY);
    }

    fn flush_all(&mut self, flush: Flush) {
        for cpu in self.audit.running() {
            self.flush(cpu, flush);
        }
    }

    /// Opens frames and maps them in the 4 KiB part of CPU 0's window from `slot` on.
    fn use_window(&mut self, frames: FrameRange, slot: u64) {
        self.op(0, OpKind::Open, frames).unwrap();
        let va = window(0).wrapping_add(slot * PAGE_SIZE);
        let count = u32::try_from(frames.count()).unwrap();
        self.write(0, va, Level::Pt, count, Entry::new(frames.start(), Entry::DATA));
        self.write(0, va, Level::Pt, count, Entry::EMPTY);
        self.op(0, OpKind::Seal, frames).unwrap();
    }

    /// Takes a block to the pool as a guest without faults does.
    fn flip(&mut self, frames: FrameRange) {
        self.unmap_block(frames);
        self.flush_all(Flush::Everything);
        self.op(0, OpKind::Seal, frames).unwrap();
        self.use_window(frames, 0);
        frames.iter().for_each(|frame| {
            self.machine.dirty.remove(&frame);
        });
        self.life(Life::PooledZero, frames);
    }

    /// Gives a block back to the mapped side.
    fn flip_back(&mut self, frames: FrameRange) {
        self.life(Life::Unpooled, frames);
        self.flush(0, Flush::NonGlobal);
        self.op(0, OpKind::Release, frames).unwrap();
        let entry = Entry::new(frames.start(), BLOCK_ENTRY | Entry::GLOBAL);
        self.write(0, direct_map(frames.start().gpa()), Level::Pd, 1, entry);
    }

    fn quiesce(&mut self) {
        self.seq += 1;
        self.audit.quiesce(self.seq, &self.machine);
    }

    /// Rules and frames of all findings.
    fn found(&self) -> Vec<(Rule, Option<Gfn>)> {
        self.audit.result().findings.iter().map(|f| (f.rule, f.frame)).collect()
    }

    fn checked(&self, rule: Rule) -> u64 {
        self.audit.result().tally(rule).checked
    }

    /// Nothing is wrong, nothing is doubtful, and the rules named were judged.
    #[track_caller]
    fn assert_clean(&self, rules: &[Rule]) {
        let result = self.audit.result();
        assert_eq!(result.findings, []);
        assert_eq!(result.inconclusive, [""; 0]);
        for rule in rules {
            assert!(self.checked(*rule) > 0, "{} was not judged", rule.name());
        }
    }

    #[track_caller]
    fn assert_found(&self, rule: Rule, frame: Gfn) {
        let found = self.found();
        assert!(found.contains(&(rule, Some(frame))), "{found:?}");
    }
}

fn first(frames: FrameRange, count: u64) -> FrameRange {
    FrameRange::new(frames.start(), count).unwrap()
}

#[test]
fn a_whole_life_of_two_blocks_is_clean_and_exercises_every_rule() {
    let seals = [(Denial::Denied, 1), (Denial::Denied, 2), (Denial::NotEnforced, 2)];
    let modes =
        Mediation::ALL.iter().flat_map(|mode| seals.map(|(seal, cpus)| (seal, cpus, *mode)));
    for (seal, cpus, mediation) in modes {
        let mut scene = Scene::with_seal(cpus, seal);
        scene.audit.mediate(mediation, &scene.machine);
        let (one, two) = (scene.block(1), scene.block(2));
        scene.machine.dirty.extend(one.iter());
        scene.flip(one);
        scene.flush(0, Flush::NonGlobal);
        scene.flip(two);
        scene.quiesce();
        let owned = first(one, 4);
        scene.life(Life::HandedOutZero, owned);
        scene.flush(0, Flush::NonGlobal);
        scene.use_window(owned, 0);
        scene.life(Life::Freed, owned);
        scene.life(Life::PooledZero, owned);
        scene.quiesce();
        scene.flip_back(one);
        scene.flip_back(two);
        scene.quiesce();
        let exercised = Rule::ALL.iter().copied().filter(|rule| {
            let off = seal == Denial::NotEnforced;
            !(matches!(rule, Rule::StaleTable | Rule::InputLeak | Rule::ObservedAccess)
                || (off && *rule == Rule::SecondStageOpen))
        });
        scene.assert_clean(&exercised.collect::<Vec<_>>());
        if seal == Denial::NotEnforced {
            let tally = scene.audit.result().tally(Rule::SecondStageOpen);
            assert!(tally.checked == 0 && tally.not_checked > 0, "{tally:?}");
        }
    }
}
