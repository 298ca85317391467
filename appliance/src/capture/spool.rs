//! Where a pushed disk arrives: QEMU writes what it copies to this export, and it is read from
//! here afterwards. So QEMU, whose guest waits for its own drains, never waits for the repository.
//!
//! What did not arrive is not zero: each granule remembers whether data or zeroes covered it wholly.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use icecore_io_engine::{ReadItem, Span};
use icecore_nbd_client::Errno;
use icecore_nbd_client::server::{Access, Export, Features, ZeroMode};
use rustix::fs::FallocateFlags;

/// QEMU copies in clusters of 64 KiB or multiples of them.
const GRANULE: u64 = 64 << 10;
/// A spool is cut off when less than this share of its file system is left.
const FREE_PERCENT_MIN: u64 = 10;
/// How many bytes may arrive between two looks at the free space.
const LOOK_BYTES: u64 = 64 << 20;

/// What covers a granule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Cover {
    Nothing,
    Partly,
    Zero,
    Data,
}

#[derive(Debug)]
struct Received {
    cover: Vec<Cover>,
    /// Ranges of the granules that are covered in part.
    parts: HashMap<u64, Vec<(u64, u64)>>,
    since_look: u64,
}

/// A disk that is being pushed, or was.
#[derive(Debug)]
pub struct Spool {
    file: File,
    size: u64,
    received: Mutex<Received>,
}

impl Spool {
    /// An empty spool for a disk of `size` bytes.
    pub fn create(path: &Path, size: u64) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).mode(0o600).open(path)?;
        file.set_len(size)?;
        let granules = usize::try_from(size.div_ceil(GRANULE)).map_err(io::Error::other)?;
        let cover = vec![Cover::Nothing; granules];
        let received = Received { cover, parts: HashMap::new(), since_look: 0 };
        Ok(Self { file, size, received: Mutex::new(received) })
    }

    /// The file, for reading what arrived.
    pub fn file(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// Reads what arrived at a range; it must have arrived.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        match self.missing(offset, buffer.len() as u64) {
            None => self.file.read_exact_at(buffer, offset),
            Some(at) => Err(io::Error::other(format!("QEMU did not push the byte at {at}"))),
        }
    }

    /// The first byte of a range that did not arrive.
    pub fn missing(&self, offset: u64, length: u64) -> Option<u64> {
        let received = self.received();
        let (first, end) = (offset / GRANULE, (offset + length).div_ceil(GRANULE));
        let whole = |granule: &u64| {
            matches!(received.cover.get(*granule as usize), Some(Cover::Data | Cover::Zero))
        };
        (first..end).find(|granule| !whole(granule)).map(|granule| granule * GRANULE)
    }

    /// All that arrived, ascending, as items to read.
    pub fn items(&self) -> Vec<ReadItem> {
        let received = self.received();
        let mut items: Vec<ReadItem> = Vec::new();
        for (granule, cover) in received.cover.iter().enumerate() {
            let start = granule as u64 * GRANULE;
            let len = GRANULE.min(self.size - start);
            let last = items.last_mut();
            match (cover, last) {
                (Cover::Nothing | Cover::Partly, _) => {}
                (Cover::Data, Some(ReadItem::Data(span))) if span.offset + span.len == start => {
                    span.len += len;
                }
                (Cover::Zero, Some(ReadItem::Zero(span))) if span.offset + span.len == start => {
                    span.len += len;
                }
                (Cover::Data, _) => items.push(ReadItem::Data(Span::new(start, len))),
                (Cover::Zero, _) => items.push(ReadItem::Zero(Span::new(start, len))),
            }
        }
        items
    }

    fn received(&self) -> MutexGuard<'_, Received> {
        self.received.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses to fill the file system: others live on it, the images perhaps.
    fn require_room(&self, received: &mut Received, length: u64) -> Result<(), Errno> {
        received.since_look += length;
        if received.since_look < LOOK_BYTES {
            return Ok(());
        }
        received.since_look = 0;
        let system = rustix::fs::fstatvfs(&self.file).map_err(|_| Errno::EIO)?;
        if system.f_bavail < system.f_blocks / 100 * FREE_PERCENT_MIN {
            return Err(Errno::ENOSPC);
        }
        Ok(())
    }

    fn note(&self, received: &mut Received, offset: u64, length: u64, cover: Cover) {
        let end = offset + length;
        let mut at = offset;
        while at < end {
            let granule = at / GRANULE;
            let start = granule * GRANULE;
            let stop = (start + GRANULE).min(self.size);
            let upto = end.min(stop);
            if at == start && upto == stop {
                received.parts.remove(&granule);
                received.cover[granule as usize] = cover;
            } else {
                note_part(received, granule, (at, upto), (start, stop));
            }
            at = upto;
        }
    }
}

/// A part of a granule: data once parts cover all of it, for parts may be of either kind.
fn note_part(received: &mut Received, granule: u64, part: (u64, u64), whole: (u64, u64)) {
    let slot = &mut received.cover[granule as usize];
    if matches!(slot, Cover::Data | Cover::Zero) {
        *slot = Cover::Data;
        return;
    }
    *slot = Cover::Partly;
    let parts = received.parts.entry(granule).or_default();
    parts.push(part);
    parts.sort_unstable();
    let mut covered = whole.0;
    for (start, end) in parts.iter() {
        if *start <= covered {
            covered = covered.max(*end);
        }
    }
    if covered >= whole.1 {
        *slot = Cover::Data;
        received.parts.remove(&granule);
    }
}

impl Export for Spool {
    fn features(&self) -> Features {
        Features::new(self.size, Access::Writable)
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Errno> {
        self.file.read_exact_at(buffer, offset).map_err(|_| Errno::EIO)
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), Errno> {
        self.require_room(&mut self.received(), data.len() as u64)?;
        self.file.write_all_at(data, offset).map_err(|e| failed(&e))?;
        self.note(&mut self.received(), offset, data.len() as u64, Cover::Data);
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, length: u64, _mode: ZeroMode) -> Result<(), Errno> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&self.file, flags, offset, length).map_err(|e| failed(&e.into()))?;
        self.note(&mut self.received(), offset, length, Cover::Zero);
        Ok(())
    }
}

fn failed(error: &io::Error) -> Errno {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Errno::ENOSPC,
        _ => Errno::EIO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spool(size: u64) -> (tempfile::TempDir, Spool) {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::create(&dir.path().join("s"), size).unwrap();
        (dir, spool)
    }

    #[test]
    fn what_did_not_arrive_is_missing_and_not_zero() {
        let (_dir, spool) = spool(5 * GRANULE + 100);
        spool.write(GRANULE, &vec![7; GRANULE as usize]).unwrap();
        spool.write_zeroes(3 * GRANULE, GRANULE, ZeroMode::MayTrim).unwrap();
        assert_eq!(spool.missing(GRANULE, GRANULE), None);
        assert_eq!(spool.missing(0, 1), Some(0));
        assert_eq!(spool.missing(GRANULE, 2 * GRANULE), Some(2 * GRANULE));
        assert!(spool.read_at(2 * GRANULE, &mut [0; 10]).is_err());
        assert_eq!(
            spool.items(),
            vec![
                ReadItem::Data(Span::new(GRANULE, GRANULE)),
                ReadItem::Zero(Span::new(3 * GRANULE, GRANULE)),
            ]
        );
    }

    #[test]
    fn parts_add_up_and_a_short_tail_is_whole() {
        let (_dir, spool) = spool(GRANULE + 100);
        spool.write(10, &vec![1; GRANULE as usize - 10]).unwrap();
        assert_eq!(spool.missing(0, GRANULE), Some(0));
        spool.write(0, &[1; 10]).unwrap();
        spool.write(GRANULE, &[2; 100]).unwrap();
        assert_eq!(spool.missing(0, GRANULE + 100), None);
        assert_eq!(spool.items(), vec![ReadItem::Data(Span::new(0, GRANULE + 100))]);
    }
}
