//! A job as users see it: its record, where it stands, how far it is; following and ending it.
//! Works on the state directory alone, whether a daemon runs or not.

use std::time::Duration;

use jiff::Timestamp;
use rustix::process::Signal;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::failure::{Failure, Outcome};
use crate::progress::{self, Snapshot};
use crate::state::jobs::{self, JobId, JobRecord, JobState};
use crate::state::locks::{Lock, LockKey, is_free};
use crate::state::{JobStatus, State};

/// How often a job that is followed is looked at.
pub const LOOK_INTERVAL: Duration = Duration::from_millis(250);

/// A job.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct JobView {
    #[serde(flatten)]
    pub record: JobRecord,
    /// Where it stands.
    pub state: JobState,
    /// How far it is, while it moves data.
    pub progress: Option<Snapshot>,
}

impl JobView {
    /// The view of a record.
    pub fn of(state: &State, mut record: JobRecord) -> Self {
        let alive = || !is_free(state, &LockKey::job(&record.job));
        let open = !record.status.is_final();
        let standing = record.state(open && alive());
        let progress = match standing {
            JobState::Running => progress::of_job(state, &record.job),
            _ => None,
        };
        if standing == JobState::Interrupted && record.failure_reason.is_none() {
            let why = "its process is gone; the next start of any command undoes what it left";
            record.failure_reason = Some(why.into());
        }
        Self { record, state: standing, progress }
    }

    /// Whether nothing more will happen to it by itself.
    pub fn is_over(&self) -> bool {
        !matches!(self.state, JobState::Queued | JobState::Running)
    }

    /// The exit status of a command that waited for it.
    pub fn exit_status(&self) -> u8 {
        self.record.exit_status.unwrap_or(1)
    }
}

/// One job of this host.
pub fn find(state: &State, job: &str, tried: &str) -> Outcome<JobView> {
    let none =
        || Failure::missing(tried, "this host has no such job").next("see 'icecore job list'");
    let id: JobId = job.parse().map_err(|_| none())?;
    jobs::one(state, &id)?.map(|record| JobView::of(state, record)).ok_or_else(none)
}

/// All jobs of this host, newest first.
pub fn all(state: &State) -> Vec<JobView> {
    let records = jobs::all(state).into_iter().rev();
    records.map(|record| JobView::of(state, record)).collect()
}

/// How a job is made to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cancel {
    /// It undoes what it began.
    Ask,
    /// It dies; the next start of any command undoes what it left.
    Kill,
}

/// Asks a job to end; it may still be undoing what it began when this returns.
pub fn cancel(state: &State, view: &JobView, how: Cancel) -> Outcome<()> {
    let job = &view.record.job;
    let tried = format!("cancel job {job}");
    match view.state {
        JobState::Queued => cancel_queued(state, job, &tried),
        JobState::Running => {
            let Some(worker) = view.record.worker else {
                return Err(Failure::refused(tried, "its record does not tell its process"));
            };
            let signal = if how == Cancel::Kill { Signal::KILL } else { Signal::INT };
            match worker.signal(signal) {
                // It has just ended by itself.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
                other => other.map_err(|e| Failure::failed(tried, e)),
            }
        }
        JobState::Interrupted => Err(Failure::refused(tried, "its process is gone already")
            .next("see 'icecore doctor' for what it left")),
        ended => Err(Failure::refused(tried, format!("it has ended: {}", ended.word()))),
    }
}

/// The lock tells whether its worker has begun in the meantime.
fn cancel_queued(state: &State, job: &JobId, tried: &str) -> Outcome<()> {
    let _lock = Lock::take(state, &LockKey::job(job), job, tried)?;
    if let Some(mut record) = jobs::one(state, job)?
        && record.status == JobStatus::Queued
    {
        let mut failure = Failure::interrupted(tried);
        failure.why = "cancelled before it began".into();
        record.end(state, Timestamp::now(), None, Some(&failure))?;
    }
    Lock::forget(state, &LockKey::job(job));
    Ok(())
}

/// Waits for the end of a job; `seen` is called at each look.
pub async fn follow(
    state: &State,
    job: &JobId,
    tried: &str,
    mut seen: impl FnMut(&JobView) -> Outcome<()>,
) -> Outcome<JobView> {
    loop {
        let view = find(state, job.as_str(), tried)?;
        seen(&view)?;
        if view.is_over() {
            return Ok(view);
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}
