//! The probe vCPU and its thread. While no vCPU of the guest runs, whoever has the gate hands it
//! touches and waits; it runs at no other time.
//!
//! A touch that does not come back is kicked out of `KVM_RUN` as a vCPU of the guest is. If even that
//! does not help, the thread is given up, and the run ends: the touch may still be under way.

use super::cpus;
use crate::audit::{Probe, ProbeKind, Touched};
use crate::gate::{Gate, Prober};
use crate::machine::exit::Exit;
use crate::machine::kvm::{KvmError, ProbeVcpu};
use crate::machine::memory::Memory;
use crate::machine::probe::{MAX_TOUCHES, OUT, Touch};
use lacuna_abi::addr::Gfn;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmm_sys_util::signal::{Killable, SIGRTMIN};

/// Longest that one round of touches may take. It needs microseconds, or as long as its thread is off
/// the processor.
const ROUND: Duration = Duration::from_secs(2);
/// Time between two kicks of a round that takes longer.
const KICK_AGAIN: Duration = Duration::from_millis(1);
/// Longest that it is kicked before it is given up.
const GIVE_UP: Duration = Duration::from_secs(2);

/// Has the gate touch frames with this vCPU, or tells it why there is none. Kicks must have been
/// registered.
///
/// # Errors
/// What the kernel says of its thread.
pub(super) fn attach(
    probe: cpus::Probe,
    memory: &Arc<Memory>,
    gate: &Mutex<Gate>,
) -> io::Result<()> {
    let mut gate = gate.lock().unwrap_or_else(PoisonError::into_inner);
    match probe {
        None => {}
        Some(Ok(vcpu)) => {
            let prober = VcpuProber::start(*vcpu, Arc::clone(memory))?;
            gate.attach_prober(Box::new(prober));
        }
        Some(Err(error)) => gate.lacks_prober(format!("there is no probe vCPU: {error}")),
    }
    Ok(())
}

/// Touches frames with a vCPU of its own, on a thread of its own.
struct VcpuProber {
    rounds: Option<Sender<Vec<Probe>>>,
    results: Receiver<Vec<Touched>>,
    thread: Option<JoinHandle<()>>,
    /// The round has taken too long: nothing more is touched in it.
    late: Arc<AtomicBool>,
    /// What was in a frame could not be put back.
    spoilt: Arc<AtomicBool>,
    limit: Duration,
    give_up: Duration,
}

impl VcpuProber {
    /// Starts the thread of the probe vCPU.
    fn start(vcpu: ProbeVcpu, memory: Arc<Memory>) -> io::Result<Self> {
        let (late, spoilt) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
        let mut hand = Hand { vcpu, memory, late: Arc::clone(&late), spoilt: Arc::clone(&spoilt) };
        let mut prober = Self::spawn(late, move |probes| hand.round(probes))?;
        prober.spoilt = spoilt;
        Ok(prober)
    }

    /// Starts a thread that makes each round by `round`, which ends soon once `late` is set.
    fn spawn(
        late: Arc<AtomicBool>,
        mut round: impl FnMut(&[Probe]) -> Vec<Touched> + Send + 'static,
    ) -> io::Result<Self> {
        let (rounds, todo) = channel::<Vec<Probe>>();
        let (done, results) = channel();
        let thread = std::thread::Builder::new().name("probe".into()).spawn(move || {
            while let Ok(probes) = todo.recv() {
                if done.send(round(&probes)).is_err() {
                    break;
                }
            }
        })?;
        let (rounds, thread) = (Some(rounds), Some(thread));
        let spoilt = Arc::default();
        Ok(Self { rounds, results, thread, late, spoilt, limit: ROUND, give_up: GIVE_UP })
    }

    /// The results of a round, waited for and kicked for; why there are none.
    fn results(&mut self) -> Result<Vec<Touched>, &'static str> {
        const GONE: &str = "the thread of the probe vCPU has ended";
        match self.results.recv_timeout(self.limit) {
            Ok(results) => return Ok(results),
            Err(RecvTimeoutError::Disconnected) => {
                self.rounds = None;
                return Err(GONE);
            }
            Err(RecvTimeoutError::Timeout) => self.late.store(true, Ordering::Release),
        }
        let deadline = Instant::now() + self.give_up;
        while Instant::now() < deadline {
            if let Some(thread) = &self.thread {
                // A thread that has just ended needs no kick.
                let _ = thread.kill(SIGRTMIN());
            }
            match self.results.recv_timeout(KICK_AGAIN) {
                Ok(results) => return Ok(results),
                Err(RecvTimeoutError::Disconnected) => {
                    self.rounds = None;
                    return Err(GONE);
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
        // It is left behind: to wait for it would be to hang with it.
        self.rounds = None;
        self.thread = None;
        Err("the probe vCPU does not come out of KVM_RUN")
    }
}

impl Prober for VcpuProber {
    fn kinds(&self) -> &'static [ProbeKind] {
        ProbeKind::ALL
    }

    fn touch(&mut self, probes: &[Probe]) -> Vec<Touched> {
        // A thread that was given up stays told to stop.
        self.late.store(self.rounds.is_none(), Ordering::Release);
        let mut touched = Vec::new();
        for round in probes.chunks(MAX_TOUCHES) {
            let sent = self.rounds.as_ref().is_some_and(|rounds| rounds.send(round.into()).is_ok());
            let results = match sent {
                true => self.results(),
                false => Err("the probe vCPU was given up"),
            };
            let results = results.unwrap_or_else(|why| failed(why, round.len()));
            touched.extend(results);
        }
        touched
    }

    fn harm(&self) -> Option<&'static str> {
        if self.rounds.is_none() {
            Some("the probe vCPU was given up in the middle of a touch")
        } else if self.spoilt.load(Ordering::Acquire) {
            Some("what was in a frame could not be put back")
        } else {
            None
        }
    }
}

impl Drop for VcpuProber {
    fn drop(&mut self) {
        self.rounds = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread of the probe vCPU panicked; this is a fault of the VMM");
        }
    }
}

/// What the thread works with.
struct Hand {
    vcpu: ProbeVcpu,
    memory: Arc<Memory>,
    late: Arc<AtomicBool>,
    spoilt: Arc<AtomicBool>,
}

impl Hand {
    /// Makes the touches of one round, after it has tried itself on memory of its own.
    fn round(&mut self, probes: &[Probe]) -> Vec<Touched> {
        let frames: Vec<Gfn> = probes.iter().map(|probe| probe.frame).collect();
        let memory = Arc::clone(&self.memory);
        let opened = match memory.probe().open(&frames) {
            Ok(opened) => opened,
            Err(error) => {
                return failed(&format!("its memory cannot be opened: {error}"), probes.len());
            }
        };
        if let Err(KvmError { what, error }) = self.vcpu.reset() {
            return failed(&format!("KVM cannot {what}: {error}"), probes.len());
        }
        let used = |kind: &&ProbeKind| probes.iter().any(|probe| probe.kind == **kind);
        for kind in ProbeKind::ALL.iter().filter(used) {
            let control = self.make(&Touch::control(*kind));
            if control != Touched::WentThrough {
                let why = format!("a {} of its own memory ended with {control:?}", kind.name());
                return failed(&why, probes.len());
            }
        }
        let touched = (0..).zip(probes).map(|(index, probe)| self.touch(index, probe)).collect();
        drop(opened);
        touched
    }

    fn touch(&mut self, index: u64, probe: &Probe) -> Touched {
        let at = probe.frame.gpa().wrapping_add(probe.offset);
        let mut word = [0; 8];
        if !self.memory.inspect(at, &mut word) {
            return Touched::Failed("the frame cannot be read by the host".into());
        }
        let touch = Touch::new(index, probe.kind, at, u64::from_le_bytes(word));
        if probe.kind != ProbeKind::Fetch {
            return self.make(&touch);
        }
        // What the guest has there is never executed.
        let Some(was) = self.memory.swap_byte(at, OUT) else {
            return Touched::Failed("the frame cannot be written by the host".into());
        };
        let outcome = self.make(&touch);
        match self.memory.swap_byte(at, was) {
            Some(_) => outcome,
            None => {
                self.spoilt.store(true, Ordering::Release);
                Touched::Failed("what was in the frame could not be put back".into())
            }
        }
    }

    fn make(&mut self, touch: &Touch) -> Touched {
        loop {
            if self.late.load(Ordering::Acquire) {
                return Touched::Failed("it did not come back in time".into());
            }
            match self.vcpu.run(&touch.start()) {
                // A signal that was meant for the process, not for this thread.
                Ok((Exit::Interrupted, _)) => {}
                Ok((exit, end)) => return touch.outcome(&exit, &end),
                Err(KvmError { what, error }) => {
                    return Touched::Failed(format!("KVM cannot {what}: {error}"));
                }
            }
        }
    }
}

fn failed(why: &str, count: usize) -> Vec<Touched> {
    vec![Touched::Failed(why.to_owned()); count]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::threads::register_kick;

    fn probes(count: usize) -> Vec<Probe> {
        vec![Probe { frame: Gfn(1), offset: 0, kind: ProbeKind::Read }; count]
    }

    fn prober(
        round: impl FnMut(&[Probe], &AtomicBool) -> Vec<Touched> + Send + 'static,
    ) -> VcpuProber {
        register_kick().unwrap();
        let (late, mut round) = (Arc::new(AtomicBool::new(false)), round);
        let shared = Arc::clone(&late);
        let mut prober = VcpuProber::spawn(late, move |probes| round(probes, &shared)).unwrap();
        (prober.limit, prober.give_up) = (Duration::from_millis(20), Duration::from_millis(100));
        prober
    }

    #[test]
    fn more_touches_than_a_table_maps_take_several_rounds() {
        let (sizes, seen) = channel();
        let mut prober = prober(move |probes, _| {
            sizes.send(probes.len()).unwrap();
            vec![Touched::Trapped; probes.len()]
        });
        let touched = prober.touch(&probes(MAX_TOUCHES + 3));
        assert_eq!(touched, vec![Touched::Trapped; MAX_TOUCHES + 3]);
        drop(prober);
        assert_eq!(seen.iter().collect::<Vec<_>>(), [MAX_TOUCHES, 3]);
    }

    #[test]
    fn a_round_that_takes_too_long_is_told_so_and_the_next_is_made() {
        let mut slow = true;
        let mut prober = prober(move |probes, late| {
            while std::mem::replace(&mut slow, false) && !late.load(Ordering::Acquire) {
                slow = true;
                std::thread::sleep(Duration::from_millis(1));
            }
            let outcome = match late.load(Ordering::Acquire) {
                true => Touched::Failed("late".into()),
                false => Touched::WentThrough,
            };
            vec![outcome; probes.len()]
        });
        assert_eq!(prober.touch(&probes(2)), failed("late", 2));
        assert_eq!(prober.touch(&probes(1)), [Touched::WentThrough]);
    }

    #[test]
    fn a_probe_that_never_comes_back_is_given_up_and_nothing_hangs() {
        let (release, wait) = channel::<()>();
        let mut prober = prober(move |_, _| {
            let _ = wait.recv();
            Vec::new()
        });
        assert_eq!(prober.harm(), None);
        let gone = prober.touch(&probes(1));
        assert!(prober.harm().is_some(), "the guest must not run on");
        assert_eq!(gone, failed("the probe vCPU does not come out of KVM_RUN", 1));
        assert_eq!(prober.touch(&probes(2)), failed("the probe vCPU was given up", 2));
        drop(prober);
        drop(release);
    }

    #[test]
    fn a_thread_that_panics_fails_its_round() {
        let mut prober = prober(|_, _| std::panic::resume_unwind(Box::new(())));
        let gone = failed("the thread of the probe vCPU has ended", 1);
        assert_eq!(prober.touch(&probes(1)), gone);
        assert!(prober.harm().is_some(), "the guest must not run on");
    }
}
