//! One store changes an entry wherever its page is linked as a table: at other places, and as a
//! table of other levels, where the same bits map or link something else.

use super::Audit;
use super::index::Site;
use super::links::meaning;
use super::writes::entries_of;
use lacuna_abi::addr::{Gpa, Gva};
use lacuna_abi::event::EntryWrite;
use lacuna_abi::paging::Entry;
use lacuna_abi::walk::child_address;

impl Audit {
    /// What the record of entries at `here` revokes at every other place of their page. `lies` are
    /// the entries of which it claims something else than they held.
    pub(super) fn revoke_elsewhere(
        &mut self,
        write: &EntryWrite,
        here: Site,
        lies: &[u64],
        seq: u64,
    ) {
        if self.index.is_linked_once(here.id) {
            return;
        }
        let others = self.index.other_places(write, here);
        self.link_work += others.len();
        for (site, va) in others {
            let there = self.write_at(write, site, va);
            self.revoke(&there, Some(site), lies, seq);
        }
        for site in self.index.other_roles(here) {
            self.revoke_as(write, site, lies, seq);
        }
    }

    /// The same where the page is a table of another level. A run steps by the level of the record,
    /// so each entry counts by itself.
    fn revoke_as(&mut self, write: &EntryWrite, site: Site, lies: &[u64], seq: u64) {
        let level = site.id.level();
        let (first, _) = entries_of(write);
        for index in 0..u64::from(write.count) {
            if self.is_link_work_used_up() {
                return;
            }
            self.link_work += 1;
            let nth = |entry: Entry| entry.nth_of_run(write.level, index);
            let (old, new) = (nth(write.old), nth(write.new));
            let va = child_address(site.place.va, level, first + index);
            let there = EntryWrite { level, count: 1, old, new, ..self.write_at(write, site, va) };
            if !lies.contains(&index) {
                self.revoke(&there, Some(site), &[], seq);
                continue;
            }
            // Both what it held and what the record claims may be cached.
            let page = self.index.tables.page(site.id);
            let held = page.map_or(Entry::EMPTY, |page| page.entry(first + index));
            self.revoke(&EntryWrite { old: held, ..there }, Some(site), &[], seq);
            if meaning(held, level) != meaning(old, level) {
                self.revoke(&there, Some(site), &[0], seq);
            }
        }
    }

    /// The record as one of entries from `va` on, at another place.
    fn write_at(&self, write: &EntryWrite, site: Site, va: Gva) -> EntryWrite {
        let root = site.place.root;
        EntryWrite { root, pcid: self.pcid_of(root), va, ..*write }
    }

    /// The PCID that a root is registered with.
    pub(super) fn pcid_of(&self, root: Gpa) -> u16 {
        self.roots.iter().find(|(known, _)| *known == root).map_or(0, |(_, pcid)| *pcid)
    }
}
