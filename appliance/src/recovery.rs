//! What is done on the next start about runs that ended without a word: killed, or cut off with
//! their host. Decisions are pure functions of `qmp::recover`; here they get their facts.

use std::path::Path;
use std::time::Duration;

use icecore_qmp::bitmap::{NamePart, Owner};
use icecore_qmp::guardian::GuardianClient;
use icecore_qmp::guardian::protocol::ErrorKind;
use icecore_qmp::recover::{CommitState, Intents, RollbackIntent};
use icecore_repository::{OpenOptions, PointId, Repository};
use jiff::Timestamp;

use crate::capture::qmp::failure;
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::guardian_process;
use crate::libvirt::checkpoint::CheckpointName;
use crate::libvirt::{CaptureForm, Domain, Kind, State, Virsh, recover};
use crate::points::is_alive;
use crate::state::LibvirtRun;
use crate::state::intents;
use crate::state::jobs::{self, JobKind, JobRecord, JobState, JobStatus};
use crate::state::locks::{Lock, LockKey};
use crate::target::guard_domain;

/// How long a repository may take to say whether it holds a point.
const REPOSITORY_WAIT: Duration = Duration::from_secs(30);

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
    let begun = records.filter(|record| record.status != JobStatus::Queued);
    begun.filter(|record| !record.status.is_final() && !is_alive(context, record)).collect()
}

/// Deals with every dead run. One that cannot be dealt with now (its QEMU hangs) stays for the next
/// start, and is no reason not to go on with another VM. `own` is the QMP socket of the VM that
/// this command is about: its guardian is waited for, those of others are not.
pub async fn recover_all(context: &Context, own: Option<&Path>) -> Vec<Recovered> {
    let mut all = Vec::new();
    for record in dead_runs(context) {
        let job = record.job.to_string();
        match recover(context, &record, own).await {
            Ok(Some(recovered)) => {
                tracing::info!(job, "recovered: {}", recovered.what);
                all.push(recovered);
            }
            Ok(None) => {}
            Err(why) => {
                tracing::warn!(job, "not recovered yet: {why}");
                let what = "not recovered yet".into();
                all.push(Recovered { job, what, left: vec![why.to_string()] });
            }
        }
    }
    all
}

/// Deals with one run; `None` when somebody else does.
async fn recover(
    context: &Context,
    found: &JobRecord,
    own: Option<&Path>,
) -> Outcome<Option<Recovered>> {
    let tried = format!("recover job {}", found.job);
    let Ok(_lock) = Lock::take(&context.state, &LockKey::job(&found.job), &found.job, &tried)
    else {
        return Ok(None);
    };
    // Whoever held the lock may have dealt with it.
    let now = jobs::all(&context.state).into_iter().find(|record| record.job == found.job);
    let Some(mut record) = now.filter(|record| !record.status.is_final()) else { return Ok(None) };
    let job = record.job.to_string();
    let writing = !record.writing.is_empty() || was_writing(context, &record);
    let left = match (record.qmp.clone(), record.libvirt.clone()) {
        (Some(qmp), _) => recover_qemu(context, &record, &qmp, own, &tried).await?,
        (None, Some(run)) if run.form == CaptureForm::Direct => {
            recover_direct(context, &record, &run, &tried).await?
        }
        (None, Some(run)) => {
            recover_libvirt(context, &record, &run, writing, &tried).await?;
            Vec::new()
        }
        (None, None) => Vec::new(),
    };
    if !left.is_empty() {
        return Ok(Some(Recovered { job, what: "something is left".into(), left }));
    }
    for unfinished in &record.files {
        remove_unfinished(unfinished)?;
    }
    remove_directories(context, &record);
    let backup = record.kind == JobKind::Backup;
    let committed = backup && commit_state(context, &record).await == CommitState::Committed;
    record.status = if committed { JobStatus::Available } else { JobStatus::Error };
    record.ended = Some(if committed { JobState::Succeeded } else { JobState::Interrupted });
    record.failure_reason = if committed { None } else { Some(reason(writing)) };
    record.ended_at = Some(Timestamp::now());
    record.save(&context.state)?;
    jobs::forget_progress(&context.state, &record.job);
    intents::forget(&context.state, &record.job)?;
    Lock::forget(&context.state, &LockKey::job(&record.job));
    let what = match (committed, writing) {
        (true, _) => "its point was committed",
        (_, true) => "half-written: run the rollback again",
        _ => "undone",
    };
    let left = if writing { vec![reason(true)] } else { Vec::new() };
    Ok(Some(Recovered { job, what: what.into(), left }))
}

/// Whether the run was a rollback that had begun to write.
fn was_writing(context: &Context, record: &JobRecord) -> bool {
    let intents = intents::read::<Intents>(&context.state, &record.job).ok().flatten();
    let last = intents.and_then(|mut all| all.pop());
    last.is_some_and(|last| last.rollback == RollbackIntent::Writing)
}

/// What the record of a dead run says.
fn reason(writing: bool) -> String {
    if writing {
        "the rollback was cut off after its first write: do not start the VM; run the rollback again \
         to finish it, or roll back to its safety point"
            .into()
    } else {
        "the run ended without a word: killed, or the host went down".into()
    }
}

/// Undoes what is left in QEMU, at once; what becomes of the bitmaps is asked of the repository
/// afterwards. A QEMU that is gone has taken everything with it.
async fn recover_qemu(
    context: &Context,
    record: &JobRecord,
    qmp: &Path,
    own: Option<&Path>,
    tried: &str,
) -> Outcome<Vec<String>> {
    let recorded = intents::read::<Intents>(&context.state, &record.job)?;
    let Some(last) = recorded.and_then(|mut all| all.pop()) else { return Ok(Vec::new()) };
    // A guardian that is still undoing the run ends first.
    let key = LockKey::guardian(qmp);
    let is_own = own.is_some_and(|own| LockKey::guardian(own) == key);
    let lock = match is_own {
        true => Lock::wait_for_guardian(&context.state, &key, tried).await?,
        false => Lock::take(&context.state, &key, &record.job, tried)?,
    };
    let guardian = guardian_process::start(vec![lock], tried)?;
    match guardian.connect(qmp.to_owned(), record.qga.clone()).await {
        Err(error) if error.kind == ErrorKind::Unreachable => return Ok(Vec::new()),
        other => drop(other.map_err(|e| failure(tried, e))?),
    }
    undo(context, record, &guardian, last, tried).await
}

/// The same for a domain whose monitor libvirt holds.
async fn recover_direct(
    context: &Context,
    record: &JobRecord,
    run: &LibvirtRun,
    tried: &str,
) -> Outcome<Vec<String>> {
    let recorded = intents::read::<Intents>(&context.state, &record.job)?;
    let Some(last) = recorded.and_then(|mut all| all.pop()) else { return Ok(Vec::new()) };
    let virsh = Virsh::new(&run.uri)?;
    let domain = Domain { virsh, name: run.uuid.clone(), uuid: run.uuid.clone() };
    match domain.state() {
        Ok(State::ShutOff) => return Ok(Vec::new()),
        Err(e) if e.kind == Kind::NoDomain => return Ok(Vec::new()),
        other => drop(other.map_err(|e| e.failure(tried))?),
    }
    let guardian = guard_domain(context, &domain, run.freezes, tried).await?;
    undo(context, record, &guardian, last, tried).await
}

/// Undoes a run in the QEMU that `guardian` is connected to.
async fn undo(
    context: &Context,
    record: &JobRecord,
    guardian: &GuardianClient,
    last: Intents,
    tried: &str,
) -> Outcome<Vec<String>> {
    let socket = record.scratch.as_ref().map(|dir| dir.join("nbd.sock"));
    let first = Intents { commit: CommitState::Unknown, ..last.clone() };
    let undone = guardian.recover(first, socket.clone()).await.map_err(|e| failure(tried, e))?;
    if !undone.left.is_empty() {
        return Ok(undone.left);
    }
    let commit = commit_state(context, record).await;
    let mut facts = Intents { commit, disks: last.disks, ..Intents::unknown(last.run) };
    if commit == CommitState::Committed
        && let Some(first) = facts.disks.first_mut()
    {
        first.old_bitmaps = superseded(guardian, record, tried).await?;
    }
    let released = guardian.recover(facts, socket).await.map_err(|e| failure(tried, e))?;
    Ok(released.left)
}

/// Undoes what is left in libvirt: a guest that may be frozen, a job, checkpoints, a domain that was
/// stopped for nothing.
async fn recover_libvirt(
    context: &Context,
    record: &JobRecord,
    run: &LibvirtRun,
    writing: bool,
    tried: &str,
) -> Outcome<()> {
    // A warden that is still undoing the run ends first.
    let key = LockKey::warden(&run.uuid);
    let _lock = Lock::wait_for_guardian(&context.state, &key, tried).await?;
    let virsh = Virsh::new(&run.uri)?;
    let domain = Domain { virsh, name: run.uuid.clone(), uuid: run.uuid.clone() };
    let socket = record.scratch.clone().unwrap_or_default().join("nbd.sock");
    let Some(observed) = recover::observe(&domain, &socket, tried)? else { return Ok(()) };
    let facts = recover::Facts {
        froze: run.freezes && record.status == JobStatus::Creating,
        restart: run.restart && !writing,
        commit: match commit_state(context, record).await {
            CommitState::Committed => recover::Commit::Committed,
            CommitState::NotCommitted => recover::Commit::NotCommitted,
            CommitState::Unknown => recover::Commit::Unknown,
        },
        checkpoint: checkpoint_of(record),
    };
    for effect in recover::effects(&facts, &observed) {
        recover::carry_out(&domain, &effect, &socket).map_err(|e| e.failure(tried))?;
    }
    Ok(())
}

fn checkpoint_of(record: &JobRecord) -> Option<CheckpointName> {
    let part = |text: &Option<String>| NamePart::new(text.clone()?).ok();
    let (repository, chain) = (part(&record.repository_id)?, part(&record.chain)?);
    Some(CheckpointName { repository, chain, point: part(&record.point)? })
}

/// Whether the run's point is in the repository. One that does not answer decides nothing.
async fn commit_state(context: &Context, record: &JobRecord) -> CommitState {
    let Some(point) = record.point.as_ref().and_then(|id| id.parse::<PointId>().ok()) else {
        return CommitState::NotCommitted;
    };
    let Ok(address) = context.repository_address(&record.repository) else {
        return CommitState::Unknown;
    };
    let Ok(keys) = context.keys(&address) else { return CommitState::Unknown };
    let (wanted, is_sealed) =
        (record.repository_id.clone(), context.key_file_of(&address).is_some());
    let asked = tokio::task::spawn_blocking(move || {
        let options = OpenOptions { keys, ..OpenOptions::default() };
        let repository = Repository::open_at(&address, options).ok()?;
        // Another repository at the same place knows nothing of this point.
        if (is_sealed && !repository.is_encrypted())
            || wanted.is_some_and(|id| id != repository.id().to_string())
        {
            return None;
        }
        repository.confirm_point(&point).ok()
    });
    match tokio::time::timeout(REPOSITORY_WAIT, asked).await {
        Ok(Ok(Some(Some(_)))) => CommitState::Committed,
        Ok(Ok(Some(None))) => CommitState::NotCommitted,
        _ => CommitState::Unknown,
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

/// The run's scratch directory, and the one of its sockets.
fn remove_directories(context: &Context, record: &JobRecord) {
    let sockets = context.state.root().join("run").join(record.job.run());
    let own = [record.scratch.clone(), Some(sockets)];
    for directory in own.iter().flatten() {
        if let Err(e) = std::fs::remove_dir_all(directory)
            && e.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(path = %directory.display(), "not removed: {e}");
        }
    }
}
