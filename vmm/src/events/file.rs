//! The events file: a head that names format and version, then records as in the ring.

use lacuna_abi::ABI_VERSION;
use lacuna_abi::event::{BadRecord, RECORD_BYTES, RECORD_WORDS, Record};
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::path::Path;

/// First eight bytes of an events file.
pub const EVENTS_MAGIC: &[u8; 8] = b"LACUNAEV";
/// Bytes in front of the first record: magic, version.
const HEAD_BYTES: u64 = 16;

/// Writes records, up to a bound.
#[derive(Debug)]
pub struct EventFile {
    out: BufWriter<File>,
    left: u64,
    cut: u64,
}

impl EventFile {
    /// Creates the file, for at most `limit` bytes.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn create(path: &Path, limit: u64) -> io::Result<Self> {
        let mut out = BufWriter::new(File::create(path)?);
        out.write_all(EVENTS_MAGIC)?;
        out.write_all(&ABI_VERSION.to_le_bytes())?;
        Ok(Self { out, left: limit.saturating_sub(HEAD_BYTES), cut: 0 })
    }

    /// Appends a record; past the bound it is counted instead.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn push(&mut self, record: &Record) -> io::Result<()> {
        if self.left < RECORD_BYTES {
            self.cut += 1;
            return Ok(());
        }
        self.left -= RECORD_BYTES;
        for word in record.to_words() {
            self.out.write_all(&word.to_le_bytes())?;
        }
        Ok(())
    }

    /// Writes what is buffered; says how many records did not fit.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn finish(mut self) -> io::Result<u64> {
        self.out.flush()?;
        Ok(self.cut)
    }
}

/// Reads an events file.
///
/// # Errors
/// A text that says what is wrong: no events file, another version, a record that is cut off or
/// makes no sense.
pub fn read_events(mut from: impl Read, each: &mut dyn FnMut(Record)) -> Result<(), String> {
    let mut head = [0; HEAD_BYTES as usize];
    from.read_exact(&mut head).map_err(|error| format!("no events file: {error}"))?;
    let (magic, version) = head.split_at(8);
    if magic != EVENTS_MAGIC {
        return Err("no events file: it does not start with LACUNAEV".into());
    }
    if version != ABI_VERSION.to_le_bytes() {
        return Err(format!("events of another version than {ABI_VERSION}"));
    }
    let mut bytes = [0; RECORD_BYTES as usize];
    for index in 0_u64.. {
        match from.read(&mut bytes[..1]) {
            Ok(0) => break,
            Ok(_) => {}
            Err(error) => return Err(format!("record {index}: {error}")),
        }
        from.read_exact(&mut bytes[1..]).map_err(|_| format!("record {index} is cut off"))?;
        let mut words = [0; RECORD_WORDS];
        for (word, chunk) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = chunk.try_into().map_or(0, u64::from_le_bytes);
        }
        let bad = |bad: BadRecord| format!("record {index} makes no sense: {bad:?}");
        each(Record::from_words(&words).map_err(bad)?);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_abi::event::{Event, Flush};

    fn record(seq: u64) -> Record {
        Record { seq, cpu: 0, site: 0, event: Event::Flush(Flush::NonGlobal) }
    }

    #[test]
    fn a_file_is_read_back_and_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.bin");
        let mut file = EventFile::create(&path, HEAD_BYTES + 3 * RECORD_BYTES + 1).unwrap();
        for seq in 1..=5 {
            file.push(&record(seq)).unwrap();
        }
        assert_eq!(file.finish().unwrap(), 2);
        let mut got = Vec::new();
        read_events(File::open(&path).unwrap(), &mut |r| got.push(r.seq)).unwrap();
        assert_eq!(got, [1, 2, 3]);
    }

    #[test]
    fn foreign_and_damaged_files_are_refused() {
        let read = |bytes: &[u8]| read_events(bytes, &mut |_| ()).unwrap_err();
        assert!(read(b"short").contains("no events file"));
        assert!(read(&[0; 32]).contains("does not start with"));
        let mut file = EVENTS_MAGIC.to_vec();
        file.extend([9; 8]);
        assert!(read(&file).contains("another version"));
        file.truncate(8);
        file.extend(ABI_VERSION.to_le_bytes());
        file.extend([1; 30]);
        assert!(read(&file).contains("cut off"));
        file.extend([1; 34]);
        assert!(read(&file).contains("makes no sense"));
    }
}
