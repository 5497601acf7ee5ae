//! What a table holds that CPUs may still walk to, run by run: addresses are counted from the first
//! that it spans.

use super::duty::cut;
use super::fill::Run;
use lacuna_abi::addr::FrameRange;
use lacuna_abi::paging::Level;

/// The byte of address behind the run.
pub(super) fn run_end(run: &Run) -> u64 {
    run.va.0 + run.frames.count().div_ceil(run.level.frames()) * run.level.span()
}

/// Large pages are stored one by one.
pub(super) fn stored(run: Run) -> impl Iterator<Item = Run> {
    let small = run.level == Level::Pt;
    small.then_some(run).into_iter().chain((!small).then(|| run.entries()).into_iter().flatten())
}

/// The part of the run in these bytes of address; a large page is whole.
pub(super) fn between(run: &Run, from: u64, to: u64) -> Run {
    if run.level != Level::Pt {
        return *run;
    }
    let page = |va: u64| va.saturating_sub(run.va.0) / Level::Pt.span();
    let (first, end) = (page(from), page(to).min(run.frames.count()));
    let start = run.frames.start().wrapping_add(first);
    FrameRange::new(start, end.saturating_sub(first)).map_or(*run, |frames| part(run, frames))
}

/// The part of a run of small pages that maps these frames.
pub(super) fn part(run: &Run, frames: FrameRange) -> Run {
    let skipped = frames.start().0 - run.frames.start().0;
    Run { va: run.va.wrapping_add(skipped * Level::Pt.span()), frames, ..*run }
}

/// Takes over what a table holds. Of an entry that is known already the older grant counts: through
/// one path it may have been reachable earlier than through another.
pub(super) fn learn(known: &mut Vec<Run>, leaves: &[Run]) {
    if known.is_empty() {
        known.extend(leaves.iter().copied().flat_map(stored));
        return;
    }
    // Mostly it holds what it held, in the same order: then the next one is what is looked for.
    let mut next = 0;
    for run in leaves.iter().copied().flat_map(stored) {
        let same = |old: &Run| {
            (old.va, old.level, old.frames, old.global)
                == (run.va, run.level, run.frames, run.global)
        };
        if let Some(old) = known.get_mut(next).filter(|old| same(old)) {
            old.since = old.since.min(run.since);
            next += 1;
            continue;
        }
        let older = |old: &&mut Run| same(old);
        if let Some(old) = known.iter_mut().find(older) {
            old.since = old.since.min(run.since);
        } else {
            merge(known, &run);
        }
    }
}

/// The same where runs do not lie alike, entry by entry.
fn merge(known: &mut Vec<Run>, run: &Run) {
    for entry in run.entries() {
        let covers = |old: &&Run| old.va.0 < run_end(&entry) && run_end(old) > entry.va.0;
        match known.iter().find(covers) {
            Some(old) if old.since <= entry.since => {}
            Some(_) => {
                let old: Vec<Run> = std::mem::take(known);
                for run in old {
                    let gone = run.va.0 < run_end(&entry) && run_end(&run) > entry.va.0;
                    if gone {
                        let gone = between(&run, entry.va.0, run_end(&entry));
                        known.extend(cut(run.frames, gone.frames).map(|f| part(&run, f)));
                    } else {
                        known.push(run);
                    }
                }
                known.push(entry);
            }
            None => known.push(entry),
        }
    }
}
