//! Runs one guest: open everything, then start, then wait.
//!
//! Nothing here is global: several machines may run in one process. A machine can be followed
//! (observers), looked at while it runs (progress) and cancelled.

mod cpus;
pub(crate) mod crew;
mod end;
mod plan;
mod probe;
mod report;
mod stage;
mod station;
mod stepping;
mod threads;
mod vcpu;
mod violations;

pub use end::{End, GuestEnd, Place};
pub use plan::{Plan, PlanError, profile};
pub use report::{Surroundings, beginning, complete, outline, report};
pub(crate) use report::{judged, touched};

use crate::audit::Mediation;
use crate::config::MachineKind;
use crate::doctor::{self, HostError};
use crate::gate::{Gate, GateFailure, GateSetup, Observer};
use crate::image::Image;
use crate::leak::LeakScanner;
use crate::machine::boot::{self, BootError};
use crate::machine::kvm::KvmError;
use crate::machine::memory::{Memory, MemoryError};
use crate::names::Names;
use crate::recording::Recorder;
use crate::second_stage::SecondStage;
use crate::sim::{Frames, Prepared, Schedule, Secrecy, Simulated, Statistics, Workload};
use crate::stop::{Stop, Stopped};
use cpus::Cpus;
use crew::Crew;
use kvm_ioctls::Kvm;
use lacuna_abi::addr::Gpa;
use lacuna_abi::boot::BootInfo;
use lacuna_abi::layout::{Layout, LayoutError, Needs};
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::time::{Duration, Instant};
use stepping::Stepping;
use threads::Threads;
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
    Sim(Schedule),
}

impl Host {
    /// What a configuration asks for.
    ///
    /// # Errors
    /// [`HostError`] if this host has none.
    pub fn of(kind: MachineKind) -> Result<Self, HostError> {
        Ok(match kind {
            MachineKind::Kvm => Self::Kvm(doctor::open_kvm()?),
            MachineKind::Sim => Self::Sim(Schedule::Seeded),
        })
    }
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
        plan: Plan,
        observers: Vec<Box<dyn Observer>>,
    ) -> Result<Self, OpenError> {
        Self::open_recorded(host, plan, observers, None)
    }

    /// Makes a machine whose run is recorded.
    ///
    /// # Errors
    /// [`OpenError`] says which part, and what to do.
    pub fn open_recorded(
        host: Host,
        mut plan: Plan,
        mut observers: Vec<Box<dyn Observer>>,
        recorder: Option<Recorder>,
    ) -> Result<Self, OpenError> {
        let opened = Instant::now();
        let needs = Needs {
            image: plan.image.len(),
            memory_mib: plan.memory_mib,
            cpus: plan.vcpus.into(),
            input: plan.input.len() as u64,
            scratch: plan.scratch,
        };
        let layout = Layout::new(&needs).map_err(OpenError::Layout)?;
        let memory = Arc::new(Memory::new(layout)?);
        if let Some(byte) = plan.fill {
            memory.fill_zone(byte)?;
        }
        let [arg0, arg1, arg2] = plan.args;
        let [min_free, pool_low, pool_high] = plan.marks;
        let info = BootInfo {
            features: plan.features,
            faults: plan.faults,
            seed: plan.seed,
            min_free,
            pool_low,
            pool_high,
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
        let stop = Arc::new(Stop::default());
        let (cpus, stage) = match host {
            Host::Kvm(kvm) => cpus::on_kvm(kvm, &plan, &memory, root)?,
            Host::Sim(schedule) => {
                let frames = Arc::new(Frames::new(layout.zone_frames()));
                observers.push(Box::new(Secrecy(Arc::clone(&frames))));
                let stage = stage::simulated(plan.seal, &frames, &layout);
                let (memory, stop) = (Arc::clone(&memory), Arc::clone(&stop));
                let (faults, seed, workload) = (plan.faults, plan.seed, None);
                let sim = Prepared { memory, frames, root, faults, seed, schedule, stop, workload };
                (Cpus::Sim(Box::new(sim)), stage)
            }
        };
        let gate = Gate::new(GateSetup {
            memory: Arc::clone(&memory),
            stage,
            mediation: plan.mediation,
            steps: plan.steps,
            boot_root: root,
            profile: plan.profile,
            quiesce_every: plan.quiesce_every,
            max_findings: plan.max_findings,
            probes: plan.probes,
            seed: plan.seed,
            shootdown_limit: plan.shootdown_limit,
            scanner,
            stop: Arc::clone(&stop),
            observers,
            recorder: recorder.map(|recorder| (Box::new(recorder), needs)),
        });
        let gate = Arc::new(Mutex::new(gate));
        let image = Arc::new(plan.image);
        let timeout = plan.timeout;
        Ok(Self { image, memory, cpus, gate, stop, timeout, opened })
    }

    /// Has simulated CPUs run this in place of the plan's program. Others have an image, and go on
    /// as before.
    #[must_use]
    pub fn with_workload(mut self, own: Arc<dyn Workload>) -> Self {
        if let Cpus::Sim(sim) = &mut self.cpus {
            sim.workload = Some(own);
        }
        self
    }

    /// Has frames closed by another second stage, made from the machine's own: one that adds to it, or,
    /// for tests, one that fails to do what it says.
    #[must_use]
    pub fn with_stage(
        self,
        wrap: impl FnOnce(Box<dyn SecondStage>) -> Box<dyn SecondStage>,
    ) -> Self {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner).wrap_stage(wrap);
        self
    }

    /// Starts the threads of all CPUs, and with its thread CPU 0. The guest starts the others.
    ///
    /// # Errors
    /// [`OpenError::Signal`] or [`OpenError::Thread`].
    pub fn start(self) -> Result<Running, OpenError> {
        let Self { image, memory, cpus, gate, stop, timeout, opened } = self;
        let threads = Arc::new(Threads::default());
        let started = Instant::now();
        let deadline = started + timeout;
        let (vcpus, interrupts, probe) = match cpus {
            Cpus::Kvm(vcpus, interrupts, probe) => (vcpus, interrupts, probe),
            Cpus::Sim(sim) => {
                let shared = Arc::clone(&gate);
                let run = move || sim.run(&shared).into();
                threads.spawn(0, run).map_err(OpenError::Thread)?;
                let (crew, names) = (None, Names::Program);
                return Ok(Running {
                    threads,
                    crew,
                    gate,
                    names,
                    memory,
                    stop,
                    deadline,
                    opened,
                    started,
                });
            }
        };
        threads::register_kick().map_err(OpenError::Signal)?;
        probe::attach(probe, &memory, &gate).map_err(OpenError::Thread)?;
        let (stepping, sightings, is_direct) = {
            let gate = gate.lock().unwrap_or_else(PoisonError::into_inner);
            let on = gate.audit().mediation() == Mediation::Step;
            let stepping = gate.is_to_step().then(|| Arc::new(Stepping::new(vcpus.len(), on)));
            (stepping, gate.sightings(), gate.audit().is_direct())
        };
        let one_at_a_time = stepping.as_ref().is_some_and(|stepping| stepping.is_on());
        let crew = Arc::new(Crew::with_turns(vcpus.len(), one_at_a_time));
        // vCPU 0 comes last: before it nothing runs.
        for (cpu, vcpu) in (0..=u8::MAX).zip(vcpus).rev() {
            let mut station = station::Station::from(vcpu);
            if is_direct {
                station.watch_control();
            }
            let runner = vcpu::Runner {
                cpu,
                station,
                stepping: stepping.clone(),
                sightings: Arc::clone(&sightings),
                crew: Arc::clone(&crew),
                threads: Arc::clone(&threads),
                interrupts: interrupts.clone(),
                gate: Arc::clone(&gate),
                memory: Arc::clone(&memory),
                stop: Arc::clone(&stop),
                image: Arc::clone(&image),
            };
            if let Err(error) = threads.spawn(cpu, move || runner.run()) {
                crew.abandon();
                threads.join();
                return Err(OpenError::Thread(error));
            }
        }
        let (crew, names) = (Some(crew), Names::Image(image));
        Ok(Running { threads, crew, gate, names, memory, stop, deadline, opened, started })
    }
}

/// A machine that runs.
pub struct Running {
    threads: Arc<Threads>,
    /// Of vCPUs, which are kicked out of the guest; a simulated CPU looks by itself.
    crew: Option<Arc<Crew<vcpu::Report>>>,
    gate: Arc<Mutex<Gate>>,
    names: Names,
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
    /// Ends the run as soon as the vCPUs can be stopped.
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
        let mut told: Option<Instant> = None;
        while !self.threads.are_finished() {
            std::thread::sleep(TICK);
            if tick(self.progress()).is_break() {
                self.stop.tell(Stopped::Cancelled);
            }
            if Instant::now() >= self.deadline {
                self.stop.tell(Stopped::Timeout);
            }
            match (&self.crew, self.stop.told()) {
                (Some(crew), stopped) if stopped.is_some() || crew.has_ended() => {
                    // A kick may arrive just before KVM_RUN is entered; the next tick sends another.
                    self.threads.kick_all();
                }
                // A CPU that is in the gate comes back: the host's work is bounded.
                (None, Some(why))
                    if told.get_or_insert_with(Instant::now).elapsed() > GRACE
                        && !matches!(self.gate.try_lock(), Err(TryLockError::WouldBlock)) =>
                {
                    return self.give_up(why);
                }
                _ => {}
            }
        }
        let ended = Instant::now();
        let Self { threads, gate, names, opened, started, .. } = self;
        let finished = threads.join();
        Outcome {
            end: finished.end.unwrap_or_else(|| {
                End::Host("a vCPU's thread of the VMM panicked; this is a fault of the VMM".into())
            }),
            gate,
            names,
            opening: started - opened,
            running: ended - started,
            in_guest: finished.in_guest,
            exits: finished.exits,
            stepped: finished.stepped,
            started,
            simulation: finished.simulation,
        }
    }

    /// A simulated guest loops without ever calling its platform: its threads are left behind, and
    /// end with the process.
    fn give_up(self, why: Stopped) -> Outcome {
        let Self { gate, names, opened, started, .. } = self;
        let reason = "a simulated CPU runs on, because it never calls its platform";
        let mut locked = gate.lock().unwrap_or_else(PoisonError::into_inner);
        locked.inconclusive(reason.into());
        drop(locked);
        Outcome {
            end: End::Stopped(why, Box::default()),
            gate,
            names,
            opening: started - opened,
            running: started.elapsed(),
            in_guest: Duration::ZERO,
            exits: 0,
            stepped: (0, Duration::ZERO),
            started,
            simulation: None,
        }
    }

    /// Units of work that all CPUs say they have done.
    fn progress(&self) -> u64 {
        let cpus = 0..self.memory.layout().cpus;
        let done = cpus.filter_map(|cpu| self.memory.progress(cpu).ok());
        done.fold(0, u64::saturating_add)
    }
}

/// A machine that has ended.
pub struct Outcome {
    /// Why.
    pub end: End,
    gate: Arc<Mutex<Gate>>,
    names: Names,
    /// Time from the start of opening to the first instruction.
    pub opening: Duration,
    /// Time from the first instruction to the end.
    pub running: Duration,
    /// Part of it that the busiest vCPU was inside `KVM_RUN`, or simulated CPUs in the guest's own
    /// code.
    pub in_guest: Duration,
    /// Times that vCPUs left for the VMM.
    pub exits: u64,
    /// Instructions that were stepped, on all vCPUs, and how long that took.
    pub stepped: (u64, Duration),
    /// When the first instruction ran.
    pub started: Instant,
    /// What a simulated machine knows of the run.
    pub simulation: Option<Statistics>,
}

impl Outcome {
    /// Where the code lies that made the events.
    #[must_use]
    pub const fn names(&self) -> &Names {
        &self.names
    }

    /// Looks at the gate, and with it the audit.
    pub fn with_gate<R>(&self, f: impl FnOnce(&mut Gate) -> R) -> R {
        // A panic under the lock has ended the run; what the gate holds can still be read.
        f(&mut self.gate.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl From<Simulated> for vcpu::Finished {
    fn from(simulated: Simulated) -> Self {
        let Simulated { end, in_guest, calls, statistics } = simulated;
        Self {
            end: Some(end),
            in_guest,
            exits: calls,
            stepped: (0, Duration::ZERO),
            simulation: Some(statistics),
        }
    }
}

impl From<GateFailure> for End {
    fn from(failure: GateFailure) -> Self {
        Self::Host(failure.to_string())
    }
}
