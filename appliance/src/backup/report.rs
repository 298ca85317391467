//! From results to the JSON that a backup prints.

use std::time::Duration;

use icecore_repository::{Point, PointMeta};

use super::disk::DiskResult;
use crate::job::Job;
use crate::report::{BackupReport, DiskReport, Unprotected, point_root};

/// The report of a committed point.
pub fn committed(
    job: &Job,
    point: &Point,
    disks: Vec<DiskResult>,
    unprotected: Vec<Unprotected>,
    took: Duration,
) -> BackupReport {
    BackupReport {
        point: Some(point.id.to_string()),
        vm: point.vm.to_string(),
        chain: point.chain.to_string(),
        parent: point.parent.as_ref().map(ToString::to_string),
        created_at: point.meta.created_at,
        captured_at: point.meta.captured_at,
        consistency: point.meta.consistency.clone(),
        root: Some(point_root(point.disks.iter())),
        job: job.id().to_string(),
        disks: disks.into_iter().map(row).collect(),
        seconds: took.as_secs_f64(),
        unprotected,
        dry_run: false,
        governor: None,
        store: None,
    }
}

/// The report of a run that stored nothing.
pub fn dry(
    job: &Job,
    meta: &PointMeta,
    disks: Vec<DiskResult>,
    unprotected: Vec<Unprotected>,
    took: Duration,
) -> BackupReport {
    let record = &job.record;
    BackupReport {
        point: None,
        vm: record.vm.clone().unwrap_or_default(),
        chain: record.chain.clone().unwrap_or_default(),
        parent: record.parent.clone(),
        created_at: meta.created_at,
        captured_at: meta.captured_at,
        consistency: meta.consistency.clone(),
        root: None,
        job: job.id().to_string(),
        disks: disks.into_iter().map(row).collect(),
        seconds: took.as_secs_f64(),
        unprotected,
        dry_run: true,
        governor: None,
        store: None,
    }
}

fn row(disk: DiskResult) -> DiskReport {
    DiskReport {
        disk: disk.id.to_string(),
        parent: disk.decision.parent.as_ref().map(ToString::to_string),
        size_bytes: disk.size_bytes,
        mode: disk.decision.mode(),
        reason: disk.decision.doubt.map(|doubt| doubt.name().to_owned()),
        dirty_bytes: disk.dirty_bytes,
        read_bytes: disk.read_bytes,
        zero_bytes: disk.zero_bytes,
        new_bytes: disk.new_bytes,
        stored_bytes: disk.stored_bytes,
        sampled_blocks: disk.sampled_blocks,
        seconds: disk.took.as_secs_f64(),
        read_latency_ms: disk.latency,
    }
}
