//! The fields of QEMU's block queries that are used, and no others: a field or an enum value that
//! a newer QEMU adds must not make an answer unreadable.
//!
//! QEMU qapi/block-core.json, qapi/block-export.json, qapi/job.json, qapi/qom.json.

use serde::Deserialize;

/// One entry of `query-block`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Backend {
    /// Name of the `-drive`, empty for `-blockdev`.
    #[serde(default)]
    pub device: String,
    /// Id or QOM path of the device that uses it.
    pub qdev: Option<String>,
    pub inserted: Option<Inserted>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Inserted {
    #[serde(rename = "node-name")]
    pub node: Option<String>,
}

/// One entry of `query-named-block-nodes`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct NamedNode {
    #[serde(rename = "node-name")]
    pub name: String,
    #[serde(rename = "drv")]
    pub driver: String,
    #[serde(default)]
    pub file: String,
    #[serde(rename = "ro", default)]
    pub read_only: bool,
    #[serde(default)]
    pub encrypted: bool,
    pub image: Image,
    #[serde(rename = "dirty-bitmaps", default)]
    pub bitmaps: Vec<WireBitmap>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Image {
    #[serde(rename = "virtual-size")]
    pub size_bytes: u64,
    #[serde(rename = "format-specific", default)]
    pub specific: Specific,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub(crate) struct Specific {
    #[serde(default)]
    pub data: SpecificData,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub(crate) struct SpecificData {
    /// qcow2 only: `0.10` is version 2, which cannot store bitmaps.
    pub compat: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct WireBitmap {
    pub name: Option<String>,
    pub count: u64,
    pub granularity: u64,
    #[serde(default)]
    pub recording: bool,
    #[serde(default)]
    pub busy: bool,
    #[serde(default)]
    pub persistent: bool,
    #[serde(default)]
    pub inconsistent: bool,
}

/// `x-debug-query-block-graph`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub(crate) struct Graph {
    pub nodes: Vec<GraphNode>,
    pub edges: Vec<GraphEdge>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct GraphNode {
    pub id: u64,
    #[serde(rename = "type")]
    pub kind: String,
    #[serde(default)]
    pub name: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct GraphEdge {
    pub parent: u64,
    pub child: u64,
    pub name: String,
    #[serde(default)]
    pub perm: Vec<String>,
}

/// One entry of `qom-list`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Property {
    pub name: String,
    #[serde(rename = "type")]
    pub kind: String,
}

/// One entry of `query-block-exports`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Export {
    /// Its id.
    pub id: String,
    /// Its protocol, such as `nbd`.
    #[serde(rename = "type", default)]
    pub kind: String,
    /// The exported node.
    #[serde(rename = "node-name", default)]
    pub node: String,
    /// It is going away and takes no new clients.
    #[serde(rename = "shutting-down", default)]
    pub shutting_down: bool,
}

/// One entry of `query-jobs`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Job {
    /// Its id.
    pub id: String,
    /// What it does, such as `backup`, `mirror`, `commit`.
    #[serde(rename = "type", default)]
    pub kind: String,
    /// Its state, such as `running`, `concluded`.
    #[serde(default)]
    pub status: String,
}
