//! `icecore status`: how things stand, for a person.

use std::collections::BTreeMap;

use icecore_repository::Point;
use icecore_repository::store::Address;
use jiff::Timestamp;
use serde::Serialize;

use super::quota::{self, QuotaRow};
use super::schedule::known_vms;
use crate::cli::OK;
use crate::context::Context;
use crate::failure::Outcome;
use crate::names::human_bytes;
use crate::output::{self, Rows, age, when};
use crate::points::is_alive;
use crate::state::jobs::{self, JobKind, JobRecord, JobStatus};

#[derive(Debug, Serialize)]
struct StatusReport {
    vms: Vec<VmStatus>,
    repositories: Vec<RepositoryStatus>,
    quotas: Vec<QuotaRow>,
    running: Vec<RunningJob>,
}

#[derive(Debug, Default, Serialize)]
struct VmStatus {
    vm: String,
    configured: bool,
    scheduled: bool,
    points: usize,
    last_point: Option<String>,
    last_point_at: Option<Timestamp>,
    last_point_age_seconds: Option<i64>,
    /// The newest run of this host that failed after the last point.
    last_failure_at: Option<Timestamp>,
    last_failure: Option<String>,
}

#[derive(Debug, Serialize)]
struct RepositoryStatus {
    repository: String,
    points: u64,
    stored_bytes: u64,
    free_bytes: Option<u64>,
    /// Why it could not be looked at.
    error: Option<String>,
}

#[derive(Debug, Serialize)]
struct RunningJob {
    job: String,
    kind: JobKind,
    vm: Option<String>,
    started_at: Timestamp,
}

/// Runs `icecore status`. A repository that does not answer is a row, not the end.
pub fn run(context: &Context, repo: Option<&str>) -> Outcome<u8> {
    let named: Vec<&str> = match repo {
        Some(repo) => vec![repo],
        None => context.config.repository.keys().map(String::as_str).collect(),
    };
    let (mut points, mut repositories, mut quotas) = (Vec::new(), Vec::new(), Vec::new());
    for name in named {
        match look_at(context, name, &mut points) {
            Ok(row) => {
                repositories.push(row);
                quotas.extend(quota::rows(context, Some(name), None)?);
            }
            Err(failure) => repositories.push(RepositoryStatus {
                repository: name.to_owned(),
                points: 0,
                stored_bytes: 0,
                free_bytes: None,
                error: Some(failure.why),
            }),
        }
    }
    let records = jobs::all(&context.state);
    let report = StatusReport {
        vms: vms(context, &points, &records, Timestamp::now()),
        repositories,
        quotas,
        running: running(context, &records),
    };
    if context.json {
        output::json(&report)?;
    } else {
        print(&report)?;
    }
    Ok(OK)
}

fn look_at(context: &Context, name: &str, points: &mut Vec<Point>) -> Outcome<RepositoryStatus> {
    let repository = context.open_read_only(name)?;
    let failed = |e| crate::failure::Failure::from_repository(format!("look at {name}"), e);
    points.extend(repository.points().map_err(failed)?);
    let info = repository.info().map_err(failed)?;
    let free = free_bytes(&context.repository_address(name)?);
    Ok(RepositoryStatus {
        repository: name.to_owned(),
        points: info.points,
        stored_bytes: info.stored_bytes,
        free_bytes: free,
        error: None,
    })
}

/// What a repository may still take; no object store says so.
fn free_bytes(address: &Address) -> Option<u64> {
    let Address::Directory(path) = address else { return None };
    let fs = rustix::fs::statvfs(path).ok()?;
    Some(fs.f_bavail.saturating_mul(fs.f_frsize))
}

fn vms(
    context: &Context,
    points: &[Point],
    records: &[JobRecord],
    now: Timestamp,
) -> Vec<VmStatus> {
    let config = &context.config;
    let mut all: BTreeMap<String, VmStatus> = BTreeMap::new();
    let of_points = points.iter().map(|point| point.vm.to_string());
    let known = known_vms(config);
    for vm in known.iter().cloned().chain(of_points) {
        all.entry(vm.clone()).or_insert_with(|| VmStatus { vm, ..VmStatus::default() });
    }
    for (name, status) in &mut all {
        let of_vm = points.iter().filter(|point| point.vm.as_str() == name);
        status.points = of_vm.clone().count();
        let last = of_vm.max_by_key(|point| point.meta.captured_at);
        status.last_point = last.map(|point| point.id.to_string());
        status.last_point_at = last.map(|point| point.meta.captured_at);
        let age = |at: Timestamp| now.as_second() - at.as_second();
        status.last_point_age_seconds = status.last_point_at.map(age);
        status.configured = known.contains(name);
        let this = std::slice::from_ref(name);
        status.scheduled = config
            .schedule
            .values()
            .any(|schedule| !crate::config::Config::vms_of(schedule, this).is_empty());
        let failed = |record: &&JobRecord| {
            let of_vm = record.vm.as_deref() == Some(name) && record.kind == JobKind::Backup;
            let later = status.last_point_at.is_none_or(|at| record.started_at > at);
            of_vm && later && record.status == JobStatus::Error
        };
        if let Some(record) = records.iter().rev().find(failed) {
            status.last_failure_at = record.ended_at;
            status.last_failure.clone_from(&record.failure_reason);
        }
    }
    all.into_values().collect()
}

fn running(context: &Context, records: &[JobRecord]) -> Vec<RunningJob> {
    let alive = records.iter().filter(|record| is_alive(context, record));
    let row = |record: &JobRecord| RunningJob {
        job: record.job.to_string(),
        kind: record.kind,
        vm: record.vm.clone(),
        started_at: record.started_at,
    };
    alive.map(row).collect()
}

fn print(report: &StatusReport) -> Outcome<()> {
    let mut table = Rows::new(&["vm", "points", "last point", "age", "scheduled", "last failure"]);
    for vm in &report.vms {
        table.add(vec![
            vm.vm.clone(),
            vm.points.to_string(),
            vm.last_point_at.map_or_else(|| "none".into(), when),
            vm.last_point_age_seconds
                .map_or_else(|| "-".into(), |seconds| age(u64::try_from(seconds).unwrap_or(0))),
            if vm.scheduled { "yes" } else { "no" }.into(),
            vm.last_failure.clone().unwrap_or_else(|| "-".into()),
        ]);
    }
    table.print("no VMs: configure some, or name a repository with --repo")?;
    let mut table = Rows::new(&["repository", "points", "stored", "free", "state"]);
    for one in &report.repositories {
        table.add(vec![
            one.repository.clone(),
            one.points.to_string(),
            human_bytes(one.stored_bytes),
            one.free_bytes.map_or_else(|| "-".into(), human_bytes),
            one.error.clone().unwrap_or_else(|| "ok".into()),
        ]);
    }
    output::print("\n")?;
    table.print("no repositories are configured")?;
    for one in &report.quotas {
        let of = |max: Option<String>| max.map_or_else(String::new, |max| format!(" of {max}"));
        output::print(&format!(
            "quota of {} in {}: {}{} points, {}{}\n",
            one.project,
            one.repository,
            one.used.points,
            of(one.points_max.map(|max| max.to_string())),
            human_bytes(one.used.stored_bytes),
            of(one.stored_bytes_max.map(human_bytes)),
        ))?;
    }
    for job in &report.running {
        let vm = job.vm.as_deref().unwrap_or("-");
        let kind = format!("{:?}", job.kind).to_lowercase();
        output::print(&format!("running: {kind} of {vm}, job {}\n", job.job))?;
    }
    Ok(())
}
