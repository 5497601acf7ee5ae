//! From the text of a recording to operations.

use super::error::{Problem, TraceError};
use super::gfp::Flags;
use super::lines::Lines;
use super::{HEADER, MAX_EVENTS, Replay, Secret, Selection, Stats};
use lacuna_abi::addr::BLOCK_ORDER;
use lacuna_abi::workload::{ReplayAction, ReplayOp};
use std::collections::HashMap;
use std::io::Read;

const COLUMNS: usize = 7;
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";
const MAX_ORDER: u64 = 10;
const MAX_MIGRATETYPE: u64 = 2;

/// Reads a recording, gzipped or plain, and renumbers its allocations to slots that are used again
/// once they are free.
///
/// Everything up to the last event that `selection` asks for is checked. An `F` frees the
/// allocation of its id whatever order it names; a different one is worth a warning.
///
/// # Errors
/// [`TraceError`], with the line where there is one; no content makes this panic.
pub fn parse(reader: impl Read, selection: &Selection) -> Result<Replay, TraceError> {
    let mut lines = Lines::new(reader)?;
    let Some((number, header)) = lines.next()? else { return Err(Problem::NoEvents.into()) };
    let header = header.strip_prefix(BYTE_ORDER_MARK).unwrap_or(header);
    if !fields(header).eq(HEADER.split(',').map(str::as_bytes)) {
        return Err(Problem::header(header).at(number));
    }
    let mut builder = Builder::new(selection);
    while !builder.is_full()
        && let Some((number, line)) = lines.next()?
    {
        Line::read(line)
            .and_then(|line| builder.add(&line, number))
            .map_err(|problem| problem.at(number))?;
    }
    builder.finish()
}

/// The fields of a line. No field of this format holds a comma or a line end, so quotation marks
/// mean nothing and are taken off.
fn fields(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    line.split(|byte| *byte == b',').map(unquoted)
}

fn unquoted(field: &[u8]) -> &[u8] {
    let field = field.trim_ascii();
    field.strip_prefix(b"\"").and_then(|f| f.strip_suffix(b"\"")).unwrap_or(field)
}

/// One line, its fields checked one by one.
struct Line<'a> {
    time: u64,
    cpu: u8,
    id: u64,
    event: Event<'a>,
}

enum Event<'a> {
    Alloc { order: u8, migratetype: u8, gfp: Flags<'a> },
    Free { order: Option<u8> },
}

impl<'a> Line<'a> {
    fn read(line: &'a [u8]) -> Result<Self, Problem> {
        let mut found = [&line[..0]; COLUMNS];
        let mut columns = 0;
        for field in fields(line) {
            if let Some(place) = found.get_mut(columns) {
                *place = field;
            }
            columns += 1;
        }
        if columns != COLUMNS {
            return Err(Problem::Columns(columns));
        }
        let text = |column: usize, name| {
            std::str::from_utf8(found[column]).map_err(|_| Problem::NotText(name))
        };
        let time = number(text(0, "t_us")?, "t_us", u64::MAX, "a number of microseconds")?;
        let cpu = small(text(1, "cpu")?, "cpu", u8::MAX.into(), "a number from 0 to 255")?;
        let id = number(text(3, "id")?, "id", u64::MAX, "a number")?;
        let (order, migratetype, gfp) =
            (text(4, "order")?, text(5, "migratetype")?, text(6, "gfp")?);
        let event = match text(2, "op")? {
            "A" => alloc(order, migratetype, Flags(gfp))?,
            "F" => free(order, [("migratetype", migratetype), ("gfp", gfp)])?,
            other => return Err(Problem::value("op", other, "A (allocation) or F (free)")),
        };
        Ok(Self { time, cpu, id, event })
    }
}

fn alloc<'a>(order: &str, migratetype: &str, gfp: Flags<'a>) -> Result<Event<'a>, Problem> {
    let types = "0 (unmovable), 1 (movable) or 2 (reclaimable)";
    let migratetype = small(migratetype, "migratetype", MAX_MIGRATETYPE, types)?;
    if gfp.names().next().is_none() {
        let takes = "the names of the allocation's flags, joined by a bar";
        return Err(Problem::value("gfp", gfp.0, takes));
    }
    Ok(Event::Alloc { order: read_order(order)?, migratetype, gfp })
}

fn free<'a>(order: &str, others: [(&'static str, &str); 2]) -> Result<Event<'a>, Problem> {
    for (column, field) in others {
        if !field.is_empty() {
            return Err(Problem::value(column, field, "empty in a free"));
        }
    }
    Ok(Event::Free { order: if order.is_empty() { None } else { Some(read_order(order)?) } })
}

fn read_order(field: &str) -> Result<u8, Problem> {
    small(field, "order", MAX_ORDER, "a number from 0 to 10")
}

fn number(
    field: &str,
    column: &'static str,
    max: u64,
    takes: &'static str,
) -> Result<u64, Problem> {
    // `parse` would take a sign.
    let digits = field.bytes().all(|byte| byte.is_ascii_digit());
    let value = field.parse().ok().filter(|value| digits && *value <= max);
    value.ok_or_else(|| Problem::value(column, field, takes))
}

fn small(field: &str, column: &'static str, max: u64, takes: &'static str) -> Result<u8, Problem> {
    let value = u8::try_from(number(field, column, max, takes)?);
    value.map_err(|_| Problem::value(column, field, takes))
}

/// An allocation that is alive.
struct Alive {
    slot: u32,
    since: u64,
    order: u8,
    secret: bool,
}

/// Operations so far, and what is alive after them.
struct Builder<'a> {
    selection: &'a Selection,
    limit: u64,
    ops: Vec<ReplayOp>,
    alive: HashMap<u64, Alive>,
    free: Vec<u32>,
    slots: u32,
    /// For each slot, operations so far.
    turns: Vec<u32>,
    times: Option<(u64, u64)>,
    pages: [u64; 2],
    matched: Vec<bool>,
    other_orders: u64,
    stats: Stats,
}

impl<'a> Builder<'a> {
    fn new(selection: &'a Selection) -> Self {
        let names = if let Secret::Names(names) = &selection.secret { names.len() } else { 0 };
        Self {
            selection,
            limit: selection.events.unwrap_or(u64::MAX),
            ops: Vec::new(),
            alive: HashMap::new(),
            free: Vec::new(),
            slots: 0,
            turns: Vec::new(),
            times: None,
            pages: [0; 2],
            matched: vec![false; names],
            other_orders: 0,
            stats: Stats::default(),
        }
    }

    fn is_full(&self) -> bool {
        self.ops.len() as u64 >= self.limit
    }

    fn add(&mut self, line: &Line<'_>, at: u64) -> Result<(), Problem> {
        if self.ops.len() as u64 >= MAX_EVENTS {
            return Err(Problem::TooManyEvents);
        }
        let (first, before) = self.times.unwrap_or((line.time, line.time));
        if line.time < before {
            return Err(Problem::Backwards { now: line.time, before });
        }
        self.times = Some((first, line.time));
        let (slot, action) = match line.event {
            Event::Alloc { order, migratetype, gfp } => {
                let secret = self.is_secret(gfp);
                let (zero, noblock) = (gfp.zero(), gfp.noblock());
                let slot = self.allocate(line.id, Alive { slot: 0, since: at, order, secret })?;
                self.stats.zero += u64::from(zero);
                self.stats.noblock += u64::from(noblock);
                let in_place = false;
                (slot, ReplayAction::Alloc { order, migratetype, zero, noblock, secret, in_place })
            }
            Event::Free { order } => (self.release(line.id, order)?, ReplayAction::Free),
        };
        let turn = self.turn(slot);
        self.ops.push(ReplayOp { cpu: line.cpu % self.selection.cpus, slot, turn, action });
        Ok(())
    }

    /// Marks the last ones of those secret allocations that can be converted in place: below a
    /// pageblock, by callers that may wait for other CPUs.
    fn choose_in_place(&mut self) {
        let mut can: Vec<&mut bool> = self
            .ops
            .iter_mut()
            .filter_map(|op| match &mut op.action {
                ReplayAction::Alloc { order, noblock: false, secret: true, in_place, .. } => {
                    (u32::from(*order) < BLOCK_ORDER).then_some(in_place)
                }
                _ => None,
            })
            .collect();
        let chosen = (can.len() * usize::from(self.selection.in_place.min(100))).div_ceil(100);
        can.iter_mut().rev().take(chosen).for_each(|in_place| **in_place = true);
        self.stats.in_place = chosen as u64;
    }

    fn is_secret(&mut self, gfp: Flags<'_>) -> bool {
        match &self.selection.secret {
            Secret::All => true,
            Secret::None => false,
            Secret::User => gfp.user(),
            Secret::Names(names) => {
                let mut any = false;
                for (name, matched) in names.iter().zip(&mut self.matched) {
                    let found = gfp.has(name);
                    *matched |= found;
                    any |= found;
                }
                any
            }
        }
    }

    /// The turn of the next operation on a slot; there are far fewer events than a turn can count.
    fn turn(&mut self, slot: u32) -> u32 {
        let index = slot as usize;
        if index >= self.turns.len() {
            self.turns.resize(index + 1, 0);
        }
        let turn = self.turns[index];
        self.turns[index] = turn.saturating_add(1);
        turn
    }

    fn allocate(&mut self, id: u64, new: Alive) -> Result<u32, Problem> {
        if let Some(alive) = self.alive.get(&id) {
            return Err(Problem::Alive { id, since: alive.since });
        }
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots += 1;
            self.slots - 1
        });
        let pages = &mut self.pages[usize::from(new.secret)];
        *pages += 1 << new.order;
        let peak = if new.secret {
            &mut self.stats.peak_secret_pages
        } else {
            &mut self.stats.peak_mapped_pages
        };
        *peak = (*peak).max(*pages);
        self.stats.allocs += 1;
        self.stats.secret += u64::from(new.secret);
        self.alive.insert(id, Alive { slot, ..new });
        Ok(slot)
    }

    fn release(&mut self, id: u64, order: Option<u8>) -> Result<u32, Problem> {
        let alive = self.alive.remove(&id).ok_or(Problem::NotAlive(id))?;
        self.other_orders += u64::from(order.is_some_and(|order| order != alive.order));
        self.pages[usize::from(alive.secret)] -= 1 << alive.order;
        self.stats.frees += 1;
        self.free.push(alive.slot);
        Ok(alive.slot)
    }

    fn finish(mut self) -> Result<Replay, TraceError> {
        let (first, last) = self.times.ok_or(Problem::NoEvents)?;
        self.stats.span_us = last - first;
        self.choose_in_place();
        let mut warnings = Vec::new();
        if let Secret::Names(names) = &self.selection.secret {
            for (name, _) in names.iter().zip(&self.matched).filter(|(_, matched)| !**matched) {
                warnings
                    .push(format!("[workload] secret: no event that was read has the flag {name}"));
            }
        }
        if self.other_orders > 0 {
            warnings.push(format!(
                "{} frees in the trace name another order than their allocation, which counts",
                self.other_orders
            ));
        }
        if let Some(events) = self.selection.events.filter(|n| *n > self.ops.len() as u64) {
            warnings.push(format!(
                "[workload] events: {events} were asked for, the trace has {}",
                self.ops.len()
            ));
        }
        self.stats.warnings = warnings;
        Ok(Replay { ops: self.ops, slots: self.slots, stats: self.stats })
    }
}
