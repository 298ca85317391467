//! A run: its record, its locks, and their end.

use jiff::Timestamp;

use crate::context::Context;
use crate::data::Activity;
use crate::failure::{Failure, Outcome};
use crate::state::intents;
use crate::state::locks::{Lock, LockKey};
use crate::state::{JobId, JobKind, JobRecord, JobStatus};

/// A run under way. Its record tells others of it; its locks keep others away.
#[derive(Debug)]
pub struct Job {
    pub record: JobRecord,
    activity: Activity,
    _locks: Vec<Lock>,
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
        let id = JobId::new(now)?;
        let own = LockKey::job(&id);
        let mut locks = Vec::with_capacity(keys.len() + 1);
        for key in keys.iter().chain([&own]) {
            locks.push(Lock::take(&context.state, key, &id, tried)?);
        }
        let record = JobRecord::new(id, kind, repository, now);
        Ok(Self { record, activity: Activity::default(), _locks: locks })
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
    pub fn end<T>(mut self, context: &Context, outcome: Outcome<T>) -> Outcome<T> {
        if outcome.as_ref().is_err_and(|failure| failure.unclean) {
            return outcome;
        }
        let failure: Option<&Failure> = outcome.as_ref().err();
        if let Err(also) = self.record.end(&context.state, Timestamp::now(), failure) {
            tracing::warn!("the job record was not written: {also}");
        }
        if let Err(also) = intents::forget(&context.state, &self.record.job) {
            tracing::warn!("{also}");
        }
        Lock::forget(&context.state, &LockKey::job(&self.record.job));
        outcome
    }
}
