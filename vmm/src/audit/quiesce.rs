//! The complete check at a quiesce point: every root, every secret frame, every CPU.

use super::arrival::judge_zero;
use super::finding::{Finding, Rule};
use super::frames::runs;
use super::life::count_of;
use super::mappings::{Sight, judge_alias};
use super::story::Moment;
use super::{Audit, Denial, World};
use lacuna_abi::addr::Gpa;
use lacuna_abi::layout::Place;
use lacuna_abi::paging::Entry;

impl Audit {
    /// Checks everything. All vCPUs are out of guest mode and all records have been taken, but for
    /// writes that a standing intent announces.
    pub fn quiesce(&mut self, seq: u64, world: &impl World) {
        self.link_work = 0;
        self.judge_unreported(seq, world);
        self.compare_tables(seq, world);
        self.judge_all_mappings(seq);
        self.judge_second_stage(seq, world);
        let known_zero = self.frames.known_zero();
        let what = "marked zero in the pool and is not zero; it was written to after zeroing";
        judge_zero(&mut self.ledger, runs(known_zero), what, (None, seq), world);
        for cpu in self.running() {
            self.judge_control(cpu, seq, world);
        }
        self.tell(&Moment::Quiesce, world);
    }

    /// The rules about mappings hold for every leaf of every root. What a leaf may map depends on
    /// nothing but the leaf and the state of its frames. Each was judged when a record, a
    /// registration or the comparison just now brought it in, and frames become secret, or are no
    /// longer open, only by operations that judged all their mappings. So all leaves count; those of
    /// secret frames are looked at again.
    fn judge_all_mappings(&mut self, seq: u64) {
        let totals = self.index.totals();
        self.ledger.checked(Rule::TraceHonesty, totals.leaves);
        // Under direct paging any leaf that maps the pool would be one too many.
        let of_pool = if self.is_direct() { totals.leaves } else { totals.of_pool };
        self.ledger.checked(Rule::TableAlias, of_pool);
        self.ledger.checked(Rule::UserAccess, totals.of_guest);
        self.ledger.checked(Rule::WriteExecute, totals.leaves);
        let mut direct = totals.in_direct_map;
        let mut foreign = totals.leaves - totals.in_direct_map;
        let layout = &self.config.layout;
        for block in self.frames.secret_blocks() {
            for mapping in self.index.of_frames(block) {
                let at = Sight { mapping: &mapping, cpu: None, seq };
                judge_alias(&mut self.ledger, &self.frames, layout, &at);
                let judged = match layout.place_of(mapping.va) {
                    Place::DirectMap => &mut direct,
                    Place::Window(_) | Place::Pool | Place::Other => &mut foreign,
                };
                // It has been counted.
                *judged = judged.saturating_sub(1);
            }
        }
        self.ledger.checked(Rule::DirectMapAlias, direct);
        self.ledger.checked(Rule::ForeignAlias, foreign);
    }

    /// `second-stage-open` for all secret frames that are not open, and for all frames that are on
    /// an unmapped list.
    fn judge_second_stage(&mut self, seq: u64, world: &impl World) {
        let (mut checked, mut not_checked) = (0, 0);
        let frames = &self.frames;
        let open = frames.sealed().filter(|frame| match world.denial(*frame) {
            Denial::Denied => {
                checked += 1;
                false
            }
            Denial::HeldOpen | Denial::NotEnforced => {
                not_checked += 1;
                false
            }
            Denial::Open => {
                checked += 1;
                true
            }
        });
        for run in runs(open) {
            let detail = format!(
                "{} sealed but the second stage lets accesses through; it must deny them",
                count_of(run)
            );
            let finding = Finding::new(Rule::SecondStageOpen, seq, detail);
            self.ledger.violation(Finding { frame: Some(run.start()), ..finding });
        }
        for run in runs(frames.pooled_but_ordinary()) {
            let detail = format!("{} in the pool without being secret; seal first", count_of(run));
            let finding = Finding::new(Rule::SecondStageOpen, seq, detail);
            self.ledger.violation(Finding { frame: Some(run.start()), ..finding });
        }
        self.ledger.checked(Rule::SecondStageOpen, checked);
        self.ledger.not_checked(Rule::SecondStageOpen, not_checked);
    }

    /// `control-state` of one CPU.
    fn judge_control(&mut self, cpu: u8, seq: u64, world: &impl World) {
        let Some(state) = world.cpu_state(cpu) else {
            self.ledger.not_checked(Rule::ControlState, 6);
            return;
        };
        let policy = &self.config.control;
        let mut judged = vec![
            wrong_bits("CR0", state.cr0, policy.cr0_set, policy.cr0_clear),
            wrong_bits("CR4", state.cr4, policy.cr4_set, policy.cr4_clear),
            wrong_bits("IA32_EFER", state.efer, policy.efer_set, policy.efer_clear),
            self.wrong_root(cpu, state.cr3),
        ];
        match self.registrations.get(usize::from(cpu)).copied().flatten() {
            Some(r) => judged.extend([
                wrong_table("IDTR", (state.idt_base, state.idt_limit), (r.idt_base, r.idt_limit)),
                wrong_table("GDTR", (state.gdt_base, state.gdt_limit), (r.gdt_base, r.gdt_limit)),
            ]),
            None => self.ledger.not_checked(Rule::ControlState, 2),
        }
        (0..).zip(judged).for_each(|judged| self.note_control(cpu, judged, seq));
    }

    /// `control-state` of a CPU that comes out of the guest, of what its ring 0 can change in between:
    /// CR0 with its WP, and CR3. Of one whose registers are not known now nothing is said.
    pub fn sample(&mut self, cpu: u8, seq: u64, world: &impl World) {
        let Some(state) = world.cpu_state(cpu).filter(|_| self.tlb.is_running(cpu)) else { return };
        let policy = &self.config.control;
        let cr0 = wrong_bits("CR0", state.cr0, policy.cr0_set, policy.cr0_clear);
        let cr3 = self.wrong_root(cpu, state.cr3);
        for judged in [(CR0, cr0), (CR3, cr3)] {
            self.note_control(cpu, judged, seq);
        }
        self.tell(&Moment::Quiesce, world);
    }

    fn wrong_root(&self, cpu: u8, cr3: u64) -> Option<String> {
        let root = Gpa(cr3 & Entry::ADDRESS);
        if !self.is_registered(root) {
            return Some(format!("CR3 is {cr3:#x}, which is no registered root"));
        }
        let loaded = self.tlb.may_run_in(cpu, root);
        (!loaded).then(|| format!("CR3 is {cr3:#x}, which no record says was loaded"))
    }

    fn note_control(&mut self, cpu: u8, (topic, wrong): (u64, Option<String>), seq: u64) {
        self.ledger.checked(Rule::ControlState, 1);
        if let Some(detail) = wrong {
            let finding = Finding::new(Rule::ControlState, seq, detail);
            // One finding for each register of each CPU, however often it is found.
            let topic = u64::from(cpu) << 8 | topic;
            self.ledger.violation_about(topic, Finding { cpu: Some(cpu), ..finding });
        }
    }
}

/// Topics of findings about these registers: their places among those that a complete check judges.
const CR0: u64 = 0;
const CR3: u64 = 3;

fn wrong_bits(name: &str, value: u64, set: u64, clear: u64) -> Option<String> {
    let (missing, extra) = (set & !value, clear & value);
    (missing | extra != 0).then(|| {
        format!("{name} is {value:#x}; bits {missing:#x} must be set, bits {extra:#x} clear")
    })
}

fn wrong_table(name: &str, found: (u64, u64), registered: (u64, u64)) -> Option<String> {
    (found != registered).then(|| {
        format!(
            "{name} is {:#x}, limit {:#x}; registered was {:#x}, limit {:#x}",
            found.0, found.1, registered.0, registered.1
        )
    })
}
