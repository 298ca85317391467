//! The capture of a running VM through its QMP socket, by way of the guardian.

pub mod known;
mod push;

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use icecore_qmp::bitmap::{Granularity, NamePart, Owner};
use icecore_qmp::capture::RunId;
use icecore_qmp::capture::plan::{Base as GuardianBase, DiskPlan, NewBitmap, Scratch};
use icecore_qmp::features::Features;
use icecore_qmp::guardian::GuardianClient;
use icecore_qmp::guardian::protocol::{
    ErrorKind, Expose, ExposeDisk, Exposed, Form, Freeze, GuardianError, InstantPlan,
    InstantReport, Prepare, Then,
};
use icecore_qmp::inventory::{Disk, Inventory, Refusal};
use icecore_qmp::recover::{CommitState, Intents};
use icecore_repository::{Consistency, ConsistencyLevel};
use jiff::Timestamp;
use serde_json::json;

use super::scratch::{Owner as User, ScratchDir};
use super::{Base, Capture, Data, DirtyMap, Fate, Readable, Recorder, SeenDisk, Taken, Task};
use crate::data::Activity;
use crate::failure::{Failure, Outcome, Status};
use crate::governor::Guest;
use crate::interrupt::Interrupt;
use crate::nbd::Peer;
use crate::report::Unprotected;
use crate::state::IntentLog;

/// How often the guardian is told that the worker lives. It acts after 2 s.
const PULSE_INTERVAL: Duration = Duration::from_millis(200);

/// What a capture of a running VM needs to know.
#[derive(Debug)]
pub struct Settings {
    pub run: RunId,
    pub freeze: Freeze,
    pub scratch: PathBuf,
    pub scratch_limit: Option<u64>,
    /// Who QEMU runs as, where somebody knows; else its process is looked at.
    pub owner: Option<User>,
    pub then: Then,
    pub granularity: Granularity,
    pub repository: NamePart,
    pub activity: Activity,
    pub interrupt: Interrupt,
    pub tried: String,
}

/// The capture.
pub struct QmpCapture {
    guardian: GuardianClient,
    settings: Settings,
    inventory: Inventory,
    features: Features,
    was_running: bool,
    guest: Guest,
    /// Who QEMU runs as, when that is known.
    user: Option<User>,
    disks: Vec<SeenDisk>,
    tasks: Vec<Task>,
    intents: Intents,
    log: IntentLog,
    scratch: Option<ScratchDir>,
    exposed: Option<Exposed>,
    /// Ends the task that sends pulses when it is dropped.
    pulse: Option<tokio::task::JoinHandle<()>>,
}

impl QmpCapture {
    /// Looks at the VM behind `guardian`, which is connected.
    pub async fn open(
        guardian: GuardianClient,
        settings: Settings,
        log: IntentLog,
    ) -> Outcome<Self> {
        let failed = |e| failure(&settings.tried, e);
        let guest = Guest::meet(guardian.clone()).await;
        let mut inspection = guardian.inspect().await.map_err(failed)?;
        if !inspection.leftovers.is_empty() {
            take_out_leftovers(&guardian, &inspection.leftovers, &settings).await?;
            inspection = guardian.inspect().await.map_err(failed)?;
        }
        let refused = |e| Failure::refused(&settings.tried, e);
        inspection.features.check().map_err(refused)?;
        let inventory = inspection.inventory;
        let intents = Intents::new(settings.run);
        Ok(Self {
            guardian,
            disks: inventory.disks.iter().map(seen).collect::<Outcome<_>>()?,
            inventory,
            user: settings.owner.or_else(|| crate::target::qemu_user(inspection.peer)),
            features: inspection.features,
            was_running: inspection.running,
            guest,
            settings,
            tasks: Vec::new(),
            intents,
            log,
            scratch: None,
            exposed: None,
            pulse: None,
        })
    }

    /// What is captured.
    pub fn tasks(&self) -> &[Task] {
        &self.tasks
    }

    /// Who QEMU runs as, when that is known.
    pub fn user(&self) -> Option<User> {
        self.user
    }

    fn failed(&self, error: GuardianError) -> Failure {
        failure(&self.settings.tried, error)
    }

    /// What is about to be done is on record before it is done.
    fn record(&mut self) -> Outcome<()> {
        self.log.record(&self.intents)
    }

    fn disk(&self, task: &Task) -> &Disk {
        &self.inventory.disks[task.index]
    }

    async fn prepare(&mut self) -> Outcome<()> {
        let run = self.settings.run.to_string();
        let scratch = ScratchDir::make(&self.settings.scratch, &run, self.user)?;
        let sizes: Vec<u64> = self.tasks.iter().map(|task| self.disk(task).size_bytes).collect();
        let files = scratch.files(&sizes, self.settings.scratch_limit)?;
        let plans = self.tasks.iter().zip(files).map(|(task, file)| {
            let scratch = Scratch { path: file.path, cap_bytes: file.cap_bytes };
            let bitmap = task.bitmap.as_ref().map(|name| NewBitmap {
                name: name.to_string(),
                granularity: self.settings.granularity,
            });
            DiskPlan::new(self.disk(task), scratch, bitmap)
        });
        let prepare = Prepare {
            run: self.settings.run,
            disks: plans.collect(),
            server_socket: scratch.path().join("nbd.sock"),
            scratch_dir: scratch.path().to_owned(),
        };
        self.scratch = Some(scratch);
        self.intents = Intents::before_prepare(&prepare);
        self.record()?;
        self.guardian.prepare(prepare).await.map_err(|e| self.failed(e))?;
        Ok(())
    }

    /// Writes back what the host still caches of the images, so that QEMU's own flush, for which
    /// the guest waits, finds little left. A file that cannot be opened here costs only time.
    fn flush_images(&self) {
        for task in &self.tasks {
            for layer in &self.disk(task).layers {
                if let Ok(file) = std::fs::File::open(&layer.file) {
                    let _ = file.sync_data();
                }
            }
        }
    }

    async fn instant(&mut self) -> Outcome<InstantReport> {
        let freezes = self.settings.freeze != Freeze::No;
        self.intents = self.intents.clone().with_instant(self.was_running, freezes);
        self.record()?;
        let plan = InstantPlan { freeze: self.settings.freeze, then: self.settings.then };
        let report = self.guardian.instant(plan).await.map_err(|e| self.failed(e))?;
        if self.settings.then == Then::Continue {
            self.intents = self.intents.clone().after_instant(&report);
        }
        self.intents = self.intents.clone().with_server_asked();
        self.record()?;
        Ok(report)
    }

    async fn expose(&mut self) -> Outcome<()> {
        let disks = self.tasks.iter().map(|task| ExposeDisk {
            form: self.form(task),
            base: task.base.as_ref().map(guardian_base),
        });
        let expose = Expose { disks: disks.collect(), trim: true };
        self.pulse = Some(start_pulse(&self.guardian, self.settings.activity.clone()));
        let exposed = self.guardian.expose(expose).await.map_err(|e| self.failed(e))?;
        self.exposed = Some(exposed);
        Ok(())
    }

    fn form(&self, task: &Task) -> Form {
        Form::safe_for(self.disk(task), &self.features)
    }

    fn stop_pulse(&mut self) {
        if let Some(pulse) = self.pulse.take() {
            pulse.abort();
        }
    }

    fn server_socket(&self) -> PathBuf {
        let scratch = self.scratch.as_ref().map(ScratchDir::path);
        scratch.unwrap_or(&self.settings.scratch).join("nbd.sock")
    }

    fn consistency(&self, report: &InstantReport) -> Consistency {
        let frozen = report.frozen_filesystems.and_then(|count| u32::try_from(count).ok());
        let level = match frozen {
            Some(1..) => ConsistencyLevel::Filesystem,
            _ => ConsistencyLevel::Crash,
        };
        let none_frozen = || "the agent found no filesystem to freeze".to_owned();
        let why = match (level, &report.why_not_frozen) {
            (ConsistencyLevel::Filesystem, _) => None,
            _ if self.settings.freeze == Freeze::No => {
                Some("no freeze was asked for, or no guest agent was named".into())
            }
            (_, Some(why)) => Some(why.clone()),
            (_, None) => Some(none_frozen()),
        };
        Consistency {
            level,
            frozen_filesystems: frozen.unwrap_or(0),
            freeze_ms: report.freeze_ms,
            pause_ms: report.pause_ms,
            why,
        }
    }
}

impl Capture for QmpCapture {
    fn disks(&self) -> &[SeenDisk] {
        &self.disks
    }

    fn unprotected(&self) -> Vec<Unprotected> {
        let unseen = self.inventory.unprotected.iter();
        unseen
            .map(|device| Unprotected { disk: device.id.clone(), why: device.why.clone() })
            .collect()
    }

    fn capsule(&self) -> serde_json::Value {
        json!({ "source": "qmp", "qemu_version": self.features.version.to_string(), "machine": self.inventory })
    }

    async fn take(&mut self, tasks: &[Task]) -> Outcome<Taken> {
        self.tasks = tasks.to_vec();
        self.prepare().await?;
        self.flush_images();
        let report = self.instant().await?;
        self.expose().await?;
        let captured = i64::try_from(report.captured_unix_ms)
            .ok()
            .and_then(|ms| Timestamp::from_millisecond(ms).ok())
            .unwrap_or_else(Timestamp::now);
        Ok(Taken { captured_at: captured, consistency: self.consistency(&report) })
    }

    async fn open(
        &mut self,
        at: usize,
        base: Option<&Base>,
        samples: &[Range<u64>],
    ) -> Outcome<Readable> {
        let exposed = self.exposed.as_ref().and_then(|exposed| exposed.disks.get(at)).cloned();
        let Some(disk) = exposed else {
            return Err(Failure::failed(&self.settings.tried, "the disk is not exposed"));
        };
        let uri = disk.export.as_ref();
        let uri = uri.map(|e| Peer::of_qemu(&self.server_socket(), e, &self.guardian));
        let bitmap = base.and_then(|_| dirty_name(disk.dirty_context.as_deref()));
        let (data, dirty) = match (disk.form, uri) {
            (Form::Pull, Some(uri)) => {
                (Data::Export(uri), bitmap.map(|bitmap| DirtyMap::Export { bitmap }))
            }
            (Form::Pull, None) => {
                return Err(Failure::failed(&self.settings.tried, "the disk has no export"));
            }
            (Form::Push, map) => {
                // Its export ends with the push.
                let listed = match (map, &bitmap) {
                    (Some(map), Some(bitmap)) => Some(
                        push::list_dirty(&map, bitmap, disk.size_bytes, &self.settings.tried)
                            .await?,
                    ),
                    _ => None,
                };
                let data = self.receive(at, &disk, base, samples).await?;
                (data, listed.map(|ranges| DirtyMap::Listed(Arc::new(ranges))))
            }
        };
        Ok(Readable { data, dirty, size_bytes: disk.size_bytes })
    }

    fn guest(&self) -> Option<Guest> {
        let runs_on = self.was_running && self.settings.then == Then::Continue;
        runs_on.then(|| self.guest.clone())
    }

    async fn lost(&self) -> Option<String> {
        self.guardian.sizes().await.err().map(|error| error.to_string())
    }

    async fn release(&mut self) -> Outcome<()> {
        // A guest that is held goes on being held, and its guardian wants to hear of us.
        if self.settings.then == Then::Continue {
            self.stop_pulse();
        }
        let released = self.guardian.release().await.map_err(|e| self.failed(e))?;
        if released.left.is_empty() {
            self.scratch = None;
            return Ok(());
        }
        if let Some(scratch) = &mut self.scratch {
            scratch.keep();
        }
        let why = format!("left in QEMU: {}", released.left.join("; "));
        Err(Failure::failed(&self.settings.tried, why).unclean())
    }

    async fn settle(&mut self, fate: Fate) -> Outcome<()> {
        if fate != Fate::Committed {
            // After a failure the graph may still be in; the guardian takes it out.
            self.abort().await?;
        }
        self.scratch = None;
        self.intents.commit = match fate {
            Fate::Committed => CommitState::Committed,
            Fate::NotCommitted => CommitState::NotCommitted,
            Fate::Unknown => CommitState::Unknown,
        };
        self.record()?;
        let released = match fate {
            Fate::Committed => self.guardian.retire(self.superseded()).await,
            Fate::NotCommitted => self.guardian.drop_new().await,
            // Both bitmaps stay; the next point that is committed retires whichever is older.
            Fate::Unknown => return Ok(()),
        };
        let released = released.map_err(|e| self.failed(e).unclean())?;
        if !released.left.is_empty() {
            let why = format!("left in QEMU: {}", released.left.join("; "));
            return Err(Failure::failed(&self.settings.tried, why).unclean());
        }
        Ok(())
    }
}

impl QmpCapture {
    /// Lets the guardian undo what is left of the run.
    pub async fn abort(&mut self) -> Outcome<()> {
        let aborted = self.guardian.abort().await.map_err(|e| self.failed(e).unclean());
        let left = match &aborted {
            Ok(released) => released.left.clone(),
            Err(_) => vec!["its guardian is gone".into()],
        };
        self.stop_pulse();
        if left.is_empty() {
            return Ok(());
        }
        if let Some(scratch) = &mut self.scratch {
            scratch.keep();
        }
        let why = format!("left in QEMU: {}", left.join("; "));
        Err(Failure::failed(&self.settings.tried, why).unclean())
    }

    /// Stops the guest, frozen where that is possible, without taking an instant of any disk.
    pub async fn hold(&mut self) -> Outcome<()> {
        self.pulse = Some(start_pulse(&self.guardian, self.settings.activity.clone()));
        let freezes = self.settings.freeze != Freeze::No;
        self.journal(Intents::new(self.settings.run).with_instant(self.was_running, freezes))?;
        let plan = InstantPlan { freeze: self.settings.freeze, then: Then::Hold };
        self.guardian.instant(plan).await.map(drop).map_err(|e| self.failed(e))
    }

    /// What is on record of the run now.
    pub fn intents(&self) -> &Intents {
        &self.intents
    }

    /// Puts what is about to be done to a held guest on record.
    pub fn journal(&mut self, intents: Intents) -> Outcome<()> {
        self.intents = intents;
        self.log.record_durably(&self.intents)
    }
}

impl Drop for QmpCapture {
    fn drop(&mut self) {
        self.stop_pulse();
    }
}

impl QmpCapture {
    /// Bitmaps of this repository that the new point makes superfluous.
    fn superseded(&self) -> Vec<String> {
        let captured = self.tasks.iter().filter(|task| task.bitmap.is_some());
        let on_disks = captured.flat_map(|task| self.disk(task).bitmaps.iter());
        let ours = |name: &str| {
            matches!(Owner::of(name, &self.settings.repository), Owner::ThisRepository(_))
        };
        on_disks.map(|bitmap| bitmap.name.clone()).filter(|name| ours(name)).collect()
    }
}

/// Undoes what runs have left of which nothing is on record any more (the state directory was lost,
/// or was another one). Nobody else is at work here: this QEMU's one monitor is ours.
async fn take_out_leftovers(
    guardian: &GuardianClient,
    runs: &[RunId],
    settings: &Settings,
) -> Outcome<()> {
    for run in runs {
        tracing::warn!(%run, "undoing what an earlier run left in QEMU");
        let socket = settings.scratch.join(format!("icecore-{run}")).join("nbd.sock");
        let intents = Intents::unknown(*run).with_server_asked();
        let undone = guardian.recover(intents, Some(socket)).await;
        let left = undone.map_err(|e| failure(&settings.tried, e))?.left;
        if !left.is_empty() {
            let why = format!("an earlier run left this in QEMU: {}", left.join("; "));
            return Err(Failure::refused(&settings.tried, why));
        }
    }
    Ok(())
}

/// Lets the guardian hear that this process lives, until the task is aborted: the pulse of the data
/// threads while data are moved, else the loop itself, since then nothing lies unread here.
fn start_pulse(guardian: &GuardianClient, activity: Activity) -> tokio::task::JoinHandle<()> {
    let pulse = guardian.pulse();
    tokio::spawn(async move {
        let mut idle = 0;
        loop {
            idle += u64::from(!activity.is_running());
            pulse.beat(activity.pulse.load(Ordering::Relaxed) + idle);
            tokio::time::sleep(PULSE_INTERVAL).await;
        }
    })
}

/// A guardian's error for the user.
pub fn failure(tried: &str, error: GuardianError) -> Failure {
    let status = match error.kind {
        ErrorKind::Refused => Status::Refused,
        _ => Status::Failed,
    };
    // A VM that is being restarted answers a little later.
    let passes = error.kind == ErrorKind::Unreachable;
    let failure = Failure { status, ..Failure::failed(tried, error) };
    if !passes {
        return failure;
    }
    let advice = "start the VM, or look whether this is its QMP socket; one that is off is named by \
                  its images";
    failure.transient().next(advice)
}

/// The bitmap's name in an NBD metadata context.
fn dirty_name(context: Option<&str>) -> Option<String> {
    context?.strip_prefix("qemu:dirty-bitmap:").map(str::to_owned)
}

/// A base as the guardian names it.
pub fn guardian_base(base: &Base) -> GuardianBase {
    GuardianBase { bitmap: base.bitmap.to_string(), granularity: base.granularity }
}

fn seen(disk: &Disk) -> Outcome<SeenDisk> {
    let id = disk.id.parse().map_err(|e| Failure::failed("name the disks of the VM", e))?;
    Ok(SeenDisk {
        id,
        size_bytes: disk.size_bytes,
        identity: disk.identity.clone(),
        partial_identity: false,
        bitmaps: disk.bitmaps.clone(),
        records: true,
        recorder: Recorder::Icecore,
        refusal: disk.refusal.as_ref().map(ToString::to_string),
        read_only: disk.refusal == Some(Refusal::ReadOnly),
    })
}
