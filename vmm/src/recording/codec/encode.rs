//! Items to bytes.

use super::{
    ADMIT, ANSWERS, ARRIVAL, CAME, CHOOSE_PROBES, CPU, Context, DENIAL, DENIALS, DENIES_ALL, DONE,
    DRAW, ENTRY, EVENT, FIRST_NONZERO, INCONCLUSIVE, INTENT, JUDGE_PROBES, LEAK, LEAK_SEARCH,
    MAX_TEXT, MEDIATE, QUIESCE, REGISTER_CPU, REGISTER_ROOT, RESULT, SAMPLE, START, START_CPU,
    TABLE, UNREGISTER_ROOT, WORDS, ZERO,
};
use crate::audit::{Probe, TableWords, Touched};
use crate::recording::item::{Answer, Call, Item, cpu_words, op_words};
use crate::recording::varint;
use crate::recording::varint::zigzag;
use lacuna_abi::addr::{FrameRange, Gfn};
use lacuna_abi::event::{Intent, RECORD_WORDS, Record};
use lacuna_abi::gate::{Op, PAGE_WORDS, Status};

/// Appends items to bytes.
pub(in crate::recording) struct Encoder<'a> {
    pub(in crate::recording) context: &'a mut Context,
    pub(in crate::recording) out: &'a mut Vec<u8>,
}

impl Encoder<'_> {
    pub(in crate::recording) fn item(&mut self, item: &Item) {
        match item {
            Item::Call(call) => self.call(call),
            Item::Answer(answer) => self.answer(answer),
            Item::Result(result) => {
                let status = result.err().unwrap_or(Status::Ok);
                self.out.push(RESULT + status as u8);
            }
        }
    }

    pub(in crate::recording) fn call(&mut self, call: &Call) {
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
            Call::Admit(cpu, site, op, seq) => {
                self.out.extend([ADMIT, *cpu]);
                let request = op_words(*site, op);
                self.number(request.words().len() as u64);
                self.numbers(request.words());
                self.seq(*seq);
            }
            Call::Sample(cpu, seq) => {
                self.out.extend([SAMPLE, *cpu]);
                self.seq(*seq);
            }
            Call::Quiesce(seq) => {
                self.out.push(QUIESCE);
                self.seq(*seq);
            }
            Call::Mediate(mediation) => self.out.extend([MEDIATE, *mediation as u8]),
            Call::Came(cpu, seq) => {
                self.out.extend([CAME, *cpu]);
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

    pub(in crate::recording) fn answer(&mut self, answer: &Answer) {
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
