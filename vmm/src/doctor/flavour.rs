//! Which KVM this is, and how it translates guest-physical addresses.

use super::host::Host;
use serde::{Deserialize, Serialize};

/// How KVM translates guest-physical addresses.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Translation {
    /// Intel's extended page tables.
    #[serde(rename = "EPT")]
    Ept,
    /// AMD's nested page tables.
    #[serde(rename = "NPT")]
    Npt,
    /// Shadow tables, made by KVM in software.
    #[serde(rename = "shadow")]
    Shadow,
    /// Not known.
    #[serde(rename = "unknown")]
    Unknown,
}

impl Translation {
    /// The name in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ept => "EPT",
            Self::Npt => "NPT",
            Self::Shadow => "shadow",
            Self::Unknown => "unknown",
        }
    }
}

/// Which KVM this is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Flavour {
    /// The module.
    pub module: Option<String>,
    /// How it translates.
    pub translation: Translation,
    /// Where that is written.
    pub evidence: String,
}

/// Modules with the parameter that switches the processor's nested tables on, and their name.
const NESTED: [(&str, &str, Translation); 2] =
    [("kvm_intel", "ept", Translation::Ept), ("kvm_amd", "npt", Translation::Npt)];

impl Flavour {
    /// Looks for KVM's modules and their parameters in `/sys/module`.
    #[must_use]
    pub fn detect(host: &dyn Host) -> Self {
        let known = |module: &str, translation, evidence| Self {
            module: Some(module.to_owned()),
            translation,
            evidence,
        };
        for (module, parameter, nested) in NESTED {
            if !host.exists(&format!("/sys/module/{module}")) {
                continue;
            }
            let path = format!("/sys/module/{module}/parameters/{parameter}");
            let Some(value) = host.read(&path) else {
                return known(module, Translation::Unknown, format!("{path} cannot be read"));
            };
            let on = matches!(value.trim(), "Y" | "1");
            let translation = if on { nested } else { Translation::Shadow };
            return known(module, translation, format!("{path} is {}", value.trim()));
        }
        if host.exists("/sys/module/kvm_pvm") {
            let evidence = "/sys/module/kvm_pvm exists".to_owned();
            return known("kvm_pvm", Translation::Shadow, evidence);
        }
        let evidence = "/sys/module has none of kvm_intel, kvm_amd, kvm_pvm".to_owned();
        Self { module: None, translation: Translation::Unknown, evidence }
    }
}
