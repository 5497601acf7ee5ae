//! What the doctor looks at: this host, or a made-up one in tests.

use super::error::HostError;
use super::kvm::{self, KvmFacts};
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

/// Most bytes that are read of one file.
const MAX_BYTES: u64 = 1 << 20;

/// A host.
pub trait Host {
    /// The contents of a file, as text; `None` if it cannot be read.
    fn read(&self, path: &str) -> Option<String>;

    /// Whether a file or directory is there.
    fn exists(&self, path: &str) -> bool;

    /// What KVM answers.
    ///
    /// # Errors
    /// [`HostError`] if KVM cannot be used.
    fn kvm(&self) -> Result<KvmFacts, HostError>;
}

/// The host that this process runs on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ThisHost;

impl Host for ThisHost {
    fn read(&self, path: &str) -> Option<String> {
        let mut bytes = Vec::new();
        File::open(path).ok()?.take(MAX_BYTES).read_to_end(&mut bytes).ok()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn exists(&self, path: &str) -> bool {
        fs::exists(path).unwrap_or(false)
    }

    fn kvm(&self) -> Result<KvmFacts, HostError> {
        kvm::facts(&kvm::open_at(Path::new(kvm::DEVICE))?)
    }
}
