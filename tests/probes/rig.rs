//! The probe vCPU beside a vCPU of a guest that is a few instructions long and hostile.

use crate::support::{Check, ensure, trial};
use lacuna::audit::{ProbeKind, Touched};
use lacuna::machine::exit::Exit;
use lacuna::machine::kvm::{ProbeVcpu, Vcpu, Vm};
use lacuna::machine::memory::Memory;
use lacuna::machine::probe::{PROBE_BYTES, PROBE_START, Touch};
use lacuna_abi::addr::{Gpa, Gva, PAGE_SIZE};
use lacuna_abi::layout::{Layout, Needs};
use lacuna_abi::paging::{Entry, Level};
use lacuna_abi::walk::entry_address;
use libtest_mimic::{Failed, Trial};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("kvm::a_guest_that_maps_the_probe_s_memory_reaches_nothing", hostile_mapping),
        trial("kvm::no_interrupt_of_the_guest_reaches_the_probe", interrupts),
        trial("kvm::an_access_that_trapped_leaves_nothing_behind_for_the_next", nothing_left),
        trial("kvm::a_probe_that_loops_is_kicked_out", kicked),
    ]
}

/// Where the guest maps its code, and with the same offset whatever else it likes.
const CODE: Gva = Gva(0x40_0000);
const STOLEN: Gva = Gva(0x60_0000);
/// `mov rax, STOLEN`, `mov qword [rax], 1`, `out 0x80, eax`.
const STORE: &[u8] = &[0x48, 0xc7, 0xc0, 0, 0, 0x60, 0, 0x48, 0xc7, 0, 1, 0, 0, 0, 0xe7, 0x80];
/// The same with `mov rbx, [rax]` and `out 0x80, eax`.
const LOAD: &[u8] = &[0x48, 0xc7, 0xc0, 0, 0, 0x60, 0, 0x48, 0x8b, 0x18, 0xe7, 0x80];
/// Switches the x2APIC on, then sends an NMI, an INIT and a start-up interrupt to all vCPUs but its
/// own: IA32_APIC_BASE, spurious vector, three times the ICR, `out 0x80, eax`.
const BROADCAST: &[u8] = &[
    0xb9, 0x1b, 0, 0, 0, 0x0f, 0x32, 0x0d, 0, 0x0c, 0, 0, 0x0f, 0x30, // APIC_BASE |= 0xc00
    0xb9, 0x0f, 8, 0, 0, 0xb8, 0xff, 1, 0, 0, 0x31, 0xd2, 0x0f, 0x30, // SVR = 0x1ff
    0xb9, 0x30, 8, 0, 0, 0xb8, 0, 0x44, 0x0c, 0, 0x0f, 0x30, // ICR = NMI
    0xb8, 0, 0x45, 0x0c, 0, 0x0f, 0x30, // ICR = INIT
    0xb8, 0, 0x46, 0x0c, 0, 0x0f, 0x30, // ICR = start-up
    0xe7, 0x80,
];

struct Rig {
    memory: Arc<Memory>,
    vm: Vm,
    probe: ProbeVcpu,
}

impl Rig {
    fn new() -> Result<Self, Failed> {
        let needs = Needs { image: 4096, memory_mib: 16, cpus: 1, input: 0, scratch: 0 };
        let layout = Layout::new(&needs).map_err(|error| format!("{error:?}"))?;
        let memory = Arc::new(Memory::new(layout)?);
        let vm = Vm::new(lacuna::doctor::open_kvm()?, Arc::clone(&memory))?;
        let probe = vm.probe_vcpu()?;
        Ok(Self { memory, vm, probe })
    }

    /// A vCPU of the guest that starts at `code`, with the probe's memory mapped at `STOLEN`.
    fn guest(&self, code: &[u8]) -> Result<Vcpu, Failed> {
        let layout = *self.memory.layout();
        let pool = layout.pool.gpa;
        let table = |number: u64| pool.wrapping_add(number * PAGE_SIZE);
        let store = |at: Gpa, value: Entry| self.memory.store(at, value.0);
        for (number, level) in (0..).zip([Level::Pml4, Level::Pdpt]) {
            let below = Entry::new(table(number + 1).frame(), Entry::TABLE);
            store(entry_address(table(number), level, CODE), below)?;
        }
        let flags = Entry::PRESENT | Entry::WRITABLE | Entry::ACCESSED | Entry::DIRTY;
        let large = |gpa: Gpa| Entry::new(gpa.frame(), flags | Entry::PAGE_SIZE);
        store(entry_address(table(2), Level::Pd, CODE), large(layout.image.gpa))?;
        store(entry_address(table(2), Level::Pd, STOLEN), large(PROBE_START))?;
        self.memory.write(layout.image.gpa, code)?;
        Ok(self.vm.vcpu(0, CODE, pool)?)
    }

    /// What comes of touching the probe's own control page.
    fn control(&mut self, kind: ProbeKind) -> Result<Touched, Failed> {
        let touch = Touch::control(kind);
        let (exit, end) = self.probe.run(&touch.start())?;
        Ok(touch.outcome(&exit, &end))
    }
}

fn hostile_mapping() -> Check {
    for code in [STORE, LOAD] {
        let rig = Rig::new()?;
        let mut guest = rig.guest(code)?;
        // It has been open, and used, before.
        drop(rig.memory.probe().open(&[])?);
        let exit = guest.run();
        let stopped = match exit {
            Exit::MmioRead { gpa } | Exit::MmioWrite { gpa } => gpa == PROBE_START,
            Exit::Fault | Exit::MemoryFault { .. } => true,
            _ => false,
        };
        ensure(stopped, &format!("{exit:?}"))?;
        // The twin: the same code, while the memory is open.
        let rig = Rig::new()?;
        let mut guest = rig.guest(code)?;
        let opened = rig.memory.probe().open(&[])?;
        let exit = guest.run();
        ensure(matches!(exit, Exit::PortOut { port: 0x80, .. }), &format!("{exit:?}"))?;
        drop(opened);
    }
    Ok(())
}

fn interrupts() -> Check {
    let mut rig = Rig::new()?;
    let memory = Arc::clone(&rig.memory);
    let _opened = memory.probe().open(&[])?;
    // Fixed interrupts of all vectors that there are, to the number of the probe vCPU.
    for vector in 16..=255 {
        rig.vm.interrupts().send(1, vector)?;
    }
    let exit = rig.guest(BROADCAST)?.run();
    ensure(matches!(exit, Exit::PortOut { port: 0x80, .. }), &format!("{exit:?}"))?;
    rig.probe.reset()?;
    for kind in ProbeKind::ALL {
        let outcome = rig.control(*kind)?;
        ensure(outcome == Touched::WentThrough, &format!("{kind:?}: {outcome:?}"))?;
    }
    Ok(())
}

/// Accesses that KVM would complete when the vCPU runs again, or exceptions that stay pending.
fn nothing_left() -> Check {
    let mut rig = Rig::new()?;
    // A frame behind which there is no memory.
    let nowhere = rig.memory.layout().zone.end();
    let memory = Arc::clone(&rig.memory);
    let _opened = memory.probe().open(&[nowhere.frame(); 3])?;
    rig.probe.reset()?;
    for round in 0..3 {
        for (index, kind) in (0..).zip(ProbeKind::ALL) {
            let touch = Touch::new(index, *kind, nowhere, 0);
            let (exit, end) = rig.probe.run(&touch.start())?;
            let outcome = touch.outcome(&exit, &end);
            ensure(outcome == Touched::Trapped, &format!("{round} {kind:?}: {exit:?}"))?;
            let control = rig.control(*kind)?;
            ensure(control == Touched::WentThrough, &format!("{round} {kind:?}: {control:?}"))?;
        }
    }
    Ok(())
}

/// What a kick of a touch that takes too long relies on.
fn kicked() -> Check {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(SIGRTMIN(), nothing)?;
    let mut rig = Rig::new()?;
    let memory = Arc::clone(&rig.memory);
    let _opened = memory.probe().open(&[])?;
    // `jmp $` where a fetch of the control page starts.
    let control = memory.probe().words().words(PROBE_BYTES - PAGE_SIZE, 1).ok_or("no page")?;
    control[0].store(0xfeeb, Ordering::Release);
    rig.probe.reset()?;
    let out = Arc::new(AtomicBool::new(false));
    let done = Arc::clone(&out);
    let thread = std::thread::spawn(move || {
        let touch = Touch::control(ProbeKind::Fetch);
        let left = rig.probe.run(&touch.start());
        done.store(true, Ordering::Release);
        left.map(|(exit, _)| exit)
    });
    std::thread::sleep(Duration::from_millis(50));
    ensure(!out.load(Ordering::Acquire), "it does not loop")?;
    while !out.load(Ordering::Acquire) {
        let _ = thread.kill(SIGRTMIN());
        std::thread::sleep(Duration::from_millis(1));
    }
    let exit = thread.join().map_err(|_| "it panicked")??;
    ensure(exit == Exit::Interrupted, &format!("{exit:?}"))
}
