//! The emulated machines: what starts them.

use super::LabError;
use super::cache::Kept;
use super::packages::{self, Set, Version};
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Which second stage the emulated machine has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// AMD's nested page tables, by QEMU.
    Npt,
    /// Intel's extended page tables, by Bochs.
    Ept,
}

impl Kind {
    /// The name in messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Npt => "NPT",
            Self::Ept => "EPT",
        }
    }

    /// The set with its emulator.
    #[must_use]
    pub const fn emulator(self) -> Set {
        match self {
            Self::Npt => Set::Qemu,
            Self::Ept => Set::Bochs,
        }
    }

    /// The last of KVM's modules.
    #[must_use]
    pub const fn module(self) -> &'static str {
        match self {
            Self::Npt => "kvm-amd",
            Self::Ept => "kvm-intel",
        }
    }

    /// Whether the emulated machine switches itself off.
    pub(super) const fn switches_off(self) -> bool {
        matches!(self, Self::Npt)
    }
}

/// Files of a run that the emulator writes, in the run's folder: one for each serial port.
pub const PORTS: [&str; 4] = ["console", "stdout", "stderr", "result"];

/// What an emulated machine starts from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Start<'r> {
    /// The run's folder.
    pub folder: &'r Path,
    /// The kernel.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
    /// Processors.
    pub cpus: u8,
    /// Memory.
    pub memory_mib: u32,
}

/// A program with its arguments and environment.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Launch {
    /// Program and arguments.
    pub command: Vec<OsString>,
    /// Variables.
    pub environment: Vec<(&'static str, OsString)>,
}

/// An emulator.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Emulator {
    /// A QEMU that is installed.
    InstalledQemu,
    /// One of the cache.
    Qemu(Kept),
    /// Bochs.
    Bochs(Kept),
}

/// Whether a QEMU is installed that is new enough.
#[must_use]
pub fn installed_qemu() -> Option<Version> {
    let mut qemu = Command::new(QEMU);
    let output = qemu.arg("--version").stdin(Stdio::null()).output().ok()?;
    packages::qemu_version(&String::from_utf8_lossy(&output.stdout))
        .filter(|version| *version >= packages::QEMU)
}

const QEMU: &str = "qemu-system-x86_64";

impl Emulator {
    /// How to start the machine. Files that the emulator needs are written into the run's folder.
    ///
    /// # Errors
    /// [`LabError`] if one cannot be written.
    pub fn launch(&self, start: &Start<'_>) -> Result<Launch, LabError> {
        match self {
            Self::InstalledQemu => {
                Ok(qemu(Launch { command: vec![QEMU.into()], ..Launch::default() }, start))
            }
            Self::Qemu(kept) => {
                let root = kept.root();
                let program = kept.file(|path| path == "usr/bin/qemu-system-x86_64")?;
                let mut command = vec![program.into()];
                for folder in ["usr/share/qemu", "usr/share/seabios"] {
                    command.extend(["-L".into(), root.join(folder).into()]);
                }
                let environment = vec![("LD_LIBRARY_PATH", libraries(&root))];
                Ok(qemu(Launch { command, environment }, start))
            }
            Self::Bochs(kept) => bochs(kept, start),
        }
    }
}

fn qemu(mut launch: Launch, start: &Start<'_>) -> Launch {
    let mut add = |words: &[&str]| launch.command.extend(words.iter().map(OsString::from));
    add(&["-accel", "tcg", "-cpu", "max", "-M", "pc", "-nodefaults", "-no-user-config"]);
    add(&["-display", "none", "-monitor", "none", "-no-reboot"]);
    add(&["-smp", &start.cpus.to_string(), "-m", &format!("{}M", start.memory_mib)]);
    for port in PORTS {
        add(&["-serial", &format!("file:{}", start.folder.join(port).display())]);
    }
    add(&["-append", "console=ttyS0 panic=-1 quiet tsc=reliable mitigations=off"]);
    launch.command.extend(["-kernel".into(), start.kernel.clone().into()]);
    launch.command.extend(["-initrd".into(), start.initramfs.clone().into()]);
    launch
}

/// The disc's menu, which has one entry.
const ISOLINUX: &str = "\
default lab
prompt 0
label lab
  kernel /vmlinuz
  append initrd=/initrd console=ttyS0 panic=-1 quiet acpi=off nosmp nokaslr lpj=4000000 mitigations=off
";

fn bochs(kept: &Kept, start: &Start<'_>) -> Result<Launch, LabError> {
    let (root, folder) = (kept.root(), start.folder);
    let write = |name: &str, text: &str| {
        let path = folder.join(name);
        fs::write(&path, text).map_err(LabError::file("write", &path))
    };
    make_disc(kept, start)?;
    let share = root.join("usr/share/bochs");
    let bios = kept.file(|path| path == "usr/share/bochs/BIOS-bochs-latest")?;
    let vga = kept.file(|path| {
        path == "usr/share/vgabios/vgabios.bin" || path.ends_with("/VGABIOS-lgpl-latest")
    })?;
    let mut text = format!(
        "megs: {memory}\n\
         cpu: model=corei7_haswell_4770, count=1, ips=100000000, reset_on_triple_fault=0\n\
         romimage: file={bios}\nvgaromimage: file={vga}\n\
         ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14\n\
         ata0-master: type=cdrom, path={disc}, status=inserted\nboot: cdrom\n\
         display_library: term\nlog: {log}\npanic: action=fatal\nerror: action=ignore\n\
         info: action=ignore\ndebug: action=ignore\nclock: sync=none\nmouse: enabled=0\n",
        memory = start.memory_mib,
        bios = bios.display(),
        vga = vga.display(),
        disc = folder.join("disc.iso").display(),
        log = folder.join("bochs.log").display(),
    );
    for (number, port) in (1..).zip(PORTS) {
        let path = folder.join(port);
        text += &format!("com{number}: enabled=1, mode=file, dev={}\n", path.display());
    }
    write("bochsrc", &text)?;
    // Its debugger is compiled in, and would wait at a prompt.
    write("debugger", "c\n")?;
    let program = kept.file(|path| path == "usr/bin/bochs-bin")?;
    let at = |name: &str| folder.join(name).display().to_string();
    // It draws on a terminal. It is given one of its own, and says who it is, so that it can be ended.
    let inside = format!(
        "echo $$ >{}; exec {} -q -f {} -rc {}",
        at(super::child::PROCESS),
        program.display(),
        at("bochsrc"),
        at("debugger")
    );
    let command = ["script", "--quiet", "--return", "--command", &inside, "/dev/null"];
    Ok(Launch {
        command: command.map(OsString::from).to_vec(),
        environment: vec![
            ("LD_LIBRARY_PATH", libraries(&root)),
            ("LTDL_LIBRARY_PATH", root.join("usr/lib/x86_64-linux-gnu/bochs/plugins").into()),
            ("BXSHARE", share.into()),
            ("TERM", "linux".into()),
            ("SHELL", "/bin/sh".into()),
        ],
    })
}

/// Makes the disc that Bochs starts from.
fn make_disc(kept: &Kept, start: &Start<'_>) -> Result<(), LabError> {
    let tree = start.folder.join("disc");
    fs::create_dir_all(&tree).map_err(LabError::file("make the folder", &tree))?;
    for (name, from) in [
        ("isolinux.bin", kept.file(|path| path == "usr/lib/ISOLINUX/isolinux.bin")?),
        ("ldlinux.c32", kept.file(|path| path == "usr/lib/syslinux/modules/bios/ldlinux.c32")?),
        ("vmlinuz", start.kernel.clone()),
        ("initrd", start.initramfs.clone()),
    ] {
        fs::copy(&from, tree.join(name)).map_err(LabError::file("copy", &from))?;
    }
    let menu = tree.join("isolinux.cfg");
    fs::write(&menu, ISOLINUX).map_err(LabError::file("write", &menu))?;
    let mut program = Command::new(kept.file(|path| path == "usr/bin/genisoimage")?);
    program.env("LD_LIBRARY_PATH", libraries(&kept.root()));
    program.args(["-quiet", "-o"]).arg(start.folder.join("disc.iso"));
    program.args(["-b", "isolinux.bin", "-c", "boot.cat", "-no-emul-boot", "-boot-load-size", "4"]);
    program.args(["-boot-info-table", "-r"]).arg(&tree);
    let remedy = "remove the cache's folder sets/bochs, so that it is made anew";
    let output = program.stdin(Stdio::null()).output().map_err(|error| {
        LabError::host(format!("genisoimage cannot be started: {error}"), remedy)
    })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(LabError::host(format!("the disc cannot be made: {said}"), remedy))
}

/// Where the packages' libraries lie.
fn libraries(root: &Path) -> OsString {
    let mut path = OsString::new();
    for folder in
        ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu/libibverbs"]
    {
        if !path.is_empty() {
            path.push(":");
        }
        path.push(root.join(folder));
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(folder: &Path) -> Start<'_> {
        Start {
            folder,
            kernel: "/k/vmlinuz".into(),
            initramfs: folder.join("initramfs"),
            cpus: 2,
            memory_mib: 1024,
        }
    }

    fn words(launch: &Launch) -> String {
        let words: Vec<_> = launch.command.iter().map(|word| word.to_string_lossy()).collect();
        words.join(" ")
    }

    #[test]
    fn qemu_gets_one_file_for_each_port_in_their_order() {
        let launch = Emulator::InstalledQemu.launch(&start(Path::new("/run"))).unwrap();
        let words = words(&launch);
        let ports = "-serial file:/run/console -serial file:/run/stdout -serial file:/run/stderr \
                     -serial file:/run/result";
        assert!(words.contains(ports), "{words}");
        assert!(
            words.contains("-smp 2 -m 1024M") && words.contains("-kernel /k/vmlinuz"),
            "{words}"
        );
        assert!(words.contains("-nodefaults -no-user-config"), "{words}");
        assert!(launch.environment.is_empty(), "an installed QEMU has its own libraries");
    }

    #[test]
    fn every_lab_has_a_module_of_its_own() {
        for kind in [Kind::Npt, Kind::Ept] {
            assert!(packages::MODULES.contains(&kind.module()));
        }
        assert_ne!(Kind::Npt.module(), Kind::Ept.module());
    }

    #[test]
    fn libraries_are_looked_for_below_the_root() {
        let path = libraries(Path::new("/c/root"));
        let path = path.to_string_lossy();
        assert!(path.split(':').all(|folder| folder.starts_with("/c/root/")), "{path}");
        assert_eq!(path.split(':').count(), 3);
    }
}
