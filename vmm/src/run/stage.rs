//! The second stage that a plan asks for.

use super::{OpenError, Plan};
use crate::config::{GuardChoice, Seal};
use crate::machine::kvm::{Vm, ZONE_SLOT};
use crate::machine::memory::Memory;
use crate::second_stage::{Guard, Mechanism, MemSlot, Off, SecondStage, Software};
use crate::sim::Frames;
use lacuna_abi::layout::Layout;
use std::sync::Arc;

/// That of a virtual machine.
pub(super) fn second_stage(
    plan: &Plan,
    vm: &Vm,
    memory: &Arc<Memory>,
) -> Result<Box<dyn SecondStage>, OpenError> {
    let budgeted = || match (Mechanism::mprotect(), plan.vma_budget) {
        (Mechanism::Mprotect { .. }, Some(budget)) => Mechanism::Mprotect { budget: budget.into() },
        (mechanism, _) => mechanism,
    };
    let guard = |mechanism| Box::new(Guard::new(Arc::clone(memory), mechanism));
    Ok(match plan.seal {
        Seal::Off => Box::new(Off),
        Seal::Memslot => {
            let zone = memory.layout().zone_frames();
            Box::new(MemSlot::new(vm.slots(), zone, ZONE_SLOT, vm.zone_slots()))
        }
        Seal::Auto | Seal::Guard => match plan.guard {
            GuardChoice::Mprotect => guard(budgeted()),
            GuardChoice::Madvise => match Mechanism::probe_madvise() {
                Ok(()) => guard(Mechanism::Madvise),
                Err(error) => {
                    return Err(OpenError::Seal { seal: "guard with madvise", error });
                }
            },
            GuardChoice::Auto => match Mechanism::best() {
                Mechanism::Madvise => guard(Mechanism::Madvise),
                Mechanism::Mprotect { .. } => guard(budgeted()),
            },
        },
    })
}

/// That of a simulated machine.
pub(super) fn simulated(seal: Seal, frames: &Arc<Frames>, layout: &Layout) -> Box<dyn SecondStage> {
    let (frames, zone) = (Arc::clone(frames), layout.zone_frames());
    match seal {
        Seal::Auto | Seal::Guard => Box::new(Software::guard(frames, zone)),
        Seal::Memslot => Box::new(Software::memslot(frames, zone)),
        Seal::Off => Box::new(Off),
    }
}
