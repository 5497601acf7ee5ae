//! The end of a story: the moment at which it mattered, and what would have been right.

use super::{Finding, Moment, Rule, Step, Teller, What, note, step, words};
use lacuna_abi::event::{Event, Life, Sighting};
use lacuna_abi::gate::OpKind;
use lacuna_abi::layout::Place;
use lacuna_abi::paging::Entry;

impl Teller<'_> {
    /// The moment: the record, call or check that was judged, and what follows from it.
    pub(super) fn mattered(&self, finding: &Finding) -> Step {
        let so = self.consequence(finding);
        match self.moment {
            Moment::Record(record) => {
                let text = format!("{}: {so}", Self::maps(record, finding.va));
                step(record, What::Mattered, text)
            }
            Moment::Asked(record) => {
                let asked = Self::maps(record, finding.va);
                let text = format!("{asked}: {so}; the host refused, and nothing was written");
                step(record, What::Mattered, text)
            }
            Moment::Call(cpu, op) => {
                let (seq, verb) = match op.kind {
                    OpKind::Open => (Some(finding.seq), "open"),
                    OpKind::Seal => (None, "seal"),
                    OpKind::Release => (None, "release"),
                };
                let after = match seq {
                    None => format!(", after event {},", finding.seq),
                    Some(_) => String::new(),
                };
                let frames = words::frames(op.frames);
                let text = format!("asked the host{after} to {verb} {frames}: {so}");
                Step { seq, cpu: Some(*cpu), ..note(What::Mattered, text) }
            }
            Moment::Root(root) => {
                note(What::Mattered, format!("the root {root} is registered: {so}"))
            }
            Moment::Quiesce => Step {
                seq: Some(finding.seq),
                cpu: finding.cpu,
                ..note(What::Mattered, format!("everything is checked: {so}"))
            },
            Moment::Probe => Step {
                seq: Some(finding.seq),
                ..note(What::Mattered, format!("the frame was touched on purpose: {so}"))
            },
            Moment::Search => Step {
                seq: Some(finding.seq),
                ..note(What::Mattered, format!("memory and files are searched: {so}"))
            },
        }
    }

    fn consequence(&self, finding: &Finding) -> String {
        let cpu = finding.revoked.map(|revoke| revoke.cpu).or(finding.cpu);
        let cpu = cpu.map_or_else(|| "a CPU".to_owned(), |cpu| format!("CPU {cpu}"));
        match finding.rule {
            Rule::StaleDirectMap => {
                format!("{cpu} may still read and write these frames through the old translation")
            }
            Rule::StaleWindow if self.is_use() => {
                format!("no entry leads anywhere there, and {cpu} went on by an old translation")
            }
            Rule::ForeignAlias if self.is_use() => {
                format!("{cpu} now caches what its owner's flushes do not reach")
            }
            Rule::StaleWindow if matches!(self.moment, Moment::Call(..)) => {
                format!("{cpu} may still reach the frame in its window when it has another owner")
            }
            Rule::StaleWindow => {
                format!("{cpu} may still reach the old frame there instead of the new one")
            }
            Rule::StaleTable if finding.revoked.is_none() => {
                "an entry still leads to the table".to_owned()
            }
            Rule::StaleTable => {
                format!("{cpu} may still walk through it, whatever it holds from now on")
            }
            Rule::DirectMapAlias => "the frame is secret, and the direct map shows it".to_owned(),
            Rule::ForeignAlias => "the frame is secret, and mapped where it is not open".to_owned(),
            Rule::GlobalWindow => {
                "the frame is secret, and CR3 loads will not remove this translation".to_owned()
            }
            Rule::SecondStageOpen => self.not_closed(finding),
            Rule::Residue => {
                let offset = finding.frame.and_then(|frame| (self.first_nonzero)(frame));
                let offset = offset.map_or_else(String::new, |offset| {
                    format!("; the first byte that is not zero lies {offset:#x} bytes in")
                });
                format!("the frame is not zero{offset}")
            }
            Rule::TableAlias => "the guest can write a page table there".to_owned(),
            Rule::WriteExecute => "what is written there can be executed".to_owned(),
            Rule::UserAccess => "ring 3 can reach the frame".to_owned(),
            Rule::ControlState => "a register is not as agreed".to_owned(),
            Rule::TraceHonesty => "records and tables contradict each other".to_owned(),
            Rule::InputLeak => "there are bytes of the secret input".to_owned(),
            Rule::ObservedAccess => "nothing that the CPU may cache leads there".to_owned(),
        }
    }

    fn not_closed(&self, finding: &Finding) -> String {
        let open = finding.frame.is_some_and(|frame| self.frames.is_open(frame));
        let closed = finding.frame.is_some_and(|frame| self.frames.may_close(frame));
        match self.moment {
            Moment::Probe if closed => "a probe reached the sealed frame".to_owned(),
            Moment::Probe => "the second stage stops accesses that must go through".to_owned(),
            Moment::Quiesce if finding.frame.is_some_and(|frame| self.frames.is_secret(frame)) => {
                "the guest can still access the sealed frame".to_owned()
            }
            _ if open => "the frame is still open".to_owned(),
            _ => "the frame is not secret: it was never sealed, or was released since".to_owned(),
        }
    }

    /// What would have been right.
    pub(super) fn right(&self, finding: &Finding) -> Step {
        note(What::Right, self.cure(finding))
    }

    /// Whether the moment is an access through a window.
    const fn is_use(&self) -> bool {
        let Moment::Record(record) = self.moment else { return false };
        matches!(record.event, Event::Seen(Sighting::Access { .. }))
    }

    fn cure(&self, finding: &Finding) -> String {
        match finding.rule {
            Rule::StaleWindow if self.is_use() => {
                "to use an address only until its entry is cleared".to_owned()
            }
            Rule::ForeignAlias if self.is_use() => {
                "to use a window's addresses on its own CPU alone".to_owned()
            }
            Rule::StaleDirectMap | Rule::StaleWindow | Rule::StaleTable => self.flush_due(finding),
            Rule::DirectMapAlias => {
                "to clear the entry and flush it on every CPU, and only then to seal".to_owned()
            }
            Rule::ForeignAlias => {
                let place = finding.va.map(|va| self.config.layout.place_of(va));
                match place {
                    Some(Place::Window(owner)) => format!(
                        "to open the frame on CPU {owner} before it is mapped in that CPU's \
                         window, and to clear the entry before the frame is sealed"
                    ),
                    _ => "to map secret frames in windows only".to_owned(),
                }
            }
            Rule::GlobalWindow => "to map the frame without the Global bit".to_owned(),
            Rule::SecondStageOpen => match self.moment {
                Moment::Quiesce
                    if finding.frame.is_some_and(|frame| self.frames.is_secret(frame)) =>
                {
                    "to deny the frame in the second stage: the host's own duty".to_owned()
                }
                Moment::Probe
                    if finding.frame.is_some_and(|frame| self.frames.may_close(frame)) =>
                {
                    "to deny the frame in the second stage: the host's own duty".to_owned()
                }
                Moment::Probe => {
                    "to let the frame through in the second stage: the host's own duty".to_owned()
                }
                Moment::Call(..) => "to seal the frame before it is opened".to_owned(),
                _ => "to seal the frame, and to report this only then".to_owned(),
            },
            Rule::Residue => match self.moment {
                Moment::Call(_, op) if op.kind == OpKind::Release => {
                    "to scrub the frame through a window before it is released".to_owned()
                }
                Moment::Call(..) => "to zero the page before it is handed out as zero".to_owned(),
                _ => "to zero the page after its last use, and only then to report it as zero"
                    .to_owned(),
            },
            Rule::TableAlias => {
                "to keep all tables in the table pool, writable nowhere but at the pool's own place"
                    .to_owned()
            }
            Rule::WriteExecute => {
                "to take the one right away, and flush, before the other is granted".to_owned()
            }
            Rule::UserAccess => "to keep U/S clear at one level at least".to_owned(),
            Rule::ControlState => {
                "to leave the registers as they were when the CPU started".to_owned()
            }
            Rule::TraceHonesty => {
                "to record each change of an entry, with what the entry held before".to_owned()
            }
            Rule::InputLeak => {
                "to keep the input in secret pages alone, and to scrub every copy".to_owned()
            }
            Rule::ObservedAccess => {
                "to reach what the tables say, or what they said before and was not invalidated \
                 on this CPU since"
                    .to_owned()
            }
        }
    }

    /// The flush that is missing: where, when, and of which kinds.
    fn flush_due(&self, finding: &Finding) -> String {
        let Some(revoke) = finding.revoked else {
            return match finding.rule {
                Rule::StaleTable => "to clear the entry that leads to the table and to flush on \
                                     every CPU, before the page is used again"
                    .to_owned(),
                _ => "to flush the address on this CPU after the revoke".to_owned(),
            };
        };
        let until = match self.moment {
            Moment::Record(record) => format!("event {}", record.seq),
            _ => "the call".to_owned(),
        };
        let place = format!("on CPU {}, between event {} and {until}", revoke.cpu, revoke.seq);
        let kinds = match finding.rule {
            Rule::StaleTable => "any INVLPG, a CR3 load or a change of CR4.PGE",
            _ if self.is_global(finding) => {
                "an INVLPG of the address or a change of CR4.PGE (a CR3 load spares what is global)"
            }
            _ => "an INVLPG of the address, a CR3 load or a change of CR4.PGE",
        };
        let seal = match finding.rule {
            Rule::StaleWindow if self.config.seal_closes => {
                "; or a seal of the frame that completes"
            }
            _ => "",
        };
        let last = match self.moment {
            Moment::Record(record) if matches!(record.event, Event::Life(Life::TableFreed, _)) => {
                ", and only then to free the page"
            }
            _ => "",
        };
        format!("{place}: {kinds}{seal}{last}")
    }

    /// Whether the translation that may still be cached was global.
    fn is_global(&self, finding: &Finding) -> bool {
        let taken = finding.revoked.and_then(|revoke| {
            let record = self.history.get(revoke.seq)?;
            let Event::EntryWrite(write) = &record.event else { return None };
            let old = super::old_at(write, revoke.va).filter(|old| old.is_leaf(write.level));
            let made = || {
                let maker = self.maker(finding.root, revoke.va, revoke.seq);
                maker.origin().map(|origin| origin.entry)
            };
            old.or_else(made)
        });
        taken.map_or(finding.rule == Rule::StaleDirectMap, |entry| entry.has(Entry::GLOBAL))
    }
}
