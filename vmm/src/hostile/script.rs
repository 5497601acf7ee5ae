//! One step of a guest: what it does next follows from the bytes.

use super::choices::Choices;
use super::rig::Rig;
use lacuna_abi::addr::{FrameRange, Gfn, Gpa, Gva, PAGE_SIZE};
use lacuna_abi::direct::{TableOp, TableWriter};
use lacuna_abi::event::{
    ControlRegister, EntryWrite, Event, Flush, HostAct, Intent, Life, RECORD_BYTES, RING_HEAD_WORD,
    RING_INTENT_WORD, RING_RECORDS, Record, TableFill,
};
use lacuna_abi::gate::{ARGS_WORD, COUNT_WORD, Call, OpKind, OpWriter};
use lacuna_abi::layout::{MERMAP, POOL, SEQUENCE_OFFSET, WINDOW_STRIDE, ring_offset};
use lacuna_abi::paging::{Entry, Level};
use lacuna_abi::walk::locate;

/// Makes a step. False if it ended the guest.
pub(super) fn step(rig: &mut Rig, choices: &mut Choices<'_>) -> Result<bool, String> {
    let cpu = cpu(rig, choices);
    match choices.below(20) {
        0 => rig.store(rig.call_word(cpu, usize::from(choices.byte())), choices.number()),
        1 => return call(rig, cpu, choices),
        2..=5 => return operations(rig, cpu, choices),
        6 | 7 => {
            let event = event(rig, choices);
            record(rig, cpu, event);
        }
        8 => ring_nonsense(rig, cpu, choices),
        9 => rig.store(shared(rig, SEQUENCE_OFFSET), choices.number()),
        10 | 11 => return store_entry(rig, cpu, choices),
        12 | 13 => return reported_write(rig, cpu, choices),
        14 => return root(rig, cpu, choices),
        15 => registers(rig, cpu, choices),
        16 => intent(rig, cpu, choices),
        17 => {
            let frame = zone_frame(rig, choices);
            let byte = choices.byte();
            _ = rig.memory.swap_byte(frame.gpa().wrapping_add(choices.short() % PAGE_SIZE), byte);
        }
        18 => return unmap(rig, cpu, choices),
        _ => return use_page(rig, cpu, choices),
    }
    Ok(true)
}

/// A CPU that runs: only such can make calls.
fn cpu(rig: &Rig, choices: &mut Choices<'_>) -> u8 {
    let running = rig.running();
    let index = choices.byte() & 1;
    running.get(usize::from(index)).copied().unwrap_or(0)
}

fn shared(rig: &Rig, offset: u64) -> Gpa {
    rig.layout().shared.gpa.wrapping_add(offset)
}

fn zone_frame(rig: &Rig, choices: &mut Choices<'_>) -> Gfn {
    let zone = rig.layout().zone_frames();
    let offset = if choices.flag() { choices.below(8) } else { choices.short() % zone.count() };
    zone.start().wrapping_add(offset)
}

fn table_page(rig: &Rig, choices: &mut Choices<'_>) -> Gpa {
    let pool = rig.layout().pool;
    pool.gpa.wrapping_add(choices.below(48).min(pool.len / PAGE_SIZE - 1) * PAGE_SIZE)
}

/// An address: where there is memory of some kind, where there is none, or anywhere.
fn somewhere(rig: &Rig, choices: &mut Choices<'_>) -> Gpa {
    let layout = rig.layout();
    match choices.below(10) {
        0..=2 => zone_frame(rig, choices).gpa(),
        3 | 4 => table_page(rig, choices),
        5 => layout.shared.gpa.wrapping_add(choices.below(64) * PAGE_SIZE),
        6 => layout.image.gpa.wrapping_add(choices.below(4) * PAGE_SIZE),
        7 => layout.cpu_areas.gpa.wrapping_add(choices.below(32) * PAGE_SIZE),
        8 => layout.zone.end().wrapping_add(choices.below(4) * PAGE_SIZE),
        _ => Gpa(choices.number()),
    }
}

fn entry(rig: &Rig, choices: &mut Choices<'_>) -> Entry {
    let place = somewhere(rig, choices);
    let flags = match choices.below(10) {
        0 => 0,
        1 | 2 => Entry::DATA,
        3 => Entry::DATA | Entry::GLOBAL,
        4 => Entry::DATA | Entry::PAGE_SIZE,
        5 => Entry::TABLE,
        6 => Entry::TEXT,
        7 => Entry::READ_ONLY,
        8 => Entry::DATA | Entry::USER,
        _ => return Entry(choices.word()),
    };
    Entry::new(place.frame(), flags)
}

fn level(choices: &mut Choices<'_>) -> Level {
    [Level::Pt, Level::Pd, Level::Pdpt, Level::Pml4][choices.below(4) as usize]
}

/// A virtual address that something is known of, or any.
fn address(rig: &Rig, choices: &mut Choices<'_>) -> Gva {
    let layout = rig.layout();
    match choices.below(8) {
        0 | 1 => Gva(layout.zone.va.0 + choices.below(8) * (2 << 20)),
        2..=4 => Gva(MERMAP.0 + choices.below(2) * WINDOW_STRIDE + choices.below(16) * PAGE_SIZE),
        5 => Gva(POOL.0 + choices.below(48) * PAGE_SIZE),
        6 => Gva(layout.image.va.0),
        _ => Gva(choices.number()),
    }
}

fn range(rig: &Rig, choices: &mut Choices<'_>) -> FrameRange {
    let start = somewhere(rig, choices).frame();
    let count = match choices.below(4) {
        0 | 1 => 1,
        2 => 512,
        _ => choices.number(),
    };
    FrameRange::new(start, count).unwrap_or(FrameRange::single(start))
}

/// A call with whatever the call page holds.
fn call(rig: &mut Rig, cpu: u8, choices: &mut Choices<'_>) -> Result<bool, String> {
    if choices.flag() {
        rig.store(rig.call_word(cpu, ARGS_WORD), choices.number());
        rig.store(rig.call_word(cpu, COUNT_WORD), choices.number());
    }
    // Some in a thousand end the guest: those would be most guests otherwise.
    match Call::from_number(u32::from(choices.byte() % 20)) {
        None => rig.no_call(cpu).map(|()| true),
        Some(Call::Exit | Call::Exception | Call::Panic) if !choices.byte().is_multiple_of(8) => {
            Ok(true)
        }
        Some(call) => rig.call(cpu, call),
    }
}

fn operations(rig: &mut Rig, cpu: u8, choices: &mut Choices<'_>) -> Result<bool, String> {
    let mut words = Vec::new();
    let mut writer = OpWriter::new(|word, value| words.push((word, value)));
    for _ in 0..=choices.below(6) {
        let kind = [OpKind::Seal, OpKind::Open, OpKind::Release][choices.below(3) as usize];
        let frames = if choices.below(4) > 0 {
            FrameRange::single(zone_frame(rig, choices))
        } else {
            range(rig, choices)
        };
        // A list that is full stays as it is.
        _ = writer.push(kind, frames);
    }
    for (word, value) in words {
        rig.store(rig.call_word(cpu, word), value);
    }
    if choices.below(16) == 0 {
        rig.store(rig.call_word(cpu, usize::from(choices.byte())), choices.number());
    }
    rig.call(cpu, Call::Ops)
}

/// Publishes a record as a guest does, with the next number.
pub(super) fn record(rig: &mut Rig, cpu: u8, event: Event) {
    let at = shared(rig, SEQUENCE_OFFSET);
    let seq = rig.load(at).wrapping_add(1);
    rig.store(at, seq);
    publish(rig, cpu, &Record { seq, cpu, site: 0, event });
}

fn publish(rig: &mut Rig, cpu: u8, record: &Record) {
    let ring = shared(rig, ring_offset(cpu.into()));
    let head = &mut rig.heads[usize::from(cpu)];
    let at = ring.wrapping_add(PAGE_SIZE + *head % RING_RECORDS * RECORD_BYTES);
    *head = head.wrapping_add(1);
    let head = *head;
    _ = rig.memory.store_words(at, &record.to_words());
    rig.store(ring.wrapping_add(8 * RING_HEAD_WORD as u64), head);
}

fn ring_nonsense(rig: &mut Rig, cpu: u8, choices: &mut Choices<'_>) {
    let ring = shared(rig, ring_offset(cpu.into()));
    match choices.below(4) {
        // A head that runs ahead or jumps back.
        0 => {
            let head = choices.number();
            rig.store(ring.wrapping_add(8 * RING_HEAD_WORD as u64), head);
        }
        // A record whose number jumps.
        1 => {
            let (seq, event) = (choices.number(), event(rig, choices));
            publish(rig, cpu, &Record { seq, cpu: choices.byte() & 3, site: 0, event });
        }
        // A record that is torn.
        2 => {
            let at = PAGE_SIZE + choices.below(16) * RECORD_BYTES + choices.below(8) * 8;
            rig.store(ring.wrapping_add(at), choices.number());
        }
        // Anything anywhere on the ring's first page; but not a word that has the gate wait for seconds
        // for what this CPU owes.
        _ => {
            let word = choices.below(64);
            if word != lacuna_abi::event::RING_BUSY_WORD as u64 {
                rig.store(ring.wrapping_add(8 * word), choices.number());
            }
        }
    }
}

fn write(rig: &Rig, choices: &mut Choices<'_>) -> EntryWrite {
    let (va, level) = (address(rig, choices), level(choices));
    let va = Gva(va.0 & !(level.span() - 1));
    let root = if choices.below(8) == 0 { table_page(rig, choices) } else { rig.root };
    let old = locate(&*rig.memory, root, va, level).map_or(Entry::EMPTY, |at| Entry(rig.load(at)));
    let lies = choices.below(4) == 0;
    EntryWrite {
        root,
        pcid: if lies { choices.byte().into() } else { 0 },
        va,
        level,
        count: if lies { u32::from(choices.byte()) } else { 1 },
        old: if lies { entry(rig, choices) } else { old },
        new: if choices.flag() { Entry::EMPTY } else { entry(rig, choices) },
        grant: if lies { choices.number() } else { 0 },
    }
}

fn event(rig: &Rig, choices: &mut Choices<'_>) -> Event {
    match choices.below(9) {
        0 | 1 => Event::EntryWrite(write(rig, choices)),
        2 => {
            let (table, level, first) =
                (table_page(rig, choices), level(choices), entry(rig, choices));
            Event::TableFill(TableFill { table, level, first })
        }
        3 => Event::Flush(match choices.below(6) {
            0 => Flush::Everything,
            1 => Flush::NonGlobal,
            2 => Flush::Pages {
                va: address(rig, choices),
                count: u32::from(choices.byte()),
                level: level(choices),
            },
            3 => Flush::PageOfPcid { va: address(rig, choices), pcid: choices.byte().into() },
            4 => Flush::Pcid(choices.byte().into()),
            _ => Flush::AllPcids,
        }),
        4 => {
            let register = ControlRegister::from_number(choices.below(3));
            let register = register.unwrap_or(ControlRegister::Cr4);
            Event::Control { register, old: choices.number(), new: choices.number() }
        }
        5 => Event::RootLoad {
            root: table_page(rig, choices),
            pcid: choices.byte().into(),
            no_flush: choices.flag(),
        },
        6 => {
            let life = Life::from_number(choices.below(8)).unwrap_or(Life::Freed);
            Event::Life(life, range(rig, choices))
        }
        7 => Event::ShootdownAck(choices.number()),
        _ => {
            let act = HostAct::from_number(choices.below(6)).unwrap_or(HostAct::Opened);
            Event::Host(act, range(rig, choices))
        }
    }
}

/// Has an entry written: by a store, or by the host where the guest has no table mapped. False if that
/// ended the guest.
fn put(rig: &mut Rig, cpu: u8, at: Gpa, write: EntryWrite) -> Result<bool, String> {
    if rig.is_direct() {
        return ask(rig, cpu, &TableOp::Write { at, write });
    }
    rig.store(at, write.new.0);
    Ok(true)
}

fn ask(rig: &mut Rig, cpu: u8, op: &TableOp) -> Result<bool, String> {
    let mut words = Vec::new();
    // One always fits.
    _ = TableWriter::new(|word, value| words.push((word, value)), 0).push(op);
    for (word, value) in words {
        rig.store(rig.call_word(cpu, word), value);
    }
    rig.call(cpu, Call::Tables)
}

/// Stores anything anywhere in a table, and tells nobody.
fn store_entry(rig: &mut Rig, cpu: u8, choices: &mut Choices<'_>) -> Result<bool, String> {
    let table = table_page(rig, choices);
    let index = choices.short() % 512;
    let (at, new) = (table.wrapping_add(8 * index), entry(rig, choices));
    if !rig.is_direct() {
        rig.store(at, new.0);
        return Ok(true);
    }
    let level = level(choices);
    if choices.below(4) == 0 {
        return ask(rig, cpu, &TableOp::Fill(TableFill { table, level, first: new }));
    }
    let (root, va, old) = (rig.root, Gva(index * level.span()), Entry(rig.load(at)));
    put(rig, cpu, at, EntryWrite { root, pcid: 0, va, level, count: 1, old, new, grant: 0 })
}

/// Writes an entry and tells of it; or only one of the two.
fn reported_write(rig: &mut Rig, cpu: u8, choices: &mut Choices<'_>) -> Result<bool, String> {
    let write = write(rig, choices);
    let what = choices.below(8);
    if what != 0
        && let Ok(at) = locate(&*rig.memory, write.root, write.va, write.level)
        && !put(rig, cpu, at, write)?
    {
        return Ok(false);
    }
    if what != 1 {
        record(rig, cpu, Event::EntryWrite(write));
    }
    Ok(true)
}

fn root(rig: &mut Rig, cpu: u8, choices: &mut Choices<'_>) -> Result<bool, String> {
    let place = if choices.flag() { table_page(rig, choices) } else { somewhere(rig, choices) };
    let call = if choices.below(3) == 0 { Call::UnregisterRoot } else { Call::RegisterRoot };
    rig.store(rig.call_word(cpu, ARGS_WORD), place.0);
    rig.store(rig.call_word(cpu, ARGS_WORD + 1), choices.below(3));
    rig.call(cpu, call)
}

fn registers(rig: &mut Rig, cpu: u8, choices: &mut Choices<'_>) {
    let cr3 = somewhere(rig, choices).0;
    let bit = 1_u64 << choices.below(64);
    let registers = &mut rig.cpus.registers[usize::from(cpu)];
    match choices.below(6) {
        0 => registers.cr0 ^= bit,
        1 => registers.cr4 ^= bit,
        2 => registers.efer ^= bit,
        3 => registers.cr3 = cr3,
        4 => registers.idt_base = choices.number(),
        _ => registers.gdt_limit = choices.number(),
    }
}

fn intent(rig: &mut Rig, cpu: u8, choices: &mut Choices<'_>) {
    let at = shared(rig, ring_offset(cpu.into())).wrapping_add(8 * RING_INTENT_WORD as u64);
    match choices.below(3) {
        0 => rig.store(at, 0),
        1 => {
            let intent = Intent { write: write(rig, choices), seq: choices.number() };
            _ = rig.memory.store_words(at, &intent.to_words());
        }
        _ => rig.store(at.wrapping_add(8 * choices.below(8)), choices.number()),
    }
}

/// Takes a pageblock out of the direct map and seals it, as a guest does that behaves; perhaps without
/// the flush.
fn unmap(rig: &mut Rig, cpu: u8, choices: &mut Choices<'_>) -> Result<bool, String> {
    let block = choices.below(8);
    let (layout, root) = (rig.layout(), rig.root);
    let va = Gva(layout.zone.va.0 + block * (2 << 20));
    let Ok(at) = locate(&*rig.memory, root, va, Level::Pd) else { return Ok(true) };
    let (old, new) = (Entry(rig.load(at)), Entry::EMPTY);
    let write = EntryWrite { root, pcid: 0, va, level: Level::Pd, count: 1, old, new, grant: 0 };
    if !put(rig, cpu, at, write)? {
        return Ok(false);
    }
    record(rig, cpu, Event::EntryWrite(write));
    if choices.below(4) > 0 {
        for other in rig.running() {
            record(rig, other, Event::Flush(Flush::Everything));
        }
    }
    let start = layout.zone_frames().start().wrapping_add(block * 512);
    let Some(frames) = FrameRange::new(start, 512) else { return Ok(true) };
    seal_or_open(rig, cpu, OpKind::Seal, frames)
}

/// Opens a page, maps it in the CPU's own window, takes it down and seals it; or forgets some of this.
fn use_page(rig: &mut Rig, cpu: u8, choices: &mut Choices<'_>) -> Result<bool, String> {
    let forgets = choices.below(8);
    let frames = FrameRange::single(zone_frame(rig, choices));
    let va = Gva(MERMAP.0 + u64::from(cpu) * WINDOW_STRIDE + choices.below(16) * PAGE_SIZE);
    let root = rig.root;
    if forgets != 0 && !seal_or_open(rig, cpu, OpKind::Open, frames)? {
        return Ok(false);
    }
    let Ok(at) = locate(&*rig.memory, root, va, Level::Pt) else { return Ok(true) };
    let set = |rig: &mut Rig, new: Entry| {
        let old = Entry(rig.load(at));
        let write =
            EntryWrite { root, pcid: 0, va, level: Level::Pt, count: 1, old, new, grant: 0 };
        let goes_on = put(rig, cpu, at, write)?;
        record(rig, cpu, Event::EntryWrite(write));
        Ok::<_, String>(goes_on)
    };
    if !set(rig, Entry::new(frames.start(), Entry::DATA))? {
        return Ok(false);
    }
    if forgets != 1 && !set(rig, Entry::EMPTY)? {
        return Ok(false);
    }
    if forgets != 2 {
        record(rig, cpu, Event::Flush(Flush::NonGlobal));
    }
    if forgets == 3 { Ok(true) } else { seal_or_open(rig, cpu, OpKind::Seal, frames) }
}

fn seal_or_open(rig: &mut Rig, cpu: u8, kind: OpKind, frames: FrameRange) -> Result<bool, String> {
    let mut words = Vec::new();
    // One range always fits.
    _ = OpWriter::new(|word, value| words.push((word, value))).push(kind, frames);
    for (word, value) in words {
        rig.store(rig.call_word(cpu, word), value);
    }
    rig.call(cpu, Call::Ops)
}
