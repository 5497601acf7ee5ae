//! The last records and acts of the host, so that the story of a violation can be told when it is
//! found. Adding one costs a copy; memory is flat.

use lacuna_abi::event::{Event, Record};

/// Records that are kept.
const KEPT: usize = 1 << 16;

/// The last records that were judged, and what the host did in between.
#[derive(Clone, Debug, Default)]
pub(super) struct History {
    /// A ring once it is full.
    records: Vec<Record>,
    /// Where the next one goes; the oldest lies there.
    next: usize,
    /// Whether records had to go.
    cut: bool,
}

impl History {
    /// Adds a record; the oldest makes room.
    #[inline]
    pub(super) fn push(&mut self, record: &Record) {
        if self.records.len() < KEPT {
            self.records.push(*record);
            return;
        }
        self.records[self.next] = *record;
        self.cut = true;
        self.next = (self.next + 1) % KEPT;
    }

    /// What is kept, the newest first.
    pub(super) fn back(&self) -> impl Iterator<Item = &Record> {
        let (newer, older) = self.records.split_at(self.next);
        newer.iter().rev().chain(older.iter().rev())
    }

    /// Number of the oldest record, if older ones are not kept any more.
    pub(super) fn begins_at(&self) -> Option<u64> {
        self.records.get(self.next).filter(|_| self.cut).map(|record| record.seq)
    }

    /// The guest's record with this number.
    pub(super) fn get(&self, seq: u64) -> Option<&Record> {
        self.back().find(|record| record.seq == seq && !matches!(record.event, Event::Host(..)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_abi::event::Flush;

    fn record(seq: u64) -> Record {
        Record { seq, cpu: 0, site: 0, event: Event::Flush(Flush::Everything) }
    }

    #[test]
    fn the_last_records_are_kept_in_order_and_memory_is_flat() {
        let mut history = History::default();
        assert_eq!((history.back().count(), history.begins_at()), (0, None));
        let kept = u64::try_from(KEPT).unwrap();
        for seq in 1..=kept {
            history.push(&record(seq));
        }
        let memory = history.records.capacity();
        assert_eq!(history.begins_at(), None, "there was room for all");
        for seq in kept + 1..=3 * kept + 5 {
            history.push(&record(seq));
        }
        assert_eq!(history.records.capacity(), memory);
        assert_eq!(history.begins_at(), Some(2 * kept + 6));
        assert!(history.back().map(|r| r.seq).eq((2 * kept + 6..=3 * kept + 5).rev()));
        assert_eq!(history.get(2 * kept + 6), Some(&record(2 * kept + 6)));
        assert_eq!(history.get(5), None);
    }
}
