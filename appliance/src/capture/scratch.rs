//! Scratch images: where QEMU keeps the blocks that the guest overwrites before they are read.
//!
//! A scratch must never cost the guest anything: it is on a local file system, it leaves room for
//! others, it is capped, and QEMU has opened it before the guest is frozen.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{Gid, Uid};

use crate::failure::{Failure, Outcome};
use crate::names::human_bytes;
use crate::state::make_private_dir;

/// This share of the file system stays free whatever the scratch grows to.
pub const FREE_PERCENT_MIN: u64 = 10;
/// A qcow2 without a single data cluster takes 256 KiB; less than this holds nothing.
const SCRATCH_BYTES_MIN: u64 = 512 << 10;

/// QEMU's sector.
const SECTOR: u64 = 512;

/// `f_type` of file systems whose answer may take longer than a guest can wait.
const NETWORK_FILE_SYSTEMS: [(i64, &str); 8] = [
    (0x6969, "NFS"),
    (0xff53_4d42, "CIFS"),
    (0xfe53_4d42, "SMB"),
    (0x517b, "SMB"),
    (0x0102_1997, "9p"),
    (0x00c3_6400, "Ceph"),
    (0x6573_5546, "FUSE"),
    (0x0bd0_0bd0, "Lustre"),
];

/// The user that QEMU runs as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    pub uid: u32,
    pub gid: u32,
}

/// A run's scratch directory; removed with its files when dropped.
#[derive(Debug)]
pub struct ScratchDir {
    path: PathBuf,
    owner: Option<Owner>,
    /// Keeps the files: QEMU still uses them.
    kept: bool,
}

/// A scratch image for one disk.
#[derive(Debug, Clone)]
pub struct ScratchFile {
    pub path: PathBuf,
    /// The file never grows past this.
    pub cap_bytes: u64,
}

impl ScratchDir {
    /// Makes a private directory for a run below `base`, owned by the user that QEMU runs as.
    pub fn make(base: &Path, run: &str, owner: Option<Owner>) -> Outcome<Self> {
        let name = format!("icecore-{run}");
        let tried = format!("make a scratch directory in {}", base.display());
        let failed = |e: std::io::Error| {
            Failure::failed(&tried, e).next("name another directory with --scratch")
        };
        make_private_dir(&base.join(&name)).map_err(failed)?;
        let path = std::fs::canonicalize(base.join(&name)).map_err(failed)?;
        let dir = Self { path, owner, kept: false };
        dir.give_away(&dir.path).map_err(failed)?;
        Ok(dir)
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes one capped scratch image for each disk size.
    pub fn files(&self, sizes: &[u64], limit: Option<u64>) -> Outcome<Vec<ScratchFile>> {
        let room = room(&self.path)?;
        let share = room / (sizes.len() as u64).max(1);
        let make = |(number, size): (usize, &u64)| self.file(number, *size, share, limit);
        sizes.iter().enumerate().map(make).collect()
    }

    fn file(
        &self,
        number: usize,
        size: u64,
        share: u64,
        limit: Option<u64>,
    ) -> Outcome<ScratchFile> {
        let path = self.path.join(format!("disk{number}.qcow2"));
        let tried = format!("make the scratch image {}", path.display());
        let cap_bytes = cap(size, share, limit);
        if cap_bytes < SCRATCH_BYTES_MIN {
            return Err(Failure::failed(&tried, format!(
                "the scratch would be too small: {} where at least {} are needed and {FREE_PERCENT_MIN} % \
                 of the file system stay free",
                human_bytes(cap_bytes), human_bytes(SCRATCH_BYTES_MIN)
            ))
            .next("name a directory with more room with --scratch, or raise --scratch-limit"));
        }
        let failed = |e: std::io::Error| Failure::failed(&tried, e);
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).mode(0o600);
        let file = options.open(&path).map_err(failed)?;
        file.set_len(cap_bytes).map_err(failed)?;
        icecore_qmp::capture::scratch::format(&file, size).map_err(failed)?;
        self.give_away(&path).map_err(failed)?;
        Ok(ScratchFile { path, cap_bytes })
    }

    /// Gives a file to the user that QEMU runs as.
    pub fn give_away(&self, path: &Path) -> std::io::Result<()> {
        let Some(owner) = self.owner else { return Ok(()) };
        let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
        rustix::fs::chown(path, Some(uid), Some(gid)).map_err(Into::into)
    }

    /// QEMU still holds the files: they stay, and `doctor` removes them later.
    pub fn keep(&mut self) {
        self.kept = true;
    }
}

impl Drop for ScratchDir {
    fn drop(&mut self) {
        if !self.kept
            && let Err(e) = std::fs::remove_dir_all(&self.path)
        {
            tracing::warn!(path = %self.path.display(), "scratch directory not removed: {e}");
        }
    }
}

/// The cap of one scratch. A qcow2 of a disk needs some more than the disk: 1 MiB and 0.1 %.
fn cap(size: u64, share: u64, limit: Option<u64>) -> u64 {
    let whole = size.saturating_add(size / 1024).saturating_add(1 << 20);
    let cap = whole.min(share).min(limit.unwrap_or(u64::MAX));
    // QEMU counts in sectors.
    cap - cap % SECTOR
}

/// Bytes that scratch images may take here: half of what is free, and never the last tenth.
fn room(path: &Path) -> Outcome<u64> {
    space(path).map(|space| room_of(space.free, space.total))
}

/// The file system of a scratch directory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    pub free: u64,
    pub total: u64,
}

/// Looks at the file system of a scratch directory; one whose delays would reach the guest is
/// refused.
pub fn space(path: &Path) -> Outcome<Space> {
    let tried = format!("use {} for scratch images", path.display());
    let system = rustix::fs::statfs(path).map_err(|e| Failure::failed(&tried, e))?;
    let kind = system.f_type & 0xffff_ffff;
    if let Some((_, name)) = NETWORK_FILE_SYSTEMS.iter().find(|(known, _)| *known == kind) {
        return Err(Failure::failed(
            tried,
            format!("it is a network file system ({name}), whose delays would reach the guest"),
        )
        .next("name a directory on a local disk with --scratch"));
    }
    let unit = u64::try_from(system.f_bsize).unwrap_or(4096);
    let (free, total) = (system.f_bavail, system.f_blocks);
    Ok(Space { free: free.saturating_mul(unit), total: total.saturating_mul(unit) })
}

fn room_of(free: u64, total: u64) -> u64 {
    (free / 2).min(free.saturating_sub(total / 100 * FREE_PERCENT_MIN))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenth_stays_free() {
        assert_eq!(room_of(1000, 1000), 500);
        assert_eq!(room_of(150, 1000), 50);
        assert_eq!(room_of(90, 1000), 0);
    }

    #[test]
    fn the_smallest_limit_wins() {
        assert_eq!(cap(1 << 30, 1 << 40, None), (1 << 30) + (1 << 20) + (1 << 20));
        assert_eq!(cap(1 << 30, 5 << 20, None), 5 << 20);
        assert_eq!(cap(1 << 30, 5 << 20, Some(1 << 20)), 1 << 20);
    }

    #[test]
    fn no_room_is_said_before_anything_is_made() {
        let base = tempfile::tempdir().unwrap();
        let dir = ScratchDir::make(base.path(), "0badcafe", None).unwrap();
        let failure = dir.files(&[1 << 30], Some(4096)).unwrap_err();
        assert!(failure.why.contains("too small"), "{failure}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
