//! The JSON that commands print; the names are a contract.

use icecore_repository::store::Traffic;
use icecore_repository::{Consistency, Damage, DiskMode, Point, PointDisk, PointId};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::governor::GovernorReport;

/// What `backup` prints.
#[derive(Debug, Serialize, Deserialize)]
pub struct BackupReport {
    pub point: Option<String>,
    pub vm: String,
    pub chain: String,
    pub parent: Option<String>,
    pub created_at: Timestamp,
    pub captured_at: Timestamp,
    pub consistency: Consistency,
    pub root: Option<String>,
    pub job: String,
    pub disks: Vec<DiskReport>,
    pub seconds: f64,
    /// Disks of the VM that are not in the point, and why.
    pub unprotected: Vec<Unprotected>,
    pub dry_run: bool,
    /// What was done for the guest's sake; none where no guest ran or its care was declined.
    pub governor: Option<GovernorReport>,
    /// Requests to the repository's server; none where there is no server.
    #[serde(default)]
    pub store: Option<Traffic>,
}

/// A disk that is not in a point.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Unprotected {
    pub disk: String,
    pub why: String,
}

/// One disk of a backup.
#[derive(Debug, Serialize, Deserialize)]
pub struct DiskReport {
    pub disk: String,
    pub parent: Option<String>,
    pub size_bytes: u64,
    pub mode: DiskMode,
    pub reason: Option<String>,
    pub dirty_bytes: u64,
    pub read_bytes: u64,
    pub zero_bytes: u64,
    pub new_bytes: u64,
    pub stored_bytes: u64,
    pub sampled_blocks: u64,
    pub seconds: f64,
    pub read_latency_ms: Latency,
}

/// Latency percentiles in milliseconds.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Latency {
    pub p50: f64,
    pub p99: f64,
    pub max: f64,
}

/// A point, as `point list` shows it: committed, or only known from a job record.
#[derive(Debug, Serialize, ToSchema)]
pub struct PointRow {
    pub point: Option<String>,
    pub label: Option<String>,
    pub vm: Option<String>,
    pub chain: Option<String>,
    pub parent: Option<String>,
    pub status: &'static str,
    pub created_at: Timestamp,
    pub captured_at: Option<Timestamp>,
    pub description: Option<String>,
    #[schema(value_type = Option<Object>)]
    pub consistency: Option<Consistency>,
    pub size_bytes: u64,
    pub new_bytes: u64,
    pub stored_bytes: u64,
    pub object_count: u64,
    pub failure_reason: Option<String>,
    pub disks: Vec<PointDiskRow>,
    pub protected: bool,
    /// Until then nobody deletes it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub locked_until: Option<Timestamp>,
    pub job: Option<String>,
}

/// A disk in a point's row.
#[derive(Debug, Serialize, ToSchema)]
pub struct PointDiskRow {
    pub disk: String,
    pub parent: Option<String>,
    pub size_bytes: u64,
    #[schema(value_type = Option<String>)]
    pub mode: Option<DiskMode>,
    pub reason: Option<String>,
    pub new_bytes: u64,
    pub stored_bytes: u64,
    pub content_root: String,
}

impl PointRow {
    /// The row of a committed point.
    pub fn committed(point: &Point, protected: bool) -> Self {
        Self {
            point: Some(point.id.to_string()),
            label: point.meta.label.clone(),
            vm: Some(point.vm.to_string()),
            chain: Some(point.chain.to_string()),
            parent: point.parent.as_ref().map(ToString::to_string),
            status: "available",
            created_at: point.meta.created_at,
            captured_at: Some(point.meta.captured_at),
            description: point.meta.description.clone(),
            consistency: Some(point.meta.consistency.clone()),
            size_bytes: point.size_bytes(),
            new_bytes: point.new_bytes,
            stored_bytes: point.stored_bytes,
            object_count: point.object_count,
            failure_reason: None,
            disks: point.disks.iter().map(|disk| disk_row(point, disk)).collect(),
            protected,
            locked_until: point.lock.map(|lock| lock.until),
            job: None,
        }
    }
}

impl PointRow {
    /// The row of a point whose manifest cannot be read: its id tells when it was made.
    pub fn damaged(id: &PointId, damage: &Damage) -> Self {
        let millis = i64::try_from(id.millis()).ok();
        let created_at = millis.and_then(|millis| Timestamp::from_millisecond(millis).ok());
        Self {
            point: Some(id.to_string()),
            label: None,
            vm: None,
            chain: None,
            parent: None,
            status: "error",
            created_at: created_at.unwrap_or(Timestamp::UNIX_EPOCH),
            captured_at: None,
            description: None,
            consistency: None,
            size_bytes: 0,
            new_bytes: 0,
            stored_bytes: 0,
            object_count: 0,
            failure_reason: Some(damage.to_string()),
            disks: Vec::new(),
            protected: false,
            locked_until: None,
            job: None,
        }
    }
}

fn disk_row(point: &Point, disk: &PointDisk) -> PointDiskRow {
    let meta = point.meta.disks.iter().find(|meta| meta.disk == disk.disk);
    PointDiskRow {
        disk: disk.disk.to_string(),
        parent: disk.parent.as_ref().map(ToString::to_string),
        size_bytes: disk.size_bytes,
        mode: meta.map(|meta| meta.mode),
        reason: meta.and_then(|meta| meta.reason.clone()),
        new_bytes: disk.summary.new_bytes,
        stored_bytes: disk.summary.stored_bytes,
        content_root: disk.content_root.to_string(),
    }
}

/// One hash for a whole point: BLAKE3 over a line "DISK SIZE ROOT" for each disk, in its order.
pub fn point_root<'a>(disks: impl Iterator<Item = &'a PointDisk>) -> String {
    let mut hasher = blake3::Hasher::new_derive_key("icecore 2026 root of a point");
    for disk in disks {
        let line = format!("{} {} {}\n", disk.disk, disk.size_bytes, disk.content_root);
        hasher.update(line.as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}
