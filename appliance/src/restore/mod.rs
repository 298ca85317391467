//! Writing disks of a point to targets, and proving that they arrived.
//!
//! A file is made beside its place and moved there when it is proven, so an unfinished one never
//! looks finished. A device or an export is written in place; when that fails its beginning is
//! wiped, so that nothing boots from it.

mod target;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use icecore_io_engine::{EngineError, Lane, LaneSet, RestoreStats, TargetState, Verify};
use icecore_nbd_client::Uri;
use icecore_repository::{DiskReader, Point, PointDisk, Repository};
use serde::Serialize;

use crate::context::Context;
use crate::data;
use crate::failure::{Failure, Outcome};
use crate::image::{self, Format, Served, StorageDaemon};
use crate::interrupt::Interrupt;
use crate::job::Job;
use crate::nbd::{self, Lanes, Peer};
use crate::progress::{Meter, Progress};
use crate::state::sync_parent;

pub use target::{Target, Wish, targets};

/// Lanes on one file, for the thread backend.
const FILE_LANES: usize = 4;
/// What is wiped at the beginning of a target that must not be used.
const WIPE_BYTES: usize = 1 << 20;

/// One restored disk, as it is reported.
#[derive(Debug, Serialize)]
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
            Target::File { path, format } => self.file(reader, path, *format, &tried).await?,
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
        path: &Path,
        format: Format,
        tried: &str,
    ) -> Outcome<RestoreStats> {
        let partial = partial_path(path, self.job.id().run());
        self.job.record.files.push(partial.clone());
        self.job.save(self.context)?;
        let written = match format {
            Format::Raw => self.raw_file(reader, &partial, tried).await,
            Format::Qcow2 => self.qcow2_file(reader, &partial, tried).await,
        };
        let failed = |e: std::io::Error| Failure::failed(tried, e);
        match written {
            Ok(stats) => {
                std::fs::rename(&partial, path).and_then(|()| sync_parent(path)).map_err(failed)?;
                Ok(stats)
            }
            Err(failure) => {
                // It is not there when making it was what failed.
                let _ = std::fs::remove_file(&partial);
                Err(failure)
            }
        }
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
        let stats = self.run(reader, lanes, TargetState::Blank, tried).await?;
        kept.sync_all().map_err(failed)?;
        Ok(stats)
    }

    async fn qcow2_file(
        &self,
        reader: DiskReader,
        partial: &Path,
        tried: &str,
    ) -> Outcome<RestoreStats> {
        image::create_qcow2(partial, reader.size_bytes(), tried)?;
        let dir = self.context.state.dir("run")?;
        let daemon = StorageDaemon::start(partial, Format::Qcow2, &Served::Exclusive, &dir)?;
        let uri = Peer::on_socket(daemon.socket(), daemon.export());
        let lanes = nbd::lanes(&uri, tried).await?;
        let stats = self.run(reader, lanes, TargetState::Blank, tried).await?;
        daemon.stop()?;
        let file = File::open(partial).and_then(|file| file.sync_all());
        file.map_err(|e| Failure::failed(tried, e))?;
        Ok(stats)
    }

    async fn device(&self, reader: DiskReader, path: &Path, tried: &str) -> Outcome<RestoreStats> {
        let failed = |e: std::io::Error| Failure::failed(tried, e);
        let mut options = OpenOptions::new();
        // On a block device O_EXCL alone means: nobody has it mounted or in use.
        let exclusive = (rustix::fs::OFlags::EXCL | rustix::fs::OFlags::NOFOLLOW).bits();
        options.read(true).write(true).custom_flags(exclusive as i32);
        let file = options.open(path).map_err(|e| match e.raw_os_error() {
            Some(code) if code == rustix::io::Errno::BUSY.raw_os_error() => {
                Failure::refused(tried, "the device is mounted or in use")
            }
            _ => failed(e),
        })?;
        let size = std::io::Seek::seek(&mut &file, std::io::SeekFrom::End(0)).map_err(failed)?;
        require_room(size, reader.size_bytes(), tried)?;
        let kept = file.try_clone().map_err(failed)?;
        let set = Lane::files(file, FILE_LANES).map_err(|e| Failure::failed(tried, e))?;
        let lanes = Lanes { set, hang_up: Vec::new() };
        let result = self.run(reader, lanes, TargetState::Unknown, tried).await;
        if result.is_err() {
            let length = WIPE_BYTES.min(usize::try_from(size).unwrap_or(WIPE_BYTES));
            let wiped = std::os::unix::fs::FileExt::write_all_at(&kept, &vec![0; length], 0);
            note_wipe(tried, wiped.and_then(|()| kept.sync_all()).map_err(|e| e.to_string()));
        }
        result
    }

    async fn export(&self, reader: DiskReader, uri: &str, tried: &str) -> Outcome<RestoreStats> {
        let uri: Uri = uri.parse().map_err(|e| Failure::usage(tried, e))?;
        let uri = Peer::plain(uri);
        let control = nbd::control(&uri, None, tried).await?;
        require_room(control.export().size_bytes, reader.size_bytes(), tried)?;
        if control.export().read_only() {
            return Err(Failure::refused(tried, "the export is read-only"));
        }
        // A server may take one client at a time.
        control.disconnect().await.map_err(|e| Failure::failed(tried, e))?;
        let lanes = nbd::lanes(&uri, tried).await?;
        let result = self.run(reader, lanes, TargetState::Unknown, tried).await;
        if result.is_err() {
            note_wipe(tried, wipe_export(&uri, tried).await.map_err(|e| e.to_string()));
        }
        result
    }

    async fn run(
        &self,
        reader: DiskReader,
        lanes: Lanes,
        state: TargetState,
        tried: &str,
    ) -> Outcome<RestoreStats> {
        let mut set =
            LaneSet::new(lanes.set, self.context.engine).map_err(|e| Failure::failed(tried, e))?;
        let _hang_up = lanes.hang_up;
        let options = data::options(self.context, &self.interrupt.flag());
        let meter = Meter::new(reader.size_bytes(), options.control.progress.clone());
        let _shown =
            Progress::show(format!("restoring {}", self.point.vm), meter, self.context.quiet);
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
        _ => Failure::failed(tried, error),
    }
}

fn require_room(room: u64, wanted: u64, tried: &str) -> Outcome<()> {
    if room >= wanted {
        return Ok(());
    }
    let why = format!("the target is too small: it has {room} bytes, the disk {wanted}");
    Err(Failure::refused(tried, why).next("choose a target at least as large as the disk"))
}

fn note_wipe(tried: &str, wiped: Result<(), String>) {
    match wiped {
        Ok(()) => eprintln!("icecore: {tried}: the target's beginning was wiped: do not use it"),
        Err(why) => {
            eprintln!("icecore: {tried}: the target is incomplete and could not be wiped: {why}")
        }
    }
}

async fn wipe_export(uri: &Peer, tried: &str) -> Outcome<()> {
    let mut control = nbd::control(uri, None, tried).await?;
    let failed = |e| Failure::failed(tried, e);
    let length = WIPE_BYTES.min(usize::try_from(control.export().size_bytes).unwrap_or(WIPE_BYTES));
    control.write(0, &vec![0; length]).await.map_err(failed)?;
    control.flush().await.map_err(failed)
}

fn partial_path(path: &Path, run: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".icecore-{run}.partial"));
    path.with_file_name(name)
}
