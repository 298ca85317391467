//! What a point says about itself: everything here ends up in its manifest, and nothing is a path.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::geometry::BlockIndex;
use crate::ids::{BlockId, ChainId, Checksum, ContentRoot, DiskId, PackId, PointId, RunId};
use crate::ids::{RepositoryId, VmName, WriterId};
use crate::lock::PointLock;

/// How consistent the captured instant is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConsistencyLevel {
    /// The guest's file systems were frozen at the instant.
    Filesystem,
    /// As after a power cut.
    Crash,
}

/// Consistency reached, and what it cost the guest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Consistency {
    /// What was reached.
    pub level: ConsistencyLevel,
    /// File systems frozen by the guest agent.
    pub frozen_filesystems: u32,
    /// Milliseconds the file systems were frozen.
    pub freeze_ms: f64,
    /// Milliseconds the CPUs were stopped.
    pub pause_ms: f64,
    /// Why the level is no better; none when it is the best one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// How a disk of a point was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskMode {
    /// Whole, with no parent.
    Full,
    /// What the bitmap names.
    Incremental,
    /// Whole, compared with the parent, storing what differs.
    Rehash,
}

/// Facts about one disk that the capture side hands over with the commit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DiskMeta {
    /// The disk.
    pub disk: DiskId,
    /// How it was read.
    pub mode: DiskMode,
    /// Why it was read whole, such as `BitmapMissing`; none for a trusted incremental.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Bytes that the bitmap named.
    pub dirty_bytes: u64,
    /// Bytes read from the guest's disk.
    pub read_bytes: u64,
    /// Bytes found to be zero.
    pub zero_bytes: u64,
    /// Clean blocks read to test the bitmap.
    pub sampled_blocks: u64,
    /// What the disk is recognised by next time (device id, serial, canonical file).
    pub identity: String,
    /// Name of the bitmap that records from this point's instant on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bitmap: Option<String>,
    /// Granularity of that bitmap in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub granularity: Option<u64>,
    /// Seconds spent on the disk.
    pub seconds: f64,
    /// More facts, kept as they are.
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    pub extra: serde_json::Map<String, serde_json::Value>,
}

/// Who wrote the point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriterInfo {
    /// Host name.
    pub host: String,
    /// Version of the program.
    pub version: String,
}

/// A binary part of the capsule, such as the NVRAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CapsulePart {
    /// Its name in the capsule, same grammar as a disk id.
    pub name: DiskId,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// Everything that is only known at the end of a capture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PointMeta {
    /// When the job began.
    pub created_at: Timestamp,
    /// The instant that the point shows.
    pub captured_at: Timestamp,
    /// Short name given by the operator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// Free text given by the operator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Consistency reached.
    pub consistency: Consistency,
    /// What recreates the VM, as JSON.
    pub capsule: serde_json::Value,
    /// Facts per disk, in device order.
    pub disks: Vec<DiskMeta>,
    /// Who wrote the point.
    pub writer: WriterInfo,
    /// Binary parts of the capsule; empty in a point that was read back
    /// (`Repository::capsule_part` fetches one).
    #[serde(skip)]
    pub parts: Vec<CapsulePart>,
}

/// A binary part as the manifest describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartInfo {
    /// Its name in the capsule.
    pub name: DiskId,
    /// Its length.
    pub bytes: u64,
    /// BLAKE3 of its bytes.
    pub checksum: Checksum,
}

/// A map run as a manifest refers to it; the newest run of a disk comes first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunRef {
    /// Its name.
    pub run: RunId,
    /// Length of the object.
    pub bytes: u64,
    /// DATA and ZERO entries in it: decides when it is merged.
    pub entries: u64,
    /// BLAKE3 of its trailer, from which everything else in it is verified.
    pub trailer: Checksum,
}

/// One disk of a point.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PointDisk {
    /// The disk.
    pub disk: DiskId,
    /// Its size at the instant.
    pub size_bytes: u64,
    /// The newest point of the chain that held this disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<PointId>,
    /// Proof of its content.
    pub content_root: ContentRoot,
    /// Its map, newest run first; no run means all zero.
    pub runs: Vec<RunRef>,
    /// What writing it cost.
    pub summary: DiskSummary,
}

/// What writing one disk of a point came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSummary {
    /// Proof of the disk's content.
    pub content_root: ContentRoot,
    /// Blocks stored that the repository did not hold, in bytes of the guest's data.
    pub new_bytes: u64,
    /// Bytes these came to in packs, after compression.
    pub stored_bytes: u64,
    /// Bytes pushed as zero.
    pub zero_bytes: u64,
    /// Bytes pushed as data, new or known.
    pub data_bytes: u64,
    /// Blocks stored that the repository did not hold.
    pub blocks_new: u64,
    /// Blocks that the dedup index knew.
    pub blocks_known: u64,
    /// Blocks equal to the parent's.
    pub blocks_same: u64,
    /// Bytes of map written.
    pub map_bytes: u64,
}

/// Where a copied point was taken, whatever repositories it came through.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The repository in which it was taken.
    pub repository: RepositoryId,
    /// Its id there.
    pub point: PointId,
    /// Its chain there.
    pub chain: ChainId,
    /// The content roots of its disks there.
    pub roots: BTreeMap<DiskId, ContentRoot>,
}

/// A committed point.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Its id.
    pub id: PointId,
    /// The VM it shows.
    pub vm: VmName,
    /// The chain it belongs to.
    pub chain: ChainId,
    /// The newest of its disks' parents.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<PointId>,
    /// Run of the writer that made it.
    pub writer_id: WriterId,
    /// Where it was taken, if it is a copy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
    /// What the capture side said about it.
    pub meta: PointMeta,
    /// Its disks, in device order.
    pub disks: Vec<PointDisk>,
    /// Binary parts of the capsule.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<PartInfo>,
    /// New data in bytes of the guest's, all disks.
    pub new_bytes: u64,
    /// Bytes stored for it: packs and maps.
    pub stored_bytes: u64,
    /// How long it is locked, in a repository with locks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lock: Option<PointLock>,
    /// Objects written for it: packs, maps, manifest, receipt.
    pub object_count: u64,
}

impl Point {
    /// The disk called `disk`, if the point holds it.
    pub fn disk(&self, disk: &DiskId) -> Option<&PointDisk> {
        self.disks.iter().find(|held| &held.disk == disk)
    }

    /// Sum of the disks' sizes.
    pub fn size_bytes(&self) -> u64 {
        self.disks.iter().map(|disk| disk.size_bytes).fold(0, u64::saturating_add)
    }
}

/// Where a block lies.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Location {
    /// The pack.
    pub pack: PackId,
    /// Its number in the pack's table of contents.
    pub slot: u32,
}

/// A DATA block of a disk's map.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    /// Which block of the disk.
    pub index: BlockIndex,
    /// Its content id.
    pub id: BlockId,
    /// Where it is stored.
    pub location: Location,
}

/// What the parent point holds at a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ParentBlock {
    /// No parent, or beyond what can be inherited from it.
    Absent,
    /// Zero.
    Zero,
    /// Data with this id.
    Data(BlockId),
}

/// A block ready to be pushed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Encoded {
    /// As in the parent.
    Same,
    /// All zero.
    Zero,
    /// Data that the repository is known to hold.
    Known {
        /// Its content id.
        id: BlockId,
        /// Where it lies.
        location: Location,
    },
    /// Data to be stored.
    New {
        /// Its content id.
        id: BlockId,
        /// The bytes to store.
        frame: Frame,
    },
}

/// A block as it is stored.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Frame {
    pub(crate) codec: Codec,
    pub(crate) raw_bytes: u32,
    pub(crate) bytes: Vec<u8>,
}

impl Frame {
    /// Bytes it takes in a pack.
    pub fn stored_bytes(&self) -> usize {
        self.bytes.len()
    }
}

/// How a frame's bytes are to be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Codec {
    /// As they are.
    Raw,
    /// One zstd frame.
    Zstd,
}
