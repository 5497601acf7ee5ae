use super::*;
use crate::machine::kvm::Vm;
use crate::run::threads::register_kick;
use crate::second_stage::{Guard, Mechanism, SecondStage};
use lacuna_abi::addr::FrameRange;
use lacuna_abi::layout::{Layout, Needs};

#[test]
fn experiment() {
    register_kick().unwrap();
    let needs = Needs { image: 4096, memory_mib: 16, cpus: 1, input: 0, scratch: 0 };
    let memory = Arc::new(Memory::new(Layout::new(&needs).unwrap()).unwrap());
    let vm = Vm::new(crate::doctor::open_kvm().unwrap(), Arc::clone(&memory)).unwrap();
    let mut prober = VcpuProber::start(vm.probe_vcpu().unwrap(), Arc::clone(&memory)).unwrap();
    let first = memory.layout().zone_frames().start();
    let mut stage = Guard::new(Arc::clone(&memory), Mechanism::best());
    stage.update(FrameRange::new(first, 4).unwrap(), &|_| true).unwrap();
    let all = |frame: Gfn| -> Vec<Probe> {
        ProbeKind::ALL.iter().map(|k| Probe { frame, offset: 0x128, kind: *k }).collect()
    };
    let probes = [all(first), all(first.wrapping_add(7))].concat();
    for _ in 0..5 {
        let t = Instant::now();
        let r = prober.touch(&probes);
        println!("{:?} {:?}", t.elapsed(), r);
        for k in ProbeKind::ALL {
        for p in [first, first.wrapping_add(7)] {
        let many = vec![Probe{frame: p, offset: 8, kind: *k}; 100];
        let t = Instant::now();
        let r = prober.touch(&many);
        println!("{k:?} {:?} {:?}", t.elapsed()/100, r[0]);
        }}
    }
}
