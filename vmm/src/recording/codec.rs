//! Items as bytes. Numbers are written as the difference to what one would expect after what came
//! before; writer and reader remember the same.

use super::ReadError;
use super::item::{Answer, Call, Item, cpu_state, cpu_words};
use super::varint::{self, unzigzag, zigzag};
use crate::audit::{Denial, Probe, ProbeKind, TableWords, Touched};
use lacuna_abi::MAX_CPUS;
use lacuna_abi::addr::{FrameRange, Gfn, Gpa};
use lacuna_abi::event::{INTENT_WORDS, Intent, RECORD_WORDS, Record};
use lacuna_abi::gate::{CpuRegistration, Op, OpKind, PAGE_WORDS, Status};
use lacuna_abi::paging::Entry;
use std::collections::HashMap;

/// Longest text on a tape.
const MAX_TEXT: usize = 64 << 10;
/// Most touches of one quiesce point.
const MAX_TOUCHES: u64 = 1 << 20;
/// Kinds of records that are remembered apart.
const KINDS: usize = 16;
/// Words of a record that are written; its check is not.
const WORDS: usize = RECORD_WORDS - 1;

const START: u8 = 1;
const REGISTER_ROOT: u8 = 2;
const UNREGISTER_ROOT: u8 = 3;
const START_CPU: u8 = 4;
const REGISTER_CPU: u8 = 5;
const EVENT: u8 = 6;
const ARRIVAL: u8 = 7;
const DONE: u8 = 8;
const QUIESCE: u8 = 9;
const CHOOSE_PROBES: u8 = 10;
const JUDGE_PROBES: u8 = 11;
const LEAK: u8 = 12;
const LEAK_SEARCH: u8 = 13;
const INCONCLUSIVE: u8 = 14;
const TABLE: u8 = 32;
const ENTRY: u8 = 33;
const ZERO: u8 = 34;
const FIRST_NONZERO: u8 = 35;
const DENIAL: u8 = 36;
const DENIES_ALL: u8 = 37;
const CPU: u8 = 38;
const INTENT: u8 = 39;
const DRAW: u8 = 40;
const RESULT: u8 = 64;

const OPS: [OpKind; 3] = [OpKind::Seal, OpKind::Open, OpKind::Release];
const DENIALS: [Denial; 4] = [Denial::Denied, Denial::Open, Denial::HeldOpen, Denial::NotEnforced];
const ANSWERS: [Option<bool>; 3] = [None, Some(false), Some(true)];

/// Where bytes come from.
pub(super) trait Source {
    /// The next byte.
    fn byte(&mut self) -> Result<u8, ReadError>;

    /// The error that what was just read makes no sense.
    fn damaged(&self, what: &str) -> ReadError;

    /// The error that there is more of something than may be.
    fn huge(&self, what: &str) -> ReadError;
}

/// What writer and reader remember of what came before.
pub(super) struct Context {
    seq: u64,
    records: [[u64; WORDS]; KINDS],
    sites: [u32; KINDS],
    frame: u64,
    tables: HashMap<u64, Box<TableWords>>,
    max_tables: u64,
    cpus: [[u64; 8]; MAX_CPUS],
}

impl Context {
    /// Nothing came before. At most `max_tables` tables will be remembered.
    pub(super) fn new(max_tables: u64) -> Self {
        Self {
            seq: 0,
            records: [[0; WORDS]; KINDS],
            sites: [0; KINDS],
            frame: 0,
            tables: HashMap::new(),
            max_tables,
            cpus: [[0; 8]; MAX_CPUS],
        }
    }
}

/// Appends items to bytes.
pub(super) struct Encoder<'a> {
    pub(super) context: &'a mut Context,
    pub(super) out: &'a mut Vec<u8>,
}

impl Encoder<'_> {
    pub(super) fn item(&mut self, item: &Item) {
        match item {
            Item::Call(call) => self.call(call),
            Item::Answer(answer) => self.answer(answer),
            Item::Result(result) => {
                let status = result.err().unwrap_or(Status::Ok);
                self.out.push(RESULT + status as u8);
            }
        }
    }

    pub(super) fn call(&mut self, call: &Call) {
        match call {
            Call::Start => self.out.push(START),
            Call::RegisterRoot(root, pcid) => {
                self.out.push(REGISTER_ROOT);
                self.numbers(&[root.0, (*pcid).into()]);
            }
            Call::UnregisterRoot(root) => {
                self.out.push(UNREGISTER_ROOT);
                self.number(root.0);
            }
            Call::StartCpu(cpu) => self.out.extend([START_CPU, *cpu]),
            Call::RegisterCpu(cpu, registration) => {
                self.out.extend([REGISTER_CPU, *cpu]);
                self.numbers(&registration.to_words());
            }
            Call::Event(record) => self.record(record),
            Call::Arrival(cpu, op, seq) => self.operation(ARRIVAL, *cpu, op, *seq),
            Call::Done(cpu, op, seq) => self.operation(DONE, *cpu, op, *seq),
            Call::Quiesce(seq) => {
                self.out.push(QUIESCE);
                self.seq(*seq);
            }
            Call::ChooseProbes(count, kinds) => {
                self.out.push(CHOOSE_PROBES);
                self.number(*count);
                // Bits of at most three kinds.
                self.out.push(kinds.iter().fold(0, |bits, kind| bits | 1 << *kind as u8));
            }
            Call::JudgeProbes(touched, seq) => {
                self.out.push(JUDGE_PROBES);
                self.seq(*seq);
                self.number(touched.len() as u64);
                touched.iter().for_each(|(probe, outcome)| self.touch(probe, outcome));
            }
            Call::Leak(place, frame, detail, seq) => {
                self.out.push(LEAK);
                self.number(*place);
                self.optional(frame.map(|frame| frame.0));
                self.text(detail);
                self.seq(*seq);
            }
            Call::LeakSearch(checked, not_checked) => {
                self.out.push(LEAK_SEARCH);
                self.numbers(&[*checked, *not_checked]);
            }
            Call::Inconclusive(reason) => {
                self.out.push(INCONCLUSIVE);
                self.text(reason);
            }
        }
    }

    pub(super) fn answer(&mut self, answer: &Answer) {
        match answer {
            Answer::Table(table, words) => self.table(*table, words.as_deref()),
            Answer::Entry(at, entry) => {
                self.out.push(ENTRY);
                self.number(at.0);
                self.optional(entry.map(|entry| entry.0));
            }
            Answer::Zero(frames, zero) => {
                let answer = ANSWERS.iter().position(|answer| answer == zero).unwrap_or(0);
                self.judged(ZERO, *frames, answer);
            }
            Answer::FirstNonzero(frame, offset) => {
                self.out.push(FIRST_NONZERO);
                self.frame(*frame);
                self.optional(*offset);
            }
            Answer::Denial(frames, denial) => {
                let answer = DENIALS.iter().position(|answer| answer == denial).unwrap_or(0);
                self.judged(DENIAL, *frames, answer);
            }
            Answer::DeniesAll(frames, all) => self.judged(DENIES_ALL, *frames, (*all).into()),
            Answer::Cpu(cpu, state) => {
                self.out.extend([CPU, *cpu, state.is_some().into()]);
                let Some(known) = self.context.cpus.get_mut(usize::from(*cpu)) else { return };
                if let Some(state) = state {
                    let words = cpu_words(state);
                    let before = std::mem::replace(known, words);
                    for (before, word) in before.into_iter().zip(words) {
                        varint::put(self.out, before ^ word);
                    }
                }
            }
            Answer::Intent(cpu, write) => {
                self.out.extend([INTENT, *cpu, write.is_some().into()]);
                if let Some(write) = *write {
                    self.numbers(&Intent { write, seq: 0 }.to_words());
                }
            }
            Answer::Draw(below, drawn) => {
                self.out.push(DRAW);
                self.numbers(&[*below, *drawn]);
            }
        }
    }

    fn number(&mut self, value: u64) {
        varint::put(self.out, value);
    }

    fn numbers(&mut self, values: &[u64]) {
        values.iter().for_each(|value| self.number(*value));
    }

    fn optional(&mut self, value: Option<u64>) {
        self.out.push(value.is_some().into());
        value.into_iter().for_each(|value| self.number(value));
    }

    fn text(&mut self, text: &str) {
        let end = text.floor_char_boundary(MAX_TEXT);
        self.number(end as u64);
        self.out.extend_from_slice(&text.as_bytes()[..end]);
    }

    fn seq(&mut self, seq: u64) {
        let before = std::mem::replace(&mut self.context.seq, seq);
        self.number(zigzag(before, seq));
    }

    fn frame(&mut self, frame: Gfn) {
        let before = std::mem::replace(&mut self.context.frame, frame.0);
        self.number(zigzag(before, frame.0));
    }

    fn frames(&mut self, frames: FrameRange) {
        self.frame(frames.start());
        self.number(frames.count());
        self.context.frame = frames.start().0.wrapping_add(frames.count());
    }

    fn judged(&mut self, tag: u8, frames: FrameRange, answer: usize) {
        self.out.push(tag);
        self.frames(frames);
        self.number(answer as u64);
    }

    fn operation(&mut self, tag: u8, cpu: u8, op: &Op, seq: u64) {
        self.out.extend([tag, cpu, op.kind as u8]);
        self.frames(op.frames);
        self.seq(seq);
    }

    /// A byte says which words are not as one would expect.
    fn record(&mut self, record: &Record) {
        let words = record.to_words();
        // The kind is below 16.
        let kind = (words[1] & 0xf) as usize;
        let before = self.context.records[kind];
        let mut mask = 0;
        let mut differences = [0; RECORD_WORDS];
        differences[0] = zigzag(self.context.seq.wrapping_add(1), words[0]);
        differences[1] = words[1] ^ before[1];
        for index in 2..WORDS {
            differences[index] = zigzag(before[index], words[index]);
        }
        differences[WORDS] = u64::from(record.site ^ self.context.sites[kind]);
        for (index, difference) in differences.iter().enumerate() {
            mask |= u8::from(*difference != 0) << index;
        }
        // The kind in the high half says what to compare with.
        self.out.extend([EVENT, words[1] as u8 & 0xf, mask]);
        for difference in differences.into_iter().filter(|difference| *difference != 0) {
            self.number(difference);
        }
        self.context.seq = words[0];
        self.context.records[kind].copy_from_slice(&words[..WORDS]);
        self.context.sites[kind] = record.site;
    }

    fn touch(&mut self, probe: &Probe, outcome: &Touched) {
        self.frame(probe.frame);
        self.number(probe.offset);
        let (outcome, why) = match outcome {
            Touched::Trapped => (0, None),
            Touched::WentThrough => (1, None),
            Touched::Failed(why) => (2, Some(why)),
        };
        self.out.extend([probe.kind as u8, outcome]);
        why.into_iter().for_each(|why| self.text(why));
    }

    /// Runs of entries that are not what they were when the table was last on the tape.
    fn table(&mut self, table: Gfn, words: Option<&TableWords>) {
        self.out.extend([TABLE, words.is_some().into()]);
        self.frame(table);
        let Some(words) = words else { return };
        let known = self.context.tables.entry(table.0).or_insert_with(|| Box::new([0; PAGE_WORDS]));
        let mut at = 0;
        let mut value = 0;
        while let Some(same) = (at..PAGE_WORDS).position(|index| known[index] != words[index]) {
            let start = at + same;
            let run = (start..PAGE_WORDS).take_while(|index| known[*index] != words[*index]);
            let count = run.count();
            varint::put(self.out, count as u64);
            varint::put(self.out, same as u64);
            for word in &words[start..start + count] {
                varint::put(self.out, zigzag(value, *word));
                value = *word;
            }
            at = start + count;
        }
        varint::put(self.out, 0);
        known.copy_from_slice(words);
    }
}

/// Reads items.
pub(super) struct Decoder<'a, S> {
    pub(super) context: &'a mut Context,
    pub(super) source: &'a mut S,
}

impl<S: Source> Decoder<'_, S> {
    /// The next item.
    ///
    /// # Errors
    /// [`ReadError`], whatever the bytes are.
    pub(super) fn item(&mut self) -> Result<Item, ReadError> {
        let tag = self.source.byte()?;
        let call = match tag {
            START => Call::Start,
            REGISTER_ROOT => {
                let root = Gpa(self.number()?);
                Call::RegisterRoot(root, self.small("PCID")?)
            }
            UNREGISTER_ROOT => Call::UnregisterRoot(Gpa(self.number()?)),
            START_CPU => Call::StartCpu(self.cpu()?),
            REGISTER_CPU => {
                let cpu = self.cpu()?;
                let words = self.numbers::<{ CpuRegistration::WORDS }>()?;
                Call::RegisterCpu(cpu, CpuRegistration::from_words(&words))
            }
            EVENT => Call::Event(self.record()?),
            ARRIVAL | DONE => {
                let cpu = self.cpu()?;
                let kind = self.source.byte()?;
                let kind = OPS.into_iter().find(|known| *known as u8 == kind);
                let kind = kind.ok_or_else(|| self.source.damaged("no such operation"))?;
                let op = Op { kind, frames: self.frames()? };
                let seq = self.seq()?;
                if tag == ARRIVAL { Call::Arrival(cpu, op, seq) } else { Call::Done(cpu, op, seq) }
            }
            QUIESCE => Call::Quiesce(self.seq()?),
            CHOOSE_PROBES => {
                let count = self.number()?;
                if count > MAX_TOUCHES {
                    return Err(self.source.huge("too many touches at one point"));
                }
                let bits = self.source.byte()?;
                let kinds = ProbeKind::ALL.iter().copied();
                Call::ChooseProbes(
                    count,
                    kinds.filter(|kind| bits & 1 << *kind as u8 != 0).collect(),
                )
            }
            JUDGE_PROBES => {
                let seq = self.seq()?;
                let count = self.number()?;
                if count > MAX_TOUCHES {
                    return Err(self.source.huge("too many touches at one point"));
                }
                let touched: Result<Vec<_>, _> = (0..count).map(|_| self.touch()).collect();
                Call::JudgeProbes(touched?, seq)
            }
            LEAK => {
                let place = self.number()?;
                let frame = self.optional()?.map(|frame| FrameRange::single(Gfn(frame)).start());
                let detail = self.text()?;
                Call::Leak(place, frame, detail, self.seq()?)
            }
            LEAK_SEARCH => Call::LeakSearch(self.number()?, self.number()?),
            INCONCLUSIVE => Call::Inconclusive(self.text()?),
            RESULT.. => {
                let status = Status::from_number(u32::from(tag - RESULT));
                return match status {
                    Some(Status::Ok) => Ok(Item::Result(Ok(()))),
                    Some(status) => Ok(Item::Result(Err(status))),
                    None => Err(self.source.damaged("no such status")),
                };
            }
            _ => return Ok(Item::Answer(self.answer(tag)?)),
        };
        Ok(Item::Call(call))
    }

    fn answer(&mut self, tag: u8) -> Result<Answer, ReadError> {
        Ok(match tag {
            TABLE => self.table()?,
            ENTRY => {
                let at = Gpa(self.number()?);
                Answer::Entry(at, self.optional()?.map(Entry))
            }
            ZERO => {
                let frames = self.frames()?;
                Answer::Zero(frames, self.choice(&ANSWERS)?)
            }
            FIRST_NONZERO => {
                let frame = self.frame()?;
                Answer::FirstNonzero(frame, self.optional()?)
            }
            DENIAL => {
                let frames = self.frames()?;
                Answer::Denial(frames, self.choice(&DENIALS)?)
            }
            DENIES_ALL => {
                let frames = self.frames()?;
                Answer::DeniesAll(frames, self.choice(&[false, true])?)
            }
            CPU => {
                let cpu = self.cpu()?;
                if self.source.byte()? == 0 {
                    return Ok(Answer::Cpu(cpu, None));
                }
                let mut words = self.context.cpus.get(usize::from(cpu)).copied().unwrap_or([0; 8]);
                for word in &mut words {
                    *word ^= self.number()?;
                }
                if let Some(known) = self.context.cpus.get_mut(usize::from(cpu)) {
                    *known = words;
                }
                Answer::Cpu(cpu, Some(cpu_state(words)))
            }
            INTENT => {
                let cpu = self.cpu()?;
                if self.source.byte()? == 0 {
                    return Ok(Answer::Intent(cpu, None));
                }
                let words = self.numbers::<INTENT_WORDS>()?;
                let intent = Intent::from_words(&words).ok().flatten();
                let intent = intent.ok_or_else(|| self.source.damaged("no entry write"))?;
                Answer::Intent(cpu, Some(intent.write))
            }
            DRAW => Answer::Draw(self.number()?, self.number()?),
            _ => return Err(self.source.damaged("no such item")),
        })
    }

    fn number(&mut self) -> Result<u64, ReadError> {
        let value = varint::get(|| self.source.byte())?;
        value.ok_or_else(|| self.source.damaged("a number of more than 64 bits"))
    }

    fn small<T: TryFrom<u64>>(&mut self, what: &str) -> Result<T, ReadError> {
        let value = self.number()?;
        T::try_from(value).map_err(|_| self.source.damaged(&format!("no {what}")))
    }

    fn numbers<const N: usize>(&mut self) -> Result<[u64; N], ReadError> {
        let mut words = [0; N];
        for word in &mut words {
            *word = self.number()?;
        }
        Ok(words)
    }

    fn optional(&mut self) -> Result<Option<u64>, ReadError> {
        if self.source.byte()? == 0 { Ok(None) } else { self.number().map(Some) }
    }

    fn choice<T: Copy>(&mut self, of: &[T]) -> Result<T, ReadError> {
        let number: usize = self.small("answer")?;
        of.get(number).copied().ok_or_else(|| self.source.damaged("no such answer"))
    }

    fn cpu(&mut self) -> Result<u8, ReadError> {
        let cpu = self.source.byte()?;
        if usize::from(cpu) < MAX_CPUS { Ok(cpu) } else { Err(self.source.damaged("no such CPU")) }
    }

    fn text(&mut self) -> Result<String, ReadError> {
        let length: usize = self.small("length")?;
        if length > MAX_TEXT {
            return Err(self.source.huge("a text is longer than any is"));
        }
        let bytes: Result<Vec<u8>, _> = (0..length).map(|_| self.source.byte()).collect();
        String::from_utf8(bytes?).map_err(|_| self.source.damaged("a text is none"))
    }

    fn seq(&mut self) -> Result<u64, ReadError> {
        self.context.seq = unzigzag(self.context.seq, self.number()?);
        Ok(self.context.seq)
    }

    fn frame(&mut self) -> Result<Gfn, ReadError> {
        let frame = unzigzag(self.context.frame, self.number()?);
        if FrameRange::new(Gfn(frame), 1).is_none() {
            return Err(self.source.damaged("no such frame"));
        }
        self.context.frame = frame;
        Ok(Gfn(frame))
    }

    fn frames(&mut self) -> Result<FrameRange, ReadError> {
        let start = self.frame()?;
        let frames = FrameRange::new(start, self.number()?);
        let frames = frames.ok_or_else(|| self.source.damaged("no such frames"))?;
        self.context.frame = start.0.wrapping_add(frames.count());
        Ok(frames)
    }

    fn record(&mut self) -> Result<Record, ReadError> {
        let kind = usize::from(self.source.byte()?);
        let mask = self.source.byte()?;
        let Some(before) = self.context.records.get(kind).copied() else {
            return Err(self.source.damaged("no such event"));
        };
        let mut differences = [0; RECORD_WORDS];
        for (index, difference) in differences.iter_mut().enumerate() {
            if mask & 1 << index != 0 {
                *difference = self.number()?;
            }
        }
        let mut words = [0; WORDS];
        words[0] = unzigzag(self.context.seq.wrapping_add(1), differences[0]);
        words[1] = before[1] ^ differences[1];
        for index in 2..WORDS {
            words[index] = unzigzag(before[index], differences[index]);
        }
        let site = u32::try_from(differences[WORDS]);
        let site = site.map_err(|_| self.source.damaged("no such site"))?;
        let site = self.context.sites[kind] ^ site;
        let record = Record::from_parts(&words, site);
        let record = record
            .map_err(|bad| self.source.damaged(&format!("an event makes no sense: {bad:?}")))?;
        if usize::from(record.cpu) >= MAX_CPUS {
            return Err(self.source.damaged("no such CPU"));
        }
        self.context.seq = words[0];
        self.context.records[kind] = words;
        self.context.sites[kind] = site;
        Ok(record)
    }

    fn touch(&mut self) -> Result<(Probe, Touched), ReadError> {
        let frame = self.frame()?;
        let offset = self.number()?;
        let kind = ProbeKind::from_number(self.source.byte()?.into());
        let kind = kind.ok_or_else(|| self.source.damaged("no such touch"))?;
        let outcome = match self.source.byte()? {
            0 => Touched::Trapped,
            1 => Touched::WentThrough,
            2 => Touched::Failed(self.text()?),
            _ => return Err(self.source.damaged("no such outcome of a touch")),
        };
        Ok((Probe { frame, offset, kind }, outcome))
    }

    fn table(&mut self) -> Result<Answer, ReadError> {
        let readable = self.source.byte()? != 0;
        let table = self.frame()?;
        if !readable {
            return Ok(Answer::Table(table, None));
        }
        let known = self.context.tables.get(&table.0);
        if known.is_none() && self.context.tables.len() as u64 >= self.context.max_tables {
            return Err(self.source.huge("more tables than the guest has"));
        }
        let mut words = known.cloned().unwrap_or_else(|| Box::new([0; PAGE_WORDS]));
        let mut at = 0_usize;
        let mut value = 0;
        loop {
            let count: usize = self.small("number of entries")?;
            if count == 0 {
                break;
            }
            let same: usize = self.small("number of entries")?;
            let run = at.checked_add(same).and_then(|start| Some(start..start.checked_add(count)?));
            let run = run.filter(|run| run.end <= PAGE_WORDS);
            let run = run.ok_or_else(|| self.source.damaged("a table of more than 512 entries"))?;
            at = run.end;
            for index in run {
                value = unzigzag(value, self.number()?);
                words[index] = value;
            }
        }
        self.context.tables.insert(table.0, words.clone());
        Ok(Answer::Table(table, Some(words)))
    }
}
