//! `icecore vm`.

use std::collections::BTreeMap;

use icecore_qmp::bitmap::{BitmapName, Granularity};
use icecore_qmp::guardian::GuardianClient;
use icecore_repository::{Point, Repository, VmName};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::schedule::known_vms;
use crate::capture::qmp::failure;
use crate::cli::args::VmCommand;
use crate::cli::{OK, VmArgs};
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::hook::{self, Known};
use crate::image;
use crate::libvirt::checkpoint::{Checkpoint, CheckpointDisk, CheckpointName};
use crate::libvirt::half_written;
use crate::libvirt::xml::DomainDisk;
use crate::libvirt::{CaptureForm, Domain, PoweredOff, State, emulator};
use crate::names::human_bytes;
use crate::output::{self, Rows, when};
use crate::recovery;
use crate::target::{self, Reach, Vm};

/// Runs `icecore vm …`.
pub async fn run(context: &Context, command: VmCommand) -> Outcome<u8> {
    match command {
        VmCommand::List { repo } => list(context, repo.repo.as_deref()),
        VmCommand::Show { vm, repo } => show(context, &vm, repo.repo.as_deref()).await,
        VmCommand::Create(args) => super::vm_create::run(context, &args).await,
        VmCommand::Release { vm } => release(context, &vm).await,
    }
}

/// A VM and what is known of its points.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct VmRow {
    pub vm: String,
    pub configured: bool,
    /// What libvirt's hook last told of a domain of this name.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub libvirt: Option<Known>,
    pub points: usize,
    pub last_point: Option<String>,
    pub last_point_at: Option<Timestamp>,
    pub last_point_age_seconds: Option<i64>,
    pub protected: bool,
}

/// The VMs of the configuration and of these repositories; all that are configured when none are
/// named.
pub fn rows(context: &Context, repositories: Option<Vec<&str>>) -> Outcome<Vec<VmRow>> {
    let all = || context.config.repository.keys().map(String::as_str).collect();
    let named = repositories.unwrap_or_else(all);
    let mut points = Vec::new();
    for repo in named {
        let repository = context.open_read_only(repo)?;
        points.extend(repository.points().map_err(|e| Failure::from_repository("list VMs", e))?);
    }
    points.sort_by(|a, b| a.id.cmp(&b.id));
    let mut of_vm: BTreeMap<String, Vec<&Point>> = BTreeMap::new();
    let known = known_vms(&context.config);
    for name in &known {
        of_vm.entry(name.clone()).or_default();
    }
    for known in hook::all(&context.state) {
        of_vm.entry(known.name).or_default();
    }
    for point in &points {
        of_vm.entry(point.vm.to_string()).or_default().push(point);
    }
    Ok(of_vm.into_iter().map(|(vm, points)| row(context, &known, vm, &points)).collect())
}

fn list(context: &Context, repo: Option<&str>) -> Outcome<u8> {
    let rows = rows(context, repo.map(|repo| vec![repo]))?;
    if context.json {
        output::json(&rows)?;
        return Ok(OK);
    }
    let mut table = Rows::new(&["vm", "configured", "libvirt", "points", "last point", "taken"]);
    for row in rows {
        table.add(vec![
            row.vm,
            if row.configured { "yes" } else { "no" }.into(),
            row.libvirt.map_or_else(|| "-".into(), |known| known.last_event),
            row.points.to_string(),
            row.last_point.unwrap_or_else(|| "-".into()),
            row.last_point_at.map_or_else(|| "-".into(), when),
        ]);
    }
    table.print("no VMs: configure some, or name a repository with --repo")?;
    Ok(OK)
}

fn row(context: &Context, known: &[String], vm: String, points: &[&Point]) -> VmRow {
    let last = points.last();
    let at = last.map(|point| point.meta.captured_at);
    VmRow {
        configured: known.contains(&vm),
        libvirt: hook::all(&context.state).into_iter().find(|known| known.name == vm),
        points: points.len(),
        last_point: last.map(|point| point.id.to_string()),
        last_point_at: at,
        last_point_age_seconds: at.map(|at| Timestamp::now().as_second() - at.as_second()),
        protected: last.is_some(),
        vm,
    }
}

#[derive(Debug, Serialize)]
struct VmDetail {
    #[serde(flatten)]
    row: VmRow,
    running: bool,
    qemu_version: Option<String>,
    disks: Vec<DiskDetail>,
    unprotected: Vec<crate::report::Unprotected>,
    leftovers: Vec<String>,
}

#[derive(Debug, Serialize)]
struct DiskDetail {
    disk: String,
    size_bytes: u64,
    file: Option<String>,
    iothread: Option<String>,
    refusal: Option<String>,
    bitmaps: Vec<BitmapDetail>,
}

#[derive(Debug, Serialize)]
struct BitmapDetail {
    name: String,
    /// Whether Icecore made it.
    ours: bool,
    point: Option<String>,
    granularity: u64,
    dirty_bytes: Option<u64>,
    health: &'static str,
}

async fn show(context: &Context, args: &VmArgs, repo: Option<&str>) -> Outcome<u8> {
    let vm = Vm::from_args(context, args, "show a VM")?;
    let tried = format!("show {}", vm.name);
    recovery::recover_all(context, vm.qmp()).await;
    let repository = repo.map(|repo| context.open_read_only(repo)).transpose()?;
    let row = row_of(context, repository.as_ref(), &vm.name, &tried)?;
    let detail = match &vm.reach {
        Reach::Qmp { qmp, qga } => {
            let guardian = target::guard(context, qmp, qga.clone(), &tried).await?;
            let seen = guardian.inspect().await.map_err(|e| failure(&tried, e))?;
            let unprotected = seen.inventory.unprotected.iter();
            VmDetail {
                row,
                running: seen.running,
                qemu_version: Some(seen.features.version.to_string()),
                disks: seen.inventory.disks.iter().map(disk_of_qemu).collect(),
                unprotected: unprotected
                    .map(|device| crate::report::Unprotected {
                        disk: device.id.clone(),
                        why: device.why.clone(),
                    })
                    .collect(),
                leftovers: seen.leftovers.iter().map(ToString::to_string).collect(),
            }
        }
        Reach::Libvirt(domain) => {
            let detail = detail_of_domain(row, domain, &tried)?;
            match vm.capture {
                CaptureForm::Direct if detail.running => {
                    seen_directly(context, detail, domain, &tried).await?
                }
                CaptureForm::Direct | CaptureForm::Job => detail,
            }
        }
        Reach::Images(images) => VmDetail {
            row,
            running: false,
            qemu_version: None,
            disks: images.iter().map(disk_of_image).collect::<Outcome<_>>()?,
            unprotected: Vec::new(),
            leftovers: Vec::new(),
        },
    };
    print(context, &detail)?;
    Ok(OK)
}

fn detail_of_domain(row: VmRow, domain: &Domain, tried: &str) -> Outcome<VmDetail> {
    let state = domain.state().map_err(|e| e.failure(tried))?;
    let running = !matches!(state, State::ShutOff);
    let description = domain.describe(tried)?;
    let sizes = domain.capacities().map_err(|e| e.failure(tried))?;
    let checkpoints = domain.our_checkpoints(running, tried)?;
    let disk = |disk: &DomainDisk| DiskDetail {
        disk: disk.target.clone(),
        size_bytes: sizes.get(&disk.target).copied().unwrap_or(0),
        file: disk.path.as_ref().map(|path| path.display().to_string()),
        iothread: disk.iothread.then(|| "of libvirt".to_owned()),
        refusal: disk.refusal.clone(),
        bitmaps: checkpoints
            .iter()
            .filter_map(|one| Some(bitmap_of_checkpoint(one, one.disk(&disk.target)?, running)))
            .collect(),
    };
    let devices = description.unprotected.iter().cloned();
    Ok(VmDetail {
        row,
        running,
        qemu_version: emulator::of_running(domain).map(|version| version.to_string()),
        disks: description.disks.iter().map(disk).collect(),
        unprotected: devices.map(|(disk, why)| crate::report::Unprotected { disk, why }).collect(),
        leftovers: Vec::new(),
    })
}

/// Adds what a domain that is captured directly has in its QEMU.
async fn seen_directly(
    context: &Context,
    mut detail: VmDetail,
    domain: &Domain,
    tried: &str,
) -> Outcome<VmDetail> {
    let description = domain.describe(tried)?;
    let guardian = target::guard_domain(context, domain, false, tried).await?;
    let seen = guardian.inspect().await.map_err(|e| failure(tried, e))?;
    detail.leftovers = seen.leftovers.iter().map(ToString::to_string).collect();
    for disk in &mut detail.disks {
        let known = description.disks.iter().find(|known| known.target == disk.disk);
        let alias = known.and_then(|known| known.alias.as_ref());
        let found = seen.inventory.disks.iter().find(|found| Some(&found.id) == alias);
        let bitmaps = found.into_iter().flat_map(|found| &found.bitmaps);
        // libvirt's own are checkpoints.
        let ours = bitmaps.filter(|bitmap| bitmap.name.parse::<BitmapName>().is_ok());
        let ours =
            ours.map(|b| bitmap(&b.name, b.granularity_bytes, Some(b.dirty_bytes), health(b)));
        disk.bitmaps.extend(ours);
    }
    Ok(detail)
}

fn bitmap_of_checkpoint(
    checkpoint: &Checkpoint,
    disk: &CheckpointDisk,
    running: bool,
) -> BitmapDetail {
    let point = checkpoint.name.parse::<CheckpointName>().ok().map(|name| name.point.to_string());
    let health = match (running, disk.dirty_bytes) {
        (false, _) => "not known while the domain is off",
        (true, Some(_)) => "ok",
        (true, None) => "inconsistent",
    };
    BitmapDetail {
        name: checkpoint.name.clone(),
        ours: true,
        point,
        granularity: Granularity::DEFAULT.bytes(),
        dirty_bytes: disk.dirty_bytes,
        health,
    }
}

fn row_of(
    context: &Context,
    repository: Option<&Repository>,
    vm: &VmName,
    tried: &str,
) -> Outcome<VmRow> {
    let points = match repository {
        Some(repository) => repository.points().map_err(|e| Failure::from_repository(tried, e))?,
        None => Vec::new(),
    };
    let of_vm: Vec<&Point> = points.iter().filter(|point| &point.vm == vm).collect();
    Ok(row(context, &known_vms(&context.config), vm.to_string(), &of_vm))
}

fn disk_of_qemu(disk: &icecore_qmp::inventory::Disk) -> DiskDetail {
    DiskDetail {
        disk: disk.id.clone(),
        size_bytes: disk.size_bytes,
        file: disk.layers.last().map(|layer| layer.file.clone()),
        iothread: disk.iothread.clone(),
        refusal: disk.refusal.as_ref().map(ToString::to_string),
        bitmaps: disk
            .bitmaps
            .iter()
            .map(|b| bitmap(&b.name, b.granularity_bytes, Some(b.dirty_bytes), health(b)))
            .collect(),
    }
}

fn disk_of_image(named: &crate::capture::image::Named) -> Outcome<DiskDetail> {
    let format = named.format()?;
    let info = image::info(&named.path, format)?;
    let of = |b: &image::ImageBitmap| {
        let health = match (b.inconsistent(), b.recording()) {
            (true, _) => "inconsistent",
            (false, true) => "ok",
            (false, false) => "not recording",
        };
        bitmap(&b.name, b.granularity, None, health)
    };
    Ok(DiskDetail {
        disk: named.id.to_string(),
        size_bytes: info.size_bytes,
        file: Some(named.path.display().to_string()),
        iothread: None,
        refusal: None,
        bitmaps: info.bitmaps.iter().map(of).collect(),
    })
}

fn bitmap(
    name: &str,
    granularity: u64,
    dirty_bytes: Option<u64>,
    health: &'static str,
) -> BitmapDetail {
    let ours = name.parse::<BitmapName>().ok();
    BitmapDetail {
        name: name.to_owned(),
        ours: ours.is_some(),
        point: ours.map(|name| name.point.to_string()),
        granularity,
        dirty_bytes,
        health,
    }
}

fn health(bitmap: &icecore_qmp::bitmap::Bitmap) -> &'static str {
    match (bitmap.inconsistent, bitmap.recording, bitmap.busy) {
        (true, _, _) => "inconsistent",
        (_, false, _) => "not recording",
        (_, _, true) => "busy",
        _ => "ok",
    }
}

fn print(context: &Context, detail: &VmDetail) -> Outcome<()> {
    if context.json {
        return output::json(detail);
    }
    let state = if detail.running { "running" } else { "not running" };
    let last = detail.row.last_point.as_deref().unwrap_or("none");
    let text = format!("{}: {state}, {} points, last {last}\n", detail.row.vm, detail.row.points);
    output::print(&text)?;
    let mut table = Rows::new(&["disk", "size", "file", "bitmap of point", "health", "dirty"]);
    for disk in &detail.disks {
        let ours: Vec<&BitmapDetail> = disk.bitmaps.iter().filter(|b| b.ours).collect();
        let points: Vec<_> = ours.iter().filter_map(|b| b.point.clone()).collect();
        let health = match (&disk.refusal, ours.first()) {
            (Some(refusal), _) => refusal.clone(),
            (None, Some(bitmap)) => bitmap.health.into(),
            (None, None) => "no bitmap yet".into(),
        };
        let dirty: u64 = ours.iter().filter_map(|b| b.dirty_bytes).max().unwrap_or(0);
        table.add(vec![
            disk.disk.clone(),
            human_bytes(disk.size_bytes),
            disk.file.clone().unwrap_or_default(),
            points.join(", "),
            health,
            human_bytes(dirty),
        ]);
    }
    table.print("no disks")?;
    for device in &detail.unprotected {
        output::print(&format!("unprotected: {}: {}\n", device.disk, device.why))?;
    }
    for run in &detail.leftovers {
        output::print(&format!("left by run {run}: see 'icecore doctor'\n"))?;
    }
    Ok(())
}

async fn release(context: &Context, args: &VmArgs) -> Outcome<u8> {
    let vm = Vm::from_args(context, args, "release a VM")?;
    let tried = format!("release {}", vm.name);
    let _locks = vm.lock(context, None, &tried)?;
    recovery::recover_all(context, vm.qmp()).await;
    let removed = match &vm.reach {
        Reach::Qmp { qmp, qga } => {
            let guardian = target::guard(context, qmp, qga.clone(), &tried).await?;
            release_qemu(&guardian, &tried).await?
        }
        Reach::Libvirt(domain) => {
            let mut removed = release_domain(domain, &tried)?;
            if vm.capture == CaptureForm::Direct && domain_runs(domain, &tried)? {
                let guardian = target::guard_domain(context, domain, false, &tried).await?;
                removed.extend(release_qemu(&guardian, &tried).await?);
            }
            half_written::forget(&context.state, &domain.name)?;
            removed
        }
        Reach::Images(images) => release_images(images, &tried)?,
    };
    if context.json {
        output::json(&serde_json::json!({ "vm": vm.name, "removed_bitmaps": removed }))?;
    } else {
        output::print(&format!("released {}: {} bitmaps removed\n", vm.name, removed.len()))?;
    }
    Ok(OK)
}

/// Removes all bitmaps of ours from a running QEMU.
async fn release_qemu(guardian: &GuardianClient, tried: &str) -> Outcome<Vec<String>> {
    let seen = guardian.inspect().await.map_err(|e| failure(tried, e))?;
    let on_disks = seen.inventory.disks.iter().flat_map(|disk| &disk.bitmaps);
    let stray = seen.inventory.stray_bitmaps.iter().map(|stray| stray.name.to_string());
    let names = on_disks.map(|bitmap| bitmap.name.clone()).chain(stray);
    let ours: Vec<String> = names.filter(|name| name.parse::<BitmapName>().is_ok()).collect();
    let left = guardian.forget(ours.clone()).await.map_err(|e| failure(tried, e))?.left;
    if !left.is_empty() {
        return Err(Failure::failed(tried, format!("left in QEMU: {}", left.join("; "))));
    }
    Ok(ours)
}

fn domain_runs(domain: &Domain, tried: &str) -> Outcome<bool> {
    Ok(domain.state().map_err(|e| e.failure(tried))? != State::ShutOff)
}

fn release_domain(domain: &Domain, tried: &str) -> Outcome<Vec<String>> {
    if !domain_runs(domain, tried)? {
        return release_off(domain, tried);
    }
    let checkpoints = domain.our_checkpoints(false, tried)?;
    for checkpoint in &checkpoints {
        domain.delete_checkpoint(&checkpoint.name).map_err(|e| e.failure(tried))?;
    }
    Ok(checkpoints.into_iter().map(|checkpoint| checkpoint.name).collect())
}

/// libvirt deletes no checkpoint of a domain that is off: the bitmaps go from the images, and what it
/// remembers of them.
fn release_off(domain: &Domain, tried: &str) -> Outcome<Vec<String>> {
    let removed = release_images(&PoweredOff::of(domain, CaptureForm::Job, tried)?.images, tried)?;
    for checkpoint in domain.our_checkpoints(false, tried)? {
        domain.forget_checkpoint(&checkpoint.name).map_err(|e| e.failure(tried))?;
    }
    Ok(removed)
}

fn release_images(images: &[crate::capture::image::Named], tried: &str) -> Outcome<Vec<String>> {
    let mut removed = Vec::new();
    for named in images {
        let format = named.format()?;
        image::require_unlocked(&named.path, format, tried)?;
        for bitmap in image::info(&named.path, format)?.bitmaps {
            if is_ours(&bitmap.name) {
                image::remove_bitmap(&named.path, &bitmap.name, tried)?;
                removed.push(bitmap.name);
            }
        }
    }
    Ok(removed)
}

fn is_ours(name: &str) -> bool {
    name.parse::<BitmapName>().is_ok() || name.parse::<CheckpointName>().is_ok()
}
