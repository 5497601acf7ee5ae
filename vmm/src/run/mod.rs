//! Runs one guest: open everything, then start, then wait.
//!
//! Nothing here is global: several machines may run in one process. A machine can be followed
//! (observers), looked at while it runs (progress) and cancelled.

mod end;
mod plan;
mod report;
mod vcpu;

pub use end::{End, GuestEnd, Place};
pub use plan::{Plan, PlanError};
pub use report::{Surroundings, report};

use crate::config::{GuardChoice, MachineKind, Seal};
use crate::doctor::{self, HostError};
use crate::gate::{Gate, GateFailure, GateSetup, Observer};
use crate::image::Image;
use crate::leak::LeakScanner;
use crate::machine::boot::{self, BootError};
use crate::machine::kvm::{KvmError, Vcpu, Vm, ZONE_SLOT};
use crate::machine::memory::{Memory, MemoryError};
use crate::second_stage::{Guard, Mechanism, MemSlot, Off, SecondStage, Software};
use crate::sim::{Frames, Prepared, Secrecy, Simulated, Statistics, Workload};
use crate::stop::{Stop, Stopped};
use kvm_ioctls::Kvm;
use lacuna_abi::addr::Gpa;
use lacuna_abi::boot::BootInfo;
use lacuna_abi::layout::{Layout, LayoutError, Needs};
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};
use zeroize::Zeroize;

/// How often a waiting machine is looked at.
const TICK: Duration = Duration::from_millis(20);

/// How long a simulated guest may run on after it was told to stop.
const GRACE: Duration = Duration::from_secs(5);

/// A machine could not be made.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The guest does not fit: the configuration is checked before, so that this names the rest.
    #[error("the guest cannot be laid out: {0:?}; lower [guest] memory_mib or the input's size")]
    Layout(LayoutError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// First tables.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// KVM lacks something that a guest needs.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The seal that was asked for does not work here.
    #[error("the seal `{seal}` does not work on this host: {error}; try --seal auto")]
    Seal {
        /// The seal.
        seal: &'static str,
        /// Why.
        error: std::io::Error,
    },
    /// No signal to stop a vCPU with.
    #[error("cannot register the signal that stops vCPUs: {0}")]
    Signal(std::io::Error),
    /// No thread for a vCPU.
    #[error("cannot start the vCPU's thread: {0}")]
    Thread(std::io::Error),
}

/// What runs a guest.
pub enum Host {
    /// The host's KVM.
    Kvm(Kvm),
    /// This process.
    Sim,
}

impl Host {
    /// What a configuration asks for.
    ///
    /// # Errors
    /// [`HostError`] if this host has none.
    pub fn of(kind: MachineKind) -> Result<Self, HostError> {
        Ok(match kind {
            MachineKind::Kvm => Self::Kvm(doctor::open_kvm()?),
            MachineKind::Sim => Self::Sim,
        })
    }
}

/// The CPUs of a machine.
enum Cpus {
    Kvm(Vcpu),
    Sim {
        root: Gpa,
        faults: u64,
        seed: u64,
        frames: Arc<Frames>,
        workload: Option<Arc<dyn Workload>>,
    },
}

/// A machine with everything open that it will need, not yet started: the point at which a jail
/// can drop privileges.
pub struct Machine {
    image: Arc<Image>,
    memory: Arc<Memory>,
    cpus: Cpus,
    gate: Arc<Mutex<Gate>>,
    stop: Arc<Stop>,
    timeout: Duration,
    opened: Instant,
}

impl Machine {
    /// Makes a machine.
    ///
    /// # Errors
    /// [`OpenError`] says which part, and what to do.
    pub fn open(
        host: Host,
        mut plan: Plan,
        mut observers: Vec<Box<dyn Observer>>,
    ) -> Result<Self, OpenError> {
        let opened = Instant::now();
        let needs = Needs {
            image: plan.image.len(),
            memory_mib: plan.memory_mib,
            cpus: plan.cpus.into(),
            input: plan.input.len() as u64,
            scratch: plan.scratch,
        };
        let layout = Layout::new(&needs).map_err(OpenError::Layout)?;
        let memory = Arc::new(Memory::new(layout)?);
        if let Some(byte) = plan.fill {
            memory.fill_zone(byte)?;
        }
        let [arg0, arg1, arg2] = plan.args;
        let info = BootInfo {
            features: plan.features,
            faults: plan.faults,
            seed: plan.seed,
            program: plan.program as u64,
            arg0,
            arg1,
            arg2,
            ..BootInfo::for_layout(&layout)
        };
        let info = boot::prepare(&memory, &plan.image, info)?;
        memory.write(layout.input.gpa, &plan.input)?;
        let scanner = plan.secret_input.then(|| LeakScanner::new(&plan.input));
        plan.input.zeroize();
        let root = Gpa(info.root);
        let (cpus, stage) = match host {
            Host::Kvm(kvm) => {
                let vm = Vm::new(kvm, Arc::clone(&memory))?;
                vm.require()?;
                let stage = second_stage(&plan, &vm, &memory)?;
                (Cpus::Kvm(vm.vcpu(0, plan.image.entry, root)?), stage)
            }
            Host::Sim => {
                let frames = Arc::new(Frames::new(layout.zone_frames()));
                observers.push(Box::new(Secrecy(Arc::clone(&frames))));
                let stage = simulated_stage(plan.seal, &frames, &layout);
                let (faults, seed, workload) = (plan.faults, plan.seed, None);
                (Cpus::Sim { root, faults, seed, frames, workload }, stage)
            }
        };
        let stop = Arc::new(Stop::default());
        let gate = Gate::new(GateSetup {
            memory: Arc::clone(&memory),
            stage,
            boot_root: root,
            quiesce_every: plan.quiesce_every,
            max_findings: plan.max_findings,
            scanner,
            stop: Arc::clone(&stop),
            observers,
        });
        let gate = Arc::new(Mutex::new(gate));
        let image = Arc::new(plan.image);
        Ok(Self { image, memory, cpus, gate, stop, timeout: plan.timeout, opened })
    }

    /// Has simulated CPUs run this in place of the plan's program. Others have an image, and go on
    /// as before.
    #[must_use]
    pub fn with_workload(mut self, own: Arc<dyn Workload>) -> Self {
        if let Cpus::Sim { workload, .. } = &mut self.cpus {
            *workload = Some(own);
        }
        self
    }

    /// Starts the CPUs.
    ///
    /// # Errors
    /// [`OpenError::Thread`].
    pub fn start(self) -> Result<Running, OpenError> {
        let Self { image, memory, cpus, gate, stop, timeout, opened } = self;
        let simulated = matches!(cpus, Cpus::Sim { .. });
        let run: Box<dyn FnOnce() -> vcpu::Finished + Send> = match cpus {
            Cpus::Kvm(vcpu) => {
                register_kick().map_err(OpenError::Signal)?;
                let (gate, stop) = (Arc::clone(&gate), Arc::clone(&stop));
                let runner = vcpu::Runner { cpu: 0, vcpu, gate, stop, image };
                Box::new(move || runner.run())
            }
            Cpus::Sim { root, faults, seed, frames, workload } => {
                let (memory, gate) = (Arc::clone(&memory), Arc::clone(&gate));
                let stop = Arc::clone(&stop);
                let sim = Prepared { memory, frames, gate, root, faults, seed, stop, workload };
                Box::new(move || sim.run().into())
            }
        };
        let started = Instant::now();
        let name = if simulated { "sim" } else { "vcpu0" };
        let thread = std::thread::Builder::new().name(name.into()).spawn(run);
        let thread = thread.map_err(OpenError::Thread)?;
        let deadline = started + timeout;
        Ok(Running { thread, simulated, gate, memory, stop, deadline, opened, started })
    }
}

fn second_stage(
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

/// The second stage of a simulated machine.
fn simulated_stage(seal: Seal, frames: &Arc<Frames>, layout: &Layout) -> Box<dyn SecondStage> {
    let (frames, zone) = (Arc::clone(frames), layout.zone_frames());
    match seal {
        Seal::Auto | Seal::Guard => Box::new(Software::guard(frames, zone)),
        Seal::Memslot => Box::new(Software::memslot(frames, zone)),
        Seal::Off => Box::new(Off),
    }
}

impl From<Simulated> for vcpu::Finished {
    fn from(simulated: Simulated) -> Self {
        let Simulated { end, in_guest, calls, statistics } = simulated;
        Self { end, in_guest, exits: calls, simulation: Some(statistics) }
    }
}

/// A machine that runs.
pub struct Running {
    thread: JoinHandle<vcpu::Finished>,
    simulated: bool,
    gate: Arc<Mutex<Gate>>,
    memory: Arc<Memory>,
    stop: Arc<Stop>,
    deadline: Instant,
    opened: Instant,
    started: Instant,
}

/// Cancels a machine from anywhere.
#[derive(Clone)]
pub struct CancelHandle(Arc<Stop>);

impl CancelHandle {
    /// Ends the run as soon as the vCPU can be stopped.
    pub fn cancel(&self) {
        self.0.tell(Stopped::Cancelled);
    }
}

impl Running {
    /// A handle that cancels this machine.
    #[must_use]
    pub fn cancel_handle(&self) -> CancelHandle {
        CancelHandle(Arc::clone(&self.stop))
    }

    /// Waits for the end. `tick` is called now and then with the work done so far, and may break
    /// off the run.
    pub fn wait(self, mut tick: impl FnMut(u64) -> ControlFlow<()>) -> Outcome {
        let mut told: Option<(Stopped, Instant)> = None;
        while !self.thread.is_finished() {
            std::thread::sleep(TICK);
            if tick(self.memory.progress(0).unwrap_or(0)).is_break() {
                self.stop.tell(Stopped::Cancelled);
            }
            if Instant::now() >= self.deadline {
                self.stop.tell(Stopped::Timeout);
            }
            let Some(why) = self.stop.told() else { continue };
            if !self.simulated {
                // The signal makes KVM_RUN return. It may arrive just before KVM_RUN is entered;
                // the next tick sends another.
                let _ = self.thread.kill(SIGRTMIN());
            } else if told.get_or_insert((why, Instant::now())).1.elapsed() > GRACE {
                return self.give_up(why);
            }
        }
        let ended = Instant::now();
        let Self { thread, gate, opened, started, .. } = self;
        let finished = thread.join().unwrap_or_else(|_| {
            vcpu::Finished::without_guest(End::Host(
                "the VMM's vCPU thread panicked; this is a fault of the VMM".into(),
            ))
        });
        Outcome {
            end: finished.end,
            gate,
            opening: started - opened,
            running: ended - started,
            in_guest: finished.in_guest,
            exits: finished.exits,
            started,
            simulation: finished.simulation,
        }
    }

    /// A simulated guest loops without ever calling its platform: its threads are left behind, and
    /// end with the process.
    fn give_up(self, why: Stopped) -> Outcome {
        let Self { gate, opened, started, .. } = self;
        let reason = "a simulated CPU runs on, because it never calls its platform";
        let mut locked = gate.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        locked.inconclusive(reason.into());
        drop(locked);
        Outcome {
            end: End::Stopped(why, Box::default()),
            gate,
            opening: started - opened,
            running: started.elapsed(),
            in_guest: Duration::ZERO,
            exits: 0,
            started,
            simulation: None,
        }
    }
}

/// A machine that has ended.
pub struct Outcome {
    /// Why.
    pub end: End,
    gate: Arc<Mutex<Gate>>,
    /// Time from the start of opening to the first instruction.
    pub opening: Duration,
    /// Time from the first instruction to the end.
    pub running: Duration,
    /// Part of it inside `KVM_RUN`.
    pub in_guest: Duration,
    /// Times that the vCPU left for the VMM.
    pub exits: u64,
    /// When the first instruction ran.
    pub started: Instant,
    /// What a simulated machine knows of the run.
    pub simulation: Option<Statistics>,
}

impl Outcome {
    /// Looks at the gate, and with it the audit.
    pub fn with_gate<R>(&self, f: impl FnOnce(&mut Gate) -> R) -> R {
        // A panic under the lock has ended the run; what the gate holds can still be read.
        f(&mut self.gate.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }
}

/// A signal handler that does nothing: the signal's arrival is what makes `KVM_RUN` return. Without
/// it the signal would end the process.
fn register_kick() -> std::io::Result<()> {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    static FAILED: OnceLock<Option<i32>> = OnceLock::new();
    let register = || register_signal_handler(SIGRTMIN(), nothing).err().map(|e| e.errno());
    match FAILED.get_or_init(register) {
        None => Ok(()),
        Some(number) => Err(std::io::Error::from_raw_os_error(*number)),
    }
}

impl From<GateFailure> for End {
    fn from(failure: GateFailure) -> Self {
        Self::Host(failure.to_string())
    }
}
