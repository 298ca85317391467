//! A worker's command line that grows by checked values.

use std::path::Path;

use icecore_repository::{DiskId, VmName};

use super::{InPlace, LibvirtDomain, Wanted, repository};
use crate::context::Context;
use crate::daemon::access::{Caller, Role};
use crate::failure::{Failure, Outcome};
use crate::libvirt::CaptureForm;
use crate::state::JobKind;

/// Longer texts are no names, paths or descriptions; all of them have to fit into a command line.
const TEXT_BYTES_MAX: usize = 4096;
/// No VM has more disks; each is an argument.
const DISKS_MAX: usize = 1024;

/// A command line that grows by checked values.
pub struct Line<'a> {
    context: &'a Context,
    caller: &'a Caller,
    kind: JobKind,
    tried: String,
    arguments: Vec<String>,
}

impl<'a> Line<'a> {
    /// Of a job's command, for a caller who may ask for it.
    pub fn begin(
        (context, caller): (&'a Context, &'a Caller),
        kind: JobKind,
        tried: String,
        role: Role,
    ) -> Outcome<Self> {
        caller.require(role, &tried)?;
        Ok(Self { context, caller, kind, tried, arguments: vec![kind.word().into()] })
    }

    /// The job that it is.
    pub fn wanted(self, repository: String) -> Wanted {
        let Self { kind, arguments, .. } = self;
        Wanted { kind, vm: None, repository, point: None, label: None, arguments }
    }

    /// A failure for what is wrong with it.
    pub fn wrong(&self, why: impl std::fmt::Display) -> Failure {
        Failure::usage(&self.tried, why)
    }

    /// `--flag=VALUE`, where there is a value.
    pub fn text(&mut self, flag: &str, value: Option<&str>) -> Outcome<()> {
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

    /// A flag with an absolute path.
    pub fn path(&mut self, flag: &str, value: Option<&str>) -> Outcome<()> {
        if value.is_some_and(|value| !Path::new(value).is_absolute()) {
            return Err(self.wrong(format!("{flag} must be an absolute path")));
        }
        self.text(flag, value)
    }

    /// A flag with a value that `check` accepts.
    pub fn checked<T>(
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

    /// A flag with one of its words.
    pub fn word(&mut self, flag: &str, value: Option<impl clap::ValueEnum>) -> Outcome<()> {
        let value = value.and_then(|value| value.to_possible_value());
        self.text(flag, value.as_ref().map(|value| value.get_name()))
    }

    /// A flag without a value.
    pub fn switch(&mut self, flag: &str, set: bool) {
        if set {
            self.arguments.push(format!("--{flag}"));
        }
    }

    /// A flag for each disk.
    pub fn disks(&mut self, flag: &str, disks: &[String]) -> Outcome<()> {
        if disks.len() > DISKS_MAX {
            return Err(self.wrong(format!("more than {DISKS_MAX} disks")));
        }
        for disk in disks {
            disk.parse::<DiskId>().map_err(|e| self.wrong(e))?;
            self.text(flag, Some(disk))?;
        }
        Ok(())
    }

    /// Checks how a point is named.
    pub fn point(&mut self, point: &str) -> Outcome<()> {
        let fits = !point.is_empty() && point.len() <= 64;
        if fits && point.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'~') {
            return Ok(());
        }
        Err(self
            .wrong("a point is an id, a unique prefix, latest or latest~N")
            .next("see 'icecore point list'"))
    }

    /// The VM: by its configured name, or as the caller says.
    pub fn vm(&mut self, name: &str, place: Option<&InPlace>) -> Outcome<()> {
        VmName::new(name).map_err(|e| self.wrong(e))?;
        let Some(place) = place else {
            let config = &self.context.config;
            let libvirt = config.libvirt.as_ref();
            // Whether there is such a domain, the worker asks.
            let of_libvirt = libvirt.is_some_and(|libvirt| libvirt.has(name));
            if config.vm.contains_key(name) || of_libvirt {
                self.named(name);
                return Ok(());
            }
            let why = format!("the configuration has no VM {name}");
            return Err(Failure::missing(&self.tried, why).next("see GET /v1/vms"));
        };
        self.caller.require(Role::Administer, &self.tried)?;
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
        let Some(LibvirtDomain { uri, domain, capture }) = domain else { return Ok(()) };
        for value in [uri, domain] {
            let long = value.is_empty() || value.len() > TEXT_BYTES_MAX;
            if long || value.starts_with('-') || value.contains('\0') {
                return Err(self.wrong(format!("{value:?} is no libvirt URI or domain")));
            }
        }
        self.arguments.extend(["--libvirt".into(), uri.clone(), domain.clone()]);
        self.text("capture", capture.map(CaptureForm::word))?;
        Ok(())
    }

    /// The repository, and its directory.
    pub fn repo(&mut self, repo: Option<&str>) -> Outcome<String> {
        let name = repository(self.context, self.caller, repo, &self.tried)?;
        self.text("repo", Some(&name))?;
        self.context.repository_name(&name)
    }

    /// Where scratch images go: a directory that only administrators name.
    pub fn scratch(&mut self, directory: Option<&str>) -> Outcome<()> {
        if directory.is_some() {
            self.caller.require(Role::Administer, &self.tried)?;
        }
        self.path("scratch", directory)
    }

    /// What the command is about, which can be no flag.
    pub fn named(&mut self, name: &str) {
        self.arguments.extend(["--".into(), name.to_owned()]);
    }
}
