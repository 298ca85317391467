//! `cargo xtask fuzz-smoke`: every fuzz target over its checked-in inputs, on the stable compiler.

use crate::step::{Result, cargo, shown, timed, workspace_root};

/// Runs the smoke binary of the fuzz package, which has a lock file and a target folder of its own.
pub fn smoke() -> Result<()> {
    let manifest = workspace_root().join("fuzz/Cargo.toml");
    timed("fuzz smoke", || {
        let mut run = cargo(&["run", "-q", "--release", "--bin", "smoke", "--manifest-path"]);
        shown(run.arg(manifest))
    })
}
