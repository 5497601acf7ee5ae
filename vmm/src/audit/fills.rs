//! Tables that no root reaches: what the record that links one finds in it, whatever has become of the
//! table when that record is judged.

use super::world::TableWords;
use lacuna_abi::addr::Gfn;
use lacuna_abi::event::TableFill;
use lacuna_abi::gate::PAGE_WORDS;
use lacuna_abi::paging::Entry;
use std::collections::BTreeMap;

/// What is known of one.
#[derive(Clone, Debug)]
enum Contents {
    /// It was filled.
    Fill(TableFill),
    /// All of its words, where the host sees every store.
    Words(Box<TableWords>),
}

/// What is known of each table that was not linked since. Only frames of the table pool are entered,
/// which bounds them.
#[derive(Clone, Debug, Default)]
pub(super) struct Fills(BTreeMap<Gfn, Contents>);

impl Fills {
    pub(super) fn add(&mut self, fill: &TableFill) {
        self.0.insert(fill.table.frame(), Contents::Fill(*fill));
    }

    /// The table holds these words.
    pub(super) fn put(&mut self, table: Gfn, words: Box<TableWords>) {
        self.0.insert(table, Contents::Words(words));
    }

    /// Words of a table were stored: `count` from `first` on, `new` of each. All others hold what they
    /// did, or nothing.
    pub(super) fn store(&mut self, table: Gfn, first: u64, count: u64, new: impl Fn(u64) -> Entry) {
        let contents = self.0.entry(table).or_insert_with(Contents::empty);
        let words = contents.words();
        for index in 0..count {
            let at = usize::try_from(first + index).ok();
            if let Some(word) = at.and_then(|at| words.get_mut(at)) {
                *word = new(index).0;
            }
        }
    }

    /// All entries of a table that was filled; false for one of which nothing is known.
    pub(super) fn table(&self, table: Gfn, into: &mut TableWords) -> bool {
        let Some(contents) = self.0.get(&table) else { return false };
        contents.copy(into);
        true
    }

    /// The table is linked or freed: from now on every change of it has its own record.
    pub(super) fn remove(&mut self, table: Gfn) {
        self.0.remove(&table);
    }

    /// Forgets all but fills: not every store is seen any more.
    pub(super) fn clear_words(&mut self) {
        self.0.retain(|_, contents| matches!(contents, Contents::Fill(_)));
    }
}

impl Contents {
    fn empty() -> Self {
        Self::Words(Box::new([0; PAGE_WORDS]))
    }

    fn copy(&self, into: &mut TableWords) {
        match self {
            Self::Words(words) => into.copy_from_slice(&words[..]),
            Self::Fill(fill) => {
                for (index, word) in (0..).zip(into) {
                    *word = fill.entry(index).0;
                }
            }
        }
    }

    /// Its words, each by itself from here on.
    fn words(&mut self) -> &mut TableWords {
        if let Self::Fill(_) = self {
            let mut words = Box::new([0; PAGE_WORDS]);
            self.copy(&mut words);
            *self = Self::Words(words);
        }
        match self {
            Self::Words(words) => words,
            Self::Fill(_) => unreachable!("it was turned into words just now"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_abi::addr::Gpa;
    use lacuna_abi::paging::Level;

    #[test]
    fn a_fill_answers_for_its_own_table_until_it_is_removed() {
        let mut fills = Fills::default();
        let first = Entry::new(Gfn(0x200), Entry::DATA);
        fills.add(&TableFill { table: Gpa(0x5000), level: Level::Pt, first });
        let mut words = [0; 512];
        assert!(fills.table(Gfn(5), &mut words));
        assert_eq!(words[511], Entry::new(Gfn(0x3ff), Entry::DATA).0);
        assert!(!fills.table(Gfn(4), &mut words) && !fills.table(Gfn(6), &mut words));
        fills.remove(Gfn(5));
        assert!(!fills.table(Gfn(5), &mut words));
    }

    #[test]
    fn a_store_changes_its_own_word_of_a_fill_or_of_nothing() {
        let mut fills = Fills::default();
        let first = Entry::new(Gfn(0x200), Entry::DATA);
        fills.add(&TableFill { table: Gpa(0x5000), level: Level::Pt, first });
        fills.store(Gfn(5), 3, 1, |_| Entry(7));
        fills.store(Gfn(6), 511, 2, |_| Entry(9));
        let mut words = [1; 512];
        assert!(fills.table(Gfn(5), &mut words));
        assert_eq!((words[2], words[3]), (Entry::new(Gfn(0x202), Entry::DATA).0, 7));
        assert!(fills.table(Gfn(6), &mut words));
        assert_eq!((words[0], words[511]), (0, 9));
        fills.clear_words();
        assert!(!fills.table(Gfn(6), &mut words));
    }
}
