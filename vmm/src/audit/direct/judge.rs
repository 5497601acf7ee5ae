//! Whether what would be mapped may be.

use super::Unfit;
use super::sought::Sought;
use crate::audit::Audit;
use crate::audit::finding::{Finding, Rule};
use crate::audit::index::{Mapping, Run};
use crate::audit::mappings::{alias_rule, describe};
use crate::audit::writes::{revoke_of, still_walked};
use lacuna_abi::addr::{FrameRange, Gfn, PAGE_SIZE};
use lacuna_abi::layout::{Place, Region};
use lacuna_abi::paging::Level;

impl Audit {
    /// Judges all that would be mapped and linked; `replaced` says which mappings would be gone.
    pub(super) fn judge_sought(
        &self,
        sought: &Sought,
        replaced: &dyn Fn(&Mapping) -> bool,
        seq: u64,
    ) -> Result<(), Unfit> {
        let index = &self.index;
        if !sought.tables.is_empty() && index.tables.all_places() + sought.tables.len() > index.room
        {
            return Err(Unfit::TooMuch);
        }
        for run in &sought.leaves {
            if run.first.level > Level::Pd {
                // They may lie in several windows.
                let each = run.entries().map(|first| Run { first, count: 1 });
                each.into_iter().try_for_each(|one| self.judge_leaf_run(&one, replaced, seq))?;
            } else {
                self.judge_leaf_run(run, replaced, seq)?;
            }
        }
        judge_each_other(&sought.leaves, seq)?;
        self.judge_moved_tables(sought, seq)
    }

    fn judge_leaf_run(
        &self,
        run: &Run,
        replaced: &dyn Fn(&Mapping) -> bool,
        seq: u64,
    ) -> Result<(), Unfit> {
        let Run { first, .. } = *run;
        let Self { frames, config, .. } = self;
        let (mapped, layout) = (run.frames(), &config.layout);
        let breaks =
            |rule, frame: Gfn, detail: String| Unfit::from(finding(run, rule, frame, seq, detail));
        if let Some(table) = layout.pool.frames().and_then(|pool| pool.intersection(mapped)) {
            let detail = "a frame of the table pool was to be mapped; under direct paging it is \
                          mapped nowhere";
            return Err(breaks(Rule::TableAlias, table.start(), detail.to_owned()));
        }
        let place = layout.place_of(first.va);
        if first.global && matches!(place, Place::Window(_)) {
            let detail = "a window was to be mapped with the Global bit, which survives root loads; \
                          windows are mapped without";
            return Err(breaks(Rule::GlobalWindow, mapped.start(), detail.to_owned()));
        }
        if frames.some_secret(mapped) {
            let stranger = |frame: Gfn| match place {
                Place::Window(owner) => {
                    u8::try_from(owner).map_or(true, |owner| frames.open_count(frame, owner) == 0)
                }
                Place::DirectMap | Place::Pool | Place::Other => true,
            };
            if let Some(frame) = frames.find_secret(mapped, stranger) {
                let (place_name, right) = describe(place);
                let detail = format!("a secret frame was to be mapped in {place_name}; {right}");
                return Err(breaks(alias_rule(place), frame, detail));
            }
        }
        if first.rights.user
            && let Some(kernel) = layout
                .regions()
                .iter()
                .find_map(|(_, region): &(_, Region)| region.frames()?.intersection(mapped))
        {
            let detail = "ring 3 could reach it: U/S would be set at every level; it must be clear";
            return Err(breaks(Rule::UserAccess, kernel.start(), detail.to_owned()));
        }
        self.judge_rights(run, replaced, seq)
    }

    /// No frame would be writable somewhere and executable somewhere, and the kernel's text is writable
    /// nowhere.
    fn judge_rights(
        &self,
        run: &Run,
        replaced: &dyn Fn(&Mapping) -> bool,
        seq: u64,
    ) -> Result<(), Unfit> {
        let (mapped, rights) = (run.frames(), run.first.rights);
        let breaks = |frame: Gfn, detail: String| {
            Unfit::from(finding(run, Rule::WriteExecute, frame, seq, detail))
        };
        let text = self.text.iter().find_map(|text| text.intersection(mapped));
        if let Some(text) = text.filter(|_| rights.writable) {
            let detail = "the kernel's text was to be mapped writable".to_owned();
            return Err(breaks(text.start(), detail));
        }
        if rights.writable && rights.executable {
            let detail = "it was to be mapped both writable and executable".to_owned();
            return Err(breaks(mapped.start(), detail));
        }
        let index = &self.index;
        let other = if rights.executable && index.writable(mapped).is_some() {
            index.of_frames(mapped).find(|other| other.rights.writable && !replaced(other))
        } else if rights.writable && index.executable(mapped).is_some() {
            index.of_frames(mapped).find(|other| other.rights.executable && !replaced(other))
        } else {
            None
        };
        let Some(other) = other else { return Ok(()) };
        let both = other.frames().intersection(mapped).unwrap_or(mapped);
        let (here, there) =
            if rights.writable { ("writable", "executable") } else { ("executable", "writable") };
        let detail = format!(
            "it was to be mapped {here} and is {there} at {} (root {}): one of the two must go first",
            other.va, other.root
        );
        Err(breaks(both.start(), detail))
    }

    /// `stale-table`: a table that was linked nowhere is not linked at another place than before while a
    /// CPU may still walk to it from the old one.
    fn judge_moved_tables(&self, sought: &Sought, seq: u64) -> Result<(), Unfit> {
        for table in sought.tables.iter().filter(|table| table.fresh) {
            let duties = self.tlb.of_table(table.frame).into_iter();
            let mut elsewhere =
                duties.filter(|duty| (duty.root, duty.va) != (table.root, table.va));
            let Some(duty) = elsewhere.next() else { continue };
            let detail =
                format!("the table was to be linked at {} while {}", table.va, still_walked(&duty));
            let finding = Finding::new(Rule::StaleTable, seq, detail);
            let (frame, va, root) = (Some(table.frame), Some(table.va), Some(table.root));
            return Err(Finding { frame, va, root, revoked: revoke_of(&duty), ..finding }.into());
        }
        Ok(())
    }
}

/// Nothing that is mapped executable by a write is mapped writable by the same write.
fn judge_each_other(leaves: &[Run], seq: u64) -> Result<(), Unfit> {
    if !leaves.iter().any(|run| run.first.rights.executable) {
        return Ok(());
    }
    let mut writable: Vec<FrameRange> =
        leaves.iter().filter(|run| run.first.rights.writable).map(Run::frames).collect();
    writable.sort_unstable_by_key(|range| range.start());
    // The furthest end of all up to each: the ranges may overlap.
    let mut end = Gfn(0);
    let ends: Vec<Gfn> = writable
        .iter()
        .map(|range| {
            end = end.max(range.end());
            end
        })
        .collect();
    for run in leaves.iter().filter(|run| run.first.rights.executable) {
        let mapped = run.frames();
        let before = writable.partition_point(|range| range.start() < mapped.end());
        if before > 0 && ends[before - 1] > mapped.start() {
            let detail = "it was to be mapped executable here and writable elsewhere at once";
            let rule = Rule::WriteExecute;
            return Err(finding(run, rule, mapped.start(), seq, detail.to_owned()).into());
        }
    }
    Ok(())
}

/// A finding about one frame of a run.
fn finding(run: &Run, rule: Rule, frame: Gfn, seq: u64, detail: String) -> Finding {
    let first = run.first;
    let offset = frame.0.saturating_sub(first.frame.0) * PAGE_SIZE;
    let va = first.va.wrapping_add(offset & !(first.level.span() - 1));
    let (frame, va, root) = (Some(frame), Some(va), Some(first.root));
    Finding { frame, va, root, ..Finding::new(rule, seq, detail) }
}
