//! What a cargo that is started by another program must not take over from it. The build script, which
//! starts one for the guest images, has this file too.

/// Variables of an outer cargo, clippy or a sanitizer build, which are not meant for the inner one.
pub const INHERITED: [&str; 8] = [
    "RUSTFLAGS",
    "CARGO_BUILD_RUSTFLAGS",
    "CARGO_BUILD_TARGET",
    "CARGO_TARGET_DIR",
    "CARGO_BUILD_TARGET_DIR",
    "RUSTC_WORKSPACE_WRAPPER",
    "CARGO_MAKEFLAGS",
    "MAKEFLAGS",
];
