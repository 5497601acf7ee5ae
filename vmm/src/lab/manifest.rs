//! What a set of packages holds, with the SHA-256 of every file: it is compared again whenever the
//! set is used.

use super::LabError;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Name of the manifest in the folder that it describes.
pub const NAME: &str = "manifest.json";
const SCHEMA: u32 = 1;

/// What a folder holds.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Manifest {
    schema: u32,
    /// The packages, as their files are named, with the SHA-256 that the archive's signed index has.
    pub packages: BTreeMap<String, String>,
    /// Every file, by its path below the folder, with its SHA-256.
    pub files: BTreeMap<String, String>,
    /// Every symbolic link, by its path below the folder, with its target.
    pub links: BTreeMap<String, String>,
}

impl Manifest {
    /// The manifest of a folder as it is now.
    ///
    /// # Errors
    /// [`LabError`] if a file cannot be read.
    pub fn of(folder: &Path, packages: BTreeMap<String, String>) -> Result<Self, LabError> {
        let Below { files, links } =
            below(folder).map_err(LabError::file("look through", folder))?;
        Ok(Self { schema: SCHEMA, packages, files: hashes(folder, &files)?, links })
    }

    /// Writes it into the folder that it describes.
    ///
    /// # Errors
    /// [`LabError`] if it cannot be written.
    pub fn write(&self, folder: &Path) -> Result<(), LabError> {
        let path = folder.join(NAME);
        let text = serde_json::to_string_pretty(self).map_err(std::io::Error::from);
        text.and_then(|text| fs::write(&path, text)).map_err(LabError::file("write", &path))
    }

    /// Reads the manifest of a folder and compares every file with it.
    ///
    /// # Errors
    /// What is missing or differs, in words.
    pub fn verify(folder: &Path) -> Result<Self, String> {
        let path = folder.join(NAME);
        let text = fs::read_to_string(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => "it is not there".to_owned(),
            _ => format!("{} cannot be read: {error}", path.display()),
        })?;
        let manifest: Self = serde_json::from_str(&text)
            .map_err(|error| format!("{} is damaged: {error}", path.display()))?;
        if manifest.schema != SCHEMA {
            return Err(format!("{} is of another version of lacuna", path.display()));
        }
        let paths: Vec<_> = manifest.files.keys().map(PathBuf::from).collect();
        if let Some(path) = paths.iter().find(|path| !folder.join(path).is_file()) {
            return Err(format!("{} is missing", folder.join(path).display()));
        }
        let now = hashes(folder, &paths).map_err(|error| error.to_string())?;
        let changed = |(path, hash): &(&String, &String)| now.get(*path) != Some(hash);
        let mut changed = manifest.files.iter().filter(changed).map(|(path, _)| path);
        let target = |path: &str| fs::read_link(folder.join(path)).ok();
        let led_away = manifest.links.iter().find(|(p, t)| target(p) != Some(PathBuf::from(t)));
        match changed.next().or(led_away.map(|(path, _)| path)) {
            Some(path) => Err(format!("{} was changed", folder.join(path).display())),
            None => Ok(manifest),
        }
    }

    /// The path of the one file that `is` names, below the folder.
    pub fn find(&self, is: impl Fn(&str) -> bool) -> Option<&str> {
        self.files.keys().map(String::as_str).find(|path| is(path))
    }
}

/// What is below a folder, with paths relative to it.
#[derive(Debug, Default)]
pub struct Below {
    /// The regular files.
    pub files: Vec<PathBuf>,
    /// The symbolic links and their targets.
    pub links: BTreeMap<String, String>,
}

/// Looks through a folder. Names that are no text are passed over: no package has such.
///
/// # Errors
/// Whatever reading a folder says.
pub fn below(folder: &Path) -> std::io::Result<Below> {
    let (mut found, mut folders) = (Below::default(), vec![PathBuf::new()]);
    while let Some(below) = folders.pop() {
        for entry in fs::read_dir(folder.join(&below))? {
            let entry = entry?;
            let path = below.join(entry.file_name());
            let kind = entry.file_type()?;
            if kind.is_dir() {
                folders.push(path);
            } else if kind.is_file() && path.to_str().is_some() {
                found.files.push(path);
            } else if kind.is_symlink() {
                let target = fs::read_link(entry.path())?;
                let texts = path.to_str().zip(target.to_str());
                found.links.extend(texts.map(|(path, target)| (path.into(), target.into())));
            }
        }
    }
    found.files.sort();
    Ok(found)
}

/// SHA-256 of each file, by its path.
///
/// # Errors
/// [`LabError`] if a file cannot be read, or coreutils are not there.
pub fn hashes(folder: &Path, paths: &[PathBuf]) -> Result<BTreeMap<String, String>, LabError> {
    let mut hashes = BTreeMap::new();
    for some in paths.chunks(500) {
        let mut command = Command::new("sha256sum");
        command.current_dir(folder).args(["--binary", "--zero", "--"]).args(some);
        let output = command.stdin(Stdio::null()).output().map_err(|error| {
            LabError::host(format!("sha256sum cannot be started: {error}"), "install coreutils")
        })?;
        let mut lines = output.stdout.split(|byte| *byte == 0);
        for path in some {
            let name = path.as_os_str();
            // 64 digits, a space, a star, and the name.
            let hash = lines.next().filter(|line| line.get(66..) == Some(name.as_bytes()));
            let hash = hash.and_then(|line| std::str::from_utf8(&line[..64]).ok());
            let (Some(name), Some(hash)) = (name.to_str(), hash) else {
                let said = String::from_utf8_lossy(&output.stderr);
                let what = format!("{} cannot be read: {}", path.display(), said.trim());
                return Err(LabError::host(what, "check its permissions"));
            };
            hashes.insert(name.to_owned(), hash.to_owned());
        }
    }
    Ok(hashes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("root/usr/bin")).unwrap();
        fs::write(folder.path().join("root/usr/bin/tool"), "a tool").unwrap();
        fs::write(folder.path().join("one.deb"), "abc").unwrap();
        std::os::unix::fs::symlink("tool", folder.path().join("root/usr/bin/link")).unwrap();
        Manifest::of(folder.path(), BTreeMap::new()).unwrap().write(folder.path()).unwrap();
        folder
    }

    #[test]
    fn a_folder_agrees_with_its_own_manifest() {
        let folder = folder();
        let manifest = Manifest::verify(folder.path()).unwrap();
        let paths: Vec<_> = manifest.files.keys().collect();
        assert_eq!(paths, ["one.deb", "root/usr/bin/tool"]);
        assert_eq!(
            manifest.files["one.deb"],
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert_eq!(manifest.find(|path| path.ends_with("/tool")), Some("root/usr/bin/tool"));
    }

    #[test]
    fn a_changed_byte_is_found() {
        let folder = folder();
        fs::write(folder.path().join("root/usr/bin/tool"), "b tool").unwrap();
        let why = Manifest::verify(folder.path()).unwrap_err();
        assert!(why.contains("tool was changed"), "{why}");
    }

    #[test]
    fn a_link_that_leads_elsewhere_or_nowhere_is_found() {
        let folder = folder();
        let link = folder.path().join("root/usr/bin/link");
        fs::remove_file(&link).unwrap();
        assert!(Manifest::verify(folder.path()).unwrap_err().contains("link was changed"));
        std::os::unix::fs::symlink("../../../one.deb", &link).unwrap();
        assert!(Manifest::verify(folder.path()).unwrap_err().contains("link was changed"));
    }

    #[test]
    fn a_missing_file_is_found() {
        let folder = folder();
        fs::remove_file(folder.path().join("one.deb")).unwrap();
        let why = Manifest::verify(folder.path()).unwrap_err();
        assert!(why.contains("one.deb is missing"), "{why}");
    }

    #[test]
    fn a_manifest_that_is_not_there_or_cut_short_is_no_manifest() {
        let folder = folder();
        let path = folder.path().join(NAME);
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, &text[..text.len() - 2]).unwrap();
        assert!(Manifest::verify(folder.path()).unwrap_err().contains("damaged"));
        fs::write(&path, text.replace("\"schema\": 1", "\"schema\": 2")).unwrap();
        assert!(Manifest::verify(folder.path()).unwrap_err().contains("another version"));
        fs::remove_file(&path).unwrap();
        assert_eq!(Manifest::verify(folder.path()).unwrap_err(), "it is not there");
    }
}
