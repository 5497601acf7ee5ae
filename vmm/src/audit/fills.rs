//! Tables that were filled while no root reached them: what the record that links one finds in it,
//! whatever has become of the table when that record is judged.

use lacuna_abi::addr::{Gfn, Gpa};
use lacuna_abi::event::TableFill;
use lacuna_abi::paging::{ENTRIES, Entry};
use std::collections::BTreeMap;

/// The last fill of each table that was not linked since. Only frames of the table pool are
/// entered, which bounds them.
#[derive(Clone, Debug, Default)]
pub(super) struct Fills(BTreeMap<Gfn, TableFill>);

impl Fills {
    pub(super) fn add(&mut self, fill: &TableFill) {
        self.0.insert(fill.table.frame(), *fill);
    }

    /// The entry at `at` of a table that was filled.
    pub(super) fn entry(&self, at: Gpa) -> Option<Entry> {
        let fill = self.0.get(&at.frame())?;
        Some(fill.entry(at.0 / 8 % ENTRIES))
    }

    /// The table is linked or freed: from now on every change of it has its own record.
    pub(super) fn remove(&mut self, table: Gfn) {
        self.0.remove(&table);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_abi::paging::Level;

    #[test]
    fn a_fill_answers_for_its_own_table_until_it_is_removed() {
        let mut fills = Fills::default();
        let first = Entry::new(Gfn(0x200), Entry::DATA);
        fills.add(&TableFill { table: Gpa(0x5000), level: Level::Pt, first });
        assert_eq!(fills.entry(Gpa(0x5ff8)), Some(Entry::new(Gfn(0x3ff), Entry::DATA)));
        assert_eq!((fills.entry(Gpa(0x4ff8)), fills.entry(Gpa(0x6000))), (None, None));
        fills.remove(Gfn(5));
        assert_eq!(fills.entry(Gpa(0x5000)), None);
    }
}
