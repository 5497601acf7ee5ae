//! One CPU's event ring as the host reads it.

use crate::machine::memory::{Memory, MemoryError};
use lacuna_abi::addr::{Gpa, PAGE_SIZE};
use lacuna_abi::event::{
    Event, INTENT_WORDS, Intent, RECORD_WORDS, RING_BUSY_WORD, RING_HEAD_WORD, RING_INTENT_WORD,
    RING_RECORDS, RING_TAIL_WORD, Record,
};
use lacuna_abi::layout::ring_offset;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Acquire;

/// Words of all records of a ring.
const WORDS: usize = RING_RECORDS as usize * RECORD_WORDS;

/// The host's side of a ring. The tail is the host's own: what the guest writes over the copy in
/// shared memory changes only the guest's view.
#[derive(Debug)]
pub struct RingReader {
    cpu: u8,
    control: Gpa,
    tail: u64,
    /// What the last look brought; kept for its room.
    drained: Drained,
}

/// What one look at a ring brought.
#[derive(Debug, Default)]
pub struct Drained {
    /// Records in the order of the ring.
    pub records: Vec<Record>,
    /// Why records are missing, if any are.
    pub lost: Vec<String>,
}

impl RingReader {
    /// The ring of `cpu`.
    #[must_use]
    pub fn new(memory: &Memory, cpu: u8) -> Self {
        let control = memory.layout().shared.gpa.wrapping_add(ring_offset(usize::from(cpu)));
        Self { cpu, control, tail: 0, drained: Drained::default() }
    }

    /// Takes everything that the guest has published: at most one ring's worth.
    ///
    /// # Errors
    /// [`MemoryError`] if the shared region cannot be read: a fault of the VMM.
    pub fn drain(&mut self, memory: &Memory) -> Result<&mut Drained, MemoryError> {
        self.drained.records.clear();
        self.drained.lost.clear();
        let head = memory.load(self.word(RING_HEAD_WORD))?;
        let published = head.wrapping_sub(self.tail);
        if published > RING_RECORDS {
            self.drained.lost.push(format!(
                "CPU {}'s event ring jumped from record {} to {head}",
                self.cpu, self.tail
            ));
            self.tail = head;
        }
        let records = memory.words(self.control.wrapping_add(PAGE_SIZE), WORDS)?;
        while self.tail != head {
            match self.record(records, self.tail) {
                Ok(record) => self.drained.records.push(record),
                Err(why) => self.drained.lost.push(why),
            }
            self.tail = self.tail.wrapping_add(1);
        }
        memory.store(self.word(RING_TAIL_WORD), self.tail)?;
        Ok(&mut self.drained)
    }

    /// Whether the CPU says that it may hold a number whose record it has not published.
    ///
    /// # Errors
    /// [`MemoryError`] as [`Self::drain`].
    pub fn is_busy(&self, memory: &Memory) -> Result<bool, MemoryError> {
        Ok(memory.load(self.word(RING_BUSY_WORD))? != 0)
    }

    /// The write that the CPU has under way, if any.
    ///
    /// # Errors
    /// [`MemoryError`] as [`Self::drain`]; an intent that makes no sense is the inner error.
    pub fn intent(&self, memory: &Memory) -> Result<Result<Option<Intent>, String>, MemoryError> {
        let words = memory.load_words::<INTENT_WORDS>(self.word(RING_INTENT_WORD))?;
        Ok(Intent::from_words(&words)
            .map_err(|bad| format!("CPU {}'s intent makes no sense: {bad:?}", self.cpu)))
    }

    /// The record with this number, of all of the ring's words, each read once.
    fn record(&self, records: &[AtomicU64], index: u64) -> Result<Record, String> {
        // Below the ring's number of records, 1024.
        let first = (index % RING_RECORDS) as usize * RECORD_WORDS;
        let mut words = [0; RECORD_WORDS];
        for (word, place) in words.iter_mut().zip(&records[first..]) {
            *word = place.load(Acquire);
        }
        match Record::from_words(&words) {
            Ok(Record { event: Event::Host(..) | Event::Seen(_), .. }) => Err(format!(
                "record {index} in CPU {}'s event ring claims to be the host's",
                self.cpu
            )),
            Ok(record) if record.cpu == self.cpu => Ok(record),
            Ok(record) => Err(format!(
                "record {index} in CPU {}'s event ring says it is CPU {}'s",
                self.cpu, record.cpu
            )),
            Err(bad) => Err(format!("record {index} in CPU {}'s event ring: {bad:?}", self.cpu)),
        }
    }

    const fn word(&self, word: usize) -> Gpa {
        self.control.wrapping_add(8 * word as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_abi::addr::{FrameRange, Gfn};
    use lacuna_abi::event::{Flush, HostAct, RECORD_BYTES, Sighting};
    use lacuna_abi::layout::{Layout, Needs};

    fn memory() -> Memory {
        let needs = Needs { image: 4096, memory_mib: 16, cpus: 2, input: 0, scratch: 0 };
        Memory::new(Layout::new(&needs).unwrap()).unwrap()
    }

    fn put(memory: &Memory, reader: &RingReader, index: u64, record: &Record) {
        let at = reader.control.wrapping_add(PAGE_SIZE + index % RING_RECORDS * RECORD_BYTES);
        memory.store_words(at, &record.to_words()).unwrap();
        memory.store(reader.word(RING_HEAD_WORD), index + 1).unwrap();
    }

    fn flush(seq: u64, cpu: u8) -> Record {
        Record { seq, cpu, site: 0, event: Event::Flush(Flush::Everything) }
    }

    #[test]
    fn records_come_out_once_and_in_order_across_the_wrap() {
        let memory = memory();
        let mut reader = RingReader::new(&memory, 1);
        let mut got = Vec::new();
        for index in 0..RING_RECORDS + 5 {
            put(&memory, &reader, index, &flush(index + 1, 1));
            if index % 7 == 0 {
                got.append(&mut reader.drain(&memory).unwrap().records);
            }
        }
        got.append(&mut reader.drain(&memory).unwrap().records);
        assert!(got.iter().map(|r| r.seq).eq(1..=RING_RECORDS + 5));
        assert!(reader.drain(&memory).unwrap().records.is_empty());
    }

    #[test]
    fn a_jump_garbage_and_a_foreign_record_are_said() {
        let memory = memory();
        let mut reader = RingReader::new(&memory, 0);
        put(&memory, &reader, 0, &flush(1, 1));
        assert!(reader.drain(&memory).unwrap().lost[0].contains("says it is CPU 1's"));
        memory.store(reader.word(RING_HEAD_WORD), 2).unwrap();
        assert!(reader.drain(&memory).unwrap().lost[0].contains("Torn"));
        let forged = Event::Host(HostAct::Sealed, FrameRange::single(Gfn(4 << 18)));
        put(&memory, &reader, 2, &Record { seq: 3, cpu: 0, site: 0, event: forged });
        assert!(reader.drain(&memory).unwrap().lost[0].contains("claims to be the host's"));
        let forged = Event::Seen(Sighting::Flush(Flush::Everything));
        put(&memory, &reader, 3, &Record { seq: 4, cpu: 0, site: 0, event: forged });
        assert!(reader.drain(&memory).unwrap().lost[0].contains("claims to be the host's"));
        memory.store(reader.word(RING_HEAD_WORD), u64::MAX).unwrap();
        assert!(reader.drain(&memory).unwrap().lost[0].contains("jumped"));
        assert!(reader.drain(&memory).unwrap().lost.is_empty());
    }
}
