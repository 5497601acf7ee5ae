//! Programs of apt: run until they end, tried a few times where they need the network.

use super::LabError;
use super::setup::Watcher;
use std::io::Read;
use std::process::{ChildStderr, Command, Output, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often something that needs the network is tried.
const TRIES: u32 = 3;
/// Pause between two looks at a running program.
const TICK: Duration = Duration::from_millis(100);
/// Longest time that one try may take.
const LONGEST: Duration = Duration::from_secs(1800);
/// Pause before it is tried again, longer each time.
const PAUSE: Duration = Duration::from_secs(3);

/// Runs a command that needs the network, a few times if it fails. `tick` is called while it runs.
///
/// # Errors
/// [`LabError`] if it cannot be started, is cancelled, or fails each time.
pub(super) fn online(
    command: &mut Command,
    watcher: &mut dyn Watcher,
    tick: &mut dyn FnMut(&mut dyn Watcher),
) -> Result<(), LabError> {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut attempt = 1;
    loop {
        let mut child = command.spawn().map_err(no_apt)?;
        let said = child.stderr.take().map(reader);
        let started = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().map_err(no_apt)? {
                break status;
            }
            tick(watcher);
            let too_long = started.elapsed() > LONGEST;
            let on = match too_long {
                true => {
                    Err(LabError::Packages(format!("it took more than {} s", LONGEST.as_secs())))
                }
                false => watcher.go_on(),
            };
            if let Err(why) = on {
                // An error means that it has just ended.
                let _ = child.kill();
                child.wait().map_err(no_apt)?;
                return Err(why);
            }
            std::thread::sleep(TICK);
        };
        // Ctrl-C reaches both.
        watcher.go_on()?;
        let stderr = said.and_then(|said| said.join().ok()).unwrap_or_default();
        let name = command.get_program().to_string_lossy().into_owned();
        match succeeded(&name, &Output { status, stdout: Vec::new(), stderr }) {
            Err(LabError::Packages(why)) if attempt < TRIES => {
                log::warn!("attempt {attempt} of {TRIES} to have packages failed: {why}");
                std::thread::sleep(PAUSE * attempt);
                attempt += 1;
            }
            result => return result,
        }
    }
}

/// Reads what a program says while it runs, so that it never waits for its reader.
fn reader(mut stderr: ChildStderr) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut said = Vec::new();
        // What was read before an error is what there is.
        let _ = stderr.read_to_end(&mut said);
        said
    })
}

/// Whether a program ended well; if not, why.
///
/// # Errors
/// [`LabError`], by what it says.
pub(super) fn succeeded(program: &str, output: &Output) -> Result<(), LabError> {
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let of_interest = |line: &&str| line.starts_with("E:") || line.starts_with("W:");
    let lines: Vec<_> = said.lines().filter(of_interest).take(4).collect();
    let lines = if lines.is_empty() { said.trim().to_owned() } else { lines.join(" ") };
    if lines.contains("enough free space") || lines.contains("No space left") {
        return Err(LabError::host(
            lines,
            "free some space, or name another folder with --cache DIR",
        ));
    }
    Err(LabError::Packages(format!("{program} says: {lines}")))
}

/// Why a program of apt could not be started.
pub(super) fn no_apt(error: std::io::Error) -> LabError {
    LabError::host(
        format!("apt cannot be started: {error}"),
        "use Debian 12 or later; the labs are made of its packages",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Patient(u32);

    impl Watcher for Patient {
        fn begin(&mut self, _: &str, _: Option<u64>) {}

        fn at(&mut self, _: u64) {}

        fn go_on(&mut self) -> Result<(), LabError> {
            self.0 = self.0.checked_sub(1).ok_or(LabError::Cancelled)?;
            Ok(())
        }
    }

    #[test]
    fn a_download_that_is_cancelled_ends_at_once() {
        let mut sleep = Command::new("sleep");
        let ended = online(sleep.arg("1000"), &mut Patient(2), &mut |_| {});
        assert!(matches!(ended, Err(LabError::Cancelled)), "{ended:?}");
    }

    #[test]
    fn a_program_that_says_a_lot_is_not_kept_waiting() {
        let mut command = Command::new("sh");
        let script = "yes E: x | head -c 300000 >&2; exit 0";
        online(command.args(["-c", script]), &mut Patient(u32::MAX), &mut |_| {}).unwrap();
    }

    #[test]
    fn no_space_and_no_apt_are_told_apart_from_packages_that_cannot_be_had() {
        let shell = |script: &str| Command::new("sh").args(["-c", script]).output().unwrap();
        let full = "echo 'E: You do not have enough free space in x' >&2; exit 100";
        assert!(matches!(succeeded("apt-get", &shell(full)), Err(LabError::Host { .. })));
        let gone = "echo noise >&2; echo 'E: Failed to fetch x' >&2; exit 100";
        let error = succeeded("apt-get", &shell(gone)).unwrap_err();
        assert!(matches!(error, LabError::Packages(_)));
        assert!(error.to_string().contains("apt-get says: E: Failed to fetch x; check"), "{error}");
        let mut missing = Command::new("/nowhere/apt-get");
        let error = online(&mut missing, &mut Patient(9), &mut |_| {}).unwrap_err();
        assert!(matches!(error, LabError::Host { .. }));
    }
}
