//! Life-cycle records: what the allocator says of its frames, held against the host's own state.

use super::Audit;
use super::finding::{Finding, Rule};
use super::frames::runs;
use super::tlb::{cpu_list, members};
use super::writes::revoke_of;
use lacuna_abi::addr::{FrameRange, Gfn};
use lacuna_abi::event::Life;

impl Audit {
    /// Takes one life-cycle record of a CPU.
    #[inline]
    pub(super) fn life(&mut self, cpu: u8, life: Life, frames: FrameRange, seq: u64) {
        match life {
            Life::Pooled | Life::PooledZero | Life::Freed => {
                self.judge_pooled(cpu, life, frames, seq);
            }
            Life::TableAllocated | Life::TableFreed => self.judge_table(cpu, life, frames, seq),
            Life::HandedOut | Life::HandedOutZero | Life::Unpooled => {}
        }
        if let Some(frames) = frames.intersection(self.frames.zone()) {
            self.frames.note_life(frames, life);
        }
    }

    /// `second-stage-open`: what is pooled or freed is secret and open nowhere.
    fn judge_pooled(&mut self, cpu: u8, life: Life, named: FrameRange, seq: u64) {
        let zone = self.frames.zone();
        let inside = named.intersection(zone);
        self.count_second_stage(inside.map_or(0, FrameRange::count));
        let outside = if zone.contains(named.start()) { zone.end() } else { named.start() };
        let stray = named.contains(outside).then(|| FrameRange::single(outside));
        let frames = &self.frames;
        let inside = inside.filter(|inside| !frames.all_may_close(*inside));
        let wrong = inside.into_iter().flat_map(FrameRange::iter);
        let wrong = runs(wrong.filter(|frame| !frames.may_close(*frame)));
        for run in wrong.chain(stray) {
            let open = frames.is_open(run.start());
            let state = if open { "still open" } else { "not secret" };
            let detail = format!(
                "{} reported as {life:?} while {state}; they must be sealed before",
                count_of(run)
            );
            let finding = Finding::new(Rule::SecondStageOpen, seq, detail);
            let frame = Some(run.start());
            self.ledger.violation(Finding { frame, cpu: Some(cpu), ..finding });
        }
    }

    /// `stale-table`: a page is not freed or taken as a table while a path to an older table in it
    /// may be cached, nor while it is linked.
    fn judge_table(&mut self, cpu: u8, life: Life, named: FrameRange, seq: u64) {
        let pool = self.config.layout.pool.frames();
        let Some(named) = pool.and_then(|pool| pool.intersection(named)) else { return };
        self.ledger.checked(Rule::StaleTable, named.count());
        if let Some((frame, root, va)) = self.index.table_at(named) {
            let what = if life == Life::TableFreed { "freed" } else { "taken for a new table" };
            let detail = format!(
                "a table is {what} while it is linked; its entry must be cleared and flushed before"
            );
            let finding = Finding::new(Rule::StaleTable, seq, detail);
            let (frame, va, root) = (Some(frame), Some(va), Some(root));
            self.ledger.violation(Finding { frame, va, cpu: Some(cpu), root, ..finding });
        }
        for frame in named.iter() {
            self.judge_table_page(frame, seq);
        }
    }

    pub(super) fn judge_table_page(&mut self, frame: Gfn, seq: u64) {
        for duty in self.tlb.of_table(frame) {
            let detail = format!(
                "{} may still walk through the table, unlinked by event {}; an INVLPG, a root \
                 load or a PGE change there in between would have discharged it",
                cpu_list(duty.cpus),
                duty.seq
            );
            let cpu = members(duty.cpus).next();
            let (va, root) = (Some(duty.va), Some(duty.root));
            let (frame, revoked) = (Some(frame), revoke_of(&duty));
            let finding = Finding::new(Rule::StaleTable, seq, detail);
            self.ledger.violation(Finding { frame, va, cpu, root, revoked, ..finding });
        }
    }

    /// Counts judgements of `second-stage-open`. With the seal off nothing is enforced, so what
    /// looks right says nothing.
    pub(super) fn count_second_stage(&mut self, count: u64) {
        if self.config.seal_closes {
            self.ledger.checked(Rule::SecondStageOpen, count);
        } else {
            self.ledger.not_checked(Rule::SecondStageOpen, count);
        }
    }
}

/// "1 frame was", "7 frames were", for messages.
pub(super) fn count_of(run: FrameRange) -> String {
    match run.count() {
        1 => "1 frame was".to_owned(),
        count => format!("{count} frames were"),
    }
}
