//! Calls `lacuna bench` and reads its JSON.

use super::support::{LACUNA, ensure};
use libtest_mimic::Failed;
use serde_json::Value;
use std::process::Command;

/// The results of a quick bench, which must succeed, on this kind of machine.
pub fn quick(name: &str, machine: &str) -> Result<Value, Failed> {
    let args = ["bench", name, "--machine", machine, "--quick", "--json"];
    let output = Command::new(LACUNA).args(args).output()?;
    ensure(output.status.success(), &String::from_utf8_lossy(&output.stderr))?;
    let results: Value = serde_json::from_slice(&output.stdout)?;
    ensure(results["machine"] == machine, "another machine was measured")?;
    Ok(results)
}
