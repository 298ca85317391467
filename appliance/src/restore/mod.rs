//! Writing disks of a point to targets, and proving that they arrived.
//!
//! A file is made beside its place and moved there when it is proven, so an unfinished one never
//! looks finished. A device or an export is written in place; when that fails its beginning is
//! wiped, so that nothing boots from it.

mod in_place;
mod replace;
mod target;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use icecore_io_engine::{
    Cause, DataMap, EngineError, Lane, LaneSet, RestoreStats, TargetState, Verify,
};
use icecore_nbd_client::ExportInfo;
use icecore_repository::{DiskReader, Point, PointDisk, Repository};
use serde::{Deserialize, Serialize};

use crate::context::Context;
use crate::data;
use crate::failure::{Failure, Outcome};
use crate::image::{self, Format, RunDir, Served, StorageDaemon};
use crate::interrupt::Interrupt;
use crate::job::Job;
use crate::nbd::{self, Lanes, Peer};
use crate::progress::{Meter, Progress};

pub use target::{Target, Wish, targets};

/// Lanes on one file, for the thread backend.
const FILE_LANES: usize = 4;

/// One restored disk, as it is reported.
#[derive(Debug, Serialize, Deserialize)]
pub struct RestoredDisk {
    pub disk: String,
    pub target: String,
    pub written_bytes: u64,
    pub zeroed_bytes: u64,
    pub root_verified: bool,
    pub seconds: f64,
}

/// Restores disks of one point, one after the other.
pub struct Restore<'a> {
    pub context: &'a Context,
    pub repository: &'a Repository,
    pub point: &'a Point,
    pub verify: Verify,
    pub interrupt: &'a Interrupt,
    pub job: &'a mut Job,
}

impl Restore<'_> {
    /// Restores one disk to its target.
    pub async fn disk(&mut self, disk: &PointDisk, target: &Target) -> Outcome<RestoredDisk> {
        let started = Instant::now();
        let tried = format!("restore disk {} of {} to {}", disk.disk, self.point.id, target.name());
        self.interrupt.check(&tried)?;
        let reader = self
            .repository
            .disk_reader(self.point, &disk.disk)
            .map_err(|e| Failure::from_repository(&tried, e))?;
        let stats = match target {
            Target::File { path, format, replace } => {
                self.file(reader, (path, *format, *replace), &tried).await?
            }
            Target::Device { path } => self.device(reader, path, &tried).await?,
            Target::Nbd { uri } => self.export(reader, uri, &tried).await?,
        };
        Ok(RestoredDisk {
            disk: disk.disk.to_string(),
            target: target.name(),
            written_bytes: stats.written_bytes - stats.zeroed_bytes,
            zeroed_bytes: stats.zeroed_bytes,
            root_verified: stats.root.is_some(),
            seconds: started.elapsed().as_secs_f64(),
        })
    }

    async fn file(
        &mut self,
        reader: DiskReader,
        (path, format, replace): (&Path, Format, bool),
        tried: &str,
    ) -> Outcome<RestoreStats> {
        let partial = partial_path(path, self.job.id().run());
        self.job.record.files.push(partial.clone());
        self.job.save(self.context)?;
        let dir = RunDir::of(self.context, self.job.id())?;
        let written = match format {
            Format::Raw => self.raw_file(reader, &partial, tried).await,
            Format::Qcow2 => self.qcow2_file(reader, &partial, &dir, tried).await,
        };
        let moved = written.and_then(|stats| {
            replace::move_there(&partial, path, replace, &dir, tried)?;
            Ok(stats)
        });
        if moved.is_err() {
            // It is not there when making it was what failed.
            let _ = std::fs::remove_file(&partial);
        }
        moved
    }

    async fn raw_file(
        &self,
        reader: DiskReader,
        partial: &Path,
        tried: &str,
    ) -> Outcome<RestoreStats> {
        let failed = |e: std::io::Error| Failure::failed(tried, e);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(partial).map_err(failed)?;
        file.set_len(reader.size_bytes()).map_err(failed)?;
        let kept = file.try_clone().map_err(failed)?;
        let set = Lane::files(file, FILE_LANES).map_err(|e| Failure::failed(tried, e))?;
        let lanes = Lanes { set, hang_up: Vec::new() };
        let stats = self.run(reader, lanes, TargetState::Blank, None, tried).await?;
        kept.sync_all().map_err(failed)?;
        Ok(stats)
    }

    async fn qcow2_file(
        &self,
        reader: DiskReader,
        partial: &Path,
        dir: &RunDir,
        tried: &str,
    ) -> Outcome<RestoreStats> {
        let failed = |e: std::io::Error| Failure::failed(tried, e);
        image::create_qcow2(partial, reader.size_bytes(), tried)?;
        let served = Served::Exclusive { bitmap: None };
        let dir = dir.path().map_err(failed)?;
        let daemon = StorageDaemon::start(partial, Format::Qcow2, &served, dir)?;
        let peer = Peer::on_socket(daemon.socket(), daemon.export());
        let size_bytes = reader.size_bytes();
        let accept = |export: &ExportInfo| in_place::require_size(export, size_bytes, tried);
        let lanes = nbd::target_lanes(&peer, accept, tried).await?.lanes;
        let map = Some(nbd::data_map(&peer, size_bytes, tried));
        let stats = self.run(reader, lanes, TargetState::Blank, map, tried).await?;
        daemon.stop()?;
        File::open(partial).and_then(|file| file.sync_all()).map_err(failed)?;
        Ok(stats)
    }

    async fn run(
        &self,
        reader: DiskReader,
        lanes: Lanes,
        state: TargetState,
        map: Option<DataMap>,
        tried: &str,
    ) -> Outcome<RestoreStats> {
        let mut set =
            LaneSet::new(lanes.set, self.context.engine).map_err(|e| Failure::failed(tried, e))?;
        if let Some(map) = map {
            set = set.with_map(map);
        }
        let _hang_up = lanes.hang_up;
        let options = data::options(self.context, self.repository, &self.interrupt.flag());
        let mut meter = Meter::new(reader.size_bytes(), options.control.progress.clone());
        if self.verify == Verify::ReadBack {
            meter = meter.with_read_back();
        }
        let _shown = Progress::show(format!("restoring {}", self.point.vm), meter, self.context);
        let (hasher, verify) = (self.repository.hasher(), self.verify);
        data::blocking(move || {
            icecore_io_engine::restore(&reader, hasher, &mut set, state, None, verify, &options)
        })
        .await
        .map_err(|e| failure(tried, e))
    }
}

/// What an error of the data plane means for a write: damage is told apart.
pub fn failure(tried: &str, error: EngineError) -> Failure {
    match error {
        EngineError::Cancelled => Failure::interrupted(tried),
        EngineError::Repository { source, .. } => Failure::from_repository(tried, source),
        EngineError::RootDiffers { .. } | EngineError::BlocksDiffer { .. } => {
            Failure::damaged(tried, error)
        }
        EngineError::Io { ref cause, .. } if is_full(cause) => Failure::failed(tried, error)
            .next("there is no space left at the target: make some, or choose another"),
        _ => Failure::failed(tried, error),
    }
}

fn is_full(cause: &Cause) -> bool {
    let full = rustix::io::Errno::NOSPC.raw_os_error();
    match cause {
        Cause::Os(error) => error.raw_os_error() == Some(full),
        Cause::Wire(error) => error.errno == Some(full),
        Cause::EndOfFile => false,
    }
}

fn partial_path(path: &Path, run: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".icecore-{run}.partial"));
    path.with_file_name(name)
}
