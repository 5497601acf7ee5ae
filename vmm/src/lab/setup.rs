//! Sets up what labs are made of.

use super::LabError;
use super::apt::Apt;
use super::cache::{Cache, Kept};
use super::manifest::{self, Manifest};
use super::packages::{Download, Set};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

/// How many bytes unpacked packages take, for each byte of their files, at most.
const UNPACKED: u64 = 6;

/// Who wants to know how far a set-up is.
pub trait Watcher {
    /// Something begins; it takes so many bytes, if that is known.
    fn begin(&mut self, what: &str, bytes: Option<u64>);

    /// So many bytes are done.
    fn at(&mut self, bytes: u64);

    /// Whether to go on.
    ///
    /// # Errors
    /// [`LabError::Cancelled`] if not.
    fn go_on(&mut self) -> Result<(), LabError>;
}

/// What is wrong with each of these sets that cannot be used as it is.
#[must_use]
pub fn missing(cache: &Cache, sets: &[Set]) -> Vec<(Set, String)> {
    let wrong = |set: &Set| Some((*set, cache.verify(*set).err()?));
    sets.iter().filter_map(wrong).collect()
}

/// Has all of these sets, downloading what is not there or was changed. Only one process at a time
/// changes a cache. What an interrupted set-up downloaded is used; what it did not finish is redone.
///
/// # Errors
/// [`LabError`] if it cannot be done.
pub fn set_up(cache: &Cache, sets: &[Set], watcher: &mut dyn Watcher) -> Result<(), LabError> {
    set_up_with(cache, sets, watcher, dpkg)
}

/// Unpacks a package below a root.
type Unpack = fn(&Path, &Path) -> Result<(), LabError>;

fn set_up_with(
    cache: &Cache,
    sets: &[Set],
    watcher: &mut dyn Watcher,
    unpack: Unpack,
) -> Result<(), LabError> {
    if missing(cache, sets).is_empty() {
        return Ok(());
    }
    let mut said = false;
    let _lock = cache.lock(true, &mut || {
        if !std::mem::replace(&mut said, true) {
            watcher.begin("waiting for another lacuna that uses the cache", None);
        }
        watcher.go_on()
    })?;
    // Somebody else may have done it meanwhile.
    let mut apt = None;
    for (set, why) in missing(cache, sets) {
        watcher.go_on()?;
        log::info!("{}: {why}", set.what());
        if unpack_again(cache, set, unpack)? {
            continue;
        }
        let apt = match &mut apt {
            Some(apt) => apt,
            none => {
                watcher.begin("reading the lists of packages", None);
                none.insert(Apt::open(&cache.apt(), watcher)?)
            }
        };
        have(cache, set, apt, watcher, unpack)?;
    }
    Ok(())
}

/// A set, verified just now.
///
/// # Errors
/// [`LabError`] if it was changed since it was set up.
pub fn kept(cache: &Cache, set: Set) -> Result<Kept, LabError> {
    let kept = cache.verify(set);
    kept.map_err(|why| LabError::host(format!("{}: {why}", set.what()), "run lacuna lab setup"))
}

fn have(
    cache: &Cache,
    set: Set,
    apt: &Apt,
    watcher: &mut dyn Watcher,
    unpack: Unpack,
) -> Result<(), LabError> {
    let wanted = apt.wanted(set)?;
    let files = apt.downloads(&wanted)?;
    if files.is_empty() {
        let what = format!("the packages of {} are installed on this host", set.what());
        return Err(LabError::host(what, "use the installed ones; this lab cannot"));
    }
    let bytes = files.iter().map(|file| file.size).sum();
    check_space(cache.folder(), bytes)?;
    watcher.begin(&format!("downloading {}", set.what()), Some(bytes));
    apt.download(&wanted, &files, watcher)?;
    watcher.go_on()?;
    watcher.begin(&format!("unpacking {}", set.what()), None);
    let new = fresh(cache, set)?;
    let packages = new.join("packages");
    fs::create_dir_all(&packages).map_err(LabError::file("make the folder", &packages))?;
    for Download { file, .. } in &files {
        let from = apt.archive(file);
        fs::rename(&from, packages.join(file)).map_err(LabError::file("move", &from))?;
    }
    let hashes = files.into_iter().map(|file| (file.file, file.sha256)).collect();
    finish(cache, set, &new, hashes, unpack)
}

/// Unpacks a set again whose packages are there and sound; whether they were.
fn unpack_again(cache: &Cache, set: Set, unpack: Unpack) -> Result<bool, LabError> {
    let folder = cache.set(set);
    let manifest = fs::read_to_string(folder.join(manifest::NAME)).ok();
    let manifest = manifest.and_then(|text| serde_json::from_str::<Manifest>(&text).ok());
    let Some(manifest) = manifest else { return Ok(false) };
    let packages = folder.join("packages");
    let names: Vec<_> = manifest.packages.keys().map(Into::into).collect();
    if names.is_empty()
        || manifest::hashes(&packages, &names).ok() != Some(manifest.packages.clone())
    {
        return Ok(false);
    }
    log::info!("unpacking {} again", set.what());
    let new = fresh(cache, set)?;
    let moved = fs::rename(&packages, new.join("packages"));
    moved.map_err(LabError::file("move", &packages))?;
    finish(cache, set, &new, manifest.packages, unpack)?;
    Ok(true)
}

/// An empty folder beside the set's.
fn fresh(cache: &Cache, set: Set) -> Result<std::path::PathBuf, LabError> {
    let new = cache.set(set).with_extension("new");
    remove(&new)?;
    fs::create_dir_all(&new).map_err(LabError::file("make the folder", &new))?;
    Ok(new)
}

/// Unpacks the packages of `new`, describes it, and puts it in the set's place.
fn finish(
    cache: &Cache,
    set: Set,
    new: &Path,
    packages: BTreeMap<String, String>,
    unpack: Unpack,
) -> Result<(), LabError> {
    let root = new.join("root");
    for file in packages.keys() {
        unpack(&new.join("packages").join(file), &root)?;
    }
    let unpacked = manifest::below(&root).map_err(LabError::file("look through", &root))?;
    for path in unpacked.files.iter().filter(|path| !path.to_str().is_some_and(|p| set.keeps(p))) {
        let path = root.join(path);
        fs::remove_file(&path).map_err(LabError::file("remove", &path))?;
    }
    Manifest::of(new, packages)?.write(new)?;
    let place = cache.set(set);
    remove(&place)?;
    fs::rename(new, &place).map_err(LabError::file("make", &place))
}

/// Unpacks a package; its scripts are not run.
fn dpkg(package: &Path, root: &Path) -> Result<(), LabError> {
    let mut command = Command::new("dpkg");
    command.arg("--extract").arg(package).arg(root);
    let output = command.stdin(Stdio::null()).output().map_err(|error| {
        LabError::host(format!("dpkg cannot be started: {error}"), "use Debian 12 or later")
    })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let remedy = "free some space, or name another folder with --cache DIR";
    Err(LabError::host(format!("{} cannot be unpacked: {said}", package.display()), remedy))
}

/// Checks that packages of so many bytes fit, packed and unpacked.
fn check_space(folder: &Path, packed: u64) -> Result<(), LabError> {
    let needed = packed.saturating_mul(1 + UNPACKED);
    let mut df = Command::new("df");
    df.args(["--output=avail", "--block-size=1", "--"]).arg(folder).env("LC_ALL", "C");
    let printed = df.stdin(Stdio::null()).output().map(|output| output.stdout).unwrap_or_default();
    match available(&String::from_utf8_lossy(&printed)) {
        Some(available) if available < needed => Err(LabError::host(
            format!(
                "{} has {} MiB of space left, and {} MiB are needed",
                folder.display(),
                available >> 20,
                needed >> 20
            ),
            "free some space, or name another folder with --cache DIR",
        )),
        // Where it cannot be told, what comes of it will be seen.
        _ => Ok(()),
    }
}

/// The number in the output of `df --output=avail`.
fn available(printed: &str) -> Option<u64> {
    printed.lines().nth(1)?.trim().parse().ok()
}

fn remove(folder: &Path) -> Result<(), LabError> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(LabError::file("remove", folder)(error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn space_that_does_not_suffice_is_said_to_be_so() {
        let folder = tempfile::tempdir().unwrap();
        assert!(check_space(folder.path(), 1).is_ok());
        let error = check_space(folder.path(), u64::MAX).unwrap_err().to_string();
        assert!(error.contains("MiB are needed; free some space"), "{error}");
        assert_eq!(available("     Avail\n66153811968\n"), Some(66_153_811_968));
        assert_eq!(available("df: no such file\n"), None);
    }

    /// A package that is its only file.
    fn package(folder: &Path) -> BTreeMap<String, String> {
        let packages = folder.join("packages");
        fs::create_dir_all(&packages).unwrap();
        fs::write(packages.join("tool.deb"), "a tool").unwrap();
        manifest::hashes(&packages, &["tool.deb".into()]).unwrap()
    }

    fn unpack(package: &Path, root: &Path) -> Result<(), LabError> {
        for folder in ["bin", "usr/share/doc/tool"] {
            fs::create_dir_all(root.join(folder)).unwrap();
        }
        fs::copy(package, root.join("bin/tool")).unwrap();
        fs::write(root.join("usr/share/doc/tool/copyright"), "all of it").unwrap();
        Ok(())
    }

    fn set_up_by_hand() -> (tempfile::TempDir, Cache) {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(Some(folder.path())).unwrap();
        let new = fresh(&cache, Set::Busybox).unwrap();
        let packages = package(&new);
        finish(&cache, Set::Busybox, &new, packages, unpack).unwrap();
        (folder, cache)
    }

    struct Nobody;

    impl Watcher for Nobody {
        fn begin(&mut self, _: &str, _: Option<u64>) {}

        fn at(&mut self, _: u64) {}

        fn go_on(&mut self) -> Result<(), LabError> {
            Ok(())
        }
    }

    #[test]
    fn what_was_unpacked_is_kept_without_documentation_and_needs_no_network() {
        let (_folder, cache) = set_up_by_hand();
        let kept = kept(&cache, Set::Busybox).unwrap();
        let tool = kept.file(|path| path == "bin/tool").unwrap();
        assert_eq!(fs::read(tool).unwrap(), b"a tool");
        assert!(kept.file(|path| path.ends_with("copyright")).is_err());
        assert_eq!(missing(&cache, &[Set::Busybox]), []);
        set_up_with(&cache, &[Set::Busybox], &mut Nobody, unpack).unwrap();
    }

    #[test]
    fn a_damaged_file_is_unpacked_again_from_sound_packages() {
        let (_folder, cache) = set_up_by_hand();
        let tool = cache.set(Set::Busybox).join("root/bin/tool");
        fs::write(&tool, "no tool").unwrap();
        assert!(kept(&cache, Set::Busybox).is_err());
        set_up_with(&cache, &[Set::Busybox], &mut Nobody, unpack).unwrap();
        assert_eq!(fs::read(&tool).unwrap(), b"a tool");
        assert!(kept(&cache, Set::Busybox).is_ok());
    }

    #[test]
    fn damaged_packages_are_not_used() {
        let (_folder, cache) = set_up_by_hand();
        fs::write(cache.set(Set::Busybox).join("packages/tool.deb"), "no package").unwrap();
        assert!(kept(&cache, Set::Busybox).is_err());
        assert!(!unpack_again(&cache, Set::Busybox, unpack).unwrap());
    }
}
