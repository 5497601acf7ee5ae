//! Every change of a table with every invalidation, at addresses of the program's own.

use super::relay::Target;
use super::{Attempts, OTHER, ROOM, Relay};
use crate::alloc::{PageAllocator, Request};
use crate::freetype::Migratetype;
use crate::platform::{CpuSet, InterruptsOff, Platform};
use crate::programs::{ProgramError, Services, Team};
use crate::space::{self, Run};
use lacuna_abi::addr::{BLOCK_ORDER, BLOCK_SIZE, Gfn, Gpa, Gva};
use lacuna_abi::event::Flush;
use lacuna_abi::layout::direct_map;
use lacuna_abi::observe::{Case, Change, Means, Observation, Seen};
use lacuna_abi::paging::{Entry, Level};

/// Rounds after which the host may check everything: how many tables may be linked in between is
/// bounded.
const CHECKED_AFTER: u64 = 1000;

/// What is changed: two addresses in the direct map's slot behind the memory that there is. That way
/// the host follows what every CPU may cache of them, and the page directory is there.
struct Arena {
    /// An entry of a page table that is linked behind the last pageblock.
    small: Run,
    /// The entry that leads to that table.
    link: Run,
    /// The next entry of the page directory.
    large: Run,
    /// A table of 4 KiB entries for `second`, which no root reaches.
    split: Gpa,
    /// Pageblocks that are mapped at first, and afterwards.
    first: Gfn,
    second: Gfn,
    /// The function that is fetched.
    code: Option<Gpa>,
}

/// CPU 0's part: changes, and all accesses but those of the other CPU.
///
/// # Errors
/// [`ProgramError`].
pub(super) fn lead<P: Attempts>(
    allocator: &PageAllocator<'_, P>,
    platform: &P,
    services: &impl Services,
    (team, relay): (&Team, &Relay),
    rounds: u64,
) -> Result<(), ProgramError> {
    let migratetype = Migratetype::Unmovable;
    let request = Request { order: BLOCK_ORDER as u8, migratetype, zero: true, noblock: false };
    let block = |number| {
        allocator.alloc_mapped(request).map_err(|error| ProgramError::Alloc { number, error })
    };
    let (first, second) = (block(0)?, block(1)?);
    let (first, second) = (first.pin(), second.pin());
    for block in [&first, &second] {
        platform.store(block.va(), block.frames().start().gpa().0);
    }
    let (first, second) = (first.frames().start(), second.frames().start());
    let tables = [allocator.new_table(), allocator.new_table()];
    let ended = match tables {
        [Some(table), Some(split)] => {
            Arena::build(allocator, platform, (table, split), (first, second)).and_then(|arena| {
                let ended = Probe { platform, team, relay, arena: &arena }.all(services, rounds);
                arena.dismantle(platform);
                ended
            })
        }
        _ => Err(ProgramError::NoPlace),
    };
    tables.into_iter().flatten().for_each(|table| allocator.free_table(table));
    ended
}

impl Arena {
    fn build<P: Attempts>(
        allocator: &PageAllocator<'_, P>,
        platform: &P,
        (table, split): (Gpa, Gpa),
        (first, second): (Gfn, Gfn),
    ) -> Result<Self, ProgramError> {
        let (zone, pool) = (&allocator.layout.zone, &allocator.layout.pool);
        let behind = direct_map(zone.end());
        let free = |va: Gva| {
            let at = space::locate(platform, pool, va, Level::Pd).ok()?;
            let free = !platform.read_entry(at).is_present();
            free.then_some(Run { at, va, level: Level::Pd, count: 1 })
        };
        let places = free(behind).zip(free(behind.wrapping_add(BLOCK_SIZE)));
        let (link, large) = places.ok_or(ProgramError::NoPlace)?;
        let split_first = Entry::new(second, Entry::DATA);
        space::must(platform.fill_table(table, Level::Pt, Entry::EMPTY), "fill a table");
        space::must(platform.fill_table(split, Level::Pt, split_first), "fill a table");
        write(platform, link, Entry::new(table.frame(), Entry::TABLE));
        let small = Run { at: table, level: Level::Pt, ..link };
        Ok(Self { link, small, large, split, first, second, code: platform.code() })
    }

    /// Clears everything; no CPU may have any of it cached afterwards.
    fn dismantle<P: Attempts>(&self, platform: &P) {
        write(platform, self.small, Entry::EMPTY);
        write(platform, self.large, Entry::EMPTY);
        write(platform, self.link, Entry::EMPTY);
        platform.shootdown(Flush::Everything, CpuSet::first(platform.cpus()));
    }

    /// What is changed in this case, from which entry to which.
    fn of(&self, case: Case) -> Option<(Run, Entry, Entry)> {
        let global = if case.global() { Entry::GLOBAL } else { 0 };
        let small = |frame, flags| Entry::new(frame, flags | global);
        let mapped = small(self.first, Entry::DATA);
        let large = small(self.first, Entry::DATA | Entry::PAGE_SIZE);
        Some(match case.change() {
            Change::Clear => (self.small, mapped, Entry::EMPTY),
            Change::Remap => (self.small, mapped, small(self.second, Entry::DATA)),
            Change::ReadOnly => (self.small, mapped, small(self.first, Entry::READ_ONLY)),
            Change::NoExecute => {
                let code = self.code?.frame();
                (self.small, small(code, Entry::TEXT), small(code, Entry::READ_ONLY))
            }
            Change::ClearLarge => (self.large, large, Entry::EMPTY),
            Change::Split => (self.large, large, Entry::new(self.split.frame(), Entry::TABLE)),
            Change::Flip => return None,
        })
    }
}

/// Changes an entry from whatever it is.
#[inline(always)]
fn write<P: Platform>(platform: &P, run: Run, new: Entry) {
    let old = platform.read_entry(run.at);
    if old != new {
        space::must(space::write(platform, run, old, new), "change an entry of the arena");
    }
}

struct Probe<'p, P: Attempts> {
    platform: &'p P,
    team: &'p Team,
    relay: &'p Relay,
    arena: &'p Arena,
}

impl<P: Attempts> Probe<'_, P> {
    fn all(&self, services: &impl Services, rounds: u64) -> Result<(), ProgramError> {
        let mut done = 0;
        for case in Case::all() {
            let Some(change) = self.arena.of(case).filter(|_| self.offers(case)) else {
                // The other scenario's case is no part of this one.
                if case.change() != Change::Flip {
                    let (va, seen) = (self.arena.small.va, Seen::NotOffered);
                    self.platform.observe(|| Observation { case, va, seen });
                }
                continue;
            };
            for _ in 0..rounds {
                if case.other() {
                    self.other(case, change)?
                } else {
                    self.own(case, change)?
                }
                done += 1;
                if done % CHECKED_AFTER == 0 {
                    services.progress(done);
                    services.checkpoint();
                }
            }
        }
        services.progress(done);
        Ok(())
    }

    fn offers(&self, case: Case) -> bool {
        let has_other = self.platform.cpus() > OTHER;
        self.platform.offers(case.means()) && (has_other || !case.other())
    }

    /// A round in which this CPU does everything, with interrupts off.
    fn own(
        &self,
        case: Case,
        (run, granted, new): (Run, Entry, Entry),
    ) -> Result<(), ProgramError> {
        let Self { platform, .. } = *self;
        let target = self.target(case, run, granted);
        let _off = InterruptsOff::new(platform);
        platform.make_room(ROOM);
        write(platform, run, Entry::EMPTY);
        platform.flush(Flush::Everything);
        platform.prepare(case.means());
        write(platform, run, granted);
        let reached = target.reach(platform).is_some();
        if reached {
            write(platform, run, new);
            platform.invalidate(case.means(), run.va);
            target.observe(platform);
        }
        platform.restore(case.means());
        if reached { Ok(()) } else { Err(ProgramError::Unreached(case)) }
    }

    /// A round in which the other CPU makes both accesses.
    fn other(
        &self,
        case: Case,
        (run, granted, new): (Run, Entry, Entry),
    ) -> Result<(), ProgramError> {
        let Self { platform, team, relay, .. } = *self;
        let target = self.target(case, run, granted);
        let all = CpuSet::first(platform.cpus());
        platform.make_room(ROOM);
        write(platform, run, Entry::EMPTY);
        platform.shootdown(Flush::Everything, all);
        write(platform, run, granted);
        relay.call(platform, team, &target)?;
        platform.prepare(case.means());
        write(platform, run, new);
        match case.means() {
            Means::Ipi => platform.shootdown(page(run.va), all),
            means => platform.invalidate(means, run.va),
        }
        platform.restore(case.means());
        relay.changed(platform, team, (target.va, target.hit))
    }

    /// What is accessed while `granted` is mapped.
    fn target(&self, case: Case, run: Run, granted: Entry) -> Target {
        let hit = match (case.change(), self.arena.code) {
            (Change::NoExecute, Some(code)) => code,
            _ => granted.frame(run.level).gpa(),
        };
        Target { case, va: run.va, hit }
    }
}

/// INVLPG of one address.
const fn page(va: Gva) -> Flush {
    Flush::Pages { va, count: 1, level: Level::Pt }
}
