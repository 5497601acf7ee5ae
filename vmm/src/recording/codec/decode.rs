//! Bytes to items.

use super::{
    ADMIT, ANSWERS, ARRIVAL, CAME, CHOOSE_PROBES, CPU, Context, DENIAL, DENIALS, DENIES_ALL, DONE,
    DRAW, ENTRY, EVENT, FIRST_NONZERO, INCONCLUSIVE, INTENT, JUDGE_PROBES, LEAK, LEAK_SEARCH,
    MAX_TEXT, MAX_TOUCHES, MEDIATE, OPS, QUIESCE, REGISTER_CPU, REGISTER_ROOT, RESULT, SAMPLE,
    START, START_CPU, Source, TABLE, UNREGISTER_ROOT, WORDS, ZERO,
};
use crate::audit::{Mediation, Probe, ProbeKind, Touched};
use crate::recording::item::{Answer, Call, Item, MAX_OP_WORDS, cpu_state, op_of};
use crate::recording::varint::unzigzag;
use crate::recording::{ReadError, varint};
use lacuna_abi::MAX_CPUS;
use lacuna_abi::addr::{FrameRange, Gfn, Gpa};
use lacuna_abi::direct::TableOp;
use lacuna_abi::event::{INTENT_WORDS, Intent, RECORD_WORDS, Record};
use lacuna_abi::gate::{CpuRegistration, Op, PAGE_WORDS, Status};
use lacuna_abi::paging::Entry;

/// Reads items.
pub(in crate::recording) struct Decoder<'a, S> {
    pub(in crate::recording) context: &'a mut Context,
    pub(in crate::recording) source: &'a mut S,
}

impl<S: Source> Decoder<'_, S> {
    /// The next item.
    ///
    /// # Errors
    /// [`ReadError`], whatever the bytes are.
    pub(in crate::recording) fn item(&mut self) -> Result<Item, ReadError> {
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
            ADMIT => {
                let cpu = self.cpu()?;
                let (site, op) = self.table_op()?;
                Call::Admit(cpu, site, op, self.seq()?)
            }
            SAMPLE => Call::Sample(self.cpu()?, self.seq()?),
            QUIESCE => Call::Quiesce(self.seq()?),
            MEDIATE => {
                let mediation = Mediation::from_number(self.source.byte()?.into());
                Call::Mediate(mediation.ok_or_else(|| self.source.damaged("no such mediation"))?)
            }
            CAME => Call::Came(self.cpu()?, self.seq()?),
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

    /// A request to write to tables.
    fn table_op(&mut self) -> Result<(u32, TableOp), ReadError> {
        let count: usize = self.small("number of words")?;
        if count > 1 + MAX_OP_WORDS {
            return Err(self.source.huge("a write to tables has more words than any has"));
        }
        let words: Result<Vec<_>, _> = (0..count).map(|_| self.number()).collect();
        op_of(&words?).ok_or_else(|| self.source.damaged("no write to tables"))
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
