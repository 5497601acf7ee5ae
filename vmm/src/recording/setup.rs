//! What a recording says once: at the start, how the audit was set up; at the end, what only the live
//! machine knew.

use crate::audit::{AuditConfig, ControlPolicy, Profile, Rule};
use crate::config::{self, Config, Expect, ProfileChoice};
use crate::report::Report;
use lacuna_abi::addr::Gpa;
use lacuna_abi::layout::{Layout, Needs};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Most findings that a recording may ask to be kept in words.
const MAX_FINDINGS: usize = 10_000;
/// Most sites whose functions are named.
pub(super) const MAX_SITES: usize = 4096;

/// Where a recording comes from: what is known before there is a machine.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Origin {
    /// Version of the program.
    pub version: String,
    /// The configuration as it was given.
    pub text: String,
    /// The configuration as it was understood, flags included.
    pub config: serde_json::Value,
    /// Rules that the run must exercise.
    pub require: Vec<String>,
    /// Rules whose violations are expected.
    pub expect: Vec<String>,
    /// Whether an access to a sealed frame is expected.
    pub expect_sealed_access: bool,
    /// The report as far as it is known: machine and guest.
    pub report: Report,
}

impl Origin {
    /// The origin of a run of `config`, whose file held `text`; `report` names machine and guest.
    #[must_use]
    pub fn new(config: &Config, text: String, report: Report) -> Self {
        let names = |rules: &[Rule]| rules.iter().map(|rule| rule.name().to_owned()).collect();
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            text,
            config: serde_json::to_value(config).unwrap_or_default(),
            require: names(&config.audit.require),
            expect: names(&config.audit.expect.rules),
            expect_sealed_access: config.audit.expect.sealed_access,
            report,
        }
    }

    /// What the verdict depends on.
    pub(super) fn expectations(&self) -> Result<config::Audit, String> {
        let rules = |names: &[String]| {
            let rule = |name: &String| {
                Rule::from_name(name).ok_or_else(|| format!("there is no rule {name:?}"))
            };
            names.iter().map(rule).collect::<Result<Vec<_>, _>>()
        };
        let expect =
            Expect { sealed_access: self.expect_sealed_access, rules: rules(&self.expect)? };
        let require = rules(&self.require)?;
        // How it was run does not matter any more.
        let profile = ProfileChoice::Auto;
        Ok(config::Audit { profile, quiesce_every: 0, probes: 0, require, expect })
    }
}

/// How the audit of a run was set up.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Setup {
    /// Where the recording comes from.
    pub origin: Origin,
    /// Bytes of the image.
    pub image: u64,
    /// Memory of the allocator in MiB.
    pub memory_mib: u64,
    /// Virtual CPUs.
    pub vcpus: usize,
    /// Bytes of input.
    pub input: u64,
    /// Bytes of workload memory.
    pub scratch: u64,
    /// Root that every CPU starts with.
    pub boot_root: u64,
    /// Whether a completed seal denies access.
    pub seal_closes: bool,
    /// Back end of the second stage.
    pub backend: String,
    /// Bytes that it can close on their own.
    pub granule: u64,
    /// How it works, in a few words.
    pub detail: String,
    /// Bits of CR0, CR4 and EFER that must be set, and that must be clear.
    pub control: [u64; 6],
    /// How the CPUs invalidate.
    pub profile: String,
    /// Most findings that are kept in words.
    pub max_findings: usize,
}

impl Setup {
    /// Of this audit, for this guest.
    #[must_use]
    pub fn new(origin: Origin, needs: &Needs, audit: &AuditConfig) -> Self {
        let control = &audit.control;
        Self {
            origin,
            image: needs.image,
            memory_mib: needs.memory_mib,
            vcpus: needs.cpus,
            input: needs.input,
            scratch: needs.scratch,
            boot_root: audit.boot_root.0,
            seal_closes: audit.seal_closes,
            backend: String::new(),
            granule: 0,
            detail: String::new(),
            control: [
                control.cr0_set,
                control.cr0_clear,
                control.cr4_set,
                control.cr4_clear,
                control.efer_set,
                control.efer_clear,
            ],
            profile: audit.profile.name().to_owned(),
            max_findings: audit.max_findings,
        }
    }

    /// Of a guest of 16 MiB with two CPUs, for fuzzers.
    pub(super) fn small() -> Self {
        let origin = Origin {
            version: String::new(),
            text: String::new(),
            config: serde_json::Value::Null,
            require: Vec::new(),
            expect: Vec::new(),
            expect_sealed_access: false,
            report: Report::new(),
        };
        let needs = Needs { image: 4096, memory_mib: 16, cpus: 2, input: 0, scratch: 0 };
        let pool = Layout::new(&needs).map_or(Gpa(0), |layout| layout.pool.gpa);
        Self {
            origin,
            image: needs.image,
            memory_mib: needs.memory_mib,
            vcpus: needs.cpus,
            input: needs.input,
            scratch: needs.scratch,
            boot_root: pool.0,
            seal_closes: true,
            backend: String::new(),
            granule: 4096,
            detail: String::new(),
            control: [0; 6],
            profile: Profile::Amd.name().to_owned(),
            max_findings: 100,
        }
    }

    /// The audit's own configuration again.
    pub(super) fn audit(&self) -> Result<AuditConfig, String> {
        let needs = Needs {
            image: self.image,
            memory_mib: self.memory_mib,
            cpus: self.vcpus,
            input: self.input,
            scratch: self.scratch,
        };
        let layout = Layout::new(&needs);
        let layout = layout.map_err(|error| format!("no guest has this layout: {error:?}"))?;
        let profile = Profile::from_name(&self.profile);
        let profile = profile.ok_or_else(|| format!("there is no profile {:?}", self.profile))?;
        if self.max_findings > MAX_FINDINGS {
            return Err(format!("{} findings would be kept in words", self.max_findings));
        }
        let [cr0_set, cr0_clear, cr4_set, cr4_clear, efer_set, efer_clear] = self.control;
        Ok(AuditConfig {
            layout,
            boot_root: Gpa(self.boot_root),
            seal_closes: self.seal_closes,
            control: ControlPolicy { cr0_set, cr0_clear, cr4_set, cr4_clear, efer_set, efer_clear },
            profile,
            max_findings: self.max_findings,
        })
    }
}

/// What only the live machine knew, and what its end came to.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(super) struct End {
    /// The report without what the audit says.
    pub(super) report: Report,
    /// Functions by name, with the sites that lie in them.
    pub(super) functions: BTreeMap<String, Vec<u32>>,
    /// Why the tape ends before the run did.
    pub(super) cut: Option<String>,
}
