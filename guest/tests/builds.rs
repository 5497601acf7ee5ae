//! What must not build: each case is a crate of its own that `cargo check` is run on, offline.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const SECRET: &str = include_str!("users/secret.rs");
const MAPPED: &str = include_str!("users/mapped.rs");
const ASSERT_OWNED: &str = include_str!("../src/tests/assert_owned.rs");

/// Checks a crate with this source that uses the guest library with these features: `Err` with what
/// the compiler said if it does not build.
fn check(name: &str, source: &str, features: &str) -> Result<(), String> {
    let guest = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("builds");
    let folder = root.join(name);
    fs::create_dir_all(folder.join("src")).unwrap();
    let manifest = format!(
        "[package]\nname = \"{name}\"\nedition = \"2024\"\n\n[dependencies.lacuna-guest]\npath = \
         {guest:?}\ndefault-features = false\nfeatures = [{features}]\n\n[workspace]\n"
    );
    fs::write(folder.join("Cargo.toml"), manifest).unwrap();
    fs::write(folder.join("src/lib.rs"), source).unwrap();
    // The versions that are at hand.
    fs::copy(guest.join("../Cargo.lock"), folder.join("Cargo.lock")).unwrap();
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    cargo
        .current_dir(&folder)
        .args(["check", "--offline", "--target-dir"])
        .arg(root.join(".built"));
    for inherited in
        ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "CARGO_BUILD_TARGET", "CARGO_TARGET_DIR"]
    {
        cargo.env_remove(inherited);
    }
    let output = cargo.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() { Ok(()) } else { Err(said) }
}

#[test]
fn a_user_of_secret_memory_builds_with_the_feature_only() {
    assert_eq!(check("secret-with", SECRET, "\"unmapped\""), Ok(()));
    let said = check("secret-without", SECRET, "").unwrap_err();
    assert!(said.contains("unresolved import `lacuna_guest::secret`"), "{said}");
    // Without its imports the request itself is what is missing.
    let request = "pub fn ask<P: lacuna_guest::platform::Platform>(\n\
                   on: &lacuna_guest::alloc::PageAllocator<'_, P>,\n\
                   request: lacuna_guest::alloc::Request,\n) { let _ = on.alloc_secret(request); }\n";
    assert_eq!(check("request-with", request, "\"unmapped\""), Ok(()));
    let said = check("request-without", request, "").unwrap_err();
    assert!(said.contains("no method named `alloc_secret` found"), "{said}");
    assert_eq!(check("mapped-without", MAPPED, ""), Ok(()), "it is not that nothing builds");
}

#[test]
fn the_assertion_on_owning_types_refuses_copies_and_dereferences() {
    let check = |name: &str, item: &str| {
        let source = format!("{ASSERT_OWNED}\n{item}\npub fn check() {{ assert_owned!(Owner) }}\n");
        check(name, &source, "")
    };
    assert_eq!(check("owned", "pub struct Owner(pub u8);"), Ok(()));
    for (name, item) in [
        ("cloned", "#[derive(Clone)] pub struct Owner(pub u8);"),
        ("copied", "#[derive(Clone, Copy)] pub struct Owner(pub u8);"),
        (
            "dereferenced",
            "pub struct Owner(pub u8);\nimpl core::ops::Deref for Owner { type Target = u8; \
             fn deref(&self) -> &u8 { &self.0 } }",
        ),
    ] {
        let said = check(name, item).unwrap_err();
        assert!(said.contains("type annotations needed"), "{name}: {said}");
    }
}

#[test]
fn the_assertion_on_guards_refuses_what_can_be_sent_or_shared() {
    let check = |name: &str, item: &str| {
        let source = format!("{ASSERT_OWNED}\n{item}\npub fn check() {{ assert_stays!(Guard) }}\n");
        check(name, &source, "")
    };
    let of = |field: &str| format!("pub struct Guard(pub core::marker::PhantomData<{field}>);");
    assert_eq!(check("stays", &of("*const ()")), Ok(()));
    for (name, field) in [("plain", "u8"), ("sent", "core::cell::Cell<u8>")] {
        let said = check(name, &of(field)).unwrap_err();
        assert!(said.contains("type annotations needed"), "{name}: {said}");
    }
}
