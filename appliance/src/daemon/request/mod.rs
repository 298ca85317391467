//! What a caller asks for, checked, and the worker's command line that it becomes.
//!
//! The worker is the same binary with the same flags as typed by hand, so that there is one code
//! path. Values go into `--flag=VALUE` arguments: none can become a flag of its own.

mod bodies;
mod line;

use std::path::Path;

use icecore_repository::VmName;

pub use self::bodies::{
    BackupBody, CheckBody, CopyBody, GcBody, InPlace, LibvirtDomain, RestoreBody, RollbackBody,
};
use self::line::Line;
use super::access::{Caller, Role};
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::names;
use crate::state::JobKind;

/// A job that may be queued.
#[derive(Debug, Clone)]
pub struct Wanted {
    pub kind: JobKind,
    pub vm: Option<String>,
    /// The repository as its directory.
    pub repository: String,
    pub point: Option<String>,
    pub label: Option<String>,
    pub arguments: Vec<String>,
}

/// The repository that a caller means. Paths are for administrators.
pub fn repository(
    context: &Context,
    caller: &Caller,
    repo: Option<&str>,
    tried: &str,
) -> Outcome<String> {
    let known = &context.config.repository;
    let Some(repo) = repo else {
        let mut names = known.keys();
        return match (names.next(), names.next()) {
            (Some(only), None) => Ok(only.clone()),
            _ => Err(Failure::usage(tried, "no repository is named")
                .next("add repo: the name of a configured repository")),
        };
    };
    if known.contains_key(repo) {
        return Ok(repo.to_owned());
    }
    if !Path::new(repo).is_absolute() {
        let why = format!("the configuration has no repository {repo:?}");
        return Err(Failure::missing(tried, why));
    }
    caller.require(Role::Administer, tried)?;
    Ok(repo.to_owned())
}

impl BackupBody {
    /// Checks it.
    pub fn wanted(&self, context: &Context, caller: &Caller, vm: &str) -> Outcome<Wanted> {
        let mut line = Line::begin(
            (context, caller),
            JobKind::Backup,
            format!("back up {vm:?}"),
            Role::Operate,
        )?;
        let repository = line.repo(self.repo.as_deref())?;
        line.word("level", self.level)?;
        if !self.disks.is_empty() && !self.exclude_disks.is_empty() {
            return Err(line.wrong("disks and exclude_disks exclude each other"));
        }
        line.disks("disk", &self.disks)?;
        line.disks("exclude-disk", &self.exclude_disks)?;
        let chain = |text: &str| {
            let parsed = text.parse::<icecore_repository::ChainId>();
            parsed.map_err(|e| e.to_string())
        };
        line.checked("chain", self.chain.as_deref(), chain)?;
        line.text("label", self.label.as_deref())?;
        line.text("description", self.description.as_deref())?;
        line.word("consistency", self.consistency)?;
        line.checked("freeze-timeout", self.freeze_timeout.as_deref(), names::duration)?;
        line.scratch(self.scratch.as_deref())?;
        line.checked("scratch-limit", self.scratch_limit.as_deref(), names::size)?;
        line.checked("rate-limit", self.rate_limit.as_deref(), names::rate)?;
        line.word("on-fallback", self.on_fallback)?;
        line.word("governor", self.governor)?;
        line.word("priority", self.priority)?;
        line.switch("paranoid", self.paranoid);
        line.switch("dry-run", self.dry_run);
        line.vm(vm, self.vm.as_ref())?;
        Ok(Wanted { vm: Some(vm.to_owned()), label: self.label.clone(), ..line.wanted(repository) })
    }
}

impl RestoreBody {
    /// Checks it. Whoever may write anywhere on the host owns it, hence the role.
    pub fn wanted(&self, context: &Context, caller: &Caller, point: &str) -> Outcome<Wanted> {
        let mut line = Line::begin(
            (context, caller),
            JobKind::Restore,
            format!("restore {point:?}"),
            Role::Administer,
        )?;
        line.point(point)?;
        let repository = line.repo(self.repo.as_deref())?;
        if self.to.is_empty() {
            return Err(line.wrong("to is empty"));
        }
        let uri = ["nbd://", "nbd+unix://", "nbds://", "nbds+unix://"];
        match uri.iter().any(|scheme| self.to.starts_with(scheme)) {
            true => line.text("to", Some(&self.to))?,
            false => line.path("to", Some(&self.to))?,
        }
        if let Some(disk) = &self.disk {
            line.disks("disk", std::slice::from_ref(disk))?;
        }
        let vm_name = |text: &str| VmName::new(text).map_err(|e| e.to_string());
        line.checked("vm", self.vm.as_deref(), vm_name)?;
        line.word("format", self.format)?;
        line.word("verify", self.verify)?;
        line.switch("force", self.force);
        line.named(point);
        Ok(Wanted { vm: self.vm.clone(), point: Some(point.to_owned()), ..line.wanted(repository) })
    }
}

impl RollbackBody {
    /// Checks it.
    pub fn wanted(&self, context: &Context, caller: &Caller, vm: &str) -> Outcome<Wanted> {
        let mut line = Line::begin(
            (context, caller),
            JobKind::Rollback,
            format!("roll {vm:?} back"),
            Role::Operate,
        )?;
        line.point(&self.to)?;
        line.text("to", Some(&self.to))?;
        let repository = line.repo(self.repo.as_deref())?;
        line.disks("disk", &self.disks)?;
        line.switch("no-safety-point", self.no_safety_point);
        line.word("verify", self.verify)?;
        line.switch("resize", self.resize);
        line.word("restart", self.restart)?;
        line.scratch(self.scratch.as_deref())?;
        line.switch("dry-run", self.dry_run);
        line.vm(vm, self.vm.as_ref())?;
        Ok(Wanted {
            vm: Some(vm.to_owned()),
            point: Some(self.to.clone()),
            ..line.wanted(repository)
        })
    }
}

impl CheckBody {
    /// Checks it.
    pub fn wanted(&self, context: &Context, caller: &Caller) -> Outcome<Wanted> {
        let mut line = Line::begin(
            (context, caller),
            JobKind::Check,
            "check a repository".into(),
            Role::Operate,
        )?;
        let repository = line.repo(self.repo.as_deref())?;
        line.switch("read-data", self.read_data);
        if let Some(sample) = self.sample {
            if self.read_data || !(0.0..=100.0).contains(&sample) {
                return Err(line.wrong("sample is a percentage, and not beside read_data"));
            }
            line.text("sample", Some(&sample.to_string()))?;
        }
        if let Some(point) = &self.point {
            line.point(point)?;
            line.named(point);
        }
        Ok(Wanted { point: self.point.clone(), ..line.wanted(repository) })
    }
}

impl GcBody {
    /// Checks it.
    pub fn wanted(&self, context: &Context, caller: &Caller) -> Outcome<Wanted> {
        let mut line =
            Line::begin((context, caller), JobKind::Gc, "collect garbage".into(), Role::Operate)?;
        let repository = line.repo(self.repo.as_deref())?;
        line.switch("dry-run", self.dry_run);
        Ok(line.wanted(repository))
    }
}

impl CopyBody {
    /// Checks it. Two repositories that are configured may be copied from and to by operators.
    pub fn wanted(&self, context: &Context, caller: &Caller) -> Outcome<Wanted> {
        let tried = || "copy points".to_owned();
        let mut line = Line::begin((context, caller), JobKind::Copy, tried(), Role::Operate)?;
        line.repo(self.repo.as_deref())?;
        let to = repository(context, caller, Some(&self.to), &tried())?;
        line.text("to", Some(&to))?;
        if let Some(vm) = &self.vm {
            VmName::new(vm).map_err(|e| line.wrong(e))?;
            line.text("vm", Some(vm))?;
        }
        let named = self.point.is_some() || self.vm.is_some();
        if self.all == named {
            return Err(line.wrong("a copy is of one point, of a vm's points, or of all"));
        }
        line.switch("all", self.all);
        if let Some(point) = &self.point {
            line.point(point)?;
            line.named(point);
        }
        let (vm, point) = (self.vm.clone(), self.point.clone());
        Ok(Wanted { vm, point, ..line.wanted(context.repository_name(&to)?) })
    }
}
