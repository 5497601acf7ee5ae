//! The static `lacuna` that goes into a lab: it finds no libraries there.

use super::LabError;
use object::read::elf::{ElfFile64, ProgramHeader};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The processor and system that labs have.
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// The profile of the workspace that is quick to build.
const PROFILE: &str = "lab";

/// Where a static `lacuna` comes from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Source {
    /// A file that the user names, or this very program.
    File(PathBuf),
    /// It is built from the source tree.
    Tree(PathBuf),
}

/// Where a static `lacuna` is to come from: the file that is named, this program if it is static, or
/// the source tree that it was built from.
///
/// # Errors
/// [`LabError`] if there is none of them, or the file is not static.
pub fn source(named: Option<&Path>) -> Result<Source, LabError> {
    const REMEDY: &str = "name a static one with --lacuna FILE; cargo build --release --target \
                          x86_64-unknown-linux-gnu with RUSTFLAGS=-Ctarget-feature=+crt-static \
                          makes one";
    if let Some(path) = named {
        let bytes = fs::read(path).map_err(|error| {
            LabError::Arguments(format!("--lacuna: {} cannot be read: {error}", path.display()))
        })?;
        return match is_static(&bytes) {
            true => Ok(Source::File(path.to_owned())),
            false => Err(LabError::Arguments(format!(
                "--lacuna: {} is no static 64-bit program for Linux; {REMEDY}",
                path.display()
            ))),
        };
    }
    let own = std::env::current_exe().ok();
    if let Some(own) = own.filter(|own| own.file_name().is_some_and(|name| name == "lacuna"))
        && fs::read(&own).is_ok_and(|bytes| is_static(&bytes))
    {
        return Ok(Source::File(own));
    }
    let tree = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("/"));
    if tree.join("vmm/src/main.rs").is_file() && tree.join("Cargo.lock").is_file() {
        return Ok(Source::Tree(tree.to_owned()));
    }
    Err(LabError::host("there is no static lacuna to take into the lab", REMEDY))
}

impl Source {
    /// The static `lacuna`; built first, if need be. What is built already is not built again.
    ///
    /// # Errors
    /// [`LabError`] if it cannot be built.
    pub fn provide(&self) -> Result<PathBuf, LabError> {
        let tree = match self {
            Self::File(path) => return Ok(path.clone()),
            Self::Tree(tree) => tree,
        };
        build_static(tree, &["build", "--bin", "lacuna"])?;
        Ok(tree.join("target").join(PROFILE).join(TARGET).join(PROFILE).join("lacuna"))
    }
}

/// Has cargo build something of the package statically, and gives what it printed. `words` are a command
/// of cargo and its flags.
///
/// # Errors
/// [`LabError`] if it cannot be built.
pub fn build_static(tree: &Path, words: &[&str]) -> Result<Vec<u8>, LabError> {
    let remedy = "name a static lacuna with --lacuna FILE, or see what cargo says";
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .current_dir(tree)
        .args(words)
        .args(["--locked", "--quiet", "--package", "lacuna"])
        .args(["--profile", PROFILE, "--target", TARGET, "--target-dir"])
        .arg(tree.join("target").join(PROFILE))
        .env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static");
    for variable in super::inherited::INHERITED {
        cargo.env_remove(variable);
    }
    let output = cargo.stdin(Stdio::null()).output().map_err(|error| {
        LabError::host(format!("cargo cannot be started to build a static lacuna: {error}"), remedy)
    })?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(LabError::host(format!("a static lacuna cannot be built:\n{said}"), remedy));
    }
    Ok(output.stdout)
}

/// Whether a program needs no interpreter, so no libraries.
fn is_static(bytes: &[u8]) -> bool {
    let Ok(file) = ElfFile64::<object::LittleEndian>::parse(bytes) else { return false };
    let interpreted = |header: &object::elf::ProgramHeader64<_>| {
        header.p_type(object::LittleEndian) == object::elf::PT_INTERP
    };
    let loadable = |header: &object::elf::ProgramHeader64<_>| {
        header.p_type(object::LittleEndian) == object::elf::PT_LOAD
    };
    let headers = file.elf_program_headers();
    headers.iter().any(loadable) && !headers.iter().any(interpreted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_with_an_interpreter_is_not_static() {
        let own = fs::read(std::env::current_exe().unwrap()).unwrap();
        let is = cfg!(target_feature = "crt-static");
        assert_eq!(is_static(&own), is);
        assert!(!is_static(b"#!/bin/sh\n"));
        assert!(!is_static(&[]));
    }

    #[test]
    fn a_guest_image_is_static() {
        // The image that the VMM embeds has no interpreter.
        assert!(is_static(crate::image::ORDINARY));
    }

    #[test]
    fn a_named_file_that_is_not_static_is_wrong_usage() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("lacuna");
        fs::write(&file, "#!/bin/sh\n").unwrap();
        for path in [file.as_path(), Path::new("/nowhere/lacuna")] {
            assert!(matches!(source(Some(path)), Err(LabError::Arguments(_))));
        }
    }

    #[test]
    fn tests_run_from_the_source_tree() {
        assert!(matches!(source(None), Ok(Source::Tree(_))));
    }
}
