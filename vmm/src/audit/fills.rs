//! Tables that were filled while no root reached them: what the record that links one finds in it,
//! whatever has become of the table when that record is judged.

use super::world::TableWords;
use lacuna_abi::addr::Gfn;
use lacuna_abi::event::TableFill;
use std::collections::BTreeMap;

/// The last fill of each table that was not linked since. Only frames of the table pool are
/// entered, which bounds them.
#[derive(Clone, Debug, Default)]
pub(super) struct Fills(BTreeMap<Gfn, TableFill>);

impl Fills {
    pub(super) fn add(&mut self, fill: &TableFill) {
        self.0.insert(fill.table.frame(), *fill);
    }

    /// All entries of a table that was filled; false for one that was not.
    pub(super) fn table(&self, table: Gfn, into: &mut TableWords) -> bool {
        let Some(fill) = self.0.get(&table) else { return false };
        for (index, word) in (0..).zip(into) {
            *word = fill.entry(index).0;
        }
        true
    }

    /// The table is linked or freed: from now on every change of it has its own record.
    pub(super) fn remove(&mut self, table: Gfn) {
        self.0.remove(&table);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_abi::addr::Gpa;
    use lacuna_abi::paging::{Entry, Level};

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
}
