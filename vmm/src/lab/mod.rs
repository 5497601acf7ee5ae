//! Labs: emulated machines with real NPT or EPT, for hosts that have neither, in which `lacuna` runs.
//!
//! A lab is made of Debian's packages, which are downloaded into a cache and unpacked there; nothing
//! is installed. It starts a kernel with KVM, runs one command or several, and brings back what they
//! wrote, the files that they kept, and their exit statuses.
#![forbid(unsafe_code)]

mod apt;
mod binary;
mod cache;
mod child;
mod cpio;
mod error;
mod guest;
mod inherited;
mod machine;
mod manifest;
mod online;
mod packages;
mod result;
mod screen;
mod setup;
mod sources;
mod streams;

pub use binary::build_static;
pub use cache::Cache;
pub use error::LabError;
pub use guest::{Kept, Order};
pub use machine::{Kind, installed_qemu};
pub use packages::{QEMU, Set};
pub use result::Ending;
pub use setup::{Watcher, missing, set_up};

use crate::stop::{Stop, Stopped};
use child::Running;
use guest::Parts;
use machine::{Emulator, PORTS, Start};
use result::Results;
use screen::Screen;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use streams::Tail;

/// Pause between two looks at what a lab wrote.
const LOOK: Duration = Duration::from_millis(20);
/// How long an emulated machine that has sent its result may take to switch itself off.
const SWITCHING_OFF: Duration = Duration::from_secs(5);
/// Lines that are shown of console and emulator when there is no result.
const LAST_LINES: usize = 12;

/// What a lab is to be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Settings {
    /// Its second stage.
    pub kind: Kind,
    /// Whether it has the newer kernel.
    pub backports: bool,
    /// Processors; with EPT there is one.
    pub cpus: u8,
    /// Memory.
    pub memory_mib: u32,
    /// How long the commands may take, from the machine's start.
    pub timeout: Duration,
    /// The static `lacuna` that runs in it; one is found or built if `None`.
    pub lacuna: Option<PathBuf>,
}

/// Where bytes of a command went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stream {
    /// Standard output.
    Out,
    /// Standard error.
    Err,
}

/// A lab that can be started.
#[derive(Debug)]
pub struct Lab {
    settings: Settings,
    cache: Cache,
    emulator: Emulator,
    kernel: PathBuf,
    parts: Parts,
    _lock: cache::Lock,
}

/// The sets that a lab needs.
#[must_use]
pub fn sets(kind: Kind, backports: bool) -> Vec<Set> {
    let kernel = if backports { Set::KernelBackports } else { Set::Kernel };
    let mut sets = vec![kernel, Set::Busybox];
    if kind == Kind::Ept || installed_qemu().is_none() {
        sets.insert(0, kind.emulator());
    }
    sets
}

impl Lab {
    /// Has everything that the lab needs: packages, downloaded if they are not there, and a static
    /// `lacuna`, built if there is none.
    ///
    /// # Errors
    /// [`LabError`] if something cannot be had.
    pub fn prepare(
        settings: Settings,
        cache: Cache,
        watcher: &mut dyn Watcher,
    ) -> Result<Self, LabError> {
        let source = binary::source(settings.lacuna.as_deref())?;
        let sets = sets(settings.kind, settings.backports);
        set_up(&cache, &sets, watcher)?;
        watcher.begin("building a static lacuna", None);
        let lacuna = source.provide();
        // Ctrl-C ends cargo too.
        watcher.go_on()?;
        let lacuna = lacuna?;
        watcher.begin("checking the packages", None);
        let lock = cache.lock(false, &mut || watcher.go_on())?;
        let kernel_set = if settings.backports { Set::KernelBackports } else { Set::Kernel };
        let emulator = match settings.kind {
            Kind::Ept => Emulator::Bochs(setup::kept(&cache, Set::Bochs)?),
            Kind::Npt if sets.contains(&Set::Qemu) => {
                Emulator::Qemu(setup::kept(&cache, Set::Qemu)?)
            }
            Kind::Npt => Emulator::InstalledQemu,
        };
        let kernel = setup::kept(&cache, kernel_set)?;
        let busybox = setup::kept(&cache, Set::Busybox)?;
        let modules = ["irqbypass", "kvm", settings.kind.module()];
        let modules = modules.map(|name| kernel.file(|path| packages::module(path) == Some(name)));
        let parts = Parts {
            busybox: busybox.file(|path| path.ends_with("bin/busybox"))?,
            modules: modules.into_iter().collect::<Result<_, _>>()?,
            lacuna,
        };
        let kernel = kernel.file(|path| path.starts_with("boot/vmlinuz-"))?;
        Ok(Self { settings, cache, emulator, kernel, parts, _lock: lock })
    }

    /// Runs an order to its end. What the command writes goes to `output` as it comes. Whatever
    /// happens, the emulated machine is gone when this returns.
    ///
    /// # Errors
    /// [`LabError`] if the lab could not be started or came to no result in time.
    pub fn run(
        &self,
        order: &Order,
        stop: &Stop,
        output: &mut dyn FnMut(Stream, &[u8]),
    ) -> Result<Ending, LabError> {
        let folder = self.cache.run_folder()?;
        let initramfs = folder.file("initramfs");
        let file = File::create(&initramfs).map_err(LabError::file("write", &initramfs))?;
        let mut file = BufWriter::new(file);
        guest::write_initramfs(&mut file, self.settings.kind, &self.parts, order)?;
        file.flush().map_err(LabError::file("write", &initramfs))?;
        let start = Start {
            folder: folder.path(),
            kernel: self.kernel.clone(),
            initramfs,
            cpus: self.settings.cpus,
            memory_mib: self.settings.memory_mib,
        };
        let launch = self.emulator.launch(&start)?;
        log::debug!("starting {launch:?}");
        let running = Running::start(&launch, folder.path())?;
        let mut watch = Watch::new(folder.path(), self.settings.kind, running, output);
        let ending = watch.result(order.commands.len(), self.settings.timeout, stop);
        watch.console();
        ending
    }
}

/// A running lab, as seen from outside.
struct Watch<'w> {
    folder: &'w Path,
    kind: Kind,
    running: Running,
    results: Results,
    streams: [(Stream, Tail); 2],
    screen: Screen,
    output: &'w mut dyn FnMut(Stream, &[u8]),
}

impl<'w> Watch<'w> {
    fn new(
        folder: &'w Path,
        kind: Kind,
        running: Running,
        output: &'w mut dyn FnMut(Stream, &[u8]),
    ) -> Self {
        let [_, out, err, result] = PORTS.map(|port| folder.join(port));
        let streams = [(Stream::Out, Tail::new(&out)), (Stream::Err, Tail::new(&err))];
        let (results, screen) = (Results::new(&result), Screen::new(folder));
        Self { folder, kind, running, results, streams, screen, output }
    }

    fn result(
        &mut self,
        commands: usize,
        timeout: Duration,
        stop: &Stop,
    ) -> Result<Ending, LabError> {
        let started = Instant::now();
        loop {
            // Asked for first: what was written before is seen below.
            let ended = self.running.ended();
            self.screen.drain();
            self.pass_on()?;
            if let Some(ending) = self.results.look().map_err(|what| self.no_result(what))? {
                if self.kind.switches_off() {
                    self.running.wait(SWITCHING_OFF);
                }
                self.running.end();
                self.pass_on()?;
                if ending.statuses.len() != commands {
                    let count = ending.statuses.len();
                    return Err(self.no_result(format!("{count} of {commands} commands ended")));
                }
                return Ok(ending);
            }
            if let Some(status) = ended {
                let what = match status.code() {
                    Some(0) => "the emulated machine switched itself off".to_owned(),
                    _ => format!("its emulator ended with {status}"),
                };
                return Err(self.no_result(what));
            }
            match stop.told() {
                Some(Stopped::Cancelled) => {
                    self.running.end();
                    self.pass_on()?;
                    return Err(LabError::Cancelled);
                }
                Some(Stopped::Timeout) => return Err(self.timeout(started.elapsed())),
                None if started.elapsed() >= timeout => return Err(self.timeout(timeout)),
                None => std::thread::sleep(LOOK),
            }
        }
    }

    /// Passes on what the command wrote since.
    fn pass_on(&mut self) -> Result<(), LabError> {
        for (stream, tail) in &mut self.streams {
            let read = tail.read(&mut |bytes| (self.output)(*stream, bytes));
            read.map_err(|error| LabError::file("read", tail.path())(error))?;
        }
        Ok(())
    }

    fn timeout(&mut self, after: Duration) -> LabError {
        self.running.end();
        LabError::Timeout { seconds: after.as_secs(), last: self.last_lines() }
    }

    fn no_result(&mut self, what: String) -> LabError {
        self.running.end();
        LabError::NoResult { what, last: self.last_lines() }
    }

    /// The last lines of emulator and console.
    fn last_lines(&self) -> String {
        let mut last = String::new();
        for file in [child::SAID, "bochs.log", PORTS[0]] {
            last += &streams::last_lines(&self.folder.join(file), LAST_LINES);
        }
        last
    }

    /// Puts what the console said into the log.
    fn console(&self) {
        for line in streams::last_lines(&self.folder.join(PORTS[0]), usize::MAX).lines() {
            log::info!("console: {line}");
        }
    }
}
