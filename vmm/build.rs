//! Builds the guest images that the VMM embeds: the ordinary one, and one that contains the
//! faults that can be planted.
//!
//! A nested cargo builds them, in a target folder of its own and always with an explicit target,
//! so that its flags reach neither build scripts nor proc-macros.

#[path = "src/lab/inherited.rs"]
mod inherited;

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The proper target: no SSE, no red zone.
const BARE_TARGET: &str = "x86_64-unknown-none";
/// What stands in where the bare target is not installed.
const HOST_TARGET: &str = "x86_64-unknown-linux-gnu";
const BINARY: &str = "lacuna-guest-image";

/// File name of an image, and the features that it is built with.
const IMAGES: [(&str, &str); 2] = [("guest.elf", "image"), ("guest-faults.elf", "image,faults")];

fn main() {
    let manifest = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    let out = PathBuf::from(variable("OUT_DIR"));
    let Some(root) = manifest.parent() else {
        panic!("{} has no parent folder", manifest.display());
    };
    for watched in [
        "guest/src",
        "guest/Cargo.toml",
        "guest/image.ld",
        "shared/src",
        "shared/Cargo.toml",
        "Cargo.toml",
        "Cargo.lock",
        "rust-toolchain.toml",
    ] {
        println!("cargo::rerun-if-changed={}", root.join(watched).display());
    }
    println!("cargo::rerun-if-changed=build.rs");
    let target = if is_installed(BARE_TARGET) { BARE_TARGET } else { HOST_TARGET };
    println!("cargo::rustc-env=LACUNA_GUEST_TARGET={target}");
    for (file, features) in IMAGES {
        let built = build(root, &out, target, features);
        let kept = out.join(file);
        if let Err(error) = std::fs::copy(&built, &kept) {
            panic!("cannot copy {} to {}: {error}", built.display(), kept.display());
        }
    }
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|error| panic!("{name}, which cargo sets: {error}"))
}

/// Whether rustc has a `core` for `target`.
fn is_installed(target: &str) -> bool {
    let rustc = env::var("RUSTC").unwrap_or_else(|_| "rustc".into());
    let output =
        Command::new(rustc).args(["--print", "target-libdir", "--target", target]).output();
    output.is_ok_and(|o| {
        o.status.success() && Path::new(String::from_utf8_lossy(&o.stdout).trim()).is_dir()
    })
}

fn build(root: &Path, out: &Path, target: &str, features: &str) -> PathBuf {
    let script = root.join("guest/image.ld");
    let mut flags = vec![
        "-Cpanic=abort".to_owned(),
        "-Crelocation-model=static".to_owned(),
        "-Ccode-model=kernel".to_owned(),
        "-Cforce-frame-pointers=yes".to_owned(),
        format!("-Clink-arg=-T{}", script.display()),
    ];
    if target == HOST_TARGET {
        flags.extend(
            [
                "-Ctarget-feature=-sse",
                "-Cno-redzone=yes",
                "-Clink-arg=-nostartfiles",
                "-Clink-arg=-nostdlib",
                "-Clink-arg=-static",
                "-Clink-arg=-Wl,--build-id=none",
            ]
            .map(str::to_owned),
        );
    }
    let folder = out.join("guest");
    let mut cargo = Command::new(variable("CARGO"));
    cargo
        .current_dir(root)
        .args(["build", "--locked", "--quiet", "--profile", "guest", "--package", "lacuna-guest"])
        .args(["--bin", BINARY, "--features", features, "--target", target, "--target-dir"])
        .arg(&folder)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    // What the outer cargo, clippy or a sanitizer build set is not meant for the guest.
    for variable in inherited::INHERITED {
        cargo.env_remove(variable);
    }
    let output = match cargo.output() {
        Ok(output) => output,
        Err(error) => panic!("cannot start cargo for the guest image: {error}"),
    };
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        panic!("the guest image ({features}, {target}) does not build:\n{errors}");
    }
    folder.join(target).join("guest").join(BINARY)
}
