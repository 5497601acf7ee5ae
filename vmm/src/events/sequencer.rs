//! Puts records in the order of their numbers and notices what is missing.

use super::waiting::Waiting;
use lacuna_abi::event::{Event, Intent, Record, Sighting};

/// Largest number that is taken for one: no run gets there, a hostile guest's may.
const MAX_NUMBER: u64 = u64::MAX / 2;

/// Most records that wait for an owed number; past it the number counts as lost.
const MAX_WAITING: usize = 16 << 10;

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
    /// Its record will come: the CPU waits for room in its ring, or was stopped and goes on. What
    /// follows waits too.
    Owed,
    /// Its record will not come: the CPU was stopped for good.
    Final,
}

/// Records wait here until all smaller numbers are there.
#[derive(Debug)]
pub struct Sequencer {
    /// The first number that has neither been handed out nor is in `run`.
    next: u64,
    /// Records with all smaller numbers before them: what one CPU records comes in order.
    run: Vec<Record>,
    /// What came before a smaller number did.
    waiting: Waiting<Slot>,
    lost: u64,
}

impl Default for Sequencer {
    fn default() -> Self {
        Self { next: 1, run: Vec::new(), waiting: Waiting::new(1), lost: 0 }
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

    /// Takes a record; `given` is the last number that was given out, looked at after the record
    /// was. The number of waiting ones is bounded by what the rings hold, because every look at the
    /// rings ends with [`Self::settle`], up to a number that was given out before it.
    ///
    /// # Errors
    /// What is wrong with its number; the record is then left out.
    pub fn push(&mut self, record: Record, given: u64) -> Result<(), String> {
        let grant = match &record.event {
            Event::EntryWrite(write) => write.grant,
            Event::Seen(Sighting::Stores(stores)) => stores.grant,
            _ => 0,
        };
        if grant != 0 {
            self.place(grant, given, Slot::Covered)?;
        }
        self.place(record.seq, given, Slot::Record(record))
    }

    fn place(&mut self, number: u64, given: u64, slot: Slot) -> Result<(), String> {
        let known = number <= given.min(MAX_NUMBER);
        if number == self.next && known && self.waiting.is_empty() {
            self.next += 1;
            if let Slot::Record(record) = slot {
                self.run.push(record);
            }
            return Ok(());
        }
        if number < self.next || !known || self.waiting.contains(number) {
            self.lost = self.lost.saturating_add(1);
            let why = if known { "came twice or too late" } else { "was never given out" };
            return Err(format!("event number {number} {why}"));
        }
        self.waiting.pass(self.next);
        self.waiting.insert(number, slot);
        Ok(())
    }

    /// How many of the numbers up to `last` have not come.
    #[must_use]
    pub fn missing(&self, last: u64) -> u64 {
        let last = last.min(MAX_NUMBER);
        if self.next > last {
            return 0;
        }
        let there = self.waiting.count(self.next, last);
        (last - self.next + 1).saturating_sub(u64::try_from(there).unwrap_or(u64::MAX))
    }

    /// Hands out what is complete up to `last`, in order. What comes after it waits, so that what
    /// is handed out now depends on `last` alone and not on how far other CPUs have got.
    fn ready(&mut self, last: u64, ready: &mut Vec<Record>) {
        while self.next <= last
            && let Some(slot) = self.waiting.take(self.next)
        {
            self.next += 1;
            if let Slot::Record(record) = slot {
                ready.push(record);
            }
        }
    }

    /// Whatever number up to `last` is missing now will not come, unless one of the `intents`
    /// accounts for it. Puts all that came up to `last`, or to the first number that is still owed,
    /// in place of what `records` held, and says what is missing.
    pub fn settle(
        &mut self,
        last: u64,
        intents: &[(Intent, Standing)],
        records: &mut Vec<Record>,
    ) -> Vec<String> {
        let last = last.min(MAX_NUMBER);
        let patient = self.waiting.len() <= MAX_WAITING;
        let mut owed = Vec::new();
        for (intent, standing) in intents.iter().filter(|_| patient) {
            let numbers = [intent.seq, intent.write.grant];
            for number in numbers.into_iter().filter(|n| *n >= self.next && *n <= last) {
                match standing {
                    Standing::Owed => owed.push(number),
                    Standing::Final if self.waiting.contains(number) => {}
                    Standing::Final => self.waiting.insert(number, Slot::Covered),
                }
            }
        }
        records.clear();
        std::mem::swap(records, &mut self.run);
        let later = records.partition_point(|record| record.seq <= last);
        self.run.extend(records.drain(later..));
        self.ready(last, records);
        let mut gaps = Vec::new();
        while self.next <= last && !owed.contains(&self.next) {
            let waiting = self.waiting.first().unwrap_or(last + 1);
            let owed = owed.iter().copied().filter(|n| *n > self.next).min().unwrap_or(last + 1);
            let until = waiting.min(owed).min(last + 1);
            gaps.push(format!("events {} to {} are missing", self.next, until - 1));
            self.lost = self.lost.saturating_add(until - self.next);
            self.next = until;
            self.ready(last, records);
        }
        gaps
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_abi::addr::{Gpa, Gva};
    use lacuna_abi::event::{EntryStores, EntryWrite, Flush};
    use lacuna_abi::paging::{Entry, Level};

    fn record(seq: u64) -> Record {
        Record { seq, cpu: 0, site: 0, event: Event::Flush(Flush::Everything) }
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

    fn push(sequencer: &mut Sequencer, record: Record) {
        sequencer.push(record, 100).unwrap();
    }

    fn settle(sequencer: &mut Sequencer, last: u64) -> (Vec<u64>, Vec<String>) {
        settle_with(sequencer, last, &[])
    }

    fn settle_with(
        sequencer: &mut Sequencer,
        last: u64,
        intents: &[(Intent, Standing)],
    ) -> (Vec<u64>, Vec<String>) {
        let mut records = vec![record(99)];
        let gaps = sequencer.settle(last, intents, &mut records);
        (numbers(&records), gaps)
    }

    #[test]
    fn records_wait_for_smaller_numbers() {
        let mut sequencer = Sequencer::default();
        push(&mut sequencer, record(2));
        assert_eq!((sequencer.missing(2), sequencer.missing(3)), (1, 2));
        push(&mut sequencer, record(1));
        assert_eq!((sequencer.missing(2), sequencer.missing(3)), (0, 1));
        assert_eq!(settle(&mut sequencer, 2), (vec![1, 2], vec![]));
        assert_eq!((sequencer.missing(2), sequencer.lost()), (0, 0));
    }

    #[test]
    fn what_comes_after_the_last_number_waits_for_the_next_time() {
        let mut sequencer = Sequencer::default();
        for seq in [4, 1, 3] {
            push(&mut sequencer, record(seq));
        }
        assert_eq!(settle(&mut sequencer, 1), (vec![1], vec![]));
        push(&mut sequencer, record(2));
        assert_eq!(settle(&mut sequencer, 4), (vec![2, 3, 4], vec![]));
        assert_eq!(sequencer.lost(), 0);
    }

    #[test]
    fn what_came_in_order_waits_too_if_it_comes_after_the_last_number() {
        let mut sequencer = Sequencer::default();
        for seq in [1, 2, 3, 6] {
            push(&mut sequencer, record(seq));
        }
        assert_eq!(settle(&mut sequencer, 1), (vec![1], vec![]));
        assert!(sequencer.push(record(2), 100).unwrap_err().contains("came twice"));
        push(&mut sequencer, record(5));
        push(&mut sequencer, record(4));
        assert_eq!((sequencer.missing(6), sequencer.missing(7)), (0, 1));
        assert_eq!(settle(&mut sequencer, 6), (vec![2, 3, 4, 5, 6], vec![]));
    }

    #[test]
    fn a_gap_is_counted_and_said() {
        let mut sequencer = Sequencer::default();
        push(&mut sequencer, record(3));
        let gaps = ["events 1 to 2 are missing", "events 4 to 5 are missing"].map(str::to_owned);
        assert_eq!(settle(&mut sequencer, 5), (vec![3], gaps.to_vec()));
        assert_eq!(sequencer.lost(), 4);
    }

    #[test]
    fn a_number_that_came_before_or_was_never_given_out_is_refused() {
        let mut sequencer = Sequencer::default();
        push(&mut sequencer, record(1));
        settle(&mut sequencer, 1);
        assert!(sequencer.push(record(1), 100).is_err());
        push(&mut sequencer, record(9));
        assert!(sequencer.push(record(9), 100).is_err());
        assert!(sequencer.push(record(12), 11).unwrap_err().contains("never given out"));
        assert_eq!(sequencer.lost(), 3);
    }

    #[test]
    fn a_remap_accounts_for_both_of_its_numbers() {
        let mut sequencer = Sequencer::default();
        push(
            &mut sequencer,
            Record { seq: 3, cpu: 0, site: 0, event: Event::EntryWrite(write(1)) },
        );
        push(&mut sequencer, record(2));
        assert_eq!(settle(&mut sequencer, 3), (vec![2, 3], vec![]));
    }

    #[test]
    fn so_does_one_that_was_seen() {
        let mut sequencer = Sequencer::default();
        let EntryWrite { level, count, old, new, grant, .. } = write(1);
        let stores = EntryStores { at: Gpa(0), level, count, old, new, grant };
        let event = Event::Seen(Sighting::Stores(stores));
        push(&mut sequencer, Record { seq: 2, cpu: 0, site: 0, event });
        assert_eq!(settle(&mut sequencer, 2), (vec![2], vec![]));
    }

    #[test]
    fn a_standing_intent_accounts_for_its_number() {
        let mut sequencer = Sequencer::default();
        let intent = Intent { write: write(0), seq: 1 };
        push(&mut sequencer, record(2));
        let intents = [(intent, Standing::Final)];
        assert_eq!(settle_with(&mut sequencer, 2, &intents), (vec![2], vec![]));
    }

    #[test]
    fn an_owed_number_holds_back_what_follows_until_it_comes() {
        let mut sequencer = Sequencer::default();
        let intent = (Intent { write: write(0), seq: 2 }, Standing::Owed);
        push(&mut sequencer, record(1));
        push(&mut sequencer, record(3));
        assert_eq!(settle_with(&mut sequencer, 3, &[intent]), (vec![1], vec![]));
        push(&mut sequencer, record(2));
        assert_eq!(settle(&mut sequencer, 3), (vec![2, 3], vec![]));
        assert_eq!(sequencer.lost(), 0);
    }

    #[test]
    fn an_owed_number_that_never_comes_is_lost() {
        let mut sequencer = Sequencer::default();
        let intent = (Intent { write: write(0), seq: 1 }, Standing::Owed);
        push(&mut sequencer, record(2));
        assert!(settle_with(&mut sequencer, 2, &[intent]).0.is_empty());
        assert_eq!(settle(&mut sequencer, 2).0, [2]);
        assert_eq!(sequencer.lost(), 1);
    }

    #[test]
    fn numbers_that_jump_far_are_a_gap_and_cost_nothing() {
        let mut sequencer = Sequencer::default();
        sequencer.push(record(MAX_NUMBER), u64::MAX).unwrap();
        assert!(sequencer.push(record(u64::MAX), u64::MAX).is_err());
        assert_eq!(sequencer.missing(u64::MAX), MAX_NUMBER - 1);
        let (records, gaps) = settle(&mut sequencer, u64::MAX);
        assert_eq!((records.len(), gaps.len()), (1, 1));
        assert!(sequencer.push(record(7), u64::MAX).is_err());
        assert_eq!(settle(&mut sequencer, u64::MAX).1.len(), 0);
    }
}
