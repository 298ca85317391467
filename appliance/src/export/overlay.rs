//! The file that takes a writable export's writes: the point itself never changes.
//!
//! ```text
//! 0            blocks of the disk, at their own offsets; sparse
//! DATA_END     one bit a block: 1 when the block is here (little end first)
//! BITS_END     JSON: which point's disk this lies over
//! ```
//! A flush makes the data durable before the bits that say it is there, so a crash shows either the
//! old content or the new one. The bits are kept, not guessed from holes: file systems that compress
//! turn written zeroes into holes.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use rustix::fs::{FallocateFlags, FlockOperation, flock};
use serde::{Deserialize, Serialize};

/// The trailing description is small; more is no overlay of ours.
const LABEL_BYTES_MAX: u64 = 4096;
/// Alignment of the bits.
const PAGE: u64 = 4096;

/// What an overlay lies over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Label {
    pub icecore_overlay: u32,
    pub point: String,
    pub disk: String,
    pub size_bytes: u64,
    pub block_bytes: u32,
}

/// An open overlay.
#[derive(Debug)]
pub struct Overlay {
    file: File,
    label: Label,
    bits: Vec<u8>,
    unsaved: bool,
}

impl Overlay {
    /// Opens the overlay at `path`, or makes it; one that lies over something else is an error, and
    /// one that another export has open is `WouldBlock`.
    pub fn open(path: &Path, label: Label) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32).open(path)?;
        // Two exports with one overlay would overwrite each other's bits. The lock ends with the file.
        flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        let bits = vec![0; bit_bytes(&label)];
        let mut overlay = Self { file, label, bits, unsaved: false };
        match overlay.file.metadata()?.len() {
            0 => overlay.create()?,
            length => overlay.load(length)?,
        }
        Ok(overlay)
    }

    fn create(&mut self) -> io::Result<()> {
        let label = serde_json::to_vec(&self.label)?;
        self.file.write_all_at(&label, self.label_offset())?;
        self.file.sync_all()
    }

    fn load(&mut self, length: u64) -> io::Result<()> {
        let other = || io::Error::other("the file is no overlay of this point's disk");
        let label_bytes = length.checked_sub(self.label_offset()).ok_or_else(other)?;
        if label_bytes > LABEL_BYTES_MAX {
            return Err(other());
        }
        let mut label = vec![0; label_bytes as usize];
        self.file.read_exact_at(&mut label, self.label_offset())?;
        let found: Label = serde_json::from_slice(&label).map_err(|_| other())?;
        if found != self.label {
            return Err(io::Error::other(format!(
                "the overlay lies over disk {} of point {}",
                found.disk, found.point
            )));
        }
        self.file.read_exact_at(&mut self.bits, data_end(&self.label))
    }

    /// Whether block `index` is in the overlay.
    pub fn holds(&self, index: u64) -> bool {
        self.bits.get((index / 8) as usize).is_some_and(|byte| byte & 1 << (index % 8) != 0)
    }

    /// Reads a part of a block that is in the overlay.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }

    /// Writes into a block that is in the overlay, or a whole block.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)?;
        self.note(offset / u64::from(self.label.block_bytes));
        Ok(())
    }

    /// Makes whole blocks read as zero.
    pub fn zero(&mut self, offset: u64, length: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&self.file, flags, offset, length) {
            Ok(()) => self.note(offset / u64::from(self.label.block_bytes)),
            Err(_) => self.write(offset, &vec![0; length as usize])?,
        }
        Ok(())
    }

    fn note(&mut self, index: u64) {
        if !self.holds(index) {
            self.bits[(index / 8) as usize] |= 1 << (index % 8);
            self.unsaved = true;
        }
    }

    /// Makes everything written durable.
    pub fn flush(&mut self) -> io::Result<()> {
        self.file.sync_data()?;
        if self.unsaved {
            self.file.write_all_at(&self.bits, data_end(&self.label))?;
            self.file.sync_data()?;
            self.unsaved = false;
        }
        Ok(())
    }

    fn label_offset(&self) -> u64 {
        data_end(&self.label) + (self.bits.len() as u64).next_multiple_of(PAGE)
    }
}

fn bit_bytes(label: &Label) -> usize {
    label.size_bytes.div_ceil(u64::from(label.block_bytes)).div_ceil(8) as usize
}

fn data_end(label: &Label) -> u64 {
    label.size_bytes.next_multiple_of(PAGE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn label(point: &str) -> Label {
        Label {
            icecore_overlay: 1,
            point: point.into(),
            disk: "vda".into(),
            size_bytes: 10_000,
            block_bytes: 4096,
        }
    }

    #[test]
    fn what_was_flushed_is_there_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("overlay");
        let mut overlay = Overlay::open(&path, label("p")).unwrap();
        overlay.write(8192, &[7; 1808]).unwrap();
        overlay.flush().unwrap();
        drop(overlay);
        let again = Overlay::open(&path, label("p")).unwrap();
        assert!(again.holds(2) && !again.holds(0));
        let mut tail = [0; 1808];
        again.read(8192, &mut tail).unwrap();
        assert_eq!(tail, [7; 1808]);
    }

    #[test]
    fn an_overlay_is_open_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("overlay");
        let first = Overlay::open(&path, label("p")).unwrap();
        let second = Overlay::open(&path, label("p")).unwrap_err();
        assert_eq!(second.kind(), io::ErrorKind::WouldBlock);
        drop(first);
        Overlay::open(&path, label("p")).unwrap();
    }

    #[test]
    fn an_overlay_of_another_point_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("overlay");
        drop(Overlay::open(&path, label("p")).unwrap());
        let refused = Overlay::open(&path, label("q")).unwrap_err();
        assert!(refused.to_string().contains("point p"), "{refused}");
        std::fs::write(&path, vec![1; 20_000]).unwrap();
        assert!(Overlay::open(&path, label("p")).is_err());
    }
}
