//! Stories of accesses that went where nothing led: what was last said of the address, and what the
//! CPU invalidated since.

use super::{Finding, Step, Teller, What, ends, note, place_in_run, step, words};
use lacuna_abi::event::{Event, Record};

/// Most records of the entry that are told: the grant, the change, and one before.
const WRITES: usize = 3;

impl Teller<'_> {
    /// The last records of the entry, and in between all that the finding's CPU invalidated.
    pub(super) fn observed(&self, finding: &Finding) -> Vec<Step> {
        let (Some(va), end) = (finding.va, self.end(finding)) else { return Vec::new() };
        let written = |record: &&Record| match &record.event {
            Event::EntryWrite(write) => {
                finding.root.is_none_or(|root| root == write.root)
                    && place_in_run(write, va).is_some()
            }
            _ => false,
        };
        let before = || self.history.back().filter(|record| record.seq < end);
        let mut records: Vec<&Record> = before().filter(written).take(WRITES).collect();
        if records.is_empty() {
            return self.records_of_entry(finding);
        }
        let since = records.iter().map(|record| record.seq).min().unwrap_or(end);
        let flushed = |record: &&Record| {
            let invalidates = matches!(
                record.event,
                Event::Flush(_) | Event::Control { .. } | Event::RootLoad { .. }
            );
            record.seq > since && Some(record.cpu) == finding.cpu && invalidates
        };
        records.extend(before().filter(flushed));
        records.sort_by_key(|record| record.seq);
        let tell = |record: &&Record| match &record.event {
            Event::EntryWrite(write) => step(record, What::Recorded, words::write(write, va)),
            _ => step(record, What::Flush, words::record(record)),
        };
        let (first, left, last) = ends(records);
        let out = (left > 0).then(|| note(What::LeftOut, format!("{left} more records of these")));
        first.iter().map(tell).chain(out).chain(last.iter().map(tell)).collect()
    }
}
