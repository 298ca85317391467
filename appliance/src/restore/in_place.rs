//! Restores to where the data stay: block devices and NBD exports.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::atomic::Ordering;

use icecore_io_engine::RestoreStats;
use icecore_nbd_client::{ExportInfo, Uri};
use icecore_repository::DiskReader;

use super::Restore;
use crate::failure::{Failure, Outcome, Status};
use crate::image::{Format, RunDir, Served, StorageDaemon, require_unlocked};
use crate::nbd::{self, Peer};

/// What is wiped at the beginning of a target that must not be used.
const WIPE_BYTES: usize = 1 << 20;

/// A restore that failed, and what it may have left.
struct Broken {
    failure: Failure,
    wrote: bool,
    /// The server takes another connection.
    several: bool,
}

impl From<Failure> for Broken {
    fn from(failure: Failure) -> Self {
        Self { failure, wrote: false, several: false }
    }
}

impl Restore<'_> {
    /// Writes a block device, under the lock that a QEMU takes on it, too.
    pub(super) async fn device(
        &self,
        reader: DiskReader,
        path: &Path,
        tried: &str,
    ) -> Outcome<RestoreStats> {
        let _claim = claim(path, tried)?;
        require_unlocked(path, Format::Raw, tried)?;
        let dir = RunDir::of(self.context, self.job.id())?;
        let made = dir.path().map_err(|e| Failure::failed(tried, e))?;
        let daemon = locked(path, made)?;
        let peer = Peer::on_socket(daemon.socket(), daemon.export());
        match self.in_place(reader, &peer, tried).await {
            Ok(stats) => daemon.stop().map(|()| stats),
            Err(broken) => {
                // It ends with all that it had to write: nothing comes after the wipe.
                drop(daemon);
                if broken.wrote {
                    note_wipe(tried, wipe_device(path, made, tried).await);
                }
                Err(broken.failure)
            }
        }
    }

    /// Writes an NBD export.
    pub(super) async fn export(
        &self,
        reader: DiskReader,
        uri: &str,
        tried: &str,
    ) -> Outcome<RestoreStats> {
        let uri: Uri = uri.parse().map_err(|e| Failure::usage(tried, e))?;
        let peer = Peer::plain(uri);
        match self.in_place(reader, &peer, tried).await {
            Ok(stats) => Ok(stats),
            Err(Broken { failure, wrote: false, .. }) => Err(failure),
            Err(Broken { failure, several: true, .. }) => {
                note_wipe(tried, wipe(&peer, tried).await);
                Err(failure)
            }
            Err(Broken { failure, .. }) => {
                // Whoever answers there now may serve something else.
                let why = "its server takes one connection, and that is gone";
                note_wipe(tried, Err(Failure::failed("wipe it", why)));
                Err(failure)
            }
        }
    }

    async fn in_place(
        &self,
        reader: DiskReader,
        peer: &Peer,
        tried: &str,
    ) -> Result<RestoreStats, Broken> {
        let wanted = reader.size_bytes();
        let accept = |export: &ExportInfo| {
            if export.read_only() {
                return Err(Failure::refused(tried, "the export is read-only"));
            }
            require_room(export.reachable_bytes(), wanted, tried).map(|()| wanted)
        };
        let target = nbd::target_lanes(peer, accept, tried).await?;
        let map = target.several.then(|| nbd::data_map(peer, wanted, tried));
        let ran = self.run(reader, target.lanes, target.state, map, tried).await;
        ran.map_err(|mut failure| {
            let wrote = target.wrote.load(Ordering::Relaxed);
            if wrote && failure.status == Status::Interrupted {
                failure.why = "interrupted; what was there before is lost".into();
            }
            Broken { failure, wrote, several: target.several }
        })
    }
}

/// Keeps mounts and other holders away from a device. A QEMU does not care for that: it has its lock.
fn claim(path: &Path, tried: &str) -> Outcome<File> {
    let mut options = OpenOptions::new();
    // On a block device O_EXCL alone means: nobody has it mounted or in use.
    let exclusive = (rustix::fs::OFlags::EXCL | rustix::fs::OFlags::NOFOLLOW).bits();
    options.read(true).write(true).custom_flags(exclusive as i32);
    options.open(path).map_err(|e| match e.raw_os_error() {
        Some(code) if code == rustix::io::Errno::BUSY.raw_os_error() => {
            Failure::refused(tried, "the device is mounted or in use")
        }
        _ => Failure::failed(tried, e),
    })
}

fn locked(path: &Path, dir: &Path) -> Outcome<StorageDaemon> {
    StorageDaemon::start(path, Format::Raw, &Served::Exclusive { bitmap: None }, dir)
}

fn require_room(room: u64, wanted: u64, tried: &str) -> Outcome<()> {
    if room >= wanted {
        return Ok(());
    }
    let why = format!("the target is too small: it has {room} bytes, the disk {wanted}");
    Err(Failure::refused(tried, why).next("choose a target at least as large as the disk"))
}

/// An image of our own making has its disk's size, or it is another's.
pub(super) fn require_size(export: &ExportInfo, wanted: u64, tried: &str) -> Outcome<u64> {
    if export.size_bytes == wanted {
        return Ok(wanted);
    }
    let why = format!("the image is served with {} bytes, not {wanted}", export.size_bytes);
    Err(Failure::failed(tried, why))
}

fn note_wipe(tried: &str, wiped: Outcome<()>) {
    match wiped {
        Ok(()) => eprintln!("icecore: {tried}: the target's beginning was wiped: do not use it"),
        Err(Failure { why, .. }) => {
            eprintln!("icecore: {tried}: the target is incomplete and could not be wiped: {why}")
        }
    }
}

async fn wipe_device(path: &Path, dir: &Path, tried: &str) -> Outcome<()> {
    let daemon = locked(path, dir)?;
    wipe(&Peer::on_socket(daemon.socket(), daemon.export()), tried).await?;
    daemon.stop()
}

async fn wipe(peer: &Peer, tried: &str) -> Outcome<()> {
    let mut control = nbd::control(peer, None, tried).await?;
    let failed = |e| Failure::failed(tried, e);
    let length = WIPE_BYTES.min(usize::try_from(control.export().size_bytes).unwrap_or(WIPE_BYTES));
    control.write(0, &vec![0; length]).await.map_err(failed)?;
    control.flush().await.map_err(failed)
}
