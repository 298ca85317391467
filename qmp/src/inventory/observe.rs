//! What QEMU says of its block devices, uninterpreted.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::wire::{Backend, Graph, NamedNode, Property};
use crate::{Monitor, QmpError};

/// Where QEMU keeps the devices that its user added.
const PERIPHERALS: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];

/// Properties of a disk device that are read, where it has them.
const DEVICE_PROPERTIES: [&str; 8] =
    ["type", "parent_bus", "share-rw", "serial", "wwn", "nsid", "iothread", "iothread-vq-mapping"];

/// Properties that tell which iothread serves a controller.
const CONTROLLER_PROPERTIES: [&str; 2] = ["iothread", "iothread-vq-mapping"];

/// Answers to all questions that an inventory needs.
#[derive(Debug, Clone, Default)]
pub struct Observed {
    pub(crate) backends: Vec<Backend>,
    pub(crate) nodes: Vec<NamedNode>,
    pub(crate) graph: Graph,
    /// Properties of disk devices and their controllers by QOM path.
    pub(crate) devices: BTreeMap<String, BTreeMap<String, Value>>,
    /// QOM path and type of each device that the user added.
    pub(crate) peripherals: Vec<(String, String)>,
}

/// Asks QEMU. The answers are not of one instant: a device may come or go in between.
pub async fn observe(monitor: &Monitor, deadline: Duration) -> Result<Observed, QmpError> {
    let ask = Asker { monitor, deadline };
    let mut observed = Observed {
        backends: ask.query("query-block", Value::Null).await?,
        nodes: ask.query("query-named-block-nodes", json!({"flat": true})).await?,
        graph: ask.query("x-debug-query-block-graph", Value::Null).await?,
        ..Observed::default()
    };
    for folder in PERIPHERALS {
        for child in ask.children(folder).await? {
            observed.peripherals.push((format!("{folder}/{}", child.0), child.1));
        }
    }
    let devices: Vec<_> = observed.backends.iter().filter_map(|b| b.qdev.as_deref()).collect();
    for path in devices.into_iter().map(qom_path) {
        let properties = match ask.properties(&path, &DEVICE_PROPERTIES).await {
            Err(error) if error.is_gone() => continue,
            other => other?,
        };
        if let Some(controller) = controller_path(&properties)
            && !observed.devices.contains_key(&controller)
        {
            let found = ask.properties(&controller, &CONTROLLER_PROPERTIES).await?;
            observed.devices.insert(controller, found);
        }
        observed.devices.insert(path, properties);
    }
    Ok(observed)
}

/// QOM path of what `query-block` calls `qdev`: a path already, or the id of a device.
pub(crate) fn qom_path(qdev: &str) -> String {
    if qdev.starts_with('/') { qdev.to_owned() } else { format!("{}/{qdev}", PERIPHERALS[0]) }
}

/// The controller is the object that owns the bus on which the device sits.
pub(crate) fn controller_path(device: &BTreeMap<String, Value>) -> Option<String> {
    let bus = device.get("parent_bus")?.as_str()?;
    let (controller, _) = bus.rsplit_once('/')?;
    (!controller.is_empty()).then(|| controller.to_owned())
}

/// One question with an answer of a known shape.
pub(crate) async fn query<T: DeserializeOwned>(
    monitor: &Monitor,
    command: &str,
    arguments: Value,
    deadline: Duration,
) -> Result<T, QmpError> {
    let value = monitor.execute_raw(command, arguments, deadline).await?;
    serde_json::from_value(value)
        .map_err(|error| QmpError::Content { command: command.into(), why: error.to_string() })
}

struct Asker<'a> {
    monitor: &'a Monitor,
    deadline: Duration,
}

impl Asker<'_> {
    async fn query<T: DeserializeOwned>(
        &self,
        command: &str,
        arguments: Value,
    ) -> Result<T, QmpError> {
        query(self.monitor, command, arguments, self.deadline).await
    }

    async fn list(&self, path: &str) -> Result<Vec<Property>, QmpError> {
        self.query("qom-list", json!({"path": path})).await
    }

    async fn children(&self, folder: &str) -> Result<Vec<(String, String)>, QmpError> {
        let kind = |property: &Property| {
            property.kind.strip_prefix("child<")?.strip_suffix('>').map(str::to_owned)
        };
        let listed = self.list(folder).await?;
        Ok(listed.into_iter().filter_map(|p| kind(&p).map(|kind| (p.name, kind))).collect())
    }

    async fn properties(
        &self,
        path: &str,
        wanted: &[&str],
    ) -> Result<BTreeMap<String, Value>, QmpError> {
        let mut found = BTreeMap::new();
        for property in self.list(path).await? {
            if wanted.contains(&property.name.as_str()) {
                let arguments = json!({"path": path, "property": property.name});
                let value = self.query("qom-get", arguments).await?;
                found.insert(property.name, value);
            }
        }
        Ok(found)
    }
}
