//! A counterexample shown to the audit itself: the same steps as records and gate operations.

use super::super::{BLOCK_ENTRY, Denial, Rule, Scene, first};
use super::explore::Counterexample;
use super::machine::{Act, Flush, N, Seal};
use super::steps::{Step, Task};
use lacuna_abi::addr::FrameRange;
use lacuna_abi::event::{self, Life};
use lacuna_abi::gate::OpKind;
use lacuna_abi::layout::{direct_map, window};
use lacuna_abi::paging::{Entry, Level};

/// The rules that the audit finds broken, each once.
pub(super) fn rules(found: &Counterexample) -> Vec<Rule> {
    let seal = if found.seal == Seal::Closes { Denial::Denied } else { Denial::NotEnforced };
    let mut scene = Scene::with_seal(N, seal);
    let blocks = [scene.block(1), scene.block(2)];
    scene.machine.dirty.extend(blocks.iter().flat_map(|block| block.iter()));
    let (mut used, mut mapped) = ([false; N], [false; N]);
    let mut taken = [false; N];
    for (cpu, step) in &found.steps {
        let act = match *step {
            // What is in the pool is handed out when it is first taken.
            Step::Begin(Task::Use, block) if !taken[block] => {
                taken[block] = true;
                Act::HandedOut(block)
            }
            Step::Refresh if used[*cpu] => Act::Flush(Flush::NonGlobal),
            Step::Interrupt(flush) => Act::Flush(flush),
            Step::Do(act) => act,
            Step::Begin(..) | Step::Refresh | Step::Send(_) | Step::Await => Act::Nothing,
        };
        match act {
            Act::MapWindow { window, .. } => (used[window], mapped[window]) = (true, true),
            Act::ClearWindow { window } => mapped[window] = false,
            Act::Flush(_) => used[*cpu] &= mapped[*cpu],
            Act::Pooled(block) => taken[block] = false,
            _ => {}
        }
        show(&mut scene, *cpu, act, &blocks);
    }
    let mut rules: Vec<Rule> = scene.found().into_iter().map(|(rule, _)| rule).collect();
    rules.dedup();
    rules
}

fn show(scene: &mut Scene, cpu: usize, act: Act, blocks: &[FrameRange; N]) {
    let number = u8::try_from(cpu).unwrap();
    let page = |block: usize| first(blocks[block], 1);
    match act {
        Act::ClearDirect(block) => direct(scene, number, blocks[block], Entry::EMPTY),
        Act::MapDirect(block) => {
            let entry = Entry::new(blocks[block].start(), BLOCK_ENTRY | Entry::GLOBAL);
            direct(scene, number, blocks[block], entry);
        }
        Act::Flush(Flush::Everything) => scene.flush(number, event::Flush::Everything),
        Act::Flush(Flush::NonGlobal) => scene.flush(number, event::Flush::NonGlobal),
        Act::Seal(block) => operation(scene, number, OpKind::Seal, blocks[block]),
        Act::Open(block) => operation(scene, number, OpKind::Open, blocks[block]),
        Act::Release(block) => {
            scene.life(Life::Unpooled, blocks[block]);
            operation(scene, number, OpKind::Release, blocks[block]);
        }
        Act::MapWindow { block, window: of, global } => {
            let flags = Entry::DATA | if global { Entry::GLOBAL } else { 0 };
            let entry = Entry::new(page(block).start(), flags);
            scene.write(number, window(of), Level::Pt, 1, entry);
        }
        Act::ClearWindow { window: of } => {
            scene.write(number, window(of), Level::Pt, 1, Entry::EMPTY);
        }
        Act::Zero(block) => scene.machine.dirty.retain(|frame| !blocks[block].contains(*frame)),
        Act::Write(block) => scene.machine.dirty.extend(blocks[block].iter()),
        Act::Pooled(block) => {
            scene.life(Life::Freed, blocks[block]);
            scene.life(Life::PooledZero, blocks[block]);
        }
        Act::HandedOut(block) => scene.life(Life::HandedOutZero, blocks[block]),
        Act::Nothing => {}
    }
}

/// What is refused is found as well.
fn operation(scene: &mut Scene, cpu: u8, kind: OpKind, frames: FrameRange) {
    let _ = scene.op(cpu, kind, frames);
}

fn direct(scene: &mut Scene, cpu: u8, block: FrameRange, entry: Entry) {
    scene.write(cpu, direct_map(block.start().gpa()), Level::Pd, 1, entry);
}
