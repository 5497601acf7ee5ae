//! What a lab sends when its commands have ended: a line, the files that are kept, and a last line.

use super::cpio;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// How the lines begin.
const MARKER: &str = "lacuna-lab ";
const END: &[u8] = b"\nlacuna-lab end\n";
/// Longest first line.
const MAX_LINE: usize = 4096;
/// Most bytes that are brought back.
const MAX_FILES: u64 = 1 << 30;

/// What the first line says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Line {
    /// The commands ended with these statuses; so many bytes of files follow.
    Status(Vec<u8>, u64),
    /// They could not be started.
    Failed(String),
}

/// What the commands left.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Ending {
    /// Their exit statuses.
    pub statuses: Vec<u8>,
    /// The files that are kept, relative to their folder.
    pub files: Vec<(PathBuf, Vec<u8>)>,
}

/// Reads the first line, if all of it is there.
///
/// # Errors
/// The line, if it is none that a lab writes.
pub fn line(text: &[u8]) -> Result<Option<(Line, usize)>, String> {
    let Some(end) = text.iter().position(|byte| *byte == b'\n') else {
        return if text.len() < MAX_LINE { Ok(None) } else { Err("a line without end".into()) };
    };
    let line = String::from_utf8_lossy(&text[..end]).into_owned();
    let said = line.strip_prefix(MARKER).ok_or_else(|| line.clone())?;
    let parsed = match said.split_once(' ') {
        Some(("failed", why)) => Some(Line::Failed(why.to_owned())),
        Some(("status", rest)) => rest.split_once(" files ").and_then(|(statuses, bytes)| {
            let statuses = statuses.split(' ').map(|status| status.parse().ok());
            Some(Line::Status(statuses.collect::<Option<_>>()?, bytes.trim().parse().ok()?))
        }),
        _ => None,
    };
    parsed.map(|parsed| Some((parsed, end + 1))).ok_or(line)
}

/// The file into which a lab's result is written, while it is.
#[derive(Debug)]
pub struct Results {
    path: PathBuf,
    first: Option<(Line, u64)>,
}

impl Results {
    /// Nothing is there yet.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), first: None }
    }

    /// Looks again: what the commands left, if all of it is there.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn look(&mut self) -> Result<Option<Ending>, String> {
        let unreadable = |error: io::Error| format!("its result cannot be read: {error}");
        let len = match fs::metadata(&self.path) {
            Ok(metadata) => metadata.len(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(unreadable(error)),
        };
        if len == 0 {
            return Ok(None);
        }
        let (line, start) = match &self.first {
            Some(first) => first.clone(),
            None => {
                let mut text = Vec::new();
                let file = File::open(&self.path).map_err(unreadable)?;
                file.take(MAX_LINE as u64).read_to_end(&mut text).map_err(unreadable)?;
                let first =
                    line(&text).map_err(|line| format!("it sent {line:?} as its result"))?;
                let Some((line, start)) = first else { return Ok(None) };
                self.first.insert((line, start as u64)).clone()
            }
        };
        let (statuses, bytes) = match line {
            Line::Failed(why) => return Err(why),
            Line::Status(_, bytes) if bytes > MAX_FILES => {
                return Err(format!("{bytes} bytes of files are too many to be brought back"));
            }
            Line::Status(statuses, bytes) => (statuses, bytes),
        };
        if len < start + bytes + END.len() as u64 {
            return Ok(None);
        }
        let mut file = File::open(&self.path).map_err(unreadable)?;
        file.seek(SeekFrom::Start(start)).map_err(unreadable)?;
        let mut packed = Vec::new();
        file.by_ref().take(bytes).read_to_end(&mut packed).map_err(unreadable)?;
        let mut end = [0; END.len()];
        file.read_exact(&mut end).map_err(unreadable)?;
        if end != END {
            return Err("its files did not come whole".into());
        }
        let files = match packed.is_empty() {
            true => Vec::new(),
            false => cpio::read(flate2::read::GzDecoder::new(&packed[..]), MAX_FILES)
                .map_err(|error| format!("its files did not come whole: {error}"))?,
        };
        Ok(Some(Ending { statuses, files }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_first_line_is_read_when_it_is_whole() {
        assert_eq!(line(b"lacuna-lab status 0 fi"), Ok(None));
        let status = Line::Status(vec![137, 0], 12);
        let text = b"lacuna-lab status 137 0 files 12\nxyz";
        assert_eq!(line(text), Ok(Some((status, text.len() - 3))));
        let failed = Line::Failed("module kvm does not load: x".into());
        let text = b"lacuna-lab failed module kvm does not load: x\n";
        assert_eq!(line(text), Ok(Some((failed, text.len()))));
    }

    #[test]
    fn any_other_line_is_refused() {
        for text in [
            "lacuna-lab status 256 files 0\n",
            "lacuna-lab status 0\n",
            "lacuna-lab status x files 0\n",
            "lacuna-lab status  files 0\n",
            "lacuna-lab end\n",
            "Kernel panic\n",
        ] {
            assert_eq!(line(text.as_bytes()), Err(text.trim().into()));
        }
        assert!(line(&[b'x'; MAX_LINE]).is_err());
    }

    fn packed() -> Vec<u8> {
        let packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        let mut archive = cpio::Writer::new(packer);
        archive.file(Path::new("report.json"), false, b"{}").unwrap();
        archive.finish().unwrap().finish().unwrap()
    }

    /// What `look` says when the file grows byte by byte: once, at the end.
    fn sent(bytes: &[u8]) -> Result<Option<Ending>, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("result");
        let mut results = Results::new(&path);
        assert_eq!(results.look(), Ok(None));
        let mut file = File::create(&path).unwrap();
        for (index, byte) in bytes.iter().enumerate() {
            file.write_all(&[*byte]).unwrap();
            let seen = results.look();
            if seen != Ok(None) {
                assert_eq!(index + 1, bytes.len(), "{seen:?}");
                return seen;
            }
        }
        Ok(None)
    }

    fn result(packed: &[u8]) -> Vec<u8> {
        let line = format!("lacuna-lab status 1 files {}\n", packed.len());
        [line.as_bytes(), packed, END].concat()
    }

    #[test]
    fn status_and_files_come_back_once_all_is_there() {
        let files = vec![(PathBuf::from("report.json"), b"{}".to_vec())];
        assert_eq!(sent(&result(&packed())), Ok(Some(Ending { statuses: vec![1], files })));
        assert_eq!(sent(&result(&[])), Ok(Some(Ending { statuses: vec![1], files: vec![] })));
    }

    #[test]
    fn files_that_were_damaged_on_the_way_are_no_result() {
        let mut packed = packed();
        let middle = packed.len() / 2;
        packed[middle] ^= 0x10;
        assert!(sent(&result(&packed)).unwrap_err().contains("did not come whole"));
        let mut longer = result(&packed);
        longer.insert(40, 0);
        longer.pop();
        assert!(sent(&longer).is_err());
        let cut = result(&packed);
        assert_eq!(sent(&cut[..cut.len() - 1]), Ok(None));
    }

    #[test]
    fn a_lab_that_could_not_start_its_command_says_why() {
        assert_eq!(
            sent(b"lacuna-lab failed there is no /dev/kvm\n"),
            Err("there is no /dev/kvm".into())
        );
    }
}
