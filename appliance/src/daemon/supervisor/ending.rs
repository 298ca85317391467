//! A job from the start of its worker to what follows from its end.

use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use super::Supervisor;
use crate::daemon::settings::Settings;
use crate::daemon::{retry, schedule, worker};
use crate::failure::Failure;
use crate::recovery;
use crate::state::jobs::{self, Order};
use crate::state::locks::{Lock, LockKey, is_free};
use crate::state::{JobId, JobRecord, JobState, JobStatus};

/// How often an adopted job is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);

impl Supervisor {
    /// Runs a job that may begin.
    pub(super) async fn work(self: Arc<Self>, job: JobId) {
        let settings = self.settings();
        let state = &settings.context.state;
        // Somebody may have cancelled it in the state directory.
        let record = jobs::one(state, &job).ok().flatten();
        let Some(record) = record.filter(|record| record.status == JobStatus::Queued) else {
            return self.forget(&job);
        };
        let arguments = record.order.map(|order| order.arguments).unwrap_or_default();
        let started = worker::start(&self.global, &settings.copy, state, &job, &arguments);
        let status = match started {
            Ok(mut child) => child.wait().await.map_or_else(|e| e.to_string(), |s| s.to_string()),
            Err(failure) => failure.to_string(),
        };
        self.settle(&job, Some(&status)).await;
    }

    /// Waits until nobody works on the job any more, and puts its record in order.
    pub(super) async fn settle(self: &Arc<Self>, job: &JobId, status: Option<&str>) {
        let settings = self.settings();
        let state = &settings.context.state;
        while !is_free(state, &LockKey::job(job)) {
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
        let record = jobs::one(state, job).ok().flatten();
        match record {
            Some(record) if record.status.is_final() => {}
            Some(record) if record.status == JobStatus::Queued => {
                end_unbegun(&settings, record, status.unwrap_or("unknown"));
            }
            // It died; its VM is dealt with before the next job may begin on it.
            Some(record) => {
                recovery::recover_all(&settings.context, record.qmp.as_deref()).await;
            }
            None => {}
        }
        let record = jobs::one(state, job).ok().flatten();
        // The next job of the VM may begin; what follows from this one takes its time.
        self.forget(job);
        if let Some(record) = record {
            self.metrics.ended(&record);
            if record.state(false) == JobState::Interrupted {
                tell_of_death(self, &record);
            }
            schedule::after(self, &record).await;
            self.try_again(record);
        }
    }

    fn forget(&self, job: &JobId) {
        self.lock().running.remove(job);
        self.wake.notify_one();
    }

    fn try_again(&self, failed: JobRecord) {
        let (Some(pause), Some(order)) = (retry::pause(&failed), failed.order.clone()) else {
            return;
        };
        let now = Timestamp::now();
        let pause = SignedDuration::try_from(pause).unwrap_or_default();
        let again = Order {
            queued_at: now,
            not_before: now.checked_add(pause).ok(),
            retry_of: Some(failed.job.clone()),
            retries: order.retries + 1,
            ..order
        };
        let queued = self.record(failed.kind, &failed.repository, again).and_then(|mut record| {
            (record.vm, record.label) = (failed.vm, failed.label);
            self.queue_durably(record)
        });
        match queued {
            Ok(record) => tracing::info!(job = %record.job, of = %failed.job, "tried again later"),
            Err(failure) => tracing::warn!(job = %failed.job, "not tried again: {failure}"),
        }
    }
}

/// A worker tells of its own failures, but not of its death.
fn tell_of_death(supervisor: &Supervisor, record: &JobRecord) {
    let why = record.failure_reason.clone().unwrap_or_else(|| "its process died".into());
    let failure = Failure::failed(format!("end job {}", record.job), why)
        .next("see 'icecore doctor' for what it left");
    schedule::tell(supervisor, failure, record.vm.clone());
}

/// A worker that ends before it begins its job says why in its log.
fn end_unbegun(settings: &Settings, mut record: JobRecord, status: &str) {
    let state = &settings.context.state;
    let log = jobs::side_file(state, &record.job, "log");
    let why = format!("its worker ended before it began: {status}");
    let failure = Failure::failed(format!("run job {}", record.job), why)
        .next(format!("see {}", log.display()));
    let ended = Lock::take(state, &LockKey::job(&record.job), &record.job, "end the job")
        .and_then(|_lock| record.end(state, Timestamp::now(), None, Some(&failure)));
    if let Err(also) = ended {
        tracing::warn!(job = %record.job, "the job record was not written: {also}");
    }
    Lock::forget(state, &LockKey::job(&record.job));
}
