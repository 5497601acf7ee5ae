//! The complete check at a quiesce point: every root, every secret frame, every CPU.

use super::arrival::judge_zero;
use super::finding::{Finding, Rule};
use super::frames::runs;
use super::index::{Mapping, Walked, walk};
use super::life::count_of;
use super::mappings::{Sight, judge_mapping};
use super::story::Moment;
use super::{Audit, Denial, World};
use lacuna_abi::addr::{Gpa, Gva};
use lacuna_abi::event::EntryWrite;
use lacuna_abi::paging::{Entry, Level};
use lacuna_abi::walk::{EVERYTHING, locate};

impl Audit {
    /// Checks everything. All vCPUs are out of guest mode and all records have been taken, but for
    /// writes that a standing intent announces.
    pub fn quiesce(&mut self, seq: u64, world: &impl World) {
        self.link_work = 0;
        let intents = self.running().filter_map(|cpu| world.intent(cpu));
        let intents: Vec<_> = intents.filter(EntryWrite::is_well_formed).collect();
        for (root, _) in self.roots.clone() {
            self.compare_root(root, &intents, seq, world);
        }
        for mapping in self.index.all() {
            let at = Sight { mapping, cpu: None, seq };
            let layout = &self.config.layout;
            judge_mapping(&mut self.ledger, &self.frames, &self.index, layout, &at);
        }
        self.judge_second_stage(seq, world);
        let known_zero = self.frames.pooled().filter(|frame| self.frames.is_known_zero(*frame));
        let what = "marked zero in the pool and is not zero; it was written to after zeroing";
        judge_zero(&mut self.ledger, known_zero, what, (None, seq), world);
        for cpu in self.running() {
            self.judge_control(cpu, seq, world);
        }
        self.tell(&Moment::Quiesce, world);
    }

    /// `trace-honesty`: what the records say a root maps is what it maps. The index follows memory
    /// from here on, so that one difference is found once.
    fn compare_root(&mut self, root: Gpa, intents: &[EntryWrite], seq: u64, world: &impl World) {
        let mut walked = walk(world, root, EVERYTHING, self.index.budget());
        self.judge_tables(root, &walked, None, seq);
        if walked.endless {
            return;
        }
        self.ledger.checked(Rule::TraceHonesty, u64::try_from(walked.leaves.len()).unwrap_or(0));
        for (va, known, found) in self.differences(root, &walked) {
            if intents.iter().any(|intent| explains(intent, root, va, world)) {
                // The index stays behind memory: the record that is still to come makes the
                // obligation, and without it the next comparison finds the difference.
                let here = known.or(found).map(|mapping| mapping.level);
                walked.leaves.retain(|leaf| leaf.va != va || Some(leaf.level) != here);
                walked.leaves.extend(known);
                continue;
            }
            let detail = format!(
                "the records say {}, the tables say {}; every change of an entry must be recorded",
                describe(known.as_ref()),
                describe(found.as_ref())
            );
            let finding = Finding::new(Rule::TraceHonesty, seq, detail);
            let frame = found.or(known).map(|mapping| mapping.frame);
            let (va, root) = (Some(va), Some(root));
            self.ledger.violation(Finding { frame, va, root, ..finding });
        }
        // Likewise with the tables that such a write links or unlinks.
        for intent in intents {
            let span = (intent.va, intent.va.wrapping_add(intent.span() - 1));
            let below = |va, level| level < intent.level && explains(intent, root, va, world);
            walked.tables.retain(|(_, va, level)| !below(*va, *level));
            let known = self.index.tables_below(root, span, intent.level);
            walked.tables.extend(known.filter(|(_, va, level)| below(*va, *level)));
        }
        walked.leaves.sort_by_key(|leaf| leaf.va);
        self.index.replace(root, EVERYTHING, Level::Pml4, &walked);
    }

    /// What the index and a walk say differently: address, by the index, by the walk.
    fn differences(
        &self,
        root: Gpa,
        walked: &Walked,
    ) -> Vec<(Gva, Option<Mapping>, Option<Mapping>)> {
        let leaves = &walked.leaves;
        let mut different = Vec::new();
        for leaf in leaves {
            let known = self.index.get(root, leaf.va, leaf.level).copied();
            if !known.is_some_and(|known| known.says(leaf)) {
                different.push((leaf.va, known, Some(*leaf)));
            }
        }
        for known in self.index.in_span(root, EVERYTHING) {
            let found = leaves.binary_search_by_key(&known.va, |leaf| leaf.va);
            if !found.is_ok_and(|at| leaves[at].level == known.level) {
                different.push((known.va, Some(*known), None));
            }
        }
        different.sort_by_key(|(va, _, _)| *va);
        different
    }

    /// `second-stage-open` for all secret frames that are not open, and for all frames that are on
    /// an unmapped list.
    fn judge_second_stage(&mut self, seq: u64, world: &impl World) {
        let (mut checked, mut not_checked) = (0, 0);
        let frames = &self.frames;
        let sealed = frames.secret().filter(|frame| !frames.is_open(*frame));
        let open = sealed.filter(|frame| match world.denial(*frame) {
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
        for run in runs(frames.pooled().filter(|frame| !frames.is_secret(*frame))) {
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
        let root = Gpa(state.cr3 & Entry::ADDRESS);
        let mut judged = vec![
            wrong_bits("CR0", state.cr0, policy.cr0_set, policy.cr0_clear),
            wrong_bits("CR4", state.cr4, policy.cr4_set, policy.cr4_clear),
            wrong_bits("IA32_EFER", state.efer, policy.efer_set, policy.efer_clear),
            (!self.is_registered(root))
                .then(|| format!("CR3 is {:#x}, which is no registered root", state.cr3)),
        ];
        match self.registrations.get(usize::from(cpu)).copied().flatten() {
            Some(r) => judged.extend([
                wrong_table("IDTR", (state.idt_base, state.idt_limit), (r.idt_base, r.idt_limit)),
                wrong_table("GDTR", (state.gdt_base, state.gdt_limit), (r.gdt_base, r.gdt_limit)),
            ]),
            None => self.ledger.not_checked(Rule::ControlState, 2),
        }
        for (topic, wrong) in (0..).zip(judged) {
            self.ledger.checked(Rule::ControlState, 1);
            if let Some(detail) = wrong {
                let finding = Finding::new(Rule::ControlState, seq, detail);
                // One finding for each register of each CPU, however often it is found.
                let topic = u64::from(cpu) << 8 | topic;
                self.ledger.violation_about(topic, Finding { cpu: Some(cpu), ..finding });
            }
        }
    }
}

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

/// Whether a standing intent explains a difference at `va`: the entry that it announces is already
/// what it will be. (While it still is what it was, records and tables agree.)
fn explains(intent: &EntryWrite, root: Gpa, va: Gva, world: &impl World) -> bool {
    let Some(offset) = va.offset_from(intent.va).filter(|offset| *offset < intent.span()) else {
        return false;
    };
    let index = offset / intent.level.span();
    let at = intent.va.wrapping_add(index * intent.level.span());
    let entry = locate(world, root, at, intent.level).ok().and_then(|at| world.read_entry(at));
    intent.root == root && entry == Some(intent.new.nth_of_run(intent.level, index))
}

fn describe(mapping: Option<&Mapping>) -> String {
    match mapping {
        None => "nothing is mapped".to_owned(),
        Some(m) => format!(
            "{} is mapped at level {}{}{}{}{}",
            m.frame,
            m.level.number(),
            if m.rights.writable { ", writable" } else { "" },
            if m.rights.executable { ", executable" } else { "" },
            if m.rights.user { ", for ring 3" } else { "" },
            if m.global { ", global" } else { "" },
        ),
    }
}
