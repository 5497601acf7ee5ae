//! Which events the host sees for itself, and what becomes of those.
//!
//! What it sees is judged by the rules. What the guest's records say of the same is only compared
//! with it (`honesty`). What only the guest can say is judged in every mode.

use super::fills::Fills;
use super::finding::Rule;
use super::writes::Entries;
use super::{Audit, TableWords, World};
use lacuna_abi::addr::{Gfn, PAGE_SIZE};
use lacuna_abi::event::{EntryStores, EntryWrite, Event, Record, Sighting};
use lacuna_abi::gate::PAGE_WORDS;
use lacuna_abi::layout::Layout;
use lacuna_abi::named_enum;
use lacuna_abi::walk::child_address;
use serde::{Deserialize, Serialize};

named_enum! {
    /// How the host learns of table writes.
    #[derive(Default, Serialize, Deserialize)]
    #[serde(rename_all = "lowercase")]
    pub enum Mediation {
        /// From event rings that the guest writes.
        #[default]
        Trace = "trace",
        /// By carrying them out itself.
        Tables = "tables",
        /// By single-stepping the guest.
        Step = "step",
    }
}

impl Mediation {
    /// Whether the host itself sees what this event reports.
    #[inline]
    #[must_use]
    pub const fn sees(self, event: &Event) -> bool {
        match event {
            Event::EntryWrite(_) | Event::TableFill(_) => !matches!(self, Self::Trace),
            Event::Flush(_) | Event::Control { .. } | Event::RootLoad { .. } => {
                matches!(self, Self::Step)
            }
            Event::Life(..)
            | Event::ShootdownAck(_)
            | Event::Observed(_)
            | Event::Host(..)
            | Event::Seen(_) => false,
        }
    }
}

impl Audit {
    /// From here on the host sees what `mediation` says. All vCPUs stand still, none of them between
    /// an entry's store and its record; before the first event, or a CPU that is somewhere in between
    /// is compared from its next gate call on ([`Self::came`]).
    pub fn mediate(&mut self, mediation: Mediation, world: &impl World) {
        self.mediation = mediation;
        self.index.keep_dropped(mediation != Mediation::Trace);
        self.fills.clear_words();
        let Self { tlb, honesty, .. } = self;
        honesty.begin(self.last_seq == 0, tlb.running(), |cpu| tlb.space(cpu));
        self.text = if self.is_direct() { self.find_text() } else { Vec::new() };
        if mediation == Mediation::Trace {
            return;
        }
        let mut words = [0; PAGE_WORDS];
        for frame in self.index.tables.pool().iter() {
            let linked = self.index.tables.roles(frame).next().is_some();
            if !linked && world.read_table(frame, &mut words) && words.iter().any(|word| *word != 0)
            {
                self.fills.put(frame, Box::new(words));
            }
        }
    }

    /// What the host sees for itself.
    #[must_use]
    pub const fn mediation(&self) -> Mediation {
        self.mediation
    }

    /// The CPU made a gate call, and all that it did and recorded before has been judged: it has done
    /// what it reported, and reported what it did.
    pub fn came(&mut self, cpu: u8, seq: u64) {
        if self.mediation != Mediation::Trace {
            self.honesty.came(cpu, seq, &self.index, &mut self.ledger);
        }
    }

    /// Whether what a CPU reports is compared with what it does, or was up to the first difference.
    #[must_use]
    pub fn is_compared(&self, cpu: u8) -> bool {
        self.honesty.is_compared(cpu)
    }

    /// Whether some CPU was seen to do what it has not reported, or reported what it was not seen to
    /// do, so far.
    #[must_use]
    pub fn owes_reports(&self) -> bool {
        self.honesty.is_waiting()
    }

    /// A record of what the host sees itself.
    pub(super) fn reported(&mut self, record: &Record) {
        self.honesty.reported(record, &self.index, &mut self.ledger);
    }

    /// What the host saw.
    pub(super) fn sighted(&mut self, record: &Record, sighting: &Sighting, world: &impl World) {
        let Record { seq, cpu, .. } = *record;
        self.honesty.seen(record, sighting, &self.index, &mut self.ledger);
        let event = match *sighting {
            Sighting::Stores(stores) => {
                self.stores(record, &stores, world);
                return;
            }
            Sighting::Access { va, write } => {
                self.used(record, va, write);
                return;
            }
            Sighting::Fill(fill) => Event::TableFill(fill),
            Sighting::Flush(flush) => Event::Flush(flush),
            Sighting::Control { register, old, new } => Event::Control { register, old, new },
            Sighting::RootLoad { root, pcid, no_flush } => Event::RootLoad { root, pcid, no_flush },
        };
        self.history.push(&Record { event, ..*record });
        self.judge_event(cpu, &event, seq, world);
    }

    /// Words of the table pool were stored: entries, where a root reaches their page.
    fn stores(&mut self, record: &Record, stores: &EntryStores, world: &impl World) {
        let Record { seq, cpu, .. } = *record;
        let tables = &self.index.tables;
        if !stores.is_well_formed() || !tables.pool().contains(stores.at.frame()) {
            self.ledger.inconclusive(format!("the stores seen as event {seq} are no table's"));
            return;
        }
        let mut roles = tables.roles(stores.at.frame());
        let site = roles.find_map(|id| tables.places(id).first().map(|place| (id.level(), *place)));
        let Some((level, place)) = site else {
            self.loose_stores(stores, seq);
            return;
        };
        let pcid = self.roots.iter().find(|(root, _)| *root == place.root).map_or(0, |root| root.1);
        let mut write = |index: u64, count: u32| {
            let nth = |entry: lacuna_abi::paging::Entry| entry.nth_of_run(stores.level, index);
            let va = child_address(place.va, level, stores.index() + index);
            let (old, new) = (nth(stores.old), nth(stores.new));
            let (root, grant) = (place.root, stores.grant);
            let write = EntryWrite { root, pcid, va, level, count, old, new, grant };
            self.history.push(&Record { event: Event::EntryWrite(write), ..*record });
            self.entry_write(cpu, &write, seq, world);
        };
        if level == stores.level {
            write(0, stores.count);
        } else {
            // A run steps by another level than its table's.
            (0..u64::from(stores.count)).for_each(|index| write(index, 1));
        }
    }

    /// Words were stored in a page that no root reaches: what it holds counts once it is linked.
    fn loose_stores(&mut self, stores: &EntryStores, seq: u64) {
        let table = stores.at.frame();
        let nth = |index: u64| stores.new.nth_of_run(stores.level, index);
        if self.tlb.is_stale_table(table) {
            // Whoever writes to the page uses it again, whatever was said of its life.
            self.ledger.checked(Rule::StaleTable, 1);
            self.judge_table_page(table, seq);
            for index in 0..u64::from(stores.count) {
                let old = Some(stores.old.nth_of_run(stores.level, index));
                let first = stores.index() + index;
                let level = stores.level;
                let entries = Entries { level, first, count: 1, old, new: nth(index) };
                self.note_written(table, &entries, seq, seq);
            }
        }
        self.fills.store(table, stores.index(), u64::from(stores.count), nth);
    }

    /// Takes over what tables held that the last store unlinked, if that has to be known.
    pub(super) fn keep_dropped(&mut self) {
        for (frame, words) in self.index.take_dropped() {
            self.fills.put(frame, words);
        }
    }

    /// `trace-honesty`: what the CPUs stored is reported or announced.
    pub(super) fn judge_unreported(&mut self, seq: u64, world: &impl World) {
        if self.mediation == Mediation::Trace {
            return;
        }
        for cpu in self.running() {
            let intent = world.intent(cpu);
            let Self { honesty, index, ledger, .. } = self;
            honesty.judge_stores(cpu, intent.as_ref(), seq, index, ledger);
        }
    }

    /// Counts that a record's claim of what was there is judged; of what the host saw itself nothing is
    /// claimed.
    #[inline]
    pub(super) const fn count_claim(&mut self) {
        if matches!(self.mediation, Mediation::Trace) {
            self.ledger.checked(Rule::TraceHonesty, 1);
        }
    }
}

impl Fills {
    /// What a table holds that no root reached so far.
    pub(super) fn loose(
        &self,
        table: Gfn,
        into: &mut TableWords,
        mediation: Mediation,
        layout: &Layout,
        world: &impl World,
    ) -> bool {
        if self.table(table, into) {
            return true;
        }
        if mediation == Mediation::Trace {
            return world.read_table(table, into);
        }
        // All that was ever stored there has been seen.
        into.fill(0);
        layout.pool.contains(table.gpa())
    }
}

const _: () = assert!(PAGE_WORDS as u64 * 8 == PAGE_SIZE);
