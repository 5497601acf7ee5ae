//! The threads of a machine's vCPUs: started, kicked out of the guest, joined.

use super::vcpu::Finished;
use std::io;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

/// The threads, each with the number of its vCPU.
#[derive(Default)]
pub(super) struct Threads(Mutex<Vec<(u8, JoinHandle<Finished>)>>);

impl Threads {
    /// Starts the thread of a vCPU.
    ///
    /// # Errors
    /// What the kernel says.
    pub(super) fn spawn(
        &self,
        cpu: u8,
        body: impl FnOnce() -> Finished + Send + 'static,
    ) -> io::Result<()> {
        let thread = std::thread::Builder::new().name(format!("vcpu{cpu}")).spawn(body)?;
        self.lock().push((cpu, thread));
        Ok(())
    }

    /// Makes `KVM_RUN` return on the vCPU's thread, if it is in there.
    pub(super) fn kick(&self, cpu: u8) {
        for (_, thread) in self.lock().iter().filter(|(number, _)| *number == cpu) {
            // A thread that has just ended needs no kick.
            let _ = thread.kill(SIGRTMIN());
        }
    }

    /// [`Self::kick`] for all.
    pub(super) fn kick_all(&self) {
        for (_, thread) in self.lock().iter().filter(|(_, thread)| !thread.is_finished()) {
            let _ = thread.kill(SIGRTMIN());
        }
    }

    /// Whether all have ended.
    pub(super) fn are_finished(&self) -> bool {
        self.lock().iter().all(|(_, thread)| thread.is_finished())
    }

    /// Waits for all. The end is that of the vCPU that ended the run, none if all threads that
    /// could have said one panicked; the time is that of the busiest.
    pub(super) fn join(&self) -> Finished {
        let threads = std::mem::take(&mut *self.lock());
        let mut all = Finished::default();
        for (_, thread) in threads {
            let Ok(finished) = thread.join() else { continue };
            all.end = all.end.or(finished.end);
            all.exits += finished.exits;
            all.stepped.0 += finished.stepped.0;
            all.stepped.1 += finished.stepped.1;
            all.simulation = all.simulation.or(finished.simulation);
            all.in_guest = all.in_guest.max(finished.in_guest);
        }
        all
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(u8, JoinHandle<Finished>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A signal handler that does nothing: the signal's arrival is what makes `KVM_RUN` return. Without
/// it the signal would end the process.
pub(super) fn register_kick() -> io::Result<()> {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    static FAILED: OnceLock<Option<i32>> = OnceLock::new();
    let register = || register_signal_handler(SIGRTMIN(), nothing).err().map(|e| e.errno());
    match FAILED.get_or_init(register) {
        None => Ok(()),
        Some(number) => Err(io::Error::from_raw_os_error(*number)),
    }
}
