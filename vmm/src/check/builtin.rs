//! The scenarios that this program was built with, and the files that they name.

use std::fs;
use std::io;
use tempfile::TempDir;

/// Where the scenarios lie, among the files.
pub(super) const FOLDER: &str = "scenarios";

macro_rules! files {
    ($($name:literal),* $(,)?) => {
        /// Files of `configs/`: names and contents.
        const FILES: &[(&str, &[u8])] = &[
            $(($name, include_bytes!(concat!("../../../configs/", $name))),)*
        ];
    };
}

files! {
    "data/compile.csv.gz",
    "data/secret.txt",
    "idle.toml",
    "quickstart.toml",
    "secrets.toml",
    "stale-read.toml",
    "touch.toml",
    "scenarios/boot.toml",
    "scenarios/crash.toml",
    "scenarios/in-place.toml",
    "scenarios/no-prezero.toml",
    "scenarios/probe.toml",
    "scenarios/quickstart.toml",
    "scenarios/replay.toml",
    "scenarios/secrets.toml",
    "scenarios/selftest.toml",
    "scenarios/stale-read.toml",
    "scenarios/stress.toml",
    "scenarios/touch-page-walk.toml",
    "scenarios/touch.toml",
    "scenarios/triple-fault.toml",
    "scenarios/wrapping.toml",
}

/// Lays the files out in a folder of their own, which goes away with the value.
pub(super) fn unpack() -> io::Result<TempDir> {
    let folder = tempfile::Builder::new().prefix("lacuna-check-").tempdir()?;
    for (name, bytes) in FILES {
        let path = folder.path().join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(path, bytes)?;
    }
    Ok(folder)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    /// A scenario that is added to the folder and not to the list would run from there alone.
    #[test]
    fn every_scenario_of_the_repository_is_built_in() {
        let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs");
        let mut there: Vec<_> = fs::read_dir(configs.join(FOLDER))
            .unwrap()
            .map(|entry| format!("{FOLDER}/{}", entry.unwrap().file_name().display()))
            .collect();
        there.sort();
        let listed: Vec<_> = FILES.iter().map(|(name, _)| (*name).to_owned()).collect();
        let listed: Vec<_> = listed.into_iter().filter(|n| n.starts_with(FOLDER)).collect();
        assert_eq!(listed, there);
    }
}
