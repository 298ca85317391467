//! Job records: what a run is, was, and why it failed.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::durable::show_file;
use super::process::Process;
use super::proof::{Proof, forgettable};
use super::{State, replace_file};
use crate::failure::{Failure, Nature, Outcome, Status};
use crate::libvirt::CaptureForm;

/// Records of ended jobs that are kept; older ones are removed as new ones end, but for the latest
/// proof of each repository and VM.
const RECORDS_KEPT_MAX: usize = 1000;
/// A result longer than this is not kept in the record: a thousand of them have to be read at once.
const RESULT_BYTES_MAX: usize = 256 << 10;
/// A record longer than this is not one of ours.
const RECORD_BYTES_MAX: u64 = 1 << 20;
/// What a job leaves beside its record, by the extension of the file.
const SIDE_FILES: [&str; 2] = ["progress", "log"];

/// A job's id: sortable by time, its last eight digits name what the run makes in QEMU.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String, example = "20250131235959-0a1b2c3d")]
pub struct JobId(String);

impl From<JobId> for String {
    fn from(id: JobId) -> Self {
        id.0
    }
}

impl TryFrom<String> for JobId {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl std::str::FromStr for JobId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let lower_hex = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
        match text.split_once('-') {
            Some((time, run))
                if time.len() == 14
                    && time.bytes().all(|b| b.is_ascii_digit())
                    && run.len() == 8
                    && run.bytes().all(lower_hex) =>
            {
                Ok(Self(text.to_owned()))
            }
            _ => Err("a job id is 14 digits, a dash and 8 hexadecimal digits".into()),
        }
    }
}

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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum JobKind {
    Backup,
    Restore,
    Rollback,
    Check,
    Gc,
    Copy,
}

impl JobKind {
    /// The word of the command line and of the API.
    pub fn word(self) -> &'static str {
        match self {
            Self::Backup => "backup",
            Self::Restore => "restore",
            Self::Rollback => "rollback",
            Self::Check => "check",
            Self::Gc => "gc",
            Self::Copy => "copy",
        }
    }
}

/// Where a run stands; those of a backup are the words of its point's status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum JobStatus {
    /// Accepted by a daemon; no process yet.
    Queued,
    /// Before the instant.
    Creating,
    /// The instant is taken and the guest is free again.
    Captured,
    /// A restore or a rollback is under way.
    Restoring,
    /// A check, a gc or a copy is under way.
    Running,
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

/// What an operator asks first: does it wait, run, or how did it end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum JobState {
    Queued,
    Running,
    Succeeded,
    Failed,
    /// Ended on request; what it had begun was undone.
    Cancelled,
    /// Its process or the host died; recovery deals with what it left.
    Interrupted,
}

impl JobState {
    /// The word of the command line and of the API.
    pub fn word(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Interrupted => "interrupted",
        }
    }
}

/// A job record.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
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
    #[schema(value_type = Option<String>)]
    pub qmp: Option<PathBuf>,
    /// The guest agent's socket, for recovery.
    #[schema(value_type = Option<String>)]
    pub qga: Option<PathBuf>,
    /// The domain of libvirt that it is about, for recovery.
    #[serde(default)]
    pub libvirt: Option<LibvirtRun>,
    /// Powered-off images or restore targets that the run changes.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    pub files: Vec<PathBuf>,
    /// Powered-off images that a rollback writes to: from before the first write until all of them
    /// are done. In the record of a run that ended, they are half-written.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    pub writing: Vec<PathBuf>,
    /// Scratch directory of the run.
    #[schema(value_type = Option<String>)]
    pub scratch: Option<PathBuf>,
    /// How it ended, once it has.
    #[serde(default)]
    pub ended: Option<JobState>,
    /// Exit status of its process, as of the command.
    #[serde(default)]
    pub exit_status: Option<u8>,
    /// What to do about the failure.
    #[serde(default)]
    pub next: Option<String>,
    /// The failure may pass: something was busy or did not answer.
    #[serde(default)]
    pub transient: bool,
    /// What the command prints with `--json`.
    #[serde(default)]
    pub result: Option<Value>,
    /// Its process.
    #[serde(default)]
    pub worker: Option<Process>,
    /// What a daemon adds to a run that it was asked for.
    #[serde(default)]
    pub order: Option<Order>,
}

/// A daemon's part of a job record.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Order {
    /// When it was asked for.
    pub queued_at: Timestamp,
    /// The worker's command line, after the global flags.
    pub arguments: Vec<String>,
    /// Who asked: a user id, a token's name, a schedule.
    pub requested_by: String,
    /// Not started before.
    pub not_before: Option<Timestamp>,
    /// The job that failed and is tried again by this one.
    pub retry_of: Option<JobId>,
    /// How many tries of this came before.
    pub retries: u32,
}

/// A run on a domain of libvirt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LibvirtRun {
    pub uri: String,
    pub uuid: String,
    /// The guest may be frozen until the instant is taken.
    pub freezes: bool,
    /// It was stopped to be rolled back, and has to run again where nothing was written.
    #[serde(default)]
    pub restart: bool,
    /// What the run has made in the domain while it ran.
    #[serde(default)]
    pub form: CaptureForm,
}

impl JobRecord {
    /// A record of a run that begins now.
    pub fn new(job: JobId, kind: JobKind, repository: &str, now: Timestamp) -> Self {
        let status = match kind {
            JobKind::Backup => JobStatus::Creating,
            JobKind::Restore | JobKind::Rollback => JobStatus::Restoring,
            JobKind::Check | JobKind::Gc | JobKind::Copy => JobStatus::Running,
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
            ended: None,
            exit_status: None,
            next: None,
            transient: false,
            result: None,
            worker: None,
            order: None,
        }
    }

    /// Where the run stands. `alive` says whether its process holds its lock.
    pub fn state(&self, alive: bool) -> JobState {
        match (self.ended, self.status) {
            (Some(ended), _) => ended,
            (None, JobStatus::Available) => JobState::Succeeded,
            (None, JobStatus::Error) => JobState::Failed,
            (None, JobStatus::Queued) => JobState::Queued,
            (None, _) if alive => JobState::Running,
            (None, _) => JobState::Interrupted,
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

    /// Marks the end and writes the record. A check that found damage has a result and a failure.
    pub fn end(
        &mut self,
        state: &State,
        now: Timestamp,
        result: Option<Value>,
        failure: Option<&Failure>,
    ) -> Outcome<()> {
        self.ended_at = Some(now);
        self.result = result.map(bounded);
        self.status = if failure.is_some() { JobStatus::Error } else { JobStatus::Available };
        self.exit_status = Some(failure.map_or(0, |failure| failure.status as u8));
        self.ended = Some(match failure.map(|failure| failure.status) {
            None => JobState::Succeeded,
            Some(Status::Interrupted) => JobState::Cancelled,
            Some(_) => JobState::Failed,
        });
        if let Some(failure) = failure {
            self.failure_reason = Some(failure.why.clone());
            self.next.clone_from(&failure.next);
            self.transient = failure.nature == Nature::Transient;
        }
        // After a power cut, recovery asks the repository for the point and comes to the same end.
        let recoverable = self.kind == JobKind::Backup && failure.is_none();
        if recoverable { self.note(state) } else { self.save(state) }?;
        forget_progress(state, &self.job);
        forget_old(state)
    }
}

fn bounded(result: Value) -> Value {
    let length = serde_json::to_vec(&result).map_or(0, |text| text.len());
    if length <= RESULT_BYTES_MAX {
        return result;
    }
    serde_json::json!({ LEFT_OUT: format!("its report has {length} bytes and is not kept") })
}

/// Stands alone in place of a result that is too long to be kept.
const LEFT_OUT: &str = "left_out";

/// Why there is no result where one should be.
pub fn left_out(result: &Value) -> Option<&str> {
    result.get(LEFT_OUT)?.as_str()
}

/// The file beside a job's record with this extension.
pub fn side_file(state: &State, job: &JobId, extension: &str) -> PathBuf {
    state.root().join("jobs").join(format!("{job}.{extension}"))
}

/// Removes the progress of a run that has ended: its record says more.
pub fn forget_progress(state: &State, job: &JobId) {
    // What stays is only untidy.
    let _ = std::fs::remove_file(side_file(state, job, "progress"));
}

/// One record; none where there is none.
pub fn one(state: &State, job: &JobId) -> Outcome<Option<JobRecord>> {
    let path = side_file(state, job, "json");
    let tried = format!("read the job record {}", path.display());
    match read(&path) {
        Ok(record) => Ok(record),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Failure::failed(tried, e)),
    }
}

/// None where a power cut has left an empty file, before the run had done anything.
fn read(path: &Path) -> std::io::Result<Option<JobRecord>> {
    if std::fs::metadata(path)?.len() > RECORD_BYTES_MAX {
        return Err(std::io::Error::other("it is far too long"));
    }
    match std::fs::read(path)?.as_slice() {
        [] => Ok(None),
        bytes => Ok(Some(serde_json::from_slice(bytes)?)),
    }
}

/// All records that can be read, oldest first. A damaged one is named in the log and left.
pub fn all(state: &State) -> Vec<JobRecord> {
    paths(state).iter().filter_map(|path| read_or_warn(path)).collect()
}

/// The files of all records, oldest first.
fn paths(state: &State) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(state.root().join("jobs")) else { return Vec::new() };
    let paths = entries.flatten().map(|entry| entry.path());
    let mut paths: Vec<_> = paths.filter(|p| p.extension().is_some_and(|e| e == "json")).collect();
    paths.sort();
    paths
}

fn read_or_warn(path: &Path) -> Option<JobRecord> {
    match read(path) {
        Ok(record) => record,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
        Err(why) => {
            tracing::warn!(path = %path.display(), %why, "job record cannot be read");
            None
        }
    }
}

fn forget_old(state: &State) -> Outcome<()> {
    let paths = paths(state);
    let surplus = paths.len().saturating_sub(RECORDS_KEPT_MAX);
    let (old, newer) = paths.split_at(surplus);
    let is_final = |record: &JobRecord| record.status.is_final();
    let old: Vec<_> = old.iter().filter_map(|path| read_or_warn(path)).filter(is_final).collect();
    // All of them are read only where something may have to be kept for them.
    let later = match old.iter().any(|record| Proof::of(record).is_some()) {
        true => newer.iter().filter_map(|path| Proof::of(&read_or_warn(path)?)).collect(),
        false => BTreeSet::new(),
    };
    for record in forgettable(&old, later) {
        let path = side_file(state, &record.job, "json");
        match std::fs::remove_file(&path) {
            // Another run ended at the same moment.
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(Failure::failed(format!("remove {}", path.display()), e));
            }
            _ => {}
        }
        for extension in SIDE_FILES {
            let _ = std::fs::remove_file(side_file(state, &record.job, extension));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_never_a_path() {
        let id = JobId::new(Timestamp::UNIX_EPOCH).unwrap();
        assert_eq!(id.as_str().parse::<JobId>(), Ok(id.clone()));
        for wrong in ["", "../../etc/passwd", "20250101000000-0a1b2c3", "20250101000000-0A1B2C3D"] {
            assert!(wrong.parse::<JobId>().is_err(), "{wrong}");
        }
        assert!(serde_json::from_str::<JobId>("\"/x\"").is_err());
    }

    #[test]
    fn a_state_follows_from_the_end_the_status_and_the_process() {
        let id = JobId::new(Timestamp::UNIX_EPOCH).unwrap();
        let mut record = JobRecord::new(id, JobKind::Backup, "/r", Timestamp::UNIX_EPOCH);
        assert_eq!(record.state(true), JobState::Running);
        assert_eq!(record.state(false), JobState::Interrupted);
        record.status = JobStatus::Queued;
        assert_eq!(record.state(false), JobState::Queued);
        let dir = tempfile::tempdir().unwrap();
        let state = State::new(dir.path());
        let interrupted = Failure::interrupted("try");
        record.end(&state, Timestamp::UNIX_EPOCH, None, Some(&interrupted)).unwrap();
        let read = one(&state, &record.job).unwrap().unwrap();
        assert_eq!(
            (read.state(false), read.exit_status, read.status),
            (JobState::Cancelled, Some(130), JobStatus::Error)
        );
    }

    #[test]
    fn a_huge_result_is_not_kept() {
        let huge = Value::String("x".repeat(RESULT_BYTES_MAX + 1));
        assert!(bounded(huge)["left_out"].is_string());
        assert_eq!(bounded(Value::from(1)), Value::from(1));
    }
}
