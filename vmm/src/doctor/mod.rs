//! What this host can do, and what is missing for what.
#![forbid(unsafe_code)]

mod error;
mod flavour;
mod host;
mod kvm;
#[cfg(test)]
mod tests;
mod text;

pub use error::HostError;
pub use flavour::{Flavour, Translation};
pub use host::{Host, ThisHost};
pub use kvm::{CAPABILITIES, Capability, DEVICE, KvmFacts, open_kvm, require, require_steps};

use crate::audit::Profile;
use serde::{Serialize, Serializer};

/// Version of the JSON form.
pub const SCHEMA: u32 = 1;
/// First Linux, as major and minor number, whose `MADV_GUARD_INSTALL` takes shared mappings.
const GUARD_RELEASE: (u32, u32) = (6, 15);
/// Below this many mappings, `mprotect` as a seal soon falls back to whole blocks.
const FEW_MAPPINGS: u64 = 16 << 10;
/// Below this much available memory in MiB, guests of the default size may fail.
const LITTLE_MEMORY_MIB: u64 = 256;

/// What was found on a host.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Doctor {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Whether `lacuna run` can work.
    pub can_run: bool,
    /// What is missing for it.
    pub problems: Vec<Problem>,
    /// What is worth knowing, as sentences.
    pub notes: Vec<String>,
    /// Which KVM this is.
    pub flavour: Flavour,
    /// Version of KVM's API; `None` if KVM cannot be used.
    pub api_version: Option<i32>,
    /// KVM's capabilities; empty if KVM cannot be used.
    pub capabilities: Vec<CapabilityState>,
    /// The host.
    pub host: HostFacts,
}

/// Something that is missing.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Problem {
    /// What.
    pub what: String,
    /// What to do.
    pub remedy: String,
}

/// A capability, and whether it is there.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct CapabilityState {
    /// Its name.
    pub name: &'static str,
    /// What KVM answers: a count or a mask for some, 0 if it is not there.
    pub value: i32,
    /// Smallest answer that is enough.
    pub minimum: i32,
    /// Whether it is there, and large enough.
    pub present: bool,
    /// Whether `lacuna run` needs it.
    pub required: bool,
    /// What needs it.
    pub needed_for: &'static str,
}

/// The host as far as `/proc` tells. What it does not tell is `None`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub struct HostFacts {
    /// Release of the kernel.
    pub kernel: Option<String>,
    /// Whether the kernel, going by its version, has guards for shared mappings.
    pub guards_by_version: Option<bool>,
    /// Vendor of the processor.
    pub cpu_vendor: Option<String>,
    /// Model of the processor.
    pub cpu_model: Option<String>,
    /// How the processor invalidates translations, as the audit takes it (`[audit] profile`).
    #[serde(serialize_with = "profile_name")]
    pub profile: Profile,
    /// Those of the processor's flags that concern virtualisation.
    pub cpu_flags: Vec<String>,
    /// Most mappings of one process.
    pub max_map_count: Option<u64>,
    /// Memory in MiB.
    pub memory_mib: Option<u64>,
    /// Memory in MiB that is available.
    pub available_mib: Option<u64>,
}

impl Doctor {
    /// Looks at a host. Nothing is changed; a virtual machine is made and dropped.
    #[must_use]
    pub fn inspect(host: &dyn Host) -> Self {
        let facts = HostFacts::read(host);
        let flavour = Flavour::detect(host);
        let mut doctor = Self {
            schema: SCHEMA,
            can_run: false,
            problems: Vec::new(),
            notes: notes(&facts, &flavour),
            flavour,
            api_version: None,
            capabilities: Vec::new(),
            host: facts,
        };
        match host.kvm() {
            Ok(kvm) => doctor.add_kvm(&kvm),
            Err(error) => doctor.problems.push(Problem::from(&error)),
        }
        doctor.can_run = doctor.problems.is_empty();
        doctor
    }

    fn add_kvm(&mut self, kvm: &KvmFacts) {
        self.api_version = Some(kvm.api_version);
        for (capability, value) in CAPABILITIES.iter().zip(&kvm.values) {
            let present = *value >= capability.minimum;
            if !present {
                let error = HostError::from(capability);
                if capability.required {
                    self.problems.push(Problem::from(&error));
                } else {
                    self.notes.push(error.to_string());
                }
            }
            self.capabilities.push(CapabilityState {
                name: capability.name,
                value: *value,
                minimum: capability.minimum,
                present,
                required: capability.required,
                needed_for: capability.needed_for,
            });
        }
    }

    /// The JSON form, with a line end.
    ///
    /// # Errors
    /// What serde says; there is nothing in it that JSON cannot express.
    pub fn to_json(&self) -> Result<String, serde_json::Error> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }

    /// The text form.
    #[must_use]
    pub fn to_text(&self) -> String {
        text::render(self)
    }
}

impl From<&HostError> for Problem {
    fn from(error: &HostError) -> Self {
        let text = error.to_string();
        let (what, remedy) = text.split_once("; ").unwrap_or((&text, ""));
        Self { what: what.to_owned(), remedy: remedy.to_owned() }
    }
}

impl HostFacts {
    /// Reads what `/proc` tells.
    #[must_use]
    pub fn read(host: &dyn Host) -> Self {
        let kernel = host.read("/proc/sys/kernel/osrelease").map(|text| text.trim().to_owned());
        let cpu = host.read("/proc/cpuinfo").unwrap_or_default();
        let memory = host.read("/proc/meminfo").unwrap_or_default();
        let mib = |name| Some(value(&memory, name)?.split(' ').next()?.parse::<u64>().ok()? / 1024);
        let flags = value(&cpu, "flags").unwrap_or_default();
        let of_interest =
            |flag: &&str| matches!(*flag, "vmx" | "svm" | "ept" | "npt" | "hypervisor");
        Self {
            guards_by_version: kernel.as_deref().and_then(release).map(|r| r >= GUARD_RELEASE),
            kernel,
            profile: profile(&cpu),
            cpu_vendor: value(&cpu, "vendor_id").map(str::to_owned),
            cpu_model: value(&cpu, "model name").map(str::to_owned),
            cpu_flags: flags.split(' ').filter(of_interest).map(str::to_owned).collect(),
            max_map_count: host
                .read("/proc/sys/vm/max_map_count")
                .and_then(|text| text.trim().parse().ok()),
            memory_mib: mib("MemTotal"),
            available_mib: mib("MemAvailable"),
        }
    }
}

/// The profile of the first processor of `/proc/cpuinfo`.
fn profile(cpu: &str) -> Profile {
    let number = |name| value(cpu, name).and_then(|number| number.parse().ok()).unwrap_or(0);
    let vendor = value(cpu, "vendor_id").unwrap_or_default();
    Profile::of(vendor, number("cpu family"), number("model"))
}

fn profile_name<S: Serializer>(profile: &Profile, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(profile.name())
}

fn notes(facts: &HostFacts, flavour: &Flavour) -> Vec<String> {
    let mut notes = Vec::new();
    if flavour.translation == Translation::Shadow {
        notes.push(
            "KVM translates with shadow tables: guests run, and much slower than with EPT or NPT"
                .to_owned(),
        );
    }
    if facts.guards_by_version == Some(false) {
        notes.push(
            "the kernel's version has no guards for shared mappings (Linux 6.15): the seal \
             \"guard\" closes pages with mprotect"
                .to_owned(),
        );
    }
    if let Some(count) = facts.max_map_count.filter(|count| *count < FEW_MAPPINGS) {
        notes.push(format!(
            "vm.max_map_count is {count}: a seal by mprotect soon closes whole blocks; raise it \
             with sudo sysctl vm.max_map_count=65530"
        ));
    }
    if let Some(mib) = facts.available_mib.filter(|mib| *mib < LITTLE_MEMORY_MIB) {
        notes.push(format!("only {mib} MiB of memory are available: use small guests"));
    }
    notes
}

/// The value of the first line `NAME: VALUE`, as in `/proc/cpuinfo` and `/proc/meminfo`.
fn value<'t>(text: &'t str, name: &str) -> Option<&'t str> {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.trim() == name)
        .map(|(_, value)| value.trim())
}

/// Major and minor number of a kernel release such as `6.18.44-generic`.
fn release(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split(|char: char| !char.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}
