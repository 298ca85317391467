//! `icecore restore`.

use std::path::Path;

use icecore_io_engine::Verify;
use icecore_repository::store::Traffic;
use icecore_repository::{DiskId, Point, PointDisk};
use serde::{Deserialize, Serialize};

use super::backup::absolute;
use super::point::find;
use crate::cli::OK;
use crate::cli::args::{FormatArg, RestoreArgs, VerifyRestoreArg};
use crate::context::Context;
use crate::daemon::client::{self, Client};
use crate::daemon::request::RestoreBody;
use crate::failure::{Failure, Outcome};
use crate::image::{self, Format};
use crate::interrupt::Interrupt;
use crate::job::Job;
use crate::names::human_bytes;
use crate::output::{self, Rows};
use crate::recovery;
use crate::restore::{Restore, RestoredDisk, Target, Wish, targets};
use crate::state::JobKind;
use crate::state::locks::LockKey;

#[derive(Debug, Serialize, Deserialize)]
struct RestoreReport {
    point: String,
    vm: String,
    job: String,
    disks: Vec<RestoredDisk>,
    /// Requests to the repository's server; none where there is no server.
    #[serde(default)]
    store: Option<Traffic>,
}

/// Runs `icecore restore`.
pub async fn run(context: &Context, args: RestoreArgs) -> Outcome<u8> {
    if context.through_daemon {
        return through_daemon(context, &args).await;
    }
    let tried = format!("restore {} to {}", args.point, args.to);
    let interrupt = Interrupt::listen()?;
    let repository = context.open_read_only(&args.repo.repo)?;
    let point = find(&repository, &args.point, args.vm.as_deref(), &tried)?;
    let disks = disks(&point, args.disk.as_deref(), &tried)?;
    let targets = checked_targets(&args, &disks)?;
    let keys: Vec<LockKey> = targets.iter().map(|t| LockKey::file(Path::new(&t.name()))).collect();
    let mut job = Job::begin(context, JobKind::Restore, &args.repo.repo, &keys, &tried)?;
    recovery::recover_all(context, None).await;
    job.record.vm = Some(point.vm.to_string());
    job.record.point = Some(point.id.to_string());
    job.record.repository_id = Some(repository.id().to_string());
    job.save(context)?;
    let verify = match args.verify {
        VerifyRestoreArg::Root => Verify::ReadBack,
        VerifyRestoreArg::None => Verify::None,
    };
    let mut restore = Restore {
        context,
        repository: &repository,
        point: &point,
        verify,
        interrupt: &interrupt,
        job: &mut job,
    };
    let outcome = all(&mut restore, &disks, &targets, &tried).await;
    let (id, vm, point) = (job.id().to_string(), point.vm.to_string(), point.id.to_string());
    let store = repository.traffic();
    let outcome = outcome.map(|disks| RestoreReport { point, vm, job: id, disks, store });
    print(context, job.end(context, outcome)?)?;
    Ok(OK)
}

async fn through_daemon(context: &Context, args: &RestoreArgs) -> Outcome<u8> {
    let tried = format!("restore {} to {}", args.point, args.to);
    let to = match args.to.contains("://") {
        true => args.to.clone(),
        false => client::absolute(Path::new(&args.to), &tried)?,
    };
    let body = RestoreBody {
        repo: Some(client::repo(context, &args.repo.repo, &tried)?),
        to,
        disk: args.disk.clone(),
        vm: args.vm.clone(),
        format: args.format,
        force: args.force,
        verify: Some(args.verify),
    };
    let path = format!("/v1/points/{}/restore", client::segment(&args.point));
    Client::new(context, tried).run(&path, &body, print).await
}

async fn all(
    restore: &mut Restore<'_>,
    disks: &[&PointDisk],
    targets: &[Target],
    tried: &str,
) -> Outcome<Vec<RestoredDisk>> {
    let mut restored = Vec::new();
    for (disk, target) in disks.iter().zip(targets) {
        if let Target::File { path, .. } = target
            && let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty())
        {
            std::fs::create_dir_all(parent).map_err(|e| Failure::failed(tried, e))?;
        }
        restored.push(restore.disk(disk, target).await?);
    }
    Ok(restored)
}

fn disks<'a>(point: &'a Point, wanted: Option<&str>, tried: &str) -> Outcome<Vec<&'a PointDisk>> {
    let Some(wanted) = wanted else { return Ok(point.disks.iter().collect()) };
    let id: DiskId = wanted.parse().map_err(|e| Failure::usage(tried, e))?;
    match point.disk(&id) {
        Some(disk) => Ok(vec![disk]),
        None => {
            let held: Vec<_> = point.disks.iter().map(|disk| disk.disk.to_string()).collect();
            let why = format!("point {} has no disk {id}; it has {}", point.id, held.join(", "));
            Err(Failure::usage(tried, why))
        }
    }
}

fn checked_targets(args: &RestoreArgs, disks: &[&PointDisk]) -> Outcome<Vec<Target>> {
    let format = args.format.map(|format| match format {
        FormatArg::Raw => Format::Raw,
        FormatArg::Qcow2 => Format::Qcow2,
    });
    let wish = Wish { to: &args.to, format, force: args.force, one_disk: args.disk.is_some() };
    let names: Vec<String> = disks.iter().map(|disk| disk.disk.to_string()).collect();
    let mut targets = targets(&wish, &names)?;
    for target in &mut targets {
        if let Target::File { path, .. } | Target::Device { path } = target {
            *path = absolute(path, "restore")?;
            image::utf8(path, "restore")?;
        }
    }
    Ok(targets)
}

fn print(context: &Context, report: RestoreReport) -> Outcome<()> {
    if context.json {
        return output::json(&report);
    }
    output::print(&format!("restored {} of {}\n", report.point, report.vm))?;
    let mut table = Rows::new(&["disk", "target", "written", "zeroed", "root", "seconds"]);
    for disk in report.disks {
        table.add(vec![
            disk.disk,
            disk.target,
            human_bytes(disk.written_bytes),
            human_bytes(disk.zeroed_bytes),
            if disk.root_verified { "proven" } else { "not verified" }.into(),
            format!("{:.1}", disk.seconds),
        ]);
    }
    table.print("no disks")
}
