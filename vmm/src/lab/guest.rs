//! What an emulated machine starts with: an initramfs of busybox, KVM's modules, a static `lacuna`,
//! and the files that its arguments name.

use super::LabError;
use super::cpio::Writer;
use super::machine::Kind;
use super::packages;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};
use std::process::{Command, Stdio};

/// The first process, with a place for its module.
const INIT: &str = include_str!("init.sh");
/// The folder of what is not the user's.
const LAB: &str = "/lacuna-lab";
/// Folders in which a file would be hidden by what is mounted there, or in the way.
const TAKEN: [&str; 5] = ["/dev", "/proc", "/sys", "/init", LAB];

/// What runs in an emulated machine.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Order {
    /// Arguments of `lacuna`, for each time that it runs: one after the other, whatever comes of them.
    pub commands: Vec<Vec<OsString>>,
    /// The working directory; absolute.
    pub folder: PathBuf,
    /// Files that are taken along, absolute or relative to the working directory. They have the same
    /// paths inside, and may be executed there if they may here.
    pub files: Vec<PathBuf>,
    /// What is brought back.
    pub keep: Option<Kept>,
    /// Variables of the environment.
    pub environment: Vec<(&'static str, OsString)>,
}

/// What is brought back, absolute or relative to the working directory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Kept {
    /// The files below a folder, if it is there.
    Folder(PathBuf),
    /// A file, if it is there.
    File(PathBuf),
}

impl Kept {
    /// The folder to which the paths of what comes back are relative.
    #[must_use]
    pub fn folder(&self) -> &Path {
        match self {
            Self::Folder(folder) => folder,
            Self::File(file) => match file.parent() {
                Some(folder) if folder != Path::new("") => folder,
                _ => Path::new("."),
            },
        }
    }

    /// The name of what is found there.
    fn name(&self) -> &OsStr {
        match self {
            Self::Folder(_) => OsStr::new("."),
            Self::File(file) => file.file_name().unwrap_or_default(),
        }
    }
}

/// What an initramfs is made of.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Parts {
    /// The programs.
    pub busybox: PathBuf,
    /// KVM's modules, as the kernel's package has them.
    pub modules: Vec<PathBuf>,
    /// The static `lacuna`.
    pub lacuna: PathBuf,
}

/// Writes the initramfs for one order.
///
/// # Errors
/// [`LabError`] if a file cannot be read, cannot be taken along, or the archive cannot be written.
pub fn write_initramfs(
    into: impl Write,
    kind: Kind,
    parts: &Parts,
    order: &Order,
) -> Result<(), LabError> {
    let broken = |error| LabError::file("write", Path::new("the lab's initramfs"))(error);
    let mut archive = Writer::new(into);
    let lab = Path::new(LAB);
    archive.device(Path::new("/dev/console"), (5, 1)).map_err(broken)?;
    let init = INIT.replace("@MODULE@", kind.module());
    archive.file(Path::new("/init"), true, init.as_bytes()).map_err(broken)?;
    for (name, path) in [("busybox", &parts.busybox), ("lacuna", &parts.lacuna)] {
        archive.file(&lab.join(name), true, &read(path)?).map_err(broken)?;
    }
    for path in &parts.modules {
        let name = packages::module(&path.to_string_lossy()).unwrap_or_default().to_owned();
        archive.file(&lab.join(name + ".ko"), false, &decompressed(path)?).map_err(broken)?;
    }
    archive.file(&lab.join("order"), false, &script(order)).map_err(broken)?;
    archive.folder(&inside(order, Path::new("."))?).map_err(broken)?;
    if let Some(keep @ Kept::File(_)) = &order.keep {
        // Each folder on the way, also one that a `..` leaves again.
        let way: Vec<_> = keep.folder().ancestors().collect();
        for folder in way.into_iter().rev() {
            archive.folder(&inside(order, folder)?).map_err(broken)?;
        }
    }
    let mut written = Vec::new();
    for file in &order.files {
        let path = inside(order, file)?;
        // The same file may be named twice.
        if !written.contains(&path) {
            let outside = order.folder.join(file);
            let contents = read(&outside)?;
            let executable = is_executable(&outside)?;
            archive.file(&path, executable, &contents).map_err(broken)?;
            written.push(path);
        }
    }
    archive.finish().map(drop).map_err(broken)
}

/// Where a file of the order lies inside.
///
/// # Errors
/// [`LabError::Arguments`] if nothing can lie there.
pub fn inside(order: &Order, path: &Path) -> Result<PathBuf, LabError> {
    let mut clean = PathBuf::from("/");
    for part in order.folder.join(path).components() {
        match part {
            Component::Normal(name) => clean.push(name),
            // Inside there are no links that would lead elsewhere.
            Component::ParentDir => _ = clean.pop(),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    match TAKEN.iter().find(|taken| clean.starts_with(taken)) {
        Some(taken) => Err(LabError::Arguments(format!(
            "{} cannot be taken along, because a lab has its own {taken}; copy it to another folder",
            path.display()
        ))),
        None => Ok(clean),
    }
}

/// The script that says what to run.
fn script(order: &Order) -> Vec<u8> {
    let mut script = Vec::new();
    let kept = order.keep.as_ref();
    let kept = kept.map(|keep| [("keep_in", keep.folder().as_os_str()), ("keep", keep.name())]);
    for (name, value) in kept.into_iter().flatten() {
        script.extend(format!("{name}=").bytes());
        script.extend(quoted(value));
        script.push(b'\n');
    }
    for (name, value) in &order.environment {
        script.extend(format!("export {name}=").bytes());
        script.extend(quoted(value));
        script.push(b'\n');
    }
    script.extend(b"cd ");
    script.extend(quoted(order.folder.as_os_str()));
    script.extend(b" || fail there is no working directory\n");
    for arguments in &order.commands {
        script.extend(b"run");
        for argument in arguments {
            script.push(b' ');
            script.extend(quoted(argument));
        }
        script.push(b'\n');
    }
    script
}

/// A word for a shell, whatever is in it.
fn quoted(word: &OsStr) -> Vec<u8> {
    let mut quoted = vec![b'\''];
    for byte in word.as_bytes() {
        match byte {
            b'\'' => quoted.extend(br"'\''"),
            byte => quoted.push(*byte),
        }
    }
    quoted.push(b'\'');
    quoted
}

/// Whether its owner may execute it.
fn is_executable(path: &Path) -> Result<bool, LabError> {
    let metadata = fs::metadata(path).map_err(LabError::file("read", path))?;
    Ok(metadata.permissions().mode() & 0o100 != 0)
}

fn read(path: &Path) -> Result<Vec<u8>, LabError> {
    fs::read(path).map_err(LabError::file("read", path))
}

/// A module as the kernel's loader takes it.
fn decompressed(path: &Path) -> Result<Vec<u8>, LabError> {
    let program = match path.extension().and_then(OsStr::to_str) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => {
            let file = fs::File::open(path).map_err(LabError::file("read", path))?;
            let mut module = Vec::new();
            let read = flate2::read::GzDecoder::new(file).read_to_end(&mut module);
            return read.map(|_| module).map_err(LabError::file("decompress", path));
        }
        _ => return read(path),
    };
    let mut command = Command::new(program);
    command.args(["--decompress", "--stdout", "--"]).arg(path);
    let output = command.stdin(Stdio::null()).output().map_err(|error| {
        let what =
            format!("{program}, which the kernel's modules need, cannot be started: {error}");
        LabError::host(what, format!("install {program}"))
    })?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(LabError::file("decompress", path)(io::Error::other(said)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::cpio;

    fn order() -> Order {
        Order {
            commands: vec![
                ["run", "a.toml", "it's $HOME", ""].map(OsString::from).to_vec(),
                vec!["doctor".into()],
            ],
            folder: "/home/me/my work".into(),
            files: vec!["a.toml".into(), "../b/./c".into(), "/home/me/my work/a.toml".into()],
            keep: Some(Kept::Folder("out put".into())),
            environment: vec![("RUST_LOG", "info".into())],
        }
    }

    #[test]
    fn a_shell_gives_back_the_same_arguments() {
        let mut script = b"cd() { printf '%s:' \"$keep_in\" \"$keep\" \"$RUST_LOG\" \"$@\"; }\n\
                           run() { printf '%s|' \"$@\"; }\n"
            .to_vec();
        script.extend(super::script(&order()));
        let output = Command::new("sh").arg("-c").arg(OsStr::from_bytes(&script)).output().unwrap();
        let printed = String::from_utf8(output.stdout).unwrap();
        assert_eq!(printed, "out put:.:info:/home/me/my work:run|a.toml|it's $HOME||doctor|");
    }

    #[test]
    fn what_is_kept_is_a_folder_or_one_file_of_a_folder() {
        let kept = |keep: Kept| (keep.folder().to_owned(), keep.name().to_owned());
        assert_eq!(kept(Kept::Folder("a/b".into())), ("a/b".into(), ".".into()));
        assert_eq!(kept(Kept::File("a/b.xml".into())), ("a".into(), "b.xml".into()));
        assert_eq!(kept(Kept::File("b.xml".into())), (".".into(), "b.xml".into()));
        assert_eq!(kept(Kept::File("/b.xml".into())), ("/".into(), "b.xml".into()));
    }

    #[test]
    fn files_lie_inside_where_they_are_outside() {
        let order = order();
        let inside = |path: &str| inside(&order, Path::new(path)).unwrap();
        assert_eq!(inside("a.toml"), Path::new("/home/me/my work/a.toml"));
        assert_eq!(inside("../b/./c"), Path::new("/home/me/b/c"));
        assert_eq!(inside("/x/../../y"), Path::new("/y"));
    }

    #[test]
    fn what_a_lab_has_itself_is_not_taken_along() {
        for path in
            ["/dev/fd/63", "/proc/self/fd/3", "/init", "/lacuna-lab/lacuna", "../../../sys/x"]
        {
            let error = inside(&order(), Path::new(path)).unwrap_err().to_string();
            assert!(error.contains("copy it to another folder"), "{error}");
        }
    }

    #[test]
    fn what_may_be_executed_outside_may_be_inside() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("program");
        fs::write(&path, "").unwrap();
        for (mode, executable) in [(0o644, false), (0o755, true)] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(is_executable(&path).unwrap(), executable, "{mode:o}");
        }
        assert!(is_executable(&folder.path().join("none")).is_err());
    }

    #[test]
    fn an_initramfs_has_each_file_once_at_its_place() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = folder.path().join(name);
            fs::write(&path, text).unwrap();
            path
        };
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packed.write_all(b"kvm").unwrap();
        fs::write(folder.path().join("kvm.ko.gz"), packed.finish().unwrap()).unwrap();
        let parts = Parts {
            busybox: file("bb", "busybox"),
            modules: vec![file("kvm-amd.ko", "amd"), folder.path().join("kvm.ko.gz")],
            lacuna: file("l", "lacuna"),
        };
        file("a.toml", "[guest]");
        let order = Order {
            folder: folder.path().into(),
            files: vec!["a.toml".into(), folder.path().join("a.toml")],
            ..order()
        };
        let mut archive = Vec::new();
        write_initramfs(&mut archive, Kind::Npt, &parts, &order).unwrap();
        let files = cpio::read(&archive[..], 1 << 20).unwrap();
        let contents = |path: &Path| {
            let path = path.strip_prefix("/").unwrap();
            let mut found = files.iter().filter(|(name, _)| name == path);
            let (_, contents) = found.next().unwrap();
            assert!(found.next().is_none(), "{} is there twice", path.display());
            String::from_utf8(contents.clone()).unwrap()
        };
        assert_eq!(contents(Path::new("/lacuna-lab/busybox")), "busybox");
        assert_eq!(contents(Path::new("/lacuna-lab/kvm.ko")), "kvm");
        assert_eq!(contents(Path::new("/lacuna-lab/kvm-amd.ko")), "amd");
        assert_eq!(contents(&folder.path().join("a.toml")), "[guest]");
        let init = contents(Path::new("/init"));
        assert!(init.contains("irqbypass kvm kvm-amd;") && !init.contains("@MODULE@"), "{init}");
    }
}
