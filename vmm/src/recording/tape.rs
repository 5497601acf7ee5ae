//! The world of a recorded run: it answers from the tape, in the order in which it was asked.

use super::ReadError;
use super::chunks::ChunkReader;
use super::codec::{Context, Decoder, Source};
use super::item::{Answer, Call, Item};
use crate::audit::{CpuState, Denial, TableWords, World};
use lacuna_abi::addr::{FrameRange, Gfn, Gpa};
use lacuna_abi::event::EntryWrite;
use lacuna_abi::gate::Status;
use lacuna_abi::paging::Entry;
use lacuna_abi::walk::Tables;
use std::cell::RefCell;
use std::io::Read;

/// Reads a tape, call by call.
pub(super) struct Player<R> {
    pub(super) chunks: ChunkReader<R>,
    pub(super) context: Context,
    /// What a test makes of the items as they are read.
    #[cfg(test)]
    pub(super) edit: Box<dyn FnMut(Item) -> Option<Item>>,
}

impl<R: Read> Player<R> {
    pub(super) fn new(chunks: ChunkReader<R>, max_tables: u64) -> Self {
        Self {
            chunks,
            context: Context::new(max_tables),
            #[cfg(test)]
            edit: Box::new(Some),
        }
    }

    pub(super) fn item(&mut self) -> Result<Item, ReadError> {
        let item = Decoder { context: &mut self.context, source: &mut self.chunks }.item()?;
        #[cfg(test)]
        let Some(item) = (self.edit)(item) else { return self.item() };
        Ok(item)
    }

    /// The next call: the tape goes on.
    pub(super) fn call(&mut self) -> Result<Call, ReadError> {
        match self.item()? {
            Item::Call(call) => Ok(call),
            Item::Answer(_) | Item::Result(_) => {
                Err(self.chunks.damaged("an answer that nothing asked for"))
            }
        }
    }

    /// The world while a call is made.
    pub(super) fn world(&mut self) -> Tape<'_, R> {
        let state = State { player: self, next: None, result: None, astray: None, failed: None };
        Tape(RefCell::new(state))
    }
}

/// The world of one recorded call.
pub(super) struct Tape<'p, R>(RefCell<State<'p, R>>);

struct State<'p, R> {
    player: &'p mut Player<R>,
    /// What comes next: what is left of an answer for several frames, or one that was not asked for
    /// yet.
    next: Option<Answer>,
    result: Option<Result<(), Status>>,
    /// What was asked and has no answer.
    astray: Option<String>,
    failed: Option<ReadError>,
}

/// What an answer says to a question, and what is left of it.
type Said<T> = Option<(T, Option<Answer>)>;

/// How a call ended.
pub(super) struct Ending {
    /// What it came to in the run.
    pub(super) result: Result<(), Status>,
    /// Where question and tape parted, if they did.
    pub(super) astray: Option<String>,
}

impl<R: Read> Tape<'_, R> {
    /// Ends the call: what is left of its answers is passed over.
    pub(super) fn end(self) -> Result<Ending, ReadError> {
        let mut state = self.0.into_inner();
        while state.failed.is_none() && state.answer().is_some() {}
        if let Some(failed) = state.failed {
            return Err(failed);
        }
        let result = state.result.unwrap_or(Ok(()));
        Ok(Ending { result, astray: state.astray })
    }

    fn ask<T>(
        &self,
        question: impl Fn() -> String,
        said: impl Fn(&Answer) -> Said<T>,
    ) -> Option<T> {
        let mut state = self.0.borrow_mut();
        if state.astray.is_some() || state.failed.is_some() {
            return None;
        }
        while let Some(answer) = state.answer() {
            if let Some((value, left)) = said(&answer) {
                state.next = left;
                return Some(value);
            }
            // Asked for a story that is not told now.
            if !matches!(answer, Answer::FirstNonzero(..)) {
                state.next = Some(answer);
                break;
            }
        }
        state.astray = Some(question());
        None
    }

    /// A number that was drawn.
    pub(super) fn draw(&self, below: u64) -> u64 {
        let said = |answer: &Answer| match *answer {
            Answer::Draw(of, drawn) if of == below && drawn < of.max(1) => Some((drawn, None)),
            _ => None,
        };
        self.ask(|| format!("a number below {below}"), said).unwrap_or(0)
    }
}

impl<R: Read> State<'_, R> {
    /// The next answer of this call.
    fn answer(&mut self) -> Option<Answer> {
        if let Some(next) = self.next.take() {
            return Some(next);
        }
        if self.result.is_some() || self.failed.is_some() {
            return None;
        }
        match self.player.item() {
            Ok(Item::Answer(answer)) => return Some(answer),
            Ok(Item::Result(result)) => self.result = Some(result),
            Ok(Item::Call(_)) => {
                self.failed = Some(self.player.chunks.damaged("a call in the middle of another"));
            }
            Err(failed) => self.failed = Some(failed),
        }
        None
    }
}

/// The answer for one frame at the start of a run of frames, and the rest of the run.
fn first_of(
    of: FrameRange,
    frame: Gfn,
    rest: impl FnOnce(FrameRange) -> Answer,
) -> Option<Option<Answer>> {
    let left = || FrameRange::new(of.start().wrapping_add(1), of.count() - 1).map(rest);
    (of.start() == frame).then(left)
}

impl<R: Read> Tables for Tape<'_, R> {
    fn read_entry(&self, at: Gpa) -> Option<Entry> {
        let said = |answer: &Answer| match *answer {
            Answer::Entry(of, entry) if of == at => Some((entry, None)),
            _ => None,
        };
        self.ask(|| format!("the entry at {at}"), said).flatten()
    }
}

impl<R: Read> World for Tape<'_, R> {
    fn read_table(&self, table: Gfn, into: &mut TableWords) -> bool {
        let said = |answer: &Answer| match answer {
            Answer::Table(of, words) if *of == table => Some((words.clone(), None)),
            _ => None,
        };
        let words = self.ask(|| format!("the table at {table}"), said).flatten();
        if let Some(words) = &words {
            into.copy_from_slice(&words[..]);
        }
        words.is_some()
    }

    fn content_is_zero(&self, frame: Gfn) -> Option<bool> {
        let said = |answer: &Answer| match *answer {
            Answer::Zero(of, zero) => {
                first_of(of, frame, |rest| Answer::Zero(rest, zero)).map(|left| (zero, left))
            }
            _ => None,
        };
        self.ask(|| format!("whether {frame} is zero"), said).flatten()
    }

    fn first_nonzero(&self, frame: Gfn) -> Option<u64> {
        let mut state = self.0.borrow_mut();
        // Of a story that was not told in the run nothing is on the tape, and that is no harm.
        match state.answer() {
            Some(Answer::FirstNonzero(of, offset)) if of == frame => return offset,
            other => state.next = other,
        }
        None
    }

    fn denial(&self, frame: Gfn) -> Denial {
        let said = |answer: &Answer| match *answer {
            Answer::Denial(of, denial) => {
                first_of(of, frame, |rest| Answer::Denial(rest, denial)).map(|left| (denial, left))
            }
            _ => None,
        };
        self.ask(|| format!("what the second stage grants of {frame}"), said)
            .unwrap_or(Denial::NotEnforced)
    }

    fn denies_all(&self, frames: FrameRange) -> bool {
        let said = |answer: &Answer| match *answer {
            Answer::DeniesAll(of, all) if of == frames => Some((all, None)),
            _ => None,
        };
        let question =
            || format!("whether {} frames from {} are closed", frames.count(), frames.start());
        self.ask(question, said).unwrap_or(false)
    }

    fn cpu_state(&self, cpu: u8) -> Option<CpuState> {
        let said = |answer: &Answer| match *answer {
            Answer::Cpu(of, state) if of == cpu => Some((state, None)),
            _ => None,
        };
        self.ask(|| format!("the registers of CPU {cpu}"), said).flatten()
    }

    fn intent(&self, cpu: u8) -> Option<EntryWrite> {
        let said = |answer: &Answer| match *answer {
            Answer::Intent(of, write) if of == cpu => Some((write, None)),
            _ => None,
        };
        self.ask(|| format!("what CPU {cpu} announced"), said).flatten()
    }
}
