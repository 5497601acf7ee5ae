//! Why this host cannot do what was asked: exit status 3.

use super::kvm::Capability;
use std::io;
use std::path::{Path, PathBuf};

/// Something that the host lacks. The message says what, and behind a semicolon the remedy.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The device is not there.
    #[error(
        "{0} does not exist; load KVM with sudo modprobe kvm_intel (or kvm_amd), and enable VT-x \
         or SVM in the firmware; inside a virtual machine enable nested virtualisation, inside a \
         container pass the device in"
    )]
    NoDevice(PathBuf),
    /// The device may not be opened.
    #[error("{0} may not be opened by this user; run sudo usermod -aG kvm $USER and log in again")]
    NoPermission(PathBuf),
    /// The device is there, KVM is not.
    #[error(
        "{0} has no KVM behind it ({1}); load it with sudo modprobe kvm_intel (or kvm_amd), and \
         enable VT-x or SVM in the firmware; inside a virtual machine enable nested virtualisation"
    )]
    NoHardware(PathBuf, io::Error),
    /// Another hypervisor has the processor.
    #[error("{0} is busy ({1}); stop the other hypervisor, such as VirtualBox or Xen")]
    Busy(PathBuf, io::Error),
    /// The device cannot be opened for another reason.
    #[error("{0} cannot be opened ({1}); check that it is KVM's character device, 10:232")]
    Open(PathBuf, io::Error),
    /// It is something else than KVM, or KVM as it was long ago.
    #[error(
        "{path} speaks version {found} of KVM's API, not 12; check that it is KVM's character \
         device, 10:232"
    )]
    ApiVersion {
        /// The device.
        path: PathBuf,
        /// The version that it speaks; negative if it does not know the question.
        found: i32,
    },
    /// KVM makes no virtual machine.
    #[error(
        "KVM cannot create a virtual machine ({0}); stop other hypervisors, free memory, and see \
         dmesg"
    )]
    CreateVm(io::Error),
    /// A capability is missing.
    #[error("KVM has no {name}, needed for {needed_for}; {remedy}")]
    Missing {
        /// Its name.
        name: &'static str,
        /// What needs it.
        needed_for: &'static str,
        /// What to do.
        remedy: &'static str,
    },
    /// Something else that was asked for is not possible here.
    #[error("{what}; {remedy}")]
    Cannot {
        /// What.
        what: String,
        /// What to do.
        remedy: String,
    },
}

impl HostError {
    /// Why `path`, KVM's device, could not be opened.
    #[must_use]
    pub fn opening(path: &Path, error: io::Error) -> Self {
        let path = path.to_owned();
        match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR) => Self::NoDevice(path),
            Some(libc::EACCES | libc::EPERM) => Self::NoPermission(path),
            Some(libc::ENODEV | libc::ENXIO) => Self::NoHardware(path, error),
            Some(libc::EBUSY) => Self::Busy(path, error),
            _ => Self::Open(path, error),
        }
    }
}

impl From<&Capability> for HostError {
    fn from(capability: &Capability) -> Self {
        let Capability { name, needed_for, remedy, .. } = *capability;
        Self::Missing { name, needed_for, remedy }
    }
}
