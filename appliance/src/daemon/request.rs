//! What a caller asks for, checked, and the worker's command line that it becomes.
//!
//! The worker is the same binary with the same flags as typed by hand, so that there is one code
//! path. Values go into `--flag=VALUE` arguments: none can become a flag of its own.

use std::path::Path;

use icecore_repository::{DiskId, VmName};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::access::{Caller, Role};
use crate::cli::args::{ConsistencyArg, FallbackArg, FormatArg, LevelArg, RestartArg};
use crate::cli::args::{PriorityArg, SwitchArg, VerifyRestoreArg, VerifyRollbackArg};
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::names;
use crate::state::JobKind;

/// Longer texts are no names, paths or descriptions; all of them have to fit into a command line.
const TEXT_BYTES_MAX: usize = 4096;
/// No VM has more disks; each is an argument.
const DISKS_MAX: usize = 1024;

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

/// How a VM that the configuration does not name is reached. Only administrators may say so.
#[derive(Debug, Default, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct InPlace {
    /// QMP socket, an absolute path.
    pub qmp: Option<String>,
    /// Guest agent socket, an absolute path.
    pub qga: Option<String>,
    /// A domain of this host's libvirt.
    pub libvirt: Option<LibvirtDomain>,
    /// `ID=FILE` of each disk of a VM that is off; absolute paths.
    #[serde(default)]
    pub image: Vec<String>,
}

/// A domain by its name or UUID.
#[derive(Debug, Default, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LibvirtDomain {
    /// As in `qemu:///system`.
    pub uri: String,
    pub domain: String,
}

/// Body of a backup. Everything has the default of the command.
#[derive(Debug, Default, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BackupBody {
    /// A configured repository; may be left out where there is only one.
    pub repo: Option<String>,
    /// For a VM that the configuration does not name.
    pub vm: Option<InPlace>,
    pub level: Option<LevelArg>,
    #[serde(default)]
    pub disks: Vec<String>,
    #[serde(default)]
    pub exclude_disks: Vec<String>,
    pub chain: Option<String>,
    pub label: Option<String>,
    pub description: Option<String>,
    pub consistency: Option<ConsistencyArg>,
    /// As in `5s`.
    pub freeze_timeout: Option<String>,
    /// A directory, an absolute path.
    pub scratch: Option<String>,
    /// As in `4G`.
    pub scratch_limit: Option<String>,
    /// As in `100M/s`.
    pub rate_limit: Option<String>,
    pub on_fallback: Option<FallbackArg>,
    pub governor: Option<SwitchArg>,
    pub priority: Option<PriorityArg>,
    #[serde(default)]
    pub paranoid: bool,
    #[serde(default)]
    pub dry_run: bool,
}

/// Body of a restore.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RestoreBody {
    pub repo: Option<String>,
    /// Absolute path of a file, a directory or a device, or an NBD URI.
    pub to: String,
    pub disk: Option<String>,
    /// For `latest`: of this VM.
    pub vm: Option<String>,
    pub format: Option<FormatArg>,
    #[serde(default)]
    pub force: bool,
    pub verify: Option<VerifyRestoreArg>,
}

/// Body of a rollback.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RollbackBody {
    pub repo: Option<String>,
    /// The point: an id, a unique prefix, `latest`, `latest~N`.
    pub to: String,
    /// For a VM that the configuration does not name.
    pub vm: Option<InPlace>,
    #[serde(default)]
    pub disks: Vec<String>,
    #[serde(default)]
    pub no_safety_point: bool,
    pub verify: Option<VerifyRollbackArg>,
    #[serde(default)]
    pub resize: bool,
    pub restart: Option<RestartArg>,
    pub scratch: Option<String>,
    #[serde(default)]
    pub dry_run: bool,
}

/// Body of a check.
#[derive(Debug, Default, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckBody {
    pub repo: Option<String>,
    /// Only this point.
    pub point: Option<String>,
    /// Read and decode every block.
    #[serde(default)]
    pub read_data: bool,
    /// Read and decode so many per cent of the blocks.
    pub sample: Option<f64>,
}

/// Body of a gc.
#[derive(Debug, Default, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GcBody {
    pub repo: Option<String>,
    #[serde(default)]
    pub dry_run: bool,
}

/// A command line that grows by checked values.
struct Line {
    tried: String,
    arguments: Vec<String>,
}

impl Line {
    fn new(command: &str, tried: String) -> Self {
        Self { tried, arguments: vec![command.into()] }
    }

    fn wrong(&self, why: impl std::fmt::Display) -> Failure {
        Failure::usage(&self.tried, why)
    }

    fn text(&mut self, flag: &str, value: Option<&str>) -> Outcome<()> {
        let Some(value) = value else { return Ok(()) };
        if value.len() > TEXT_BYTES_MAX {
            return Err(self.wrong(format!("{flag} is longer than {TEXT_BYTES_MAX} bytes")));
        }
        if value.contains('\0') {
            return Err(self.wrong(format!("{flag} holds a zero byte")));
        }
        self.arguments.push(format!("--{flag}={value}"));
        Ok(())
    }

    fn path(&mut self, flag: &str, value: Option<&str>) -> Outcome<()> {
        if value.is_some_and(|value| !Path::new(value).is_absolute()) {
            return Err(self.wrong(format!("{flag} must be an absolute path")));
        }
        self.text(flag, value)
    }

    fn checked<T>(
        &mut self,
        flag: &str,
        value: Option<&str>,
        check: impl Fn(&str) -> Result<T, String>,
    ) -> Outcome<()> {
        if let Some(Err(why)) = value.map(check) {
            return Err(self.wrong(format!("{flag}: {why}")));
        }
        self.text(flag, value)
    }

    fn word(&mut self, flag: &str, value: Option<impl clap::ValueEnum>) -> Outcome<()> {
        let value = value.and_then(|value| value.to_possible_value());
        self.text(flag, value.as_ref().map(|value| value.get_name()))
    }

    fn switch(&mut self, flag: &str, set: bool) {
        if set {
            self.arguments.push(format!("--{flag}"));
        }
    }

    fn disks(&mut self, flag: &str, disks: &[String]) -> Outcome<()> {
        if disks.len() > DISKS_MAX {
            return Err(self.wrong(format!("more than {DISKS_MAX} disks")));
        }
        for disk in disks {
            disk.parse::<DiskId>().map_err(|e| self.wrong(e))?;
            self.text(flag, Some(disk))?;
        }
        Ok(())
    }

    fn point(&mut self, point: &str) -> Outcome<()> {
        let fits = !point.is_empty() && point.len() <= 64;
        if fits && point.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'~') {
            return Ok(());
        }
        Err(self
            .wrong("a point is an id, a unique prefix, latest or latest~N")
            .next("see 'icecore point list'"))
    }

    /// The VM: by its configured name, or as the caller says.
    fn vm(
        &mut self,
        context: &Context,
        caller: &Caller,
        name: &str,
        place: Option<&InPlace>,
    ) -> Outcome<()> {
        VmName::new(name).map_err(|e| self.wrong(e))?;
        let Some(place) = place else {
            let libvirt = context.config.libvirt.as_ref();
            // Whether there is such a domain, the worker asks.
            let of_libvirt = libvirt.is_some_and(|libvirt| libvirt.has(name));
            if context.config.vm.contains_key(name) || of_libvirt {
                self.arguments.push("--".into());
                self.arguments.push(name.to_owned());
                return Ok(());
            }
            let why = format!("the configuration has no VM {name}");
            return Err(Failure::missing(&self.tried, why).next("see GET /v1/vms"));
        };
        caller.require(Role::Administer, &self.tried)?;
        let ways = [place.qmp.is_some(), !place.image.is_empty(), place.libvirt.is_some()];
        if ways.into_iter().filter(|way| *way).count() != 1 {
            return Err(self.wrong("a VM is reached by one of qmp, image and libvirt"));
        }
        self.text("name", Some(name))?;
        self.domain(place.libvirt.as_ref())?;
        self.path("qmp", place.qmp.as_deref())?;
        self.path("qga", place.qga.as_deref())?;
        if place.image.len() > DISKS_MAX {
            return Err(self.wrong(format!("more than {DISKS_MAX} disks")));
        }
        for image in &place.image {
            let file = image.split_once('=').map_or(image.as_str(), |(_, file)| file);
            if !Path::new(file).is_absolute() {
                return Err(self.wrong("the file of an image must be an absolute path"));
            }
            self.text("image", Some(image))?;
        }
        Ok(())
    }

    /// A flag with two values, which therefore have to be told apart from flags.
    fn domain(&mut self, domain: Option<&LibvirtDomain>) -> Outcome<()> {
        let Some(LibvirtDomain { uri, domain }) = domain else { return Ok(()) };
        for value in [uri, domain] {
            let long = value.is_empty() || value.len() > TEXT_BYTES_MAX;
            if long || value.starts_with('-') || value.contains('\0') {
                return Err(self.wrong(format!("{value:?} is no libvirt URI or domain")));
            }
        }
        self.arguments.extend(["--libvirt".into(), uri.clone(), domain.clone()]);
        Ok(())
    }

    /// The repository, and its directory.
    fn repo(&mut self, context: &Context, caller: &Caller, repo: Option<&str>) -> Outcome<String> {
        let name = repository(context, caller, repo, &self.tried)?;
        self.text("repo", Some(&name))?;
        context.repository_name(&name)
    }
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
        let mut line = Line::new("backup", format!("back up {vm:?}"));
        caller.require(Role::Operate, &line.tried)?;
        let repository = line.repo(context, caller, self.repo.as_deref())?;
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
        if self.scratch.is_some() {
            caller.require(Role::Administer, &line.tried)?;
        }
        line.path("scratch", self.scratch.as_deref())?;
        line.checked("scratch-limit", self.scratch_limit.as_deref(), names::size)?;
        line.checked("rate-limit", self.rate_limit.as_deref(), names::rate)?;
        line.word("on-fallback", self.on_fallback)?;
        line.word("governor", self.governor)?;
        line.word("priority", self.priority)?;
        line.switch("paranoid", self.paranoid);
        line.switch("dry-run", self.dry_run);
        line.vm(context, caller, vm, self.vm.as_ref())?;
        Ok(Wanted {
            kind: JobKind::Backup,
            vm: Some(vm.to_owned()),
            repository,
            point: None,
            label: self.label.clone(),
            arguments: line.arguments,
        })
    }
}

impl RestoreBody {
    /// Checks it. Whoever may write anywhere on the host owns it, hence the role.
    pub fn wanted(&self, context: &Context, caller: &Caller, point: &str) -> Outcome<Wanted> {
        let mut line = Line::new("restore", format!("restore {point:?}"));
        caller.require(Role::Administer, &line.tried)?;
        line.point(point)?;
        let repository = line.repo(context, caller, self.repo.as_deref())?;
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
        line.arguments.extend(["--".into(), point.to_owned()]);
        Ok(Wanted {
            kind: JobKind::Restore,
            vm: self.vm.clone(),
            repository,
            point: Some(point.to_owned()),
            label: None,
            arguments: line.arguments,
        })
    }
}

impl RollbackBody {
    /// Checks it.
    pub fn wanted(&self, context: &Context, caller: &Caller, vm: &str) -> Outcome<Wanted> {
        let mut line = Line::new("rollback", format!("roll {vm:?} back"));
        caller.require(Role::Operate, &line.tried)?;
        line.point(&self.to)?;
        line.text("to", Some(&self.to))?;
        let repository = line.repo(context, caller, self.repo.as_deref())?;
        line.disks("disk", &self.disks)?;
        line.switch("no-safety-point", self.no_safety_point);
        line.word("verify", self.verify)?;
        line.switch("resize", self.resize);
        line.word("restart", self.restart)?;
        if self.scratch.is_some() {
            caller.require(Role::Administer, &line.tried)?;
        }
        line.path("scratch", self.scratch.as_deref())?;
        line.switch("dry-run", self.dry_run);
        line.vm(context, caller, vm, self.vm.as_ref())?;
        Ok(Wanted {
            kind: JobKind::Rollback,
            vm: Some(vm.to_owned()),
            repository,
            point: Some(self.to.clone()),
            label: None,
            arguments: line.arguments,
        })
    }
}

impl CheckBody {
    /// Checks it.
    pub fn wanted(&self, context: &Context, caller: &Caller) -> Outcome<Wanted> {
        let mut line = Line::new("check", "check a repository".into());
        caller.require(Role::Operate, &line.tried)?;
        let repository = line.repo(context, caller, self.repo.as_deref())?;
        line.switch("read-data", self.read_data);
        if let Some(sample) = self.sample {
            if self.read_data || !(0.0..=100.0).contains(&sample) {
                return Err(line.wrong("sample is a percentage, and not beside read_data"));
            }
            line.text("sample", Some(&sample.to_string()))?;
        }
        if let Some(point) = &self.point {
            line.point(point)?;
            line.arguments.extend(["--".into(), point.clone()]);
        }
        Ok(Wanted {
            kind: JobKind::Check,
            vm: None,
            repository,
            point: self.point.clone(),
            label: None,
            arguments: line.arguments,
        })
    }
}

impl GcBody {
    /// Checks it.
    pub fn wanted(&self, context: &Context, caller: &Caller) -> Outcome<Wanted> {
        let mut line = Line::new("gc", "collect garbage".into());
        caller.require(Role::Operate, &line.tried)?;
        let repository = line.repo(context, caller, self.repo.as_deref())?;
        line.switch("dry-run", self.dry_run);
        Ok(Wanted {
            kind: JobKind::Gc,
            vm: None,
            repository,
            point: None,
            label: None,
            arguments: line.arguments,
        })
    }
}
