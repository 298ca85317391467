//! What tells an image that was written to from one that was not.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use super::ImageInfo;
use crate::failure::{Failure, Outcome};

/// Fields of a block device's `stat` that grow with each change of its content, from 0: sectors
/// written, sectors discarded. (The numbers of requests grow with each flush, too.)
const CHANGE_FIELDS: [usize; 2] = [6, 13];

/// The state of an image and of all that it is based on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stamp(Vec<FileStamp>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct FileStamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    /// Of a block device, whose node keeps its times whatever is written: its counters.
    changes: Option<[u64; CHANGE_FIELDS.len()]>,
}

impl Stamp {
    /// The state of the image at `path` now.
    pub fn of(path: &Path, info: &ImageInfo) -> Outcome<Self> {
        let files = super::chain(path, info)?;
        let stamps = files.iter().map(|file| of_file(file));
        stamps.collect::<io::Result<_>>().map(Self).map_err(|e| {
            Failure::failed(format!("tell whether {} was written to", path.display()), e)
        })
    }
}

fn of_file(path: &Path) -> io::Result<FileStamp> {
    let meta = std::fs::metadata(path)?;
    let changes = match meta.file_type().is_block_device() {
        true => Some(changes_of_device(path, meta.rdev())?),
        false => None,
    };
    Ok(FileStamp {
        device: meta.dev(),
        inode: meta.ino(),
        size: meta.size(),
        modified: (meta.mtime(), meta.mtime_nsec()),
        changes,
    })
}

fn changes_of_device(path: &Path, number: u64) -> io::Result<[u64; CHANGE_FIELDS.len()]> {
    // What was written may still be in the page cache, and the counters see only what left it.
    File::open(path)?.sync_all()?;
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    parse(&std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/stat"))?)
}

fn parse(stat: &str) -> io::Result<[u64; CHANGE_FIELDS.len()]> {
    let fields: Vec<u64> = stat.split_ascii_whitespace().filter_map(|f| f.parse().ok()).collect();
    if fields.len() <= CHANGE_FIELDS[0] {
        return Err(io::Error::other(format!("the counters {stat:?} are not understood")));
    }
    // Kernels before 4.18 count no discards.
    Ok(CHANGE_FIELDS.map(|at| fields.get(at).copied().unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counters_of_writes_and_discards_are_kept() {
        let old = "  10 0 80 1 20 3 160 4 0 5 6";
        assert_eq!(parse(old).unwrap(), [160, 0]);
        let new = "10 0 80 1 20 3 160 4 0 5 6 7 0 56 9 1 1";
        assert_eq!(parse(new).unwrap(), [160, 56]);
        assert!(parse("1 2 3").is_err());
    }

    #[test]
    fn a_write_changes_the_stamp_of_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.raw");
        std::fs::write(&path, [1; 512]).unwrap();
        let before = of_file(&path).unwrap();
        assert_eq!(of_file(&path).unwrap(), before);
        let later = std::time::SystemTime::now() + std::time::Duration::from_secs(1);
        File::options().write(true).open(&path).unwrap().set_modified(later).unwrap();
        assert_ne!(of_file(&path).unwrap(), before);
    }
}
