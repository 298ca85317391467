//! Which VM a command is about: from flags and configuration to sockets or images.

use std::path::{Path, PathBuf};

use icecore_repository::VmName;
use jiff::Timestamp;

use crate::capture::image::{Named, parse_named};
use crate::capture::qmp::known;
use crate::capture::scratch::Owner;
use crate::cli::VmArgs;
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::guardian_process;
use crate::libvirt::relay::{self, Channel};
use crate::libvirt::warden::WardenClient;
use crate::libvirt::{CaptureForm, Domain, Virsh};
use crate::state::JobId;
use crate::state::locks::{Lock, LockKey};

/// How the VM is reached.
#[derive(Debug, Clone)]
pub enum Reach {
    /// It runs.
    Qmp { qmp: PathBuf, qga: Option<PathBuf> },
    /// libvirt has it, whether it runs or not.
    Libvirt(Domain),
    /// It is off.
    Images(Vec<Named>),
}

/// A VM.
#[derive(Debug, Clone)]
pub struct Vm {
    pub name: VmName,
    pub reach: Reach,
    /// The disks that the configuration names; all when empty.
    pub disks: Vec<String>,
    /// The configured command that starts it after a rollback.
    pub restart: Vec<String>,
    /// How it is captured while it runs, where it is a domain.
    pub capture: CaptureForm,
}

impl Vm {
    /// Reads the flags. `tried` says what for.
    pub fn from_args(context: &Context, args: &VmArgs, tried: &str) -> Outcome<Self> {
        match &args.vm {
            Some(name) => Self::configured(context, name, tried),
            None => Self::in_place(args, tried),
        }
    }

    fn configured(context: &Context, name: &str, tried: &str) -> Outcome<Self> {
        let libvirt = context.config.libvirt.as_ref().filter(|libvirt| libvirt.has(name));
        let table = context.config.vm.get(name);
        let qmp = table.and_then(|vm| Some((vm.qmp.clone()?, vm.qga.clone())));
        let named = table.map(|vm| &vm.image[..]).unwrap_or_default();
        let reach = match (qmp, libvirt) {
            (Some((qmp, qga)), _) => Reach::Qmp { qmp, qga },
            (None, _) if !named.is_empty() => Reach::Images(images(named)?),
            (None, Some(libvirt)) => {
                Reach::Libvirt(Domain::find(Virsh::new(&libvirt.uri)?, name, tried)?)
            }
            (None, None) => {
                let why = format!("the configuration has no VM {name}");
                return Err(Failure::usage(tried, why)
                    .next(format!("add [vm.{name}], or name its socket with --qmp and --name")));
            }
        };
        let disks = table.map(|vm| vm.disks.clone()).unwrap_or_default();
        let restart = table.map(|vm| vm.restart.clone()).unwrap_or_default();
        let capture = table.map(|vm| vm.capture).unwrap_or_default();
        Ok(Self { name: vm_name(name, tried)?, reach, disks, restart, capture })
    }

    fn in_place(args: &VmArgs, tried: &str) -> Outcome<Self> {
        if let [uri, domain] = args.libvirt.as_slice() {
            let domain = Domain::find(Virsh::new(uri)?, domain, tried)?;
            let name = vm_name(args.name.as_ref().unwrap_or(&domain.name), tried)?;
            let (disks, restart) = (Vec::new(), Vec::new());
            let (reach, capture) = (Reach::Libvirt(domain), args.capture.unwrap_or_default());
            return Ok(Self { name, reach, disks, restart, capture });
        }
        let Some(name) = &args.name else {
            return Err(Failure::usage(tried, "no VM is named")
                .next("write a configured VM's name, --libvirt, or --name with --qmp or --image"));
        };
        let reach = match &args.qmp {
            Some(qmp) => Reach::Qmp { qmp: qmp.clone(), qga: args.qga.clone() },
            None if args.image.is_empty() => {
                let why = format!("nothing tells how to reach {name}");
                return Err(Failure::usage(tried, why).next("add --qmp SOCKET or --image FILE"));
            }
            None => Reach::Images(images(&args.image)?),
        };
        let (disks, restart, capture) = (Vec::new(), Vec::new(), CaptureForm::default());
        Ok(Self { name: vm_name(name, tried)?, reach, disks, restart, capture })
    }

    /// Its QMP socket, if it runs.
    pub fn qmp(&self) -> Option<&Path> {
        match &self.reach {
            Reach::Qmp { qmp, .. } => Some(qmp),
            Reach::Libvirt(_) | Reach::Images(_) => None,
        }
    }

    /// The locks that keep others away from this VM.
    pub fn lock_keys(&self) -> Vec<LockKey> {
        let mut keys = vec![LockKey::vm(self.name.as_str())];
        match &self.reach {
            Reach::Qmp { qmp, .. } => keys.push(LockKey::file(qmp)),
            Reach::Libvirt(domain) => keys.push(LockKey::domain(&domain.uuid)),
            Reach::Images(images) => keys.extend(images.iter().map(|i| LockKey::file(&i.path))),
        }
        keys
    }

    /// Takes them and one more, for a command that is no job: no run is at work on the VM meanwhile.
    pub fn lock(
        &self,
        context: &Context,
        more: Option<LockKey>,
        tried: &str,
    ) -> Outcome<Vec<Lock>> {
        let job = JobId::new(Timestamp::now())?;
        let keys = self.lock_keys().into_iter().chain(more);
        keys.map(|key| Lock::take(&context.state, &key, &job, tried)).collect()
    }
}

/// Starts a guardian on a QMP socket and connects it.
pub async fn guard(
    context: &Context,
    qmp: &Path,
    qga: Option<PathBuf>,
    tried: &str,
) -> Outcome<icecore_qmp::guardian::GuardianClient> {
    let lock = Lock::wait_for_guardian(&context.state, &LockKey::guardian(qmp), tried).await?;
    let guardian = guardian_process::start(vec![lock], tried)?;
    let failed = |e| crate::capture::qmp::failure(tried, e);
    let greeted = guardian.connect(qmp.to_owned(), qga).await.map_err(failed)?;
    known::learn(&guardian, &context.state, qmp, greeted).await.map_err(failed)?;
    Ok(guardian)
}

/// Starts a guardian for a domain that runs, through libvirt's monitor, and connects it. The
/// warden of an earlier run is waited for: the two are one lock.
pub async fn guard_domain(
    context: &Context,
    domain: &Domain,
    agent: bool,
    tried: &str,
) -> Outcome<icecore_qmp::guardian::GuardianClient> {
    let key = LockKey::warden(&domain.uuid);
    let lock = Lock::wait_for_guardian(&context.state, &key, tried).await?;
    let guardian = guardian_process::start(vec![lock], tried)?;
    let monitor = relay::place(domain, Channel::Monitor);
    let agent = agent.then(|| relay::place(domain, Channel::Agent));
    let failed = |e| crate::capture::qmp::failure(tried, e);
    guardian.connect(monitor, agent).await.map_err(failed)?;
    Ok(guardian)
}

/// Starts a warden for a domain; one that still undoes an earlier run is waited for.
pub async fn watch_over(context: &Context, domain: &Domain, tried: &str) -> Outcome<WardenClient> {
    let key = LockKey::warden(&domain.uuid);
    let lock = Lock::wait_for_guardian(&context.state, &key, tried).await?;
    WardenClient::start(domain, lock, tried)
}

/// The user that a QEMU process runs as now: it may have given up its rights since it began
/// (`-runas`). Nothing is known where the process is not seen from here.
pub fn qemu_user(pid: Option<i32>) -> Option<Owner> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", pid?)).ok()?;
    effective_ids(&status)
}

fn effective_ids(status: &str) -> Option<Owner> {
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name))?;
        line.split_whitespace().nth(2)?.parse().ok()
    };
    Some(Owner { uid: field("Uid:")?, gid: field("Gid:")? })
}

fn images(texts: &[String]) -> Outcome<Vec<Named>> {
    let named: Vec<Named> = texts.iter().map(|text| parse_named(text)).collect::<Outcome<_>>()?;
    for (at, image) in named.iter().enumerate() {
        if named[..at].iter().any(|other| other.id == image.id) {
            let why = format!("two images have the disk id {}", image.id);
            return Err(Failure::usage("use the images", why).next("name them apart: ID=FILE"));
        }
    }
    Ok(named)
}

fn vm_name(name: &str, tried: &str) -> Outcome<VmName> {
    VmName::new(name).map_err(|e| Failure::usage(tried, e))
}
