//! What is done on the next start about runs that ended without a word: killed, or cut off with
//! their host. Decisions are pure functions of `qmp::recover`; here they get their facts.

use std::path::Path;

use icecore_qmp::bitmap::{NamePart, Owner};
use icecore_qmp::guardian::GuardianClient;
use icecore_qmp::recover::{CommitState, Intents, RollbackIntent};
use icecore_repository::PointId;
use jiff::Timestamp;

use crate::capture::qmp::failure;
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::guardian_process;
use crate::points::is_alive;
use crate::state::intents;
use crate::state::jobs::{self, JobKind, JobRecord, JobStatus};
use crate::state::locks::{Lock, LockKey};

/// What became of a dead run.
#[derive(Debug, Clone)]
pub struct Recovered {
    pub job: String,
    pub what: String,
    /// Something of the run is still there.
    pub left: Vec<String>,
}

/// Runs whose process is gone and that were never ended.
pub fn dead_runs(context: &Context) -> Vec<JobRecord> {
    let records = jobs::all(&context.state).into_iter();
    records.filter(|record| !record.status.is_final() && !is_alive(context, record)).collect()
}

/// Deals with every dead run. One that cannot be dealt with now (its QEMU hangs) stays for the next
/// start, and is no reason not to go on with another VM.
pub async fn recover_all(context: &Context) -> Vec<Recovered> {
    let mut all = Vec::new();
    for record in dead_runs(context) {
        let job = record.job.to_string();
        match recover(context, record).await {
            Ok(recovered) => {
                tracing::info!(job, "recovered: {}", recovered.what);
                all.push(recovered);
            }
            Err(why) => {
                tracing::warn!(job, "not recovered yet: {why}");
                let what = "not recovered yet".into();
                all.push(Recovered { job, what, left: vec![why.to_string()] });
            }
        }
    }
    all
}

async fn recover(context: &Context, mut record: JobRecord) -> Outcome<Recovered> {
    let job = record.job.to_string();
    let left = match record.qmp.clone() {
        Some(qmp) => recover_qemu(context, &record, &qmp).await?,
        None => Vec::new(),
    };
    for unfinished in &record.files {
        remove_unfinished(unfinished)?;
    }
    if !left.is_empty() {
        return Ok(Recovered { job, what: "something is left".into(), left });
    }
    remove_scratch(&record);
    let backup = record.kind == JobKind::Backup;
    let committed = backup && commit_state(context, &record) == CommitState::Committed;
    record.status = if committed { JobStatus::Available } else { JobStatus::Error };
    if !committed {
        record.failure_reason = Some(reason(context, &record));
    }
    record.ended_at = Some(Timestamp::now());
    record.save(&context.state)?;
    intents::forget(&context.state, &record.job)?;
    Lock::forget(&context.state, &LockKey::job(&record.job));
    let what = if committed { "its point was committed" } else { "undone" };
    Ok(Recovered { job, what: what.into(), left })
}

/// What the record of a dead run says.
fn reason(context: &Context, record: &JobRecord) -> String {
    let intents = intents::read::<Intents>(&context.state, &record.job).ok().flatten();
    let last = intents.and_then(|mut all| all.pop());
    if last.is_some_and(|last| last.rollback == RollbackIntent::Writing) {
        return "the rollback was cut off after its first write, and the VM stays stopped: run it \
                again to finish it, or roll back to its safety point"
            .into();
    }
    "the run ended without a word: killed, or the host went down".into()
}

/// Undoes what is left in QEMU. A QEMU that is gone has taken everything with it.
async fn recover_qemu(context: &Context, record: &JobRecord, qmp: &Path) -> Outcome<Vec<String>> {
    let tried = format!("recover job {}", record.job);
    let Some(last) =
        intents::read::<Intents>(&context.state, &record.job)?.and_then(|mut all| all.pop())
    else {
        return Ok(Vec::new());
    };
    if std::os::unix::net::UnixStream::connect(qmp).is_err() {
        return Ok(Vec::new());
    }
    // A guardian that is still undoing the run ends first.
    let lock = Lock::wait_for_guardian(&context.state, &LockKey::guardian(qmp), &tried).await?;
    let guardian = guardian_process::start(vec![lock], &tried)?;
    guardian.connect(qmp.to_owned(), record.qga.clone()).await.map_err(|e| failure(&tried, e))?;
    let commit = commit_state(context, record);
    let mut facts = Intents { commit, ..last };
    if commit == CommitState::Committed
        && let Some(first) = facts.disks.first_mut()
    {
        first.old_bitmaps = superseded(&guardian, record, &tried).await?;
    }
    let socket = record.scratch.as_ref().map(|dir| dir.join("nbd.sock"));
    let released = guardian.recover(facts, socket).await.map_err(|e| failure(&tried, e))?;
    Ok(released.left)
}

/// Whether the run's point is in the repository.
fn commit_state(context: &Context, record: &JobRecord) -> CommitState {
    let Some(point) = record.point.as_ref().and_then(|id| id.parse::<PointId>().ok()) else {
        return CommitState::NotCommitted;
    };
    let Ok(repository) = context.open(&record.repository) else {
        return CommitState::Unknown;
    };
    match repository.confirm_point(&point) {
        Ok(Some(_)) => CommitState::Committed,
        Ok(None) => CommitState::NotCommitted,
        Err(_) => CommitState::Unknown,
    }
}

/// Bitmaps of the run's repository on the run's disks that its committed point replaced.
async fn superseded(
    guardian: &GuardianClient,
    record: &JobRecord,
    tried: &str,
) -> Outcome<Vec<String>> {
    let part = |text: &Option<String>| NamePart::new(text.clone().unwrap_or_default());
    let (Ok(repository), Ok(point)) = (part(&record.repository_id), part(&record.point)) else {
        return Ok(Vec::new());
    };
    let inventory = guardian.inspect().await.map_err(|e| failure(tried, e))?.inventory;
    let mut old = Vec::new();
    for disk in &inventory.disks {
        let ours: Vec<_> = disk
            .bitmaps
            .iter()
            .filter_map(|bitmap| match Owner::of(&bitmap.name, &repository) {
                Owner::ThisRepository(name) => Some(name),
                _ => None,
            })
            .collect();
        // A disk that the point does not hold keeps its bitmap.
        if ours.iter().any(|name| name.point == point) {
            old.extend(ours.iter().filter(|n| n.point != point).map(ToString::to_string));
        }
    }
    Ok(old)
}

/// A restore writes beside its target; what it left there is no image.
fn remove_unfinished(path: &Path) -> Outcome<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Failure::failed(format!("remove the unfinished {}", path.display()), e))
        }
        _ => Ok(()),
    }
}

fn remove_scratch(record: &JobRecord) {
    if let Some(scratch) = &record.scratch
        && let Err(e) = std::fs::remove_dir_all(scratch)
        && e.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(path = %scratch.display(), "scratch directory not removed: {e}");
    }
}
