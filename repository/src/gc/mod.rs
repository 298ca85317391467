//! gc: deletes what no point reaches, beside writers at work on any host.
//!
//! It never reads a clock that others must agree with, and never deletes a pack of which one block
//! is alive. `plan` decides, `driver` does; `docs/FORMAT.md`, section "Concurrency", has the argument.

mod driver;
mod plan;
#[cfg(test)]
mod simulator;

use std::time::Duration;

pub(crate) use driver::{Collector, Contents, ManifestFacts};
pub use driver::{Pace, RealPace};

/// A heartbeat comes every ten seconds; six missed ones are no hiccup of the store.
pub const PATIENCE_DEFAULT: Duration = Duration::from_secs(60);
/// Long enough for an ordinary incremental to end, short enough for a command that someone watches.
pub const WAIT_MAX_DEFAULT: Duration = Duration::from_secs(600);

/// How a gc is to be run.
#[derive(Debug, Clone)]
pub struct GcOptions {
    /// Only tell what is unreachable now.
    pub dry_run: bool,
    /// A writer whose counter stands still for so long is given up.
    pub patience: Duration,
    /// How long to wait for living writers before giving up (nothing is deleted then).
    pub wait_max: Duration,
}

impl Default for GcOptions {
    fn default() -> Self {
        Self { dry_run: false, patience: PATIENCE_DEFAULT, wait_max: WAIT_MAX_DEFAULT }
    }
}

/// What a gc did, or with `dry_run` would do if nobody wrote meanwhile.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct GcReport {
    /// Deleted or disowned points of which the last rest was removed.
    pub points_removed: u64,
    /// Packs deleted.
    pub packs_deleted: u64,
    /// Map runs deleted.
    pub runs_deleted: u64,
    /// Bytes of these packs and runs.
    pub bytes_freed: u64,
    /// Dead writers given up.
    pub writers_revoked: u64,
    /// Receipts written for committed points whose writers died before they wrote them.
    pub receipts_completed: u64,
    /// Unfinished objects removed.
    pub leftovers_removed: u64,
}
