//! Stories of frames, entries and registers: what was last said of them.

use super::{Finding, Step, Teller, What, note, step, words};
use lacuna_abi::event::{ControlRegister, Event, HostAct, Record};

/// Most steps in the life of a frame that are told.
const LIFE: usize = 6;

impl Teller<'_> {
    /// The last steps in the life of the finding's frame: what the guest reported of it and what
    /// the host did.
    pub(super) fn life_of(&self, finding: &Finding) -> Vec<Step> {
        let Some(frame) = finding.frame else { return Vec::new() };
        let end = self.end(finding);
        let about = |record: &Record| match record.event {
            Event::Host(act, frames) if frames.contains(frame) => Some(match act {
                HostAct::Opened => What::Opened,
                HostAct::Released => What::Released,
                _ => What::Sealed,
            }),
            Event::Life(_, frames) if frames.contains(frame) => Some(What::Life),
            _ => None,
        };
        let records = self.history.back().filter(|record| record.seq < end);
        let mut told: Vec<Step> = records
            .filter_map(|record| {
                about(record).map(|what| step(record, what, words::record(record)))
            })
            .take(LIFE + 1)
            .collect();
        if told.len() > LIFE {
            told.truncate(LIFE);
            told.push(note(What::LeftOut, "earlier steps in its life".to_owned()));
        }
        told.sort_by_key(|step| step.seq);
        if told.is_empty() {
            let text = self.unknown("nothing was reported of the frame, and it was never sealed");
            told.push(note(What::Recorded, text));
        }
        told
    }

    /// The last record of the finding's entry.
    pub(super) fn records_of_entry(&self, finding: &Finding) -> Vec<Step> {
        let Some(va) = finding.va else { return Vec::new() };
        let end = self.end(finding);
        let mut older = self.history.back().filter(|record| record.seq < end);
        let last = older.find_map(|record| match &record.event {
            Event::EntryWrite(write) => {
                let same = finding.root.is_none_or(|root| root == write.root);
                (same && super::place_in_run(write, va).is_some())
                    .then(|| step(record, What::Recorded, words::write(write, va)))
            }
            _ => None,
        });
        let none = || {
            let text = match self.history.begins_at() {
                Some(first) => format!("no record since event {first} tells of an entry for {va}"),
                None => format!("no record tells of an entry for {va}: it is the first tables'"),
            };
            note(What::Recorded, text)
        };
        vec![last.unwrap_or_else(none)]
    }

    /// The last record of each control register of the finding's CPU, and its last root load.
    pub(super) fn records_of_registers(&self, finding: &Finding) -> Vec<Step> {
        let end = self.end(finding);
        let own = |record: &&Record| record.seq < end && Some(record.cpu) == finding.cpu;
        let last = |wanted: &dyn Fn(&Event) -> bool| {
            let record = self.history.back().filter(own).find(|record| wanted(&record.event));
            record.map(|record| step(record, What::Recorded, words::record(record)))
        };
        let controls = ControlRegister::ALL.iter().map(|wanted| {
            last(&|event| matches!(event, Event::Control { register, .. } if register == wanted))
        });
        let root = last(&|event| matches!(event, Event::RootLoad { .. }));
        let mut steps: Vec<Step> = controls.chain([root]).flatten().collect();
        steps.sort_by_key(|step| step.seq);
        if steps.is_empty() {
            let none = "no record tells of a change of this CPU's control registers or root";
            steps.push(note(What::Recorded, none.to_owned()));
        }
        steps
    }
}
