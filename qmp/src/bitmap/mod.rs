//! Dirty bitmaps: their names, what QEMU says of them, and whether they can be trusted.
//!
//! A bitmap of ours records every write since the instant of one point on one disk. [`verdict`]
//! decides from its state whether the next point may read only what it names; [`Sentinels`] shows
//! whether anybody cleared it in between.

mod doubt;
mod name;
mod sentinel;

use serde::{Deserialize, Serialize};

pub use doubt::{Doubt, Expectation, Flaw, Observation, ParentDisk, ParentState, Verdict, verdict};
pub use name::{BitmapName, NameError, NamePart, Owner};
pub use sentinel::{SentinelClean, SentinelWatch, Sentinels};

use crate::inventory::WireBitmap;

/// Bytes of disk that one bit stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct Granularity(u32);

impl Granularity {
    /// What QEMU chooses for a qcow2 with clusters of 64 KiB; also the default block of a point.
    pub const DEFAULT: Self = Self(64 << 10);

    /// A power of two from 512 bytes to 2 GiB (QEMU qapi, block-dirty-bitmap-add).
    pub fn new(bytes: u64) -> Option<Self> {
        let bytes = u32::try_from(bytes).ok()?;
        (bytes.is_power_of_two() && bytes >= 512).then_some(Self(bytes))
    }

    /// In bytes.
    pub fn bytes(self) -> u64 {
        u64::from(self.0)
    }
}

impl TryFrom<u64> for Granularity {
    type Error = String;

    fn try_from(bytes: u64) -> Result<Self, String> {
        Self::new(bytes).ok_or_else(|| format!("{bytes} is no granularity of a dirty bitmap"))
    }
}

impl From<Granularity> for u64 {
    fn from(granularity: Granularity) -> Self {
        granularity.bytes()
    }
}

/// A named bitmap as `query-named-block-nodes` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bitmap {
    /// Its name, whoever gave it.
    pub name: String,
    /// Bytes for one bit.
    pub granularity_bytes: u64,
    /// Dirty bytes; 0 is no proof of anything.
    pub dirty_bytes: u64,
    /// It takes note of writes.
    pub recording: bool,
    /// An operation or an export holds it.
    pub busy: bool,
    /// It is stored in the image when QEMU ends.
    pub persistent: bool,
    /// It was not stored when QEMU ended: it can only be removed.
    pub inconsistent: bool,
}

impl Bitmap {
    /// `None` for the nameless bitmaps that jobs use.
    pub(crate) fn from_wire(wire: &WireBitmap) -> Option<Self> {
        Some(Self {
            name: wire.name.clone()?,
            granularity_bytes: wire.granularity,
            dirty_bytes: wire.count,
            recording: wire.recording,
            busy: wire.busy,
            persistent: wire.persistent,
            inconsistent: wire.inconsistent,
        })
    }
}
