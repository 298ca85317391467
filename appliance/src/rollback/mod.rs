//! Rolling a VM back in place: only what differs is written, and it is proven.
//!
//! The cost follows the change: a point whose bitmap on the disk can be trusted says what changed
//! since, the repository says how that point and the wanted one differ.

mod domain;
mod image;
mod live;
mod ranges;
mod write;

pub use live::Live;

use icecore_io_engine::LaneSet;
use icecore_qmp::bitmap::{NamePart, Owner};
use icecore_repository::{DiskId, DiskReader, Point, PointDisk, Repository};
use serde::{Deserialize, Serialize};

use crate::capture::decide::{Level, decide};
use crate::capture::image::Machine;
use crate::capture::{Base, SeenDisk};
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::interrupt::Interrupt;
use crate::job::Job;
use crate::libvirt::half_written::HalfWritten;
use crate::nbd::{self, Peer};
use crate::progress::{Meter, Progress};
use crate::report::BackupReport;
use crate::state::JobStatus;
use ranges::{Compared, Ranges};

/// What the user asked for, validated.
#[derive(Debug)]
pub struct Request {
    pub disks: Vec<DiskId>,
    pub safety_point: bool,
    pub verify_full: bool,
    pub resize: bool,
    pub restart: bool,
    pub dry_run: bool,
}

/// What came of one disk.
#[derive(Debug, Serialize, Deserialize)]
pub struct RolledBackDisk {
    pub disk: String,
    /// Of a dry run, and where the whole disk was compared: bytes of the blocks that differ. Else of
    /// those that may differ: they are written unread.
    pub differing_bytes: u64,
    pub written_bytes: u64,
    pub verified: bool,
    pub seconds: f64,
}

/// What a rollback did.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct RolledBack {
    pub safety_point: Option<String>,
    pub disks: Vec<RolledBackDisk>,
    /// Disks of the VM that the point does not hold: left as they are.
    pub left_alone: Vec<String>,
    pub vm_restarted: bool,
}

/// Everything that the steps share.
pub struct Rollback<'a> {
    pub context: &'a Context,
    pub repository: &'a Repository,
    pub point: &'a Point,
    pub request: &'a Request,
    pub job: &'a mut Job,
    pub interrupt: &'a Interrupt,
    /// The domain of libvirt whose images are rolled back.
    pub machine: Option<Machine>,
    /// What marks that domain while its images are half-written.
    pub mark: Option<HalfWritten>,
    pub tried: &'a str,
}

/// A disk to be rolled back.
struct Chosen {
    /// Its place among the VM's disks.
    index: usize,
    seen: SeenDisk,
    wanted: PointDisk,
}

/// What is known of the present content of a disk.
struct Known {
    point: Point,
    base: Base,
}

/// What is to be done with one disk.
struct Plan {
    /// The blocks to write.
    ranges: Ranges,
    /// Bytes that differ, or may differ where they were not read.
    bytes: u64,
}

impl Rollback<'_> {
    /// The disks to write, and those of the VM that the point lacks.
    fn choose(&self, seen: &[SeenDisk]) -> Outcome<(Vec<Chosen>, Vec<String>)> {
        for named in &self.request.disks {
            if self.point.disk(named).is_none() {
                let why = format!("point {} has no disk {named}", self.point.id);
                return Err(Failure::usage(self.tried, why));
            }
        }
        let wanted = |id: &DiskId| self.request.disks.is_empty() || self.request.disks.contains(id);
        let mut chosen = Vec::new();
        for held in self.point.disks.iter().filter(|held| wanted(&held.disk)) {
            let Some(index) = seen.iter().position(|disk| disk.id == held.disk) else {
                let why = format!("the VM has no disk {} now", held.disk);
                return Err(Failure::refused(self.tried, why)
                    .next("name the disks to roll back with --disk"));
            };
            self.require_fit(&seen[index], held)?;
            chosen.push(Chosen { index, seen: seen[index].clone(), wanted: held.clone() });
        }
        let left = seen.iter().filter(|disk| !chosen.iter().any(|c| c.seen.id == disk.id));
        let left = left.map(|disk| disk.id.to_string()).collect();
        Ok((chosen, left))
    }

    fn require_fit(&self, seen: &SeenDisk, held: &PointDisk) -> Outcome<()> {
        if let Some(why) = &seen.refusal {
            return Err(Failure::refused(self.tried, format!("disk {}: {why}", seen.id)));
        }
        if seen.size_bytes == held.size_bytes || self.request.resize {
            return Ok(());
        }
        let why = format!(
            "disk {} has {} bytes now and had {} at the point",
            seen.id, seen.size_bytes, held.size_bytes
        );
        Err(Failure::refused(self.tried, why)
            .next("allow it with --resize, or restore the disk to a new image"))
    }

    /// The newest point of this repository whose bitmap on the disk can be trusted.
    fn known(&self, seen: &SeenDisk) -> Outcome<Option<Known>> {
        let repository = NamePart::new(self.repository.id().to_string())
            .map_err(|e| Failure::failed(self.tried, e))?;
        let mut best: Option<Known> = None;
        for bitmap in &seen.bitmaps {
            let Owner::ThisRepository(name) = Owner::of(&bitmap.name, &repository) else {
                continue;
            };
            // A bitmap whose point is gone is of no use here, and no reason to fail.
            let found = name.point.as_str().parse().ok();
            let Some(point) = found.and_then(|id| self.repository.point(&id).ok()) else {
                continue;
            };
            let newer = best.as_ref().is_none_or(|best| best.point.id < point.id);
            if let (true, Some(base)) = (newer, decide(Level::Auto, seen, Some(&point), false).base)
                && base.size_bytes == seen.size_bytes
            {
                best = Some(Known { point, base });
            }
        }
        Ok(best)
    }

    fn reader(&self, point: &Point, disk: &DiskId) -> Outcome<DiskReader> {
        self.repository
            .disk_reader(point, disk)
            .map_err(|e| Failure::from_repository(self.tried, e))
    }

    /// The blocks to write. `dirty` is what changed since `known`; without it everything is read. A
    /// dry run reads what may differ, too, to tell what does.
    async fn plan_of(
        &self,
        chosen: &Chosen,
        dirty: Option<(&Known, Ranges)>,
        uri: &Peer,
    ) -> Outcome<Plan> {
        let wanted = self.reader(self.point, &chosen.seen.id)?;
        let (block, size) = (u64::from(wanted.block_size().bytes()), wanted.size_bytes());
        let (among, all) = match dirty {
            Some((known, dirty)) => {
                let from = self.reader(&known.point, &chosen.seen.id)?;
                let among = ranges::union(dirty, wanted.diff(&from))
                    .map_err(|e| Failure::from_repository(self.tried, e))?;
                (among, false)
            }
            None => {
                let mut all = Ranges::default();
                if size > 0 {
                    all.add(0, size.div_ceil(block));
                }
                (all, true)
            }
        };
        if !all && !self.request.dry_run {
            let bytes = among.bytes(block, size);
            return Ok(Plan { ranges: among, bytes });
        }
        let found = self.compared(&chosen.seen.id, wanted, among, uri).await?;
        Ok(Plan { ranges: found.ranges, bytes: found.bytes })
    }

    async fn compared(
        &self,
        disk: &DiskId,
        wanted: DiskReader,
        among: Ranges,
        uri: &Peer,
    ) -> Outcome<Compared> {
        let lanes = nbd::lanes(uri, self.tried).await?;
        let mut set = LaneSet::new(lanes.set, self.context.engine)
            .map_err(|e| Failure::failed(self.tried, e))?;
        let _hang_up = lanes.hang_up;
        let mut options =
            crate::data::options(self.context, self.repository, &self.interrupt.flag());
        let activity = self.job.activity();
        options.control.pulse = activity.pulse.clone();
        let bytes = among.bytes(u64::from(wanted.block_size().bytes()), wanted.size_bytes());
        let meter = Meter::new(bytes, options.control.progress.clone());
        let _shown = Progress::show(format!("comparing {disk}"), meter, self.context);
        let hasher = self.repository.hasher();
        crate::data::watched(&activity, move || {
            ranges::compared(&mut set, &wanted, hasher, &among, &options)
        })
        .await
        .map_err(|e| crate::restore::failure(self.tried, e))
    }

    fn note_safety_point(&mut self, report: &BackupReport, done: &mut RolledBack) {
        done.safety_point.clone_from(&report.point);
        // The record of a rollback names the point that it goes to.
        self.job.record.point = Some(self.point.id.to_string());
        self.job.record.status = JobStatus::Restoring;
    }
}
