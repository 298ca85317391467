//! `cargo xtask fuzz-smoke`: every fuzz target over its checked-in inputs, on the stable compiler.

use crate::step::{Result, cargo, cargo_target, shown, timed, workspace_root};

/// Runs the smoke binary of the fuzz package. It is a workspace of its own, but compiles into the
/// same target folder, so that most of it is there already.
pub fn smoke() -> Result<()> {
    let manifest = workspace_root().join("fuzz/Cargo.toml");
    timed("fuzz smoke", || {
        let mut run = cargo(&["run", "-q", "--bin", "smoke", "--manifest-path"]);
        shown(run.arg(manifest).arg("--target-dir").arg(cargo_target()))
    })
}
