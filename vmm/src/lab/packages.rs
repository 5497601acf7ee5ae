//! Which packages a lab is made of, and what apt says of them: pure functions of its output.

use std::fmt;
use std::str::FromStr;

/// Packages that are had, checked and kept together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Set {
    /// QEMU, for NPT.
    Qemu,
    /// Bochs, and what makes a disc that it starts from, for EPT.
    Bochs,
    /// The release's kernel.
    Kernel,
    /// A newer kernel.
    KernelBackports,
    /// The programs of the emulated machine.
    Busybox,
}

impl Set {
    /// All sets.
    pub const ALL: [Self; 5] =
        [Self::Qemu, Self::Bochs, Self::Kernel, Self::KernelBackports, Self::Busybox];

    /// The name of its folder.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
            Self::Bochs => "bochs",
            Self::Kernel => "kernel",
            Self::KernelBackports => "kernel-backports",
            Self::Busybox => "busybox",
        }
    }

    /// What it is, in a few words.
    #[must_use]
    pub const fn what(self) -> &'static str {
        match self {
            Self::Qemu => "QEMU, which emulates NPT",
            Self::Bochs => "Bochs, which emulates EPT",
            Self::Kernel => "the lab's kernel",
            Self::KernelBackports => "a newer kernel for the lab",
            Self::Busybox => "busybox for the lab",
        }
    }

    /// Whether a file of the set is kept when it is unpacked. A path is relative to the root.
    #[must_use]
    pub fn keeps(self, path: &str) -> bool {
        let documentation = ["usr/share/doc/", "usr/share/man/", "usr/share/locale/"];
        match self {
            // Of thousands of modules, three.
            Self::Kernel | Self::KernelBackports => {
                path.starts_with("boot/vmlinuz-") || MODULES.iter().any(|m| module(path) == Some(m))
            }
            _ => !documentation.iter().any(|folder| path.starts_with(folder)),
        }
    }
}

/// The kernel's modules that a lab loads, in this order; of the last two, its own.
pub const MODULES: [&str; 4] = ["irqbypass", "kvm", "kvm-amd", "kvm-intel"];

/// The module that a file is, compressed or not.
#[must_use]
pub fn module(path: &str) -> Option<&str> {
    let name = path.rsplit('/').next().unwrap_or(path);
    let (module, rest) = name.split_once(".ko")?;
    matches!(rest, "" | ".xz" | ".zst" | ".gz").then_some(module)
}

/// The oldest QEMU that a lab works with. Older ones were not tried.
pub const QEMU: Version = Version(10, 0);

/// Major and minor number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Version(pub u32, pub u32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

impl FromStr for Version {
    type Err = ();

    /// Of a package, such as `1:10.0.2+ds-2`: without the epoch.
    fn from_str(text: &str) -> Result<Self, ()> {
        let text = text.split_once(':').map_or(text, |(_, version)| version);
        // Without what the distribution adds.
        let upstream = text.split(['+', '-', '~', ' ']).next().unwrap_or(text);
        let mut numbers = upstream.split('.').map(|number| number.parse().ok());
        Ok(Self(numbers.next().flatten().ok_or(())?, numbers.next().flatten().unwrap_or(0)))
    }
}

/// The version in the first line of `qemu-system-x86_64 --version`.
#[must_use]
pub fn qemu_version(output: &str) -> Option<Version> {
    output.lines().next()?.split_once("version ")?.1.parse().ok()
}

/// The candidate in the output of `apt-cache policy PACKAGE`.
#[must_use]
pub fn candidate(policy: &str) -> Option<&str> {
    let line = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate:"))?.trim();
    (line != "(none)").then_some(line)
}

/// The kernel's package on which a package that only names the current one depends: exact versions
/// come and go. `shown` is the output of `apt-cache show` for one version.
#[must_use]
pub fn kernel(shown: &str) -> Option<&str> {
    let depends = shown.lines().find_map(|line| line.strip_prefix("Depends:"))?;
    let names = depends.split([',', '|']).map(|one| one.split('(').next().unwrap_or(one).trim());
    names.into_iter().find(|name| name.starts_with("linux-image-"))
}

/// A file that is to be downloaded.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Download {
    /// Its name in apt's folder of archives.
    pub file: String,
    /// Its size in bytes.
    pub size: u64,
    /// Its SHA-256 as the signed index of the archive has it.
    pub sha256: String,
}

/// Reads what `apt-get --print-uris` with `Acquire::ForceHash=SHA256` prints: a line for each file,
/// among others.
///
/// # Errors
/// The line that has no SHA-256, or cannot be read.
pub fn downloads(printed: &str) -> Result<Vec<Download>, String> {
    let lines = printed.lines().filter(|line| line.starts_with('\''));
    lines.map(|line| download(line).ok_or_else(|| line.to_owned())).collect()
}

fn download(line: &str) -> Option<Download> {
    let (_uri, rest) = line.strip_prefix('\'')?.split_once("' ")?;
    let mut words = rest.split(' ');
    let (file, size, hash) = (words.next()?, words.next()?, words.next()?);
    let sha256 = hash.strip_prefix("SHA256:")?;
    let plain = !file.is_empty() && !file.starts_with('.') && !file.contains('/');
    let whole = sha256.len() == 64 && sha256.bytes().all(|byte| byte.is_ascii_hexdigit());
    (plain && whole).then_some(())?;
    Some(Download { file: file.into(), size: size.parse().ok()?, sha256: sha256.to_lowercase() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HASH: &str = "4a6b1856c8b0d7df4ff8e70249e12c473ccf8d516aadb4ae14d3d938faed0c65";

    #[test]
    fn versions_are_read_and_compared() {
        for (text, version) in [
            ("1:10.0.2+ds-2+deb13u1~bpo12+1", Version(10, 0)),
            ("1:7.2+dfsg-7+deb12u18+b3", Version(7, 2)),
            ("11-1", Version(11, 0)),
        ] {
            assert_eq!(text.parse(), Ok(version), "{text}");
        }
        assert_eq!(Version::from_str("x"), Err(()));
        assert!(Version(7, 2) < QEMU && QEMU < Version(10, 1));
        let printed = "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright";
        assert_eq!(qemu_version(printed), Some(Version(10, 0)));
        assert_eq!(qemu_version("sh: not found"), None);
    }

    #[test]
    fn a_candidate_is_found_and_none_is_none() {
        let policy =
            "qemu-system-x86:\n  Installed: (none)\n  Candidate: 1:7.2+dfsg-7\n  Version table:\n";
        assert_eq!(candidate(policy), Some("1:7.2+dfsg-7"));
        assert_eq!(candidate("x:\n  Installed: (none)\n  Candidate: (none)\n"), None);
        assert_eq!(candidate(""), None);
    }

    #[test]
    fn the_current_kernel_is_what_the_package_that_names_it_depends_on() {
        let shown = "Package: linux-image-cloud-amd64\nVersion: 6.12.95-1~bpo12+1\n\
                     Depends: linux-image-6.12.95+deb12-cloud-amd64 (= 6.12.95-1~bpo12+1)\n";
        assert_eq!(kernel(shown), Some("linux-image-6.12.95+deb12-cloud-amd64"));
        assert_eq!(kernel("Package: x\nDepends: libc6 (>= 2.34)\n"), None);
        assert_eq!(kernel("Package: x\n"), None);
    }

    #[test]
    fn files_to_download_are_read_with_their_hashes() {
        let printed = format!(
            "Reading package lists...\n'http://a.example/pool/q_1%2b1_amd64.deb' q_1%3a1_amd64.deb \
             10176912 SHA256:{HASH}\n"
        );
        let file = "q_1%3a1_amd64.deb".to_owned();
        let download = Download { file, size: 10_176_912, sha256: HASH.into() };
        assert_eq!(downloads(&printed), Ok(vec![download]));
        assert_eq!(downloads("nothing to do\n"), Ok(vec![]));
    }

    #[test]
    fn a_file_without_a_sound_hash_or_name_is_refused() {
        for line in [
            "'http://a.example/q.deb' q.deb 5 ".to_owned(),
            "'http://a.example/q.deb' q.deb 5 MD5Sum:0a0dd8eab7a744fd3ad763dc8fcb49d0".to_owned(),
            "'http://a.example/q.deb' q.deb 5 SHA256:00".to_owned(),
            format!("'http://a.example/q.deb' q.deb many SHA256:{HASH}"),
            format!("'http://a.example/q.deb' ../q.deb 5 SHA256:{HASH}"),
            "'http://a.example/q.deb".to_owned(),
        ] {
            assert_eq!(downloads(&line), Err(line.clone()));
        }
    }

    #[test]
    fn of_a_kernel_only_image_and_modules_are_kept() {
        let folder = "lib/modules/6.1.0-50-cloud-amd64/kernel";
        for (path, kept) in [
            ("boot/vmlinuz-6.1.0-50-cloud-amd64".to_owned(), true),
            ("boot/config-6.1.0-50-cloud-amd64".to_owned(), false),
            (format!("{folder}/virt/lib/irqbypass.ko"), true),
            (format!("{folder}/arch/x86/kvm/kvm.ko.xz"), true),
            (format!("{folder}/arch/x86/kvm/kvm-amd.ko.zst"), true),
            (format!("{folder}/arch/x86/kvm/kvm-xen.ko"), false),
            (format!("{folder}/arch/x86/kvm/kvm.kobj"), false),
        ] {
            assert_eq!(Set::Kernel.keeps(&path), kept, "{path}");
        }
        assert!(Set::Qemu.keeps("usr/bin/qemu-system-x86_64"));
        assert!(!Set::Qemu.keeps("usr/share/doc/qemu/copyright"));
    }
}
