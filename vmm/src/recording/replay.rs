//! Judges a recording: makes the recorded calls of an audit of its own.

use super::chunks::{ChunkReader, FULL, Kind, file_of};
use super::item::Call;
#[cfg(test)]
use super::item::Item;
use super::recorder::tables_of;
use super::setup::{End, Setup};
use super::tape::{Ending, Player};
use super::{FILE, MAGIC, Problem, ReadError};
use crate::audit::{Audit, AuditConfig, Profile};
use crate::config;
use crate::leak::LeakScanner;
use crate::names::Names;
use crate::report::Report;
use crate::run::{judged, touched};
use lacuna_abi::event::Event;
use lacuna_abi::gate::{Op, OpKind, Status};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

/// Judges the recording in this folder, as the run was judged or for another profile. What only the
/// live machine knew is in the report as the run had it.
///
/// # Errors
/// [`ReadError`] if there is no recording, or one that cannot be read.
pub fn judge_file(folder: &Path, profile: Option<Profile>) -> Result<Report, ReadError> {
    let path = folder.join(FILE);
    let file = open(&path).map_err(|error| error.in_file(&path))?;
    judge(BufReader::new(file), profile).map_err(|error| error.in_file(&path))
}

fn open(path: &Path) -> Result<File, ReadError> {
    let unreadable = |what: String| ReadError::at(0, Problem::Unreadable(what));
    let kind = std::fs::metadata(path).map_err(|error| unreadable(error.to_string()))?;
    if !kind.is_file() {
        return Err(unreadable("this is no regular file".into()));
    }
    File::open(path).map_err(|error| unreadable(error.to_string()))
}

/// Judges a recording.
///
/// # Errors
/// [`ReadError`], whatever is read.
pub fn judge(from: impl Read, profile: Option<Profile>) -> Result<Report, ReadError> {
    let mut recording = Recording::open(from)?;
    if let Some(profile) = profile {
        recording.config.profile = profile;
    }
    recording.judge()
}

/// Judges any bytes: as a file if they start like one, else as the tape of a small guest. For fuzzers.
///
/// # Errors
/// [`ReadError`].
#[doc(hidden)]
pub fn judge_bytes(bytes: &[u8]) -> Result<Report, ReadError> {
    if bytes.starts_with(&MAGIC) {
        return judge(bytes, None);
    }
    let setup = serde_json::to_vec(&Setup::small()).unwrap_or_default();
    let tape = bytes.chunks(FULL).map(|part| (Kind::Tape, part));
    let chunks: Vec<_> = std::iter::once((Kind::Setup, &setup[..])).chain(tape).collect();
    let file = file_of(&chunks).unwrap_or_default();
    judge(&file[..], None)
}

/// Whether a recording holds bytes that this scanner looks for.
///
/// # Errors
/// [`ReadError`].
pub fn holds(path: &Path, scanner: &LeakScanner) -> Result<bool, ReadError> {
    let file = open(path).map_err(|error| error.in_file(path))?;
    let mut recording = Recording::open(BufReader::new(file))?;
    let mut search = scanner.search();
    while recording.player.chunks.goes_on()?.is_ok() {
        let bytes = recording.player.item()?.guest_bytes();
        if search.feed(&bytes).is_some() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A recording whose set-up has been read.
pub(super) struct Recording<R> {
    pub(super) setup: Setup,
    pub(super) config: AuditConfig,
    pub(super) player: Player<R>,
    expected: config::Audit,
}

/// How often things were told: the live machine counted too.
#[derive(Default)]
struct Counted {
    events: u64,
    seals: u64,
    opens: u64,
    releases: u64,
    last: u64,
}

impl Counted {
    fn by_name(&self) -> [(&'static str, u64); 4] {
        let Self { events, seals, opens, releases, .. } = *self;
        [("events", events), ("seals", seals), ("opens", opens), ("releases", releases)]
    }
}

impl<R: Read> Recording<R> {
    pub(super) fn open(from: R) -> Result<Self, ReadError> {
        let mut chunks = ChunkReader::open(from)?;
        let damaged = |what: String| ReadError::at(super::chunks::HEAD, Problem::Damaged(what));
        match chunks.next()? {
            Some(Kind::Setup) => {}
            Some(_) => return Err(damaged("it does not start with how it was set up".into())),
            None => return Err(damaged("nothing was recorded: the run ended before".into())),
        }
        let setup: Setup = serde_json::from_slice(chunks.bytes())
            .map_err(|error| damaged(format!("how it was set up makes no sense: {error}")))?;
        let config = setup.audit().map_err(damaged)?;
        let expected = setup.origin.expectations().map_err(damaged)?;
        let player = Player::new(chunks, tables_of(&config.layout));
        Ok(Self { setup, config, player, expected })
    }

    pub(super) fn judge(mut self) -> Result<Report, ReadError> {
        let mut counted = Counted::default();
        let start = match self.player.chunks.goes_on()? {
            Ok(()) => self.player.call()? == Call::Start,
            Err(_) => false,
        };
        if !start {
            return Err(self.damaged("the tape does not start with the boot root"));
        }
        let world = self.player.world();
        let mut audit = Audit::new(self.config, &world);
        note(&mut audit, "the boot root", Ok(()), &world.end()?);
        let mut accepted = None;
        let over = loop {
            match self.player.chunks.goes_on()? {
                Ok(()) => self.call(&mut audit, &mut accepted, &mut counted)?,
                Err(over) => break over,
            }
        };
        let end = over.map(|_| self.end()).transpose()?;
        let (report, names) = self.outline(end, &audit, &counted);
        Ok(judged(report, &audit, &names, &self.expected))
    }

    /// Makes one call. `accepted` is the operation that was accepted and is not done.
    fn call(
        &mut self,
        audit: &mut Audit,
        accepted: &mut Option<(u8, Op)>,
        counted: &mut Counted,
    ) -> Result<(), ReadError> {
        let call = self.player.call()?;
        let world = self.player.world();
        let (what, result) = match call {
            Call::Start => return Err(self.damaged("the audit is made twice")),
            Call::RegisterRoot(root, pcid) => {
                (format!("the registration of {root}"), audit.register_root(root, pcid, &world))
            }
            Call::UnregisterRoot(root) => {
                (format!("the end of the root {root}"), audit.unregister_root(root))
            }
            Call::StartCpu(cpu) => {
                if usize::from(cpu) >= self.config.layout.cpus {
                    return Err(self.damaged("a CPU starts that the guest does not have"));
                }
                audit.start_cpu(cpu);
                (String::new(), Ok(()))
            }
            Call::RegisterCpu(cpu, registration) => {
                audit.register_cpu(cpu, registration);
                (String::new(), Ok(()))
            }
            Call::Event(record) => {
                counted.events +=
                    u64::from(!matches!(record.event, Event::Host(..) | Event::Seen(_)));
                counted.last = counted.last.max(record.seq);
                audit.event(&record, &world);
                (format!("event {}", record.seq), Ok(()))
            }
            Call::Arrival(cpu, op, seq) => {
                let result = audit.arrival(cpu, op, seq, &world);
                *accepted = result.is_ok().then_some((cpu, op));
                (format!("an operation after event {seq}"), result)
            }
            Call::Done(cpu, op, seq) => {
                match op.kind {
                    OpKind::Seal => counted.seals += 1,
                    OpKind::Open => counted.opens += 1,
                    OpKind::Release => counted.releases += 1,
                }
                // Without its arrival it would end what never began.
                if accepted.take() == Some((cpu, op)) {
                    audit.done(cpu, op, seq, &world);
                } else {
                    audit.inconclusive(format!("operation {seq} was done and never accepted"));
                }
                (format!("operation {seq}"), Ok(()))
            }
            Call::Admit(cpu, site, op, seq) => {
                let result = audit.admit(cpu, (site, &op), seq, &world);
                (format!("a write to tables after event {seq}"), result)
            }
            Call::Sample(cpu, seq) => {
                audit.sample(cpu, seq, &world);
                (format!("the registers of CPU {cpu} after event {seq}"), Ok(()))
            }
            Call::Mediate(mediation) => {
                audit.mediate(mediation, &world);
                (format!("the mediation {}", mediation.name()), Ok(()))
            }
            Call::Came(cpu, seq) => {
                audit.came(cpu, seq);
                (String::new(), Ok(()))
            }
            Call::Quiesce(seq) => {
                audit.quiesce(seq, &world);
                (format!("the complete check {seq}"), Ok(()))
            }
            Call::ChooseProbes(count, kinds) => {
                audit.choose_probes(count, &kinds, &mut |below| world.draw(below), &world);
                ("the choice of frames to touch".to_owned(), Ok(()))
            }
            Call::JudgeProbes(touched, seq) => {
                audit.judge_probes(&touched, seq, &world);
                ("touches of frames".to_owned(), Ok(()))
            }
            Call::Leak(place, frame, detail, seq) => {
                audit.report_leak(place, frame, detail, seq);
                (String::new(), Ok(()))
            }
            Call::LeakSearch(checked, not_checked) => {
                audit.count_leak_search(checked, not_checked);
                (String::new(), Ok(()))
            }
            Call::Inconclusive(reason) => {
                audit.inconclusive(reason);
                (String::new(), Ok(()))
            }
        };
        let ending = world.end()?;
        note(audit, &what, result, &ending);
        Ok(())
    }

    /// What the recording says at its end.
    fn end(&self) -> Result<End, ReadError> {
        self.player.chunks.over()?;
        serde_json::from_slice(self.player.chunks.bytes())
            .map_err(|error| self.damaged(&format!("its end makes no sense: {error}")))
    }

    /// The report without what the audit says, and the names of functions.
    fn outline(&self, end: Option<End>, audit: &Audit, counted: &Counted) -> (Report, Names) {
        let mut names = BTreeMap::new();
        let mut report = match end {
            Some(End { report, functions, cut }) => {
                for (name, sites) in functions {
                    names.extend(sites.into_iter().map(|site| (site, name.clone())));
                }
                finished(report, cut, counted)
            }
            None => self.unfinished(counted),
        };
        report.second_stage.probes = touched(report.second_stage.probes, audit.probe_tally());
        if self.config.profile.name() != self.setup.profile {
            let profile = self.config.profile.name();
            report.machine.profile = profile.to_owned();
            report.warnings.push(format!(
                "judged for CPUs that invalidate as {profile}; the run was judged as {}",
                self.setup.profile
            ));
        }
        (report, Names::Known(names))
    }

    /// Of a run that did not get to write its end.
    fn unfinished(&self, counted: &Counted) -> Report {
        let mut report = self.setup.origin.report.clone();
        report.second_stage.backend.clone_from(&self.setup.backend);
        report.second_stage.granule = self.setup.granule;
        report.second_stage.detail.clone_from(&self.setup.detail);
        let counters = counted.by_name();
        report.counters = counters.map(|(name, count)| (name.to_owned(), count)).into();
        report.inconclusive.push(format!(
            "the recording has no end: the run was killed, and nothing is known of it after event {}",
            counted.last
        ));
        report
    }

    fn damaged(&self, what: &str) -> ReadError {
        use super::codec::Source;
        self.player.chunks.damaged(what)
    }
}

/// The outline of a run that ended; what its machine counted and the tape does not have makes it
/// inconclusive.
fn finished(mut report: Report, cut: Option<String>, counted: &Counted) -> Report {
    if let Some(time) = report.guest.work_us {
        // A fraction may have been rounded on its way through the file.
        report.guest.set_work(report.guest.work, time);
    }
    if let Some(why) = cut {
        report
            .inconclusive
            .push(format!("the recording ends early, after event {}: {why}", counted.last));
        return report;
    }
    for (name, count) in counted.by_name() {
        let live = report.counters.get(name).copied().unwrap_or(0);
        if live != count {
            report
                .inconclusive
                .push(format!("the recording holds {count} {name}, the run had {live}"));
        }
    }
    report
}

/// Notes where the recorded run and this judgement part.
fn note(audit: &mut Audit, what: &str, result: Result<(), Status>, ending: &Ending) {
    if result != ending.result {
        let word = |result: Result<(), Status>| match result {
            Ok(()) => "accepted".to_owned(),
            Err(status) => format!("refused ({status:?})"),
        };
        audit.inconclusive(format!(
            "{what} was {} in the run and is {} here",
            word(ending.result),
            word(result)
        ));
    }
    if let Some(question) = &ending.astray {
        audit.inconclusive(format!(
            "judging {what} takes an answer that the recording does not have: {question}"
        ));
    }
}

/// Everything on a tape, for tests.
#[cfg(test)]
pub(super) fn items<R: Read>(recording: &mut Recording<R>) -> Result<Vec<Item>, ReadError> {
    let mut items = Vec::new();
    while recording.player.chunks.goes_on()?.is_ok() {
        items.push(recording.player.item()?);
    }
    Ok(items)
}
