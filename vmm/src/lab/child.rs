//! An emulator as a child that never outlives this process.
//!
//! Beside the emulator a small watchdog reads from a pipe whose other end only this process has: when
//! it is closed, because the child is to end or because this process is gone in whatever way, the
//! watchdog ends the emulator by its process id. Both are in a process group of their own, so that
//! Ctrl-C reaches this process alone, which then ends them in order.

use super::LabError;
use super::machine::Launch;
use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// File in the run's folder with the id of the emulator's process, where that is not the child's own
/// child.
pub const PROCESS: &str = "process";
/// File in the run's folder with what the emulator says.
pub const SAID: &str = "emulator";

/// How long a process may take to be gone after it was ended.
const GOING: Duration = Duration::from_secs(10);
const TICK: Duration = Duration::from_millis(10);

/// The child: `$1` is the file with another process, the rest the emulator.
const WATCHDOG: &str = r#"
exec 3<&0 </dev/null
process=$1
shift
"$@" 3<&- &
emulator=$!
{
    cat <&3
    # The emulator last: once it is gone, this is ended too.
    if [ -s "$process" ]; then kill -KILL "$(cat "$process")"; fi
    kill -KILL $emulator
} >/dev/null 2>&1 &
watchdog=$!
exec 3<&-
wait $emulator
status=$?
kill -KILL $watchdog
exit $status
"#;

/// A running emulator. Dropping it ends it.
#[derive(Debug)]
pub struct Running(Child);

impl Running {
    /// Starts it in the run's folder.
    ///
    /// # Errors
    /// [`LabError`] if there is no shell, or the folder cannot be written.
    pub fn start(launch: &Launch, folder: &Path) -> Result<Self, LabError> {
        use std::os::unix::process::CommandExt;
        let path = folder.join(SAID);
        let said = File::create(&path).map_err(LabError::file("write", &path))?;
        let both = said.try_clone().map_err(LabError::file("write", &path))?;
        let child = Command::new("/bin/sh")
            .args(["-c", WATCHDOG, "lab"])
            .arg(folder.join(PROCESS))
            .args(&launch.command)
            .envs(launch.environment.iter().map(|(name, value)| (name, value)))
            .current_dir(folder)
            .stdin(Stdio::piped())
            .stdout(said)
            .stderr(both)
            .process_group(0)
            .spawn();
        let child = child.map_err(|error| {
            LabError::host(format!("/bin/sh cannot be started: {error}"), "free some memory")
        })?;
        Ok(Self(child))
    }

    /// How it ended, if it has.
    #[must_use]
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.0.try_wait().ok().flatten()
    }

    /// Waits for its end, at most so long.
    pub fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        let until = Instant::now() + limit;
        loop {
            let ended = self.ended();
            if ended.is_some() || Instant::now() >= until {
                return ended;
            }
            std::thread::sleep(TICK);
        }
    }

    /// Ends it, and waits until it is gone.
    pub fn end(&mut self) {
        drop(self.0.stdin.take());
        if self.wait(GOING).is_none() {
            log::warn!("the emulator does not end; its shell has process id {}", self.0.id());
            // What is left to do; an error means that it is gone.
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn start(folder: &Path, script: &str) -> Running {
        let command = ["sh", "-c", script].map(Into::into).to_vec();
        Running::start(&Launch { command, environment: vec![("WORD", "abc".into())] }, folder)
            .unwrap()
    }

    /// Whether a process is there and has not ended.
    fn lives(id: &str) -> bool {
        let stat = fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
        stat.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with(" Z"))
    }

    /// The process id that a script writes into this file.
    fn id(file: &Path) -> String {
        for _ in 0..1000 {
            if let Ok(id) = fs::read_to_string(file)
                && let Some(id) = id.strip_suffix('\n')
            {
                return id.to_owned();
            }
            std::thread::sleep(TICK);
        }
        panic!("{} was not written", file.display());
    }

    /// Whether it is gone within some time.
    fn goes(id: &str) -> bool {
        let until = Instant::now() + GOING;
        while lives(id) && Instant::now() < until {
            std::thread::sleep(TICK);
        }
        !lives(id)
    }

    #[test]
    fn its_status_and_what_it_says_come_back() {
        let folder = tempfile::tempdir().unwrap();
        let mut running = start(folder.path(), "echo $WORD; echo err >&2; exit 7");
        let ended = running.wait(GOING).unwrap();
        assert_eq!(ended.code(), Some(7));
        assert_eq!(fs::read_to_string(folder.path().join(SAID)).unwrap(), "abc\nerr\n");
    }

    #[test]
    fn it_ends_when_it_is_dropped_even_if_it_does_not_want_to() {
        let folder = tempfile::tempdir().unwrap();
        let running =
            start(folder.path(), "trap '' TERM INT HUP; echo $$ >own; while :; do sleep 1; done");
        let own = id(&folder.path().join("own"));
        assert!(lives(&own));
        drop(running);
        assert!(goes(&own));
    }

    #[test]
    fn a_process_that_it_names_ends_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let script = "setsid sh -c 'echo $$ >process; exec sleep 1000' & wait";
        let running = start(folder.path(), script);
        let other = id(&folder.path().join(PROCESS));
        assert!(lives(&other));
        drop(running);
        assert!(goes(&other));
    }

    #[test]
    fn it_ends_when_the_process_that_started_it_is_killed() {
        let folder = tempfile::tempdir().unwrap();
        // Another process has the pipe's other end, and is killed.
        let mut owner = Command::new("sh")
            .args(["-c", "exec sleep 1000"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let pipe = owner.stdout.take().unwrap();
        let mut child = Command::new("/bin/sh")
            .args(["-c", WATCHDOG, "lab", "process", "sh", "-c", "echo $$ >own; exec sleep 1000"])
            .current_dir(folder.path())
            .stdin(pipe)
            .spawn()
            .unwrap();
        let own = id(&folder.path().join("own"));
        assert!(lives(&own));
        owner.kill().unwrap();
        owner.wait().unwrap();
        assert!(goes(&own));
        child.wait().unwrap();
    }
}
