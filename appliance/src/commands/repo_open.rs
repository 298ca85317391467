//! `icecore repo open`: a repository and nothing else, on a host that knows nothing of it.

use std::collections::BTreeMap;

use icecore_repository::{Point, Repository};
use jiff::Timestamp;
use serde::Serialize;

use crate::cli::{DAMAGED, OK};
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::names::human_bytes;
use crate::output::{self, Rows, when};

/// What `repo open` prints.
#[derive(Debug, Serialize)]
struct OpenReport {
    id: String,
    location: String,
    points: usize,
    vms: Vec<VmReport>,
    /// Points that were committed and whose manifests cannot be read.
    damaged: Vec<DamagedPoint>,
    /// What to run next.
    next: Vec<String>,
}

#[derive(Debug, Serialize)]
struct VmReport {
    vm: String,
    points: usize,
    newest: Newest,
}

#[derive(Debug, Serialize)]
struct Newest {
    point: String,
    chain: String,
    captured_at: Timestamp,
    consistency: icecore_repository::ConsistencyLevel,
    size_bytes: u64,
    disks: Vec<String>,
}

#[derive(Debug, Serialize)]
struct DamagedPoint {
    point: String,
    why: String,
}

/// Runs `icecore repo open`: reads all that tells what there is, from the repository alone.
pub fn run(context: &Context, repo: &str) -> Outcome<u8> {
    // Nothing is written but the cache of this host: a copy on a read-only medium will do.
    let repository = context.open_read_only(repo)?;
    let report = look(&repository, repo)
        .map_err(|e| Failure::from_repository(format!("open the repository {repo}"), e))?;
    print(context, &report)?;
    Ok(if report.damaged.is_empty() { OK } else { DAMAGED })
}

fn look(repository: &Repository, repo: &str) -> icecore_repository::Result<OpenReport> {
    repository.rebuild_catalog()?;
    let points = repository.points()?;
    let mut by_vm: BTreeMap<&str, (usize, &Point)> = BTreeMap::new();
    for point in &points {
        let of_vm = by_vm.entry(point.vm.as_str()).or_insert((0, point));
        // They ascend: the last one is the newest.
        *of_vm = (of_vm.0 + 1, point);
    }
    let vms = by_vm.into_iter().map(|(vm, (points, newest))| VmReport {
        vm: vm.to_owned(),
        points,
        newest: Newest::of(newest),
    });
    let vms: Vec<VmReport> = vms.collect();
    let damaged = repository.damaged_points()?.into_iter();
    let damaged =
        damaged.map(|(id, damage)| DamagedPoint { point: id.to_string(), why: damage.to_string() });
    Ok(OpenReport {
        id: repository.id().to_string(),
        location: repository.location().to_owned(),
        points: points.len(),
        next: next(repo, vms.first()),
        damaged: damaged.collect(),
        vms,
    })
}

impl Newest {
    fn of(point: &Point) -> Self {
        Self {
            point: point.id.to_string(),
            chain: point.chain.to_string(),
            captured_at: point.meta.captured_at,
            consistency: point.meta.consistency.level,
            size_bytes: point.size_bytes(),
            disks: point.disks.iter().map(|disk| disk.disk.to_string()).collect(),
        }
    }
}

fn next(repo: &str, vm: Option<&VmReport>) -> Vec<String> {
    let Some(vm) = vm else { return vec![format!("icecore backup --repo {repo} …")] };
    let point = &vm.newest.point;
    vec![
        format!("icecore point list --repo {repo}"),
        format!("icecore check --repo {repo} --read-data {point}"),
        format!("icecore restore {point} --repo {repo} --to DIRECTORY"),
        format!("icecore vm create --from {point} --repo {repo} --name NAME --dir DIRECTORY"),
    ]
}

fn print(context: &Context, report: &OpenReport) -> Outcome<()> {
    if context.json {
        return output::json(report);
    }
    let OpenReport { id, location, points, .. } = report;
    output::print(&format!("repository {id} in {location}: {points} points\n"))?;
    let mut table = Rows::new(&["vm", "points", "newest", "captured", "size", "disks"]);
    for vm in &report.vms {
        table.add(vec![
            vm.vm.clone(),
            vm.points.to_string(),
            vm.newest.point.clone(),
            when(vm.newest.captured_at),
            human_bytes(vm.newest.size_bytes),
            vm.newest.disks.join(", "),
        ]);
    }
    table.print("no points")?;
    for damaged in &report.damaged {
        let why = output::printable(&damaged.why);
        output::print(&format!("point {} cannot be read: {why}\n", damaged.point))?;
    }
    output::print(&format!("next:\n  {}\n", report.next.join("\n  ")))
}
