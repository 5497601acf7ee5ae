//! Rules about one mapping: what it may map, with which rights.

use super::finding::{Finding, Rule};
use super::frames::Frames;
use super::index::{Index, Mapping, Run, Walked};
use super::{Audit, Ledger};
use lacuna_abi::addr::{FrameRange, Gfn, PAGE_SIZE};
use lacuna_abi::layout::{Layout, Place, Region};
use lacuna_abi::paging::Level;

/// Rules that judge every mapping: of those that a walk does not reach they cannot tell.
const OF_MAPPINGS: [Rule; 7] = [
    Rule::DirectMapAlias,
    Rule::ForeignAlias,
    Rule::GlobalWindow,
    Rule::TableAlias,
    Rule::WriteExecute,
    Rule::UserAccess,
    Rule::TraceHonesty,
];

impl Audit {
    /// Judges all mappings that were found or written, and where their tables lie.
    pub(super) fn judge_walked(&mut self, walked: &Walked, cpu: Option<u8>, seq: u64) {
        self.judge_leaves(&walked.leaves, cpu, seq);
        self.judge_tables(walked, cpu, seq);
    }

    /// Judges leaves that were found or written.
    pub(super) fn judge_leaves(&mut self, leaves: &[Run], cpu: Option<u8>, seq: u64) {
        let direct = self.is_direct();
        let Self { ledger, frames, index, config, .. } = self;
        for run in leaves {
            if judge_run(ledger, frames, index, &config.layout, run) {
                continue;
            }
            for mapping in run.entries() {
                let at = Sight { mapping: &mapping, cpu, seq };
                judge_mapping(ledger, frames, index, (&config.layout, direct), &at);
            }
        }
    }

    /// Judges where the tables lie that were found, and whether all were.
    pub(super) fn judge_tables(&mut self, walked: &Walked, cpu: Option<u8>, seq: u64) {
        for (root, at, table, va) in &walked.unreadable {
            let detail = format!(
                "the entry at {at} leads to a table at {table}, outside the table pool; \
                 every table must lie in the pool"
            );
            let finding = Finding::new(Rule::TableAlias, seq, detail);
            let (frame, va, root) = (Some(table.frame()), Some(*va), Some(*root));
            self.ledger.violation(Finding { frame, va, cpu, root, ..finding });
        }
        if walked.endless {
            for rule in OF_MAPPINGS {
                self.ledger.not_checked(rule, 1);
            }
            let reason = "a root reaches more tables than the pool has pages".to_owned();
            self.ledger.inconclusive(reason);
        }
        if self.index.is_full() {
            self.ledger.inconclusive("tables are linked at more places than can be".to_owned());
        }
    }
}

/// Judges a run of mappings at once, where all is well: true if it was. Otherwise nothing is counted,
/// and each mapping is to be judged by itself.
#[inline]
pub(super) fn judge_run(
    ledger: &mut Ledger,
    frames: &Frames,
    index: &Index,
    layout: &Layout,
    run: &Run,
) -> bool {
    let Run { first, count } = *run;
    let mapped = run.frames();
    // What is no part of the zone has rules that depend on each frame; it is seldom mapped.
    if !frames.zone().contains_range(mapped) || first.rights.user || first.level > Level::Pd {
        return false;
    }
    let place = layout.place_of(first.va);
    let secret = frames.some_secret(mapped);
    if secret {
        let Place::Window(owner) = place else { return false };
        let theirs = |owner| frames.all_secret_and_open(mapped, owner);
        if first.global || !u8::try_from(owner).is_ok_and(theirs) {
            return false;
        }
    }
    if first.rights.executable && index.writable(mapped).is_some()
        || first.rights.writable && index.executable(mapped).is_some()
    {
        return false;
    }
    ledger.checked(alias_rule(place), count);
    ledger.checked(Rule::GlobalWindow, if secret { count } else { 0 });
    ledger.checked(Rule::UserAccess, count);
    ledger.checked(Rule::WriteExecute, count);
    true
}

/// Judges one mapping by every rule that concerns mappings.
pub(super) fn judge_mapping(
    ledger: &mut Ledger,
    frames: &Frames,
    index: &Index,
    (layout, direct): (&Layout, bool),
    at: &Sight<'_>,
) {
    judge_alias(ledger, frames, layout, at);
    judge_table_alias(ledger, layout, direct, at);
    judge_user(ledger, layout, at);
    judge_write_execute(ledger, index, at);
}

/// A mapping and the event at which it was seen.
pub(super) struct Sight<'a> {
    pub mapping: &'a Mapping,
    pub cpu: Option<u8>,
    pub seq: u64,
}

impl Sight<'_> {
    fn finding(&self, rule: Rule, frame: Option<Gfn>, detail: String) -> Finding {
        let (va, root) = (Some(self.mapping.va), Some(self.mapping.root));
        Finding { frame, va, cpu: self.cpu, root, ..Finding::new(rule, self.seq, detail) }
    }
}

/// `direct-map-alias`, `foreign-alias` and `global-window`: one finding for each mapping, which
/// names the first frame that must not be mapped there.
/// Whether all is well.
pub(super) fn judge_alias(
    ledger: &mut Ledger,
    frames: &Frames,
    layout: &Layout,
    at: &Sight<'_>,
) -> bool {
    let mapping = at.mapping;
    let mapped = mapping.frames();
    let secret = frames.secret_in(mapped);
    let place = layout.place_of(mapping.va);
    let rule = alias_rule(place);
    ledger.checked(rule, 1);
    if secret == 0 {
        return true;
    }
    let stranger = |frame: Gfn| match place {
        Place::Window(owner) => {
            u8::try_from(owner).map_or(true, |owner| frames.open_count(frame, owner) == 0)
        }
        Place::DirectMap | Place::Pool | Place::Other => true,
    };
    let found = frames.find_secret(mapped, stranger);
    if let Some(frame) = found {
        let (place, right) = describe(place);
        let detail = format!(
            "mapped in {place} by an entry of level {} that maps {secret} secret frame(s); {right}",
            mapping.level.number()
        );
        ledger.violation(at.finding(rule, Some(frame), detail));
    }
    ledger.checked(Rule::GlobalWindow, 1);
    if mapping.global {
        let detail = "a mapping of a secret frame has the Global bit and survives root loads; \
                      it must be mapped without"
            .to_owned();
        let frame = frames.find_secret(mapped, |_| true);
        ledger.violation(at.finding(Rule::GlobalWindow, frame, detail));
    }
    found.is_none() && !mapping.global
}

/// The rule that a secret frame breaks that is mapped there.
pub(super) const fn alias_rule(place: Place) -> Rule {
    match place {
        Place::DirectMap => Rule::DirectMapAlias,
        Place::Window(_) | Place::Pool | Place::Other => Rule::ForeignAlias,
    }
}

pub(super) fn describe(place: Place) -> (String, &'static str) {
    match place {
        Place::DirectMap => (
            "the direct map".to_owned(),
            "its entry must be cleared and flushed before the frame is sealed",
        ),
        Place::Window(owner) => {
            (format!("the window of CPU {owner}"), "a window may map only what its CPU has open")
        }
        Place::Pool => ("the place of the table pool".to_owned(), "only windows may map it"),
        Place::Other => ("a place that is no window".to_owned(), "only windows may map it"),
    }
}

/// No frame of the table pool is writable but by the pool's own mapping.
/// Under direct paging there is no such mapping, and it may not be mapped at all.
fn judge_table_alias(ledger: &mut Ledger, layout: &Layout, direct: bool, at: &Sight<'_>) {
    let mapping = at.mapping;
    let Some(pool) = layout.pool.frames() else { return };
    let Some(tables) = mapping.frames().intersection(pool) else { return };
    ledger.checked(Rule::TableAlias, 1);
    let offset = (tables.start().0 - mapping.frame.0) * PAGE_SIZE;
    if direct {
        let detail = "a table is mapped here; under direct paging nothing may map it".to_owned();
        ledger.violation(at.finding(Rule::TableAlias, Some(tables.start()), detail));
        return;
    }
    let own_place = layout.pool.va_of(tables.start().gpa());
    if mapping.rights.writable && mapping.va.wrapping_add(offset) != own_place {
        let detail = format!("a table is writable here; only {own_place} may map it writable");
        ledger.violation(at.finding(Rule::TableAlias, Some(tables.start()), detail));
    }
}

/// No kernel or secret frame is reachable from ring 3.
fn judge_user(ledger: &mut Ledger, layout: &Layout, at: &Sight<'_>) {
    let frames = at.mapping.frames();
    let in_region = |(_, region): (_, Region)| region.frames()?.intersection(frames);
    let Some(kernel) = layout.regions().into_iter().find_map(in_region) else { return };
    ledger.checked(Rule::UserAccess, 1);
    if at.mapping.rights.user {
        let detail = "ring 3 can reach it: U/S is set at every level; it must be clear".to_owned();
        ledger.violation(at.finding(Rule::UserAccess, Some(kernel.start()), detail));
    }
}

/// No frame is writable somewhere and executable somewhere.
fn judge_write_execute(ledger: &mut Ledger, index: &Index, at: &Sight<'_>) {
    let frames = at.mapping.frames();
    ledger.checked(Rule::WriteExecute, 1);
    let rights = at.mapping.rights;
    let pair = if rights.executable {
        index.writable(frames).map(|writable| (*at.mapping, writable))
    } else if rights.writable {
        index.executable(frames).map(|executable| (executable, *at.mapping))
    } else {
        None
    };
    let Some((executable, writable)) = pair else { return };
    let both = executable.frames().intersection(writable.frames());
    let detail = format!(
        "executable at {} and writable at {} (root {}): one of the two must go",
        executable.va, writable.va, writable.root
    );
    let finding = at.finding(Rule::WriteExecute, both.map(FrameRange::start), detail);
    let (va, root) = (Some(executable.va), Some(executable.root));
    ledger.violation(Finding { va, root, ..finding });
}
