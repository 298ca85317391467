//! `cargo xtask test`: everything, on real QEMU.

use std::time::Duration;

use clap::Args;

use crate::fuzz;
use crate::setup;
use crate::step::{Result, cargo, shown, target, timed};

/// The guests of two tests keep two processors busy.
const TEST_THREADS: &str = "--test-threads=2";

/// Ignored, and no tests: the body of a process that tests start, and the writer of a fixture.
const NO_TESTS: [&str; 2] = ["guardian_body", "write_a_fixture"];

/// See [`sweep`].
const LEFT_OVER_AFTER: Duration = Duration::from_secs(24 * 60 * 60);

/// Run the tests.
#[derive(Args)]
pub struct Suite {
    /// Also the tests that are marked long: the rows on other QEMUs, large disks, fault campaigns
    #[arg(long)]
    long: bool,
    /// Only tests whose name contains this
    filter: Option<String>,
}

impl Suite {
    /// Everything, as in a check before a change lands.
    pub const fn default_run() -> Self {
        Self { long: false, filter: None }
    }

    /// Sets up, builds and tests.
    pub fn run(&self) -> Result<()> {
        setup::run(self.long)?;
        sweep()?;
        // In one go and by the profile of tests: for the command alone cargo would choose other
        // features of what it depends on, and compile all of that twice.
        let all = ["build", "--workspace", "--all-targets", "--profile", "test"];
        timed("icecore and tests", || shown(&mut cargo(&all)))?;
        if self.filter.is_none() {
            fuzz::smoke()?;
        }
        let mut tests = cargo(&["test", "--workspace", "--no-fail-fast"]);
        tests.args(&self.filter).args(["--", TEST_THREADS]);
        if self.long {
            tests.arg("--include-ignored").args(NO_TESTS.map(|name| format!("--skip={name}")));
        }
        // Last, so that a run ends with cargo's own closing lines.
        shown(&mut tests)
    }
}

/// Removes what runs that were killed have left of their folders. Those of a day ago belong to
/// nobody any more; a guest that `demo --keep` left may be younger.
fn sweep() -> Result<()> {
    let entries = std::fs::read_dir(target().join("lab")).into_iter().flatten().flatten();
    for entry in entries {
        let age = entry.metadata()?.modified()?.elapsed().unwrap_or_default();
        if age > LEFT_OVER_AFTER {
            std::fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}
