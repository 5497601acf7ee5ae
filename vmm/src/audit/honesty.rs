//! `trace-honesty` where the host sees for itself: what a CPU's records say is what it was seen to do,
//! in the same order.
//!
//! Both are cut into single acts (a store, an INVLPG), because the guest records a run that is seen
//! store by store. What one side has and the other has not yet waits; it has to be there when the CPU
//! makes its next gate call. After the first difference a CPU is not compared any more.

use super::finding::{Finding, Ledger, Rule, Step, What};
use super::index::Index;
use super::tlb::{CpuSet, only};
use lacuna_abi::addr::{Gfn, Gpa, Gva};
use lacuna_abi::event::{ControlRegister, EntryStores, EntryWrite, Event, Flush, Record, Sighting};
use lacuna_abi::paging::{ENTRIES, Entry, Level};
use std::collections::VecDeque;

/// Most acts of a CPU that wait for their counterparts: an honest one stores as many entries as a table
/// has before it records them, and has made room for the record before.
const MAX_WAITING: usize = 4096;
/// CR4.PGE.
const CR4_PGE: u64 = 1 << 7;
/// Accessed and dirty: the processor's own, and nobody's business.
const NOBODYS: u64 = 1 << 5 | 1 << 6;

/// Where an entry lies, as either side says it.
#[derive(Clone, Copy, Debug)]
enum Place {
    At(Gpa),
    Of { root: Gpa, va: Gva, level: Level },
}

/// What a CPU did, or says that it did; a run of acts of one kind.
#[derive(Clone, Copy, Debug)]
enum Act {
    /// Entries stored. Of a fill it is not said what was there.
    Stores { place: Place, level: Level, count: u64, old: Option<Entry>, new: Entry },
    /// INVLPGs.
    Pages { va: Gva, level: Level, count: u64 },
    /// INVPCID.
    Pcid(Flush),
    /// A load of CR3.
    Root { root: Gpa, pcid: u16, no_flush: bool },
    /// These bits of a control register changed, to this.
    Control { register: ControlRegister, bits: u64, to: u64 },
}

/// An act with the event that it is part of.
#[derive(Clone, Copy, Debug)]
struct Deed {
    seq: u64,
    site: u32,
    act: Act,
}

/// Whether a CPU is compared.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum State {
    #[default]
    Compared,
    /// It may be between an act and its record.
    FromNextCall,
    /// A difference was found.
    Given,
}

/// What one CPU did and said.
#[derive(Clone, Debug, Default)]
struct Book {
    state: State,
    seen: VecDeque<Deed>,
    reported: VecDeque<Deed>,
    /// Root and PCID by either side, for reloads: seen, reported.
    roots: [(Gpa, u16); 2],
}

/// The books of all CPUs.
#[derive(Clone, Debug)]
pub(super) struct Honesty {
    books: Vec<Book>,
}

const SEEN: usize = 0;
const REPORTED: usize = 1;

impl Honesty {
    pub(super) fn new(cpus: usize, root: Gpa) -> Self {
        let book = Book { roots: [(root, 0); 2], ..Book::default() };
        Self { books: vec![book; cpus] }
    }

    /// Begins anew with the CPUs of the set `running`. `fresh` says that none has done anything so far;
    /// `space` is a CPU's root and PCID.
    pub(super) fn begin(
        &mut self,
        fresh: bool,
        running: CpuSet,
        space: impl Fn(u8) -> Option<(Gpa, u16)>,
    ) {
        for (cpu, book) in (0..).zip(&mut self.books) {
            book.seen.clear();
            book.reported.clear();
            if let Some(space) = space(cpu) {
                book.roots = [space; 2];
            }
            let fresh = fresh || running & only(cpu) == 0;
            if book.state != State::Given {
                book.state = if fresh { State::Compared } else { State::FromNextCall };
            }
        }
    }

    /// Whether an act of some CPU waits for its counterpart, or a CPU is not compared yet.
    pub(super) fn is_waiting(&self) -> bool {
        self.books.iter().any(|book| {
            !book.seen.is_empty() || !book.reported.is_empty() || book.state == State::FromNextCall
        })
    }

    pub(super) fn is_compared(&self, cpu: u8) -> bool {
        let book = self.books.get(usize::from(cpu));
        book.is_some_and(|book| book.state != State::FromNextCall)
    }

    /// Takes what a CPU reports.
    pub(super) fn reported(&mut self, record: &Record, index: &Index, ledger: &mut Ledger) {
        let Some(book) = self.books.get_mut(usize::from(record.cpu)) else { return };
        let root = &mut book.roots[REPORTED];
        let acts = match record.event {
            Event::EntryWrite(EntryWrite { root, va, level, count, old, new, .. }) => {
                let place = Place::Of { root, va, level };
                [Some(Act::Stores { place, level, count: count.into(), old: Some(old), new }), None]
            }
            Event::TableFill(fill) => [Some(fill_of(&fill)), None],
            Event::Flush(flush) => flush_of(&flush, *root),
            Event::Control { register, old, new } => [control_of(register, old, new), None],
            Event::RootLoad { root: to, pcid, no_flush } => {
                *root = (to, pcid);
                [Some(Act::Root { root: to, pcid, no_flush }), None]
            }
            _ => return,
        };
        book.take(REPORTED, record, acts, index, ledger);
    }

    /// Takes what a CPU was seen to do.
    pub(super) fn seen(
        &mut self,
        record: &Record,
        sighting: &Sighting,
        index: &Index,
        ledger: &mut Ledger,
    ) {
        let Some(book) = self.books.get_mut(usize::from(record.cpu)) else { return };
        let root = &mut book.roots[SEEN];
        let acts = match *sighting {
            Sighting::Stores(EntryStores { at, level, count, old, new, .. }) => {
                let (place, count) = (Place::At(at), count.into());
                [Some(Act::Stores { place, level, count, old: Some(old), new }), None]
            }
            Sighting::Fill(fill) => [Some(fill_of(&fill)), None],
            Sighting::Flush(flush) => flush_of(&flush, *root),
            Sighting::Control { register, old, new } => [control_of(register, old, new), None],
            Sighting::RootLoad { root: to, pcid, no_flush } => {
                *root = (to, pcid);
                [Some(Act::Root { root: to, pcid, no_flush }), None]
            }
            // No record tells of one.
            Sighting::Access { .. } => return,
        };
        book.take(SEEN, record, acts, index, ledger);
    }

    /// The CPU makes a gate call: nothing may wait.
    pub(super) fn came(&mut self, cpu: u8, seq: u64, index: &Index, ledger: &mut Ledger) {
        let Some(book) = self.books.get_mut(usize::from(cpu)) else { return };
        match book.state {
            State::FromNextCall => book.state = State::Compared,
            State::Compared if !book.seen.is_empty() || !book.reported.is_empty() => {
                book.differs(cpu, seq, index, ledger);
            }
            State::Compared | State::Given => {}
        }
    }

    /// At a complete check, where the CPU may be anywhere: what it stored in a table that a root
    /// reaches is reported, or it is about to report it: its standing intent announces a store that
    /// waits. What waits with that one is compared in its order when the reports have come.
    pub(super) fn judge_stores(
        &mut self,
        cpu: u8,
        intent: Option<&EntryWrite>,
        seq: u64,
        index: &Index,
        ledger: &mut Ledger,
    ) {
        let Some(book) = self.books.get_mut(usize::from(cpu)) else { return };
        let linked = |deed: &Deed| match deed.act {
            Act::Stores { place: Place::At(at), .. } => {
                index.tables.roles(at.frame()).next().is_some()
            }
            _ => false,
        };
        let announced = |deed: &Deed| match deed.act {
            Act::Stores { place: Place::At(at), new, .. } => {
                intent.is_some_and(|intent| announces(intent, at, new, index))
            }
            _ => false,
        };
        let hides = book.seen.iter().any(linked) && !book.seen.iter().any(announced);
        if book.state == State::Compared && hides {
            book.differs(cpu, seq, index, ledger);
        }
    }
}

impl Book {
    fn take(
        &mut self,
        side: usize,
        record: &Record,
        acts: [Option<Act>; 2],
        index: &Index,
        ledger: &mut Ledger,
    ) {
        let Record { seq, site, cpu, .. } = *record;
        for act in acts.into_iter().flatten() {
            if self.state != State::Compared {
                ledger.not_checked(Rule::TraceHonesty, act.count());
                continue;
            }
            let queue = if side == SEEN { &mut self.seen } else { &mut self.reported };
            queue.push_back(Deed { seq, site, act });
            self.compare(cpu, seq, index, ledger);
        }
        if self.seen.len().max(self.reported.len()) > MAX_WAITING {
            self.differs(cpu, seq, index, ledger);
        }
    }

    /// Compares as far as both sides go.
    fn compare(&mut self, cpu: u8, seq: u64, index: &Index, ledger: &mut Ledger) {
        while let (Some(seen), Some(reported)) = (self.seen.front_mut(), self.reported.front_mut())
        {
            if !is_same(&seen.act, &reported.act, index) {
                self.differs(cpu, seq, index, ledger);
                return;
            }
            ledger.checked(Rule::TraceHonesty, 1);
            let (more_seen, more_reported) = (seen.act.advance(), reported.act.advance());
            if !more_seen {
                self.seen.pop_front();
            }
            if !more_reported {
                self.reported.pop_front();
            }
        }
    }

    /// Reports the first difference, and compares this CPU no more.
    fn differs(&mut self, cpu: u8, seq: u64, index: &Index, ledger: &mut Ledger) {
        let (seen, reported) = (self.seen.pop_front(), self.reported.pop_front());
        let left = self.seen.iter().chain(&self.reported).map(|deed| deed.act.count());
        ledger.not_checked(Rule::TraceHonesty, left.sum());
        self.state = State::Given;
        self.seen.clear();
        self.reported.clear();
        ledger.checked(Rule::TraceHonesty, 1);
        ledger.violation_about(u64::from(cpu) + 1, finding(cpu, seq, seen, reported, index));
    }
}

impl Act {
    /// Single acts in the run.
    const fn count(&self) -> u64 {
        match self {
            Self::Stores { count, .. } | Self::Pages { count, .. } => *count,
            Self::Pcid(_) | Self::Root { .. } | Self::Control { .. } => 1,
        }
    }

    /// Goes on to the next act of the run; false if there is none.
    const fn advance(&mut self) -> bool {
        match self {
            Self::Stores { place, level, count, old, new } => {
                *place = match *place {
                    Place::At(at) => Place::At(at.wrapping_add(8)),
                    Place::Of { root, va, level } => {
                        Place::Of { root, va: va.wrapping_add(level.span()), level }
                    }
                };
                if let Some(old) = old {
                    *old = old.nth_of_run(*level, 1);
                }
                *new = new.nth_of_run(*level, 1);
                *count = count.saturating_sub(1);
                *count > 0
            }
            Self::Pages { va, level, count } => {
                *va = va.wrapping_add(level.span());
                *count = count.saturating_sub(1);
                *count > 0
            }
            Self::Pcid(_) | Self::Root { .. } | Self::Control { .. } => false,
        }
    }
}

/// Whether the first acts of both runs are the same.
fn is_same(seen: &Act, reported: &Act, index: &Index) -> bool {
    let differ = |a: Entry, b: Entry| (a.0 ^ b.0) & !NOBODYS != 0;
    match (seen, reported) {
        (
            Act::Stores { place: Place::At(at), old, new, .. },
            Act::Stores { place, old: claimed, new: reported, .. },
        ) => {
            is_at(place, *at, index)
                && !differ(*new, *reported)
                && !old.zip(*claimed).is_some_and(|(old, claimed)| differ(old, claimed))
        }
        (Act::Pages { va, .. }, Act::Pages { va: reported, .. }) => va == reported,
        (Act::Pcid(flush), Act::Pcid(reported)) => flush == reported,
        (
            Act::Root { root, pcid, no_flush },
            Act::Root { root: to, pcid: with, no_flush: keeping },
        ) => (root, pcid, no_flush) == (to, with, keeping),
        (
            Act::Control { register, bits, to },
            Act::Control { register: other, bits: changed, to: reported },
        ) => (register, bits, to) == (other, changed, reported),
        _ => false,
    }
}

/// Whether the place of an entry is this one. Of an address space that is not registered only the
/// place in its table can be told.
fn is_at(place: &Place, at: Gpa, index: &Index) -> bool {
    match *place {
        Place::At(place) => place == at,
        Place::Of { root, va, level } => {
            let entry = 8 * level.index(va);
            index.find(root, va, level).map_or(at.0 % (8 * ENTRIES) == entry, |site| {
                index.tables.frame(site.id).gpa().wrapping_add(entry) == at
            })
        }
    }
}

/// Whether the intent announces this store.
fn announces(intent: &EntryWrite, at: Gpa, new: Entry, index: &Index) -> bool {
    intent.is_well_formed()
        && (0..u64::from(intent.count)).any(|nth| {
            let EntryWrite { root, level, .. } = *intent;
            let va = intent.va.wrapping_add(nth * level.span());
            intent.new.nth_of_run(level, nth) == new
                && is_at(&Place::Of { root, va, level }, at, index)
        })
}

const fn fill_of(fill: &lacuna_abi::event::TableFill) -> Act {
    let (place, level) = (Place::At(fill.table), fill.level);
    Act::Stores { place, level, count: ENTRIES, old: None, new: fill.first }
}

/// The acts of a flush: everything goes by a change of CR4.PGE and back.
fn flush_of(flush: &Flush, (root, pcid): (Gpa, u16)) -> [Option<Act>; 2] {
    match *flush {
        Flush::Pages { va, count, level } => {
            [Some(Act::Pages { va, level, count: count.into() }), None]
        }
        Flush::NonGlobal => [Some(Act::Root { root, pcid, no_flush: false }), None],
        Flush::Everything => [0, CR4_PGE]
            .map(|to| Some(Act::Control { register: ControlRegister::Cr4, bits: CR4_PGE, to })),
        Flush::PageOfPcid { .. } | Flush::Pcid(_) | Flush::AllPcids => {
            [Some(Act::Pcid(*flush)), None]
        }
    }
}

/// A change of a control register; one that changes nothing is none.
const fn control_of(register: ControlRegister, old: u64, new: u64) -> Option<Act> {
    let bits = old ^ new;
    if bits == 0 { None } else { Some(Act::Control { register, bits, to: new & bits }) }
}

/// The first difference of a CPU.
fn finding(
    cpu: u8,
    seq: u64,
    seen: Option<Deed>,
    reported: Option<Deed>,
    index: &Index,
) -> Finding {
    let say = |deed: &Option<Deed>, nothing: &str| {
        deed.as_ref().map_or_else(
            || nothing.to_owned(),
            |deed| format!("{} (event {})", describe(&deed.act), deed.seq),
        )
    };
    let detail = format!(
        "CPU {cpu} reported {}, and was seen to have {}; a CPU must report what it does, all of it and \
         in order",
        say(&reported, "nothing more"),
        say(&seen, "done nothing more"),
    );
    let at = reported.or(seen);
    let places = [reported, seen].into_iter().flatten().map(|deed| place_of(&deed.act, index));
    let (frame, va, root) = places.fold((None, None, None), |(frame, va, root), place| {
        (frame.or(place.0), va.or(place.1), root.or(place.2))
    });
    let step = |deed: Deed, what, how: &str| Step {
        seq: Some(deed.seq),
        cpu: Some(cpu),
        what,
        site: Some(deed.site).filter(|site| *site != 0),
        text: format!("{how} {}", describe(&deed.act)),
    };
    let note =
        |what, text: &str| Step { seq: None, cpu: None, what, site: None, text: text.into() };
    let story = [
        reported.map(|deed| step(deed, What::Recorded, "reported that it")),
        seen.map(|deed| step(deed, What::Mattered, "was seen to have")),
        seen.is_none().then(|| note(What::Mattered, "the CPU was not seen to do so")),
        Some(note(What::Right, "to do what is reported, and to report what is done")),
    ];
    let seq = at.map_or(seq, |deed| deed.seq);
    let finding = Finding::new(Rule::TraceHonesty, seq, detail);
    let story = story.into_iter().flatten().collect();
    Finding { frame, va, cpu: Some(cpu), root, story, ..finding }
}

/// Frame, address and root that an act is about.
fn place_of(act: &Act, index: &Index) -> (Option<Gfn>, Option<Gva>, Option<Gpa>) {
    match *act {
        Act::Stores { place, level, old, new, .. } => {
            let mapped = [Some(new), old].into_iter().flatten().find(|entry| entry.is_present());
            let (root, va) = match place {
                Place::Of { root, va, .. } => (Some(root), Some(va)),
                Place::At(at) => {
                    let here = index.table_at(lacuna_abi::addr::FrameRange::single(at.frame()));
                    here.map_or((None, None), |(_, root, _)| (Some(root), None))
                }
            };
            (mapped.map(|entry| entry.frame(level)), va, root)
        }
        Act::Pages { va, .. } | Act::Pcid(Flush::PageOfPcid { va, .. }) => (None, Some(va), None),
        Act::Root { root, .. } => (None, None, Some(root)),
        Act::Pcid(_) | Act::Control { .. } => (None, None, None),
    }
}

/// An act, in the past.
fn describe(act: &Act) -> String {
    match *act {
        Act::Stores { place, old, new, .. } => {
            let place = match place {
                Place::At(at) => format!("at {at}"),
                Place::Of { va, level, .. } => format!("of level {} for {va}", level.number()),
            };
            let old = old.map_or_else(String::new, |old| format!(" over {:#x}", old.0));
            format!("stored {:#x}{old} in the entry {place}", new.0)
        }
        Act::Pages { va, .. } => format!("executed INVLPG of {va}"),
        Act::Pcid(Flush::PageOfPcid { va, pcid }) => {
            format!("executed INVPCID of {va}, PCID {pcid}")
        }
        Act::Pcid(Flush::Pcid(pcid)) => format!("executed INVPCID of PCID {pcid}"),
        Act::Pcid(_) => "executed INVPCID of all PCIDs but globals".to_owned(),
        Act::Root { root, pcid, .. } => format!("loaded CR3 with {root}, PCID {pcid}"),
        Act::Control { register, bits, to } => {
            format!("changed {} in the bits {bits:#x}, to {to:#x}", register.name())
        }
    }
}
