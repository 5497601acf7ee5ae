//! Stories of mappings that must not be: the event that made them, since when the frame is secret,
//! where it is open.

use super::{Finding, Maker, Moment, Rule, Step, Teller, What, note, step, words};
use lacuna_abi::addr::{Gfn, Gpa, Gva};
use lacuna_abi::event::{Event, HostAct, Record};
use lacuna_abi::gate::OpKind;

impl Teller<'_> {
    /// Who made the mapping, and when the frame became secret, in order.
    pub(super) fn mapping(&self, finding: &Finding, all: &[Finding]) -> Vec<Step> {
        let end = self.end(finding);
        let mut steps = Vec::new();
        let now = match self.moment {
            Moment::Record(record) | Moment::Asked(record) => Some(*record),
            _ => None,
        };
        let made_now = now.is_some_and(|record| made_by(record, finding));
        if let Some(va) = finding.va.filter(|_| !made_now) {
            steps.push(self.mapped(finding.root, va, end, all));
        }
        if let Some(frame) = finding.frame.filter(|_| about_secrets(finding.rule)) {
            steps.extend(self.secret_since(frame, end));
        }
        // What has no number came before everything that has one.
        steps.sort_by_key(|step| step.seq.unwrap_or(0));
        steps
    }

    fn mapped(&self, root: Option<Gpa>, va: Gva, end: u64, all: &[Finding]) -> Step {
        let lied = |other: &Finding| {
            other.rule == Rule::TraceHonesty && other.va == Some(va) && other.root == root
        };
        let mut maker = self.maker(root, va, end);
        if matches!(maker, Maker::FirstTables) && all.iter().any(lied) {
            maker = Maker::Nobody;
        }
        let mut step = self.made(&maker, va, None);
        step.text.push_str(match maker {
            Maker::Nobody => ": only the tables show it",
            _ => "; nothing has cleared the entry since",
        });
        step
    }

    /// The seal that made the frame secret, and what was done to it last.
    fn secret_since(&self, frame: Gfn, end: u64) -> Vec<Step> {
        let acts: Vec<_> =
            self.acts(frame, end).take_while(|(_, act)| *act != HostAct::Released).collect();
        let open = self.open_on(frame);
        let seals = |act: &HostAct| matches!(act, HostAct::Sealed | HostAct::HeldOpen);
        let first = acts.iter().rev().find(|(_, act)| seals(act));
        let Some((seal, _)) = first else {
            if self.sealing(frame) || !self.frames.is_secret(frame) {
                return Vec::new();
            }
            return vec![note(What::Sealed, format!("secret {}; {open}", self.unknown("")))];
        };
        let last = acts
            .iter()
            .find(|(record, act)| record.seq > seal.seq && (seals(act) || *act == HostAct::Opened));
        let since = format!("had the frame {frame} sealed: it is secret since then");
        let Some((record, act)) = last else {
            return vec![step(seal, What::Sealed, format!("{since}, and {open}"))];
        };
        let (what, how) = match act {
            HostAct::Opened => (What::Opened, "opened"),
            _ => (What::Sealed, "sealed again"),
        };
        let text = format!("had the frame {how}, the last time so far: {open}");
        vec![step(seal, What::Sealed, since), step(record, what, text)]
    }

    /// Whether the moment is the call that seals the frame.
    fn sealing(&self, frame: Gfn) -> bool {
        matches!(self.moment, Moment::Call(_, op)
            if op.kind == OpKind::Seal && op.frames.contains(frame))
    }

    /// "open on CPU 1", "open on no CPU".
    fn open_on(&self, frame: Gfn) -> String {
        let cpus = (0..=u8::MAX).take(self.config.layout.cpus);
        let open = cpus.filter(|cpu| self.frames.open_count(frame, *cpu) > 0);
        let open: Vec<String> = open.map(|cpu| cpu.to_string()).collect();
        match open.len() {
            0 => "it is open on no CPU".to_owned(),
            1 => format!("it is open on CPU {} only", open[0]),
            _ => format!("it is open on CPUs {}", open.join(", ")),
        }
    }

    /// What a mapping that is made at this moment maps where; for the moment's own step.
    pub(super) fn maps(record: &Record, va: Option<Gva>) -> String {
        match (&record.event, va) {
            (Event::EntryWrite(write), Some(va)) if super::place_in_run(write, va).is_some() => {
                words::write(write, va)
            }
            _ => words::record(record),
        }
    }
}

/// Whether the rule is about secret frames.
const fn about_secrets(rule: Rule) -> bool {
    matches!(rule, Rule::DirectMapAlias | Rule::ForeignAlias | Rule::GlobalWindow)
}

/// Whether the record itself writes the entry that the finding is about.
fn made_by(record: &Record, finding: &Finding) -> bool {
    match (&record.event, finding.va) {
        (Event::EntryWrite(write), Some(va)) => {
            finding.root == Some(write.root)
                && super::new_at(write, va).is_some_and(|entry| entry.is_leaf(write.level))
        }
        _ => false,
    }
}
