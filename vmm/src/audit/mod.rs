//! The audit: compares tables, second stage, cached translations and contents with the rules, and
//! says what holds, what does not, and what could not be checked.
//!
//! It knows nothing of KVM. The machine, live or recorded, is a [`World`]; events, gate calls and
//! quiesce points are method calls. For one order of calls the findings are always the same.
//! Whatever a guest reports, nothing here panics, and time and memory are bounded.
//!
//! | file | holds |
//! | --- | --- |
//! | `finding` | rules, findings, counts |
//! | `world` | what the audit asks of the machine |
//! | `frames` | the host's state of every frame |
//! | `history` | the last records, for stories |
//! | `story` | how a finding came about, step by step |
//! | `index`, `found`, `recent`, `tables`, `links`, `aliases` | the host's copy of all tables: which entries map a frame |
//! | `tlb` | what may still be cached, and where |
//! | `mappings` | rules about one mapping |
//! | `writes`, `plain`, `revokes`, `elsewhere`, `remaps`, `fills` | entry-write records; what tables hold when they are linked |
//! | `direct` | direct paging: writes that are asked for, before they are made |
//! | `life` | life-cycle records |
//! | `arrival` | gate operations |
//! | `mediation`, `honesty` | what the host sees itself; what the guest says of the same |
//! | `uses` | accesses through windows, where the host sees them |
//! | `quiesce`, `compare` | the complete check; records against tables |
//! | `probe` | frames that are touched on purpose |
//! | `observed` | accesses that the guest observed, against what may be cached |
#![forbid(unsafe_code)]
#![warn(clippy::cast_possible_truncation)]

mod aliases;
mod arrival;
mod compare;
mod direct;
mod elsewhere;
mod fills;
mod finding;
mod found;
mod frames;
mod history;
mod honesty;
mod index;
mod life;
mod links;
mod mappings;
mod mediation;
mod observed;
mod plain;
mod probe;
mod quiesce;
mod recent;
mod remaps;
mod revokes;
mod story;
mod tables;
#[cfg(test)]
mod tests;
mod tlb;
mod uses;
mod world;
mod writes;

pub use finding::{AuditResult, Finding, Revoke, Rule, Step, Tally, What};
pub use frames::Frames;
pub use mediation::Mediation;
pub use observed::CaseTally;
pub use probe::{Probe, ProbeKind, ProbeTally, Touched};
pub use tlb::Profile;
pub use world::{AuditConfig, ControlPolicy, CpuState, Denial, TableWords, World};

use fills::Fills;
use finding::Ledger;
use history::History;
use honesty::Honesty;
use index::{Index, Walked};
use lacuna_abi::addr::{FrameRange, Gfn, Gpa, PAGE_SIZE};
use lacuna_abi::event::{Event, Record};
use lacuna_abi::gate::{CpuRegistration, Status};
use lacuna_abi::walk::EVERYTHING;
use links::Change;
use observed::Observations;
use story::Moment;
use tlb::{Leaves, Start, Tlb, TooMany};

/// Most roots that may be registered at once.
pub const MAX_ROOTS: usize = 16;

/// Most tables and entries that are read between two quiesce points because tables were linked.
const MAX_LINK_WORK: usize = 1 << 22;

/// The audit of one guest: plain data, fed by method calls.
#[derive(Clone, Debug)]
pub struct Audit {
    config: AuditConfig,
    frames: Frames,
    index: Index,
    tlb: Tlb,
    fills: Fills,
    /// Descriptor tables of each CPU, once it has registered them.
    registrations: Vec<Option<CpuRegistration>>,
    roots: Vec<(Gpa, u16)>,
    /// Under direct paging: frames of the kernel's text.
    text: Vec<FrameRange>,
    ledger: Ledger,
    history: History,
    last_seq: u64,
    link_work: usize,
    probes: ProbeTally,
    observations: Observations,
    /// Accesses through windows that were seen.
    uses: u64,
    mediation: Mediation,
    honesty: Honesty,
    /// What the last record mapped and linked; empty between two records, kept for its room.
    walked: Walked,
}

impl Audit {
    /// The audit of a guest that is about to start. Its boot root is registered and walked.
    pub fn new(config: AuditConfig, world: &impl World) -> Self {
        let mut audit = Self {
            frames: Frames::new(&config.layout),
            index: Index::new(&config.layout),
            tlb: Tlb::new(config.layout.cpus, start_of(&config), config.profile),
            fills: Fills::default(),
            registrations: vec![None; config.layout.cpus],
            roots: Vec::new(),
            text: Vec::new(),
            ledger: Ledger::new(config.max_findings),
            history: History::default(),
            last_seq: 0,
            link_work: 0,
            probes: ProbeTally::default(),
            observations: Observations::default(),
            uses: 0,
            mediation: Mediation::Trace,
            honesty: Honesty::new(config.layout.cpus, config.boot_root),
            walked: Walked::default(),
            config,
        };
        audit.tlb.start(0);
        if audit.register_root(config.boot_root, 0, world).is_err() {
            audit.ledger.inconclusive(format!("the boot root {} is no table", config.boot_root));
        }
        audit
    }

    /// Registers a root and judges everything that it maps. Registering the same root again with
    /// the same PCID does nothing.
    ///
    /// # Errors
    /// [`Status::BadRoot`] if it lies outside the table pool, has another PCID already, or if there
    /// are [`MAX_ROOTS`]; under direct paging also if what it maps would break a rule, and
    /// [`Status::BadState`] if that takes more work than is left until the next complete check.
    pub fn register_root(
        &mut self,
        root: Gpa,
        pcid: u16,
        world: &impl World,
    ) -> Result<(), Status> {
        if self.roots.contains(&(root, pcid)) {
            return Ok(());
        }
        let in_pool = root.is_aligned(PAGE_SIZE) && self.config.layout.pool.contains(root);
        if !in_pool || self.is_registered(root) || self.roots.len() >= MAX_ROOTS || pcid > 0xfff {
            return Err(Status::BadRoot);
        }
        let first = self.roots.is_empty();
        if self.is_direct() && !first {
            self.admit_root(root, world)?;
        }
        self.roots.push((root, pcid));
        let mut walked = Walked::default();
        let Self { index, fills, mediation, config, .. } = self;
        let source = |table: Gfn, into: &mut TableWords| match mediation {
            Mediation::Trace => world.read_table(table, into),
            _ => fills.loose(table, into, *mediation, &config.layout, world),
        };
        // Nothing is known of when its entries were granted.
        let mut change = Change::new(&config.layout, &source, 0, &mut walked);
        index.add_root(root, &mut change);
        // Before the first root no CPU has walked anything.
        if !first {
            self.judge_links(None, &walked, self.last_seq);
            self.judge_table_page(root.frame(), self.last_seq);
        }
        self.judge_walked(&walked, None, self.last_seq);
        self.tell(&Moment::Root(root), world);
        Ok(())
    }

    /// Takes a root off the register.
    ///
    /// # Errors
    /// [`Status::BadRoot`] if it is not registered, [`Status::BadState`] while a CPU may still use
    /// it.
    pub fn unregister_root(&mut self, root: Gpa) -> Result<(), Status> {
        if !self.is_registered(root) {
            return Err(Status::BadRoot);
        }
        if self.tlb.may_cache(root) != 0 {
            return Err(Status::BadState);
        }
        // Its global translations outlive root loads: from here on they are owed.
        let globals = self.index.in_span(root, EVERYTHING).filter(|mapping| mapping.global);
        let globals: Vec<Leaves> = globals.map(|mapping| mapping.leaves()).collect();
        globals.iter().for_each(|leaves| self.oblige(leaves, self.last_seq));
        self.roots.retain(|(registered, _)| *registered != root);
        self.index.remove_root(root, &self.config.layout);
        self.keep_dropped();
        Ok(())
    }

    /// A CPU other than 0 is about to execute its first instruction: from here on it may cache what
    /// its root maps. Of one that does not run nothing is expected, and events or operations that
    /// name it make no sense.
    pub fn start_cpu(&mut self, cpu: u8) {
        self.tlb.start(cpu);
    }

    /// A CPU was reset: it caches nothing any more, and runs again only after
    /// [`Self::start_cpu`].
    pub fn stop_cpu(&mut self, cpu: u8) {
        self.tlb.stop(cpu, start_of(&self.config));
    }

    /// Numbers of the CPUs that run.
    pub fn running(&self) -> impl Iterator<Item = u8> + use<> {
        tlb::members(self.tlb.running())
    }

    /// Notes the descriptor tables that a CPU registered: from now on they must not change.
    pub fn register_cpu(&mut self, cpu: u8, registration: CpuRegistration) {
        if self.tlb.is_running(cpu)
            && let Some(known) = self.registrations.get_mut(usize::from(cpu))
        {
            *known = Some(registration);
        }
    }

    /// Takes one record; records come in the order of their numbers. Host records change nothing:
    /// what they say was told by [`Self::arrival`] and [`Self::done`].
    pub fn event(&mut self, record: &Record, world: &impl World) {
        let Record { seq, cpu, ref event, .. } = *record;
        if seq <= self.last_seq {
            let reason = format!("event {seq} came after event {}", self.last_seq);
            self.ledger.inconclusive(reason);
        }
        self.last_seq = self.last_seq.max(seq);
        let is_reported = self.mediation.sees(event);
        if !is_reported && !matches!(event, Event::Host(..) | Event::Seen(_)) {
            self.history.push(record);
        }
        if !self.tlb.is_running(cpu) {
            self.ledger.inconclusive(format!("event {seq} names CPU {cpu}, which does not run"));
            return;
        }
        let kept = self.tlb.went_on(cpu, seq);
        self.note_dropped(kept);
        match event {
            _ if is_reported => self.reported(record),
            Event::Seen(sighting) => self.sighted(record, sighting, world),
            _ => self.judge_event(cpu, event, seq, world),
        }
        self.tell(&Moment::Record(record), world);
    }

    /// Judges what a CPU did, whoever says so.
    fn judge_event(&mut self, cpu: u8, event: &Event, seq: u64, world: &impl World) {
        match *event {
            Event::EntryWrite(ref write) => self.entry_write(cpu, write, seq, world),
            Event::TableFill(ref fill) => self.table_fill(cpu, fill, seq),
            Event::Flush(ref flush) => {
                let kept = self.tlb.flush(cpu, flush, seq);
                self.note_dropped(kept);
            }
            Event::Control { register, old, new } => {
                let kept = self.tlb.control(cpu, register, (old, new), seq);
                self.note_dropped(kept);
            }
            Event::RootLoad { root, pcid, no_flush } => {
                self.root_load(cpu, (root, pcid), no_flush, seq);
            }
            Event::Life(life, frames) => self.life(cpu, life, frames, seq),
            Event::Observed(observation) => self.observed(cpu, &observation, seq),
            Event::ShootdownAck(_) | Event::Host(..) | Event::Seen(_) => {}
        }
    }

    /// Bytes of a secret input were found where they must not be: in `frame`, or in no frame at
    /// all. Leaks of the same frame at the same `place` are one violation; the caller numbers the
    /// places.
    pub fn report_leak(&mut self, place: u64, frame: Option<Gfn>, detail: String, seq: u64) {
        let finding = Finding::new(Rule::InputLeak, seq, detail);
        self.ledger.violation_about(place, Finding { frame, ..finding });
        self.tell_all(&Moment::Search, &|_| None);
    }

    /// Counts frames that were searched for bytes of a secret input, and frames that could not be.
    pub fn count_leak_search(&mut self, checked: u64, not_checked: u64) {
        self.ledger.checked(Rule::InputLeak, checked);
        self.ledger.not_checked(Rule::InputLeak, not_checked);
    }

    /// Notes why the run cannot be called passed. A reason is kept once, and only so many are.
    pub fn inconclusive(&mut self, reason: String) {
        self.ledger.inconclusive(reason);
    }

    /// The host's own state of every frame.
    #[must_use]
    pub const fn frames(&self) -> &Frames {
        &self.frames
    }

    /// Everything found so far.
    #[must_use]
    pub fn result(&self) -> AuditResult {
        self.ledger.result()
    }

    fn root_load(&mut self, cpu: u8, (root, pcid): (Gpa, u16), no_flush: bool, seq: u64) {
        self.ledger.checked(Rule::ControlState, 1);
        if !self.roots.contains(&(root, pcid)) {
            let detail = format!("loaded a root that is not registered with PCID {pcid}");
            let finding = Finding::new(Rule::ControlState, seq, detail);
            self.ledger.violation(Finding { cpu: Some(cpu), root: Some(root), ..finding });
            return;
        }
        let kept = self.tlb.load(cpu, (root, pcid), no_flush, seq);
        self.note_dropped(kept);
    }

    /// Whether no more work for tables that are linked, or linked at many places, is done before the
    /// next quiesce point. Then the run must not pass.
    fn is_link_work_used_up(&mut self) -> bool {
        let used_up = self.link_work >= MAX_LINK_WORK;
        if used_up {
            let reason = "too many tables are linked between two quiesce points".to_owned();
            self.ledger.inconclusive(reason);
        }
        used_up
    }

    /// Whether the host itself writes to the tables.
    pub(crate) const fn is_direct(&self) -> bool {
        matches!(self.mediation, Mediation::Tables)
    }

    fn is_registered(&self, root: Gpa) -> bool {
        self.roots.iter().any(|(registered, _)| *registered == root)
    }

    /// An obligation that is not kept can no longer be found broken: the run must not pass.
    #[inline]
    fn note_dropped(&mut self, kept: Result<(), TooMany>) {
        if kept.is_err() {
            self.note_too_many();
        }
    }

    #[cold]
    fn note_too_many(&mut self) {
        for rule in [Rule::StaleDirectMap, Rule::StaleWindow, Rule::StaleTable] {
            self.ledger.not_checked(rule, 1);
        }
        let reason =
            "more revoked translations or address spaces are open than are kept".to_owned();
        self.ledger.inconclusive(reason);
    }
}

/// How CPUs start.
const fn start_of(config: &AuditConfig) -> Start {
    let ControlPolicy { cr0_set, cr4_set, efer_set, .. } = config.control;
    Start { root: config.boot_root, cr0: cr0_set, cr4: cr4_set, efer: efer_set }
}
