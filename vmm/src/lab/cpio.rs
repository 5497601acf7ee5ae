//! Archives in cpio's "newc" form: what the kernel takes as an initramfs, and what a lab sends its
//! results in (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

const MAGIC: &[u8; 6] = b"070701";
/// Number of eight-digit fields behind the magic.
const FIELDS: usize = 13;
const HEADER: usize = MAGIC.len() + 8 * FIELDS;
/// Name of the entry that ends an archive.
const TRAILER: &[u8] = b"TRAILER!!!";
/// Longest name that is read.
const MAX_NAME: usize = 4096;

const TYPE: u32 = 0o17_0000;
const FOLDER: u32 = 0o4_0000;
const FILE: u32 = 0o10_0000;
const CHARACTER_DEVICE: u32 = 0o2_0000;

// Places of fields in a header.
const INODE: usize = 0;
const MODE: usize = 1;
const LINKS: usize = 4;
const SIZE: usize = 6;
const DEVICE_MAJOR: usize = 9;
const DEVICE_MINOR: usize = 10;
const NAME_SIZE: usize = 11;

/// Writes an archive. Paths are absolute or relative to the root, which is the same here; folders on
/// the way to an entry are written before it.
#[derive(Debug)]
pub struct Writer<W: Write> {
    out: W,
    entries: u32,
    folders: BTreeSet<PathBuf>,
}

impl<W: Write> Writer<W> {
    /// An empty archive.
    pub fn new(out: W) -> Self {
        Self { out, entries: 0, folders: BTreeSet::new() }
    }

    /// A folder, unless it is there.
    ///
    /// # Errors
    /// Whatever writing says; [`io::ErrorKind::InvalidInput`] for a path that leaves the root.
    pub fn folder(&mut self, path: &Path) -> io::Result<()> {
        let mut reached = PathBuf::new();
        for part in inside(path)?.components() {
            reached.push(part);
            if self.folders.insert(reached.clone()) {
                self.entry(&reached, FOLDER | 0o755, (0, 0), &[])?;
            }
        }
        Ok(())
    }

    /// A regular file with these contents, which anybody may execute if `executable`.
    ///
    /// # Errors
    /// As [`Self::folder`]; also for contents of 4 GiB or more.
    pub fn file(&mut self, path: &Path, executable: bool, contents: &[u8]) -> io::Result<()> {
        let path = inside(path)?;
        self.parents(&path)?;
        let mode = if executable { 0o755 } else { 0o644 };
        self.entry(&path, FILE | mode, (0, 0), contents)
    }

    /// A character device.
    ///
    /// # Errors
    /// As [`Self::folder`].
    pub fn device(&mut self, path: &Path, number: (u32, u32)) -> io::Result<()> {
        let path = inside(path)?;
        self.parents(&path)?;
        self.entry(&path, CHARACTER_DEVICE | 0o600, number, &[])
    }

    /// Ends the archive.
    ///
    /// # Errors
    /// Whatever writing says.
    pub fn finish(mut self) -> io::Result<W> {
        self.entry(Path::new("TRAILER!!!"), 0, (0, 0), &[])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn parents(&mut self, path: &Path) -> io::Result<()> {
        path.parent().map_or(Ok(()), |parent| self.folder(parent))
    }

    fn entry(
        &mut self,
        path: &Path,
        mode: u32,
        device: (u32, u32),
        contents: &[u8],
    ) -> io::Result<()> {
        let name = path.as_os_str().as_bytes();
        let size = |len: usize| u32::try_from(len).map_err(|_| bad("an entry is too large"));
        let mut fields = [0_u32; FIELDS];
        fields[INODE] = self.entries;
        fields[MODE] = mode;
        fields[LINKS] = 1;
        fields[SIZE] = size(contents.len())?;
        (fields[DEVICE_MAJOR], fields[DEVICE_MINOR]) = device;
        fields[NAME_SIZE] = size(name.len() + 1)?;
        self.entries += 1;
        self.out.write_all(MAGIC)?;
        for field in fields {
            write!(self.out, "{field:08X}")?;
        }
        self.out.write_all(name)?;
        // The name's end, and bytes up to a multiple of four.
        self.out.write_all(&[0; 4][..1 + padding(HEADER + name.len() + 1)])?;
        self.out.write_all(contents)?;
        self.out.write_all(&[0; 4][..padding(contents.len())])
    }
}

/// Regular files of an archive, in order. What is no regular file is passed over.
///
/// # Errors
/// [`io::ErrorKind::InvalidData`] if it is no archive, is cut short, holds more than `most` bytes of
/// contents, or names a path that leaves the root.
pub fn read(mut from: impl Read, most: u64) -> io::Result<Vec<(PathBuf, Vec<u8>)>> {
    let mut files = Vec::new();
    let mut left = most;
    loop {
        let mut header = [0; HEADER];
        from.read_exact(&mut header)?;
        if &header[..MAGIC.len()] != MAGIC {
            return Err(bad("this is no cpio archive in newc form"));
        }
        let field = |at: usize| {
            let digits = header.get(MAGIC.len() + 8 * at..MAGIC.len() + 8 * (at + 1));
            let digits = digits.and_then(|digits| std::str::from_utf8(digits).ok());
            let number = digits.and_then(|digits| u32::from_str_radix(digits, 16).ok());
            number.ok_or_else(|| bad("a header of the archive is damaged"))
        };
        let (mode, size, name_size) = (field(MODE)?, field(SIZE)?, field(NAME_SIZE)?);
        let name_size = usize::try_from(name_size).unwrap_or(usize::MAX);
        if name_size == 0 || name_size > MAX_NAME {
            return Err(bad("a name in the archive is too long"));
        }
        let mut name = vec![0; name_size + padding(HEADER + name_size)];
        from.read_exact(&mut name)?;
        name.truncate(name_size - 1);
        if name == TRAILER {
            return Ok(files);
        }
        left = left
            .checked_sub(size.into())
            .ok_or_else(|| bad(&format!("the archive holds more than {most} bytes")))?;
        let mut contents = Vec::new();
        from.by_ref().take(size.into()).read_to_end(&mut contents)?;
        let whole = usize::try_from(size).is_ok_and(|size| size == contents.len());
        if !whole {
            return Err(bad("the archive is cut short"));
        }
        from.read_exact(&mut [0; 4][..padding(contents.len())])?;
        if mode & TYPE == FILE {
            files.push((inside(Path::new(std::ffi::OsStr::from_bytes(&name)))?, contents));
        }
    }
}

/// The path relative to the root, if it stays below it.
fn inside(path: &Path) -> io::Result<PathBuf> {
    let mut below = PathBuf::new();
    for part in path.components() {
        match part {
            Component::RootDir | Component::CurDir => {}
            Component::Normal(name) => below.push(name),
            Component::ParentDir | Component::Prefix(_) => {
                let what = format!("{} leads upwards in an archive", path.display());
                return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
            }
        }
    }
    Ok(below)
}

const fn padding(len: usize) -> usize {
    len.wrapping_neg() % 4
}

fn bad(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: u64 = 1 << 20;

    fn archive() -> Vec<u8> {
        let mut writer = Writer::new(Vec::new());
        writer.device(Path::new("/dev/console"), (5, 1)).unwrap();
        writer.file(Path::new("/init"), true, b"#!/bin/sh\n").unwrap();
        writer.file(Path::new("a/b/c"), false, b"").unwrap();
        writer.file(Path::new("a/b/d"), false, &[7; 5]).unwrap();
        writer.folder(Path::new("/a/b/e")).unwrap();
        writer.finish().unwrap()
    }

    #[test]
    fn files_come_back_with_their_contents() {
        let files = read(&archive()[..], MOST).unwrap();
        let expected =
            [("init", &b"#!/bin/sh\n"[..]), ("a/b/c", &b""[..]), ("a/b/d", &[7_u8; 5][..])];
        let expected = expected.map(|(path, bytes)| (PathBuf::from(path), bytes.to_vec()));
        assert_eq!(files, expected);
    }

    #[test]
    fn every_part_of_an_archive_starts_at_a_multiple_of_four() {
        let archive = archive();
        let entries = archive.windows(6).enumerate().filter(|(_, bytes)| bytes == MAGIC);
        let starts: Vec<_> = entries.map(|(at, _)| at).collect();
        // dev, dev/console, init, a, a/b, a/b/c, a/b/d, a/b/e and the trailer.
        assert_eq!(starts.len(), 9, "a folder is written once");
        assert!(starts.iter().all(|at| at % 4 == 0), "{starts:?}");
        assert_eq!(archive.len() % 4, 0);
    }

    #[test]
    fn a_header_says_what_the_kernel_expects() {
        let mut writer = Writer::new(Vec::new());
        writer.device(Path::new("/console"), (5, 1)).unwrap();
        let archive = writer.finish().unwrap();
        let fields = [0, 0o2_0600, 0, 0, 1, 0, 0, 0, 0, 5, 1, 8, 0];
        let fields: String = fields.iter().map(|field| format!("{field:08X}")).collect();
        let header = format!("070701{fields}console\0");
        assert_eq!(&String::from_utf8_lossy(&archive)[..header.len()], header);
    }

    #[test]
    fn a_damaged_archive_is_refused() {
        let good = archive();
        assert!(read(&good[..good.len() - 130], MOST).is_err(), "cut short");
        assert!(read(&good[..], 14).is_err(), "more than may be read");
        assert!(read(&good[..], 15).is_ok());
        let mut magic = good.clone();
        magic[0] = b'1';
        assert!(read(&magic[..], MOST).is_err(), "no archive");
        let mut length = good;
        // The digits of the first name's length.
        length[6 + 8 * NAME_SIZE..6 + 8 * (NAME_SIZE + 1)].copy_from_slice(b"FFFFFFFF");
        assert!(read(&length[..], MOST).is_err(), "a name without end");
    }

    #[test]
    fn no_entry_leaves_the_root() {
        let mut writer = Writer::new(Vec::new());
        assert!(writer.file(Path::new("a/../../b"), false, b"").is_err());
        assert!(writer.folder(Path::new("..")).is_err());
        writer.entry(Path::new("../b"), FILE | 0o644, (0, 0), b"x").unwrap();
        assert!(read(&writer.finish().unwrap()[..], MOST).is_err());
    }
}
