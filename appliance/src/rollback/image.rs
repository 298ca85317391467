//! The rollback of a powered-off VM: its images, under their write locks.

use std::path::Path;

use super::{Chosen, Known, Rollback, RolledBack, ranges};
use crate::backup::Backup;
use crate::capture::Capture;
use crate::capture::image::{ImageCapture, Named};
use crate::failure::{Failure, Outcome};
use crate::image::{self, Served, StorageDaemon};
use crate::nbd::{self, Peer};
use crate::report::BackupReport;

impl Rollback<'_> {
    /// Rolls the images back. `safety` takes the safety point.
    pub async fn images(
        &mut self,
        images: &[Named],
        safety: crate::backup::Request,
    ) -> Outcome<RolledBack> {
        let mut done = RolledBack::default();
        let mut seen = self.look(images)?.disks().to_vec();
        let (chosen, left) = self.choose(&seen)?;
        done.left_alone = left;
        if self.request.safety_point && !self.request.dry_run {
            let mut capture = self.look(images)?;
            let report = self.back_up(&mut capture, &safety).await?;
            self.note_safety_point(&report, &mut done);
            seen = self.look(images)?.disks().to_vec();
        }
        for mut disk in chosen {
            self.interrupt.check(self.tried)?;
            disk.seen = seen[disk.index].clone();
            let rolled = self.image(&disk, &images[disk.index].path).await?;
            done.disks.push(rolled);
        }
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
        };
        backup.run().await
    }

    fn look(&self, images: &[Named]) -> Outcome<ImageCapture> {
        let dir = self.context.state.dir("run")?.join(self.job.id().run());
        let repository = crate::commands::backup::repository_part(self.repository, self.tried)?;
        let granularity = crate::backup::granularity(self.repository);
        ImageCapture::open(images.to_vec(), repository, granularity, &dir, self.tried)
    }

    async fn image(&self, disk: &Chosen, path: &Path) -> Outcome<super::RolledBackDisk> {
        let dir = self.context.state.dir("run")?.join(self.job.id().run());
        crate::state::make_private_dir(&dir).map_err(|e| Failure::failed(self.tried, e))?;
        let format = image::of_file(path).map_err(|e| Failure::failed(self.tried, e))?;
        if disk.seen.size_bytes != disk.wanted.size_bytes && !self.request.dry_run {
            image::resize(path, format, disk.wanted.size_bytes, self.tried)?;
        }
        let resized = disk.seen.size_bytes != disk.wanted.size_bytes;
        let known = if resized { None } else { self.known(&disk.seen)? };
        let dirty = match &known {
            Some(known) => self.dirty_of_image(disk, known, path, &dir).await?,
            None => None,
        };
        let served = match self.request.dry_run {
            true => Served::Shared { bitmap: None },
            false => Served::Exclusive,
        };
        let daemon = StorageDaemon::start(path, format, &served, &dir)?;
        let uri = Peer::on_socket(daemon.socket(), daemon.export());
        let blocks = self.ranges(disk, known.as_ref().zip(dirty), &uri).await?;
        if self.request.dry_run {
            return Ok(self.described(disk, &blocks));
        }
        let rolled = self.write(&disk.seen.id, &uri, blocks).await?;
        daemon.stop()?;
        Ok(rolled)
    }

    async fn dirty_of_image(
        &self,
        disk: &Chosen,
        known: &Known,
        path: &Path,
        dir: &Path,
    ) -> Outcome<Option<Vec<icecore_io_engine::BlockRange>>> {
        let format = image::of_file(path).map_err(|e| Failure::failed(self.tried, e))?;
        let name = known.base.bitmap.to_string();
        let served = Served::Shared { bitmap: Some(name.clone()) };
        let daemon = StorageDaemon::start(path, format, &served, dir)?;
        let uri = Peer::on_socket(daemon.socket(), daemon.export());
        let mut control = nbd::control(&uri, Some(&name), self.tried).await?;
        let block = u64::from(self.repository.block_size().bytes());
        ranges::dirty(&mut control, &name, &known.base, disk.seen.size_bytes, block, self.tried)
            .await
    }

    /// What a dry run says of a disk.
    pub(super) fn described(
        &self,
        disk: &Chosen,
        blocks: &[icecore_io_engine::BlockRange],
    ) -> super::RolledBackDisk {
        let block = u64::from(self.repository.block_size().bytes());
        super::RolledBackDisk {
            disk: disk.seen.id.to_string(),
            differing_bytes: ranges::bytes(blocks, block, disk.wanted.size_bytes),
            written_bytes: 0,
            verified: false,
            seconds: 0.0,
        }
    }
}
