//! What tables would map if a write were made: leaves and tables, found in memory.

use super::Unfit;
use crate::audit::finding::{Finding, Rule};
use crate::audit::index::{Mapping, Run, TableAt};
use crate::audit::tables::Place;
use crate::audit::world::TableWords;
use crate::audit::{Audit, MAX_LINK_WORK, World};
use lacuna_abi::addr::{Gfn, Gva};
use lacuna_abi::event::EntryWrite;
use lacuna_abi::gate::PAGE_WORDS;
use lacuna_abi::paging::{Entry, Level};
use lacuna_abi::walk::child_address;

/// What was found so far. Its size is bounded by the work that is left.
pub(super) struct Sought {
    pub(super) leaves: Vec<Run>,
    pub(super) tables: Vec<TableAt>,
    /// Leaves and tables that may still be found.
    left: usize,
    /// Tables that may still be found at the place that is looked at: as many as the copy would follow.
    tables_left: usize,
    /// The write, and the page that it is to: what is found through that page is what it will hold.
    written: Option<(Gfn, EntryWrite)>,
}

impl Audit {
    /// A search that may find as much as is left until the next complete check.
    pub(super) fn seek(&self, written: Option<(Gfn, EntryWrite)>) -> Sought {
        let left = MAX_LINK_WORK.saturating_sub(self.link_work);
        let tables_left = self.index.budget();
        Sought { leaves: Vec::new(), tables: Vec::new(), left, tables_left, written }
    }
}

impl Sought {
    /// What the search took. A run of leaves at one place, as nearly all writes make, costs nothing.
    pub(super) fn work(&self) -> usize {
        let found = self.tables.len() + self.leaves.len();
        if found == 1 && self.tables.is_empty() { 0 } else { found }
    }

    /// Goes on to another place where the write is reached.
    pub(super) const fn next_place(&mut self, audit: &Audit) {
        self.tables_left = audit.index.budget();
    }

    fn spend(&mut self) -> Result<(), Unfit> {
        self.left = self.left.checked_sub(1).ok_or(Unfit::TooMuch)?;
        Ok(())
    }

    /// Leaves, `count` from `va` on, of a table at this place.
    pub(super) fn leaves(
        &mut self,
        place: &Place,
        (va, level): (Gva, Level),
        entry: Entry,
        (count, seq): (u64, u64),
    ) -> Result<(), Unfit> {
        self.spend()?;
        self.leaves.push(Run { first: Mapping::at(place, va, level, entry, seq), count });
        Ok(())
    }

    /// What an entry of `level` for `va` would map, in a table at this place.
    pub(super) fn entry(
        &mut self,
        audit: &Audit,
        (entry, level): (Entry, Level),
        (place, va): (&Place, Gva),
        (seq, world): (u64, &impl World),
    ) -> Result<(), Unfit> {
        if !entry.is_present() {
            return Ok(());
        }
        let Some(below) = level.below().filter(|_| !entry.is_leaf(level)) else {
            return self.leaf(Mapping::at(place, va, level, entry, seq));
        };
        let table = entry.frame(level);
        self.table(audit, (table, below), &place.below(entry, va, seq), world)
    }

    /// What a table of `level` would map at this place.
    pub(super) fn table(
        &mut self,
        audit: &Audit,
        (frame, level): (Gfn, Level),
        place: &Place,
        world: &impl World,
    ) -> Result<(), Unfit> {
        let mut words: TableWords = [0; PAGE_WORDS];
        let Place { root, va, since, .. } = *place;
        if !audit.config.layout.pool.contains(frame.gpa()) || !world.read_table(frame, &mut words) {
            let detail = "a table was to be linked that does not lie in the table pool".to_owned();
            let finding = Finding::new(Rule::TableAlias, since, detail);
            let (frame, va, root) = (Some(frame), Some(va), Some(root));
            return Err(Finding { frame, va, root, ..finding }.into());
        }
        self.spend()?;
        self.tables_left = self.tables_left.checked_sub(1).ok_or(Unfit::TooMuch)?;
        if let Some((_, write)) = self.written.filter(|(table, _)| *table == frame) {
            let first = usize::try_from(write.level.index(write.va)).unwrap_or(PAGE_WORDS);
            let written = (0..u64::from(write.count)).zip(words.iter_mut().skip(first));
            written.for_each(|(index, word)| *word = write.new.nth_of_run(write.level, index).0);
        }
        let fresh = audit.index.tables.linked_at(frame).next().is_none();
        self.tables.push(TableAt { frame, root, va, level, fresh });
        for (index, word) in (0..).zip(words) {
            let va = child_address(place.va, level, index);
            self.entry(audit, (Entry(word), level), (place, va), (since, world))?;
        }
        Ok(())
    }

    /// One leaf, with those before it if it goes on where they end.
    fn leaf(&mut self, mapping: Mapping) -> Result<(), Unfit> {
        if let Some(run) = self.leaves.last_mut() {
            let Run { first, count } = *run;
            let next = Mapping {
                va: first.va.wrapping_add(count * first.level.span()),
                frame: first.frame.wrapping_add(count * first.level.frames()),
                ..first
            };
            // A run lies in one table: what goes on in the next one starts anew.
            if mapping == next && first.level.index(mapping.va) != 0 {
                run.count += 1;
                return Ok(());
            }
        }
        self.spend()?;
        self.leaves.push(Run { first: mapping, count: 1 });
        Ok(())
    }
}
