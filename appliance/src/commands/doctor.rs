//! `icecore doctor`: what was left behind, and its repair. Only what is ours is touched.

use std::path::{Path, PathBuf};

use icecore_qmp::bitmap::{BitmapName, NamePart, Owner};
use icecore_qmp::guardian::GuardianClient;
use icecore_qmp::guardian::protocol::Inspection;
use icecore_qmp::recover::Intents;
use icecore_repository::{PointId, Repository};
use serde::Serialize;

use crate::capture::qmp::failure;
use crate::cli::args::DoctorArgs;
use crate::cli::{DAMAGED, OK, VmArgs};
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::libvirt::checkpoint::CheckpointName;
use crate::libvirt::half_written::{self, HalfWritten};
use crate::libvirt::{CaptureForm, Domain, State, job, recover};
use crate::output::{self, Rows};
use crate::recovery;
use crate::state::jobs;
use crate::state::locks::LockKey;
use crate::target::{self, Reach, Vm};

/// Something that should not be there.
#[derive(Debug, Serialize)]
struct Finding {
    kind: &'static str,
    object: String,
    detail: String,
    repaired: bool,
}

#[derive(Debug, Serialize)]
struct DoctorReport {
    ok: bool,
    findings: Vec<Finding>,
}

/// Runs `icecore doctor`. The status is that of damage while something is left unrepaired.
pub async fn run(context: &Context, args: DoctorArgs) -> Outcome<u8> {
    let vm = match names_a_vm(&args.vm) {
        true => Some(Vm::from_args(context, &args.vm, "examine a VM")?),
        false => None,
    };
    let own = vm.as_ref().and_then(Vm::qmp);
    let mut findings = dead_runs(context, own, args.repair).await;
    let repository =
        args.repo.repo.as_deref().map(|repo| context.open_read_only(repo)).transpose()?;
    if let Some(vm) = &vm
        && let Reach::Qmp { qmp, qga } = &vm.reach
    {
        let repository = repository.as_ref();
        findings.extend(qemu(context, vm, qmp, qga.clone(), repository, args.repair).await?);
    }
    if let Some(vm) = &vm
        && let Reach::Libvirt(domain) = &vm.reach
    {
        findings.extend(libvirt(context, vm, domain, repository.as_ref(), args.repair)?);
        findings.extend(direct(context, vm, domain, repository.as_ref(), args.repair).await?);
    }
    findings.extend(scratch(context, args.repair));
    findings.extend(half_written::all(&context.state).into_iter().map(half_rolled_back));
    let ok = findings.iter().all(|finding| finding.repaired);
    let report = DoctorReport { ok, findings };
    print(context, &report)?;
    Ok(if ok { OK } else { DAMAGED })
}

/// Only a rollback ends it: nothing here knows which state is wanted.
fn half_rolled_back(mark: HalfWritten) -> Finding {
    let detail = format!("{}: run the rollback again to finish it", mark.why());
    Finding { kind: "rollback", object: mark.domain, detail, repaired: false }
}

fn names_a_vm(args: &VmArgs) -> bool {
    args.vm.is_some() || args.qmp.is_some() || !args.libvirt.is_empty() || !args.image.is_empty()
}

async fn dead_runs(context: &Context, own: Option<&Path>, repair: bool) -> Vec<Finding> {
    let finding = |job: String, detail: String, repaired| Finding {
        kind: "run",
        object: job,
        detail,
        repaired,
    };
    if !repair {
        let dead = recovery::dead_runs(context).into_iter();
        let detail = |kind| format!("a {kind:?} that ended without a word").to_lowercase();
        return dead.map(|run| finding(run.job.to_string(), detail(run.kind), false)).collect();
    }
    let recovered = recovery::recover_all(context, own).await.into_iter();
    recovered
        .map(|run| {
            let gone = run.left.is_empty();
            let detail =
                if gone { run.what } else { format!("{}: {}", run.what, run.left.join("; ")) };
            finding(run.job, detail, gone)
        })
        .collect()
}

async fn qemu(
    context: &Context,
    vm: &Vm,
    qmp: &Path,
    qga: Option<PathBuf>,
    repository: Option<&Repository>,
    repair: bool,
) -> Outcome<Vec<Finding>> {
    let tried = format!("examine {}", vm.name);
    let _locks = vm.lock(context, None, &tried)?;
    let guardian = target::guard(context, qmp, qga, &tried).await?;
    graph(context, &guardian, repository, repair, &tried).await
}

/// What runs by way of libvirt's monitor have left. Other domains' monitors are not asked: that marks
/// them as tainted.
async fn direct(
    context: &Context,
    vm: &Vm,
    domain: &Domain,
    repository: Option<&Repository>,
    repair: bool,
) -> Outcome<Vec<Finding>> {
    let tried = format!("examine {}", vm.name);
    let off = domain.state().map_err(|e| e.failure(&tried))? == State::ShutOff;
    if vm.capture != CaptureForm::Direct || off {
        return Ok(Vec::new());
    }
    let _locks = vm.lock(context, None, &tried)?;
    let guardian = target::guard_domain(context, domain, false, &tried).await?;
    graph(context, &guardian, repository, repair, &tried).await
}

/// Nodes, exports, jobs and bitmaps of runs that are over.
async fn graph(
    context: &Context,
    guardian: &GuardianClient,
    repository: Option<&Repository>,
    repair: bool,
    tried: &str,
) -> Outcome<Vec<Finding>> {
    let seen = guardian.inspect().await.map_err(|e| failure(tried, e))?;
    let mut findings = Vec::new();
    for run in &seen.leftovers {
        let mut finding = Finding {
            kind: "qemu",
            object: format!("run {run}"),
            detail: "nodes, exports or jobs of a run that is over".into(),
            repaired: false,
        };
        if repair {
            // Nothing else tells whether QEMU's NBD server is ours than our socket.
            let dir = context.state.root().join("scratch").join(format!("icecore-{run}"));
            let intents = Intents::unknown(*run).with_server_asked();
            let undone = guardian.recover(intents, Some(dir.join("nbd.sock"))).await;
            let left = undone.map_err(|e| failure(tried, e))?.left;
            finding.repaired = left.is_empty();
            if !left.is_empty() {
                finding.detail = format!("still there: {}", left.join("; "));
            }
        }
        findings.push(finding);
    }
    let orphans = orphans(&seen, repository, tried)?;
    if repair && !orphans.is_empty() {
        let names = orphans.iter().map(ToString::to_string).collect();
        guardian.forget(names).await.map_err(|e| failure(tried, e))?;
    }
    findings.extend(orphans.into_iter().map(|name| Finding {
        kind: "bitmap",
        object: name.to_string(),
        detail: format!("its point {} is gone", name.point),
        repaired: repair,
    }));
    Ok(findings)
}

/// Whether the point that a bitmap or a checkpoint names does not exist any more.
fn is_gone(repository: &Repository, point: &NamePart) -> bool {
    let Ok(id) = point.as_str().parse::<PointId>() else { return true };
    matches!(repository.point(&id), Err(icecore_repository::Error::NotFound { .. }))
}

/// Bitmaps of points of this repository that do not exist any more. Without the repository nobody
/// can tell; those of other repositories are none of our business.
fn orphans(
    seen: &Inspection,
    repository: Option<&Repository>,
    tried: &str,
) -> Outcome<Vec<BitmapName>> {
    let Some(repository) = repository else { return Ok(Vec::new()) };
    let own = NamePart::new(repository.id().to_string()).map_err(|e| Failure::failed(tried, e))?;
    let mut orphans = Vec::new();
    for bitmap in seen.inventory.disks.iter().flat_map(|disk| &disk.bitmaps) {
        let Owner::ThisRepository(name) = Owner::of(&bitmap.name, &own) else { continue };
        if is_gone(repository, &name.point) {
            orphans.push(name);
        }
    }
    Ok(orphans)
}

/// A backup job of ours that no run has any more, and checkpoints of points that are gone.
fn libvirt(
    context: &Context,
    vm: &Vm,
    domain: &Domain,
    repository: Option<&Repository>,
    repair: bool,
) -> Outcome<Vec<Finding>> {
    let tried = format!("examine {}", vm.name);
    let _locks = vm.lock(context, Some(LockKey::warden(&domain.uuid)), &tried)?;
    let mut findings = Vec::new();
    // With the locks in our hands no run is at work: a job of ours is a leftover.
    if let Some(Some(socket)) = domain.backup_job().map_err(|e| e.failure(&tried))?
        && let Some(run) = job::run_of(&socket)
    {
        if repair {
            recover::abort(domain, &socket).map_err(|e| e.failure(&tried))?;
        }
        let detail = "a backup job of a run that is over".into();
        findings.push(Finding { kind: "libvirt", object: run.into(), detail, repaired: repair });
    }
    let running = domain.state().map_err(|e| e.failure(&tried))? != State::ShutOff;
    for (name, checkpoint) in lost_checkpoints(domain, repository, &tried)? {
        if repair && running {
            domain.delete_checkpoint(&checkpoint).map_err(|e| e.failure(&tried))?;
        }
        let detail = match running {
            true => format!("its point {} is gone", name.point),
            false => format!("its point {} is gone; it goes while the domain runs", name.point),
        };
        let repaired = repair && running;
        findings.push(Finding { kind: "checkpoint", object: checkpoint, detail, repaired });
    }
    Ok(findings)
}

/// Checkpoints of points of this repository that do not exist any more.
fn lost_checkpoints(
    domain: &Domain,
    repository: Option<&Repository>,
    tried: &str,
) -> Outcome<Vec<(CheckpointName, String)>> {
    let Some(repository) = repository else { return Ok(Vec::new()) };
    let own = repository.id().to_string();
    let names = domain.checkpoint_names().map_err(|e| e.failure(tried))?.into_iter();
    let ours = names.filter_map(|text| Some((text.parse::<CheckpointName>().ok()?, text)));
    let of_it = ours.filter(|(name, _)| name.repository.as_str() == own);
    Ok(of_it.filter(|(name, _)| is_gone(repository, &name.point)).collect())
}

/// Scratch directories of the default place whose run is over.
fn scratch(context: &Context, repair: bool) -> Vec<Finding> {
    let Ok(entries) = std::fs::read_dir(context.state.root().join("scratch")) else {
        return Vec::new();
    };
    // Listed first: a run that begins from here on is not in it.
    let there: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    let unfinished: Vec<String> = jobs::all(&context.state)
        .into_iter()
        .filter(|record| !record.status.is_final())
        .map(|record| format!("icecore-{}", record.job.run()))
        .collect();
    let stale = there.into_iter().filter(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        // With its socket there, QEMU's NBD server is still ours.
        let served = path.join("nbd.sock").exists();
        name.starts_with("icecore-") && !unfinished.iter().any(|run| *run == name) && !served
    });
    stale
        .map(|path| {
            let repaired = repair && std::fs::remove_dir_all(&path).is_ok();
            let detail = "scratch of a run that is over".into();
            Finding { kind: "scratch", object: path.display().to_string(), detail, repaired }
        })
        .collect()
}

fn print(context: &Context, report: &DoctorReport) -> Outcome<()> {
    if context.json {
        return output::json(report);
    }
    let mut table = Rows::new(&["what", "object", "detail", "repaired"]);
    for finding in &report.findings {
        let repaired = if finding.repaired { "yes" } else { "no" };
        table.add(vec![
            finding.kind.into(),
            finding.object.clone(),
            finding.detail.clone(),
            repaired.into(),
        ]);
    }
    table.print("nothing was left behind")?;
    if !report.ok {
        output::print("repair with 'icecore doctor … --repair'\n")?;
    }
    Ok(())
}
