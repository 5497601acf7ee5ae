//! Makes a tape while a run is judged: a world between the audit and the machine notes what is asked
//! and what is answered.

use super::chunks::{ChunkWriter, FULL, Kind, MAX_TAPE};
use super::codec::{Context, Encoder};
use super::item::{Answer, Call, Item};
use super::setup::{End, MAX_SITES, Setup};
use super::{FILE, Origin};
use crate::audit::{CpuState, Denial, TableWords, World};
use crate::names::Names;
use crate::report::Report;
use lacuna_abi::addr::{FrameRange, Gfn, Gpa, PAGE_SIZE};
use lacuna_abi::event::EntryWrite;
use lacuna_abi::gate::Status;
use lacuna_abi::layout::Layout;
use lacuna_abi::paging::Entry;
use lacuna_abi::walk::Tables;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::mem;
use std::path::{Path, PathBuf};

/// Writes the recording of one run. What goes wrong with the file does not disturb the run: it is
/// said at the end.
pub struct Recorder {
    path: PathBuf,
    limit: u64,
    origin: Option<Origin>,
    out: Option<ChunkWriter>,
    context: Context,
    /// What is not in the file yet.
    buffer: Vec<u8>,
    /// Whether parts of the call under way are in the file already.
    open: bool,
    tape: u64,
    /// Answers alike for frames in a row, not on the tape yet.
    run: Option<Answer>,
    sites: BTreeSet<u32>,
    cut: Option<String>,
    failed: Option<io::Error>,
}

/// What became of a recording.
#[derive(Debug, Default)]
pub struct Kept {
    /// What a reader of the report should know.
    pub warning: Option<String>,
    /// Why the recording could not be written.
    pub failure: Option<String>,
}

impl Recorder {
    /// Creates the recording in this folder, of at most `limit` bytes.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn create(folder: &Path, limit: u64, origin: Origin) -> io::Result<Self> {
        let path = folder.join(FILE);
        let out = ChunkWriter::create(&path)?;
        Ok(Self {
            path,
            limit,
            origin: Some(origin),
            out: Some(out),
            context: Context::new(u64::MAX),
            buffer: Vec::new(),
            open: false,
            tape: 0,
            run: None,
            sites: BTreeSet::new(),
            cut: None,
            failed: None,
        })
    }

    /// Where it is written.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes how the audit is set up. Comes before everything else.
    pub fn set_up(&mut self, make: impl FnOnce(Origin) -> Setup) {
        let Some(origin) = self.origin.take() else { return };
        let setup = serde_json::to_vec(&make(origin)).map_err(io::Error::from);
        let written = setup.and_then(|setup| self.write(Kind::Setup, &setup, true));
        self.note(written);
    }

    /// Puts an item on the tape.
    pub(super) fn put(&mut self, item: &Item) {
        if self.cut.is_some() || self.out.is_none() {
            return;
        }
        match item {
            Item::Answer(answer) => {
                if self.run.as_mut().is_some_and(|run| extends(run, answer)) {
                    return;
                }
                self.end_run();
                if matches!(answer, Answer::Zero(..) | Answer::Denial(..)) {
                    self.run = Some(answer.clone());
                    return;
                }
            }
            Item::Call(Call::Event(record)) if self.sites.len() < MAX_SITES => {
                self.sites.insert(record.site);
            }
            Item::Call(Call::Admit(_, site, ..)) if self.sites.len() < MAX_SITES => {
                self.sites.insert(*site);
            }
            Item::Call(_) => {}
            Item::Result(_) => self.end_run(),
        }
        self.encode(item);
        let whole = matches!(item, Item::Result(_));
        if self.buffer.len() >= FULL || whole && self.open {
            self.flush(whole);
        }
    }

    /// Has everything so far in the file.
    pub fn sync(&mut self) {
        if !self.buffer.is_empty() {
            self.flush(true);
        }
    }

    /// Writes the end: the report without what the audit says, and the functions that events came
    /// from.
    pub fn finish(mut self, report: &Report, names: &Names) -> Kept {
        self.sync();
        let mut functions: BTreeMap<String, Vec<u32>> = BTreeMap::new();
        for (site, name) in names.functions(&self.sites) {
            functions.entry(name).or_default().push(site);
        }
        let end = End { report: report.clone(), functions, cut: self.cut.clone() };
        let end = serde_json::to_vec(&end).map_err(io::Error::from);
        let written = end.and_then(|end| self.write(Kind::End, &end, true));
        self.note(written);
        let failure =
            self.failed.map(|error| format!("cannot write {}: {error}", self.path.display()));
        let warning = self.cut.map(|why| format!("the recording {FILE} ends early: {why}"));
        Kept { warning, failure }
    }

    /// Takes the recording away.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn discard(self) -> io::Result<()> {
        std::fs::remove_file(&self.path)
    }

    fn encode(&mut self, item: &Item) {
        Encoder { context: &mut self.context, out: &mut self.buffer }.item(item);
    }

    fn end_run(&mut self) {
        if let Some(run) = self.run.take() {
            self.encode(&Item::Answer(run));
        }
    }

    /// Writes the buffer as a chunk; a reader may stop behind it if it ends with a `whole` call.
    fn flush(&mut self, whole: bool) {
        // Kept for its room.
        let mut buffer = mem::take(&mut self.buffer);
        let len = self.out.as_ref().map_or(0, ChunkWriter::len);
        self.tape += buffer.len() as u64;
        if self.tape > MAX_TAPE || len + buffer.len() as u64 > self.limit {
            // What is not whole yet is behind what can be read.
            let mib = self.limit >> 20;
            self.cut = Some(format!("it would be larger than {mib} MiB ([limits] events_mib)"));
            if let Err(error) = self.rewind() {
                self.note(Err(error));
            }
            return;
        }
        // A call may be larger than a chunk.
        let mut parts = buffer.chunks(FULL).peekable();
        let mut written = Ok(());
        while let Some(part) = parts.next() {
            let last = parts.peek().is_none();
            written = written.and_then(|()| self.write(Kind::Tape, part, whole && last));
        }
        self.open = !whole;
        self.note(written);
        buffer.clear();
        self.buffer = buffer;
    }

    fn rewind(&mut self) -> io::Result<()> {
        self.out.as_mut().map_or(Ok(()), ChunkWriter::rewind)
    }

    fn write(&mut self, kind: Kind, bytes: &[u8], commit: bool) -> io::Result<()> {
        let Some(out) = &mut self.out else { return Ok(()) };
        out.chunk(kind, bytes)?;
        if commit { out.commit() } else { Ok(()) }
    }

    fn note(&mut self, written: io::Result<()>) {
        if let Err(error) = written {
            self.out = None;
            self.failed = Some(error);
        }
    }
}

/// Whether the answer says the same of the frames behind those of `run`, which then has them too.
fn extends(run: &mut Answer, answer: &Answer) -> bool {
    let (of, more) = match (&mut *run, answer) {
        (Answer::Zero(of, said), Answer::Zero(more, says)) if said == says => (of, *more),
        (Answer::Denial(of, said), Answer::Denial(more, says)) if said == says => (of, *more),
        _ => return false,
    };
    let behind = of.start().wrapping_add(of.count()) == more.start();
    let joined = FrameRange::new(of.start(), of.count().saturating_add(more.count()));
    let Some(joined) = joined.filter(|_| behind) else { return false };
    *of = joined;
    true
}

/// Most tables that a guest of this layout has.
pub(super) const fn tables_of(layout: &Layout) -> u64 {
    layout.pool.len / PAGE_SIZE
}

/// A world whose answers are put on a tape.
pub(super) struct Tap<'a, W> {
    pub(super) world: &'a W,
    pub(super) recorder: RefCell<&'a mut Recorder>,
}

impl<W> Tap<'_, W> {
    pub(super) fn note(&self, answer: Answer) {
        self.recorder.borrow_mut().put(&Item::Answer(answer));
    }

    /// The call is over.
    pub(super) fn end(self, result: Result<(), Status>) {
        self.recorder.into_inner().put(&Item::Result(result));
    }
}

impl<W: World> Tables for Tap<'_, W> {
    fn read_entry(&self, at: Gpa) -> Option<Entry> {
        let entry = self.world.read_entry(at);
        self.note(Answer::Entry(at, entry));
        entry
    }
}

impl<W: World> World for Tap<'_, W> {
    fn read_table(&self, table: Gfn, into: &mut TableWords) -> bool {
        let readable = self.world.read_table(table, into);
        self.note(Answer::Table(table, readable.then(|| Box::new(*into))));
        readable
    }

    fn content_is_zero(&self, frame: Gfn) -> Option<bool> {
        let zero = self.world.content_is_zero(frame);
        self.note(Answer::Zero(FrameRange::single(frame), zero));
        zero
    }

    fn first_nonzero(&self, frame: Gfn) -> Option<u64> {
        let offset = self.world.first_nonzero(frame);
        self.note(Answer::FirstNonzero(frame, offset));
        offset
    }

    fn denial(&self, frame: Gfn) -> Denial {
        let denial = self.world.denial(frame);
        self.note(Answer::Denial(FrameRange::single(frame), denial));
        denial
    }

    fn denies_all(&self, frames: FrameRange) -> bool {
        let all = self.world.denies_all(frames);
        self.note(Answer::DeniesAll(frames, all));
        all
    }

    fn cpu_state(&self, cpu: u8) -> Option<CpuState> {
        let state = self.world.cpu_state(cpu);
        self.note(Answer::Cpu(cpu, state));
        state
    }

    fn intent(&self, cpu: u8) -> Option<EntryWrite> {
        let intent = self.world.intent(cpu);
        self.note(Answer::Intent(cpu, intent));
        intent
    }
}
