//! Where tables were found last: a guest writes the same few again and again.

use super::index::Site;
use lacuna_abi::addr::{Gpa, Gva};
use lacuna_abi::paging::Level;

/// The tables found last, by root, first address and level. What it says holds as long as no table has
/// come or gone since, which a number tells ([`changes`](super::tables::Tables::changes)).
#[derive(Clone, Debug, Default)]
pub(super) struct Recent([Option<(TableKey, Site, u64)>; 16]);

/// Root, first address that the table spans, level.
pub(super) type TableKey = (Gpa, Gva, Level);

impl Recent {
    pub(super) fn get(&self, key: TableKey, changes: u64) -> Option<Site> {
        let known = self.0.get(slot_of(key))?.as_ref()?;
        (known.0 == key && known.2 == changes).then_some(known.1)
    }

    pub(super) fn put(&mut self, key: TableKey, site: Site, changes: u64) {
        if let Some(slot) = self.0.get_mut(slot_of(key)) {
            *slot = Some((key, site, changes));
        }
    }
}

/// Windows lie far apart, and tables of the direct map close together.
fn slot_of((root, va, level): TableKey) -> usize {
    let mixed = va.0 >> 21 ^ va.0 >> 30 ^ va.0 >> 39 ^ root.0 >> 12 ^ u64::from(level.number());
    usize::try_from(mixed & 15).unwrap_or(0)
}
