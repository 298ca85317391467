//! Points as users see them: what the repository holds, and what this host knows of runs that
//! have not (yet) become a point.

use std::collections::HashSet;

use icecore_repository::{Error, Point, Repository};
use serde::Serialize;

use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::report::PointRow;
use crate::state::jobs::{self, JobKind, JobRecord, JobStatus};
use crate::state::locks::{LockKey, is_free};

/// Everything about one point.
#[derive(Debug, Serialize)]
pub struct Detail<'a> {
    #[serde(flatten)]
    row: PointRow,
    /// Points that grew from this one directly.
    dependants: Vec<String>,
    /// Where a copied point was taken.
    origin: Option<&'a icecore_repository::Origin>,
    capsule: &'a serde_json::Value,
    writer: &'a icecore_repository::WriterInfo,
    disk_facts: &'a [icecore_repository::DiskMeta],
}

/// A committed point with its dependants and capsule.
pub fn detail<'a>(repository: &Repository, point: &'a Point) -> Result<Detail<'a>, Error> {
    let dependants = repository
        .points()?
        .into_iter()
        .filter(|other| other.disks.iter().any(|disk| disk.parent.as_ref() == Some(&point.id)))
        .map(|other| other.id.to_string())
        .collect();
    Ok(Detail {
        row: PointRow::committed(point, repository.protected()?.contains(&point.id)),
        dependants,
        origin: point.origin.as_ref(),
        capsule: &point.meta.capsule,
        writer: &point.meta.writer,
        disk_facts: &point.meta.disks,
    })
}

/// All rows of a listing, oldest first.
pub fn rows(
    context: &Context,
    repository: &Repository,
    vm: Option<&str>,
) -> Outcome<Vec<PointRow>> {
    let failed = |e| Failure::from_repository("list points", e);
    let points = repository.points().map_err(failed)?;
    let protected = repository.protected().map_err(failed)?;
    let wanted = |name: Option<&str>| vm.is_none() || name == vm;
    let mut rows: Vec<PointRow> = points
        .iter()
        .filter(|point| wanted(Some(point.vm.as_str())))
        .map(|point| PointRow::committed(point, protected.contains(&point.id)))
        .collect();
    mark_restoring(context, &mut rows);
    let damaged = repository.damaged_points().map_err(failed)?;
    rows.extend(damaged.into_iter().map(|(id, damage)| PointRow::damaged(&id, &damage)));
    let committed: HashSet<String> = rows.iter().filter_map(|row| row.point.clone()).collect();
    let id = repository.id().to_string();
    let not_committed = uncommitted(context, Some(&id)).into_iter().filter(|row| {
        wanted(row.vm.as_deref()) && !row.point.as_ref().is_some_and(|p| committed.contains(p))
    });
    rows.extend(not_committed);
    rows.sort_by_key(|row| row.created_at);
    Ok(rows)
}

/// Runs of this host that did not become a point, or have not yet.
pub fn uncommitted(context: &Context, repository_id: Option<&str>) -> Vec<PointRow> {
    jobs::all(&context.state)
        .into_iter()
        .filter(|record| record.kind == JobKind::Backup)
        // Before its process has begun there is nothing that could become a point.
        .filter(|record| !matches!(record.status, JobStatus::Available | JobStatus::Queued))
        .filter(|record| repository_id.is_none_or(|id| record.repository_id.as_deref() == Some(id)))
        .map(|record| row_of_job(context, record))
        .collect()
}

fn mark_restoring(context: &Context, rows: &mut [PointRow]) {
    let restored: HashSet<String> = jobs::all(&context.state)
        .into_iter()
        .filter(|record| record.status == JobStatus::Restoring && is_alive(context, record))
        .filter_map(|record| record.point)
        .collect();
    for row in rows {
        if row.point.as_ref().is_some_and(|point| restored.contains(point)) {
            row.status = "restoring";
        }
    }
}

/// Whether the process of an unfinished run still holds its lock.
pub fn is_alive(context: &Context, record: &JobRecord) -> bool {
    !record.status.is_final() && !is_free(&context.state, &LockKey::job(&record.job))
}

fn row_of_job(context: &Context, record: JobRecord) -> PointRow {
    let alive = is_alive(context, &record);
    let status = match record.status {
        JobStatus::Creating if alive => "creating",
        JobStatus::Captured if alive => "captured",
        _ => "error",
    };
    let died = || "the run ended without a word: killed, or the host went down".to_owned();
    PointRow {
        point: record.point,
        label: record.label,
        vm: record.vm,
        chain: record.chain,
        parent: record.parent,
        status,
        created_at: record.started_at,
        captured_at: None,
        description: record.description,
        consistency: None,
        size_bytes: 0,
        new_bytes: 0,
        stored_bytes: 0,
        object_count: 0,
        failure_reason: (status == "error").then(|| record.failure_reason.unwrap_or_else(died)),
        disks: Vec::new(),
        protected: false,
        locked_until: None,
        job: Some(record.job.to_string()),
    }
}
