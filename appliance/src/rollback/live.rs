//! The rollback of a running VM: held still, written through exports of its own QEMU, reset.

use std::path::PathBuf;

use icecore_qmp::capture::RunId;
use icecore_qmp::guardian::GuardianClient;
use icecore_qmp::guardian::protocol::{Restart, SwapAway, SwapDisk, WritableDisk};
use icecore_qmp::inventory::Disk;
use icecore_qmp::recover::{Intents, RollbackIntent};

use super::{Chosen, Known, Plan, Rollback, RolledBack, ranges};
use crate::capture::qmp::{QmpCapture, Settings, failure, guardian_base};
use crate::capture::scratch::ScratchDir;
use crate::capture::{Capture, Data, DirtyMap, Fate, SeenDisk, Task};
use crate::failure::{Failure, Outcome};
use crate::nbd::{self, Peer};
use crate::state::IntentLog;

/// A running VM that is to be rolled back.
pub struct Live {
    pub guardian: GuardianClient,
    pub run: RunId,
    pub scratch: PathBuf,
    pub settings: Settings,
}

/// A VM that is held still.
struct Held<'a> {
    guardian: GuardianClient,
    capture: &'a mut QmpCapture,
    /// Where its QEMU serves the disks.
    socket: PathBuf,
    run: RunId,
}

impl Rollback<'_> {
    /// Rolls the VM behind the guardian back.
    pub async fn live(
        &mut self,
        live: Live,
        safety: crate::backup::Request,
    ) -> Outcome<RolledBack> {
        let Live { guardian, run, scratch, settings } = live;
        let log = IntentLog::create(&self.context.state, self.job.id())?;
        let mut capture = QmpCapture::open(guardian.clone(), settings, log).await?;
        let (chosen, left_alone) = self.choose(capture.disks())?;
        let mut done = RolledBack { left_alone, ..RolledBack::default() };
        if let Some(disk) = chosen.iter().find(|d| d.seen.size_bytes != d.wanted.size_bytes) {
            let why = format!("disk {} changed its size, and the VM runs", disk.seen.id);
            return Err(Failure::refused(self.tried, why)
                .next("stop the VM and roll its image back with --image and --resize"));
        }
        if self.request.dry_run {
            done.disks = self.describe_live(&mut capture, &chosen).await?;
            return Ok(done);
        }
        if let Err(failure) = self.hold_live(&mut capture, safety, &mut done).await {
            return Err(self.give_up_live(&mut capture, &done, failure).await);
        }
        // At the place that is on record: recovery looks there for QEMU's socket.
        let scratch = ScratchDir::make(&scratch, &run.to_string(), capture.user())?;
        let socket = scratch.path().join("nbd.sock");
        let mut held = Held { guardian, capture: &mut capture, socket, run };
        match self.write_live(&mut held, &chosen).await {
            Ok(disks) => {
                done.disks = disks;
                done.vm_restarted = self.request.restart;
                Ok(done)
            }
            Err(failure) => Err(self.give_up_live(&mut capture, &done, failure).await),
        }
    }

    /// Stops the VM and keeps what is there now as a point, unless that is declined.
    async fn hold_live(
        &mut self,
        capture: &mut QmpCapture,
        mut safety: crate::backup::Request,
        done: &mut RolledBack,
    ) -> Outcome<()> {
        if !self.request.safety_point {
            return capture.hold().await;
        }
        // What cannot be backed up is not written either.
        let refused = capture.disks().iter().filter(|disk| disk.refusal.is_some());
        safety.exclude = refused.map(|disk| disk.id.clone()).collect();
        let report = self.back_up(capture, &safety).await?;
        self.note_safety_point(&report, done);
        self.job.save(self.context)
    }

    /// Undoes what can be undone. After the first write the VM stays stopped.
    async fn give_up_live(
        &self,
        capture: &mut QmpCapture,
        done: &RolledBack,
        failure: Failure,
    ) -> Failure {
        let writing = capture.intents().rollback == RollbackIntent::Writing;
        let mut failure = match capture.abort().await {
            Ok(()) => failure,
            Err(also) => {
                Failure { why: format!("{}; {}", failure.why, also.why), unclean: true, ..failure }
            }
        };
        if writing {
            let safety = done.safety_point.as_deref().unwrap_or("an earlier point");
            failure.why += "; some blocks were written already, so the VM stays stopped";
            failure.next =
                Some(format!("run the rollback again to finish it, or roll back to {safety}"));
        }
        failure
    }

    async fn write_live(
        &self,
        held: &mut Held<'_>,
        chosen: &[Chosen],
    ) -> Outcome<Vec<super::RolledBackDisk>> {
        let inspection = held.guardian.inspect().await.map_err(|e| failure(self.tried, e))?;
        let swapped = self.same_disks(chosen, &inspection.inventory.disks)?;
        held.swap_away(&swapped, self.tried).await?;
        let mut known = Vec::with_capacity(chosen.len());
        for (chosen, disk) in chosen.iter().zip(&swapped) {
            let now = SeenDisk { bitmaps: disk.bitmaps.clone(), ..chosen.seen.clone() };
            known.push(self.known(&now)?);
        }
        let bases = known.iter().map(|k| k.as_ref().map(|known| guardian_base(&known.base)));
        let exposed = held.guardian.expose_writable(bases.collect()).await;
        let exposed = exposed.map_err(|e| failure(self.tried, e))?;
        let mut plans = Vec::with_capacity(chosen.len());
        for ((chosen, known), writable) in chosen.iter().zip(&known).zip(&exposed) {
            plans.push(self.plan_live(held, chosen, known.as_ref(), writable).await?);
        }
        self.interrupt.check(self.tried)?;
        held.begin_writing(self.tried).await?;
        let mut rolled = Vec::with_capacity(chosen.len());
        for ((chosen, plan), writable) in chosen.iter().zip(plans).zip(&exposed) {
            let peer = Peer::of_qemu(&held.socket, &writable.export, &held.guardian);
            rolled.push(self.write(&chosen.seen.id, &peer, plan).await?);
        }
        held.let_go(self.request.restart, self.tried).await?;
        Ok(rolled)
    }

    /// The chosen disks as they are now that the VM stands still: somebody may have plugged or
    /// resized some while the safety point was taken.
    fn same_disks<'d>(&self, chosen: &[Chosen], now: &'d [Disk]) -> Outcome<Vec<&'d Disk>> {
        let find = |chosen: &Chosen| {
            let seen = &chosen.seen;
            let same = |disk: &&Disk| {
                disk.id == seen.id.as_str()
                    && disk.identity == seen.identity
                    && disk.size_bytes == seen.size_bytes
                    && disk.refusal.is_none()
            };
            now.iter().find(same).ok_or_else(|| {
                let why = format!("disk {} is not what it was when the rollback began", seen.id);
                Failure::failed(self.tried, why).next("start the rollback again")
            })
        };
        chosen.iter().map(find).collect()
    }

    async fn plan_live(
        &self,
        held: &Held<'_>,
        chosen: &Chosen,
        known: Option<&Known>,
        writable: &WritableDisk,
    ) -> Outcome<Plan> {
        let dirty = match (known, &writable.map_export, &writable.dirty_context) {
            (Some(known), Some(map), Some(context)) => {
                let name = context.strip_prefix("qemu:dirty-bitmap:").unwrap_or(context);
                let uri = Peer::of_qemu(&held.socket, map, &held.guardian);
                let mut control = nbd::control(&uri, Some(name), self.tried).await?;
                let block = u64::from(self.repository.block_size().bytes());
                let size = chosen.seen.size_bytes;
                ranges::dirty(&mut control, name, &known.base, size, block, self.tried).await?
            }
            _ => None,
        };
        let uri = Peer::of_qemu(&held.socket, &writable.export, &held.guardian);
        self.plan_of(chosen, known.zip(dirty), &uri).await
    }

    /// What a rollback would write now; the guest runs on.
    async fn describe_live(
        &self,
        capture: &mut QmpCapture,
        chosen: &[Chosen],
    ) -> Outcome<Vec<super::RolledBackDisk>> {
        let mut known = Vec::with_capacity(chosen.len());
        for disk in chosen {
            known.push(self.known(&disk.seen)?);
        }
        let tasks: Vec<Task> = chosen
            .iter()
            .zip(&known)
            .map(|(disk, known)| Task {
                index: disk.index,
                base: known.as_ref().map(|known| known.base.clone()),
                bitmap: None,
            })
            .collect();
        let described = self.describe_taken(capture, chosen, &known, &tasks).await;
        capture.settle(Fate::NotCommitted).await?;
        described
    }

    async fn describe_taken(
        &self,
        capture: &mut QmpCapture,
        chosen: &[Chosen],
        known: &[Option<Known>],
        tasks: &[Task],
    ) -> Outcome<Vec<super::RolledBackDisk>> {
        capture.take(tasks).await?;
        let block = u64::from(self.repository.block_size().bytes());
        let mut described = Vec::with_capacity(chosen.len());
        for (at, (disk, known)) in chosen.iter().zip(known).enumerate() {
            let base = known.as_ref().map(|known| &known.base);
            let readable = capture.open(at, base, &[]).await?;
            let Data::Export(uri) = &readable.data else {
                let why = "this QEMU cannot show a disk in an iothread without harm";
                return Err(Failure::refused(self.tried, why));
            };
            let dirty = match (known, &readable.dirty) {
                (Some(known), Some(DirtyMap::Export { bitmap: name })) => {
                    let mut control = nbd::control(uri, Some(name), self.tried).await?;
                    let size = readable.size_bytes;
                    ranges::dirty(&mut control, name, &known.base, size, block, self.tried).await?
                }
                _ => None,
            };
            let plan = self.plan_of(disk, known.as_ref().zip(dirty), uri).await?;
            described.push(super::image::described(disk, &plan));
        }
        capture.release().await?;
        Ok(described)
    }
}

impl Held<'_> {
    async fn swap_away(&mut self, disks: &[&Disk], tried: &str) -> Outcome<()> {
        let swap = SwapAway {
            run: self.run,
            disks: disks.iter().map(|disk| SwapDisk::new(disk)).collect(),
            server_socket: self.socket.clone(),
        };
        let before = self.capture.intents();
        let (stop, freeze) = (before.stop, before.freeze);
        let intents = Intents { stop, freeze, ..Intents::before_swap(&swap) };
        self.capture.journal(intents.with_server_asked())?;
        self.guardian.swap_away(swap).await.map_err(|e| failure(tried, e))
    }

    async fn begin_writing(&mut self, tried: &str) -> Outcome<()> {
        let intents = self.capture.intents().clone().with_writing();
        self.capture.journal(intents)?;
        self.guardian.begin_writing().await.map_err(|e| failure(tried, e))
    }

    /// Gives the devices their disks back and ends the hold.
    async fn let_go(&mut self, restart: bool, tried: &str) -> Outcome<()> {
        let released = self.guardian.swap_back().await.map_err(|e| failure(tried, e))?;
        if !released.left.is_empty() {
            let why =
                format!("written and verified, but left in QEMU: {}", released.left.join("; "));
            return Err(Failure::failed(tried, why).unclean());
        }
        let how = if restart { Restart::Reset } else { Restart::Leave };
        self.guardian.restart(how).await.map_err(|e| failure(tried, e))
    }
}
