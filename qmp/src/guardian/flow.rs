//! A capture, request by request. A request that fails undoes the whole run before it answers.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

use super::keeper::{Keeper, Phase, millis, out_of_order};
use super::protocol::{
    ErrorKind, Expose, ExposeDisk, Exposed, ExposedDisk, Form, Freeze, GuardianError, InstantPlan,
    InstantReport, Prepare, Prepared, Push, PushState, SAMPLES_MAX, Then,
};
use crate::capture::link::CALL_WAIT;
use crate::capture::names::{DIRTY_BITMAP, DiskIndex};
use crate::capture::observe::RunState;
use crate::capture::{Call, Role, plan};
use crate::errors::QmpError;
use crate::features::SAFE_IOTHREAD_EXPORTS;
use crate::freeze::{Frozen, Owed};
use crate::recover::{CommitState, FreezeIntent, Hands, Intents, ServerIntent, StopIntent};

/// Least wait for a command while the guest is frozen, however late it is: an answer that is
/// given up too early leaves more to undo than it saves.
const WAIT_WHILE_FROZEN_MIN: Duration = Duration::from_secs(1);

/// Pause between two looks at an export that ends in milliseconds.
const EXPORT_PAUSE: Duration = Duration::from_millis(2);

/// How long an instant waits for the thaw to be confirmed before it goes on being tried beside.
const THAW_PATIENCE: Duration = Duration::from_secs(2);

impl Keeper {
    pub(super) async fn prepare(&mut self, prepare: Prepare) -> Result<Prepared, GuardianError> {
        self.expect(&Phase::Idle, "prepare")?;
        let seen = self.observe().await?;
        for disk in &prepare.disks {
            if seen.device_node(&disk.qom_path) != Some(disk.node.as_str()) {
                return Err(refused(format!("{} does not use {}", disk.qom_path, disk.node)));
            }
            if seen.node(&disk.node).map(|node| node.size_bytes) != Some(disk.size_bytes) {
                return Err(size_changed(format!("{} has another size now", disk.qom_path)));
            }
        }
        self.begin(&prepare);
        let mut bitmap_persistent = Vec::new();
        for (index, disk) in (0u16..).zip(&prepare.disks) {
            let steps = plan::prepare(prepare.run, index, disk, !self.is_fragile(disk)?);
            match self.steps(&steps).await {
                Ok(added) => bitmap_persistent.push(added.first().copied()),
                Err(error) => return Err(self.cut(error).await),
            }
        }
        Ok(Prepared { bitmap_persistent })
    }

    fn begin(&mut self, prepare: &Prepare) {
        let freeze = self.intents.freeze;
        self.intents = Intents { freeze, ..Intents::before_prepare(prepare) };
        self.forget_debts();
        self.disks.clone_from(&prepare.disks);
        self.hands = Hands {
            server_socket: Some(prepare.server_socket.clone()),
            scratch_dir: Some(prepare.scratch_dir.clone()),
        };
        self.phase = Phase::Prepared;
    }

    pub(super) async fn instant(
        &mut self,
        plan: InstantPlan,
    ) -> Result<InstantReport, GuardianError> {
        // A rollback without a safety point takes an instant of no disks.
        if !(plan.then == Then::Hold && self.phase == Phase::Idle) {
            self.expect(&Phase::Prepared, "instant")?;
        }
        match self.try_instant(&plan).await {
            Ok(report) => {
                self.held = plan.then == Then::Hold;
                self.phase = if self.disks.is_empty() { Phase::Idle } else { Phase::Captured };
                Ok(report)
            }
            Err(error) => Err(self.cut(error).await),
        }
    }

    async fn try_instant(&mut self, plan: &InstantPlan) -> Result<InstantReport, GuardianError> {
        let was_running = self.observe().await?.state == RunState::Running;
        let freeze_start = Instant::now();
        let freezing = self.freeze(plan.freeze, was_running).await?;
        let frozen_until = freeze_start + freezing.deadline;
        let fragile = self.has_fragile()?;
        let halt =
            plan.then == Then::Hold || self.disks.len() > 1 || freezing.count.is_none() || fragile;
        let pause_start = Instant::now();
        if halt && was_running {
            self.intents.stop = StopIntent::RanBefore;
            self.call(&Call::stop(), wait_until(frozen_until)).await?;
        }
        self.insert(frozen_until).await?;
        let captured_unix_ms = unix_ms();
        if fragile {
            self.check_and_snapshot().await?;
        }
        if plan.then == Then::Continue && self.intents.stop == StopIntent::RanBefore {
            self.call(&Call::cont(), CALL_WAIT).await?;
            self.intents.stop = StopIntent::None;
        }
        let pause_ms = if halt && was_running { millis(pause_start) } else { 0.0 };
        if plan.then == Then::Continue {
            self.thaw().await;
        }
        let freeze_ms = if freezing.count.is_some() { millis(freeze_start) } else { 0.0 };
        if !fragile {
            self.check_and_snapshot().await?;
        }
        Ok(InstantReport {
            frozen_filesystems: freezing.count,
            why_not_frozen: freezing.why,
            freeze_ms,
            pause_ms,
            was_running,
            thaw_owed: self.owes_thaw() && plan.then == Then::Continue,
            captured_unix_ms,
        })
    }

    async fn freeze(&mut self, how: Freeze, running: bool) -> Result<Freezing, GuardianError> {
        let (millis, required) = match how {
            Freeze::No => return Ok(Freezing::none("not asked for")),
            Freeze::Try(millis) => (millis, false),
            Freeze::Require(millis) => (millis, true),
        };
        let deadline = Duration::from_millis(millis);
        let mut freezing = Freezing { count: None, why: None, deadline };
        if !self.link()?.has_agent() {
            freezing.why = Some("no guest agent's channel was given".into());
        } else if !running {
            freezing.why = Some("the guest does not run".into());
        } else {
            let owed_before = self.intents.freeze;
            self.intents.freeze = FreezeIntent::Sent;
            match self.link()?.freeze(deadline).await {
                Frozen::Yes(count) => freezing.count = Some(count),
                Frozen::No { why, owed } => {
                    freezing.why = Some(why);
                    if owed == Owed::Nothing {
                        self.intents.freeze = owed_before;
                    }
                }
            }
        }
        match &freezing.why {
            Some(why) if required => Err(GuardianError {
                kind: ErrorKind::NotFrozen,
                message: format!("the guest's filesystems could not be frozen: {why}"),
            }),
            _ => Ok(freezing),
        }
    }

    /// Whether nodes go over the disk only while the guest stands still: before 9.1 QEMU changes
    /// the graph of an iothread's disk without keeping the iothread out of it.
    fn is_fragile(&mut self, disk: &plan::DiskPlan) -> Result<bool, GuardianError> {
        let old = self.link()?.monitor().version() < SAFE_IOTHREAD_EXPORTS;
        Ok(old && disk.iothread.is_some())
    }

    fn has_fragile(&mut self) -> Result<bool, GuardianError> {
        let disks = self.disks.clone();
        disks.iter().try_fold(false, |found, disk| Ok(found || self.is_fragile(disk)?))
    }

    async fn insert(&mut self, frozen_until: Instant) -> Result<(), GuardianError> {
        let run = self.intents.run;
        for (index, disk) in (0u16..).zip(self.disks.clone()) {
            if self.is_fragile(&disk)? {
                let filter = Call::filter(run, index, &disk.node);
                self.call(&filter, wait_until(frozen_until)).await?;
            }
            let filter = run.name(index, Role::Cbw);
            let insert = Call::set_drive(&disk.qom_path, &filter);
            self.call(&insert, wait_until(frozen_until)).await?;
        }
        Ok(())
    }

    /// A success of `qom-set` proves nothing, so it is looked at. From the insertion on the filter
    /// saves what the guest overwrites, also before its snapshot node is there.
    async fn check_and_snapshot(&mut self) -> Result<(), GuardianError> {
        let run = self.intents.run;
        let seen = self.observe().await?;
        for (index, disk) in (0u16..).zip(self.disks.clone()) {
            let filter = run.name(index, Role::Cbw);
            if seen.device_node(&disk.qom_path) != Some(filter.as_str()) {
                let message = format!("{} does not use the filter it was given", disk.qom_path);
                return Err(refused(message));
            }
            self.call(&Call::snapshot(run, index), CALL_WAIT).await?;
        }
        Ok(())
    }

    async fn thaw(&mut self) {
        if !self.owes_thaw() {
            return;
        }
        let Some(link) = &mut self.link else { return };
        if link.thaw(THAW_PATIENCE).await {
            self.intents.freeze = FreezeIntent::None;
        }
    }

    pub(super) async fn expose(&mut self, expose: Expose) -> Result<Exposed, GuardianError> {
        self.expect(&Phase::Captured, "expose")?;
        if expose.disks.len() != self.disks.len() {
            return Err(out_of_order("expose names another number of disks".into()));
        }
        match self.try_expose(&expose).await {
            Ok(exposed) => {
                // From here on a point may come to be that only the repository knows of.
                self.intents.commit = CommitState::Unknown;
                self.phase = Phase::Exposed;
                Ok(exposed)
            }
            Err(error) => Err(self.cut(error).await),
        }
    }

    async fn try_expose(&mut self, expose: &Expose) -> Result<Exposed, GuardianError> {
        if let Some(change) = self.size_change().await? {
            return Err(size_changed(change));
        }
        self.start_server().await?;
        let mut disks = Vec::new();
        for (index, disk) in (0u16..).zip(&expose.disks) {
            disks.push(self.expose_disk(index, disk, expose.trim).await?);
        }
        Ok(Exposed { disks })
    }

    pub(super) async fn start_server(&mut self) -> Result<(), GuardianError> {
        let none = || out_of_order("no socket was given for QEMU's NBD server".into());
        let socket = self.hands.server_socket.clone().ok_or_else(none)?;
        self.intents.server = ServerIntent::Asked;
        match self.link()?.call(&Call::start_server(&socket), CALL_WAIT).await {
            Ok(_) => {
                self.intents.server = ServerIntent::Ours;
                Ok(())
            }
            Err(QmpError::Refused { desc, .. }) => {
                self.intents.server = ServerIntent::None;
                Err(refused(format!(
                    "QEMU's NBD server cannot be started on {}: {desc}. A server that is not \
                     ours is left alone: stop it, then try again",
                    socket.display()
                )))
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn expose_disk(
        &mut self,
        index: DiskIndex,
        disk: &ExposeDisk,
        trim: bool,
    ) -> Result<ExposedDisk, GuardianError> {
        let run = self.intents.run;
        let plan = self.disks[usize::from(index)].clone();
        let version = self.link()?.monitor().version();
        let unsafe_export = plan.iothread.is_some() && version < SAFE_IOTHREAD_EXPORTS;
        if disk.form == Form::Pull && unsafe_export {
            return Err(refused(format!(
                "{} is in an iothread, and QEMU {version} would not survive its export: it has \
                 to be pushed",
                plan.qom_path
            )));
        }
        let mut exposed = ExposedDisk {
            form: disk.form,
            export: None,
            dirty_context: None,
            size_bytes: plan.size_bytes,
        };
        let (steps, node, writable) = match (disk.form, &disk.base) {
            (Form::Push, None) => return Ok(exposed),
            (Form::Push, Some(base)) => {
                let steps = plan::dirty_map(run, index, &plan.bitmap_node, plan.size_bytes, base);
                (steps, run.name(index, Role::Map), false)
            }
            (Form::Pull, base) => {
                let steps = plan::dirty_copy(run, index, &plan.bitmap_node, base.as_ref());
                (steps, run.name(index, Role::Snap), trim)
            }
        };
        self.steps(&steps).await?;
        let bitmaps: &[&str] = if disk.base.is_some() { &[DIRTY_BITMAP] } else { &[] };
        let export = run.name(index, Role::Export);
        self.call(&Call::add_export(&export, &node, writable, bitmaps), CALL_WAIT).await?;
        exposed.export = Some(export);
        exposed.dirty_context = disk.base.is_some().then(dirty_context);
        Ok(exposed)
    }

    /// Ends the export of the disk's map, which was read by now. A failed push is the worker's to
    /// give up: it may have pushes of other disks under way.
    pub(super) async fn push(&mut self, push: Push) -> Result<(), GuardianError> {
        self.expect(&Phase::Exposed, "push")?;
        let missing = || out_of_order(format!("there is no disk {}", push.disk));
        let disk = self.disks.get(usize::from(push.disk)).cloned().ok_or_else(missing)?;
        if push.samples.len() > SAMPLES_MAX {
            return Err(out_of_order(format!("more than {SAMPLES_MAX} samples")));
        }
        let run = self.intents.run;
        if let Some(base) = &push.base {
            // Its bitmap is busy while it is exported.
            self.end_export(&run.name(push.disk, Role::Export)).await?;
            self.steps(&plan::push_bitmap(run, push.disk, &disk, base, &push.samples)).await?;
        }
        self.forget_push(push.disk).await?;
        let node = Call::push_node(run, push.disk, &push.socket, &push.export);
        self.call(&node, CALL_WAIT).await?;
        self.call(&Call::push_job(run, push.disk, push.base.is_none()), CALL_WAIT).await
    }

    /// Takes away an earlier push of the disk, which has ended.
    async fn forget_push(&mut self, disk: DiskIndex) -> Result<(), GuardianError> {
        let run = self.intents.run;
        let (job, node) = (run.name(disk, Role::Job), run.name(disk, Role::Push));
        let seen = self.observe().await?;
        if seen.job(&job).is_some_and(|job| job.concluded) {
            self.call(&Call::dismiss_job(&job), CALL_WAIT).await?;
        }
        if seen.node(&node).is_some() {
            self.call(&Call::remove_node(&node), CALL_WAIT).await?;
        }
        Ok(())
    }

    async fn end_export(&mut self, id: &str) -> Result<(), GuardianError> {
        self.call(&Call::remove_export(id), CALL_WAIT).await?;
        let until = Instant::now() + CALL_WAIT;
        while self.observe().await?.exports.iter().any(|export| export == id) {
            if Instant::now() >= until {
                return Err(refused(format!("export {id} does not end")));
            }
            tokio::time::sleep(EXPORT_PAUSE).await;
        }
        Ok(())
    }

    pub(super) async fn push_status(
        &mut self,
        disk: DiskIndex,
    ) -> Result<PushState, GuardianError> {
        let id = self.intents.run.name(disk, Role::Job);
        let job = self.link()?.job(&id).await?;
        Ok(match job {
            None => PushState::Failed("its job is gone".into()),
            Some(job) if !job.concluded => PushState::Running { done: job.done, total: job.total },
            Some(job) => job.error.map_or(PushState::Done, PushState::Failed),
        })
    }

    pub(super) async fn sizes(&mut self) -> Result<Vec<u64>, GuardianError> {
        self.look().await;
        if let Phase::Cut(why) = &self.phase {
            return Err(why.clone());
        }
        Ok(self.disks.iter().map(|disk| disk.size_bytes).collect())
    }
}

struct Freezing {
    count: Option<u64>,
    why: Option<String>,
    deadline: Duration,
}

impl Freezing {
    fn none(why: &str) -> Self {
        Self { count: None, why: Some(why.into()), deadline: CALL_WAIT }
    }
}

/// While the guest is frozen, a command has what is left of the freeze's deadline.
fn wait_until(frozen_until: Instant) -> Duration {
    let left = frozen_until.saturating_duration_since(Instant::now());
    left.clamp(WAIT_WHILE_FROZEN_MIN, CALL_WAIT)
}

/// The NBD metadata context of the exported copy (QEMU docs/interop/nbd.rst).
pub(super) fn dirty_context() -> String {
    format!("qemu:dirty-bitmap:{DIRTY_BITMAP}")
}

pub(super) fn refused(message: String) -> GuardianError {
    GuardianError { kind: ErrorKind::Refused, message }
}

pub(super) fn size_changed(message: String) -> GuardianError {
    GuardianError { kind: ErrorKind::SizeChanged, message }
}

fn unix_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}
