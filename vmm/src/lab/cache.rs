//! The folder in which labs are kept: sets of packages, and a folder for each run.

use super::LabError;
use super::manifest::Manifest;
use super::packages::Set;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Pause between two tries to get the lock.
const AGAIN: Duration = Duration::from_millis(100);

/// The folder.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Cache(PathBuf);

/// A lock on the cache: shared by those who use it, held alone by who changes it.
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "the lock is held as long as the file is open")] File);

/// A set of packages whose files are what its manifest says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Kept {
    folder: PathBuf,
    /// What it holds.
    pub manifest: Manifest,
}

impl Cache {
    /// The cache in `folder`, or in the user's folder for caches.
    ///
    /// # Errors
    /// [`LabError`] if the user has no such folder, or the cache's cannot be made.
    pub fn open(folder: Option<&Path>) -> Result<Self, LabError> {
        let of_user = || {
            let absolute = |name: &str| {
                std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute())
            };
            let folder = absolute("XDG_CACHE_HOME");
            folder
                .or_else(|| Some(absolute("HOME")?.join(".cache")))
                .map(|path| path.join("lacuna"))
        };
        let folder = folder.map(Path::to_owned).or_else(of_user).ok_or_else(|| {
            LabError::host(
                "neither XDG_CACHE_HOME nor HOME is set",
                "name a folder with --cache DIR",
            )
        })?;
        fs::create_dir_all(&folder).map_err(LabError::file("make the folder", &folder))?;
        let absolute = fs::canonicalize(&folder).map_err(LabError::file("find", &folder))?;
        // The path stands in configurations of apt and of an emulator, which do not take every byte.
        let plain = |char: char| char.is_ascii_alphanumeric() || "/._-+@%".contains(char);
        if !absolute.to_str().is_some_and(|path| path.chars().all(plain)) {
            return Err(LabError::host(
                format!("the cache {} has a strange name", absolute.display()),
                "name with --cache DIR a path of letters, digits and ._-+@% only",
            ));
        }
        Ok(Self(absolute))
    }

    /// The folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.0
    }

    /// Where apt works.
    #[must_use]
    pub fn apt(&self) -> PathBuf {
        self.0.join("apt")
    }

    /// The folder of a set.
    #[must_use]
    pub fn set(&self, set: Set) -> PathBuf {
        self.0.join("sets").join(set.name())
    }

    /// A set, if it is there and every file is what it was.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn verify(&self, set: Set) -> Result<Kept, String> {
        let folder = self.set(set);
        Ok(Kept { manifest: Manifest::verify(&folder)?, folder })
    }

    /// Locks the cache, alone or with others. `waiting` is called when somebody else has it; it may
    /// end the wait.
    ///
    /// # Errors
    /// [`LabError`] if the cache has no locks, or what `waiting` says.
    pub fn lock(
        &self,
        alone: bool,
        waiting: &mut dyn FnMut() -> Result<(), LabError>,
    ) -> Result<Lock, LabError> {
        let path = self.0.join("lock");
        let file = File::options().create(true).append(true).open(&path);
        let file = file.map_err(LabError::file("open", &path))?;
        loop {
            let tried = if alone { file.try_lock() } else { file.try_lock_shared() };
            match tried {
                Ok(()) => return Ok(Lock(file)),
                Err(TryLockError::WouldBlock) => waiting()?,
                Err(TryLockError::Error(error)) => {
                    return Err(LabError::file("lock", &path)(error));
                }
            }
            std::thread::sleep(AGAIN);
        }
    }

    /// A folder for one run. Those that runs left behind whose process is gone are removed.
    ///
    /// # Errors
    /// [`LabError`] if it cannot be made.
    pub fn run_folder(&self) -> Result<RunFolder, LabError> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let runs = self.0.join("runs");
        fs::create_dir_all(&runs).map_err(LabError::file("make the folder", &runs))?;
        for left in fs::read_dir(&runs).into_iter().flatten().flatten() {
            let lock = File::open(left.path().join("lock"));
            if lock.is_ok_and(|lock| lock.try_lock().is_ok()) {
                log::info!("removing {}, which a run left behind", left.path().display());
                remove(&left.path());
            }
        }
        let name = format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = runs.join(name);
        // Locked before it can be found under its name.
        let new = runs.join(format!("new-{}", std::process::id()));
        let made = fs::create_dir_all(&new).and_then(|()| {
            let lock = File::create(new.join("lock"))?;
            lock.lock()?;
            fs::rename(&new, &path)?;
            Ok(lock)
        });
        let lock = made.map_err(LabError::file("make the folder", &path))?;
        Ok(RunFolder { path, _lock: lock })
    }
}

impl Kept {
    /// A file of the set, below the root of its packages.
    ///
    /// # Errors
    /// [`LabError`] if there is none.
    pub fn file(&self, is: impl Fn(&str) -> bool) -> Result<PathBuf, LabError> {
        let below_root = |path: &str| path.strip_prefix("root/").is_some_and(&is);
        let found = self.manifest.find(below_root).map(|path| self.folder.join(path));
        found.ok_or_else(|| {
            let what = format!("{} lacks a file that a lab needs", self.folder.display());
            LabError::host(what, "remove that folder, so that it is made anew")
        })
    }

    /// The root of its packages.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        self.folder.join("root")
    }
}

/// A folder that is removed with all that is in it.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    _lock: File,
}

impl RunFolder {
    /// A file of this name in it.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

fn remove(folder: &Path) {
    if let Err(error) = fs::remove_dir_all(folder) {
        log::warn!("cannot remove {}: {error}", folder.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache() -> (tempfile::TempDir, Cache) {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(Some(folder.path())).unwrap();
        (folder, cache)
    }

    #[test]
    fn who_changes_the_cache_is_alone() {
        let (_folder, cache) = cache();
        let waits = |alone| {
            let mut busy = || Err(LabError::Cancelled);
            cache.lock(alone, &mut busy).is_err()
        };
        let shared = cache.lock(false, &mut || Ok(())).unwrap();
        assert!(!waits(false) && waits(true));
        drop(shared);
        let _alone = cache.lock(true, &mut || Ok(())).unwrap();
        assert!(waits(false) && waits(true));
    }

    #[test]
    fn the_folder_of_a_run_goes_with_it_and_a_forgotten_one_with_the_next() {
        let (_folder, cache) = cache();
        let first = cache.run_folder().unwrap();
        fs::write(first.file("x"), "x").unwrap();
        let second = cache.run_folder().unwrap();
        assert!(first.file("x").exists(), "the first is still used");
        drop(first);
        let forgotten = cache.folder().join("runs/1-0");
        fs::create_dir(&forgotten).unwrap();
        fs::write(forgotten.join("lock"), "").unwrap();
        let _third = cache.run_folder().unwrap();
        assert!(second.path().exists() && !forgotten.exists());
        drop(second);
        assert_eq!(fs::read_dir(cache.folder().join("runs")).unwrap().count(), 1);
    }

    #[test]
    fn a_cache_with_a_strange_name_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let error = Cache::open(Some(&folder.path().join("a \"b"))).unwrap_err();
        assert!(error.to_string().contains("strange name"), "{error}");
    }

    #[test]
    fn a_set_that_is_not_there_is_said_to_be_so() {
        let (_folder, cache) = cache();
        assert_eq!(cache.verify(Set::Qemu), Err("it is not there".into()));
    }
}
