//! What almost every test asks at its end: is the point right, is nothing of ours left.

use std::time::Duration;

use serde_json::{Value, json};

use crate::failure::{Failure, Result};
use crate::icecore::Icecore;
use crate::process::wait_until;
use crate::reference::Reference;
use crate::vm::TestVm;

/// The guardian acts after 2 s without progress, and what it undoes takes a moment.
const UNDONE_DEADLINE: Duration = Duration::from_secs(15);

/// A field of a JSON report that must be a string.
pub fn text<'a>(report: &'a Value, field: &str) -> Result<&'a str> {
    let value = &report[field];
    value.as_str().ok_or_else(|| Failure::new(format!("{field} is {value} in {report}")))
}

/// A field of a JSON report that must be a count.
pub fn count(report: &Value, field: &str) -> Result<u64> {
    let value = &report[field];
    value.as_u64().ok_or_else(|| Failure::new(format!("{field} is {value} in {report}")))
}

/// The part of a report that concerns one disk.
pub fn of_disk<'a>(report: &'a Value, disk: &str) -> Result<&'a Value> {
    let disks = report["disks"].as_array();
    let found = disks.and_then(|disks| disks.iter().find(|one| one["disk"] == disk));
    found.ok_or_else(|| Failure::new(format!("no disk {disk} in {report}")))
}

/// A failure unless this disk was captured in this mode.
pub fn require_mode(report: &Value, disk: &str, mode: &str) -> Result<()> {
    require_field(report, disk, "mode", mode)
}

/// A failure unless this disk was read whole in its chain for this reason.
pub fn require_rehash(report: &Value, disk: &str, reason: &str) -> Result<()> {
    require_field(report, disk, "mode", "rehash")?;
    require_field(report, disk, "reason", reason)
}

fn require_field(report: &Value, disk: &str, field: &str, wanted: &str) -> Result<()> {
    let found = text(of_disk(report, disk)?, field)?;
    if found == wanted {
        return Ok(());
    }
    Err(Failure::new(format!("{disk}: {field} is {found}, not {wanted}, in {report}")))
}

impl Icecore {
    /// Restores a point and compares all its disks with a reference, byte for byte; then the file
    /// systems and the writer's order are judged.
    pub fn prove_point(&self, vm: &TestVm, point: &str, reference: &Reference) -> Result<()> {
        let folder = self.path(&format!("restored-{point}"));
        let report = self.restore_all(point, &folder)?;
        for disk in vm.disks() {
            let verified = &of_disk(&report, disk.id())?["root_verified"];
            if *verified != json!(true) {
                return Err(Failure::new(format!("{}: root_verified is {verified}", disk.id())));
            }
        }
        reference.compare_all(&folder)?;
        vm.judge_restored(&folder)?;
        Ok(std::fs::remove_dir_all(folder)?)
    }

    /// Takes one more ordinary point of a VM that is quiet for it, and proves it.
    pub fn prove_next_point(&self, vm: &TestVm) -> Result<Value> {
        let (report, reference) = self.backup_quietly(vm, |run| run)?;
        self.prove_point(vm, text(&report, "point")?, &reference)?;
        vm.require_no_trace()?;
        Ok(report)
    }
}

impl TestVm {
    /// What of Icecore's is in this QEMU beside its recording bitmaps.
    pub fn traces(&self) -> Result<Vec<String>> {
        let mut monitor = self.monitor()?;
        let mut traces = Vec::new();
        for export in array(monitor.execute("query-block-exports", json!({}))?) {
            traces.push(format!("export {}", export["id"]));
        }
        for job in array(monitor.execute("query-jobs", json!({}))?) {
            traces.push(format!("job {}", job["id"]));
        }
        let graph = monitor.execute("x-debug-query-block-graph", json!({}))?;
        for node in array(graph["nodes"].clone()) {
            let name = node["name"].as_str().unwrap_or_default();
            let driver = node["driver"].as_str().unwrap_or_default();
            if name.starts_with("ic-") || driver == "copy-before-write" {
                traces.push(format!("node {name}"));
            }
        }
        Ok(traces)
    }

    /// Whether QEMU serves an export or runs a job right now.
    pub fn is_being_copied(&self) -> Result<bool> {
        let traces = self.traces()?;
        Ok(traces.iter().any(|trace| trace.starts_with("export") || trace.starts_with("job")))
    }

    /// A failure unless QEMU lives and nothing is left in it, at once or as soon as a guardian
    /// has noticed.
    pub fn require_no_trace(&self) -> Result<()> {
        let mut last = Vec::new();
        let gone = wait_until("Icecore's traces in QEMU", UNDONE_DEADLINE, || {
            last = self.traces()?;
            Ok(last.is_empty())
        });
        gone.map_err(|error| Failure::new(format!("{error}: {last:?}")))
    }

    /// The names of Icecore's bitmaps on a disk.
    pub fn bitmaps(&self, disk: &str) -> Result<Vec<String>> {
        let mut monitor = self.monitor()?;
        let nodes = array(monitor.execute("query-named-block-nodes", json!({ "flat": true }))?);
        let file = self.image(disk)?;
        let of_image = nodes
            .iter()
            .filter(|node| node["file"].as_str() == file.to_str() && node["drv"] != "file");
        let bitmaps = of_image.flat_map(|node| array(node["dirty-bitmaps"].clone()));
        let names = bitmaps.filter_map(|bitmap| bitmap["name"].as_str().map(str::to_owned));
        Ok(names.filter(|name| name.starts_with("icecore:")).collect())
    }
}

pub(crate) fn array(value: Value) -> Vec<Value> {
    match value {
        Value::Array(items) => items,
        _ => Vec::new(),
    }
}
