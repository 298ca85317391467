//! Whether a bitmap can be trusted; pure. Any doubt costs a full read of that disk.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::{Bitmap, BitmapName, Granularity, SentinelClean};
use crate::inventory::Identity;

/// What the disk was when its parent point was taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParentDisk {
    /// The bitmap that was made at the parent's instant; `None` if none could be.
    pub bitmap: Option<BitmapName>,
    /// Its granularity.
    pub granularity: Granularity,
    /// Size of the disk at that instant.
    pub size_bytes: u64,
    /// Identity of the disk at that instant.
    pub identity: Identity,
}

/// The newest point of the chain that holds the disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ParentState {
    /// There is none: the chain begins here for this disk.
    None,
    /// It is there and readable.
    Found(ParentDisk),
    /// The repository should hold it and does not.
    Missing,
    /// It is there and damaged.
    Corrupt,
}

/// What is known before QEMU is looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expectation {
    /// The disk's parent.
    pub parent: ParentState,
}

/// The disk as QEMU shows it now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Observation<'a> {
    /// All bitmaps of the disk's bitmap node.
    pub bitmaps: &'a [Bitmap],
    /// Present size.
    pub size_bytes: u64,
    /// Present identity.
    pub identity: &'a Identity,
}

/// How a disk is to be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Only what the bitmap names, and the new range as if dirty.
    Incremental {
        /// The bitmap to read.
        bitmap: BitmapName,
        /// What was added to the disk since the parent.
        grown: Option<Range<u64>>,
    },
    /// Whole, for this reason.
    Whole(Doubt),
}

/// What is wrong with a bitmap that is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Flaw {
    /// QEMU ended without storing it.
    NotStored,
    /// Somebody disabled it: writes went by unseen.
    NotRecording,
    /// An operation holds it.
    Busy,
}

/// Why a disk is read whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
pub enum Doubt {
    /// No point of the chain holds the disk.
    #[error("it is the disk's first point in this chain")]
    FirstPoint,
    /// The parent's bitmap is not on the disk.
    #[error("the bitmap of the parent point is not there")]
    BitmapMissing,
    /// The parent's bitmap cannot be used.
    #[error("the bitmap of the parent point cannot be trusted: {}", match .0 {
        Flaw::NotStored => "QEMU ended without storing it",
        Flaw::NotRecording => "it is not recording",
        Flaw::Busy => "another operation holds it",
    })]
    BitmapInconsistent(Flaw),
    /// The bitmap has another granularity than it was made with.
    #[error("the bitmap has another granularity than it was made with")]
    GranularityChanged,
    /// The disk is smaller than at the parent's instant.
    #[error("the disk is smaller than at the parent point")]
    SizeChanged,
    /// Another disk stands under this id.
    #[error("another disk stands under this id")]
    DiskReplaced,
    /// The disk was written by a restore.
    #[error("the disk was restored since the parent point")]
    AfterRestore,
    /// The parent point is gone.
    #[error("the parent point is missing from the repository")]
    ParentMissing,
    /// The parent point is damaged.
    #[error("the parent point is damaged")]
    ParentCorrupt,
    /// Bitmap and content disagreed.
    #[error("the bitmap and the disk's content contradict each other")]
    Contradiction,
    /// The operator asked.
    #[error("a whole read was requested")]
    Requested,
}

impl Doubt {
    /// The reason's name in logs, JSON and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::FirstPoint => "FirstPoint",
            Self::BitmapMissing => "BitmapMissing",
            Self::BitmapInconsistent(_) => "BitmapInconsistent",
            Self::GranularityChanged => "GranularityChanged",
            Self::SizeChanged => "SizeChanged",
            Self::DiskReplaced => "DiskReplaced",
            Self::AfterRestore => "AfterRestore",
            Self::ParentMissing => "ParentMissing",
            Self::ParentCorrupt => "ParentCorrupt",
            Self::Contradiction => "Contradiction",
            Self::Requested => "Requested",
        }
    }
}

impl From<SentinelClean> for Doubt {
    fn from(_: SentinelClean) -> Self {
        Self::Contradiction
    }
}

/// Decides how a disk is to be read. The sentinels come afterwards, when the bitmap is read: a
/// clean one turns the verdict into [`Doubt::Contradiction`].
pub fn verdict(expected: &Expectation, observed: Observation<'_>) -> Verdict {
    match trusted(expected, observed) {
        Ok((bitmap, parent_size)) => {
            let grown = parent_size..observed.size_bytes;
            Verdict::Incremental { bitmap, grown: (!grown.is_empty()).then_some(grown) }
        }
        Err(doubt) => Verdict::Whole(doubt),
    }
}

/// Reasons that hold whatever QEMU shows come first, then those that explain the later ones: a
/// replaced disk also lacks its bitmap.
fn trusted(expected: &Expectation, observed: Observation<'_>) -> Result<(BitmapName, u64), Doubt> {
    let parent = match &expected.parent {
        ParentState::None => return Err(Doubt::FirstPoint),
        ParentState::Missing => return Err(Doubt::ParentMissing),
        ParentState::Corrupt => return Err(Doubt::ParentCorrupt),
        ParentState::Found(parent) => parent,
    };
    let doubts = [
        (parent.identity != *observed.identity, Doubt::DiskReplaced),
        (observed.size_bytes < parent.size_bytes, Doubt::SizeChanged),
    ];
    if let Some((_, doubt)) = doubts.into_iter().find(|(holds, _)| *holds) {
        return Err(doubt);
    }
    let name = parent.bitmap.as_ref().ok_or(Doubt::BitmapMissing)?;
    let wanted = name.to_string();
    let bitmap = observed.bitmaps.iter().find(|bitmap| bitmap.name == wanted);
    flawless(bitmap.ok_or(Doubt::BitmapMissing)?, parent.granularity)?;
    Ok((name.clone(), parent.size_bytes))
}

fn flawless(bitmap: &Bitmap, granularity: Granularity) -> Result<(), Doubt> {
    // An inconsistent bitmap is neither recording nor of any use: that is said first.
    if bitmap.inconsistent {
        return Err(Doubt::BitmapInconsistent(Flaw::NotStored));
    }
    if !bitmap.recording {
        return Err(Doubt::BitmapInconsistent(Flaw::NotRecording));
    }
    if bitmap.busy {
        return Err(Doubt::BitmapInconsistent(Flaw::Busy));
    }
    if bitmap.granularity_bytes != granularity.bytes() {
        return Err(Doubt::GranularityChanged);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
