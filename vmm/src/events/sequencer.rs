//! Puts records in the order of their numbers and notices what is missing.

use super::waiting::Waiting;
use lacuna_abi::event::{Event, Intent, Record};

/// Largest number that is taken for one: no run gets there, a hostile guest's may.
const MAX_NUMBER: u64 = u64::MAX / 2;

/// Most records that wait for an owed number; past it the number counts as lost.
const MAX_WAITING: usize = 8192;

/// What stands at a number.
#[derive(Debug)]
enum Slot {
    Record(Record),
    /// The number of a grant whose record carries a later one, or of a write under way.
    Covered,
}

/// What a standing intent says about the number that it carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Standing {
    /// Its record will come: the CPU waits for room in its ring. What follows waits too.
    Owed,
    /// Its record will not come: the CPU was stopped for good.
    Final,
}

/// Records wait here until all smaller numbers are there.
#[derive(Debug)]
pub struct Sequencer {
    next: u64,
    waiting: Waiting<Slot>,
    lost: u64,
}

impl Default for Sequencer {
    fn default() -> Self {
        Self { next: 1, waiting: Waiting::new(1), lost: 0 }
    }
}

impl Sequencer {
    /// Events that are missing so far.
    #[must_use]
    pub const fn lost(&self) -> u64 {
        self.lost
    }

    /// Counts events that were lost before they had a number.
    pub const fn count_lost(&mut self, events: u64) {
        self.lost = self.lost.saturating_add(events);
    }

    /// Takes a record. The number of waiting ones is bounded by what the rings hold, because every
    /// look at the rings ends with [`Self::settle`].
    ///
    /// # Errors
    /// What is wrong with its number; the record is then left out.
    pub fn push(&mut self, record: Record) -> Result<(), String> {
        if let Event::EntryWrite(write) = &record.event
            && write.grant != 0
        {
            self.place(write.grant, Slot::Covered)?;
        }
        self.place(record.seq, Slot::Record(record))
    }

    fn place(&mut self, number: u64, slot: Slot) -> Result<(), String> {
        if number < self.next || number > MAX_NUMBER || self.waiting.contains(number) {
            self.lost = self.lost.saturating_add(1);
            return Err(format!("event number {number} came twice, too late, or is none"));
        }
        self.waiting.insert(number, slot);
        Ok(())
    }

    /// Hands out what is complete, in order.
    pub fn ready(&mut self) -> Vec<Record> {
        let mut ready = Vec::new();
        while let Some(slot) = self.waiting.take(self.next) {
            self.next += 1;
            if let Slot::Record(record) = slot {
                ready.push(record);
            }
        }
        ready
    }

    /// No vCPU runs: whatever number up to `last` is missing now will not come, unless one of the
    /// `intents` accounts for it. Hands out the rest, and says what is missing.
    pub fn settle(
        &mut self,
        last: u64,
        intents: impl IntoIterator<Item = Intent>,
        standing: Standing,
    ) -> (Vec<Record>, Vec<String>) {
        let last = last.min(MAX_NUMBER);
        let numbers = intents.into_iter().flat_map(|intent| [intent.seq, intent.write.grant]);
        let patient = self.waiting.len() <= MAX_WAITING;
        let owed: Vec<_> = numbers.filter(|n| patient && *n >= self.next && *n <= last).collect();
        if standing == Standing::Final {
            for number in &owed {
                if !self.waiting.contains(*number) {
                    self.waiting.insert(*number, Slot::Covered);
                }
            }
        }
        let mut records = self.ready();
        let mut gaps = Vec::new();
        while self.next <= last {
            if standing == Standing::Owed && owed.contains(&self.next) {
                break;
            }
            let waiting = self.waiting.first().unwrap_or(last + 1);
            let owed = owed.iter().copied().filter(|n| *n > self.next).min().unwrap_or(last + 1);
            let until = waiting.min(owed).min(last + 1);
            gaps.push(format!("events {} to {} are missing", self.next, until - 1));
            self.lost = self.lost.saturating_add(until - self.next);
            self.next = until;
            records.extend(self.ready());
        }
        // A guest that numbers its events beyond what was ever handed out.
        while self.next > last
            && let Some(first) = self.waiting.first()
        {
            gaps.push(format!("events {} to {} are missing", self.next, first - 1));
            self.lost = self.lost.saturating_add(first - self.next);
            self.next = first;
            records.extend(self.ready());
        }
        (records, gaps)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_abi::addr::{Gpa, Gva};
    use lacuna_abi::event::{EntryWrite, Flush};
    use lacuna_abi::paging::{Entry, Level};

    fn record(seq: u64) -> Record {
        Record { seq, cpu: 0, event: Event::Flush(Flush::Everything) }
    }

    fn write(grant: u64) -> EntryWrite {
        EntryWrite {
            root: Gpa(0),
            pcid: 0,
            va: Gva(0),
            level: Level::Pt,
            count: 1,
            old: Entry(1),
            new: Entry(3),
            grant,
        }
    }

    fn numbers(records: &[Record]) -> Vec<u64> {
        records.iter().map(|r| r.seq).collect()
    }

    #[test]
    fn records_wait_for_smaller_numbers() {
        let mut sequencer = Sequencer::default();
        sequencer.push(record(2)).unwrap();
        assert!(sequencer.ready().is_empty());
        sequencer.push(record(1)).unwrap();
        assert_eq!(numbers(&sequencer.ready()), [1, 2]);
        assert_eq!(sequencer.settle(2, [], Standing::Final).1, Vec::<String>::new());
        assert_eq!(sequencer.lost(), 0);
    }

    #[test]
    fn a_gap_is_counted_and_said() {
        let mut sequencer = Sequencer::default();
        sequencer.push(record(3)).unwrap();
        let (records, gaps) = sequencer.settle(5, [], Standing::Final);
        assert_eq!(numbers(&records), [3]);
        assert_eq!(gaps, ["events 1 to 2 are missing", "events 4 to 5 are missing"]);
        assert_eq!(sequencer.lost(), 4);
    }

    #[test]
    fn a_number_that_came_before_is_refused() {
        let mut sequencer = Sequencer::default();
        sequencer.push(record(1)).unwrap();
        sequencer.ready();
        assert!(sequencer.push(record(1)).is_err());
        sequencer.push(record(9)).unwrap();
        assert!(sequencer.push(record(9)).is_err());
        assert_eq!(sequencer.lost(), 2);
    }

    #[test]
    fn a_remap_accounts_for_both_of_its_numbers() {
        let mut sequencer = Sequencer::default();
        let remap = Record { seq: 3, cpu: 0, event: Event::EntryWrite(write(1)) };
        sequencer.push(remap).unwrap();
        sequencer.push(record(2)).unwrap();
        assert_eq!(numbers(&sequencer.ready()), [2, 3]);
        assert_eq!(sequencer.settle(3, [], Standing::Final).1.len(), 0);
    }

    #[test]
    fn a_standing_intent_accounts_for_its_number() {
        let mut sequencer = Sequencer::default();
        let intent = Intent { write: write(0), seq: 1 };
        sequencer.push(record(2)).unwrap();
        let (records, gaps) = sequencer.settle(2, [intent], Standing::Final);
        assert_eq!((numbers(&records), gaps.len()), (vec![2], 0));
    }

    #[test]
    fn an_owed_number_holds_back_what_follows_until_it_comes() {
        let mut sequencer = Sequencer::default();
        let intent = Intent { write: write(0), seq: 2 };
        sequencer.push(record(1)).unwrap();
        sequencer.push(record(3)).unwrap();
        let (records, gaps) = sequencer.settle(3, [intent], Standing::Owed);
        assert_eq!((numbers(&records), gaps.len()), (vec![1], 0));
        sequencer.push(record(2)).unwrap();
        let (records, gaps) = sequencer.settle(3, [], Standing::Owed);
        assert_eq!((numbers(&records), gaps.len()), (vec![2, 3], 0));
        assert_eq!(sequencer.lost(), 0);
    }

    #[test]
    fn an_owed_number_that_never_comes_is_lost() {
        let mut sequencer = Sequencer::default();
        let intent = Intent { write: write(0), seq: 1 };
        sequencer.push(record(2)).unwrap();
        assert_eq!(sequencer.settle(2, [intent], Standing::Owed).0, []);
        let (records, gaps) = sequencer.settle(2, [], Standing::Owed);
        assert_eq!((numbers(&records), gaps.len()), (vec![2], 1));
        assert_eq!(sequencer.lost(), 1);
    }

    #[test]
    fn numbers_that_jump_far_are_a_gap_and_cost_nothing() {
        let mut sequencer = Sequencer::default();
        sequencer.push(record(MAX_NUMBER)).unwrap();
        assert!(sequencer.push(record(u64::MAX)).is_err());
        let (records, gaps) = sequencer.settle(u64::MAX, [], Standing::Final);
        assert_eq!((records.len(), gaps.len()), (1, 1));
        assert!(sequencer.push(record(7)).is_err());
        assert_eq!(sequencer.settle(u64::MAX, [], Standing::Final).1.len(), 0);
    }
}
