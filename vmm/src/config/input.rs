//! A look at the files that a configuration names, before anything is started.

use std::fs::{self, File};
use std::io;
use std::path::Path;

/// What is wrong with a file, and what to do.
pub(super) type Wrong = (String, String);

/// Checks that `path` is a readable file with at least one byte and at most `max`.
pub(super) fn check(path: &Path, max: u64) -> Result<(), Wrong> {
    let name = path.display();
    let wrong = |what: String, remedy: &str| Err((what, remedy.to_owned()));
    let unreadable = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => (format!("{name} does not exist"), "check the path".to_owned()),
        _ => (format!("{name} cannot be read: {error}"), "check its permissions".to_owned()),
    };
    let metadata = fs::metadata(path).map_err(unreadable)?;
    if metadata.is_dir() {
        return wrong(format!("{name} is a directory"), "name a file");
    }
    if !metadata.is_file() {
        return wrong(format!("{name} is no regular file"), "copy it to a file first");
    }
    if metadata.len() == 0 {
        return wrong(format!("{name} is empty"), "name a file with something in it");
    }
    if metadata.len() > max {
        return wrong(format!("{name} is larger than {} MiB", max >> 20), "name a smaller file");
    }
    File::open(path).map(drop).map_err(unreadable)
}
