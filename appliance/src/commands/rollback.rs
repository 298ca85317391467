//! `icecore rollback`.

use icecore_io_engine::Priority;
use icecore_qmp::guardian::protocol::{Freeze, Then};
use icecore_repository::{Point, Repository};
use serde::{Deserialize, Serialize};

use super::backup::{absolute, repository_part};
use super::point::find;
use crate::backup::{Governed, Request as BackupRequest, granularity};
use crate::capture::decide::Level;
use crate::capture::qmp::Settings;
use crate::cli::OK;
use crate::cli::args::{RestartArg, RollbackArgs, VerifyRollbackArg};
use crate::context::Context;
use crate::daemon::client::{self, Client};
use crate::daemon::request::RollbackBody;
use crate::failure::{Failure, Outcome};
use crate::interrupt::Interrupt;
use crate::job::Job;
use crate::names::human_bytes;
use crate::output::{self, Rows};
use crate::recovery;
use crate::rollback::{Live, Request, Rollback, RolledBack};
use crate::state::JobKind;
use crate::target::{self, Reach, Vm};

/// How long the agent may take to freeze before a rollback; it goes on without.
const FREEZE_LIMIT_MS: u64 = 5000;
/// A configured command only has to start the VM, not to wait for its services.
const RESTART_LIMIT: std::time::Duration = std::time::Duration::from_secs(120);

#[derive(Debug, Serialize, Deserialize)]
struct RollbackReport {
    point: String,
    vm: String,
    job: String,
    #[serde(flatten)]
    done: RolledBack,
    dry_run: bool,
    seconds: f64,
}

/// Runs `icecore rollback`.
pub async fn run(context: &Context, args: RollbackArgs) -> Outcome<u8> {
    if context.through_daemon {
        return through_daemon(context, &args).await;
    }
    let started = std::time::Instant::now();
    let vm = Vm::from_args(context, &args.vm, "roll a VM back")?;
    let tried = format!("roll {} back to {}", vm.name, args.to);
    let mut request = request(&args, &tried)?;
    let command = if request.restart && !args.dry_run { &vm.restart[..] } else { &[] };
    request.restart &= command.is_empty();
    let interrupt = Interrupt::listen()?;
    let named = context.repository_name(&args.repo.repo)?;
    let mut job = Job::begin(context, JobKind::Rollback, &named, &vm.lock_keys(), &tried)?;
    job.record.vm = Some(vm.name.to_string());
    // Before anything else: a guest may be waiting for it.
    recovery::recover_all(context, vm.qmp()).await;
    let found = context.open(&args.repo.repo).and_then(|repository| {
        let point = find(&repository, &args.to, Some(vm.name.as_str()), &tried)?;
        Ok((repository, point))
    });
    let (repository, point) = match found {
        Ok(found) => found,
        Err(failure) => return job.end(context, Err::<u8, _>(failure)),
    };
    job.record.repository_id = Some(repository.id().to_string());
    job.record.point = Some(point.id.to_string());
    job.save(context)?;
    let outcome = dispatch(
        context,
        &repository,
        &point,
        &request,
        &mut job,
        &interrupt,
        (&vm, &args),
        &tried,
    )
    .await;
    let outcome = match outcome {
        Ok(done) if !command.is_empty() => restarted(done, command, &tried).await,
        other => other,
    };
    let id = job.id().to_string();
    let (point, name, dry_run) = (point.id.to_string(), vm.name.to_string(), args.dry_run);
    let seconds = started.elapsed().as_secs_f64();
    let outcome =
        outcome.map(|done| RollbackReport { point, vm: name, job: id, done, dry_run, seconds });
    let unclean = outcome.as_ref().is_err_and(|failure| failure.unclean);
    let ended = job.end(context, outcome);
    if unclean {
        // In place of a guardian that died; one that still tries is left to it.
        recovery::recover_all(context, None).await;
    }
    print(context, ended?)?;
    Ok(OK)
}

async fn restarted(done: RolledBack, command: &[String], tried: &str) -> Outcome<RolledBack> {
    restart(command, tried).await?;
    Ok(RolledBack { vm_restarted: true, ..done })
}

/// Starts the VM as the configuration says.
async fn restart(command: &[String], tried: &str) -> Outcome<()> {
    let Some((program, arguments)) = command.split_first() else { return Ok(()) };
    let failed = |why: String| {
        let why = format!("the disks are rolled back and verified, but {program}: {why}");
        Failure::failed(tried, why).next("start the VM by hand; nothing has to be written again")
    };
    let mut process = tokio::process::Command::new(program);
    process.args(arguments).stdin(std::process::Stdio::null()).kill_on_drop(true);
    process.stdout(std::process::Stdio::null());
    match tokio::time::timeout(RESTART_LIMIT, process.status()).await {
        Ok(Ok(status)) if status.success() => Ok(()),
        Ok(Ok(status)) => Err(failed(format!("it ended with {status}"))),
        Ok(Err(error)) => Err(failed(error.to_string())),
        Err(_) => Err(failed(format!("it did not end within {} s", RESTART_LIMIT.as_secs()))),
    }
}

async fn through_daemon(context: &Context, args: &RollbackArgs) -> Outcome<u8> {
    let (vm, place) = client::vm(&args.vm, "roll a VM back")?;
    let tried = format!("roll {vm} back to {}", args.to);
    let body = RollbackBody {
        repo: Some(client::repo(context, &args.repo.repo, &tried)?),
        to: args.to.clone(),
        vm: place,
        disks: args.disk.clone(),
        no_safety_point: args.no_safety_point,
        verify: Some(args.verify),
        resize: args.resize,
        restart: Some(args.restart),
        scratch: args.scratch.as_deref().map(|dir| client::absolute(dir, &tried)).transpose()?,
        dry_run: args.dry_run,
    };
    let path = format!("/v1/vms/{}/rollback", client::segment(&vm));
    Client::new(context, tried).run(&path, &body, print).await
}

#[allow(clippy::too_many_arguments)] // One call, from one place.
async fn dispatch(
    context: &Context,
    repository: &Repository,
    point: &Point,
    request: &Request,
    job: &mut Job,
    interrupt: &Interrupt,
    (vm, args): (&Vm, &RollbackArgs),
    tried: &str,
) -> Outcome<RolledBack> {
    let safety = safety_request(vm, point);
    let live = match &vm.reach {
        Reach::Images(_) | Reach::Libvirt(_) => None,
        Reach::Qmp { qmp, qga } => {
            let (qga, interrupt) = (qga.as_deref(), interrupt);
            Some(live(context, repository, job, qmp, qga, args, interrupt, tried).await?)
        }
    };
    let (machine, mark) = (None, None);
    let mut rollback =
        Rollback { context, repository, point, request, job, interrupt, machine, mark, tried };
    match (&vm.reach, live) {
        (Reach::Libvirt(domain), _) => {
            let warden = target::watch_over(context, domain, tried).await?;
            rollback.domain(domain, vm.capture, warden, safety).await
        }
        (Reach::Images(images), _) => rollback.images(images, safety).await,
        (_, Some(live)) => rollback.live(live, safety).await,
        (_, None) => Err(Failure::failed(tried, "the VM cannot be reached")),
    }
}

#[allow(clippy::too_many_arguments)] // One call, from one place.
async fn live(
    context: &Context,
    repository: &Repository,
    job: &mut Job,
    qmp: &std::path::Path,
    qga: Option<&std::path::Path>,
    args: &RollbackArgs,
    interrupt: &Interrupt,
    tried: &str,
) -> Outcome<Live> {
    let scratch = match &args.scratch {
        Some(dir) => absolute(dir, tried)?,
        None => absolute(&context.state.root().join("scratch"), tried)?,
    };
    job.record.qmp = Some(absolute(qmp, tried)?);
    job.record.qga = qga.map(|path| absolute(path, tried)).transpose()?;
    job.record.scratch = Some(scratch.join(format!("icecore-{}", job.id().run())));
    job.save(context)?;
    let guardian = target::guard(context, qmp, qga.map(ToOwned::to_owned), tried).await?;
    let run = job.id().run().parse().map_err(|e| Failure::failed(tried, e))?;
    let freeze = if qga.is_some() { Freeze::Try(FREEZE_LIMIT_MS) } else { Freeze::No };
    let settings = Settings {
        run,
        freeze: if args.dry_run { Freeze::No } else { freeze },
        scratch: scratch.clone(),
        scratch_limit: None,
        owner: None,
        then: if args.dry_run { Then::Continue } else { Then::Hold },
        granularity: granularity(repository),
        repository: repository_part(repository, tried)?,
        activity: job.activity(),
        interrupt: interrupt.clone(),
        tried: tried.to_owned(),
    };
    Ok(Live { guardian, run, scratch, settings })
}

fn request(args: &RollbackArgs, tried: &str) -> Outcome<Request> {
    let ids = args.disk.iter().map(|id| id.parse().map_err(|e| Failure::usage(tried, e)));
    Ok(Request {
        disks: ids.collect::<Outcome<_>>()?,
        safety_point: !args.no_safety_point,
        verify_full: args.verify == VerifyRollbackArg::Full,
        resize: args.resize,
        restart: args.restart != RestartArg::None,
        dry_run: args.dry_run,
    })
}

/// The safety point holds what is there now, so that a rollback can be rolled back.
fn safety_request(vm: &Vm, point: &Point) -> BackupRequest {
    BackupRequest {
        vm: vm.name.clone(),
        level: Level::Auto,
        disks: Vec::new(),
        exclude: Vec::new(),
        chain: None,
        label: Some("safety".into()),
        description: Some(format!("before the rollback to {}", point.id)),
        rate_limit: None,
        // What a rollback would destroy is kept whatever the quota.
        stored_limit: None,
        // The guest stands still and waits for this point.
        governor: Governed::No,
        priority: Priority::Normal,
        strict: false,
        paranoid: false,
        dry_run: false,
    }
}

fn print(context: &Context, report: RollbackReport) -> Outcome<()> {
    if context.json {
        return output::json(&report);
    }
    let verb = if report.dry_run { "would roll" } else { "rolled" };
    let mut text =
        format!("{verb} {} back to {} in {:.1} s", report.vm, report.point, report.seconds);
    if let Some(safety) = &report.done.safety_point {
        text += &format!("; what was there is point {safety}");
    }
    text += if report.done.vm_restarted { "; the VM runs again\n" } else { "\n" };
    output::print(&text)?;
    let mut table = Rows::new(&["disk", "differing", "written", "verified", "seconds"]);
    for disk in report.done.disks {
        table.add(vec![
            disk.disk,
            human_bytes(disk.differing_bytes),
            human_bytes(disk.written_bytes),
            if disk.verified { "yes" } else { "no" }.into(),
            format!("{:.1}", disk.seconds),
        ]);
    }
    table.print("no disks")?;
    for disk in report.done.left_alone {
        eprintln!("icecore: left alone: disk {disk} is not part of this rollback");
    }
    Ok(())
}
