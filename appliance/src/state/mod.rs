//! What this host remembers of its runs: job records, locks, intents, scratch directories.
//!
//! ```text
//! STATE/locks/KEY         flock'ed by a run for as long as it lasts; holds its job id
//! STATE/jobs/JOB.json     the job record, replaced whole
//! STATE/jobs/JOB.intents  one JSON line a step, durable before the step is taken
//! STATE/jobs/JOB.progress how far a run is; replaced, never durable
//! STATE/jobs/JOB.log      what a daemon's worker said on stderr
//! STATE/scratch/JOB/      scratch images of a run
//! STATE/half-written/     domains whose rollback has begun to write and not ended
//! STATE/schedule/         which moments of schedules were dealt with
//! STATE/cache/            disposable
//! ```
//!
//! The state directory is no part of a repository: with it lost, every point is still there.

mod durable;
pub mod intents;
pub mod jobs;
pub mod locks;
pub mod marks;
pub mod process;
mod proof;

use std::path::{Path, PathBuf};

pub use durable::{replace_file, sync_parent};
pub use intents::IntentLog;
pub use jobs::{JobId, JobKind, JobRecord, JobState, JobStatus, LibvirtRun};
pub use proof::Proof;

use crate::failure::{Failure, Outcome};

/// The state directory.
#[derive(Debug, Clone)]
pub struct State {
    root: PathBuf,
}

impl State {
    /// Nothing is created until something is to be kept.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// A directory below the root, made with mode 0700 where it is missing.
    pub fn dir(&self, name: &str) -> Outcome<PathBuf> {
        let path = self.root.join(name);
        make_private_dir(&path).map_err(|e| {
            Failure::failed(format!("make the state directory {}", path.display()), e)
                .next("run as a user that may write there, or name another with --state-dir")
        })?;
        Ok(path)
    }

    /// The root, whether it is there or not.
    pub fn root(&self) -> &Path {
        &self.root
    }
}

/// Makes `path` with mode 0700 where it is missing, and its parents with 0711: QEMU, which may run
/// as another user, has to pass through them to its scratch.
pub fn make_private_dir(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        std::fs::DirBuilder::new().recursive(true).mode(0o711).create(parent)?;
    }
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}
