//! A case in a process of its own: whatever becomes of it, the suite goes on.

use super::case::Case;
use super::judge::Ran;
use super::session::Runner;
use crate::cli::ExitStatus;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus as Ended, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Pause between two looks at a child.
const TICK: Duration = Duration::from_millis(10);
/// Most bytes that are read of what a child writes to each of its streams.
const MAX_OUTPUT: u64 = 64 << 20;
/// Most characters of an error message that are told.
const MAX_TOLD: usize = 2000;

/// Runs cases as child processes: `PROGRAM check --scenarios FOLDER --child NAME`.
#[derive(Clone, Debug)]
pub struct Children {
    /// The program, `lacuna`.
    pub program: PathBuf,
    /// The folder of the scenarios.
    pub folder: PathBuf,
    /// Why guests cannot run on KVM here, if they cannot.
    pub no_kvm: Option<String>,
}

impl Children {
    /// Runs cases of the scenarios in this folder by the program that is running.
    ///
    /// # Errors
    /// If the path of the running program is not known.
    pub fn of_this_program(folder: &Path) -> io::Result<Self> {
        let no_kvm = crate::doctor::open_kvm().err().map(|error| error.to_string());
        Ok(Self { program: std::env::current_exe()?, folder: folder.to_owned(), no_kvm })
    }
}

impl Runner for Children {
    fn run(&self, case: &Case, cancelled: &AtomicBool) -> Ran {
        if let (crate::config::MachineKind::Kvm, Some(why)) = (case.machine, &self.no_kvm) {
            return Ran::Missing(why.clone());
        }
        // A child ends when its standard input does: with this process, whatever becomes of it.
        let spawned = Command::new(&self.program)
            .args(["check", "--scenarios"])
            .arg(&self.folder)
            .args(["--child", &case.name])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        match spawned {
            Ok(child) => follow(child, case.timeout, cancelled),
            Err(error) => Ran::Crashed(format!("cannot start {}: {error}", self.program.display())),
        }
    }
}

fn follow(mut child: Child, timeout: Duration, cancelled: &AtomicBool) -> Ran {
    let started = Instant::now();
    let stdin = child.stdin.take();
    let stdout = child.stdout.take().map(collect);
    let stderr = child.stderr.take().map(collect);
    let ended = loop {
        match child.try_wait() {
            Ok(Some(ended)) => break Ok(ended),
            Ok(None) if cancelled.load(Ordering::Relaxed) => break Err(Ran::Interrupted),
            Ok(None) if started.elapsed() >= timeout => break Err(Ran::TimedOut),
            Ok(None) => thread::sleep(TICK),
            Err(error) => break Err(Ran::Crashed(format!("cannot wait for its process: {error}"))),
        }
    };
    if ended.is_err() {
        // It may have ended by itself meanwhile; either way it is waited for.
        _ = child.kill();
        _ = child.wait();
    }
    drop(stdin);
    let text = |reader: Option<thread::JoinHandle<Vec<u8>>>| {
        reader.and_then(|reader| reader.join().ok()).unwrap_or_default()
    };
    let (stdout, stderr) = (text(stdout), text(stderr));
    match ended {
        Ok(ended) => read(ended, &stdout, &String::from_utf8_lossy(&stderr)),
        Err(ran) => ran,
    }
}

fn collect(stream: impl Read + Send + 'static) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        // What cannot be read shows as a report that is not there.
        _ = stream.take(MAX_OUTPUT).read_to_end(&mut bytes);
        bytes
    })
}

/// What a child that has ended left.
fn read(ended: Ended, stdout: &[u8], stderr: &str) -> Ran {
    let said = stderr.trim();
    let said = said.char_indices().nth(MAX_TOLD).map_or(said, |(end, _)| &said[..end]);
    match ended.code() {
        Some(0) => match serde_json::from_slice(stdout) {
            Ok(reported) => Ran::Reported(Box::new(reported)),
            Err(error) => Ran::Crashed(format!("it left no report: {error}; {said}")),
        },
        Some(code) if code == i32::from(ExitStatus::Host as u8) => {
            Ran::Missing(said.trim_start_matches("error: ").to_owned())
        }
        _ => Ran::Crashed(format!("{ended}; {said}")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::scenario;
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    fn ended(status: i32, stdout: &str, stderr: &str) -> Ran {
        read(Ended::from_raw(status), stdout.as_bytes(), stderr)
    }

    #[test]
    fn what_a_child_leaves_is_told_apart() {
        assert_eq!(ended(3 << 8, "", "error: no KVM\n"), Ran::Missing("no KVM".into()));
        for (status, stdout) in [(11, "{}"), (0, "{}"), (0, ""), (101 << 8, "{}")] {
            let ran = ended(status, stdout, "thread panicked");
            assert!(matches!(&ran, Ran::Crashed(why) if why.contains("panicked")), "{ran:?}");
        }
    }

    fn case(machine: &str) -> Case {
        let text = format!(
            "[scenario]\nmachine = [{machine:?}]\nrequire = []\n[workload]\nprogram = \"idle\"\n"
        );
        scenario::from_text(Path::new("some.toml"), &text).unwrap().remove(0)
    }

    #[test]
    fn without_kvm_its_cases_are_missing_and_others_run() {
        let (program, folder) = (PathBuf::from("false"), PathBuf::new());
        let children = Children { program, folder, no_kvm: Some("no /dev/kvm".into()) };
        let run = |machine| children.run(&case(machine), &AtomicBool::new(false));
        assert_eq!(run("kvm"), Ran::Missing("no /dev/kvm".into()));
        // This one started, and left nothing.
        assert!(matches!(run("sim"), Ran::Crashed(why) if why.contains("exit status: 1")));
    }

    #[test]
    fn a_child_that_goes_on_is_ended_when_its_time_is_over_or_the_suite_is() {
        let sleep = || {
            let (stdin, stdout) = (Stdio::piped(), Stdio::piped());
            Command::new("sleep").arg("1000").stdin(stdin).stdout(stdout).spawn().unwrap()
        };
        let going = AtomicBool::new(false);
        assert_eq!(follow(sleep(), Duration::from_millis(1), &going), Ran::TimedOut);
        let cancelled = AtomicBool::new(true);
        assert_eq!(follow(sleep(), Duration::from_secs(1000), &cancelled), Ran::Interrupted);
    }
}
