//! A run: its record, its locks, and their end.

use jiff::Timestamp;
use serde::Serialize;
use serde_json::Value;

use crate::context::Context;
use crate::data::Activity;
use crate::failure::{Failure, Outcome};
use crate::state::jobs::Order;
use crate::state::locks::{Lock, LockKey};
use crate::state::process::Process;
use crate::state::{JobId, JobKind, JobRecord, JobStatus, intents, jobs};

/// A run under way. Its record tells others of it; its locks keep others away.
#[derive(Debug)]
pub struct Job {
    pub record: JobRecord,
    activity: Activity,
    locks: Vec<Lock>,
    _own: Lock,
}

impl Job {
    /// Begins a run that holds `keys` for as long as it lasts.
    pub fn begin(
        context: &Context,
        kind: JobKind,
        repository: &str,
        keys: &[LockKey],
        tried: &str,
    ) -> Outcome<Self> {
        let now = Timestamp::now();
        let id = match &context.assigned {
            Some(assigned) => assigned.clone(),
            None => JobId::new(now)?,
        };
        let take = |key: &LockKey| Lock::take(&context.state, key, &id, tried);
        let locks = keys.iter().map(take).collect::<Outcome<Vec<_>>>()?;
        let own = take(&LockKey::job(&id))?;
        let mut record = JobRecord::new(id, kind, repository, now);
        if context.assigned.is_some() {
            record.order = order_of(context, &record.job, tried)?;
        }
        record.worker = Process::this();
        context.board.follow(&context.state, &record.job);
        Ok(Self { record, activity: Activity::default(), locks, _own: own })
    }

    /// The job's id.
    pub fn id(&self) -> &JobId {
        &self.record.job
    }

    /// What the data plane of this run is doing.
    pub fn activity(&self) -> Activity {
        self.activity.clone()
    }

    /// Lets others see the record. Nothing was done yet that a power cut would leave behind.
    pub fn note(&self, context: &Context) -> Outcome<()> {
        self.record.note(&context.state)
    }

    /// Writes the record durably.
    pub fn save(&self, context: &Context) -> Outcome<()> {
        self.record.save(&context.state)
    }

    /// Changes the status and writes the record beside; to be waited for before it is written again.
    pub fn note_status(
        &mut self,
        context: &Context,
        status: JobStatus,
    ) -> tokio::task::JoinHandle<Outcome<()>> {
        self.record.status = status;
        let (record, state) = (self.record.clone(), context.state.clone());
        tokio::task::spawn_blocking(move || record.save(&state))
    }

    /// Ends the run with its outcome. A record that cannot be written any more does not hide it.
    /// A run of which something may be left stays unfinished: the next start deals with it.
    pub fn end<T: Serialize>(self, context: &Context, outcome: Outcome<T>) -> Outcome<T> {
        if outcome.as_ref().is_err_and(|failure| failure.unclean) {
            return outcome;
        }
        let result = outcome.as_ref().ok().and_then(|report| serde_json::to_value(report).ok());
        self.finish(context, result, outcome.as_ref().err());
        outcome
    }

    /// Ends a run whose report says that it failed.
    pub fn end_damaged(self, context: &Context, report: &impl Serialize, failure: &Failure) {
        self.finish(context, serde_json::to_value(report).ok(), Some(failure));
    }

    fn finish(mut self, context: &Context, result: Option<Value>, failure: Option<&Failure>) {
        context.board.close();
        // Whoever sees that the run has ended may begin the next one.
        self.locks.clear();
        if let Err(also) = self.record.end(&context.state, Timestamp::now(), result, failure) {
            tracing::warn!("the job record was not written: {also}");
        }
        if let Err(also) = intents::forget(&context.state, &self.record.job) {
            tracing::warn!("{also}");
        }
        Lock::forget(&context.state, &LockKey::job(&self.record.job));
    }
}

/// The daemon's part of the record of a job that begins. The job's lock is held: from here on
/// nobody cancels it any more but through its process.
fn order_of(context: &Context, job: &JobId, tried: &str) -> Outcome<Option<Order>> {
    match jobs::one(&context.state, job)? {
        Some(queued) if queued.status == JobStatus::Queued => Ok(queued.order),
        _ => Err(Failure::refused(tried, format!("job {job} does not wait to be begun"))),
    }
}

/// Ends the record of the job that a daemon has started this process for, where the process failed
/// before it had begun the job: nobody else knows why.
pub fn end_assigned(context: &Context, failure: &Failure) {
    let Some(id) = &context.assigned else { return };
    let lock = Lock::take(&context.state, &LockKey::job(id), id, "end the job");
    // Whoever holds the lock is at work on this job and writes its record.
    let Ok(_lock) = lock else { return };
    let Ok(Some(mut record)) = jobs::one(&context.state, id) else { return };
    if record.status != JobStatus::Queued {
        return;
    }
    if let Err(also) = record.end(&context.state, Timestamp::now(), None, Some(failure)) {
        tracing::warn!("the job record was not written: {also}");
    }
    Lock::forget(&context.state, &LockKey::job(id));
}
