//! apt-get with sources, lists and archives of its own: it downloads and checks signatures, and never
//! installs or removes anything.

use super::LabError;
use super::online::{no_apt, online, succeeded};
use super::packages::{self, Download, QEMU, Set, Version};
use super::setup::Watcher;
use super::sources::{self, KEYRINGS, Release};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Folders in which the host's sources are named, and the file beside them.
const SOURCES: &str = "/etc/apt/sources.list";
const MORE_SOURCES: &str = "/etc/apt/sources.list.d";

/// apt with a folder of its own.
#[derive(Debug)]
pub struct Apt {
    folder: PathBuf,
    release: Release,
}

/// Packages to be had, by names that apt takes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Wanted {
    /// These, and what they depend on and this host lacks, from this suite before others.
    WithDependencies {
        /// Names.
        names: &'static [&'static str],
        /// The suite that goes before others.
        suite: Option<String>,
    },
    /// These files alone.
    Alone(Vec<String>),
}

impl Apt {
    /// Makes the folder, with this host's mirror of Debian, and has apt read the lists there.
    ///
    /// # Errors
    /// [`LabError`] if this is no Debian, names no mirror, or the mirror cannot be reached.
    pub fn open(folder: &Path, watcher: &mut dyn Watcher) -> Result<Self, LabError> {
        let release = release()?;
        let known = host_sources();
        let known = known.iter().map(|(name, text)| (name.as_str(), text.as_str()));
        let origins = sources::for_release(&release, &sources::origins(known));
        if origins.is_empty() {
            let codename = &release.codename;
            return Err(LabError::host(
                format!("no source of apt has the suite {codename} with the component main"),
                format!("name a mirror of Debian in {MORE_SOURCES}"),
            ));
        }
        let apt = Self { folder: folder.to_owned(), release };
        for part in ["sources", "lists/partial", "archives/partial"] {
            let path = folder.join(part);
            fs::create_dir_all(&path).map_err(LabError::file("make the folder", &path))?;
        }
        let keyring = KEYRINGS.into_iter().find(|path| Path::new(path).exists());
        apt.write("sources/lab.sources", &sources::to_deb822(&origins, keyring))?;
        apt.write("apt.conf", &configuration(folder))?;
        let mut update = apt.apt("apt-get");
        update.args(["-qq", "update"]);
        online(&mut update, watcher, &mut |_| {})?;
        Ok(apt)
    }

    /// How to have a set.
    ///
    /// # Errors
    /// [`LabError`] if the release has no such package, or only too old ones.
    pub fn wanted(&self, set: Set) -> Result<Wanted, LabError> {
        let backports = self.release.stable.then(|| sources::backports(&self.release.codename));
        Ok(match set {
            Set::Bochs => Wanted::WithDependencies {
                names: &["bochs", "bochs-term", "isolinux", "syslinux-common", "genisoimage"],
                suite: None,
            },
            Set::Busybox => Wanted::Alone(vec!["busybox-static".into()]),
            Set::Qemu => {
                let names = &["qemu-system-x86"];
                let new_enough = |suite: Option<&str>| {
                    let version = self.candidate(names[0], suite)?;
                    Ok::<_, LabError>(version.is_some_and(|version| version >= QEMU))
                };
                let suite = if new_enough(None)? { None } else { backports };
                if suite.is_some() && !new_enough(suite.as_deref())? {
                    return Err(self.too_old());
                }
                Wanted::WithDependencies { names, suite }
            }
            Set::Kernel => Wanted::Alone(vec![self.kernel(None)?]),
            Set::KernelBackports => {
                let Some(suite) = backports else {
                    let what = format!("there are no backports to {}", self.release.codename);
                    return Err(LabError::host(what, "leave --kernel out: its kernel is new"));
                };
                Wanted::Alone(vec![self.kernel(Some(&suite))?])
            }
        })
    }

    /// The files that have to be downloaded, with what the signed index says of them.
    ///
    /// # Errors
    /// [`LabError`] if apt does not know the packages, or has no SHA-256 of one.
    pub fn downloads(&self, wanted: &Wanted) -> Result<Vec<Download>, LabError> {
        let printed = self.output(self.getting(wanted).arg("--print-uris"))?;
        packages::downloads(&printed).map_err(|line| {
            LabError::Packages(format!("apt has no SHA-256 of a file, or a strange line: {line}"))
        })
    }

    /// Downloads them.
    ///
    /// # Errors
    /// [`LabError`] if they cannot be had, or what is there is not what the index says.
    pub fn download(
        &self,
        wanted: &Wanted,
        files: &[Download],
        watcher: &mut dyn Watcher,
    ) -> Result<(), LabError> {
        // A file that is there and is not what it should be would be taken as it is.
        for wrong in self.unsound(files)? {
            let path = self.archive(&wrong.file);
            fs::remove_file(&path).map_err(LabError::file("remove", &path))?;
        }
        online(self.getting(wanted).arg("-qq"), watcher, &mut |watcher| {
            watcher.at(self.there(files))
        })?;
        let missing = files.iter().find(|file| !self.archive(&file.file).is_file());
        if let Some(file) = missing.or(self.unsound(files)?.first().copied()) {
            let what = format!("{} is not what the signed index of the archive says", file.file);
            return Err(LabError::Packages(what));
        }
        watcher.at(self.there(files));
        Ok(())
    }

    /// Where apt puts a file.
    #[must_use]
    pub fn archive(&self, file: &str) -> PathBuf {
        self.folder.join("archives").join(file)
    }

    /// Those of these files that are there, and are not what they should be.
    fn unsound<'d>(&self, files: &'d [Download]) -> Result<Vec<&'d Download>, LabError> {
        let there = |file: &&Download| self.archive(&file.file).is_file();
        let there: Vec<_> = files.iter().filter(there).collect();
        let paths: Vec<_> = there.iter().map(|file| PathBuf::from(&file.file)).collect();
        let hashes = super::manifest::hashes(&self.folder.join("archives"), &paths)?;
        let unsound = |file: &&Download| hashes.get(&file.file) != Some(&file.sha256);
        Ok(there.into_iter().filter(unsound).collect())
    }

    /// Bytes of these files that are there, finished or not.
    fn there(&self, files: &[Download]) -> u64 {
        let len = |path: PathBuf| fs::metadata(path).map_or(0, |metadata| metadata.len());
        let there = |file: &Download| {
            len(self.archive(&file.file)).max(len(self.archive("partial").join(&file.file)))
        };
        files.iter().map(there).sum()
    }

    fn candidate(&self, name: &str, suite: Option<&str>) -> Result<Option<Version>, LabError> {
        let mut policy = self.apt("apt-cache");
        policy.args(suite.map(|suite| format!("--target-release={suite}")));
        let policy = self.output(policy.args(["policy", name]))?;
        Ok(packages::candidate(&policy).and_then(|version| version.parse().ok()))
    }

    /// The package of the current kernel.
    fn kernel(&self, suite: Option<&str>) -> Result<String, LabError> {
        const CURRENT: &str = "linux-image-cloud-amd64";
        let mut policy = self.apt("apt-cache");
        policy.args(suite.map(|suite| format!("--target-release={suite}")));
        let policy = self.output(policy.args(["policy", CURRENT]))?;
        let version = packages::candidate(&policy)
            .ok_or_else(|| LabError::Packages(format!("there is no package {CURRENT}")))?;
        let shown =
            self.output(self.apt("apt-cache").arg("show").arg(format!("{CURRENT}={version}")))?;
        let kernel = packages::kernel(&shown).map(str::to_owned);
        kernel.ok_or_else(|| LabError::Packages(format!("{CURRENT} {version} names no kernel")))
    }

    fn too_old(&self) -> LabError {
        LabError::host(
            format!(
                "{} has no QEMU from {QEMU} on, also not in its backports",
                self.release.codename
            ),
            "use Debian 12 or later, or install such a QEMU",
        )
    }

    fn getting(&self, wanted: &Wanted) -> Command {
        let mut command = self.apt("apt-get");
        match wanted {
            Wanted::WithDependencies { names, suite } => {
                command.args(suite.iter().map(|suite| format!("--target-release={suite}")));
                command.args(["--yes", "--download-only", "--no-install-recommends"]);
                command.args(["--no-remove", "install"]).args(*names)
            }
            Wanted::Alone(names) => command.arg("download").args(names),
        };
        command
    }

    fn apt(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.current_dir(self.folder.join("archives")).env("LC_ALL", "C");
        command.arg("--config-file").arg(self.folder.join("apt.conf"));
        command
    }

    fn output(&self, command: &mut Command) -> Result<String, LabError> {
        let output = command.stdin(Stdio::null()).output().map_err(no_apt)?;
        succeeded(&command.get_program().to_string_lossy(), &output)?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn write(&self, name: &str, text: &str) -> Result<(), LabError> {
        let path = self.folder.join(name);
        fs::write(&path, text).map_err(LabError::file("write", &path))
    }
}

/// The release of Debian that this is.
///
/// # Errors
/// [`LabError`] if it is something else, or no 64-bit x86.
pub fn release() -> Result<Release, LabError> {
    const REMEDY: &str = "use Debian 12 or later on a 64-bit x86 processor; a container is enough";
    if !cfg!(target_arch = "x86_64") {
        return Err(LabError::host("the labs' packages are those of amd64", REMEDY));
    }
    let text = fs::read_to_string("/etc/os-release").unwrap_or_default();
    Release::parse(&text).map_err(|name| {
        LabError::host(
            format!("the labs are made of Debian's packages, and this is {name}"),
            REMEDY,
        )
    })
}

/// The files in which the host names its sources, with their texts.
fn host_sources() -> Vec<(String, String)> {
    let mut paths = vec![PathBuf::from(SOURCES)];
    if let Ok(folder) = fs::read_dir(MORE_SOURCES) {
        let mut more: Vec<_> = folder.flatten().map(|entry| entry.path()).collect();
        more.sort();
        let is_one = |path: &PathBuf| {
            path.extension().is_some_and(|extension| extension == "list" || extension == "sources")
        };
        paths.extend(more.into_iter().filter(is_one));
    }
    let text = |path: PathBuf| {
        let text = fs::read_to_string(&path).ok()?;
        Some((path.to_string_lossy().into_owned(), text))
    };
    paths.into_iter().filter_map(text).collect()
}

/// apt's configuration on top of the host's: its proxies stay, its hooks and pins do not.
fn configuration(folder: &Path) -> String {
    let at = |part: &str| format!("\"{}\"", folder.join(part).display());
    let mut text = String::new();
    for hook in [
        "APT::Update::Pre-Invoke",
        "APT::Update::Post-Invoke",
        "APT::Update::Post-Invoke-Success",
        "DPkg::Pre-Invoke",
        "DPkg::Post-Invoke",
        "DPkg::Pre-Install-Pkgs",
        "DPkg::Post-Invoke-Success",
    ] {
        text += &format!("#clear {hook};\n");
    }
    for (name, value) in [
        ("Dir::Etc::sourcelist", "\"/dev/null\"".to_owned()),
        ("Dir::Etc::sourceparts", at("sources")),
        ("Dir::Etc::preferences", "\"/dev/null\"".to_owned()),
        ("Dir::Etc::preferencesparts", "\"/dev/null\"".to_owned()),
        ("Dir::State::lists", at("lists")),
        ("Dir::Cache::archives", at("archives")),
        ("Dir::Cache::pkgcache", "\"\"".to_owned()),
        ("Dir::Cache::srcpkgcache", "\"\"".to_owned()),
        ("Dir::Log", at("log")),
        // The folder belongs to who runs this; another user could not write there.
        ("APT::Sandbox::User", "\"root\"".to_owned()),
        // Nothing of dpkg's is touched, so nothing of it needs to be locked.
        ("Debug::NoLocking", "\"true\"".to_owned()),
        ("APT::Update::Error-Mode", "\"any\"".to_owned()),
        ("APT::Get::AllowUnauthenticated", "\"false\"".to_owned()),
        ("Acquire::AllowInsecureRepositories", "\"false\"".to_owned()),
        ("Acquire::AllowWeakRepositories", "\"false\"".to_owned()),
        ("Acquire::AllowDowngradeToInsecureRepositories", "\"false\"".to_owned()),
        ("Acquire::ForceHash", "\"SHA256\"".to_owned()),
        ("Acquire::Retries", "\"3\"".to_owned()),
        ("Acquire::http::Timeout", "\"30\"".to_owned()),
        ("Acquire::https::Timeout", "\"30\"".to_owned()),
        ("Acquire::Languages", "\"none\"".to_owned()),
        ("Acquire::IndexTargets::deb::DEP-11::DefaultEnabled", "\"false\"".to_owned()),
        ("Acquire::IndexTargets::deb::CNF::DefaultEnabled", "\"false\"".to_owned()),
    ] {
        text += &format!("{name} {value};\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_has_everything_below_its_folder_and_no_hooks() {
        let text = configuration(Path::new("/cache/apt"));
        for part in ["sourceparts \"/cache/apt/sources\"", "archives \"/cache/apt/archives\""] {
            assert!(text.contains(part), "{text}");
        }
        assert!(text.contains("#clear APT::Update::Post-Invoke;"), "{text}");
        assert!(text.contains("Acquire::AllowInsecureRepositories \"false\""), "{text}");
    }
}
