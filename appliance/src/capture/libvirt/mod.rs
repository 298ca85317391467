//! The capture of a running domain of libvirt: its backup job in pull mode, with a checkpoint.
//!
//! libvirt's form is a job for each disk: what the guest overwrites goes to scratch first, and a
//! scratch that is full stops the guest. So there must be room for whole disks, and a warden ends the
//! job long before that, whatever becomes of this process.

mod begin;
mod direct;

pub use direct::{DirectCapture, require_idle, unfreezable};

use std::ops::Range;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use icecore_qmp::bitmap::{Bitmap, Granularity, NamePart};
use icecore_qmp::inventory::Identity;
use icecore_repository::CapsulePart;
use jiff::Timestamp;

use super::scratch::{Owner, ScratchDir};
use super::{Base, Capture, Data, DirtyMap, Fate, Readable, Recorder, SeenDisk, Taken, Task};
use crate::data::Activity;
use crate::failure::{Failure, Outcome};
use crate::libvirt::checkpoint::{self, Checkpoint, CheckpointName};
use crate::libvirt::job;
use crate::libvirt::warden::WardenClient;
use crate::libvirt::xml::{Description, DomainDisk};
use crate::libvirt::{Domain, State, capsule, emulator, recover};
use crate::nbd::{self, Peer};
use crate::report::Unprotected;

/// Whether the guest is frozen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Freeze {
    No,
    Try(Duration),
    Require(Duration),
}

/// What a capture of a domain needs to know.
#[derive(Debug)]
pub struct Settings {
    /// Names the run's scratch directory.
    pub run: String,
    pub freeze: Freeze,
    pub scratch: PathBuf,
    pub scratch_limit: Option<u64>,
    pub activity: Activity,
    pub tried: String,
}

/// The capture.
#[derive(Debug)]
pub struct LibvirtCapture {
    domain: Domain,
    settings: Settings,
    warden: WardenClient,
    description: Description,
    capsule: serde_json::Value,
    parts: Vec<CapsulePart>,
    was_running: bool,
    disks: Vec<SeenDisk>,
    tasks: Vec<Task>,
    scratch: Option<ScratchDir>,
    /// A job of ours may be there.
    job: bool,
    checkpoint: Option<CheckpointName>,
    /// Ends the task that sends pulses when it is dropped.
    pulse: Option<tokio::task::JoinHandle<()>>,
}

impl LibvirtCapture {
    /// Looks at a domain that runs. A backup job of somebody else is refused.
    pub fn open(domain: Domain, warden: WardenClient, settings: Settings) -> Outcome<Self> {
        let tried = settings.tried.clone();
        require_no_job(&domain, &tried)?;
        let description = domain.describe(&tried)?;
        let capacities = domain.capacities().map_err(|e| e.failure(&tried))?;
        let checkpoints = domain.our_checkpoints(true, &tried)?;
        let emulator = emulator::of_running(&domain);
        let seen = |disk: &DomainDisk| {
            let size = capacities.get(&disk.target).copied();
            seen(disk, size, &checkpoints, emulator.as_ref(), &tried)
        };
        let state = domain.state().map_err(|e| e.failure(&tried))?;
        Ok(Self {
            disks: description.disks.iter().map(seen).collect::<Outcome<_>>()?,
            capsule: capsule::of(&domain, &description, emulator.as_ref(), &tried)?,
            parts: Vec::new(),
            was_running: state == State::Running,
            domain,
            settings,
            warden,
            description,
            tasks: Vec::new(),
            scratch: None,
            job: false,
            checkpoint: None,
            pulse: None,
        })
    }

    fn target(&self, task: &Task) -> &DomainDisk {
        &self.description.disks[task.index]
    }

    /// Targets of the domain that are in `tasks`, and those that are not.
    fn split_targets(&self, wanted: impl Fn(&Task) -> bool) -> (Vec<&str>, Vec<&str>) {
        let chosen =
            |index: usize| self.tasks.iter().any(|task| task.index == index && wanted(task));
        let (mut inside, mut outside) = (Vec::new(), Vec::new());
        for (index, disk) in self.description.disks.iter().enumerate() {
            let side = if chosen(index) { &mut inside } else { &mut outside };
            side.push(disk.target.as_str());
        }
        (inside, outside)
    }

    fn socket(&self) -> PathBuf {
        let dir = self.scratch.as_ref().map(ScratchDir::path);
        dir.unwrap_or(&self.settings.scratch).join("nbd.sock")
    }

    /// Ends our job and waits until it is gone. One that somebody else has begun since is left.
    fn end_job(&mut self) -> Outcome<()> {
        if !self.job {
            return Ok(());
        }
        if let Err(e) = recover::abort(&self.domain, &self.socket()) {
            return Err(self.left(&e.to_string()));
        }
        self.stop_pulse();
        self.job = false;
        self.scratch = None;
        self.warden.ended(&self.settings.tried)
    }

    fn stop_pulse(&mut self) {
        if let Some(pulse) = self.pulse.take() {
            pulse.abort();
        }
    }

    /// The warden goes on trying when this process is gone.
    fn left(&mut self, why: &str) -> Failure {
        if let Some(scratch) = &mut self.scratch {
            scratch.keep();
        }
        Failure::failed(&self.settings.tried, why).unclean()
    }

    fn delete_checkpoints(&self, names: &[String]) -> Outcome<()> {
        let deleted = names.iter().map(|name| self.domain.delete_checkpoint(name));
        let all: Result<Vec<()>, _> = deleted.collect();
        all.map(drop).map_err(|e| e.failure(&self.settings.tried).unclean())
    }
}

impl Capture for LibvirtCapture {
    fn disks(&self) -> &[SeenDisk] {
        &self.disks
    }

    fn unprotected(&self) -> Vec<Unprotected> {
        let devices = self.description.unprotected.iter().cloned();
        devices.map(|(disk, why)| Unprotected { disk, why }).collect()
    }

    fn capsule(&self) -> serde_json::Value {
        self.capsule.clone()
    }

    fn parts(&self) -> Vec<CapsulePart> {
        self.parts.clone()
    }

    async fn take(&mut self, tasks: &[Task]) -> Outcome<Taken> {
        self.tasks = tasks.to_vec();
        let prepared = self.prepare()?;
        let started = Instant::now();
        let frozen = self.freeze()?;
        let begun = self.begin(&prepared);
        let captured_at = Timestamp::now();
        let frozen = self.thaw(frozen, started);
        begun?;
        self.parts = capsule::parts(&self.domain, &self.description);
        self.pulse = Some(self.warden.start_pulse(self.settings.activity.clone()));
        let (consistency, thawed) = frozen;
        thawed?;
        Ok(Taken { captured_at, consistency })
    }

    async fn open(
        &mut self,
        at: usize,
        base: Option<&Base>,
        _samples: &[Range<u64>],
    ) -> Outcome<Readable> {
        let target = self.target(&self.tasks[at]).target.clone();
        let peer = Peer::of_qemu(&self.socket(), &target, &self.warden);
        let bitmap = base.map(|_| job::export_bitmap(&target));
        let tried = format!("read disk {target} of {}", self.domain.name);
        let control = nbd::control(&peer, bitmap.as_deref(), &tried).await?;
        let size_bytes = control.export().size_bytes;
        control.disconnect().await.map_err(|e| Failure::failed(&tried, e))?;
        let seen = self.disks[self.tasks[at].index].size_bytes;
        if size_bytes < seen {
            let why = format!("the disk shrank from {seen} to {size_bytes} bytes");
            return Err(Failure::failed(tried, why).next("take the backup again"));
        }
        let dirty = bitmap.map(|bitmap| DirtyMap::Export { bitmap });
        Ok(Readable { data: Data::Export(peer), dirty, size_bytes })
    }

    async fn lost(&self) -> Option<String> {
        let by_warden = self.warden.why();
        by_warden.or_else(|| match self.domain.backup_job() {
            Ok(Some(Some(socket))) if socket == self.socket() => None,
            Ok(_) => Some("the backup job was ended from outside, or the domain stopped".into()),
            Err(e) => Some(e.to_string()),
        })
    }

    async fn release(&mut self) -> Outcome<()> {
        let why = self.lost().await;
        self.end_job()?;
        match why {
            None => Ok(()),
            Some(why) => Err(Failure::failed(&self.settings.tried, why)),
        }
    }

    async fn settle(&mut self, fate: Fate) -> Outcome<()> {
        self.end_job()?;
        let Some(new) = self.checkpoint.clone() else { return Ok(()) };
        match fate {
            // Both stay until the repository has been asked.
            Fate::Unknown => Ok(()),
            Fate::NotCommitted => self.delete_checkpoints(&[new.to_string()]),
            Fate::Committed => {
                let all = self.domain.our_checkpoints(false, &self.settings.tried)?;
                let covered = all.iter().find(|one| one.name == new.to_string());
                let covered: Vec<String> = covered
                    .map(|one| one.disks.iter().map(|disk| disk.target.clone()).collect())
                    .unwrap_or_default();
                self.delete_checkpoints(&checkpoint::superseded(&all, &new, &covered))
            }
        }
    }
}

impl Drop for LibvirtCapture {
    fn drop(&mut self) {
        self.stop_pulse();
    }
}

/// One job at a time is what libvirt allows; the leftover of a run of ours is ended by recovery.
fn require_no_job(domain: &Domain, tried: &str) -> Outcome<()> {
    match domain.backup_job().map_err(|e| e.failure(tried))? {
        None => Ok(()),
        Some(_) => Err(Failure::refused(tried, "a backup job is at work on the domain")
            .next("wait for it, or see 'virsh domjobinfo' and 'icecore doctor'")),
    }
}

fn seen(
    disk: &DomainDisk,
    size: Option<u64>,
    checkpoints: &[Checkpoint],
    emulator: Option<&emulator::Version>,
    tried: &str,
) -> Outcome<SeenDisk> {
    let failed = |e: &dyn std::fmt::Display| Failure::failed(tried, e);
    let id: icecore_repository::DiskId = disk.target.parse().map_err(|e| failed(&e))?;
    let part = NamePart::new(disk.target.as_str()).map_err(|e| failed(&e))?;
    let bitmap = |checkpoint: &Checkpoint| {
        let name: CheckpointName = checkpoint.name.parse().ok()?;
        let dirty = checkpoint.disk(&disk.target)?.dirty_bytes;
        Some(Bitmap {
            name: name.bitmap(part.clone()).to_string(),
            granularity_bytes: Granularity::DEFAULT.bytes(),
            dirty_bytes: dirty.unwrap_or(0),
            recording: dirty.is_some(),
            busy: false,
            persistent: true,
            inconsistent: dirty.is_none(),
        })
    };
    let refusal = disk.refusal.clone().or_else(|| match (size, disk.iothread) {
        (None | Some(0), _) => Some("libvirt does not tell its size".into()),
        (_, true) => emulator::refusal_of_iothread(emulator),
        _ => None,
    });
    Ok(SeenDisk {
        id,
        size_bytes: size.unwrap_or(0),
        identity: Identity(disk.identity()),
        partial_identity: false,
        bitmaps: checkpoints.iter().filter_map(bitmap).collect(),
        records: disk.format == Some(crate::image::Format::Qcow2),
        recorder: Recorder::Libvirt,
        refusal,
        read_only: disk.read_only,
    })
}

/// The user that a domain's QEMU runs as, where libvirt says so.
pub fn owner(description: &Description) -> Option<Owner> {
    description.owner.map(|(uid, gid)| Owner { uid, gid })
}
