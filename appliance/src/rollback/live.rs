//! The rollback of a running VM: held still, written through exports of its own QEMU, reset.

use std::path::PathBuf;

use icecore_io_engine::BlockRange;
use icecore_qmp::capture::RunId;
use icecore_qmp::guardian::GuardianClient;
use icecore_qmp::guardian::protocol::{
    Freeze, InstantPlan, Restart, SwapAway, SwapDisk, Then, WritableDisk,
};
use icecore_qmp::inventory::Disk;
use icecore_qmp::recover::{Intents, RollbackIntent, ServerIntent, StopIntent};

use super::{Chosen, Known, Rollback, RolledBack, ranges};
use crate::capture::qmp::{QmpCapture, Settings, disk_intent_of, failure, guardian_base};
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
    pub freeze: Freeze,
    pub settings: Settings,
}

impl Rollback<'_> {
    /// Rolls the VM behind the guardian back.
    pub async fn live(
        &mut self,
        live: Live,
        safety: crate::backup::Request,
    ) -> Outcome<RolledBack> {
        let Live { guardian, run, scratch, freeze, settings } = live;
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
        let was_running = capture.was_running();
        if self.request.safety_point {
            let report = self.back_up(&mut capture, &safety).await?;
            self.note_safety_point(&report, &mut done);
        } else {
            let plan = InstantPlan { freeze, then: Then::Hold };
            guardian.instant(plan).await.map_err(|e| failure(self.tried, e))?;
        }
        let inspection = guardian.inspect().await.map_err(|e| failure(self.tried, e))?;
        let disks = &inspection.inventory.disks;
        let user = crate::target::qemu_user(inspection.peer);
        let log = IntentLog::create(&self.context.state, self.job.id())?;
        let mut journal = Journal { log, intents: Intents::new(run) };
        if was_running {
            journal.intents.stop = StopIntent::RanBefore;
        }
        let socket_dir = ScratchDir::make(&scratch, &format!("{run}-w"), user)?;
        let mut held = Held { guardian, journal, socket: socket_dir.path().join("nbd.sock"), run };
        done.disks = self.write_live(&mut held, &chosen, disks).await?;
        let restart = if self.request.restart { Restart::Reset } else { Restart::Leave };
        held.guardian.restart(restart).await.map_err(|e| failure(self.tried, e))?;
        done.vm_restarted = self.request.restart;
        Ok(done)
    }

    async fn write_live(
        &self,
        held: &mut Held,
        chosen: &[Chosen],
        disks: &[Disk],
    ) -> Outcome<Vec<super::RolledBackDisk>> {
        let swapped: Vec<&Disk> = chosen.iter().map(|c| &disks[c.index]).collect();
        held.swap_away(&swapped, self.tried).await?;
        let pulse = crate::capture::qmp::start_pulse(&held.guardian, self.job.pulse());
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
            plans.push(self.plan(held, chosen, known.as_ref(), writable).await?);
        }
        self.interrupt.check(self.tried)?;
        held.begin_writing(self.tried).await?;
        let mut rolled = Vec::with_capacity(chosen.len());
        for ((chosen, blocks), writable) in chosen.iter().zip(plans).zip(&exposed) {
            let uri = Peer::of_qemu(&held.socket, &writable.export, &held.guardian);
            rolled.push(self.write(&chosen.seen.id, &uri, blocks).await?);
        }
        pulse.abort();
        let released = held.guardian.swap_back().await.map_err(|e| failure(self.tried, e))?;
        match released.left.is_empty() {
            true => Ok(rolled),
            false => Err(Failure::failed(
                self.tried,
                format!("written and verified, but left in QEMU: {}", released.left.join("; ")),
            )
            .next("repair with 'icecore doctor --repair'; the VM stays stopped")),
        }
    }

    async fn plan(
        &self,
        held: &Held,
        chosen: &Chosen,
        known: Option<&Known>,
        writable: &WritableDisk,
    ) -> Outcome<Vec<BlockRange>> {
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
        self.ranges(chosen, known.zip(dirty), &uri).await
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
            let blocks = self.ranges(disk, known.as_ref().zip(dirty), uri).await?;
            described.push(self.described(disk, &blocks));
        }
        capture.release().await?;
        Ok(described)
    }
}

/// A VM that is held still, and the journal of what is done to it.
struct Held {
    guardian: GuardianClient,
    journal: Journal,
    socket: PathBuf,
    run: RunId,
}

struct Journal {
    log: IntentLog,
    intents: Intents,
}

impl Held {
    async fn swap_away(&mut self, disks: &[&Disk], tried: &str) -> Outcome<()> {
        self.journal.intents.disks = disks.iter().map(|disk| disk_intent_of(disk)).collect();
        self.journal.intents.server = ServerIntent::Asked;
        self.journal.log.record(&self.journal.intents)?;
        let swap = SwapAway {
            run: self.run,
            disks: disks.iter().map(|disk| swap_disk(disk)).collect(),
            server_socket: self.socket.clone(),
        };
        self.guardian.swap_away(swap).await.map_err(|e| failure(tried, e))
    }

    async fn begin_writing(&mut self, tried: &str) -> Outcome<()> {
        self.journal.intents.rollback = RollbackIntent::Writing;
        self.journal.log.record(&self.journal.intents)?;
        self.guardian.begin_writing().await.map_err(|e| failure(tried, e))
    }
}

fn swap_disk(disk: &Disk) -> SwapDisk {
    SwapDisk {
        qom_path: disk.drive_path.clone(),
        node: disk.node.clone(),
        bitmap_node: disk.bitmap_node.clone(),
        size_bytes: disk.size_bytes,
        iothread: disk.iothread.clone(),
    }
}
