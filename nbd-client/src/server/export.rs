//! What a server serves.

use std::sync::{PoisonError, RwLock};

use crate::error::Errno;
use crate::extents::Extent;
use crate::proto::{BASE_ALLOCATION, PAYLOAD_BYTES_MAX, STATE_HOLE, STATE_ZERO};

/// Whether clients may write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reads only.
    ReadOnly,
    /// Reads and writes.
    Writable,
}

/// How zeroes are to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroMode {
    /// Holes are welcome.
    MayTrim,
    /// The range stays allocated.
    NoHole,
}

/// What an export offers. Constant while it is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Features {
    /// Size in bytes.
    pub size_bytes: u64,
    /// A text for people; empty for none.
    pub description: String,
    /// Whether writes are taken.
    pub access: Access,
    /// Whether TRIM is offered (writable exports only).
    pub trim: bool,
    /// Whether FAST_ZERO is offered: `write_zeroes` is always fast.
    pub fast_zero: bool,
    /// Whether several connections may be used at once. True only if each sees the others' writes.
    pub multi_conn: bool,
    /// Alignment that clients must keep, bytes, a power of two up to 64 KiB.
    pub minimum_block: u32,
    /// Alignment that clients should keep, bytes, a power of two of at least 512.
    pub preferred_block: u32,
    /// Most payload of a request, bytes, up to 32 MiB.
    pub maximum_block: u32,
}

impl Features {
    /// An export that takes any alignment, offers several connections, and neither TRIM nor
    /// FAST_ZERO.
    pub fn new(size_bytes: u64, access: Access) -> Features {
        Features {
            size_bytes,
            description: String::new(),
            access,
            trim: false,
            fast_zero: false,
            multi_conn: true,
            minimum_block: 1,
            preferred_block: 65_536,
            maximum_block: PAYLOAD_BYTES_MAX,
        }
    }
}

/// A disk behind a server. Calls come from blocking threads, many at once; ranges lie within the
/// size, and writes come only where the features say so. FUA is a write and a flush.
pub trait Export: Send + Sync + 'static {
    /// What is offered.
    fn features(&self) -> Features;

    /// Fills the buffer.
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Errno>;

    /// Stores data.
    fn write(&self, _offset: u64, _data: &[u8]) -> Result<(), Errno> {
        Err(Errno::EPERM)
    }

    /// Makes a range, of any length, read as zeroes.
    fn write_zeroes(&self, _offset: u64, _length: u64, _mode: ZeroMode) -> Result<(), Errno> {
        Err(Errno::EPERM)
    }

    /// Takes note that a range is not needed.
    fn trim(&self, _offset: u64, _length: u64) -> Result<(), Errno> {
        Err(Errno::ENOTSUP)
    }

    /// Makes finished writes durable.
    fn flush(&self) -> Result<(), Errno> {
        Ok(())
    }

    /// The metadata contexts that are offered.
    fn contexts(&self) -> Vec<String> {
        vec![BASE_ALLOCATION.to_owned()]
    }

    /// Extents of one context from the start of `range` on: touching, at most `max` of them, at
    /// least one. They may end early or late.
    fn extents(&self, _context: &str, range: Extent, _max: usize) -> Result<Vec<Extent>, Errno> {
        Ok(vec![range])
    }
}

/// A disk in memory, for tests and small overlays. Its `base:allocation` is told by 4 KiB blocks.
#[derive(Debug)]
pub struct MemoryExport {
    features: Features,
    bytes: RwLock<Vec<u8>>,
}

/// Granularity of a memory export's extents.
const MEMORY_BLOCK: usize = 4096;

impl MemoryExport {
    /// A disk with this content.
    pub fn new(bytes: Vec<u8>, access: Access) -> MemoryExport {
        let features = Features::new(bytes.len() as u64, access);
        MemoryExport { features, bytes: RwLock::new(bytes) }
    }

    /// The same disk with other features. The size stays.
    pub fn with_features(mut self, change: impl FnOnce(&mut Features)) -> MemoryExport {
        let size_bytes = self.features.size_bytes;
        change(&mut self.features);
        self.features.size_bytes = size_bytes;
        self
    }

    /// A copy of the content.
    pub fn content(&self) -> Vec<u8> {
        self.bytes.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn change(&self, offset: u64, length: u64, with: impl FnOnce(&mut [u8])) -> Result<(), Errno> {
        let mut bytes = self.bytes.write().unwrap_or_else(PoisonError::into_inner);
        let range = offset as usize..(offset + length) as usize;
        with(bytes.get_mut(range).ok_or(Errno::ENOSPC)?);
        Ok(())
    }
}

impl Export for MemoryExport {
    fn features(&self) -> Features {
        self.features.clone()
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Errno> {
        let bytes = self.bytes.read().unwrap_or_else(PoisonError::into_inner);
        let range = offset as usize..offset as usize + buffer.len();
        buffer.copy_from_slice(bytes.get(range).ok_or(Errno::EINVAL)?);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), Errno> {
        self.change(offset, data.len() as u64, |bytes| bytes.copy_from_slice(data))
    }

    fn write_zeroes(&self, offset: u64, length: u64, _mode: ZeroMode) -> Result<(), Errno> {
        self.change(offset, length, |bytes| bytes.fill(0))
    }

    fn trim(&self, offset: u64, length: u64) -> Result<(), Errno> {
        self.change(offset, length, |bytes| bytes.fill(0))
    }

    fn extents(&self, _context: &str, range: Extent, max: usize) -> Result<Vec<Extent>, Errno> {
        let bytes = self.bytes.read().unwrap_or_else(PoisonError::into_inner);
        let (mut at, end) = (range.offset as usize, range.end() as usize);
        let mut extents: Vec<Extent> = Vec::new();
        while at < end {
            let next = (at + MEMORY_BLOCK - at % MEMORY_BLOCK).min(end);
            let block = bytes.get(at..next).ok_or(Errno::EINVAL)?;
            let zero = block.iter().all(|byte| *byte == 0);
            let flags = if zero { STATE_HOLE | STATE_ZERO } else { 0 };
            let length = (next - at) as u64;
            let full = extents.len() >= max;
            match extents.last_mut() {
                Some(last) if last.flags == flags => last.length += length,
                _ if full => break,
                _ => extents.push(Extent { offset: at as u64, length, flags }),
            }
            at = next;
        }
        Ok(extents)
    }
}
