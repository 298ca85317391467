//! `icecore diff`: changed extents between two points, per disk.

use icecore_repository::{Point, Repository};
use serde::Serialize;

use super::point::find;
use crate::cli::OK;
use crate::cli::args::DiffArgs;
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::names::human_bytes;
use crate::output::{self, Rows};

#[derive(Debug, Serialize)]
struct DiffReport {
    from: String,
    to: String,
    disks: Vec<DiskDiff>,
}

#[derive(Debug, Serialize)]
struct DiskDiff {
    disk: String,
    /// `both`, or which of the two points alone holds the disk.
    held_by: &'static str,
    from_size_bytes: Option<u64>,
    to_size_bytes: Option<u64>,
    changed_bytes: u64,
    extents: Vec<Extent>,
}

#[derive(Debug, Serialize)]
struct Extent {
    offset: u64,
    length: u64,
}

/// Runs `icecore diff`.
pub fn run(context: &Context, args: DiffArgs) -> Outcome<u8> {
    let tried = format!("compare {} with {}", args.from, args.to);
    let repository = context.open_read_only(&args.repo.repo)?;
    let from = find(&repository, &args.from, args.vm.as_deref(), &tried)?;
    let to = find(&repository, &args.to, args.vm.as_deref(), &tried)?;
    let disks =
        compare(&repository, &from, &to).map_err(|e| Failure::from_repository(&tried, e))?;
    let report = DiffReport { from: from.id.to_string(), to: to.id.to_string(), disks };
    if context.json {
        output::json(&report)?;
        return Ok(OK);
    }
    let mut table = Rows::new(&["disk", "held by", "extents", "changed"]);
    for disk in report.disks {
        let extents = disk.extents.len().to_string();
        let changed = human_bytes(disk.changed_bytes);
        table.add(vec![disk.disk, disk.held_by.into(), extents, changed]);
    }
    table.print("the points hold no disks")?;
    Ok(OK)
}

fn compare(
    repository: &Repository,
    from: &Point,
    to: &Point,
) -> Result<Vec<DiskDiff>, icecore_repository::Error> {
    let mut disks = Vec::new();
    for held in &to.disks {
        let Some(before) = from.disk(&held.disk) else {
            disks.push(alone(held.disk.to_string(), "to", None, Some(held.size_bytes)));
            continue;
        };
        let older = repository.disk_reader(from, &held.disk)?;
        let newer = repository.disk_reader(to, &held.disk)?;
        let block = u64::from(newer.block_size().bytes());
        let size = before.size_bytes.max(held.size_bytes);
        let mut extents: Vec<Extent> = Vec::new();
        for index in newer.diff(&older) {
            add(&mut extents, index?.0 * block, block, size);
        }
        disks.push(DiskDiff {
            disk: held.disk.to_string(),
            held_by: "both",
            from_size_bytes: Some(before.size_bytes),
            to_size_bytes: Some(held.size_bytes),
            changed_bytes: extents.iter().map(|extent| extent.length).sum(),
            extents,
        });
    }
    let gone = from.disks.iter().filter(|held| to.disk(&held.disk).is_none());
    disks
        .extend(gone.map(|held| alone(held.disk.to_string(), "from", Some(held.size_bytes), None)));
    Ok(disks)
}

fn alone(disk: String, held_by: &'static str, from: Option<u64>, to: Option<u64>) -> DiskDiff {
    let (from_size_bytes, to_size_bytes) = (from, to);
    DiskDiff {
        disk,
        held_by,
        from_size_bytes,
        to_size_bytes,
        changed_bytes: 0,
        extents: Vec::new(),
    }
}

fn add(extents: &mut Vec<Extent>, offset: u64, block: u64, size: u64) {
    let length = block.min(size.saturating_sub(offset));
    match extents.last_mut() {
        Some(last) if last.offset + last.length == offset => last.length += length,
        _ => extents.push(Extent { offset, length }),
    }
}
