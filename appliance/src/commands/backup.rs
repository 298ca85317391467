//! `icecore backup`.

use std::path::PathBuf;

use icecore_io_engine::Priority;
use icecore_qmp::bitmap::NamePart;
use icecore_qmp::guardian::protocol::{Freeze, Then};
use icecore_repository::{DiskId, Repository, VmName};

use super::quota::of_backup;
use crate::backup::{Backup, Governed, Request, granularity};
use crate::capture::Capture;
use crate::capture::decide::Level;
use crate::capture::image::{ImageCapture, Named};
use crate::capture::libvirt::{self, DirectCapture, LibvirtCapture};
use crate::capture::qmp::{QmpCapture, Settings};
use crate::cli::OK;
use crate::cli::args::{BackupArgs, ConsistencyArg, FallbackArg, LevelArg, PriorityArg, SwitchArg};
use crate::context::Context;
use crate::daemon::client::{self, Client};
use crate::daemon::request::BackupBody;
use crate::failure::{Failure, Outcome};
use crate::image::RunDir;
use crate::interrupt::Interrupt;
use crate::job::Job;
use crate::libvirt::half_written;
use crate::libvirt::{CaptureForm, Domain, PoweredOff, State};
use crate::names::human_bytes;
use crate::output::{self, Rows};
use crate::policy::notify::{self, Event};
use crate::recovery;
use crate::report::BackupReport;
use crate::state::{IntentLog, JobKind, LibvirtRun};
use crate::target::{self, Reach, Vm};

/// Runs `icecore backup`.
pub async fn run(context: &Context, args: BackupArgs) -> Outcome<u8> {
    if context.through_daemon {
        return through_daemon(context, &args).await;
    }
    let vm = Vm::from_args(context, &args.vm, "back up a VM")?;
    let tried = format!("back up {} to {}", vm.name, args.repo.repo);
    let mut request = request(&vm, &args, &tried)?;
    let limits = [args.rate_limit, context.config.limits.rate];
    request.rate_limit = limits.into_iter().flatten().min();
    let interrupt = Interrupt::listen()?;
    let named = context.repository_name(&args.repo.repo)?;
    let mut job = Job::begin(context, JobKind::Backup, &named, &vm.lock_keys(), &tried)?;
    job.record.vm = Some(vm.name.to_string());
    // Before anything else: a guest may be waiting for it.
    recovery::recover_all(context, vm.qmp()).await;
    let repository = match context.open(&args.repo.repo) {
        Ok(repository) => repository,
        Err(failure) => return job.end(context, Err::<u8, _>(failure)),
    };
    if !args.dry_run {
        request.stored_limit = match of_backup(context, &repository, vm.name.as_str(), &tried) {
            Ok(limit) => limit,
            Err(failure) => return job.end(context, Err::<u8, _>(failure)),
        };
    }
    fill_record(&mut job, &request, &repository);
    job.note(context)?;
    let run = Run {
        context,
        repository: &repository,
        request: &request,
        interrupt: &interrupt,
        tried: &tried,
    };
    let outcome = match &vm.reach {
        Reach::Qmp { qmp, qga } => run.live(&mut job, qmp, qga.as_deref(), &args).await,
        Reach::Libvirt(domain) => run.domain(&mut job, domain, vm.capture, &args).await,
        Reach::Images(_) if args.consistency == ConsistencyArg::Filesystem => {
            Err(no_filesystems(&tried))
        }
        Reach::Images(images) => run.images(&mut job, images.clone()).await,
    };
    let unclean = outcome.as_ref().is_err_and(|failure| failure.unclean);
    let ended = job.end(context, outcome);
    if unclean {
        // In place of a guardian that died; one that still tries is left to it.
        recovery::recover_all(context, None).await;
    }
    let report = ended?;
    tell_of_fallbacks(context, &report);
    print(context, &report)?;
    Ok(OK)
}

fn tell_of_fallbacks(context: &Context, report: &BackupReport) {
    let Some(point) = &report.point else { return };
    for disk in &report.disks {
        if let Some(reason) = &disk.reason {
            let event = Event::ReadWhole { disk: &disk.disk, reason, point };
            notify::tell(context.config.notify.as_ref(), &event, Some(&report.vm));
        }
    }
}

async fn through_daemon(context: &Context, args: &BackupArgs) -> Outcome<u8> {
    let (vm, place) = client::vm(&args.vm, "back up a VM")?;
    let tried = format!("back up {vm} to {}", args.repo.repo);
    let size = |bytes: u64| bytes.to_string();
    let body = BackupBody {
        repo: Some(client::repo(context, &args.repo.repo, &tried)?),
        vm: place,
        level: Some(args.level),
        disks: args.disk.clone(),
        exclude_disks: args.exclude_disk.clone(),
        chain: args.chain.clone(),
        label: args.label.clone(),
        description: args.description.clone(),
        consistency: Some(args.consistency),
        freeze_timeout: Some(format!("{}ms", args.freeze_timeout.as_millis())),
        scratch: args.scratch.as_deref().map(|dir| client::absolute(dir, &tried)).transpose()?,
        scratch_limit: args.scratch_limit.map(size),
        rate_limit: args.rate_limit.map(size),
        on_fallback: Some(args.on_fallback),
        governor: Some(args.governor),
        priority: Some(args.priority),
        paranoid: args.paranoid,
        dry_run: args.dry_run,
    };
    let path = format!("/v1/vms/{}/backups", client::segment(&vm));
    Client::new(context, tried).run(&path, &body, |context, report| print(context, &report)).await
}

struct Run<'a> {
    context: &'a Context,
    repository: &'a Repository,
    request: &'a Request,
    interrupt: &'a Interrupt,
    tried: &'a str,
}

impl Run<'_> {
    async fn live(
        &self,
        job: &mut Job,
        qmp: &std::path::Path,
        qga: Option<&std::path::Path>,
        args: &BackupArgs,
    ) -> Outcome<BackupReport> {
        let base = self.scratch(args)?;
        job.record.qmp = Some(absolute(qmp, self.tried)?);
        job.record.qga = qga.map(|path| absolute(path, self.tried)).transpose()?;
        job.record.scratch = Some(base.join(format!("icecore-{}", job.id().run())));
        let guardian =
            target::guard(self.context, qmp, qga.map(ToOwned::to_owned), self.tried).await?;
        let freeze = freeze(args, qga.is_some(), self.tried)?;
        let settings = self.settings(job, freeze, base, args)?;
        let log = IntentLog::create(&self.context.state, job.id())?;
        let mut capture = QmpCapture::open(guardian, settings, log).await?;
        self.back_up(job, &mut capture).await
    }

    /// The directory that holds the runs' scratch directories.
    fn scratch(&self, args: &BackupArgs) -> Outcome<PathBuf> {
        let default = || self.context.state.root().join("scratch");
        absolute(&args.scratch.clone().unwrap_or_else(default), self.tried)
    }

    fn settings(
        &self,
        job: &Job,
        freeze: Freeze,
        scratch: PathBuf,
        args: &BackupArgs,
    ) -> Outcome<Settings> {
        Ok(Settings {
            run: job.id().run().parse().map_err(|e| Failure::failed(self.tried, e))?,
            freeze,
            scratch,
            scratch_limit: args.scratch_limit,
            owner: None,
            then: Then::Continue,
            granularity: granularity(self.repository),
            repository: repository_part(self.repository, self.tried)?,
            activity: job.activity(),
            interrupt: self.interrupt.clone(),
            tried: self.tried.to_owned(),
        })
    }

    async fn domain(
        &self,
        job: &mut Job,
        domain: &Domain,
        form: CaptureForm,
        args: &BackupArgs,
    ) -> Outcome<BackupReport> {
        // Also of one that was started on its mixed disks all the same: it would push good points out.
        if let Some(mark) = half_written::get(&self.context.state, &domain.name)? {
            return Err(mark.refusal(self.tried));
        }
        match domain.state().map_err(|e| e.failure(self.tried))? {
            state @ (State::Running | State::Paused) => match form {
                CaptureForm::Job => self.domain_that_runs(job, domain, args).await,
                CaptureForm::Direct => self.domain_directly(job, domain, state, args).await,
            },
            State::ShutOff if args.consistency == ConsistencyArg::Filesystem => {
                Err(no_filesystems(self.tried))
            }
            State::ShutOff => self.domain_that_is_off(job, domain, form).await,
            State::IoError => {
                let why = "libvirt has stopped the domain over a failed write";
                Err(Failure::refused(self.tried, why).next("see to its storage first"))
            }
            State::Other => {
                let why = "the domain is on its way from one state to another";
                Err(Failure::refused(self.tried, why).next("try again when it is there"))
            }
        }
    }

    async fn domain_that_runs(
        &self,
        job: &mut Job,
        domain: &Domain,
        args: &BackupArgs,
    ) -> Outcome<BackupReport> {
        let base = self.scratch(args)?;
        let freeze = match args.consistency {
            ConsistencyArg::Crash => libvirt::Freeze::No,
            ConsistencyArg::Auto => libvirt::Freeze::Try(args.freeze_timeout),
            ConsistencyArg::Filesystem => libvirt::Freeze::Require(args.freeze_timeout),
        };
        job.record.scratch = Some(base.join(format!("icecore-{}", job.id().run())));
        job.record.libvirt = Some(LibvirtRun {
            uri: domain.virsh.uri().to_owned(),
            uuid: domain.uuid.clone(),
            freezes: freeze != libvirt::Freeze::No,
            restart: false,
            form: CaptureForm::Job,
        });
        job.save(self.context)?;
        let settings = libvirt::Settings {
            run: job.id().run().to_owned(),
            freeze,
            scratch: base,
            scratch_limit: args.scratch_limit,
            activity: job.activity(),
            tried: self.tried.to_owned(),
        };
        let warden = target::watch_over(self.context, domain, self.tried).await?;
        let mut capture = LibvirtCapture::open(domain.clone(), warden, settings)?;
        self.back_up(job, &mut capture).await
    }

    /// The graph of a bare QEMU, through libvirt's monitor.
    async fn domain_directly(
        &self,
        job: &mut Job,
        domain: &Domain,
        state: State,
        args: &BackupArgs,
    ) -> Outcome<BackupReport> {
        libvirt::require_idle(domain, self.tried)?;
        let description = domain.describe(self.tried)?;
        let unfrozen = libvirt::unfreezable(state, description.agent);
        let freeze = match (args.consistency, unfrozen) {
            (ConsistencyArg::Filesystem, Some(why)) => {
                let why = format!("the guest cannot be frozen: {why}");
                return Err(Failure::failed(self.tried, why));
            }
            (_, unfrozen) => freeze(args, unfrozen.is_none(), self.tried)?,
        };
        let base = self.scratch(args)?;
        job.record.scratch = Some(base.join(format!("icecore-{}", job.id().run())));
        job.record.libvirt = Some(LibvirtRun {
            uri: domain.virsh.uri().to_owned(),
            uuid: domain.uuid.clone(),
            freezes: freeze != Freeze::No,
            restart: false,
            form: CaptureForm::Direct,
        });
        job.save(self.context)?;
        let agent = freeze != Freeze::No;
        let guardian = target::guard_domain(self.context, domain, agent, self.tried).await?;
        let owner = libvirt::owner(&description);
        let settings = Settings { owner, ..self.settings(job, freeze, base, args)? };
        let log = IntentLog::create(&self.context.state, job.id())?;
        let domain = domain.clone();
        let mut capture = DirectCapture::open(domain, description, guardian, settings, log).await?;
        self.back_up(job, &mut capture).await
    }

    async fn domain_that_is_off(
        &self,
        job: &mut Job,
        domain: &Domain,
        form: CaptureForm,
    ) -> Outcome<BackupReport> {
        let off = PoweredOff::of(domain, form, self.tried)?;
        let dir = RunDir::of(self.context, job.id())?;
        let repository = repository_part(self.repository, self.tried)?;
        let made = dir.path().map_err(|e| Failure::failed(self.tried, e))?;
        let (images, granularity) = (off.images.clone(), granularity(self.repository));
        let capture = ImageCapture::open(images, repository, granularity, made, self.tried)?;
        let mut capture = capture.of_machine(Some(off.machine.clone()));
        let report = self.back_up(job, &mut capture).await;
        if let Err(failure) = off.reconcile(self.repository, &dir, self.tried) {
            // The next point of a disk whose checkpoint is lost is a whole read.
            tracing::warn!("{failure}");
        }
        report
    }

    async fn images(&self, job: &mut Job, images: Vec<Named>) -> Outcome<BackupReport> {
        let dir = self.context.state.dir("run")?.join(job.id().run());
        let repository = repository_part(self.repository, self.tried)?;
        let granularity = granularity(self.repository);
        let mut capture = ImageCapture::open(images, repository, granularity, &dir, self.tried)?;
        self.back_up(job, &mut capture).await
    }

    async fn back_up<C: Capture>(&self, job: &mut Job, capture: &mut C) -> Outcome<BackupReport> {
        let backup = Backup {
            context: self.context,
            repository: self.repository,
            request: self.request,
            capture,
            job,
            interrupt: self.interrupt,
            pacing: self.request.pacing(),
        };
        backup.run().await
    }
}

/// The id of a repository as a part of a bitmap's name.
pub fn repository_part(repository: &Repository, tried: &str) -> Outcome<NamePart> {
    NamePart::new(repository.id().to_string()).map_err(|e| Failure::failed(tried, e))
}

/// A path that stays right for a process with another working directory.
pub fn absolute(path: &std::path::Path, tried: &str) -> Outcome<std::path::PathBuf> {
    std::path::absolute(path).map_err(|e| Failure::failed(tried, e))
}

fn no_filesystems(tried: &str) -> Failure {
    let why = "nobody can tell whether a VM that is off left its filesystems consistent";
    Failure::failed(tried, why).next("leave --consistency out, or boot the VM")
}

fn request(vm: &Vm, args: &BackupArgs, tried: &str) -> Outcome<Request> {
    let usage = |e| Failure::usage(tried, e);
    let ids = |texts: &[String]| -> Outcome<Vec<DiskId>> {
        texts.iter().map(|text| text.parse().map_err(usage)).collect()
    };
    let disks = if args.disk.is_empty() { &vm.disks } else { &args.disk };
    Ok(Request {
        vm: VmName::new(vm.name.as_str()).map_err(usage)?,
        level: match args.level {
            LevelArg::Auto => Level::Auto,
            LevelArg::Full => Level::Full,
            LevelArg::Incremental => Level::Incremental,
        },
        disks: ids(disks)?,
        exclude: ids(&args.exclude_disk)?,
        chain: args.chain.as_deref().map(str::parse).transpose().map_err(usage)?,
        label: args.label.clone(),
        description: args.description.clone(),
        rate_limit: args.rate_limit,
        stored_limit: None,
        strict: args.on_fallback == FallbackArg::Fail,
        paranoid: args.paranoid,
        dry_run: args.dry_run,
        governor: match args.governor {
            SwitchArg::On => Governed::Yes,
            SwitchArg::Off => Governed::No,
        },
        priority: match args.priority {
            PriorityArg::Low => Priority::Low,
            PriorityArg::Normal => Priority::Normal,
        },
    })
}

fn freeze(args: &BackupArgs, has_agent: bool, tried: &str) -> Outcome<Freeze> {
    let limit = u64::try_from(args.freeze_timeout.as_millis()).unwrap_or(u64::MAX);
    match (args.consistency, has_agent) {
        (ConsistencyArg::Crash, _) | (ConsistencyArg::Auto, false) => Ok(Freeze::No),
        (ConsistencyArg::Auto, true) => Ok(Freeze::Try(limit)),
        (ConsistencyArg::Filesystem, true) => Ok(Freeze::Require(limit)),
        (ConsistencyArg::Filesystem, false) => {
            let why = "a filesystem-consistent point needs the guest agent, and no --qga is given";
            Err(Failure::failed(tried, why).next("name the agent's socket with --qga"))
        }
    }
}

fn fill_record(job: &mut Job, request: &Request, repository: &Repository) {
    let record = &mut job.record;
    record.repository_id = Some(repository.id().to_string());
    record.label.clone_from(&request.label);
    record.description.clone_from(&request.description);
}

fn print(context: &Context, report: &BackupReport) -> Outcome<()> {
    if context.json {
        return output::json(report);
    }
    let consistency = &report.consistency;
    let point = report.point.as_deref().unwrap_or("nothing (dry run)");
    let mut text = format!("point {point} of {} in {:.1} s", report.vm, report.seconds);
    let level = format!("{:?}", consistency.level).to_lowercase();
    text += &format!(
        ", {level}-consistent (frozen {:.0} ms, paused {:.0} ms)\n",
        consistency.freeze_ms, consistency.pause_ms
    );
    if let Some(why) = &consistency.why {
        text += &format!("not frozen: {}\n", output::printable(why));
    }
    if let Some(governor) = report.governor.as_ref().filter(|done| done.slowed_seconds >= 0.1) {
        text += &format!("slowed down for the guest for {:.1} s", governor.slowed_seconds);
        let least = governor.least_rate_bytes.map(|rate| format!(", to {}/s", human_bytes(rate)));
        text += &(least.unwrap_or_default() + "\n");
    }
    output::print(&text)?;
    let mut table =
        Rows::new(&["disk", "mode", "reason", "size", "dirty", "read", "new", "stored"]);
    for disk in &report.disks {
        table.add(vec![
            disk.disk.clone(),
            format!("{:?}", disk.mode).to_lowercase(),
            disk.reason.clone().unwrap_or_else(|| "-".into()),
            human_bytes(disk.size_bytes),
            human_bytes(disk.dirty_bytes),
            human_bytes(disk.read_bytes),
            human_bytes(disk.new_bytes),
            human_bytes(disk.stored_bytes),
        ]);
    }
    table.print("no disks")?;
    for device in &report.unprotected {
        eprintln!("icecore: not in the point: {}: {}", device.disk, output::printable(&device.why));
    }
    Ok(())
}
