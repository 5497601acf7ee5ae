//! The screen of an emulator that draws on a terminal of its own.
//!
//! Bochs opens a pseudo-terminal for its screen, names it on standard output, and expects that somebody
//! looks. What nobody reads stays in the terminal's buffer of a few KiB; when that is full, Bochs waits
//! for ever: after some minutes, since it draws its status line time and again.

use super::child::SAID;
use super::streams::Tail;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// What stands before the terminal's path, in quotation marks.
const NAMED: &str = "connected to screen \"";
/// Most bytes of what the emulator says among which the name is looked for.
const MOST: usize = 64 << 10;
/// Bytes that are read at once.
const AT_ONCE: usize = 4096;
/// Reads at a time, so that whoever draws without end does not keep its reader.
const READS: usize = 64;

/// A screen that is read, so that it never gets full, and that nobody sees.
#[derive(Debug)]
pub struct Screen {
    state: State,
}

#[derive(Debug)]
enum State {
    /// Its name has not been said yet; what was.
    Unnamed(Tail, Vec<u8>),
    Read(File),
    /// There is none, or no longer.
    Gone,
}

impl Screen {
    /// That of the emulator which runs in this folder.
    #[must_use]
    pub fn new(folder: &Path) -> Self {
        Self { state: State::Unnamed(Tail::new(&folder.join(SAID)), Vec::new()) }
    }

    /// Reads what was drawn since. What cannot be read is no error: the lab goes on, or its end is seen
    /// elsewhere.
    pub fn drain(&mut self) {
        if let State::Unnamed(said, text) = &mut self.state {
            let read = said.read(&mut |bytes| text.extend(bytes));
            let named = name(text);
            if let Some(path) = named {
                self.state = open(&path).map_or(State::Gone, State::Read);
            } else if read.is_err() || text.len() > MOST {
                self.state = State::Gone;
            }
        }
        if let State::Read(screen) = &mut self.state
            && !passed_over(screen)
        {
            self.state = State::Gone;
        }
    }
}

/// The terminal's path, if all of it was said.
fn name(text: &[u8]) -> Option<PathBuf> {
    let text = String::from_utf8_lossy(text);
    let (_, rest) = text.split_once(NAMED)?;
    rest.split_once('"').map(|(path, _)| path.into())
}

fn open(path: &Path) -> Option<File> {
    let mut options = OpenOptions::new();
    // It is neither to become this process's terminal nor to be waited for.
    let flags = libc::O_NOCTTY | libc::O_NONBLOCK;
    let opened = options.read(true).custom_flags(flags).open(path);
    opened.map_err(|error| log::warn!("the screen {} is not read: {error}", path.display())).ok()
}

/// Reads what is there; whether more may come.
fn passed_over(screen: &mut File) -> bool {
    let mut bytes = [0; AT_ONCE];
    for _ in 0..READS {
        match screen.read(&mut bytes) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => {
                return matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted);
            }
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::Command;

    #[test]
    fn a_name_is_taken_when_all_of_it_was_said() {
        assert_eq!(name(b"Bochs connected to screen \"/dev/pts/1\"\n"), Some("/dev/pts/1".into()));
        assert_eq!(name(b"Bochs connected to screen \"/dev/pt"), None);
        assert_eq!(name(b"\xffnothing of the kind"), None);
    }

    /// A pipe, which as a terminal takes no more than its buffer holds.
    #[test]
    fn a_screen_that_is_drained_takes_more_than_its_buffer_holds() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("screen");
        assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let mut screen = Screen::new(folder.path());
        screen.drain();
        assert!(matches!(screen.state, State::Unnamed(..)), "{screen:?}");
        let said = format!("some words\nBochs connected to screen \"{}\"\n", pipe.display());
        std::fs::write(folder.path().join(SAID), said).unwrap();
        screen.drain();
        assert!(matches!(screen.state, State::Read(_)), "{screen:?}");
        let mut options = OpenOptions::new();
        let mut drawn = options.write(true).custom_flags(libc::O_NONBLOCK).open(&pipe).unwrap();
        let full = |drawn: &mut File| {
            let mut taken = 0;
            while let Ok(count) = drawn.write(&[b'x'; AT_ONCE]) {
                taken += count;
            }
            taken
        };
        let first = full(&mut drawn);
        assert!(first > 0 && full(&mut drawn) == 0, "it takes no more");
        screen.drain();
        assert!(full(&mut drawn) > 0, "nothing was read of {first} bytes");
    }

    #[test]
    fn a_screen_that_cannot_be_opened_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(SAID), "connected to screen \"/nowhere/at/all\"")
            .unwrap();
        let mut screen = Screen::new(folder.path());
        screen.drain();
        assert!(matches!(screen.state, State::Gone), "{screen:?}");
        screen.drain();
    }
}
