//! Questions to the block graph; pure.

use std::collections::HashMap;

use super::wire::{Graph, GraphEdge, NamedNode};

/// Prefix of every node, export and object that Icecore makes in a QEMU.
pub const OUR_PREFIX: &str = "ic-";

/// Drivers that pass reads and writes through unchanged to their `file` child and stay for good.
const FILTERS: [&str; 5] = ["throttle", "copy-on-read", "preallocate", "compress", "blkdebug"];

/// Drivers that a running job puts between a device and its disk, and takes out when it ends.
const JOB_FILTERS: [&str; 3] = ["mirror_top", "commit_top", "copy-before-write"];

/// Most layers followed downwards; QEMU's graphs have no cycles, a broken answer might.
const LAYERS_MAX: usize = 64;

/// Whether the driver is a lasting filter: the bitmaps of a disk lie on the node below it.
pub(crate) fn is_filter(driver: &str) -> bool {
    FILTERS.contains(&driver)
}

/// Whether the driver belongs to a running job.
pub(crate) fn is_job_filter(driver: &str) -> bool {
    JOB_FILTERS.contains(&driver)
}

/// Whether the name was given by Icecore.
pub fn is_ours(name: &str) -> bool {
    name.starts_with(OUR_PREFIX)
}

pub(crate) struct GraphView<'a> {
    nodes: HashMap<&'a str, &'a NamedNode>,
    names: HashMap<u64, &'a str>,
    graph: &'a Graph,
}

impl<'a> GraphView<'a> {
    pub(crate) fn new(graph: &'a Graph, nodes: &'a [NamedNode]) -> Self {
        Self {
            nodes: nodes.iter().map(|node| (node.name.as_str(), node)).collect(),
            names: graph.nodes.iter().map(|node| (node.id, node.name.as_str())).collect(),
            graph,
        }
    }

    /// The nodes under the device's backend, top down, jobs' hidden filters included (which
    /// `query-block` leaves out). `backend` is the `-drive` name, else the device's id or path;
    /// `node` is what `query-block` names, and tells backends of one name apart.
    pub(crate) fn chain(&self, backend: &str, node: &str) -> Vec<&'a NamedNode> {
        let backends = self.ids(backend, "block-backend");
        let chains = backends.map(|id| self.below(self.child(id, "root")));
        let mut holding = chains.filter(|chain| chain.iter().any(|layer| layer.name == node));
        holding.next().unwrap_or_else(|| self.below(self.ids(node, "block-driver").next()))
    }

    fn below(&self, top: Option<u64>) -> Vec<&'a NamedNode> {
        let mut layers = Vec::new();
        let mut next = top;
        while let Some(id) = next {
            let Some(node) = self.names.get(&id).and_then(|name| self.nodes.get(name)) else {
                break;
            };
            layers.push(*node);
            // A mirror's filter reaches its disk by `backing`; an image's backing file is no layer.
            let backing =
                || is_job_filter(&node.driver).then(|| self.child(id, "backing")).flatten();
            next = self.child(id, "file").or_else(backing);
            next = next.filter(|_| layers.len() < LAYERS_MAX);
        }
        layers
    }

    fn ids(&self, name: &str, kind: &str) -> impl Iterator<Item = u64> {
        let named = self.graph.nodes.iter().filter(move |n| n.name == name && n.kind == kind);
        named.map(|node| node.id)
    }

    fn child(&self, parent: u64, role: &str) -> Option<u64> {
        let mut edges = self.graph.edges.iter();
        edges.find(|edge| edge.parent == parent && edge.name == role).map(|edge| edge.child)
    }

    /// Who may write to the node or resize it, apart from `expected` parents and what is ours.
    pub(crate) fn other_writers(&self, node: &str, expected: &[&str]) -> Vec<String> {
        let Some(id) = self.ids(node, "block-driver").next() else { return Vec::new() };
        let changes = |edge: &&GraphEdge| {
            edge.child == id && edge.perm.iter().any(|perm| perm == "write" || perm == "resize")
        };
        let parents = self.graph.edges.iter().filter(changes);
        let names = parents.map(|edge| self.names.get(&edge.parent).copied().unwrap_or_default());
        names.filter(|name| !expected.contains(name) && !is_ours(name)).map(user_name).collect()
    }
}

/// Exports have no name in the graph.
fn user_name(name: &str) -> String {
    if name.is_empty() { "an export or a job".into() } else { name.into() }
}
