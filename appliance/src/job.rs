//! A run: its record, its locks, and their end.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use jiff::Timestamp;

use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::state::intents;
use crate::state::locks::{Lock, LockKey};
use crate::state::{JobId, JobKind, JobRecord, JobStatus};

/// A run under way. Its record tells others of it; its locks keep others away.
#[derive(Debug)]
pub struct Job {
    pub record: JobRecord,
    pulse: Arc<AtomicU64>,
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
        Ok(Self { record, pulse: Arc::default(), _locks: locks })
    }

    /// The job's id.
    pub fn id(&self) -> &JobId {
        &self.record.job
    }

    /// The counter that the data plane's threads of this run raise as they wake.
    pub fn pulse(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.pulse)
    }

    /// Writes the record.
    pub fn save(&self, context: &Context) -> Outcome<()> {
        self.record.save(&context.state)
    }

    /// Changes the status and writes the record.
    pub fn set_status(&mut self, context: &Context, status: JobStatus) -> Outcome<()> {
        self.record.status = status;
        self.save(context)
    }

    /// Ends the run with its outcome. A record that cannot be written any more does not hide it.
    pub fn end<T>(mut self, context: &Context, outcome: Outcome<T>) -> Outcome<T> {
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
