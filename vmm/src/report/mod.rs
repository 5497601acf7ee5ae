//! The report of a run: plain data whose JSON form is a contract, and whose text form is for eyes.
#![forbid(unsafe_code)]

mod address;
mod judge;
pub(crate) mod layout;
mod observed;
mod story;
#[cfg(test)]
mod tests;
mod text;
mod verdict;

pub use address::Address;
pub use layout::{grouped, milliseconds};
pub use observed::Observed;
use text::{findings, verdict_reasons};
pub use verdict::Verdict;

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Version of the JSON form. Fields may be added without a new version; none is taken away.
pub const SCHEMA: u32 = 1;
/// [`GuestError::kind`] of an access to a sealed frame that the configuration does not expect.
pub const SEALED_ACCESS: &str = "sealed-access";

/// What a run did and what was found. All fields are always there: what is not known is `null`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The verdict; [`Report::judge`] sets it.
    pub verdict: Verdict,
    /// The configuration file.
    pub config: Option<String>,
    /// Faults that were planted.
    pub inject: Vec<String>,
    /// What ran the guest.
    pub machine: Machine,
    /// How secret frames were closed.
    pub second_stage: SecondStage,
    /// The guest.
    pub guest: Guest,
    /// The guest's and the host's counters, by name.
    pub counters: BTreeMap<String, u64>,
    /// Every rule, and how often it was judged.
    pub checks: Vec<Check>,
    /// What the program `probe` observed, case by case; empty for others.
    #[serde(default)]
    pub observed: Vec<Observed>,
    /// Accesses to sealed frames.
    pub sealed_accesses: Vec<SealedAccess>,
    /// Violations of rules. The list is bounded; the counts in `checks` are exact.
    pub violations: Vec<Violation>,
    /// Why the run cannot pass even without a violation.
    pub inconclusive: Vec<String>,
    /// How the guest failed.
    pub guest_error: Option<GuestError>,
    /// What a reader should know, as sentences.
    pub warnings: Vec<String>,
    /// Where the time went.
    pub timing: Timing,
}

/// What ran the guest.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Machine {
    /// `kvm` or `sim`.
    pub kind: String,
    /// `EPT`, `NPT`, `shadow` or `unknown`; `software` on a simulated machine.
    pub translation: String,
    /// Where that is written; empty where nothing says so.
    #[serde(default)]
    pub evidence: String,
    /// How the host learnt of table writes.
    pub mediation: String,
    /// Release of the host's kernel.
    pub kernel: String,
    /// The host's processor.
    pub cpu: String,
    /// How CPUs invalidate translations, as the audit took it: `amd`, `intel` or
    /// `intel-invlpg-erratum`.
    pub profile: String,
    /// What a simulated machine adds; `null` for others.
    pub simulation: Option<Simulation>,
    /// What was stepped; `null` where nothing was.
    #[serde(default)]
    pub stepping: Option<Stepping>,
}

/// How far vCPUs were stepped.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Stepping {
    /// Instructions, on all vCPUs.
    pub instructions: u64,
    /// Time that they took, in microseconds.
    pub us: u64,
    /// First event from which vCPUs were stepped; `null` if they never were.
    pub from: Option<u64>,
    /// Last event up to which they were; `null` if that is the last of the run.
    pub to: Option<u64>,
    /// Accesses through windows that were seen; those of a vCPU to one page, one behind the other, are
    /// one.
    #[serde(default)]
    pub window_accesses: u64,
}

impl Stepping {
    /// Instructions in a second, if there were any.
    #[must_use]
    pub const fn per_second(&self) -> Option<u64> {
        self.instructions.saturating_mul(1_000_000).checked_div(self.us)
    }
}

/// A simulated machine, and what only it can tell of a run.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Simulation {
    /// What everything that is left to chance follows from.
    pub seed: u64,
    /// `seeded`: the same seed repeats the run; `threads`: nothing does.
    pub schedule: String,
    /// How often another CPU took over.
    pub switches: u64,
    /// Walks of the tables by its MMUs.
    pub walks: u64,
    /// Accesses that its CPUs made on their own account, as speculation does.
    pub speculations: u64,
    /// Accesses through a cached translation that the tables did not give any more.
    pub stale_uses: u64,
    /// Those of them that reached a secret frame and must not happen: through the direct map, or
    /// not speculative.
    pub stale_secret_uses: u64,
}

/// How secret frames were closed.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct SecondStage {
    /// `memslot`, `guard` or `off`.
    pub backend: String,
    /// Bytes that can be closed on their own; 0 if nothing is closed.
    pub granule: u64,
    /// How the back end works, in a few words.
    pub detail: String,
    /// Frames that were touched on purpose, to see whether that is so.
    #[serde(default)]
    pub probes: Probes,
}

/// Touches of frames, made by a CPU that is not the guest's.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Probes {
    /// Which frames are touched, where and how follows from it.
    pub seed: u64,
    /// Touches at each complete check.
    pub each: u64,
    /// Touches that the second stage stopped.
    pub trapped: u64,
    /// Touches that were carried out.
    pub went_through: u64,
    /// Touches from which nothing follows; the run is inconclusive.
    pub failed: u64,
    /// Touches left out because the frame was held open by its granule.
    pub held_open: u64,
    /// Touches left out because the seal is off.
    pub seal_off: u64,
    /// Complete checks without any touch.
    pub without: u64,
    /// Why there were such checks.
    pub why: Option<String>,
}

/// The guest.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Guest {
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Memory of the allocator in MiB.
    pub memory_mib: u64,
    /// The program that ran.
    pub program: String,
    /// Microseconds from the first instruction to "allocator ready".
    pub boot_us: Option<u64>,
    /// Microseconds that the program ran.
    pub work_us: Option<u64>,
    /// Units of work done: trace events for `replay`, pages for `secrets`.
    pub work: u64,
    /// Microseconds for one unit of work.
    pub us_per_event: Option<f64>,
}

/// How often a rule was judged.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Check {
    /// The rule.
    pub rule: String,
    /// Judgements made.
    pub checked: u64,
    /// Judgements that were due but could not be made.
    pub not_checked: u64,
    /// Violations found.
    pub violations: u64,
}

/// An access to a sealed frame.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SealedAccess {
    /// Guest-physical address, as far as it is known.
    pub gpa: Option<Address>,
    /// `read`, `write`, `fetch`, `page-walk`, `event-delivery` or `unknown`.
    pub kind: String,
    /// The vCPU.
    pub vcpu: u8,
    /// Address of the instruction.
    pub rip: Option<Address>,
    /// Virtual address that was accessed.
    pub va: Option<Address>,
    /// The function that did it, and how far in.
    pub symbol: Option<String>,
    /// Whether the configuration expects it; [`Report::judge`] sets it.
    pub expected: bool,
}

/// A violation of a rule.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Violation {
    /// The rule.
    pub rule: String,
    /// The frame's address.
    pub frame: Option<Address>,
    /// The virtual address.
    pub va: Option<Address>,
    /// The vCPU.
    pub vcpu: Option<u8>,
    /// The root of the address space.
    pub root: Option<Address>,
    /// Number of the event at which it was found.
    pub seq: u64,
    /// What is wrong, and what would have been right.
    pub detail: String,
    /// How it came to that, in order.
    #[serde(default)]
    pub story: Vec<StoryStep>,
    /// Whether the configuration expects it; [`Report::judge`] sets it.
    pub expected: bool,
}

/// One step of the story of a violation.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct StoryStep {
    /// Number of the event; `null` for what has none.
    pub seq: Option<u64>,
    /// The CPU.
    pub cpu: Option<u8>,
    /// `made`, `revoked`, `flush`, `mattered`, `right` and others
    /// ([`What`](crate::audit::What)).
    pub what: String,
    /// The guest's function that recorded it, as far as it is known.
    pub function: Option<String>,
    /// What happened.
    pub text: String,
}

/// How the guest failed.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct GuestError {
    /// `panic`, `exception`, `triple-fault`, `timeout`, [`SEALED_ACCESS`] and the like.
    pub kind: String,
    /// What happened, in a sentence.
    pub message: String,
    /// The vCPU.
    pub vcpu: Option<u8>,
    /// Address of the instruction.
    pub rip: Option<Address>,
    /// The function, and how far in.
    pub symbol: Option<String>,
    /// The calls that led there, innermost first.
    pub backtrace: Vec<Frame>,
}

/// One call of a backtrace.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Frame {
    /// Where it returns to.
    pub rip: Address,
    /// The function, and how far in.
    pub symbol: Option<String>,
}

/// Where the time went, in microseconds of the host's clock.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Timing {
    /// From the start to the guest's first instruction.
    pub setup_us: u64,
    /// In which the guest ran.
    pub guest_us: u64,
    /// In which the host carried out gate calls.
    pub gate_us: u64,
    /// In which the host checked.
    pub audit_us: u64,
    /// From the start to this report.
    pub total_us: u64,
}

impl Report {
    /// A report on nothing: no guest has run, nothing has been checked.
    #[must_use]
    pub fn new() -> Self {
        Self {
            schema: SCHEMA,
            verdict: Verdict::Inconclusive,
            config: None,
            inject: Vec::new(),
            machine: Machine::default(),
            second_stage: SecondStage::default(),
            guest: Guest::default(),
            counters: BTreeMap::new(),
            checks: Vec::new(),
            observed: Vec::new(),
            sealed_accesses: Vec::new(),
            violations: Vec::new(),
            inconclusive: Vec::new(),
            guest_error: None,
            warnings: Vec::new(),
            timing: Timing::default(),
        }
    }

    /// The JSON form, with a line end.
    ///
    /// # Errors
    /// What serde says; a report holds nothing that JSON cannot express.
    pub fn to_json(&self) -> Result<String, serde_json::Error> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }

    /// The text form: at most 100 columns, without control characters whatever the guest said.
    #[must_use]
    pub fn to_text(&self) -> String {
        text::render(self)
    }

    /// What the program `probe` observed, as a table, with what there is to say about it.
    #[must_use]
    pub fn to_probe_text(&self) -> String {
        observed::render(self)
    }
}

impl Default for Report {
    fn default() -> Self {
        Self::new()
    }
}

impl Guest {
    /// Sets the work done and the time it took, and what follows from them.
    pub fn set_work(&mut self, work: u64, work_us: u64) {
        self.work = work;
        self.work_us = Some(work_us);
        // Hundredths of a microsecond, counted in whole numbers so that nothing is rounded twice.
        let hundredths = u128::from(work_us) * 100 / u128::from(work.max(1));
        let hundredths = u32::try_from(hundredths).unwrap_or(u32::MAX);
        self.us_per_event = (work > 0).then(|| f64::from(hundredths) / 100.0);
    }
}
