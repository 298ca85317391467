//! Job records: what a run is, was, and why it failed.

use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::durable::show_file;
use super::{State, replace_file};
use crate::failure::{Failure, Outcome};

/// Records of ended jobs that are kept; older ones are removed as new ones end.
const RECORDS_KEPT_MAX: usize = 1000;

/// A job's id: sortable by time, its last eight digits name what the run makes in QEMU.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct JobId(String);

impl JobId {
    /// A new id from the present second and 32 random bits.
    pub fn new(now: Timestamp) -> Outcome<Self> {
        let mut random = [0u8; 4];
        getrandom::fill(&mut random).map_err(|e| Failure::failed("draw a job id", e))?;
        let time = now.strftime("%Y%m%d%H%M%S");
        Ok(Self(format!("{time}-{:08x}", u32::from_be_bytes(random))))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The eight hexadecimal digits that mark the run's objects in QEMU.
    pub fn run(&self) -> &str {
        self.0.rsplit('-').next().unwrap_or_default()
    }
}

impl std::fmt::Display for JobId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// What kind of run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum JobKind {
    Backup,
    Restore,
    Rollback,
}

/// Where a run stands; the words are those of a point's status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum JobStatus {
    /// Before the instant.
    Creating,
    /// The instant is taken and the guest is free again.
    Captured,
    /// A restore or a rollback is under way.
    Restoring,
    /// Done.
    Available,
    /// Failed.
    Error,
}

impl JobStatus {
    /// Whether nothing more will happen.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Available | Self::Error)
    }
}

/// A job record.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct JobRecord {
    pub job: JobId,
    pub kind: JobKind,
    pub vm: Option<String>,
    /// The repository as the user named it.
    pub repository: String,
    /// The repository's own id.
    pub repository_id: Option<String>,
    pub point: Option<String>,
    pub chain: Option<String>,
    pub parent: Option<String>,
    pub label: Option<String>,
    pub description: Option<String>,
    pub status: JobStatus,
    pub started_at: Timestamp,
    pub ended_at: Option<Timestamp>,
    pub failure_reason: Option<String>,
    /// The QMP socket, for recovery.
    pub qmp: Option<PathBuf>,
    /// The guest agent's socket, for recovery.
    pub qga: Option<PathBuf>,
    /// The domain of libvirt that it is about, for recovery.
    #[serde(default)]
    pub libvirt: Option<LibvirtRun>,
    /// Powered-off images or restore targets that the run changes.
    #[serde(default)]
    pub files: Vec<PathBuf>,
    /// Powered-off images that a rollback writes to: from before the first write until all of them
    /// are done. In the record of a run that ended, they are half-written.
    #[serde(default)]
    pub writing: Vec<PathBuf>,
    /// Scratch directory of the run.
    pub scratch: Option<PathBuf>,
}

/// A run on a domain of libvirt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LibvirtRun {
    pub uri: String,
    pub uuid: String,
    /// The guest may be frozen until the instant is taken.
    pub freezes: bool,
    /// It was stopped to be rolled back, and has to run again where nothing was written.
    #[serde(default)]
    pub restart: bool,
}

impl JobRecord {
    /// A record of a run that begins now.
    pub fn new(job: JobId, kind: JobKind, repository: &str, now: Timestamp) -> Self {
        let status = match kind {
            JobKind::Backup => JobStatus::Creating,
            JobKind::Restore | JobKind::Rollback => JobStatus::Restoring,
        };
        Self {
            job,
            kind,
            vm: None,
            repository: repository.to_owned(),
            repository_id: None,
            point: None,
            chain: None,
            parent: None,
            label: None,
            description: None,
            status,
            started_at: now,
            ended_at: None,
            failure_reason: None,
            qmp: None,
            qga: None,
            libvirt: None,
            files: Vec::new(),
            writing: Vec::new(),
            scratch: None,
        }
    }

    /// Writes the record durably.
    pub fn save(&self, state: &State) -> Outcome<()> {
        self.write(state, replace_file)
    }

    /// Writes the record so that it outlives this process, not a power cut.
    pub fn note(&self, state: &State) -> Outcome<()> {
        self.write(state, show_file)
    }

    fn write(
        &self,
        state: &State,
        write: impl FnOnce(&Path, &[u8]) -> std::io::Result<()>,
    ) -> Outcome<()> {
        let path = state.dir("jobs")?.join(format!("{}.json", self.job));
        let tried = format!("write the job record {}", path.display());
        let text = serde_json::to_vec_pretty(self).map_err(|e| Failure::failed(&tried, e))?;
        write(&path, &text).map_err(|e| {
            Failure::failed(tried, e).next("make room there, or name another with --state-dir")
        })
    }

    /// Marks the end and writes the record.
    pub fn end(&mut self, state: &State, now: Timestamp, failure: Option<&Failure>) -> Outcome<()> {
        self.status = if failure.is_some() { JobStatus::Error } else { JobStatus::Available };
        self.failure_reason = failure.map(|f| f.why.clone());
        self.ended_at = Some(now);
        // After a power cut, recovery asks the repository for the point and comes to the same end.
        let recoverable = self.kind == JobKind::Backup && failure.is_none();
        if recoverable { self.note(state) } else { self.save(state) }?;
        forget_old(state)
    }
}

/// All records that can be read, oldest first. A damaged one is named in the log and left.
pub fn all(state: &State) -> Vec<JobRecord> {
    paths(state).iter().filter_map(|path| read(path)).collect()
}

/// The files of all records, oldest first.
fn paths(state: &State) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(state.root().join("jobs")) else { return Vec::new() };
    let paths = entries.flatten().map(|entry| entry.path());
    let mut paths: Vec<_> = paths.filter(|p| p.extension().is_some_and(|e| e == "json")).collect();
    paths.sort();
    paths
}

/// One record; none where a power cut has left an empty file, before the run had done anything.
fn read(path: &Path) -> Option<JobRecord> {
    let bytes = std::fs::read(path).map_err(|e| e.to_string());
    let parsed = bytes.and_then(|bytes| match bytes.as_slice() {
        [] => Ok(None),
        bytes => serde_json::from_slice(bytes).map(Some).map_err(|e| e.to_string()),
    });
    parsed.unwrap_or_else(|why| {
        tracing::warn!(path = %path.display(), why, "job record cannot be read");
        None
    })
}

fn forget_old(state: &State) -> Outcome<()> {
    let paths = paths(state);
    let surplus = paths.len().saturating_sub(RECORDS_KEPT_MAX);
    for path in &paths[..surplus] {
        if read(path).is_some_and(|record| record.status.is_final()) {
            std::fs::remove_file(path)
                .map_err(|e| Failure::failed(format!("remove {}", path.display()), e))?;
        }
    }
    Ok(())
}
