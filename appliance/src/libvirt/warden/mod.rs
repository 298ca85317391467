//! The warden: a small process that keeps a domain's guest safe while a run is under way.
//!
//! It is told what is about to be done (a freeze, a backup job) before it is done. When the worker
//! dies, or stalls with replies unread, or scratch runs out, the warden ends it: connections first,
//! then the freeze, then the job. It reads no data and opens no file of a guest; it asks `virsh`.

mod client;
mod process;
mod watch;

pub use client::WardenClient;
pub use process::run;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The hidden subcommand's name.
pub const SUBCOMMAND: &str = "__warden";

/// What the worker tells its warden, a line of JSON each.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Order {
    /// Which domain it is about; comes first.
    Domain { uri: String, uuid: String },
    /// The guest is about to be frozen, for no longer than this.
    Freezing { limit_ms: u64 },
    /// It is thawed.
    Thawed,
    /// A backup job is about to begin.
    Job(JobWatch),
    /// It has ended.
    Ended,
    /// The worker lives: changes whenever a data thread wakes.
    Pulse(u64),
}

/// What is watched of a backup job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct JobWatch {
    /// Where it serves: it tells the job from those of others.
    socket: PathBuf,
    /// Its directory, removed when the job is gone.
    dir: PathBuf,
    scratch: Vec<PathBuf>,
    /// The job is ended when the scratch files take so much in all.
    limit_bytes: u64,
    /// The job is ended when their file system has less than this free.
    reserve_bytes: u64,
}

/// What the warden tells the worker: it has ended the job, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Ended {
    why: String,
}
