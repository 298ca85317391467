//! `cargo xtask ci`: what a change has to pass.

use crate::step::{Result, captured, cargo, shown, timed};
use crate::suite::Suite;

/// Format, lints, licences, tests with the fuzz smoke run.
pub fn run() -> Result<()> {
    timed("format", || shown(&mut cargo(&["fmt", "--all", "--check"])))?;
    timed("lints", || {
        let lints = ["clippy", "--workspace", "--all-targets", "-q", "--", "-D", "warnings"];
        shown(&mut cargo(&lints))
    })?;
    if captured(&mut cargo(&["deny", "--version"])).is_ok() {
        timed("licences and bans", || {
            shown(&mut cargo(&["deny", "--offline", "check", "bans", "licenses", "sources"]))
        })?;
    } else {
        eprintln!("xtask: cargo-deny is not installed: licences and bans were NOT checked");
    }
    Suite::default_run().run()
}
