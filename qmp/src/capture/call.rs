//! QMP commands as data: what is sent, and nothing about when or what for.

use std::ops::Range;
use std::path::Path;

use serde_json::{Value, json};

use super::names::{DIRTY_BITMAP, DiskIndex, Role, RunId};
use crate::bitmap::Granularity;

/// One QMP command with its arguments.
#[derive(Debug, Clone, PartialEq)]
pub struct Call {
    /// The command's name.
    pub name: &'static str,
    /// Its arguments: an object, or `Null` for none.
    pub arguments: Value,
}

/// How long one guest write may wait for the scratch, in seconds. Above 5 a guest notices.
pub const CBW_TIMEOUT_SECONDS: u32 = 2;

/// Longest time that QEMU tries to connect to our server for a push.
pub const PUSH_OPEN_SECONDS: u32 = 2;

impl Call {
    fn new(name: &'static str, arguments: Value) -> Self {
        Self { name, arguments }
    }

    /// Halts the guest's processors and flushes its disks.
    pub fn stop() -> Self {
        Self::new("stop", Value::Null)
    }

    /// Lets the guest run on.
    pub fn cont() -> Self {
        Self::new("cont", Value::Null)
    }

    /// Resets the machine, as its button would.
    pub fn system_reset() -> Self {
        Self::new("system_reset", Value::Null)
    }

    /// The protocol node of a scratch file and the cap above it.
    pub fn scratch_nodes(run: RunId, disk: DiskIndex, path: &Path, cap_bytes: u64) -> [Self; 2] {
        let file = run.name(disk, Role::File);
        [
            Self::new(
                "blockdev-add",
                json!({"driver": "file", "node-name": file, "filename": path, "discard": "unmap"}),
            ),
            Self::new(
                "blockdev-add",
                json!({"driver": "raw", "node-name": run.name(disk, Role::Raw), "file": file,
                       "size": cap_bytes, "discard": "unmap"}),
            ),
        ]
    }

    /// The image in the scratch.
    pub fn scratch_image(run: RunId, disk: DiskIndex) -> Self {
        Self::new(
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": run.name(disk, Role::Tmp),
                   "file": run.name(disk, Role::Raw), "discard": "unmap"}),
        )
    }

    /// The filter over `node`. A full or slow scratch breaks the snapshot, never a guest's write.
    pub fn filter(run: RunId, disk: DiskIndex, node: &str) -> Self {
        Self::new(
            "blockdev-add",
            json!({"driver": "copy-before-write", "node-name": run.name(disk, Role::Cbw),
                   "file": node, "target": run.name(disk, Role::Tmp),
                   "on-cbw-error": "break-snapshot", "cbw-timeout": CBW_TIMEOUT_SECONDS}),
        )
    }

    /// The disk as it was when the filter went in. Only legal while the device uses the filter:
    /// before, the filter does not share writing with the device.
    pub fn snapshot(run: RunId, disk: DiskIndex) -> Self {
        Self::new(
            "blockdev-add",
            json!({"driver": "snapshot-access", "node-name": run.name(disk, Role::Snap),
                   "file": run.name(disk, Role::Cbw), "discard": "unmap"}),
        )
    }

    /// A node of zeroes that forgets what is written to it; its bitmaps do not.
    pub fn null_node(name: &str, size_bytes: u64) -> Self {
        Self::new(
            "blockdev-add",
            json!({"driver": "null-co", "node-name": name, "size": size_bytes,
                   "read-zeroes": true}),
        )
    }

    /// A node that only keeps `node` alive.
    pub fn keep_node(name: &str, node: &str) -> Self {
        Self::new(
            "blockdev-add",
            json!({"driver": "raw", "node-name": name, "file": node, "read-only": true}),
        )
    }

    /// An NBD client node towards a server on a unix socket. QEMU stands still while it connects.
    pub fn push_node(run: RunId, disk: DiskIndex, socket: &Path, export: &str) -> Self {
        Self::new(
            "blockdev-add",
            json!({"driver": "nbd", "node-name": run.name(disk, Role::Push), "export": export,
                   "server": {"type": "unix", "path": socket}, "open-timeout": PUSH_OPEN_SECONDS}),
        )
    }

    /// The job that copies the snapshot (`all`, or what [`DIRTY_BITMAP`] on it names) to the push
    /// node. Its end stays visible until it is dismissed.
    pub fn push_job(run: RunId, disk: DiskIndex, all: bool) -> Self {
        let mut arguments = json!({
            "job-id": run.name(disk, Role::Job), "device": run.name(disk, Role::Snap),
            "target": run.name(disk, Role::Push), "sync": "full", "auto-dismiss": false,
            "on-source-error": "report", "on-target-error": "report",
        });
        if !all {
            arguments["sync"] = json!("incremental");
            arguments["bitmap"] = json!(DIRTY_BITMAP);
        }
        Self::new("blockdev-backup", arguments)
    }

    /// Removes a node.
    pub fn remove_node(name: &str) -> Self {
        Self::new("blockdev-del", json!({"node-name": name}))
    }

    /// Makes a device use another node.
    pub fn set_drive(qom_path: &str, node: &str) -> Self {
        Self::new("qom-set", json!({"path": qom_path, "property": "drive", "value": node}))
    }

    /// A recording bitmap.
    pub fn add_bitmap(node: &str, name: &str, granularity: Granularity, persistent: bool) -> Self {
        Self::new(
            "block-dirty-bitmap-add",
            json!({"node": node, "name": name, "granularity": granularity.bytes(),
                   "persistent": persistent}),
        )
    }

    /// A bitmap that does not record: a container for what is merged into it.
    pub fn add_disabled_bitmap(node: &str, name: &str, granularity: Granularity) -> Self {
        Self::new(
            "block-dirty-bitmap-add",
            json!({"node": node, "name": name, "granularity": granularity.bytes(), "disabled": true}),
        )
    }

    /// Adds the bits of another node's bitmap.
    pub fn merge_bitmap(node: &str, target: &str, from_node: &str, from: &str) -> Self {
        Self::new(
            "block-dirty-bitmap-merge",
            json!({"node": node, "target": target,
                   "bitmaps": [{"node": from_node, "name": from}]}),
        )
    }

    /// Removes a bitmap.
    pub fn remove_bitmap(node: &str, name: &str) -> Self {
        Self::new("block-dirty-bitmap-remove", json!({"node": node, "name": name}))
    }

    /// Writes to a node of ours that forgets data, so that its recording bitmap remembers where.
    /// The monitor's `qemu-io` is the one writer that needs neither an export nor a job, and it
    /// is everywhere from 7.2 to 11.1; its answer is text, so the bitmap is looked at afterwards.
    pub fn mark(node: &str, range: &Range<u64>) -> Self {
        let (offset, length) = (range.start, range.end.saturating_sub(range.start));
        let line = format!("qemu-io {node} \"write -q -z {offset} {length}\"");
        Self::new("human-monitor-command", json!({"command-line": line}))
    }

    /// Starts QEMU's one NBD server on a unix socket.
    pub fn start_server(socket: &Path) -> Self {
        Self::new("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": socket}}}))
    }

    /// Stops QEMU's one NBD server.
    pub fn stop_server() -> Self {
        Self::new("nbd-server-stop", Value::Null)
    }

    /// An NBD export named as its id.
    pub fn add_export(id: &str, node: &str, writable: bool, bitmaps: &[&str]) -> Self {
        Self::new(
            "block-export-add",
            json!({"id": id, "type": "nbd", "node-name": node, "name": id,
                   "writable": writable, "bitmaps": bitmaps}),
        )
    }

    /// An export for nobody, which holds `node` in the context of `iothread`.
    pub fn add_pin(id: &str, node: &str, iothread: &str) -> Self {
        Self::new(
            "block-export-add",
            json!({"id": id, "type": "nbd", "node-name": node, "name": id, "writable": false,
                   "iothread": iothread, "fixed-iothread": true}),
        )
    }

    /// Ends an export and its connections, whatever they wait for.
    pub fn remove_export(id: &str) -> Self {
        Self::new("block-export-del", json!({"id": id, "mode": "hard"}))
    }

    /// Shuts a push node's connection down: a stopped receiver holds every drain otherwise.
    pub fn yank(node: &str) -> Self {
        Self::new("yank", json!({"instances": [{"type": "block-node", "node-name": node}]}))
    }

    /// Asks a job to end.
    pub fn cancel_job(id: &str) -> Self {
        Self::new("job-cancel", json!({"id": id}))
    }

    /// Lets go of a concluded job.
    pub fn dismiss_job(id: &str) -> Self {
        Self::new("job-dismiss", json!({"id": id}))
    }
}
