//! How a disk is cut into blocks, and the limits on both.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The smallest block: a page of memory, a sector of modern disks.
pub const BLOCK_SIZE_MIN: u32 = 4 << 10;
/// The largest block: what one pack holds a handful of, and one decompression buffer.
pub const BLOCK_SIZE_MAX: u32 = 4 << 20;
/// Blocks of one disk: the content tree is four levels of 256, which is 2^32
/// (256 TiB at 64 KiB, 16 TiB at 4 KiB).
pub const DISK_BLOCKS_MAX: u64 = 1 << 32;

/// Number of a block on its disk, counted from 0.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct BlockIndex(pub u64);

impl fmt::Display for BlockIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "block {}", self.0)
    }
}

/// A geometry that no repository or disk can have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    /// Not a power of two, or out of bounds.
    #[error("block size {0}: choose a power of two from 4K to 4M (4096 to 4194304)")]
    BlockSize(u64),
    /// More than 2^32 blocks.
    #[error(
        "a disk of {size_bytes} bytes has more than 2^32 blocks of {block_size}: \
         use a repository with larger blocks"
    )]
    DiskTooLarge {
        /// Size of the disk.
        size_bytes: u64,
        /// Block size of the repository.
        block_size: BlockSize,
    },
}

/// Size of a block in bytes: a power of two from 4 KiB to 4 MiB.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct BlockSize(u32);

impl BlockSize {
    /// 64 KiB: QEMU's usual bitmap granularity and qcow2's usual cluster.
    pub const DEFAULT: Self = Self(64 << 10);

    /// Checks a size in bytes.
    pub fn new(bytes: u64) -> Result<Self, GeometryError> {
        let fits = u64::from(BLOCK_SIZE_MIN)..=u64::from(BLOCK_SIZE_MAX);
        match u32::try_from(bytes) {
            Ok(size) if size.is_power_of_two() && fits.contains(&bytes) => Ok(Self(size)),
            _ => Err(GeometryError::BlockSize(bytes)),
        }
    }

    /// The size in bytes.
    pub fn bytes(self) -> u32 {
        self.0
    }

    /// Blocks of a disk, the short one at its end included.
    pub fn blocks(self, size_bytes: u64) -> Result<u64, GeometryError> {
        let blocks = size_bytes.div_ceil(u64::from(self.0));
        if blocks > DISK_BLOCKS_MAX {
            return Err(GeometryError::DiskTooLarge { size_bytes, block_size: self });
        }
        Ok(blocks)
    }

    /// Bytes of block `index` on a disk of `size_bytes`; 0 beyond its end.
    pub fn block_bytes(self, size_bytes: u64, index: BlockIndex) -> u32 {
        let size = u64::from(self.0);
        let start = index.0.saturating_mul(size);
        // At most the block size, which is a u32.
        size_bytes.saturating_sub(start).min(size) as u32
    }
}

impl Default for BlockSize {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl fmt::Display for BlockSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl TryFrom<u64> for BlockSize {
    type Error = GeometryError;

    fn try_from(bytes: u64) -> Result<Self, GeometryError> {
        Self::new(bytes)
    }
}

impl From<BlockSize> for u64 {
    fn from(size: BlockSize) -> Self {
        u64::from(size.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_powers_of_two_within_bounds() {
        for bad in [0, 1, 4095, 65_537, 8 << 20, 1 << 40] {
            assert!(BlockSize::new(bad).is_err(), "{bad}");
        }
        assert_eq!(BlockSize::new(4096).unwrap().bytes(), 4096);
    }

    #[test]
    fn the_last_block_is_short() {
        let size = BlockSize::new(4096).unwrap();
        assert_eq!(size.blocks(4097).unwrap(), 2);
        assert_eq!(size.block_bytes(4097, BlockIndex(0)), 4096);
        assert_eq!(size.block_bytes(4097, BlockIndex(1)), 1);
        assert_eq!(size.block_bytes(4097, BlockIndex(2)), 0);
        assert_eq!(size.block_bytes(u64::MAX, BlockIndex(u64::MAX)), 0);
        assert_eq!(size.blocks(0).unwrap(), 0);
        assert!(size.blocks(u64::MAX).is_err());
    }
}
