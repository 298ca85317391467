//! What of ours can be seen in a QEMU, and the parsing of the queries that show it.

use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

use super::names::{OurName, RunId};
use crate::errors::QmpError;
use crate::monitor::Monitor;

/// Longest wait for one query. Queries take the big lock and no drain: a second is generous, and
/// a QEMU that is slower is stopped or hung.
pub const QUERY_WAIT: Duration = Duration::from_secs(3);

/// Whether the guest's processors run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunState {
    /// They run.
    Running,
    /// Halted by a `stop`, ours or another's.
    Paused,
    /// Halted for another reason (not started yet, shut down, IO error, migrated …): not ours to
    /// continue.
    Other,
}

/// A device and the node it uses now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceNode {
    /// QOM path of the object whose `drive` property names the node.
    pub qom_path: String,
    /// The node.
    pub node: String,
}

/// A bitmap and where it lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeenBitmap {
    /// Its node.
    pub node: String,
    /// Its name.
    pub name: String,
    /// In use by an export or a job: it cannot be removed now.
    pub busy: bool,
    /// Bytes it calls dirty.
    pub dirty_bytes: u64,
}

/// A job of QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeenJob {
    /// Its id.
    pub id: String,
    /// It has ended and waits to be dismissed.
    pub concluded: bool,
    /// Why it failed, once it has.
    pub error: Option<String>,
    /// Work done so far, in the job's own unit.
    pub done: u64,
    /// Work in all, in the same unit.
    pub total: u64,
}

/// A node of the block graph.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeenNode {
    /// Its name.
    pub name: String,
    /// Its size in bytes, as QEMU sees it now.
    pub size_bytes: u64,
    /// Its file or URI, or a `json:` description where neither tells all.
    pub filename: String,
}

/// The part of a QEMU's state that concerns us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observed {
    /// Whether the guest runs.
    pub state: RunState,
    /// All named nodes.
    pub nodes: Vec<SeenNode>,
    /// (parent node, child node, the child's name in its parent)
    pub edges: Vec<(String, String, String)>,
    /// Devices with a node.
    pub devices: Vec<DeviceNode>,
    /// Ids of all exports.
    pub exports: Vec<String>,
    /// All jobs.
    pub jobs: Vec<SeenJob>,
    /// All named bitmaps.
    pub bitmaps: Vec<SeenBitmap>,
}

impl Observed {
    /// Asks QEMU. Nothing here waits for a drain.
    pub async fn query(monitor: &Monitor) -> Result<Self, QmpError> {
        let ask = |name, arguments| monitor.execute_raw(name, arguments, QUERY_WAIT);
        // All at once: QEMU answers one after the other, and nobody waits in between.
        let (status, nodes, graph, block, exports, jobs) = tokio::try_join!(
            ask("query-status", Value::Null),
            ask("query-named-block-nodes", json!({"flat": true})),
            ask("x-debug-query-block-graph", Value::Null),
            ask("query-block", Value::Null),
            ask("query-block-exports", Value::Null),
            ask("query-jobs", Value::Null),
        )?;
        let replies = Replies { status, nodes, graph, block, exports, jobs };
        replies.parse().map_err(|why| QmpError::Content { command: "queries".into(), why })
    }

    /// The node of that name.
    pub fn node(&self, name: &str) -> Option<&SeenNode> {
        self.nodes.iter().find(|node| node.name == name)
    }

    /// The node that the device uses.
    pub fn device_node(&self, qom_path: &str) -> Option<&str> {
        self.devices.iter().find(|d| d.qom_path == qom_path).map(|d| d.node.as_str())
    }

    /// The `file` child that a filter has now, which an external snapshot may have changed.
    pub fn file_child(&self, parent: &str) -> Option<&str> {
        let file = |edge: &&(String, String, String)| edge.0 == parent && edge.2 == "file";
        self.edges.iter().find(file).map(|edge| edge.1.as_str())
    }

    /// The job of that id.
    pub fn job(&self, id: &str) -> Option<&SeenJob> {
        self.jobs.iter().find(|job| job.id == id)
    }

    /// The bitmap of that name on that node.
    pub fn bitmap(&self, node: &str, name: &str) -> Option<&SeenBitmap> {
        self.bitmaps.iter().find(|bitmap| bitmap.node == node && bitmap.name == name)
    }

    /// The runs that have left a node, an export or a job.
    pub fn runs(&self) -> Vec<RunId> {
        let names = self.nodes.iter().map(|node| &node.name);
        let names = names.chain(&self.exports).chain(self.jobs.iter().map(|job| &job.id));
        let mut runs: Vec<_> = names.filter_map(|n| OurName::parse(n)).map(|n| n.run).collect();
        runs.sort_unstable();
        runs.dedup();
        runs
    }
}

/// All nodes with their present sizes, and nothing else.
pub async fn node_sizes(monitor: &Monitor, wait: Duration) -> Result<Vec<SeenNode>, QmpError> {
    let command = "query-named-block-nodes";
    let nodes = monitor.execute_raw(command, json!({"flat": true}), wait).await?;
    let content = |why| QmpError::Content { command: command.into(), why };
    let nodes: Vec<NodeReply> = shaped(nodes).map_err(content)?;
    Ok(nodes.into_iter().map(NodeReply::seen).collect())
}

/// All jobs, and nothing else.
pub async fn seen_jobs(monitor: &Monitor) -> Result<Vec<SeenJob>, QmpError> {
    let command = "query-jobs";
    let jobs = monitor.execute_raw(command, Value::Null, QUERY_WAIT).await?;
    let content = |why| QmpError::Content { command: command.into(), why };
    let jobs: Vec<JobReply> = shaped(jobs).map_err(content)?;
    Ok(jobs.into_iter().map(seen_job).collect())
}

/// The replies of which an [`Observed`] is made.
#[derive(Debug, Clone)]
struct Replies {
    status: Value,
    nodes: Value,
    graph: Value,
    block: Value,
    exports: Value,
    jobs: Value,
}

#[derive(Deserialize)]
struct NodeReply {
    #[serde(rename = "node-name", default)]
    name: String,
    image: ImageReply,
    #[serde(rename = "dirty-bitmaps", default)]
    bitmaps: Vec<BitmapReply>,
}

impl NodeReply {
    fn seen(self) -> SeenNode {
        SeenNode { name: self.name, size_bytes: self.image.size, filename: self.image.filename }
    }
}

#[derive(Deserialize)]
struct ImageReply {
    #[serde(rename = "virtual-size")]
    size: u64,
    #[serde(default)]
    filename: String,
}

#[derive(Deserialize)]
struct BitmapReply {
    name: Option<String>,
    #[serde(default)]
    busy: bool,
    #[serde(default)]
    count: u64,
}

#[derive(Deserialize)]
struct GraphReply {
    nodes: Vec<GraphNode>,
    edges: Vec<GraphEdge>,
}

#[derive(Deserialize)]
struct GraphNode {
    id: u64,
    #[serde(rename = "type")]
    kind: String,
    name: String,
}

#[derive(Deserialize)]
struct GraphEdge {
    parent: u64,
    child: u64,
    name: String,
}

#[derive(Deserialize)]
struct BlockReply {
    qdev: Option<String>,
    inserted: Option<InsertedReply>,
}

#[derive(Deserialize)]
struct InsertedReply {
    #[serde(rename = "node-name")]
    node: Option<String>,
}

#[derive(Deserialize)]
struct ExportReply {
    id: String,
}

#[derive(Deserialize)]
struct JobReply {
    id: String,
    status: String,
    error: Option<String>,
    #[serde(rename = "current-progress", default)]
    done: u64,
    #[serde(rename = "total-progress", default)]
    total: u64,
}

impl Replies {
    fn parse(self) -> Result<Observed, String> {
        let nodes: Vec<NodeReply> = shaped(self.nodes)?;
        let bitmaps = nodes.iter().flat_map(node_bitmaps).collect();
        let exports: Vec<ExportReply> = shaped(self.exports)?;
        let jobs: Vec<JobReply> = shaped(self.jobs)?;
        Ok(Observed {
            state: run_state(&self.status),
            bitmaps,
            nodes: nodes.into_iter().map(NodeReply::seen).collect(),
            edges: edges(shaped(self.graph)?),
            devices: devices(shaped(self.block)?),
            exports: exports.into_iter().map(|export| export.id).collect(),
            jobs: jobs.into_iter().map(seen_job).collect(),
        })
    }
}

fn shaped<T: serde::de::DeserializeOwned>(value: Value) -> Result<T, String> {
    serde_json::from_value(value).map_err(|error| error.to_string())
}

fn run_state(status: &Value) -> RunState {
    match status.get("status").and_then(Value::as_str) {
        Some("running") => RunState::Running,
        Some("paused") => RunState::Paused,
        _ => RunState::Other,
    }
}

fn node_bitmaps(node: &NodeReply) -> impl Iterator<Item = SeenBitmap> + '_ {
    node.bitmaps.iter().filter_map(|bitmap| {
        Some(SeenBitmap {
            node: node.name.clone(),
            name: bitmap.name.clone()?,
            busy: bitmap.busy,
            dirty_bytes: bitmap.count,
        })
    })
}

fn edges(graph: GraphReply) -> Vec<(String, String, String)> {
    let node_name = |id: u64| {
        let found = graph.nodes.iter().find(|node| node.id == id && node.kind == "block-driver");
        found.map(|node| node.name.clone())
    };
    let named = |edge: &GraphEdge| {
        Some((node_name(edge.parent)?, node_name(edge.child)?, edge.name.clone()))
    };
    graph.edges.iter().filter_map(named).collect()
}

fn devices(blocks: Vec<BlockReply>) -> Vec<DeviceNode> {
    let device = |block: BlockReply| {
        let qom_path = qom_path(&block.qdev?);
        Some(DeviceNode { qom_path, node: block.inserted?.node? })
    };
    blocks.into_iter().filter_map(device).collect()
}

/// `query-block` names a device by its id where it has one, else by its path (block-backend.c,
/// `blk_get_attached_dev_id`).
fn qom_path(qdev: &str) -> String {
    if qdev.starts_with('/') { qdev.to_owned() } else { format!("/machine/peripheral/{qdev}") }
}

fn seen_job(job: JobReply) -> SeenJob {
    SeenJob {
        concluded: job.status == "concluded",
        id: job.id,
        error: job.error,
        done: job.done,
        total: job.total,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replies() -> Replies {
        Replies {
            status: json!({"status": "paused", "running": false}),
            nodes: json!([{"node-name": "d", "image": {"virtual-size": 65536, "filename": "x"},
                "dirty-bitmaps": [{"name": "b", "busy": true, "count": 7}, {"count": 1}]}]),
            graph: json!({"nodes": [
                {"id": 1, "type": "block-backend", "name": "vd0"},
                {"id": 2, "type": "block-driver", "name": "ic-0000000a-0-cbw"},
                {"id": 3, "type": "block-driver", "name": "d"}],
                "edges": [{"parent": 1, "child": 2, "name": "root"},
                          {"parent": 2, "child": 3, "name": "file"}]}),
            block: json!([{"device": "", "qdev": "sd0", "inserted": {"node-name": "d"}},
                {"device": "", "qdev": "/machine/peripheral/vd0/virtio-backend"},
                {"device": "cd0", "qdev": "x"}]),
            exports: json!([{"id": "ic-0000000b-0-exp"}]),
            jobs: json!([{"id": "other", "status": "concluded", "error": "no"}]),
        }
    }

    #[test]
    fn replies_become_what_concerns_us() {
        let seen = replies().parse().expect("parsed");
        assert_eq!(seen.state, RunState::Paused);
        assert_eq!(seen.file_child("ic-0000000a-0-cbw"), Some("d"));
        assert_eq!(seen.device_node("/machine/peripheral/sd0"), Some("d"));
        assert_eq!(seen.devices.len(), 1, "a device without a node is none of ours");
        assert!(seen.bitmap("d", "b").is_some_and(|b| b.busy && b.dirty_bytes == 7));
        assert!(seen.job("other").is_some_and(|job| job.concluded));
        assert_eq!(seen.runs(), [RunId(0xb)], "the graph's nodes are counted from the node list");
    }

    #[test]
    fn a_reply_of_another_shape_is_an_error() {
        let broken = Replies { jobs: json!({"no": "list"}), ..replies() };
        assert!(broken.parse().is_err());
    }
}
