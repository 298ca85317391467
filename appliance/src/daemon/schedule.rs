//! Runs of schedules: at each look at the clock the pure core says what is due, and it is queued.

use std::sync::Arc;
use std::time::Duration;

use icecore_repository::VmName;
use jiff::Timestamp;

use super::access::{Caller, Role};
use super::request::{BackupBody, GcBody};
use super::supervisor::Supervisor;
use crate::cli::args::LevelArg;
use crate::commands::prune::{self, Request};
use crate::commands::schedule::known_vms;
use crate::config::ScheduledLevel;
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::policy::notify::{self, Event};
use crate::policy::retention::Clock;
use crate::policy::schedule::{self, DueRun};
use crate::state::locks::{Lock, LockKey};
use crate::state::{JobId, JobKind, JobRecord, JobState, marks};

/// Schedules are in minutes; nobody waits for the seconds.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);
/// What a schedule's jobs are asked for by, before its name.
const ASKED_BY: &str = "schedule ";

/// The schedule that asked for a job.
pub fn of_job(record: &JobRecord) -> Option<&str> {
    record.order.as_ref()?.requested_by.strip_prefix(ASKED_BY)
}

/// Queues what is due, for as long as the daemon runs.
pub async fn run(supervisor: Arc<Supervisor>) {
    loop {
        // libvirt is asked for its domains, and may not answer at once.
        let own = Arc::clone(&supervisor);
        match tokio::task::spawn_blocking(move || look(&own)).await {
            Ok(Ok(())) => {}
            Ok(Err(failure)) => tracing::error!("no run of a schedule begins: {failure}"),
            Err(e) => tracing::error!("no run of a schedule begins: {e}"),
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

fn look(supervisor: &Arc<Supervisor>) -> Outcome<()> {
    let settings = supervisor.settings();
    let context = &settings.context;
    if context.config.schedule.is_empty() {
        return Ok(());
    }
    // A timer's `schedule run` deals with what is due for as long as it holds this.
    let (key, now) = (LockKey::schedules(), Timestamp::now());
    let Ok(_one_at_a_time) = Lock::take(&context.state, &key, &JobId::new(now)?, "look") else {
        return Ok(());
    };
    let before = marks::load(&context.state);
    let vms = known_vms(&context.config);
    let tick = schedule::tick(&context.config, &vms, &before, now);
    // What is not remembered would begin again.
    if tick.marks != before {
        marks::save(&context.state, &tick.marks)?;
    }
    for missed in tick.missed {
        let schedule::MissedRun { schedule, vm, moment, made_up } = &missed;
        tracing::warn!(schedule, vm, %moment, made_up, "a run was not begun at its time");
        supervisor.metrics.missed(schedule);
        let settings = Arc::clone(&settings);
        tokio::task::spawn_blocking(move || {
            let notify = settings.context.config.notify.as_ref();
            notify::tell(notify, &Event::Missed(&missed), Some(&missed.vm));
        });
    }
    for run in tick.runs {
        if let Err(failure) = begin(supervisor, context, &run) {
            tracing::error!(schedule = run.schedule, vm = run.vm, "not queued: {failure}");
            tell(supervisor, failure, Some(run.vm));
        }
    }
    Ok(())
}

fn begin(supervisor: &Supervisor, context: &Context, run: &DueRun) -> Outcome<()> {
    let by = format!("{ASKED_BY}{}", run.schedule);
    if supervisor.waits(&run.schedule, &run.vm) {
        tracing::warn!(schedule = run.schedule, vm = run.vm, "the run before still waits");
        return Ok(());
    }
    let level = match run.level {
        ScheduledLevel::Auto => LevelArg::Auto,
        ScheduledLevel::Full => LevelArg::Full,
        ScheduledLevel::Incremental => LevelArg::Incremental,
    };
    let repo = Some(run.repository.clone());
    let body = BackupBody { repo, level: Some(level), ..BackupBody::default() };
    let caller = Caller { name: by, role: Role::Operate };
    let wanted = body.wanted(context, &caller, &run.vm)?;
    supervisor.submit(wanted, &caller.name).map(drop)
}

/// Tells of what no worker tells of: one that is told of by a worker is not told of again.
pub fn tell(supervisor: &Supervisor, failure: Failure, vm: Option<String>) {
    let settings = supervisor.settings();
    tokio::task::spawn_blocking(move || {
        let Failure { tried, why, next, .. } = &failure;
        let event = Event::Failed { tried, why, next: next.as_deref() };
        notify::tell(settings.context.config.notify.as_ref(), &event, vm.as_deref());
    });
}

/// After a scheduled run that ended well its schedule's retention is applied; what goes is collected.
pub async fn after(supervisor: &Arc<Supervisor>, record: &JobRecord) {
    let scheduled = of_job(record).filter(|_| record.state(false) == JobState::Succeeded);
    let (Some(name), Some(vm), JobKind::Backup) = (scheduled, &record.vm, record.kind) else {
        return;
    };
    let settings = supervisor.settings();
    let (name, vm) = (name.to_owned(), vm.clone());
    let pruned = tokio::task::spawn_blocking(move || retain(&settings.context, &name, &vm)).await;
    match pruned {
        Ok(Ok(Some(repository))) => collect(supervisor, &repository),
        Ok(Ok(None)) => {}
        Ok(Err(failure)) => {
            tracing::error!(job = %record.job, "{failure}");
            tell(supervisor, failure, record.vm.clone());
        }
        Err(e) => tracing::error!(job = %record.job, "retention: {e}"),
    }
}

/// The repository in which something went.
fn retain(context: &Context, schedule: &str, vm: &str) -> Outcome<Option<String>> {
    let tried = format!("prune the points of {vm}");
    let Some(schedule) = context.config.schedule.get(schedule) else { return Ok(None) };
    let Some(keep) = schedule.retention else { return Ok(None) };
    let name = schedule.repository.to_string();
    let repository = context.open(&name)?;
    let vm = VmName::new(vm).map_err(|e| Failure::usage(tried, e))?;
    let (zone, clock) = (schedule.zone(), Clock::Doubted);
    let request = Request { vm: &vm, keep, zone, clock, dry_run: false };
    let report = prune::prune(context, &repository, &request)?;
    Ok(report.removed_any().then_some(name))
}

/// One gc at a time is enough: it collects for all.
fn collect(supervisor: &Supervisor, repository: &str) {
    let settings = supervisor.settings();
    let caller = Caller { name: "retention".into(), role: Role::Operate };
    let body = GcBody { repo: Some(repository.to_owned()), dry_run: false };
    let queued = body.wanted(&settings.context, &caller).and_then(|wanted| {
        match supervisor.repository_waits(&wanted.repository) {
            true => Ok(()),
            false => supervisor.submit(wanted, &caller.name).map(drop),
        }
    });
    if let Err(failure) = queued {
        tracing::error!(repository, "no gc after the retention: {failure}");
    }
}
