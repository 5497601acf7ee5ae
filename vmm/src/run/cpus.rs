//! The CPUs of a machine that has not started.

use super::{OpenError, Plan, stage};
use crate::audit::Mediation;
use crate::machine::kvm::{Interrupts, KvmError, ProbeVcpu, Vcpu, Vm};
use crate::machine::memory::Memory;
use crate::second_stage::SecondStage;
use crate::sim::Prepared;
use kvm_ioctls::Kvm;
use lacuna_abi::addr::Gpa;
use std::sync::Arc;

/// The CPUs of a machine that has not started.
pub(super) enum Cpus {
    Kvm(Vec<Vcpu>, Interrupts, Probe),
    Sim(Box<Prepared>),
}

/// The probe vCPU, if frames are to be touched; KVM may refuse to make one.
pub(super) type Probe = Option<Result<Box<ProbeVcpu>, KvmError>>;

/// vCPUs on KVM, and what closes their memory.
pub(super) fn on_kvm(
    kvm: Kvm,
    plan: &Plan,
    memory: &Arc<Memory>,
    root: Gpa,
) -> Result<(Cpus, Box<dyn SecondStage>), OpenError> {
    let vm = Vm::new(kvm, Arc::clone(memory))?;
    vm.require()?;
    if plan.mediation == Mediation::Step {
        vm.require_steps()?;
    }
    let stage = stage::second_stage(plan, &vm, memory)?;
    let vcpus = (0..plan.vcpus).map(|cpu| vm.vcpu(cpu, plan.image.entry, root));
    let vcpus = vcpus.collect::<Result<_, _>>()?;
    let wanted = plan.probes > 0 && stage.closes();
    let probe = wanted.then(|| vm.probe_vcpu().map(Box::new));
    Ok((Cpus::Kvm(vcpus, vm.interrupts(), probe), stage))
}
