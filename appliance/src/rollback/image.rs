//! The rollback of a powered-off VM: its images, all of them under their write locks.
//!
//! What is read to decide what to write is read under the locks, too, and the first write comes when
//! everything is decided: until then nothing has changed. No VM can start on an image in between.

use std::path::{Path, PathBuf};

use super::ranges::{self, Ranges};
use super::{Chosen, Known, Plan, Rollback, RolledBack, RolledBackDisk};
use crate::backup::Backup;
use crate::capture::Capture;
use crate::capture::image::{ImageCapture, Named};
use crate::failure::{Failure, Outcome, Status};
use crate::image::{self, Format, RunDir, Served, Stamp, StorageDaemon};
use crate::libvirt::Domain;
use crate::libvirt::half_written;
use crate::libvirt::tpm::{self, There, Version};
use crate::nbd::{self, Peer};
use crate::report::BackupReport;

/// An image that is held for the rollback (or only looked at in a dry run).
struct Held {
    disk: Chosen,
    path: PathBuf,
    format: Format,
    known: Option<Known>,
    /// What the image calls the bitmap of `known`.
    bitmap: Option<String>,
    daemon: StorageDaemon,
}

impl Held {
    fn peer(&self) -> Peer {
        Peer::on_socket(self.daemon.socket(), self.daemon.export())
    }

    fn resized(&self) -> bool {
        self.disk.seen.size_bytes != self.disk.wanted.size_bytes
    }
}

/// What a domain's TPM is to hold.
struct TpmState {
    domain: Domain,
    version: Version,
    bytes: Vec<u8>,
}

impl Rollback<'_> {
    /// Rolls the images back. `safety` takes the safety point.
    pub async fn images(
        &mut self,
        images: &[Named],
        safety: crate::backup::Request,
    ) -> Outcome<RolledBack> {
        let mut done = RolledBack::default();
        self.choose(self.look(images)?.disks())?;
        let stamps = match self.request.safety_point && !self.request.dry_run {
            true => Some(self.safety_point(images, &safety, &mut done).await?),
            false => None,
        };
        // The safety point's bitmaps are the newest now.
        let (chosen, left) = self.choose(self.look(images)?.disks())?;
        done.left_alone = left;
        let dir = RunDir::of(self.context, self.job.id())?;
        let mut held = Vec::with_capacity(chosen.len());
        for disk in chosen {
            self.interrupt.check(self.tried)?;
            held.push(self.hold(disk, images, stamps.as_deref(), &dir)?);
        }
        done.disks = match self.request.dry_run {
            true => self.described_all(&held).await?,
            false => self.roll(held, &dir).await?,
        };
        Ok(done)
    }

    /// Takes a point of what is there now.
    pub(super) async fn back_up<C: Capture>(
        &mut self,
        capture: &mut C,
        request: &crate::backup::Request,
    ) -> Outcome<BackupReport> {
        let backup = Backup {
            context: self.context,
            repository: self.repository,
            request,
            capture,
            job: self.job,
            interrupt: self.interrupt,
            pacing: request.pacing(),
        };
        backup.run().await
    }

    /// Takes the safety point; what it holds is there for as long as the images keep these stamps.
    async fn safety_point(
        &mut self,
        images: &[Named],
        safety: &crate::backup::Request,
        done: &mut RolledBack,
    ) -> Outcome<Vec<Option<Stamp>>> {
        let mut capture = self.look(images)?;
        let report = self.back_up(&mut capture, safety).await?;
        self.note_safety_point(&report, done);
        Ok(capture.stamps())
    }

    fn look(&self, images: &[Named]) -> Outcome<ImageCapture> {
        let dir = self.context.state.dir("run")?.join(self.job.id().run());
        let repository = crate::commands::backup::repository_part(self.repository, self.tried)?;
        let granularity = crate::backup::granularity(self.repository);
        let images = images.to_vec();
        let capture = ImageCapture::open(images, repository, granularity, &dir, self.tried)?;
        Ok(capture.of_machine(self.machine.clone()))
    }

    /// Takes an image's lock, if it is still what the safety point holds.
    fn hold(
        &self,
        disk: Chosen,
        images: &[Named],
        stamps: Option<&[Option<Stamp>]>,
        dir: &RunDir,
    ) -> Outcome<Held> {
        let Some(at) = images.iter().position(|named| named.id == disk.seen.id) else {
            return Err(Failure::failed(self.tried, format!("disk {} is gone", disk.seen.id)));
        };
        let path = images[at].path.clone();
        let format = images[at].format()?;
        image::require_unlocked(&path, format, self.tried)?;
        let resized = disk.seen.size_bytes != disk.wanted.size_bytes;
        let known = if resized { None } else { self.known(&disk.seen)? };
        let stamp = stamps.map(|stamps| stamps.get(at).cloned().flatten());
        self.require_stamp(&path, format, stamp.as_ref())?;
        let info = image::info(&path, format)?;
        let bitmap = known.as_ref().map(|known| info.name_of(&known.base.bitmap));
        let served = match self.request.dry_run {
            true => Served::Shared { bitmap: bitmap.clone() },
            false => Served::Exclusive { bitmap: bitmap.clone() },
        };
        let daemon = self.serve(&path, format, &served, dir)?;
        // Where there are bitmaps, taking the lock marks them as in use: a change of our own.
        if disk.seen.bitmaps.is_empty() {
            self.require_stamp(&path, format, stamp.as_ref())?;
        }
        Ok(Held { disk, path, format, known, bitmap, daemon })
    }

    fn require_stamp(
        &self,
        path: &Path,
        format: Format,
        stamp: Option<&Option<Stamp>>,
    ) -> Outcome<()> {
        let Some(stamp) = stamp else { return Ok(()) };
        let now = Stamp::of(path, &image::info(path, format)?)?;
        if stamp.as_ref() == Some(&now) {
            return Ok(());
        }
        let why = format!("{} was written to after the safety point", path.display());
        Err(Failure::refused(self.tried, why).next("see that the VM stays off, and run it again"))
    }

    fn serve(
        &self,
        path: &Path,
        format: Format,
        served: &Served,
        dir: &RunDir,
    ) -> Outcome<StorageDaemon> {
        let dir = dir.path().map_err(|e| Failure::failed(self.tried, e))?;
        StorageDaemon::start(path, format, served, dir)
    }

    /// Decides everything, then writes everything. All locks are kept until the end.
    async fn roll(&mut self, mut held: Vec<Held>, dir: &RunDir) -> Outcome<Vec<RolledBackDisk>> {
        let mut plans = Vec::with_capacity(held.len());
        for image in &held {
            // One of another size is looked at when it has the wanted one.
            let resized = image.resized();
            plans.push(if resized { None } else { Some(self.plan(image).await?) });
        }
        self.interrupt.check(self.tried)?;
        let paths: Vec<PathBuf> = held.iter().map(|image| image.path.clone()).collect();
        let tpm = self.tpm_state()?;
        self.note_writing(paths.clone())?;
        let written = self.write_all(&mut held, plans, dir).await;
        let closed: Outcome<Vec<()>> = held.into_iter().map(|image| image.daemon.stop()).collect();
        let disks = written.and_then(|disks| closed.map(|_| disks)).map_err(half_written)?;
        if let Some(TpmState { domain, version, bytes }) = tpm {
            let restored = tpm::restore(&domain, version, &bytes, There::Replace, self.tried);
            restored.map_err(half_written)?;
        }
        self.note_written(&paths)?;
        Ok(disks)
    }

    /// On disk before the first write: whoever finds the run dead knows what it left.
    fn note_writing(&mut self, paths: Vec<PathBuf>) -> Outcome<()> {
        let state = &self.context.state;
        let mut is_first = true;
        if let Some(mark) = &self.mark {
            is_first = half_written::get(state, &mark.domain)?.is_none();
            half_written::begin(state, mark, &paths)?;
        }
        self.job.record.writing.clone_from(&paths);
        let saved = self.job.save(self.context);
        if saved.is_err() {
            // Nothing is written yet, and the domain is to start again.
            self.job.record.writing.clear();
            if let Some(mark) = self.mark.as_ref().filter(|_| is_first) {
                half_written::end(state, &mark.domain, &paths)?;
            }
        }
        saved
    }

    /// A whole VM gets the TPM that goes with its disks; one that the point does not hold stays. Read
    /// before anything is written.
    fn tpm_state(&self) -> Outcome<Option<TpmState>> {
        let machine = self.machine.as_ref().filter(|_| self.request.disks.is_empty());
        let Some((machine, version)) = machine.and_then(|one| Some((one, one.tpm?))) else {
            return Ok(None);
        };
        let name = version.part();
        if !self.point.parts.iter().any(|part| part.name.as_str() == name) {
            tracing::warn!("the point holds no state of the TPM: it stays as it is");
            return Ok(None);
        }
        let bytes = self.repository.capsule_part(self.point, name);
        let bytes = bytes.map_err(|e| Failure::from_repository(self.tried, e))?;
        Ok(Some(TpmState { domain: machine.domain.clone(), version, bytes }))
    }

    fn note_written(&mut self, paths: &[PathBuf]) -> Outcome<()> {
        self.job.record.writing.clear();
        self.job.save(self.context)?;
        match &self.mark {
            Some(mark) => half_written::end(&self.context.state, &mark.domain, paths),
            None => Ok(()),
        }
    }

    async fn write_all(
        &self,
        held: &mut [Held],
        plans: Vec<Option<Plan>>,
        dir: &RunDir,
    ) -> Outcome<Vec<RolledBackDisk>> {
        let mut disks = Vec::with_capacity(held.len());
        for (image, plan) in held.iter_mut().zip(plans) {
            let plan = match plan {
                Some(plan) => plan,
                None => {
                    self.resize(image, dir)?;
                    self.plan(image).await?
                }
            };
            disks.push(self.write(&image.disk.seen.id, &image.peer(), plan).await?);
        }
        Ok(disks)
    }

    /// Gives an image the wanted size; its lock changes hands for that.
    fn resize(&self, image: &mut Held, dir: &RunDir) -> Outcome<()> {
        image.daemon.end()?;
        image::resize(&image.path, image.format, image.disk.wanted.size_bytes, self.tried)?;
        let served = Served::Exclusive { bitmap: None };
        image.daemon = self.serve(&image.path, image.format, &served, dir)?;
        Ok(())
    }

    /// The blocks to write to an image: read under its lock.
    async fn plan(&self, image: &Held) -> Outcome<Plan> {
        let peer = image.peer();
        let bitmap = image.bitmap.clone();
        let mut control = nbd::control(&peer, bitmap.as_deref(), self.tried).await?;
        let (served, wanted) = (control.export().size_bytes, image.disk.wanted.size_bytes);
        if served != wanted && !self.request.dry_run {
            let why = format!("{} has {served} bytes, not {wanted}", image.path.display());
            return Err(Failure::failed(self.tried, why));
        }
        let block = u64::from(self.repository.block_size().bytes());
        if served < wanted {
            // Only a dry run comes here: it cannot read what is yet to be there.
            let mut ranges = Ranges::default();
            ranges.add(0, wanted.div_ceil(block));
            return Ok(Plan { ranges, bytes: wanted });
        }
        let dirty = match (&image.known, bitmap) {
            (Some(known), Some(name)) => {
                let size = image.disk.seen.size_bytes;
                ranges::dirty(&mut control, &name, &known.base, size, block, self.tried).await?
            }
            _ => None,
        };
        control.disconnect().await.map_err(|e| Failure::failed(self.tried, e))?;
        self.plan_of(&image.disk, image.known.as_ref().zip(dirty), &peer).await
    }

    async fn described_all(&self, held: &[Held]) -> Outcome<Vec<RolledBackDisk>> {
        let mut disks = Vec::with_capacity(held.len());
        for image in held {
            let plan = self.plan(image).await?;
            disks.push(described(&image.disk, &plan));
        }
        Ok(disks)
    }
}

/// What a dry run says of a disk.
pub(super) fn described(disk: &Chosen, plan: &Plan) -> RolledBackDisk {
    RolledBackDisk {
        disk: disk.seen.id.to_string(),
        differing_bytes: plan.bytes,
        written_bytes: 0,
        verified: false,
        seconds: 0.0,
    }
}

/// A failure after the first write.
fn half_written(failure: Failure) -> Failure {
    let why = format!("{}; the images are half-written: do not start the VM", failure.why);
    let status = match failure.status {
        Status::Damaged => Status::Damaged,
        // Refused and interrupted mean that nothing has changed.
        _ => Status::Failed,
    };
    Failure { why, status, ..failure }
        .next("run the rollback again to finish it, or roll back to its safety point")
}
