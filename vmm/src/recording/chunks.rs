//! The file: a head, then chunks, each with its length, its kind and a checksum in front.
//!
//! The head says how many bytes of the file can be read: it is written again after each chunk behind
//! which a reader may stop. What a run that was killed left behind that is not looked at, and a file
//! that is shorter was cut off.

use super::codec::Source;
use super::{FORMAT, MAGIC, Problem, ReadError};
use flate2::Compression;
use flate2::read::DeflateDecoder;
use flate2::write::DeflateEncoder;
use lacuna_abi::ABI_VERSION;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes of the head: magic, format, version of the guest's interface, bytes that can be read.
pub(super) const HEAD: u64 = 32;
/// Where in it the bytes that can be read stand.
const COMMITTED: u64 = 24;
/// Bytes in front of a chunk: kind, number, bytes in the file, bytes unpacked, checksum.
const FRAME: u64 = 20;
/// Most bytes of a chunk, unpacked.
const MAX_CHUNK: usize = 4 << 20;
/// Bytes of a tape that make a chunk.
pub(super) const FULL: usize = 256 << 10;
/// Most bytes of a tape, unpacked.
pub(super) const MAX_TAPE: u64 = 16 << 30;

/// What a chunk holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(super) enum Kind {
    /// What is said once at the start.
    Setup = 1,
    /// A part of the tape.
    Tape = 2,
    /// What is said once at the end.
    End = 3,
}

/// Writes chunks.
pub(super) struct ChunkWriter {
    file: File,
    len: u64,
    index: u32,
    /// Length and number of chunks up to where a reader may stop.
    committed: (u64, u32),
}

impl ChunkWriter {
    /// Creates the file: a recording of nothing.
    pub(super) fn create(path: &Path) -> io::Result<Self> {
        let mut file = File::create(path)?;
        file.write_all(&head(HEAD))?;
        Ok(Self { file, len: HEAD, index: 0, committed: (HEAD, 0) })
    }

    /// Bytes in the file.
    pub(super) const fn len(&self) -> u64 {
        self.len
    }

    /// Appends a chunk.
    pub(super) fn chunk(&mut self, kind: Kind, bytes: &[u8]) -> io::Result<()> {
        let chunk = packed(kind, self.index, bytes)?;
        self.file.write_all(&chunk)?;
        self.len += chunk.len() as u64;
        self.index = self.index.wrapping_add(1);
        Ok(())
    }

    /// A reader may stop here.
    pub(super) fn commit(&mut self) -> io::Result<()> {
        self.committed = (self.len, self.index);
        self.file.write_all_at(&self.len.to_le_bytes(), COMMITTED)
    }

    /// Takes back what a reader would not look at.
    pub(super) fn rewind(&mut self) -> io::Result<()> {
        (self.len, self.index) = self.committed;
        self.file.set_len(self.len)?;
        self.file.seek(SeekFrom::Start(self.len)).map(|_| ())
    }
}

/// A file's head.
fn head(committed: u64) -> Vec<u8> {
    let words = [FORMAT, ABI_VERSION, committed];
    MAGIC.into_iter().chain(words.into_iter().flat_map(u64::to_le_bytes)).collect()
}

/// A chunk as it stands in the file.
fn packed(kind: Kind, index: u32, bytes: &[u8]) -> io::Result<Vec<u8>> {
    if bytes.len() > MAX_CHUNK {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "a part is too large"));
    }
    let mut encoder = DeflateEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes)?;
    let packed = encoder.finish()?;
    let mut chunk = Vec::with_capacity(packed.len() + 32);
    // Both are at most a little more than MAX_CHUNK.
    for word in [kind as u32, index, packed.len() as u32, bytes.len() as u32] {
        chunk.extend(word.to_le_bytes());
    }
    chunk.extend(checksum(&chunk, &packed).to_le_bytes());
    chunk.extend(packed);
    Ok(chunk)
}

/// A whole file of these chunks.
pub(super) fn file_of(chunks: &[(Kind, &[u8])]) -> io::Result<Vec<u8>> {
    let mut file = head(0);
    for (index, (kind, bytes)) in (0..).zip(chunks) {
        file.extend(packed(*kind, index, bytes)?);
    }
    let head = head(file.len() as u64);
    file[..head.len()].copy_from_slice(&head);
    Ok(file)
}

/// Checksum of a chunk: of what is in front of it, and of what is in the file.
fn checksum(frame: &[u8], packed: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(frame);
    hasher.update(packed);
    hasher.finalize()
}

/// Reads chunks, and the tape in them as bytes.
pub(super) struct ChunkReader<R> {
    from: R,
    /// Bytes read so far.
    offset: u64,
    committed: u64,
    index: u32,
    kind: Option<Kind>,
    chunk: Vec<u8>,
    at: usize,
    tape: u64,
}

impl<R: Read> ChunkReader<R> {
    /// Reads the head.
    pub(super) fn open(mut from: R) -> Result<Self, ReadError> {
        let mut head = [0; HEAD as usize];
        let error = |problem| ReadError::at(0, problem);
        from.read_exact(&mut head).map_err(|failed| {
            error(match failed.kind() {
                io::ErrorKind::UnexpectedEof => {
                    Problem::Foreign("this is no recording: it is shorter than a head".into())
                }
                _ => Problem::Unreadable(failed.to_string()),
            })
        })?;
        if head[..8] != MAGIC {
            let what = "this is no recording: it does not start with LACUNARC";
            return Err(error(Problem::Foreign(what.into())));
        }
        let word = |index: usize| {
            let bytes = head[8 * index..8 * index + 8].try_into();
            bytes.map_or(0, u64::from_le_bytes)
        };
        let [format, abi, committed] = [1, 2, 3].map(word);
        if format != FORMAT {
            let what = format!("a recording of format {format}; this lacuna reads {FORMAT}");
            return Err(error(Problem::Version(what)));
        }
        if abi != ABI_VERSION {
            let what = format!(
                "a recording of a guest of interface {abi}; this lacuna knows {ABI_VERSION}"
            );
            return Err(error(Problem::Version(what)));
        }
        if committed < HEAD {
            let what = format!("the head says that {committed} bytes can be read");
            return Err(error(Problem::Damaged(what)));
        }
        let (chunk, kind) = (Vec::new(), None);
        Ok(Self { from, offset: HEAD, committed, index: 0, kind, chunk, at: 0, tape: 0 })
    }

    /// Takes the next chunk; `None` where a reader may stop.
    pub(super) fn next(&mut self) -> Result<Option<Kind>, ReadError> {
        self.kind = None;
        self.chunk.clear();
        self.at = 0;
        let start = self.offset;
        let left = self.committed - start;
        if left == 0 {
            return Ok(None);
        }
        let damaged = |what: String| ReadError::at(start, Problem::Damaged(what));
        let mut frame = [0; FRAME as usize];
        if left < FRAME {
            return Err(damaged("it ends in the middle of a part".into()));
        }
        self.fill(&mut frame, start)?;
        let word = |index: usize| {
            let bytes = frame[4 * index..4 * index + 4].try_into();
            bytes.map_or(0, u32::from_le_bytes)
        };
        let [kind, index, packed, len, sum] = [0, 1, 2, 3, 4].map(word);
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        if len > MAX_CHUNK {
            let what = format!("a part says that it holds {len} bytes, more than any does");
            return Err(ReadError::at(start, Problem::Huge(what)));
        }
        if u64::from(packed) > left - FRAME {
            return Err(damaged(format!("a part of {packed} bytes reaches past the end")));
        }
        // At most what deflate makes of bytes that it cannot pack.
        if packed as usize > MAX_CHUNK + MAX_CHUNK / 64 {
            let what = format!("a part takes {packed} bytes, more than any does");
            return Err(ReadError::at(start, Problem::Huge(what)));
        }
        let mut stored = vec![0; packed as usize];
        self.fill(&mut stored, start)?;
        if checksum(&frame[..16], &stored) != sum {
            return Err(damaged("a part is not as it was written: its checksum differs".into()));
        }
        let known = [Kind::Setup, Kind::Tape, Kind::End];
        let kind = known.into_iter().find(|known| *known as u32 == kind);
        let kind = kind.ok_or_else(|| damaged("there is no such kind of part".into()))?;
        if index != self.index {
            return Err(damaged(format!("part {index} stands where part {} should", self.index)));
        }
        self.index = self.index.wrapping_add(1);
        // One byte more than it says would show that it holds more.
        let mut unpacked = DeflateDecoder::new(&stored[..]).take(len as u64 + 1);
        let read = unpacked.read_to_end(&mut self.chunk);
        if read.is_err() || self.chunk.len() != len {
            return Err(damaged(format!("a part does not unpack to the {len} bytes that it says")));
        }
        if kind == Kind::Tape {
            self.tape += len as u64;
            if self.tape > MAX_TAPE {
                let what = format!("the tape is longer than {MAX_TAPE} bytes");
                return Err(ReadError::at(start, Problem::Huge(what)));
            }
        }
        self.kind = Some(kind);
        Ok(Some(kind))
    }

    /// What the chunk holds.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.chunk
    }

    /// Whether the tape goes on; if not, the kind of what follows it.
    pub(super) fn goes_on(&mut self) -> Result<Result<(), Option<Kind>>, ReadError> {
        loop {
            match self.kind {
                Some(Kind::Tape) if self.at < self.chunk.len() => return Ok(Ok(())),
                Some(Kind::End) => return Ok(Err(Some(Kind::End))),
                _ => {}
            }
            match self.next()? {
                Some(Kind::Setup) => return Err(self.damaged("it is set up twice")),
                Some(_) => {}
                None => return Ok(Err(None)),
            }
        }
    }

    /// Nothing may follow.
    pub(super) fn over(&self) -> Result<(), ReadError> {
        if self.offset == self.committed {
            return Ok(());
        }
        Err(ReadError::at(self.offset, Problem::Damaged("something follows the end".into())))
    }

    fn fill(&mut self, bytes: &mut [u8], start: u64) -> Result<(), ReadError> {
        self.from.read_exact(bytes).map_err(|failed| {
            let problem = match failed.kind() {
                io::ErrorKind::UnexpectedEof => Problem::Damaged(format!(
                    "it is cut off: {} bytes were written, and it ends before",
                    self.committed
                )),
                _ => Problem::Unreadable(failed.to_string()),
            };
            ReadError::at(start, problem)
        })?;
        self.offset += bytes.len() as u64;
        Ok(())
    }
}

impl<R: Read> Source for ChunkReader<R> {
    fn byte(&mut self) -> Result<u8, ReadError> {
        loop {
            if self.kind == Some(Kind::Tape)
                && let Some(byte) = self.chunk.get(self.at)
            {
                self.at += 1;
                return Ok(*byte);
            }
            if self.kind == Some(Kind::End) || self.next()? != Some(Kind::Tape) {
                return Err(self.damaged("the tape ends in the middle of a call"));
            }
        }
    }

    fn damaged(&self, what: &str) -> ReadError {
        let what = format!("{what} (before here, {} bytes into a part unpacked)", self.at);
        ReadError::at(self.offset, Problem::Damaged(what))
    }

    fn huge(&self, what: &str) -> ReadError {
        ReadError::at(self.offset, Problem::Huge(what.to_owned()))
    }
}
