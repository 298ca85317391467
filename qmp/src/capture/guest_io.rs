//! What a guest's devices have asked of their disks so far, and how long they waited for it.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::errors::QmpError;
use crate::monitor::Monitor;

/// Longest wait for the counters. They cost QEMU microseconds; one that is slower is busy with
/// something else, and the next look comes soon.
pub const GUEST_IO_WAIT: Duration = Duration::from_millis(500);

/// Requests that were answered since QEMU began, failed ones left out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answered {
    /// How many.
    pub operations: u64,
    /// How long the guest waited for all of them together, in nanoseconds.
    pub nanoseconds: u64,
}

/// One device of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceIo {
    /// QEMU's name for it.
    pub device: String,
    /// Its reads.
    pub reads: Answered,
    /// Its writes.
    pub writes: Answered,
    /// Its flushes.
    pub flushes: Answered,
}

/// Asks QEMU (`query-blockstats`). Nothing here waits for a drain.
pub async fn guest_io(monitor: &Monitor) -> Result<Vec<DeviceIo>, QmpError> {
    let command = "query-blockstats";
    let reply = monitor.execute_raw(command, Value::Null, GUEST_IO_WAIT).await?;
    let content = |why: serde_json::Error| QmpError::Content {
        command: command.into(),
        why: why.to_string(),
    };
    let devices: Vec<DeviceReply> = serde_json::from_value(reply).map_err(content)?;
    Ok(devices.into_iter().filter_map(DeviceReply::named).collect())
}

#[derive(Deserialize)]
struct DeviceReply {
    /// Empty for a device that was attached by the name of a node.
    #[serde(default)]
    device: String,
    qdev: Option<String>,
    stats: StatsReply,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct StatsReply {
    rd_operations: u64,
    rd_total_time_ns: u64,
    wr_operations: u64,
    wr_total_time_ns: u64,
    flush_operations: u64,
    flush_total_time_ns: u64,
}

impl DeviceReply {
    fn named(self) -> Option<DeviceIo> {
        let device = self.qdev.or((!self.device.is_empty()).then_some(self.device))?;
        let answered = |operations, nanoseconds| Answered { operations, nanoseconds };
        let stats = self.stats;
        Some(DeviceIo {
            device,
            reads: answered(stats.rd_operations, stats.rd_total_time_ns),
            writes: answered(stats.wr_operations, stats.wr_total_time_ns),
            flushes: answered(stats.flush_operations, stats.flush_total_time_ns),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn devices_are_named_by_their_path_and_nodes_alone_are_nobody() {
        let stats = json!({"rd_operations": 3, "rd_total_time_ns": 300, "flush_operations": 1,
            "flush_total_time_ns": 9, "wr_operations": 2, "wr_total_time_ns": 40, "wr_bytes": 1});
        let reply = json!([
            {"device": "", "qdev": "/machine/peripheral/vd0/virtio-backend", "stats": stats},
            {"device": "drive0", "stats": stats},
            {"device": "", "node-name": "disk0", "stats": stats},
        ]);
        let devices: Vec<DeviceReply> = serde_json::from_value(reply).expect("shaped");
        let seen: Vec<_> = devices.into_iter().filter_map(DeviceReply::named).collect();
        let names: Vec<_> = seen.iter().map(|io| io.device.as_str()).collect();
        assert_eq!(names, ["/machine/peripheral/vd0/virtio-backend", "drive0"]);
        assert_eq!(seen[0].reads, Answered { operations: 3, nanoseconds: 300 });
        assert_eq!(seen[0].flushes, Answered { operations: 1, nanoseconds: 9 });
    }
}
