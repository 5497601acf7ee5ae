//! Plain writes, as nearly all are: leaves of a table that is linked once, whose record tells the
//! truth. They are judged by the same rules in the same order as any others (`writes`), in one pass
//! over the entries.

use super::Audit;
use super::index::{Index, Mapping, Run, Site, is_table};
use super::links::{count_into, meaning, translates_on};
use super::mappings::judge_run;
use super::revokes::Grants;
use lacuna_abi::event::EntryWrite;
use lacuna_abi::layout::Layout;
use lacuna_abi::paging::Level;

impl Index {
    /// Whether the write is plain: then since when all its entries translate what they did.
    #[inline]
    pub(super) fn plain(&self, write: &EntryWrite, site: Site) -> Option<u64> {
        let EntryWrite { level, old, new, .. } = *write;
        let leads = |entry| level > Level::Pt && is_table(entry, level);
        // A large page moved on by the size of a page is none that leads to a table.
        if leads(old) || leads(new) {
            return None;
        }
        let count = u64::from(write.count);
        let first = level.index(write.va);
        let page = self.tables.page(site.id).filter(|page| page.is_linked_once(site.id))?;
        if !old.is_present() {
            return (page.gap((first, first + count)) == count).then_some(0);
        }
        let held = page.entry(first);
        // Accessed and dirty are nobody's business.
        let true_of_first = held == old || meaning(held, level) == meaning(old, level);
        let all = count == 1 || page.run(level, (first, first + count)) == count;
        (true_of_first && all).then(|| page.since(first))
    }

    /// Stores the entries of a plain write. What they map now is a run, if anything.
    #[inline]
    fn replace(
        &mut self,
        write: &EntryWrite,
        site: Site,
        since: u64,
        layout: &Layout,
    ) -> Option<Run> {
        let EntryWrite { level, new, .. } = *write;
        let (first, count) = (level.index(write.va), u64::from(write.count));
        let id = site.id;
        let Self { tables, aliases, zone_executable, .. } = self;
        let page = tables.page_mut(id)?;
        let held = page.entry(first);
        let run = (id, first, count);
        if held.is_present() {
            let tally = page.tally_mut(id);
            count_into(tally, aliases, zone_executable, run, held, false, layout);
        }
        let kept = translates_on(held, new, level);
        let since = if kept { page.since(first) } else { since };
        for index in 0..count {
            page.set(first + index, new.nth_of_run(level, index), since);
        }
        if !new.is_present() {
            return None;
        }
        let tally = page.tally_mut(id);
        count_into(tally, aliases, zone_executable, run, new, true, layout);
        let first = Mapping::at(&site.place, write.va, level, new, since);
        Some(Run { first, count })
    }
}

impl Audit {
    /// Takes a plain write; false if it is none, and nothing has been done.
    #[inline]
    pub(super) fn plain_write(
        &mut self,
        cpu: u8,
        write: &EntryWrite,
        (site, grant): (Site, u64),
        seq: u64,
    ) -> bool {
        if self.tlb.has_stale_tables() {
            return false;
        }
        let Some(since) = self.index.plain(write, site) else { return false };
        self.count_claim();
        let granted = (Some(site), Grants::All(since));
        if write.new.is_present() {
            self.judge_remap(write, granted, seq);
        }
        if write.old.is_present() {
            self.oblige_leaves(write, granted, seq);
        }
        let Self { index, config, ledger, frames, .. } = self;
        if let Some(run) = index.replace(write, site, grant, &config.layout)
            && !judge_run(ledger, frames, index, &config.layout, &run)
        {
            self.judge_leaves(&[run], Some(cpu), seq);
        }
        true
    }
}
