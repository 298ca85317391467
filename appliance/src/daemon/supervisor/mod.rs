//! The jobs of a daemon: queued, begun in processes of their own, adopted from a daemon before this
//! one, and put in order at their end.

mod ending;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::Notify;

use super::metrics::Metrics;
use super::queue::{Party, Queue, Share, Work};
use super::request::Wanted;
use super::schedule;
use super::settings::Settings;
use crate::cli::args::Global;
use crate::failure::{Failure, Outcome};
use crate::job_view::{self, Cancel, JobView};
use crate::recovery;
use crate::state::jobs::{self, Order};
use crate::state::locks::{LockKey, is_free};
use crate::state::{JobId, JobKind, JobRecord, JobStatus};

/// More waiting jobs than this are a mistake of their caller: a day's work of a large host.
const WAITING_MAX: usize = 2000;
/// How often what a dead run left, and could not be undone yet, is tried again.
const RECOVER_INTERVAL: Duration = Duration::from_secs(60);

/// The daemon's memory of its jobs. What must not be lost is in the records.
pub struct Supervisor {
    global: Global,
    settings: RwLock<Arc<Settings>>,
    inner: Mutex<Inner>,
    wake: Notify,
    pub metrics: Metrics,
}

struct Inner {
    queue: Queue,
    running: BTreeMap<JobId, Work>,
    accepting: bool,
    generation: u64,
}

/// Jobs of this daemon at this moment.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    pub waiting: usize,
    pub running: usize,
}

impl Supervisor {
    /// With a configuration that was found right.
    pub fn new(global: Global, settings: Settings) -> Arc<Self> {
        let queue = Queue::default();
        let running = BTreeMap::new();
        Arc::new(Self {
            global,
            settings: RwLock::new(Arc::new(settings)),
            inner: Mutex::new(Inner { queue, running, accepting: true, generation: 0 }),
            wake: Notify::new(),
            metrics: Metrics::default(),
        })
    }

    /// The configuration as it is now.
    pub fn settings(&self) -> Arc<Settings> {
        Arc::clone(&self.settings.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Reads the configuration again; one that is wrong changes nothing.
    pub fn reload(&self) -> Outcome<()> {
        let generation = self.lock().generation + 1;
        let settings = Settings::load(&self.global, generation)?;
        self.lock().generation = generation;
        *self.settings.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(settings);
        self.wake.notify_one();
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How much there is to do.
    pub fn load(&self) -> Load {
        let inner = self.lock();
        Load { waiting: inner.queue.len(), running: inner.running.len() }
    }

    /// Takes over what an earlier daemon left: waiting jobs wait again, running ones are followed.
    pub async fn adopt(self: &Arc<Self>) {
        let settings = self.settings();
        let state = &settings.context.state;
        recovery::recover_all(&settings.context, None).await;
        let mut records = jobs::all(state);
        // Ids are sorted by the second only.
        records.sort_by_key(|record| record.order.as_ref().map(|order| order.queued_at));
        for record in records {
            let held = !is_free(state, &LockKey::job(&record.job));
            match record.status {
                status if status.is_final() => {}
                _ if held => self.follow(record),
                JobStatus::Queued => self.enqueue(&record),
                // It could not be recovered yet.
                _ => {}
            }
        }
    }

    fn follow(self: &Arc<Self>, record: JobRecord) {
        tracing::info!(job = %record.job, "adopted");
        let work = work_of(&self.settings(), &record);
        self.lock().running.insert(record.job.clone(), work);
        let own = Arc::clone(self);
        tokio::spawn(async move { own.settle(&record.job, None).await });
    }

    fn enqueue(&self, record: &JobRecord) {
        let not_before = record.order.as_ref().and_then(|order| order.not_before);
        let work = work_of(&self.settings(), record);
        self.lock().queue.push(record.job.clone(), work, not_before);
        self.wake.notify_one();
    }

    /// Queues a job; its record is durable when this returns.
    pub fn submit(&self, wanted: Wanted, requested_by: &str) -> Outcome<JobRecord> {
        let order = Order {
            queued_at: Timestamp::now(),
            arguments: wanted.arguments,
            requested_by: requested_by.to_owned(),
            not_before: None,
            retry_of: None,
            retries: 0,
        };
        let mut record = self.record(wanted.kind, &wanted.repository, order)?;
        record.vm = wanted.vm;
        record.point = wanted.point;
        record.label = wanted.label;
        self.queue_durably(record)
    }

    /// Whether a schedule's job for a VM still waits.
    pub fn waits(&self, schedule: &str, vm: &str) -> bool {
        let party = Party::Vm(vm.to_owned());
        let of_vm = |work: &Work| {
            let named = work.share.as_ref().is_some_and(|share| share.schedule == schedule);
            named && work.party == party
        };
        self.lock().queue.any(of_vm)
    }

    /// Whether a check or a gc of a repository waits.
    pub fn repository_waits(&self, repository: &str) -> bool {
        let party = Party::Repository(repository.to_owned());
        self.lock().queue.any(|work| work.party == party)
    }

    fn record(&self, kind: JobKind, repository: &str, order: Order) -> Outcome<JobRecord> {
        let now = order.queued_at;
        let mut record = JobRecord::new(JobId::new(now)?, kind, repository, now);
        record.status = JobStatus::Queued;
        record.order = Some(order);
        Ok(record)
    }

    fn queue_durably(&self, record: JobRecord) -> Outcome<JobRecord> {
        let (accepting, waiting) = {
            let inner = self.lock();
            (inner.accepting, inner.queue.len())
        };
        let tried = format!("queue a {}", record.kind.word());
        if !accepting {
            return Err(Failure::refused(tried, "the daemon is stopping").transient());
        }
        if waiting >= WAITING_MAX {
            let why = format!("{waiting} jobs are waiting already");
            return Err(Failure::refused(tried, why).transient());
        }
        record.save(&self.settings().context.state)?;
        self.enqueue(&record);
        Ok(record)
    }

    /// Ends a job that waits or runs.
    pub fn cancel(&self, view: &JobView) -> Outcome<()> {
        job_view::cancel(&self.settings().context.state, view, Cancel::Ask)?;
        if self.lock().queue.remove(&view.record.job) {
            self.metrics.ended(&view.record);
        }
        self.wake.notify_one();
        Ok(())
    }

    /// No new jobs from now on. Those that run go on without this daemon; those that wait are
    /// there for the next one.
    pub fn stop(&self) {
        self.lock().accepting = false;
    }

    /// Begins what may begin, for as long as the daemon runs.
    pub async fn run(self: Arc<Self>) {
        let mut recover = tokio::time::interval(RECOVER_INTERVAL);
        recover.reset();
        loop {
            let pause = self.begin_due();
            tokio::select! {
                () = self.wake.notified() => {}
                () = tokio::time::sleep(pause) => {}
                _ = recover.tick() => {
                    recovery::recover_all(&self.settings().context, None).await;
                }
            }
        }
    }

    /// Begins all that may begin now; the time until there may be more.
    fn begin_due(self: &Arc<Self>) -> Duration {
        let settings = self.settings();
        loop {
            let now = Timestamp::now();
            let mut inner = self.lock();
            let running: Vec<Work> = inner.running.values().cloned().collect();
            let next = match inner.accepting {
                true => inner.queue.next(&running, settings.limits, now),
                false => None,
            };
            let Some((job, work)) = next else {
                let moment = inner.queue.next_moment(now);
                let left = moment.and_then(|at| Duration::try_from(at.duration_since(now)).ok());
                return left.unwrap_or(RECOVER_INTERVAL).min(RECOVER_INTERVAL);
            };
            inner.running.insert(job.clone(), work);
            drop(inner);
            let own = Arc::clone(self);
            tokio::spawn(async move { own.work(job).await });
        }
    }
}

/// What the queue needs to know of a job.
fn work_of(settings: &Settings, record: &JobRecord) -> Work {
    let party = match (record.kind, &record.vm) {
        (JobKind::Backup | JobKind::Rollback, Some(vm)) => Party::Vm(vm.clone()),
        // Of a copy the one that is copied to.
        (JobKind::Check | JobKind::Gc | JobKind::Copy, _) => {
            Party::Repository(record.repository.clone())
        }
        _ => Party::Alone(record.job.clone()),
    };
    let share = schedule::of_job(record).and_then(|name| {
        let concurrency = settings.context.config.schedule.get(name)?.concurrency;
        let at_once = usize::try_from(concurrency.max(1)).unwrap_or(1);
        Some(Share { schedule: name.to_owned(), at_once })
    });
    Work { party, repository: record.repository.clone(), share }
}
