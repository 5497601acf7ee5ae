//! Records against tables: at a quiesce point the host's copy is what the tables hold.

use super::finding::{Finding, Rule};
use super::index::{Index, Mapping, Walked, is_table, walk};
use super::links::{Change, meaning};
use super::mappings::{Sight, judge_alias};
use super::{Audit, TableWords, World};
use lacuna_abi::addr::{Gfn, Gpa, Gva};
use lacuna_abi::event::EntryWrite;
use lacuna_abi::gate::PAGE_WORDS;
use lacuna_abi::layout::DIRECT_MAP;
use lacuna_abi::paging::{Entry, Level};
use lacuna_abi::walk::{EVERYTHING, child_address, locate};

/// Bits that a walk sets in a present entry.
const BY_ITSELF: u64 = Entry::ACCESSED | Entry::DIRTY;

/// An entry that is not what the records say.
#[derive(Clone, Copy, Debug)]
struct Difference {
    table: Gfn,
    index: u64,
    found: Entry,
}

/// Leaves of all roots, each counted at each place where its table is linked.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Totals {
    pub leaves: u64,
    pub in_direct_map: u64,
    pub of_pool: u64,
    pub of_guest: u64,
}

impl Index {
    /// Counts all leaves.
    pub(super) fn totals(&self) -> Totals {
        let mut totals = Totals::default();
        for (frame, _) in self.tables.all() {
            for id in self.tables.roles(frame) {
                let tally = self.tables.tally(id);
                for place in self.tables.places(id) {
                    totals.leaves += tally.leaves;
                    totals.of_pool += tally.of_pool;
                    totals.of_guest += tally.of_guest;
                    // No leaf is in a root, and any other table lies in one slot of it.
                    if place.va.0 >> Level::Pml4.span_shift()
                        == DIRECT_MAP.0 >> Level::Pml4.span_shift()
                    {
                        totals.in_direct_map += tally.leaves;
                    }
                }
            }
        }
        totals
    }

    /// Where memory differs from the copy, and pages that cannot be read. Under direct paging (`exact`)
    /// in any bit that the processor does not set by itself.
    fn differences(&self, world: &impl World, exact: bool) -> (Vec<Difference>, Vec<Gfn>) {
        let (mut different, mut unreadable) = (Vec::new(), Vec::new());
        let mut words: TableWords = [0; PAGE_WORDS];
        for (table, page) in self.tables.all() {
            if !world.read_table(table, &mut words) {
                unreadable.push(table);
                continue;
            }
            if words == *page.words() {
                continue;
            }
            for (index, word) in (0..).zip(words) {
                let (known, found) = (page.entry(index), Entry(word));
                let differs = |level| {
                    let by_itself = if found.is_present() { BY_ITSELF } else { 0 };
                    meaning(known, level) != meaning(found, level)
                        || (exact && (known.0 ^ found.0) & !by_itself != 0)
                };
                if known != found && self.tables.roles(table).any(|id| differs(id.level())) {
                    different.push(Difference { table, index, found });
                }
            }
        }
        (different, unreadable)
    }

    /// What an entry maps or links by the copy, and by `found`, at every place.
    fn at_every_place(
        &self,
        difference: &Difference,
    ) -> impl Iterator<Item = (Gpa, Gva, Level, Option<Mapping>, Option<Mapping>)> {
        let Difference { table, index, found } = *difference;
        self.tables.roles(table).flat_map(move |id| {
            let level = id.level();
            let page = self.tables.page(id);
            let known = page.map_or(Entry::EMPTY, |page| page.entry(index));
            let since = page.map_or(0, |page| page.since(index));
            self.tables.places(id).iter().map(move |place| {
                let va = child_address(place.va, level, index);
                let mapping = |entry: Entry| {
                    let leaf = entry.is_present() && entry.is_leaf(level);
                    leaf.then(|| Mapping::at(place, va, level, entry, since))
                };
                (place.root, va, level, mapping(known), mapping(found))
            })
        })
    }

    /// Whether the entry leads to a table, by the copy or by `found`.
    fn links_something(&self, difference: &Difference) -> bool {
        let Difference { table, index, found } = *difference;
        self.tables.roles(table).any(|id| {
            let known = self.tables.page(id).map_or(Entry::EMPTY, |page| page.entry(index));
            is_table(known, id.level()) || is_table(found, id.level())
        })
    }
}

impl Audit {
    /// `trace-honesty`: what the records say of every table is what it holds. The copy follows
    /// memory from here on, so that one difference is found once.
    pub(super) fn compare_tables(&mut self, seq: u64, world: &impl World) {
        let direct = self.is_direct();
        // What the host writes itself it has written, whatever is announced.
        let intents = self.running().filter(|_| !direct).filter_map(|cpu| world.intent(cpu));
        let intents: Vec<_> = intents.filter(EntryWrite::is_well_formed).collect();
        let (mut different, unreadable) = self.index.differences(world, direct);
        for table in unreadable {
            self.ledger.inconclusive(format!("the table at {table} cannot be read"));
        }
        // Where an intent explains it the copy stays behind memory: the record that is still to come
        // makes the obligation, and without it the next comparison finds the difference.
        let mut explained = Vec::new();
        let mut links = false;
        different.retain(|difference| {
            let places: Vec<_> = self.index.at_every_place(difference).collect();
            let is_explained = places.iter().any(|(root, va, level, ..)| {
                intents.iter().any(|intent| self.explains(intent, *root, (*va, *level), world))
            });
            if is_explained {
                links |= self.index.links_something(difference);
                explained.extend(places.into_iter().filter_map(|(.., found)| found));
            }
            !is_explained
        });
        if links {
            for (root, _) in &self.roots {
                let walked = walk(world, *root, self.index.budget());
                let announced = |mapping: &Mapping| intents.iter().any(|i| spans(i, mapping.va));
                explained.extend(walked.mappings().filter(announced));
            }
        }
        // What an intent explains is no lie, but it must be right all the same.
        for mapping in &explained {
            let at = Sight { mapping, cpu: None, seq };
            judge_alias(&mut self.ledger, &self.frames, &self.config.layout, &at);
        }
        if different.is_empty() {
            return;
        }
        let mut followed = true;
        if !direct && different.iter().any(|difference| self.index.links_something(difference)) {
            for (root, _) in self.roots.clone() {
                followed &= self.compare_root(root, &intents, seq, world);
            }
        }
        // What is left are leaves, and links that made no difference to any leaf.
        for difference in &different {
            let places: Vec<_> = self.index.at_every_place(difference).collect();
            for (root, va, level, known, found) in places {
                let same = known.zip(found).is_some_and(|(known, found)| known.says_as(&found));
                if direct {
                    self.changed_by_nobody(root, va, difference, seq);
                } else if !same && (known, found) != (None, None) {
                    self.lie(root, (va, known, found), seq);
                } else if (known, found) == (None, None) && level > Level::Pt {
                    self.lie_about_link(root, va, difference, seq);
                }
            }
        }
        if !followed {
            return;
        }
        let mut walked = Walked::default();
        let source = |table: Gfn, into: &mut TableWords| world.read_table(table, into);
        for Difference { table, index, found } in different {
            // Nothing is known of when the entry was granted.
            let mut change = Change::new(&self.config.layout, &source, 0, &mut walked);
            self.index.store(table, (index, 1), |_| found, &mut change);
        }
        self.keep_dropped();
        walked.tables.iter().for_each(|table| self.fills.remove(table.frame));
        self.judge_walked(&walked, None, seq);
    }

    /// Walks a root in memory and in the copy and reports each leaf that differs: where tables are
    /// linked that the records do not name. False if the walk has no end.
    fn compare_root(
        &mut self,
        root: Gpa,
        intents: &[EntryWrite],
        seq: u64,
        world: &impl World,
    ) -> bool {
        let walked = walk(world, root, self.index.budget());
        self.judge_tables(&walked, None, seq);
        if walked.endless {
            return false;
        }
        let known: Vec<Mapping> = self.index.in_span(root, EVERYTHING).collect();
        let found: Vec<Mapping> = walked.mappings().collect();
        for (va, known, found) in merged(&known, &found) {
            let level = found.or(known).map_or(Level::Pt, |mapping| mapping.level);
            if !intents.iter().any(|intent| self.explains(intent, root, (va, level), world)) {
                self.lie(root, (va, known, found), seq);
            }
        }
        true
    }

    /// Whether a standing intent explains a difference at `va`, in a table of `level`: the entry that
    /// it announces was what it says, and is already what it will be, which is something else. (While
    /// it still is what it was, records and tables agree.) Below it, it explains something only where
    /// it links or unlinks a table.
    fn explains(
        &self,
        intent: &EntryWrite,
        root: Gpa,
        (va, level): (Gva, Level),
        world: &impl World,
    ) -> bool {
        if intent.root != root || !spans(intent, va) {
            return false;
        }
        let here = intent.level;
        let index = va.0.wrapping_sub(intent.va.0) / here.span();
        let [old, new] = [intent.old, intent.new].map(|entry| entry.nth_of_run(here, index));
        let links = is_table(old, here) || is_table(new, here);
        if level != here && !(links && level < here) {
            return false;
        }
        let at = intent.va.wrapping_add(index * here.span());
        let site = self.index.find(root, at, here);
        let known = site.and_then(|site| self.index.tables.page(site.id));
        let known = known.map(|page| page.entry(here.index(at)));
        let held = locate(world, root, at, here).ok().and_then(|at| world.read_entry(at));
        known.is_some_and(|known| meaning(known, here) == meaning(old, here))
            && held == Some(new)
            && meaning(old, here) != meaning(new, here)
    }

    /// Reports that a leaf is not what the records say.
    fn lie(
        &mut self,
        root: Gpa,
        (va, known, found): (Gva, Option<Mapping>, Option<Mapping>),
        seq: u64,
    ) {
        let detail = format!(
            "the records say {}, the tables say {}; every change of an entry must be recorded",
            describe(known.as_ref()),
            describe(found.as_ref())
        );
        let finding = Finding::new(Rule::TraceHonesty, seq, detail);
        let frame = found.or(known).map(|mapping| mapping.frame);
        let (va, root) = (Some(va), Some(root));
        self.ledger.violation(Finding { frame, va, root, ..finding });
    }

    /// Reports that an entry is not what the host wrote.
    fn changed_by_nobody(&mut self, root: Gpa, va: Gva, difference: &Difference, seq: u64) {
        let Difference { table, index, found } = *difference;
        let at = table.gpa().wrapping_add(8 * index);
        let detail = format!(
            "the entry at {at} holds {:#x}, which the host did not write; under direct paging nobody \
             else can",
            found.0
        );
        let finding = Finding::new(Rule::TraceHonesty, seq, detail);
        let (frame, va, root) = (Some(table), Some(va), Some(root));
        self.ledger.violation(Finding { frame, va, root, ..finding });
    }

    /// Reports that an entry leads to another table than the records say, or with other rights.
    fn lie_about_link(&mut self, root: Gpa, va: Gva, difference: &Difference, seq: u64) {
        let detail = format!(
            "the tables hold {:#x} in an entry that leads to a table, which no record says; every \
             change of an entry must be recorded",
            difference.found.0
        );
        let finding = Finding::new(Rule::TraceHonesty, seq, detail);
        let (frame, va, root) = (Some(difference.table), Some(va), Some(root));
        self.ledger.violation(Finding { frame, va, root, ..finding });
    }
}

/// What two lists of leaves, both in order of address, say differently: address, by the first, by
/// the second.
fn merged(known: &[Mapping], found: &[Mapping]) -> Vec<(Gva, Option<Mapping>, Option<Mapping>)> {
    let key = |mapping: &Mapping| (mapping.va, mapping.level);
    let (mut known, mut found) = (known.iter().peekable(), found.iter().peekable());
    let mut different = Vec::new();
    loop {
        let (left, right) = (known.peek().map(|m| key(m)), found.peek().map(|m| key(m)));
        let (left, right) = match (left, right) {
            (None, None) => return different,
            (Some(left), Some(right)) => (left <= right, right <= left),
            (left, right) => (left.is_some(), right.is_some()),
        };
        let left = if left { known.next().copied() } else { None };
        let right = if right { found.next().copied() } else { None };
        let same = left.zip(right).is_some_and(|(left, right)| left.says_as(&right));
        if let Some(mapping) = left.or(right).filter(|_| !same) {
            different.push((mapping.va, left, right));
        }
    }
}

/// Whether the write announces something for `va`.
fn spans(intent: &EntryWrite, va: Gva) -> bool {
    va.offset_from(intent.va).is_some_and(|offset| offset < intent.span())
}

fn describe(mapping: Option<&Mapping>) -> String {
    match mapping {
        None => "nothing is mapped".to_owned(),
        Some(m) => format!(
            "{} is mapped at level {}{}{}{}{}",
            m.frame,
            m.level.number(),
            if m.rights.writable { ", writable" } else { "" },
            if m.rights.executable { ", executable" } else { "" },
            if m.rights.user { ", for ring 3" } else { "" },
            if m.global { ", global" } else { "" },
        ),
    }
}
