//! `icecore copy`: points from one repository to another.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use icecore_repository::{
    Compared, Copied, CopyProgress, DiskMode, Error, Point, PointId, Repository, VmName,
};
use serde::{Deserialize, Serialize};

use super::point::find;
use crate::cli::OK;
use crate::cli::args::CopyArgs;
use crate::context::Context;
use crate::daemon::client::{self, Client};
use crate::daemon::request::CopyBody;
use crate::failure::{Failure, Outcome, Status};
use crate::interrupt::Interrupt;
use crate::job::Job;
use crate::names::human_bytes;
use crate::output::{self, Rows};
use crate::progress::{Meter, Progress};
use crate::state::JobKind;
use crate::state::locks::LockKey;

/// What `copy` prints.
#[derive(Debug, Serialize, Deserialize)]
struct CopyReport {
    from: String,
    to: String,
    job: String,
    points: Vec<PointReport>,
    copied: usize,
    /// There already.
    present: usize,
    failed: usize,
    read_bytes: u64,
    stored_bytes: u64,
    seconds: f64,
}

/// One point of the source.
#[derive(Debug, Serialize, Deserialize)]
struct PointReport {
    point: String,
    vm: Option<String>,
    status: CopyStatus,
    /// Its id in the destination.
    copy: Option<String>,
    chain: Option<String>,
    parent: Option<String>,
    /// roots or blocks.
    compared: Option<String>,
    disks: Vec<DiskReport>,
    read_bytes: u64,
    new_bytes: u64,
    stored_bytes: u64,
    seconds: f64,
    error: Option<String>,
    #[serde(skip)]
    damage: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum CopyStatus {
    Copied,
    Present,
    Failed,
}

#[derive(Debug, Serialize, Deserialize)]
struct DiskReport {
    disk: String,
    mode: DiskMode,
    read_bytes: u64,
    new_bytes: u64,
    stored_bytes: u64,
}

/// Runs `icecore copy`.
pub async fn run(context: &Context, args: CopyArgs) -> Outcome<u8> {
    let tried = format!("copy points of {} to {}", args.repo.repo, args.to);
    if context.through_daemon {
        let repo = Some(client::repo(context, &args.repo.repo, &tried)?);
        let to = client::repo(context, &args.to, &tried)?;
        let CopyArgs { point, vm, all, .. } = args;
        let body = CopyBody { repo, to, point, vm, all };
        let show = |context: &Context, report: CopyReport| print(context, &report);
        return Client::new(context, tried).run("/v1/copy", &body, show).await;
    }
    let interrupt = Interrupt::listen()?;
    let from = context.open_read_only(&args.repo.repo)?;
    let to = context.open(&args.to)?;
    if from.id() == to.id() {
        return Err(
            Failure::usage(tried, "both are one repository").next("name another one after --to")
        );
    }
    if from.is_encrypted() && !to.is_encrypted() {
        tracing::warn!("{} is not encrypted: whoever reads it reads the copies", args.to);
    }
    let wanted = wanted(&from, &args, &tried)?;
    let keys = [LockKey::copy_into(to.id().as_str())];
    let named = context.repository_name(&args.to)?;
    let mut job = Job::begin(context, JobKind::Copy, &named, &keys, &tried)?;
    job.record.vm.clone_from(&args.vm);
    job.record.repository_id = Some(to.id().to_string());
    job.save(context)?;
    let run = CopyRun { context, from, to, interrupt, tried: &tried };
    match run.all(wanted, job.id().to_string()) {
        Ok(report) if report.failed > 0 => {
            let failure = report.failure(&tried);
            job.end_damaged(context, &report, &failure);
            print(context, &report)?;
            Err(failure)
        }
        outcome => print(context, &job.end(context, outcome)?).map(|()| OK),
    }
}

/// What is asked for, the oldest first, so that parents come before what grew from them.
struct Wanted {
    points: Vec<Point>,
    /// Committed and not to be read any more; they do not say whose they are.
    damaged: Vec<(PointId, String)>,
}

fn wanted(from: &Repository, args: &CopyArgs, tried: &str) -> Outcome<Wanted> {
    let failed = |e| Failure::from_repository(tried, e);
    if let Some(spec) = &args.point {
        let points = vec![find(from, spec, args.vm.as_deref(), tried)?];
        return Ok(Wanted { points, damaged: Vec::new() });
    }
    let vm = args.vm.as_deref().map(VmName::new).transpose();
    let vm = vm.map_err(|e| Failure::usage(tried, e))?;
    let mut points = from.points().map_err(failed)?;
    points.retain(|point| vm.as_ref().is_none_or(|vm| vm == &point.vm));
    if let (Some(vm), true) = (&vm, points.is_empty()) {
        let why = format!("{} holds no point of {vm}", args.repo.repo);
        return Err(Failure::missing(tried, why)
            .next(format!("see 'icecore point list --repo {}'", args.repo.repo)));
    }
    let damaged = from.damaged_points().map_err(failed)?;
    let damaged = damaged.into_iter().map(|(id, damage)| (id, damage.to_string()));
    Ok(Wanted { points, damaged: damaged.collect() })
}

/// A copy under way.
struct CopyRun<'a> {
    context: &'a Context,
    from: Repository,
    to: Repository,
    interrupt: Interrupt,
    tried: &'a str,
}

impl CopyRun<'_> {
    fn all(&self, wanted: Wanted, job: String) -> Outcome<CopyReport> {
        let began = Instant::now();
        let copies = self.from.copies_in(&self.to, &wanted.points);
        let copies = copies.map_err(|e| Failure::from_repository(self.tried, e))?;
        let mut reports: Vec<PointReport> = wanted.damaged.iter().map(unreadable).collect();
        let count = wanted.points.len();
        for (number, (point, copy)) in wanted.points.iter().zip(copies).enumerate() {
            self.interrupt.check(self.tried)?;
            reports.push(match copy {
                Some(copy) => PointReport {
                    copy: Some(copy.to_string()),
                    ..PointReport::of(point, CopyStatus::Present)
                },
                None => self.one(point, &format!("{} {}/{count}", point.vm, number + 1))?,
            });
        }
        let sum = |of: fn(&PointReport) -> u64| reports.iter().map(of).sum();
        let with = |status| reports.iter().filter(|point| point.status == status).count();
        Ok(CopyReport {
            from: self.from.id().to_string(),
            to: self.to.id().to_string(),
            job,
            copied: with(CopyStatus::Copied),
            present: with(CopyStatus::Present),
            failed: with(CopyStatus::Failed),
            read_bytes: sum(|point| point.read_bytes),
            stored_bytes: sum(|point| point.stored_bytes),
            points: reports,
            seconds: began.elapsed().as_secs_f64(),
        })
    }

    /// Copies one point; its failure is its own, and others go on.
    fn one(&self, point: &Point, label: &str) -> Outcome<PointReport> {
        let began = Instant::now();
        let counted = Arc::new(icecore_io_engine::Progress::default());
        let mut shown = None;
        let copied = self.from.copy_point(point, &self.to, &mut |now: CopyProgress| {
            shown.get_or_insert_with(|| {
                let meter = Meter::new(now.total_bytes, Arc::clone(&counted));
                Progress::show(format!("copying {label}"), meter, self.context)
            });
            counted.read_bytes.store(now.done_bytes, Ordering::Relaxed);
            let end = self.interrupt.is_set();
            if end { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        drop(shown);
        let mut report = match copied {
            Ok(copied) => PointReport::copied(point, &copied),
            Err(Error::Cancelled { .. }) => return Err(Failure::interrupted(self.tried)),
            Err(error) => PointReport {
                damage: error.damage().is_some(),
                error: Some(error.to_string()),
                ..PointReport::of(point, CopyStatus::Failed)
            },
        };
        report.seconds = began.elapsed().as_secs_f64();
        Ok(report)
    }
}

impl PointReport {
    fn of(point: &Point, status: CopyStatus) -> Self {
        Self { vm: Some(point.vm.to_string()), ..Self::new(&point.id, status) }
    }

    fn new(point: &PointId, status: CopyStatus) -> Self {
        Self {
            point: point.to_string(),
            vm: None,
            status,
            copy: None,
            chain: None,
            parent: None,
            compared: None,
            disks: Vec::new(),
            read_bytes: 0,
            new_bytes: 0,
            stored_bytes: 0,
            seconds: 0.0,
            error: None,
            damage: false,
        }
    }

    fn copied(point: &Point, copied: &Copied) -> Self {
        let disk = |disk: &icecore_repository::CopiedDisk| DiskReport {
            disk: disk.disk.to_string(),
            mode: disk.mode,
            read_bytes: disk.read_bytes,
            new_bytes: disk.summary.new_bytes,
            stored_bytes: disk.summary.stored_bytes,
        };
        let copy = &copied.point;
        Self {
            copy: Some(copy.id.to_string()),
            chain: Some(copy.chain.to_string()),
            parent: copy.parent.as_ref().map(ToString::to_string),
            compared: Some(match copied.compared {
                Compared::Roots => "roots".to_owned(),
                Compared::Blocks => "blocks".to_owned(),
            }),
            disks: copied.disks.iter().map(disk).collect(),
            read_bytes: copied.disks.iter().map(|disk| disk.read_bytes).sum(),
            new_bytes: copy.new_bytes,
            stored_bytes: copy.stored_bytes,
            ..Self::of(point, CopyStatus::Copied)
        }
    }
}

fn unreadable((id, why): &(PointId, String)) -> PointReport {
    let failed = PointReport::new(id, CopyStatus::Failed);
    PointReport { damage: true, error: Some(why.clone()), ..failed }
}

impl CopyReport {
    fn failure(&self, tried: &str) -> Failure {
        let failed = self.points.iter().filter(|point| point.status == CopyStatus::Failed);
        let damage = failed.clone().any(|point| point.damage);
        let first = failed.clone().find_map(|point| point.error.as_deref()).unwrap_or_default();
        let all = self.points.len();
        let why = format!("{} of {all} points were not copied; the first: {first}", self.failed);
        let failure = Failure::failed(tried, why).next(if damage {
            "all others were copied; 'icecore check --read-data' says what is damaged"
        } else {
            "run it again: what was copied is not copied twice"
        });
        Failure { status: if damage { Status::Damaged } else { Status::Failed }, ..failure }
    }
}

fn print(context: &Context, report: &CopyReport) -> Outcome<()> {
    if context.json {
        return output::json(report);
    }
    let mut table = Rows::new(&["point", "vm", "status", "copy", "mode", "read", "stored"]);
    for point in report.points.iter().filter(|point| point.status != CopyStatus::Present) {
        let mode = |disk: &DiskReport| match disk.mode {
            DiskMode::Full => "full",
            DiskMode::Incremental => "incremental",
            DiskMode::Rehash => "rehash",
        };
        let mut modes: Vec<&str> = point.disks.iter().map(mode).collect();
        modes.dedup();
        table.add(vec![
            point.point.clone(),
            point.vm.clone().unwrap_or_default(),
            if point.status == CopyStatus::Copied { "ok" } else { "failed" }.into(),
            point.copy.clone().unwrap_or_default(),
            modes.join(", "),
            human_bytes(point.read_bytes),
            human_bytes(point.stored_bytes),
        ]);
    }
    table.print("nothing to copy")?;
    output::print(&format!(
        "{} copied, {} there already, {} failed: {} read, {} stored in {:.1} s\n",
        report.copied,
        report.present,
        report.failed,
        human_bytes(report.read_bytes),
        human_bytes(report.stored_bytes),
        report.seconds,
    ))
}
