//! `cargo xtask test`: everything, on real QEMU.

use clap::Args;

use crate::fuzz;
use crate::setup;
use crate::step::{Result, cargo, shown, timed};

/// The guests of two tests keep two processors busy.
const TEST_THREADS: &str = "--test-threads=2";

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
        // By the profile of tests, so that nothing is compiled twice.
        timed("icecore", || shown(&mut cargo(&["build", "--profile", "test", "-p", "icecore"])))?;
        timed("tests (build)", || shown(&mut cargo(&["test", "--workspace", "--no-run", "-q"])))?;
        if self.filter.is_none() {
            fuzz::smoke()?;
        }
        let mut tests = cargo(&["test", "--workspace", "--no-fail-fast"]);
        tests.args(&self.filter).args(["--", TEST_THREADS]);
        if self.long {
            tests.arg("--include-ignored");
        }
        // Last, so that a run ends with cargo's own closing lines.
        shown(&mut tests)
    }
}
