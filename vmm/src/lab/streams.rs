//! Files that grow while they are read.

use crate::printable::steers;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// Bytes that are read at once.
const AT_ONCE: usize = 64 << 10;
/// Bytes at the end of a file among which its last lines are looked for.
const LAST_BYTES: u64 = 64 << 10;

/// A file that grows; it need not be there yet.
#[derive(Debug)]
pub struct Tail {
    path: PathBuf,
    file: Option<File>,
}

impl Tail {
    /// Nothing of it has been read.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), file: None }
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads what has come since.
    ///
    /// # Errors
    /// Whatever reading says.
    pub fn read(&mut self, into: &mut dyn FnMut(&[u8])) -> io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            none => match File::open(&self.path) {
                Ok(file) => none.insert(file),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(error) => return Err(error),
            },
        };
        let mut bytes = vec![0; AT_ONCE];
        loop {
            match file.read(&mut bytes)? {
                0 => return Ok(()),
                len => into(&bytes[..len]),
            }
        }
    }
}

/// The last lines of a file, each with a line end and without what a terminal would act on. Nothing
/// if it cannot be read.
#[must_use]
pub fn last_lines(path: &Path, count: usize) -> String {
    let read = || {
        let mut file = File::open(path)?;
        let len = file.metadata()?.len();
        file.seek(SeekFrom::Start(len.saturating_sub(LAST_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(LAST_BYTES).read_to_end(&mut bytes)?;
        io::Result::Ok(bytes)
    };
    let text = String::from_utf8_lossy(&read().unwrap_or_default()).into_owned();
    let lines: Vec<_> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    let last = &lines[lines.len().saturating_sub(count)..];
    let plain = |line: &&str| -> String {
        line.chars().map(|char| if steers(char) { ' ' } else { char }).collect()
    };
    last.iter().map(|line| plain(line) + "\n").collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn what_comes_later_is_read_later_and_nothing_twice() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        let mut tail = Tail::new(&path);
        let mut read = || {
            let mut text = Vec::new();
            tail.read(&mut |bytes| text.extend(bytes)).unwrap();
            String::from_utf8(text).unwrap()
        };
        assert_eq!(read(), "", "it is not there yet");
        let mut file = File::create(&path).unwrap();
        assert_eq!(read(), "");
        file.write_all(b"one\ntw").unwrap();
        assert_eq!(read(), "one\ntw");
        file.write_all(b"o\n").unwrap();
        assert_eq!(read(), "o\n");
        assert_eq!(read(), "");
    }

    #[test]
    fn the_last_lines_are_shown_without_what_a_terminal_acts_on() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console");
        std::fs::write(&path, "a\r\n\nb\x1b[2J\r\nc").unwrap();
        let last = last_lines(&path, 2);
        assert_eq!(last.lines().count(), 2);
        assert!(last.starts_with('b') && last.ends_with("c\n"), "{last}");
        assert!(!last.contains('\x1b'));
        assert_eq!(last_lines(&folder.path().join("none"), 2), "");
    }
}
